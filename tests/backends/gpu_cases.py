"""The one list of calls that GPU kernels are held to the tolerance rule on, and where each of them runs.

Every plan operand, mask, dtype, head dimension and option occurs; lengths are odd and meet several tiles of every
architecture and their edges. A case runs forward and backward on each of its places, (backend, architecture) pairs, and
on a GPU where there is one; `make test` has those that are quick, which compile few kernels and yet hold every operand
and option on every backend and architecture.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import posattn
from posattn.encodings.base import Encoding
from posattn.plan import Bias, Plan

HALF, BF16, FULL = torch.float16, torch.bfloat16, torch.float32

Place = tuple[str, int]
CUDA: tuple[Place, ...] = (("cuda", 80), ("cuda", 90))
TRITON: tuple[Place, ...] = (("triton", 80), ("triton", 90))
EVERYWHERE = CUDA + TRITON
SM_80: tuple[Place, ...] = (("cuda", 80), ("triton", 80))
SM_90: tuple[Place, ...] = (("cuda", 90), ("triton", 90))
# Blackwell's tensor memory, where the forward pass alone is held: see what the machine found in the backward one's PTX,
# docs/lab/gpu-proof.md.
TENSOR_MEMORY: Place = ("triton", 100)
# Triton's kernels take longest to compile.
BUT_TRITON_80: tuple[Place, ...] = (*CUDA, ("triton", 90))
BUT_TRITON_90: tuple[Place, ...] = (*CUDA, ("triton", 80))


def tensors(
    dtype: torch.dtype = BF16,
    heads: int = 2,
    kv_heads: int = 2,
    q_len: int = 150,
    k_len: int = 301,
    dim: int = 64,
    batch: int = 1,
    dim_v: int | None = None,
) -> list[Tensor]:
    shapes = ((heads, q_len, dim), (kv_heads, k_len, dim), (kv_heads, k_len, dim_v or dim))
    return [torch.randn(batch, *shape).to(dtype) for shape in shapes]


@dataclass(frozen=True)
class Case:
    """One call. `sizes` are those of tensors(); position and options are made anew for each run, after the tensors."""

    dtype: torch.dtype
    sizes: Mapping[str, int]
    position: Callable[[], Encoding] | None = None
    options: Callable[[], dict[str, Any]] = dict
    on: tuple[Place, ...] = EVERYWHERE
    quick: tuple[Place, ...] = ()
    backward: bool = True  # False: too large for a backward kernel, or too long to compile
    page: int = 0  # tokens a page of keys; they take no gradient then

    @property
    def forward_on(self) -> tuple[Place, ...]:
        """Where only its forward pass runs."""
        return (TENSOR_MEMORY,) if "triton" in dict(self.on) else ()

    def inputs(self) -> tuple[list[Tensor], Encoding | None, dict[str, Any]]:
        qkv = tensors(self.dtype, **self.sizes)
        position, options = self.position() if self.position else None, self.options()
        if self.page:
            qkv, options = in_pages(self.page, qkv, options)
        return qkv, position, options


def in_pages(page: int, qkv: list[Tensor], options: dict[str, Any]) -> tuple[list[Tensor], dict[str, Any]]:
    """The call with its keys in a pool of pages in any order, one of which is nobody's and NaN."""
    q, *columns = qkv
    batch, _, tokens, _ = columns[0].shape
    entries = -(-tokens // page)
    table = torch.randperm(batch * entries + 1)[1:].view(batch, entries)
    pools = []
    for x in columns:
        padded = torch.nn.functional.pad(x, (0, 0, 0, entries * page - tokens), value=math.nan)
        pool = x.new_full((batch * entries + 1, page, x.shape[1], x.shape[3]), math.nan)
        pool[table] = padded.transpose(1, 2).unflatten(1, (entries, page))
        pools.append(pool)
    lengths = options.get("k_lengths", torch.full((batch,), tokens))
    unused = torch.arange(entries) * page >= lengths[:, None]
    table = table.masked_fill(unused, -1).int()
    return [q, *pools], {**options, "block_table": table, "k_lengths": lengths}


def causal(**options: Any) -> Callable[[], dict[str, Any]]:
    return lambda: {"causal": True, **options}


def bent_fire(heads: int, distances: list[float], length: float) -> posattn.FIRE:
    """FIRE with one knot at each of these distances, for queries before `length`."""
    position = posattn.FIRE(heads, width=len(distances), initial_length=length)
    side = torch.tensor([1.0, -1.0] * len(distances))[: len(distances)]
    with torch.no_grad():
        position.mlp[0].weight[:, 0] = side
        position.mlp[0].bias[:] = -side * torch.log1p(0.1 * torch.tensor(distances)) / math.log1p(0.1 * length)
    return position


def steep_fire(slope: float) -> posattn.FIRE:
    """f(y) = relu(1 - slope y) for one head and 2 f for the other: zero but for the nearest keys."""
    position = posattn.FIRE(2, width=1, initial_length=16.0)
    with torch.no_grad():
        for parameter, values in zip(position.mlp.parameters(), ([-slope], [1.0], [1.0, 2.0], [0.0, 0.25])):
            parameter.copy_(torch.tensor(values).view_as(parameter))
    return position


class OnlyPsi(posattn.FIRE):
    """FIRE of which psi alone is learned."""

    def build(self, context: Any) -> Plan:
        profile = super().build(context).bias.profile
        fixed = {name: getattr(profile, name).detach() for name in ("row_scale", "segment_slope", "segment_intercept")}
        return Plan(bias=Bias(profile=dataclasses.replace(profile, **fixed)))


def only_psi(heads: int) -> OnlyPsi:
    position = OnlyPsi(heads, width=8)
    for parameter in (position.length_multiplier, *position.mlp.parameters()):
        parameter.requires_grad_(False)
    return position


def alibi(heads: int = 2, slopes: list[float] | None = None) -> posattn.ALiBi:
    return posattn.ALiBi(heads, learnable=True, slopes=slopes)


def kerple(heads: int = 2) -> posattn.Kerple:
    return posattn.Kerple(heads)


def fire(heads: int = 2, width: int = 8) -> posattn.FIRE:
    return posattn.FIRE(heads, width=width)


def by_distance() -> Encoding:
    return alibi() + kerple() + fire()


def packed(*bounds: int, keys: tuple[int, ...] = ()) -> dict[str, Tensor]:
    return {"cu_seqlens_q": torch.tensor(bounds), "cu_seqlens_k": torch.tensor(keys or bounds)}


def holed(*shape: int) -> Tensor:
    """A bias of which a tenth is minus infinity."""
    return torch.randn(shape).masked_fill(torch.rand(shape) < 0.1, -math.inf)


def positions() -> dict[str, Tensor]:
    """In any order; the queries' are a view, since kernels read them side by side wherever they come from."""
    return {"q_positions": torch.randint(0, 100, (300,))[::2], "k_positions": torch.randint(0, 100, (301, 2)).T[:1]}


SHORT = {"q_len": 70, "k_len": 150}
DOCUMENTS = {"q_len": 150, "k_len": 220}


def documents(**options: Any) -> Callable[[], dict[str, Any]]:
    return lambda: {**packed(0, 7, 7, 150, keys=(0, 90, 91, 220)), "causal": True, **options}


# What many cases need, first with nothing else, then masks, operands, head dimensions, and few queries.
PLAIN: dict[str, Case] = {
    "plain": Case(BF16, {}, quick=CUDA),
    "causal window, grouped heads, softcap, sinks": Case(
        HALF, {"heads": 4, "kv_heads": 2}, None,
        lambda: {
            "causal": True, "window": (140, None), "softcap": 5.0, "sinks": torch.linspace(0, 6, 8)[::2],
        },
        quick=BUT_TRITON_90,
    ),
    "grouped heads": Case(BF16, {"kv_heads": 1}, None, causal(), on=CUDA),
    "more queries than keys": Case(BF16, {"q_len": 300, "k_len": 150}, None, causal(window=(20, 3)),
        quick=(("cuda", 90),),
    ),
    "keys that no query sees": Case(BF16, {"q_len": 20}, alibi, lambda: {"window": (30, 0)}),
    "narrow window": Case(BF16, {"q_len": 300, "k_len": 300}, alibi, causal(window=(70, 0)), on=CUDA),
    "dropout, odd dims": Case(HALF, {**SHORT, "dim": 44, "dim_v": 24}, None, lambda: {"dropout_p": 0.4}),
    "dropout, grouped heads, wide heads": Case(
        BF16, {"dim": 128, "kv_heads": 1}, None, causal(dropout_p=0.3), on=(*CUDA, ("triton", 80)),
    ),
    "negative scale, one dimension": Case(BF16, {"dim": 1, "q_len": 9, "k_len": 33}, None, lambda: {"scale": -1.0}),
    "one query, one key, one head": Case(
        BF16, {"heads": 1, "kv_heads": 1, "q_len": 1, "k_len": 1, "dim": 16}, lambda: kerple(1),
        lambda: {"dropout_p": 0.3}, quick=SM_80,
    ),
    "no keys": Case(BF16, {"k_len": 0}, quick=CUDA, on=CUDA),
    "key lengths": Case(
        BF16, {"q_len": 20, "batch": 3}, kerple, lambda: {"causal": True, "k_lengths": torch.tensor([0, 130, 299])},
    ),
    "key starts, offsets, table, dropout, sinks": Case(
        BF16, {"batch": 2, "k_len": 230}, kerple,
        lambda: {
            "causal": True, "dropout_p": 0.3, "sinks": torch.randn(2), "offset": torch.tensor([70, 99]),
            "k_starts": torch.tensor([37, 130]), "k_lengths": torch.tensor([230, 201]),
        },
    ),
    "key starts, profile, shared bias": Case(
        BF16, {"batch": 2, "k_len": 230}, fire,
        lambda: {"causal": True, "k_starts": torch.tensor([37, 130]), "bias": torch.randn(1, 1, 150, 230)},
    ),
    "key starts, rotary, few queries": Case(
        BF16, {"batch": 2, "q_len": 3, "k_len": 700}, lambda: posattn.RoPE(64) + alibi(),
        lambda: {"causal": True, "k_starts": torch.tensor([41, 0]), "offset": torch.tensor([600, 212])},
    ),
    "segments, table, shared bias": Case(
        BF16, {"batch": 2, "q_len": 150, "k_len": 150}, kerple,
        lambda: {
            "causal": True, "segments": torch.tensor([[2] * 70 + [0] * 75 + [-1] * 5, [3] * 150]),
            "bias": torch.randn(1, 1, 150, 150),
        },
        on=SM_80,
    ),
    "segments of both sides, rotary, slope, mask": Case(
        BF16, {"batch": 2, "q_len": 40, "k_len": 90}, lambda: posattn.RoPE(64) + alibi(),
        lambda: {
            "segments": (
                torch.tensor([[1] * 10 + [2] * 10 + [7] * 20, [5] * 40]),
                torch.tensor([[1] * 40 + [4] * 5 + [7] * 45, [5] * 33 + [-1] * 57]),
            ),
            "mask": torch.rand(2, 1, 40, 90) < 0.7,
        },
        on=SM_80,
    ),
    "offset, top left, slope": Case(HALF, {}, alibi, causal(offset=0)),
    "offset of a shard, table, window": Case(BF16, {}, kerple, causal(offset=290, window=(200, 0))),
    "offset of a shard, profile": Case(BF16, {}, fire, causal(offset=310)),
    "packed documents, slope, softcap": Case(
        HALF, {**DOCUMENTS, "kv_heads": 1}, alibi, documents(softcap=30.0), on=CUDA,
    ),
    "packed documents, table, dropout, sinks": Case(
        BF16, DOCUMENTS, kerple, lambda: documents(dropout_p=0.3, sinks=torch.randn(2))(), quick=BUT_TRITON_90,
    ),
    "packed documents, profile": Case(HALF, DOCUMENTS, fire, documents()),
    "packed documents, wide heads, softcap": Case(
        BF16, {**DOCUMENTS, "kv_heads": 1, "dim": 128}, alibi, documents(softcap=30.0), on=TRITON,
    ),
    "documents of no queries, explicit positions": Case(
        BF16, {"heads": 1, "kv_heads": 1, "q_len": 40, "k_len": 60, "dim": 16}, lambda: fire(1, 6),
        lambda: {
            "q_positions": torch.randint(0, 100, (1, 40)), "k_positions": torch.randint(0, 100, (1, 60)),
            **packed(0, 0, 40, 40, keys=(0, 20, 50, 60)),
        },
    ),
    "explicit positions, table, slope, rotary": Case(
        BF16, {}, lambda: kerple() + alibi() + posattn.RoPE(64), positions, quick=(("cuda", 80),),
    ),
    "explicit positions, profile": Case(BF16, {}, fire, positions, quick=BUT_TRITON_90),
    "slope": Case(BF16, {}, alibi, causal(), quick=(("cuda", 80),)),
    "slope both ways": Case(HALF, {}, alibi),
    "slope, many steps, grouped heads": Case(
        HALF, {"kv_heads": 1, "q_len": 290, "k_len": 310}, alibi, causal(window=(200, None)),
    ),
    "slopes, steep": Case(HALF, {}, lambda: alibi(2, [20.0, 22.0]), causal()),
    "slopes, steep, wide heads, window": Case(
        BF16, {"heads": 1, "kv_heads": 1, "dim": 128, "q_len": 200}, lambda: alibi(1, [20.0]), causal(window=(100, 0)),
        on=TRITON,
    ),
    "slopes, steep, float32": Case(
        FULL, {"dim": 32, "q_len": 40, "k_len": 45}, lambda: alibi(2, [0.7, 5.0]), causal(), on=TRITON,
    ),
    "table": Case(BF16, {"kv_heads": 1}, kerple, causal(), quick=(("cuda", 90),)),
    "table, many steps": Case(
        BF16, {"heads": 1, "kv_heads": 1, "q_len": 330, "k_len": 341}, lambda: kerple(1), causal(), on=TRITON,
    ),
    "table both ways, grouped heads, softcap": Case(
        HALF, {"kv_heads": 1}, lambda: posattn.T5Bias(2), lambda: {"window": (60, 30), "softcap": 8.0},
    ),
    "table, window": Case(
        HALF, {"kv_heads": 1, "q_len": 400, "k_len": 390}, kerple, causal(window=(150, 0)), on=CUDA,
    ),
    "table, short sequences that share sums": Case(
        HALF, {"batch": 2, "heads": 4, "kv_heads": 1, "q_len": 130, "k_len": 5}, lambda: kerple(4), causal(), on=CUDA,
    ),
    "table and mask": Case(
        BF16, {}, lambda: posattn.T5Bias(2), lambda: {"mask": torch.rand(1, 2, 150, 301) < 0.1},
        quick=(("cuda", 90),),
    ),
    "table that clamps": Case(BF16, {}, lambda: posattn.RelativeTable(2, 20), on=CUDA),
    "table of explicit positions, T5": Case(
        BF16, {}, lambda: posattn.T5Bias(2),
        lambda: {"q_positions": torch.arange(150) * 2, "k_positions": torch.arange(301)}, on=CUDA,
    ),
    "profile": Case(BF16, {}, fire, causal(), quick=CUDA),
    "profile, grouped heads, both ways": Case(BF16, {"kv_heads": 1}, fire, on=CUDA),
    "profile of two words of knots": Case(HALF, {}, lambda: fire(2, 40), on=CUDA),
    "profile, runs of tiles": Case(
        BF16, {"heads": 1, "kv_heads": 1, "q_len": 600, "k_len": 620},
        lambda: bent_fire(1, [9.0, 250.0, 260.0], 400.0), causal(window=(560, None)),
    ),
    "profile, psi alone": Case(BF16, {"dim": 16}, lambda: only_psi(2), causal()),
    "profile, flat after steep": Case(
        HALF, {"dim": 16, "q_len": 70, "k_len": 90}, lambda: steep_fire(1e6), causal(), quick=(("cuda", 80),),
    ),
    "profile, flat after steep, both ways": Case(
        HALF, {"dim": 16, "q_len": 70, "k_len": 90}, lambda: steep_fire(1e3), on=TRITON,
    ),
    "profile, flat after steep, explicit positions": Case(
        HALF, {"dim": 16, "q_len": 70, "k_len": 90}, lambda: steep_fire(1e6),
        lambda: {"q_positions": 3 * torch.arange(70), "k_positions": 2 * torch.arange(90)}, on=SM_80,
    ),
    "profile, flat after steep, few queries": Case(
        HALF, {"dim": 16, "q_len": 3, "k_len": 700}, lambda: steep_fire(1e6), causal(), on=SM_80,
    ),
    "all by distance, window": Case(BF16, {}, by_distance, causal(window=(140, 0)), on=CUDA),
    "dense": Case(BF16, {}, None, lambda: {"bias": holed(1, 2, 150, 301)}),
    "dense, mask, key bounds, offsets, in order": Case(
        BF16, {"q_len": 20, "batch": 3}, None,
        lambda: {
            "bias": holed(1, 2, 20, 301), "mask": torch.rand(3, 1, 20, 301) < 0.6, "deterministic": True,
            "k_lengths": torch.tensor([0, 130, 299]), "k_starts": torch.tensor([0, 37, 1]),
            "causal": True, "offset": torch.tensor([3, 105, 281]),
        },
        quick=BUT_TRITON_80,
    ),
    "dense in 16 bits, transposed": Case(
        HALF, {"dim": 32}, alibi, lambda: {"bias": torch.randn(1, 2, 301, 150).to(HALF).mT}, on=CUDA,
    ),
    "dense in 16 bits, shared": Case(
        BF16, {"batch": 2, "kv_heads": 1}, None,
        lambda: {"bias": torch.randn(1, 1, 150, 301).to(BF16), "causal": True}, on=CUDA, quick=(("cuda", 90),),
    ),
    "dense, shared": Case(BF16, {"batch": 2}, None, lambda: {"bias": torch.randn(1, 1, 150, 301), "causal": True}),
    "dense, mask, dropout": Case(
        HALF, {}, None,
        lambda: {"dropout_p": 0.3, "bias": torch.randn(1, 2, 150, 301), "mask": torch.rand(1, 1, 150, 301) < 0.6},
        on=CUDA,
    ),
    "dense and profile, wide heads": Case(
        BF16, {"heads": 1, "kv_heads": 1, "dim": 128, "q_len": 40}, lambda: fire(1, 4),
        lambda: {"bias": torch.randn(1, 1, 40, 301)}, on=(*CUDA, ("triton", 90)),
    ),
    "dense, wide heads": Case(
        BF16, {"dim": 128}, None, lambda: {"bias": torch.randn(1, 2, 150, 301), "causal": True}, on=CUDA,
    ),
    "rotary turned in the kernel": Case(BF16, {"q_len": 16}, lambda: posattn.RoPE(64), causal(),
        quick=(("triton", 90),),
    ),
    "rotary turned ahead": Case(
        HALF, {"q_len": 300, "k_len": 300, "dim": 32}, lambda: posattn.RoPE(32, layout="interleaved", rotary_dim=16),
        causal(),
    ),
    "rotary ahead in halves, both ways": Case(
        HALF, {"q_len": 270, "k_len": 65, "dim": 32}, lambda: posattn.RoPE(32), on=CUDA,
    ),
    "rotary of odd pairs and slope": Case(
        BF16, {"dim": 24}, lambda: posattn.RoPE(24, rotary_dim=6) + alibi(), causal(), on=CUDA,
    ),
    "rotary and slope": Case(BF16, {}, lambda: posattn.RoPE(64) + alibi(), causal(), quick=EVERYWHERE),
    "rotary and fixed slope": Case(BF16, {}, lambda: posattn.RoPE(64) + posattn.ALiBi(2), causal()),
    "rotary and slope, wide heads": Case(BF16, {"dim": 128}, lambda: posattn.RoPE(128) + alibi(), causal(), on=CUDA),
    "every operand": Case(
        BF16, {"q_len": 100, "k_len": 150}, lambda: posattn.RoPE(64) + by_distance(),
        lambda: {"causal": True, "bias": torch.randn(1, 2, 100, 150), "softcap": 20.0, "sinks": torch.randn(2)},
        quick=CUDA,
    ),
    "every operand, wide heads": Case(
        BF16, {"dim": 128, "q_len": 100, "k_len": 150}, lambda: alibi() + kerple(),
        lambda: {
            "causal": True, "bias": torch.randn(1, 2, 100, 150), "softcap": 20.0, "sinks": torch.randn(2),
            "dropout_p": 0.2,
        },
        on=CUDA,
    ),
    "in order, table": Case(BF16, {"kv_heads": 1}, kerple, causal(deterministic=True), on=CUDA,
        quick=(("cuda", 90),),
    ),
    "in order, profile, window": Case(
        BF16, {"q_len": 240, "k_len": 300}, fire, lambda: {"window": (60, 70), "deterministic": True}, on=CUDA,
    ),
    "in order, dense, shared": Case(
        BF16, {"batch": 2, "kv_heads": 1}, None,
        lambda: {"bias": torch.randn(1, 1, 150, 301), "causal": True, "deterministic": True}, on=CUDA,
    ),
    "D = 24 and 56": Case(BF16, {"dim": 24, "dim_v": 56}, None, causal(), on=CUDA, quick=(("cuda", 90),)),
    "D = 32 and 128": Case(BF16, {"dim": 32, "dim_v": 128}, kerple, causal(), on=CUDA),
    "D = 40": Case(BF16, {"dim": 40}, alibi, on=CUDA),
    "D = 96": Case(BF16, {"dim": 96}, kerple, causal(), on=CUDA, quick=(("cuda", 80),)),
    "D = 96 and 24, profile": Case(HALF, {"dim": 96, "dim_v": 24}, fire, causal(), on=CUDA),
    "D = 128": Case(HALF, {"dim": 128}, None, causal(), on=CUDA, quick=CUDA),
    "D = 128, table": Case(
        BF16, {"heads": 1, "kv_heads": 1, "dim": 128}, lambda: kerple(1), causal(), on=TRITON, quick=(("triton", 90),),
    ),
    "D = 128, slope": Case(BF16, {"heads": 1, "kv_heads": 1, "dim": 128, "k_len": 140}, lambda: alibi(1), causal()),
    "D = 128, T5 both ways": Case(HALF, {"dim": 128}, lambda: posattn.T5Bias(2), on=CUDA),
    "D = 128, grouped heads, one step each": Case(
        HALF, {"heads": 4, "kv_heads": 1, "q_len": 40, "dim": 128}, None, causal(), on=CUDA,
    ),
    "D = 64 and 128, table": Case(BF16, {"dim": 64, "dim_v": 128}, kerple, causal(), on=CUDA),
    "D = 128 and 64, profile": Case(HALF, {"dim": 128, "dim_v": 64}, fire, causal(), on=CUDA),
    "D = 192 and 32, slope": Case(HALF, {"dim": 192, "dim_v": 32, "q_len": 70}, alibi, causal(), on=CUDA),
    "D = 192 and 256, profile": Case(BF16, {**SHORT, "dim": 192, "dim_v": 256}, fire, causal(), on=CUDA),
    "D = 200 and 256, table": Case(
        BF16, {"heads": 1, "kv_heads": 1, "dim": 200, "dim_v": 256, "q_len": 40, "k_len": 70}, lambda: kerple(1),
        causal(), on=TRITON,
    ),
    "D = 320": Case(
        BF16, {"heads": 2, "kv_heads": 1, "dim": 320, "q_len": 21, "k_len": 37}, None, causal(), on=TRITON,
        quick=(("triton", 80),),
    ),
    "D = 512, table and rotation": Case(
        BF16, {"heads": 1, "kv_heads": 1, "dim": 512, "q_len": 21, "k_len": 37},
        lambda: kerple(1) + posattn.RoPE(512), causal(), on=TRITON,
    ),
    "D = 512 and 300, profile": Case(
        HALF, {"heads": 1, "kv_heads": 1, "dim": 512, "dim_v": 300, "q_len": 37, "k_len": 53}, lambda: fire(1),
        on=TRITON,
    ),
    "D = 512, float32, slope": Case(
        FULL, {"heads": 1, "kv_heads": 1, "dim": 512, "q_len": 19, "k_len": 20}, lambda: alibi(1), causal(), on=TRITON,
    ),
    "D = 512, few queries": Case(
        BF16, {"heads": 2, "kv_heads": 1, "dim": 512, "q_len": 3, "k_len": 70}, lambda: posattn.RoPE(512), causal(),
        on=TRITON, backward=False,
    ),
    "D = 512, dense": Case(
        BF16, {"heads": 1, "kv_heads": 1, "dim": 512, "q_len": 21, "k_len": 37}, None,
        lambda: {"bias": torch.randn(1, 1, 21, 37)}, on=TRITON,
    ),
    "D = 256, slope": Case(HALF, {**SHORT, "dim": 256}, alibi, on=CUDA, quick=(("cuda", 80),)),
    "D = 256, profile": Case(BF16, {**SHORT, "dim": 256}, fire, causal(), on=CUDA),
    "D = 256, grouped heads, window": Case(
        BF16, {"kv_heads": 1, "dim": 256, "q_len": 150, "k_len": 100}, None, lambda: {"window": (60, 10)}, on=TRITON,
    ),
    "one query of many heads": Case(BF16, {"heads": 4, "q_len": 1, "k_len": 100}, quick=CUDA, on=CUDA),
    "few queries of eight heads, table": Case(
        BF16, {"heads": 8, "kv_heads": 1, "q_len": 3, "k_len": 300}, lambda: kerple(8), causal(), on=CUDA,
    ),
    "few queries, D = 256, window": Case(
        BF16, {"q_len": 5, "k_len": 130, "dim": 256}, fire, causal(window=(40, 0)), on=CUDA,
    ),
    "few queries in two blocks of rows": Case(
        BF16, {"heads": 4, "kv_heads": 1, "q_len": 6, "k_len": 90, "dim": 192}, lambda: posattn.RoPE(192) + fire(4),
        causal(), on=CUDA,
    ),
    "few queries, rotary": Case(BF16, {"q_len": 5, "k_len": 130}, lambda: posattn.RoPE(64), causal(), on=CUDA),
    "few queries, key lengths, softcap": Case(
        BF16, {"heads": 4, "q_len": 2, "k_len": 140, "batch": 3}, lambda: kerple(4),
        lambda: {"causal": True, "k_lengths": torch.tensor([0, 3, 139]), "softcap": 5.0}, on=CUDA,
    ),
    "few queries, dense and mask": Case(
        BF16, {"heads": 4, "q_len": 2, "k_len": 140, "batch": 2}, None,
        lambda: {"bias": torch.randn(1, 4, 2, 140).to(BF16), "mask": torch.rand(1, 1, 2, 140) < 0.5}, on=CUDA,
    ),
    "few queries, documents": Case(
        HALF, {"heads": 4, "q_len": 7, "k_len": 600, "dim": 40}, lambda: kerple(4),
        lambda: {"causal": True, **packed(0, 1, 5, 7, keys=(0, 1, 590, 600))}, on=CUDA,
    ),
    "split keys, one query, D = 128, sinks": Case(
        HALF, {"heads": 4, "kv_heads": 1, "q_len": 1, "k_len": 700, "dim": 128}, lambda: posattn.ALiBi(4),
        lambda: {"causal": True, "sinks": torch.randn(4)}, on=CUDA, quick=CUDA,
    ),
    "split keys, rotary, dropout, wider values": Case(
        BF16, {"heads": 4, "q_len": 5, "k_len": 1130, "dim": 32, "dim_v": 64},
        lambda: posattn.RoPE(32) + posattn.ALiBi(4), causal(dropout_p=0.3), on=CUDA,
    ),
    "split keys, more splits than lanes": Case(
        HALF, {"kv_heads": 1, "q_len": 1, "k_len": 10300, "dim": 32}, lambda: posattn.ALiBi(2),
        lambda: {"causal": True, "sinks": torch.randn(2)}, on=CUDA,
    ),
    "split keys of many queries": Case(
        BF16, {"heads": 4, "q_len": 100, "k_len": 1300}, lambda: kerple(4),
        lambda: {"causal": True, "sinks": torch.randn(4)}, on=CUDA,
    ),
    "split keys, few queries": Case(
        BF16, {"q_len": 3, "k_len": 700}, kerple, lambda: {"causal": True, "sinks": torch.randn(2)},
        quick=(("triton", 80),),
    ),
}  # fmt: skip


# Keys in pages: of less than a tile, of whole tiles, of a size that divides nothing; decoding and chunks of a prefill.
PAGES: dict[str, Case] = {
    "pages of less than a tile, key lengths, slope, grouped heads": Case(
        BF16, {"q_len": 40, "batch": 2, "kv_heads": 1}, alibi,
        lambda: {"causal": True, "k_lengths": torch.tensor([0, 299])}, page=16, backward=False,
    ),
    "pages of whole tiles, rotary ahead, table, window": Case(
        BF16, {"q_len": 300}, lambda: posattn.RoPE(64) + kerple(), causal(window=(200, 0)), page=256, backward=False,
    ),
    "pages of whole tiles, profile, sinks, softcap, odd dims": Case(
        HALF, {"q_len": 40, "dim": 40, "dim_v": 24, "k_len": 390}, fire,
        lambda: {"softcap": 5.0, "sinks": torch.randn(2)}, page=128, backward=False,
    ),
    "pages of whole tiles, one query": Case(
        BF16, {"heads": 4, "q_len": 1, "k_len": 300, "batch": 2}, lambda: kerple(4),
        lambda: {"causal": True, "k_lengths": torch.tensor([300, 130])}, page=64, backward=False, on=SM_80,
    ),
    "pages of three, few queries, rotary, dense, mask, key starts, offset": Case(
        BF16, {"q_len": 3, "k_len": 702, "batch": 2}, lambda: posattn.RoPE(64) + alibi(),
        lambda: {
            "causal": True, "k_starts": torch.tensor([41, 0]), "offset": torch.tensor([600, 212]),
            "bias": torch.randn(1, 1, 3, 702), "mask": torch.rand(2, 1, 3, 702) < 0.8,
        },
        page=3, backward=False, quick=SM_80,
    ),
    "pages of three, rotary ahead, dropout, positions": Case(
        BF16, {"q_len": 300, "k_len": 303, "dim": 32}, lambda: posattn.RoPE(32),
        lambda: {
            "dropout_p": 0.3, "q_positions": torch.randint(0, 99, (300,)), "k_positions": torch.randint(0, 99, (303,)),
        },
        page=3, backward=False, on=SM_80,
    ),
    "pages, mixed heads": Case(
        BF16, {"heads": 3, "kv_heads": 3, "q_len": 5, "k_len": 53, "dim": 32},
        lambda: posattn.DAPE(kerple(3), 3, width=8), causal(), page=16, backward=False, on=(("cuda", 80),),
    ),
}  # fmt: skip


def _broadcast(shape: tuple[int, ...]) -> Callable[[], dict[str, Any]]:
    """A dense bias of each key, or of each query, beside what meets it in every sum."""
    return lambda: {
        "bias": torch.randn(shape), "k_lengths": torch.tensor([33, 70]), "sinks": torch.randn(4), "causal": True,
        "deterministic": True,
    }  # fmt: skip


def _packed_bias(*shape: int) -> Callable[[], dict[str, Any]]:
    return lambda: {"bias": torch.randn(shape), **packed(0, 40, 90)}


_BATCH = {"heads": 4, "batch": 2, "q_len": 50, "k_len": 70, "dim": 32}
# Of each sequence and head, or shared.
BROADCAST: dict[str, Case] = {
    "bias of keys, shared": Case(BF16, _BATCH, None, _broadcast((1, 1, 1, 70)), SM_80),
    "bias of keys": Case(BF16, _BATCH, None, _broadcast((2, 4, 1, 70)), SM_80, quick=SM_80),
    "bias of queries, of sequences": Case(BF16, _BATCH, None, _broadcast((2, 1, 50, 1)), SM_80,
        quick=(("cuda", 80),),
    ),
    "bias of queries, of heads": Case(BF16, _BATCH, None, _broadcast((1, 4, 50, 1)), SM_80),
    "bias of one number": Case(BF16, _BATCH, None, _broadcast((1, 1, 1, 1)), SM_80),
    "bias of keys, packed": Case(BF16, {"q_len": 90, "k_len": 90, "dim": 32}, None, _packed_bias(1, 1, 1, 90), SM_90),
    "bias of queries, packed": Case(
        BF16, {"q_len": 90, "k_len": 90, "dim": 32}, None, _packed_bias(1, 2, 90, 1), SM_90, quick=(("cuda", 90),),
    ),
    "bias of keys, mixed": Case(
        BF16, _BATCH, lambda: posattn.DAPE(kerple(4), 4), _broadcast((2, 4, 1, 70)), SM_80, quick=(("cuda", 80),)
    ),
    "bias of queries, mixed": Case(
        BF16, _BATCH, lambda: posattn.DAPE(kerple(4), 4), _broadcast((1, 1, 50, 1)), SM_80
    ),
}  # fmt: skip


def mixed(inner: Encoding | None, heads: int = 3, width: int = 8, **options: Any) -> posattn.DAPE:
    return posattn.DAPE(inner, heads, width=width, **options)


_THREE = {"heads": 3, "kv_heads": 3, "q_len": 37, "k_len": 53, "dim": 32}
_TWO = {"heads": 2, "kv_heads": 2, "dim": 16}
# The CUDA source is one for all architectures; on sm_90 only what NVRTC makes of it differs.
_CUDA_80: tuple[Place, ...] = (("cuda", 80),)
_BUT_CUDA_90 = (*_CUDA_80, *TRITON)


def _heads(heads: int, kv_heads: int, dim: int) -> dict[str, int]:
    return {**_THREE, "heads": heads, "kv_heads": kv_heads, "dim": dim}


# Logits mixed across heads: every form over every inner operand, masks, and the smallest and largest that fit.
HEADMIX: dict[str, Case] = {
    "mix, no inner bias": Case(BF16, _THREE, lambda: mixed(None), causal(), on=_BUT_CUDA_90),
    "mix, table, two sequences": Case(
        BF16, {**_THREE, "batch": 2}, lambda: mixed(kerple(3)), causal(), quick=CUDA,
    ),
    "mix, concat, slope, softcap": Case(
        BF16, _THREE, lambda: posattn.DAPE(alibi(3), 3, form="concat"), lambda: {"softcap": 3.0}, on=_BUT_CUDA_90,
    ),
    "mix, add, profile": Case(
        BF16, _THREE, lambda: posattn.DAPE(fire(3, 6), 3, form="add"), on=(*_CUDA_80, *TRITON),
    ),
    "mix, profile, flat after steep": Case(
        HALF, {**_TWO, "q_len": 37, "k_len": 53}, lambda: mixed(steep_fire(1e6), 2, 4), causal(),
        on=(*_CUDA_80, ("triton", 80)), quick=_CUDA_80,
    ),
    "mix, outer bias, sinks, dropout, window, mask": Case(
        BF16, {**_THREE, "batch": 2}, lambda: mixed(kerple(3)),
        lambda: {
            "bias": torch.randn(2, 1, 37, 53), "sinks": torch.randn(3), "dropout_p": 0.3, "window": (20, None),
            "mask": torch.rand(1, 3, 37, 53) < 0.7,
        },
        on=(*_CUDA_80, ("triton", 90)), quick=(*_CUDA_80, ("triton", 90)),
    ),
    "mix, packed documents, dropout, sinks": Case(
        BF16, {**_THREE, "q_len": 60, "k_len": 50}, lambda: mixed(kerple(3)),
        lambda: {
            "causal": True, "dropout_p": 0.3, "sinks": torch.randn(3), **packed(0, 5, 5, 60, keys=(0, 20, 21, 50)),
        },
        on=(*CUDA, ("triton", 80)), quick=(("cuda", 90), ("triton", 80)),
    ),
    "mix, key lengths": Case(
        BF16, {**_THREE, "q_len": 5, "batch": 3}, lambda: mixed(kerple(3)),
        lambda: {"causal": True, "k_lengths": torch.tensor([0, 3, 49])}, on=SM_80,
    ),
    "mix, key starts, offset, shared bias": Case(
        BF16, {**_THREE, "batch": 2}, lambda: mixed(kerple(3)),
        lambda: {
            "causal": True, "k_starts": torch.tensor([17, 0]), "offset": torch.tensor([20, 3]), "dropout_p": 0.2,
            "bias": torch.randn(1, 1, 37, 53),
        },
        on=(*CUDA, ("triton", 80)),
    ),
    # 9 to 12 heads in Triton: two warps share each of the last ones. Keys for a tile inside the mask and for one on its
    # border.
    "mix, rotary, grouped heads": Case(
        HALF, {"heads": 12, "kv_heads": 4, "q_len": 18, "k_len": 85},
        lambda: posattn.DAPE(posattn.RoPE(64) + kerple(12), 12), causal(), quick=CUDA,
    ),
    "mix, nine heads, dropout, window, mask": Case(
        BF16, {"heads": 9, "kv_heads": 9, "q_len": 17, "k_len": 70, "dim": 24}, lambda: mixed(posattn.ALiBi(9), 9),
        lambda: {
            "bias": torch.randn(1, 1, 17, 70), "sinks": torch.randn(9), "dropout_p": 0.3, "window": (60, None),
            "mask": torch.rand(1, 9, 17, 70) < 0.7,
        },
        on=TRITON,
    ),
    "mix, logits far from what is mixed": Case(
        HALF, {**_TWO, "q_len": 5, "k_len": 7}, lambda: mixed(kerple(2), 2, 4), lambda: {"scale": 20.0}, on=TRITON,
    ),
    "mix, float32": Case(FULL, {**_TWO, "q_len": 18, "k_len": 21}, lambda: mixed(kerple(2), 2, 4), causal(), on=TRITON),
    "mix, explicit positions, profile, in order": Case(
        BF16, {**_THREE, "q_len": 5}, lambda: mixed(fire(3, 6)),
        lambda: {
            "q_positions": torch.randint(0, 30, (5,)), "k_positions": torch.randint(0, 30, (53,)),
            "deterministic": True,
        },
        on=_BUT_CUDA_90, quick=_CUDA_80,
    ),
    "mix, explicit positions, profile": Case(
        BF16, {**_THREE, "q_len": 5}, lambda: mixed(fire(3, 6)),
        lambda: {"q_positions": torch.randint(0, 30, (5,)), "k_positions": torch.randint(0, 30, (53,))}, on=_CUDA_80,
    ),
    "mix, explicit positions, nine heads, table, in order": Case(
        BF16, {**_THREE, "heads": 9, "kv_heads": 9, "q_len": 5}, lambda: mixed(kerple(9), 9),
        lambda: {
            "q_positions": torch.randint(0, 30, (5,)), "k_positions": torch.randint(0, 30, (53,)),
            "deterministic": True,
        },
        on=(("triton", 90),),
    ),
    "mix, in order, window, bias for all heads": Case(
        BF16, {**_THREE, "q_len": 50, "batch": 2}, lambda: mixed(kerple(3) + alibi(3)),
        lambda: {"window": (30, 9), "bias": torch.randn(1, 1, 50, 53), "deterministic": True}, on=CUDA,
    ),
    "mix, in order, profile, packed documents": Case(
        BF16, {**_THREE, "q_len": 60, "k_len": 50}, lambda: mixed(fire(3, 6)),
        lambda: {"causal": True, "deterministic": True, **packed(0, 5, 5, 60, keys=(0, 20, 21, 50))}, on=_CUDA_80,
    ),
    "mix, D = 128": Case(BF16, _heads(4, 2, 128), lambda: posattn.DAPE(kerple(4), 4), on=_CUDA_80),
    "mix, D = 88, one head": Case(HALF, _heads(1, 1, 88), lambda: posattn.DAPE(None, 1), on=_CUDA_80),
    "mix, sixteen heads": Case(
        BF16, _heads(16, 16, 64), lambda: posattn.DAPE(posattn.ALiBi(16), 16), causal(), on=_CUDA_80, backward=False,
    ),
    "mix, two heads to a warp, the last one alone": Case(
        BF16, _heads(25, 5, 64), lambda: posattn.DAPE(kerple(25), 25), causal(), on=_CUDA_80, backward=False,
    ),
    "mix, 32 heads, 64 hidden units": Case(
        HALF, _heads(32, 4, 64), lambda: mixed(None, 32, 64), causal(), on=_CUDA_80, backward=False,
    ),
    "mix, D = 96": Case(
        BF16, _heads(5, 5, 96), lambda: posattn.DAPE(None, 5, form="add"), causal(), on=_CUDA_80, backward=False,
    ),
    **{
        f"mix, limits, {heads} heads, D = {dim}": Case(
            BF16, {"heads": heads, "kv_heads": heads, "q_len": 5, "k_len": 21, "dim": dim},
            lambda heads=heads, width=width: mixed(kerple(heads), heads, width), causal(), on=TRITON, backward=False,
        )
        for heads, dim, width in ((1, 16, 1), (32, 64, 64), (8, 256, 8))
    },
}  # fmt: skip

CASES: dict[str, Case] = {**PLAIN, **PAGES, **BROADCAST, **HEADMIX}
