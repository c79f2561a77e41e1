"""Every launch that the package can make by its own choice, for tools that compile and examine them without a GPU.

Calls of each kind are built on the meta device and their host code is run with a launch that only records.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from posattn.backends.triton import attention_backward, attention_forward, headmix_backward, headmix_forward
from posattn.backends.triton.configs import headmix
from posattn.backends.triton.configs.launch_config import ARCHITECTURES
from posattn.plan import Bias, Call, Dense, HeadMix, Mask, Plan, Profile, Rotary, Slope, Table

# Long enough that every kernel has a full inner loop, and a multiple of 16 as lengths in training are.
_TOKENS = 2048
_PROCESSORS = 108


@dataclass(frozen=True)
class Shipped:
    """One kernel launch: `args` are the leading parameters of `kernel` (meta tensors, numbers, None)."""

    arch: str
    label: str
    kernel: Any
    args: tuple[Any, ...]
    constexprs: Mapping[str, Any]
    num_warps: int
    num_stages: int
    registers: int | None


def _float(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.float32, device="meta")


def _plans(heads: int, q_len: int, k_len: int, rotary_dim: int) -> dict[str, Plan]:
    length, first = q_len + k_len - 1, -(q_len - 1)
    table = Table(_float(heads, length), first)
    profile = Profile(_float(length), first, _float(length), first, _float(32), _float(heads, 33), _float(heads, 33))
    half = rotary_dim // 2
    rotary = Rotary(_float(1, q_len, half), _float(1, q_len, half), _float(1, k_len, half), _float(1, k_len, half))
    inner = Bias(table=table)
    mix = HeadMix(_float(32, 2 * heads), _float(32), _float(heads, 32), _float(heads), inner=inner)
    slope, dense = Slope(_float(heads)), Dense(_float(1, heads, q_len, k_len))
    return {
        "plain": Plan(),
        "rotary": Plan(rotary=rotary),
        "slope": Plan(bias=Bias(slope=slope)),
        "table": Plan(bias=Bias(table=table)),
        "profile": Plan(bias=Bias(profile=profile)),
        "dense": Plan(bias=Bias(dense=dense)),
        "everything": Plan(rotary=rotary, bias=Bias(slope=slope, table=table, profile=profile, dense=dense)),
        "mix": Plan(mix=mix),
    }


_WANTED = {
    "slope": ("slope",),
    "table": ("table",),
    "profile": ("psi", "row_scale", "segment_slope", "segment_intercept"),
    "dense": ("dense",),
    "everything": ("slope", "table", "psi", "row_scale", "segment_slope", "segment_intercept", "dense"),
    "mix": ("w1", "b1", "w2", "b2", "inner.table"),
}


def shipped(
    architectures: Sequence[str] = ARCHITECTURES,
    dims: Sequence[int] = (64, 128, 256),
    dtypes: Sequence[torch.dtype] = (torch.bfloat16,),
) -> Iterator[Shipped]:
    """Forward and backward of every kind of plan, and decoding, for each architecture, head dimension and dtype."""
    for arch in architectures:
        for dtype in dtypes:
            for dim in dims:
                for q_len in (1, _TOKENS):
                    for name, plan in _plans(12, q_len, _TOKENS, dim).items():
                        if q_len == 1 and name not in ("plain", "rotary", "table", "mix"):
                            continue
                        label = f"{name}, D = {dim}, {str(dtype).removeprefix('torch.')}, Tq = {q_len}"
                        call = _call(plan, dim, dtype, q_len, name == "everything")
                        yield from _recorded(arch, label, call, _WANTED.get(name, ()))


def _call(plan: Plan, dim: int, dtype: torch.dtype, q_len: int, every_option: bool) -> Call:
    q = torch.empty((1, 12, q_len, dim), dtype=dtype, device="meta")
    k, v = (torch.empty((1, 12, _TOKENS, dim), dtype=dtype, device="meta") for _ in range(2))
    if not every_option:
        return Call(q, k, v, plan, Mask(causal=True, max_q=q_len, max_k=_TOKENS), dim**-0.5)
    boolean = torch.empty((1, 1, q_len, _TOKENS), dtype=torch.bool, device="meta")
    mask = Mask(causal=True, left=_TOKENS // 2, boolean=boolean, max_q=q_len, max_k=_TOKENS)
    options = {"softcap": 30.0, "dropout_p": 0.1, "seed": torch.empty(1, dtype=torch.int64, device="meta")}
    return Call(q, k, v, plan, mask, dim**-0.5, sinks=_float(12), **options)


def _recorded(arch: str, label: str, call: Call, wanted: Sequence[str]) -> Iterator[Shipped]:
    if headmix.unsupported(call) is not None:
        return
    found: list[Shipped] = []

    def record(
        kernel: Any,
        grid: Sequence[int],
        args: Sequence[Any],
        constexprs: Mapping[str, Any],
        warps: int,
        stages: int,
        registers: int | None,
    ) -> None:
        given = dict(constexprs)
        if "NVIDIA" in given:  # the host code reads it off the torch it runs in
            given["NVIDIA"] = arch.startswith("sm_")
        found.append(Shipped(arch, label, kernel, tuple(args), given, warps, stages, registers))

    needs = frozenset(("q", "k", "v", *wanted))
    q, mix, lse = call.q, call.plan.mix, _float(*call.q.shape[:3])
    if mix is not None:
        headmix_forward.forward(call, mix, record, arch)
        if q.shape[2] > 1:
            headmix_backward.backward(call, mix, q, lse, q, None, needs, record, arch)
    else:
        attention_forward.forward(call, record, arch, _PROCESSORS)
        if q.shape[2] > 1:
            attention_backward.backward(call, q, lse, q, None, needs, record, arch)
    yield from found
