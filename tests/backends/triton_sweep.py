"""Sweeps the Triton kernels in Triton's interpreter; a program of its own, since the interpreter is chosen at import.

    TRITON_INTERPRET=1 python -m tests.backends.triton_sweep FIRST LAST

Runs every length from FIRST to LAST through attention() and its backward, with tiles of 16, so that every remainder of
a tile is met with several full tiles before it. The interpreter knows no assembly, so kernels take the path of AMD.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any
from unittest import mock

import torch

import posattn
from posattn.backends.triton import attention_backward, attention_forward
from posattn.backends.triton import launch as seam
from posattn.backends.triton.configs.launch_config import LaunchConfig
from posattn.parity import measure
from posattn.plan import Call
from tests.ptxsim import interpreter

# Small, since a sweep is about borders; with warps on one axis of the results or on both, in turn.
TILES = [LaunchConfig(16, 16, 4, 1, "a sweep", spread=spread) for spread in (False, True)]

# Plans and masks in turn along the lengths; (encoding, options) for a length. An odd number, so that each plan meets
# both dtypes, which take turns too.
PLANS = (
    lambda n: (None, {"causal": True}),
    lambda n: (posattn.Kerple(1), {}),
    lambda n: (posattn.ALiBi(1, learnable=True), {"causal": True, "window": (n // 2, None)}),
    lambda n: (posattn.FIRE(1, width=4), {"causal": True}),
    lambda n: (None, {"bias": torch.randn(1, 1, n, n + 7)}),
    lambda n: (posattn.RoPE(16), {"k_lengths": torch.tensor([n - 1])}),
    lambda n: (posattn.T5Bias(1), {"dropout_p": 0.3, "sinks": torch.zeros(1)}),
    lambda n: (posattn.DAPE(posattn.FIRE(1, width=4), 1, width=4), {"causal": True}),
    lambda n: (posattn.DAPE(posattn.ALiBi(1, learnable=True), 1, width=4, form="add"), {"window": (n // 2, None)}),
)


def launch(
    kernel: Any, grid: Sequence[int], args: Sequence[Any], constexprs: Mapping[str, Any], *options: int | None
) -> None:
    given = dict(constexprs)
    if "NVIDIA" in given:
        given["NVIDIA"] = False
    kernel[tuple(grid)](*args, **given)


def main(first: int, last: int) -> int:
    interpreter.mend()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    replaced = mock.patch.multiple(
        seam,
        launch=launch,
        has_device=lambda device: True,
        architecture=lambda device: "sm_80",
        processors=lambda device: 1,
    )

    def small(arch: str, call: Call) -> LaunchConfig:
        return TILES[call.q.shape[2] // len(PLANS) % 2]

    tiles = mock.patch.multiple(attention_backward, main_config=small, by_tile_config=small)
    broken = 0
    with replaced, tiles, mock.patch.object(attention_forward, "forward_config", small):
        for n in range(first, last + 1):
            position, options = PLANS[n % len(PLANS)](n)
            dtype = torch.bfloat16 if n % 2 else torch.float32
            q, k, v = (torch.randn(1, 1, length, 16).to(dtype) for length in (n, n + 7, n + 7))
            for found in measure(q, k, v, position, options, "triton"):
                if not found.ok:
                    broken += 1
                    print(f"{n} tokens, {type(position).__name__}, {sorted(options)}: {found.worst}")
    return int(broken > 0)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2])))
