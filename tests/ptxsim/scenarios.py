"""What mutation tests run: computations on the machine that raise AssertionError when their numbers are wrong.

A scenario takes a Machine, reaches its kernels through the machine's launch (directly, or through the package's
wrappers inside behind_launch), and checks its results as the parity suite would. Its lengths meet every edge that a
bound can be off by one at: a tile's, and those of the rows that one thread of a tile loads.
"""

from __future__ import annotations

import math

import torch

from . import calibration
from .seam import Machine


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


def attention(machine: Machine) -> None:
    """The calibration kernel, causal."""
    _attention(machine, causal=True)


def attention_full(machine: Machine) -> None:
    """The calibration kernel, every key."""
    _attention(machine, causal=False)


def _parity(bias: bool, backward: bool) -> None:
    """The Triton backend, at most twice as wrong as naive PyTorch, at lengths whose inner loops run unmasked too."""
    import posattn

    for tokens in (70, 250, 323, 10, 20, 40, 52, 84, 100):
        torch.manual_seed(tokens)
        encoding = posattn.ALiBi(2) if bias else posattn.RoPE(64)
        leaves = [torch.randn(1, 2, tokens, 64, dtype=torch.float16) for _ in range(3)]
        if tokens == 323:
            leaves[0] *= 40  # logits of several hundred: exponents overflow if the running maximum is not right
        results = []
        for backend, dtype in (("triton", torch.float16), ("reference", torch.float16), ("reference", torch.float64)):
            q, k, v = (leaf.to(dtype, copy=True).requires_grad_(backward) for leaf in leaves)
            out, lse = posattn.attention(q, k, v, encoding, causal=True, return_lse=True, backend=backend)
            found = [out.detach(), lse.detach()]
            if backward:
                out.backward(torch.ones_like(out))
                found += [tensor.grad for tensor in (q, k, v)]
            results.append([tensor.double() for tensor in found])
        for got, naive, want in zip(*results, strict=True):
            assert got.isfinite().all()
            allowed = 2 * (naive - want).abs().max() + 2.0**-10 * want.abs().max()
            assert (got - want).abs().max() <= allowed


def forward_slope(machine: Machine) -> None:
    """posattn.attention with ALiBi, forward."""
    _parity(bias=True, backward=False)


def forward_rotary(machine: Machine) -> None:
    """posattn.attention with rotary embeddings, forward."""
    _parity(bias=False, backward=False)


def backward_slope(machine: Machine) -> None:
    """posattn.attention with ALiBi, forward and backward."""
    _parity(bias=True, backward=True)


SCENARIOS = {
    function.__name__: function
    for function in (attention, attention_full, forward_slope, forward_rotary, backward_slope)
}
