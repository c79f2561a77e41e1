"""How much work a call is, and how much the machine can do: the two halves of a row's share of the peak."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from posattn import DAPE

from .cases import Case
from .encodings import build

DECODING = 16  # queries up to which reading the keys and values binds, and the share is one of bandwidth


@dataclass(frozen=True)
class Work:
    """`amount` in FLOP, or in bytes if the peak that binds is `read`."""

    amount: float
    peak: str


def work(case: Case, encoding: str) -> Work:
    """The least that any exact implementation has to do: two products forward, five backward, and DAPE's network.

    Additive biases, softmax and rotation are left out, so a share of the peak charges them to the implementation.
    """
    dtype = getattr(torch, case.dtype)
    if case.q_len <= DECODING and case.mode == "forward":
        kv_heads = case.kv_heads or case.heads
        return Work(2.0 * case.batch * kv_heads * case.k_len * case.head_dim * dtype.itemsize, "read")
    pairs = case.batch * case.heads * _visible(case)
    products = {"forward": 2, "backward": 5, "both": 7}[case.mode]
    # The network forward; its recomputation and two products for its backward.
    passes = {"forward": 1, "backward": 3, "both": 4}[case.mode]
    flop = pairs * (2.0 * case.head_dim * products + _network(case, encoding) * passes)
    return Work(flop, "bf16dot" if dtype == torch.bfloat16 else "fma")


def _visible(case: Case) -> int:
    """Pairs of query and key under the mask, for one head."""
    if not case.causal:
        return case.q_len * case.k_len
    first = case.k_len - case.q_len + 1
    return sum(max(first + i, 0) for i in range(case.q_len))


def _network(case: Case, encoding: str) -> float:
    """FLOP of DAPE's two linear layers for one pair and one head."""
    mixing = build(encoding, case.heads, case.head_dim, max(case.q_len, case.k_len))
    if not isinstance(mixing, DAPE):
        return 0.0
    return 2.0 * sum(p.numel() for p in mixing.mlp.parameters() if p.dim() == 2) / case.heads


def peak(kind: str, device: str, threads: int, dtype: str) -> float:
    """What this machine does at best right now: FLOP/s for `fma` and `bf16dot`, bytes/s for `read`; 0 if unknown.

    On a CPU these are register-only loops and a read of a large array in posattn's own module. A GPU's `fma` and
    `bf16dot` are both torch's large square product in `dtype`, its `read` a large copy.
    """
    if device != "cpu":
        return _gpu_read() if kind == "read" else _gpu_product(getattr(torch, dtype))
    import posattn._cpu as native

    return 1e9 * float(native.probe_peak(kind, threads))


def _gpu_product(dtype: torch.dtype, size: int = 8192) -> float:
    a, b = (torch.randn(size, size, device="cuda").to(dtype) for _ in range(2))
    return 2.0 * size**3 / _gpu_seconds(lambda: a @ b)


def _gpu_read(count: int = 2**28) -> float:
    source = torch.empty(count, device="cuda")
    target = torch.empty_like(source)
    return 2.0 * source.nbytes / _gpu_seconds(lambda: target.copy_(source))


def _gpu_seconds(call: Callable[[], object], repeats: int = 10) -> float:
    best = math.inf
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best
