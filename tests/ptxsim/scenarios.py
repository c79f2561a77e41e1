"""What mutation tests run: computations on the machine that raise AssertionError when their numbers are wrong.

A scenario takes a Machine, reaches its kernels through the machine's launch (directly, or through the package's
wrappers inside behind_launch), and checks its results as the parity suite would. Its lengths meet every edge that a
bound can be off by one at: a tile's, and those of the rows that one thread of a tile loads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch

import posattn

from . import calibration
from .seam import Machine

Run = Callable[[Machine], None]


@dataclass(frozen=True)
class Scenario:
    """What to run, and the kernels (a pattern of their names) whose mutants it should notice."""

    run: Run
    what: str
    kernels: str = ""


def _attention(machine: Machine, causal: bool) -> None:
    for tokens in (131, 65, 3, 17, 33, 49, 79, 97, 113, 127, 10, 36, 50, 58):
        torch.manual_seed(tokens)
        q, k, v = (torch.randn(1, tokens, 64, dtype=torch.float16) for _ in range(3))
        out, lse = torch.full_like(q, math.nan), torch.full((1, tokens), math.nan)
        args = [q, k, v, out, lse, 0.125, tokens, q.stride(0), q.stride(1)]
        consts = {"CAUSAL": causal, "D": 64, "BLOCK_M": 64, "BLOCK_N": 32}
        machine.launch(calibration.attention, (math.ceil(tokens / 64), 1), args, consts, 4, 3)
        scores = q.double() @ k.double().mT / 8
        if causal:
            scores = scores.masked_fill(torch.ones(tokens, tokens).triu(1).bool(), -math.inf)
        want = scores.softmax(-1) @ v.double()
        assert out.isfinite().all()
        assert (out.double() - want).abs().max() < 2e-3
        assert (lse.double() - scores.logsumexp(-1)).abs().max() < 1e-5


@dataclass(frozen=True)
class _Case:
    """A call with 2 heads of 64 channels; `loud` scales the queries until exponents could overflow."""

    q_len: int
    k_len: int
    loud: float = 1.0


# Several blocks of queries and several tiles of keys that need no mask, so that every loop runs more than once in one
# specialisation; both lengths end in every part of a tile that one thread loads, in the prologue and in each loop;
# diagonals cross at many offsets, and one leaves a block a single key.
_FORWARD = (
    _Case(250, 250), _Case(133, 573, 150.0), _Case(150, 610), _Case(148, 211), _Case(165, 318), _Case(180, 463),
    _Case(198, 201), _Case(213, 409), _Case(229, 342), _Case(243, 388, 150.0), _Case(143, 97), _Case(133, 396),
    _Case(229, 296), _Case(227, 266), _Case(250, 123), _Case(130, 10), _Case(150, 20), _Case(134, 40), _Case(150, 60),
    _Case(134, 70), _Case(250, 362),
)  # fmt: skip
# As few queries as the forward kernel turns itself; keys that end in every part of a tile, once without a full one.
_ROTARY = (
    _Case(15, 330), _Case(13, 460, 150.0), _Case(2, 70), _Case(9, 84), _Case(14, 106), _Case(7, 124), _Case(10, 140),
    _Case(6, 150), _Case(8, 237), _Case(13, 250), _Case(3, 181), _Case(9, 71),
)  # fmt: skip
# Without causality only the bound on keys masks: lengths that end at every column that a thread of a tile may hold.
_EVERY_KEY = (
    *_FORWARD, _Case(165, 123, 150.0),
    *(_Case(20, k) for k in (131, 139, 147, 154, 162, 163, 171, 178, 179, 195, 202, 218, 219, 235, 242, 243)),
)  # fmt: skip
# The same from the side of the keys, whose blocks walk the queries.
_BACKWARD = (
    _Case(250, 250), _Case(250, 600), _Case(133, 317, 150.0), _Case(129, 270), _Case(255, 383), _Case(143, 97),
    _Case(60, 20), _Case(60, 40), _Case(70, 70), _Case(10, 20), _Case(20, 20), _Case(40, 40), _Case(150, 140),
    _Case(100, 110),
)  # fmt: skip
# Walks longer than the ring of three tiles of 128 queries.
_LONG_BACKWARD = (*_BACKWARD, _Case(690, 560))
# Every row of a tile in use, keys that end in every part of a tile of the prologue and of the loop, then split keys.
_DECODE = (
    _Case(15, 330), _Case(13, 460, 150.0), _Case(2, 10), _Case(3, 20), _Case(9, 40), _Case(14, 60),
    _Case(15, 70, 150.0), _Case(7, 84), _Case(11, 106), _Case(5, 124), _Case(10, 140), _Case(6, 150), _Case(8, 237),
    _Case(13, 250), _Case(12, 290), _Case(1, 1), _Case(3, 65), _Case(16, 64), _Case(15, 9), _Case(15, 611),
    _Case(3, 4096), _Case(2, 4096, 150.0), _Case(6, 1024), _Case(1, 8448), _Case(1, 9216),
)  # fmt: skip
# Rows that end in every row of a tile, a block with a single key, and logits that move the rows' references.
_MIX = (
    _Case(37, 37), _Case(20, 53), _Case(33, 90), _Case(52, 41), _Case(38, 158, 150.0), _Case(40, 9), _Case(18, 60),
    _Case(35, 70), _Case(23, 23), _Case(44, 44), _Case(26, 26), _Case(27, 50), _Case(30, 65), _Case(31, 31),
    _Case(25, 40), _Case(29, 29), _Case(24, 50), _Case(39, 105, 150.0),
)  # fmt: skip


def _encoding(name: str) -> posattn.Encoding | None:
    torch.manual_seed(0)
    makers = {"slope": lambda: posattn.ALiBi(2), "rotary": lambda: posattn.RoPE(64)}
    makers["mix"] = lambda: posattn.DAPE(posattn.Kerple(2), 2, width=16)
    return makers[name]() if name in makers else None


def _results(
    name: str, case: _Case, backward: bool, causal: bool, backend: str, dtype: torch.dtype
) -> list[torch.Tensor]:
    torch.manual_seed(case.q_len)
    q = torch.randn(1, 2, case.q_len, 64, dtype=torch.float16) * case.loud
    k, v = (torch.randn(1, 2, case.k_len, 64, dtype=torch.float16) for _ in range(2))
    upstream = torch.randn_like(q).to(dtype)
    leaves = [x.to(dtype, copy=True).requires_grad_(backward) for x in (q, k, v)]
    encoding = _encoding(name)
    if encoding is not None and dtype == torch.float64:
        encoding = encoding.double()
    out, lse = posattn.attention(*leaves, encoding, causal=causal, return_lse=True, backend=backend)
    found = [out, lse]
    if backward:
        out.backward(upstream)
        found += [x.grad for x in (*leaves, *(encoding.parameters() if encoding is not None else ()))]
    return [x.detach().double() for x in found if x is not None]


@cache
def _expected(name: str, case: _Case, backward: bool, causal: bool) -> list[tuple[torch.Tensor, float]]:
    """What is right, and how far from it twice naive PyTorch's error and a few roundings allow."""
    exact = _results(name, case, backward, causal, "reference", torch.float64)
    naive = _results(name, case, backward, causal, "reference", torch.float16)

    def largest(x: torch.Tensor) -> float:
        return x[x.isfinite()].abs().max().item()

    return [(x, 2 * largest(y - x) + 2.0**-10 * largest(x)) for x, y in zip(exact, naive, strict=True)]


def _parity(
    name: str, cases: Sequence[_Case], backward: bool = False, causal: bool = True, backend: str = "triton"
) -> Run:
    def run(machine: Machine) -> None:
        for case in cases:
            found = _results(name, case, backward, causal, backend, torch.float16)
            for got, (want, allowed) in zip(found, _expected(name, case, backward, causal), strict=True):
                seen = want.isfinite()
                assert torch.equal(got.isfinite(), seen), case
                assert (got - want)[seen].abs().max() <= allowed, case

    return run


SCENARIOS = {
    "attention": Scenario(partial(_attention, causal=True), "the calibration kernel, causal"),
    "attention_full": Scenario(partial(_attention, causal=False), "the calibration kernel, every key"),
    "forward_plain": Scenario(_parity("plain", _EVERY_KEY, causal=False), "Triton forward, every key", "attention"),
    "forward_slope": Scenario(_parity("slope", _FORWARD), "Triton forward, ALiBi", "attention"),
    "forward_rotary": Scenario(_parity("rotary", _ROTARY), "Triton forward, rotary", "attention"),
    "backward_slope": Scenario(
        _parity("slope", _BACKWARD, backward=True), "Triton gradients, ALiBi", "attention_backward|prepare"
    ),
    "mix": Scenario(_parity("mix", _MIX), "Triton forward, HeadMix over Kerple", "headmix_forward"),
    "decode": Scenario(_parity("slope", _DECODE), "Triton decoding, ALiBi"),
    "cuda_decode": Scenario(_parity("slope", _DECODE, backend="cuda"), "CUDA decoding, ALiBi"),
    "cuda_slope": Scenario(_parity("slope", _FORWARD, backend="cuda"), "CUDA forward, ALiBi", "attention_forward"),
    "cuda_backward": Scenario(
        _parity("slope", _LONG_BACKWARD, backward=True, backend="cuda"),
        "CUDA gradients, ALiBi",
        "attention_backward|backward_",
    ),
    "cuda_mix": Scenario(_parity("mix", _MIX, backend="cuda"), "CUDA forward, HeadMix over Kerple"),
}
