"""Host side of the CUDA backward pass: its launches, their scratch, and the gradients that come of it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from posattn.backends import cuda_gradients as gradients
from posattn.backends import cuda_launch
from posattn.backends import cuda_operands as operands
from posattn.backends.cuda_backward_hopper import hopper_shared_bytes, hopper_tile
from posattn.backends.cuda_backward_tiles import BackwardTile, backward_tile, shared_bytes
from posattn.backends.cuda_forward import run, turned
from posattn.backends.cuda_operands import Constants, Members
from posattn.backends.strides import steps
from posattn.kernels.operands import k_max, q_max, sequences
from posattn.kernels.sums import by_entry, slope_gradient
from posattn.kernels.units import bias_units
from posattn.plan import Call

LOG2E = math.log2(math.e)
_LINES = frozenset(("row_scale", "profile_slope", "profile_intercept"))
_EACH_ONCE, _SHARED = 1, 2  # WANT_DENSE: elements of the dense gradient are stored, or added up


@dataclass(frozen=True)
class _Pass:
    """What the launches of one backward pass share. Tensors come in 16-byte chunks, q and k turned."""

    call: Call
    needs: frozenset[str]
    q: Tensor
    k: Tensor
    v: Tensor
    grad_out: Tensor
    tile: BackwardTile
    constants: Constants
    values: Members  # of BackwardParams, as far as they do not hold results

    @property
    def rows(self) -> int:
        """Padded rows of all sequences, see BackwardRowsParams."""
        block, count = self.tile.block_m, sequences(self.call)
        if self.call.mask.cu_seqlens_q is not None:
            return (self.call.q.shape[2] // block + count) * block
        return self.padded_queries * count

    @property
    def key_blocks(self) -> int:
        return -(-k_max(self.call) // self.tile.block_n)

    @property
    def first_distance(self) -> int:
        """Of the first diagonal that a tile can meet; strips begin up to three earlier."""
        return -(q_max(self.call) + self.tile.block_n + 4)

    @property
    def diagonals(self) -> int:
        """Distances from the first on; a multiple of 4, for copies of 16 bytes."""
        return -(-(k_max(self.call) + self.tile.block_m + 8 - self.first_distance) // 4) * 4

    @property
    def by_wgmma(self) -> bool:
        return bool(self.constants["WGMMA"])

    @property
    def slots(self) -> int:
        """Into how many parts sums by distance are spread, so that few warps meet at one address: one a sequence, as
        long as all take no more than the tokens do. One long document among many short ones has no room for each."""
        tokens = self.call.q.shape[0] * (self.call.q.shape[2] + self.call.k.shape[2])
        return max(1, min(sequences(self.call), 2 * tokens // self.diagonals))

    def zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float32, device=self.q.device)

    def run_rows(self, entry: str, struct: str, values: Members, blocks: int, source: str = "backward_rows.cu") -> None:
        """A kernel of `source`, `blocks` blocks for the queries of each sequence and head."""
        members = {"shape": self.values["shape"], "mask": self.values["mask"], "rows": self.rows, **values}
        grid = (blocks * self.call.q.shape[1] * sequences(self.call),)
        run(source, entry, struct, self.constants, members, grid, 32 * self.tile.warps, 0, self.q.device)

    @property
    def padded_queries(self) -> int:
        """Of the longest sequence."""
        return -(-q_max(self.call) // self.tile.block_m) * self.tile.block_m


def _wants(call: Call, needs: frozenset[str]) -> Constants:
    """WANT_*: which operands' gradients the kernel sums."""
    dense = 0
    if "dense" in needs and call.plan.bias.dense is not None:
        alone = call.plan.bias.dense.bias.shape == (*call.q.shape[:3], call.k.shape[2])
        dense = _EACH_ONCE if alone else _SHARED
    return {
        "WANT_SLOPE": "slope" in needs,
        "WANT_TABLE": "table" in needs,
        "WANT_PSI": "psi" in needs,
        "WANT_LINES": bool(needs & _LINES),
        "WANT_DENSE": dense,
        "ORDERED": call.deterministic,
    }


def _prepared(call: Call, out: Tensor, grad_out: Tensor, needs: frozenset[str]) -> _Pass:
    q, k, v, grad_out = (operands.in_chunks(x) for x in (call.q, call.k, call.v, grad_out))
    rotary = call.plan.rotary
    if rotary is not None:
        q = turned(q, rotary.q_cos, rotary.q_sin, rotary)
        k = turned(k, rotary.k_cos, rotary.k_sin, rotary)
    mask, mask_constants = operands.mask(call)
    positions, position_constants = operands.positions(call)
    dropout, dropout_constants = operands.dropout(call)
    element = operands.element(call)
    dim = max(int(element.pop("HEAD_DIM")), int(element.pop("HEAD_DIM_V")))
    constants: Constants = {
        **element,
        **mask_constants,
        **position_constants,
        **dropout_constants,
        **_wants(call, needs),
        "HAS_SOFTCAP": call.softcap != 0.0,
        "HAS_TABLE": call.plan.bias.table is not None,
        "HAS_PROFILE": call.plan.bias.profile is not None,
        "HAS_DENSE": call.plan.bias.dense is not None,
        "ROTARY": rotary is not None,
        "INTERLEAVED": rotary is not None and rotary.interleaved,
        "HALF": 1 if rotary is None else rotary.q_cos.shape[-1],
    }
    arch = cuda_launch.architecture(q.device)
    tile = hopper_tile(arch, dim, constants) or backward_tile(arch, dim, constants)
    constants["PADDED"] = tile.padded(dim)
    bias, bias_constants = operands.bias(call, call.plan.bias, tile.warp_queries, tile.warp_keys)
    values = {
        "q": q,
        "k": k,
        "v": v,
        "grad_out": grad_out,
        "q_strides": operands.strides(q),
        "k_strides": operands.strides(k),
        "v_strides": operands.strides(v),
        "grad_out_strides": operands.strides(grad_out),
        "shape": operands.shape(call, tile.block_m, tile.block_n),
        "mask": mask,
        "positions": positions,
        "bias": bias,
        "k_angles": operands.angles(rotary.k_cos, rotary.k_sin) if rotary is not None else {},
        "dropout": dropout,
        "scale": call.scale,
        "scale2": call.scale * LOG2E,
        "softcap": call.softcap,
    }
    return _Pass(call, needs, q, k, v, grad_out, tile, {**constants, **bias_constants, **tile.constants()}, values)


def backward(
    call: Call, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None, needs: frozenset[str]
) -> dict[str, Tensor]:
    """The gradients named in `needs`, of a call without HeadMix; those of parameters in float32."""
    of = _prepared(call, out, grad_out, needs)
    rows = _row_statistics(of, out, lse, grad_lse)
    lse2, minus_delta = rows["lse2"], rows["minus_delta"]
    grads: dict[str, Tensor] = {}
    if call.sinks is not None and "sinks" in needs:
        # A sink is a logit without a value. Padded rows and rows that see nothing have lse2 = +inf, so weight zero.
        weight = torch.exp2(call.sinks.float()[:, None] * LOG2E - lse2)
        grads["sinks"] = (weight * minus_delta).sum(1)
    accumulated, sums, grads_of_keys = _main(of, rows)
    if "q" in needs:
        grads["q"] = _rows_of_queries(of, accumulated)
    grads.update(grads_of_keys)
    grads.update(_operand_gradients(of, sums))
    return {name: grads[name] for name in needs}


def _row_statistics(of: _Pass, out: Tensor, lse: Tensor, grad_lse: Tensor | None) -> dict[str, Tensor]:
    """What backward_rows writes: lse2 and minus_delta [H, rows], row_scale [rows]."""
    out = operands.in_chunks(out)
    shape = (of.call.q.shape[1], of.rows)
    results = {
        "lse2": torch.full(shape, float("inf"), dtype=torch.float32, device=out.device),
        "minus_delta": of.zeros(*shape),
    }
    if of.constants["HAS_PROFILE"]:
        results["row_scale"] = of.zeros(of.rows)
    values = {
        "out": out,
        "grad_out": of.grad_out,
        "lse": lse.contiguous(),
        "grad_lse": None if grad_lse is None else grad_lse.float().contiguous(),
        "positions": of.values["positions"],
        "bias": of.values["bias"],
        **results,
        "out_strides": operands.strides(out),
        "grad_out_strides": operands.strides(of.grad_out),
    }
    lanes = max(4, 1 << (int(of.constants["DIM_V"]) // 8 - 1).bit_length())
    rows_a_block = 32 * of.tile.warps // lanes
    of.run_rows("backward_rows", "BackwardRowsParams", values, -(-of.padded_queries // rows_a_block))
    return results


def _rows_of_queries(of: _Pass, accumulated: Tensor) -> Tensor:
    """dQ in rows, from accumulators in the order of fragments."""
    call, rotary = of.call, of.call.plan.rotary
    create = torch.empty if call.mask.cu_seqlens_q is None else torch.zeros
    dq = create(of.q.shape, dtype=of.q.dtype, device=of.q.device)
    values = {
        "accumulated": accumulated,
        "dq": dq,
        "dq_strides": operands.strides(dq),
        "angles": operands.angles(rotary.q_cos, rotary.q_sin) if rotary is not None else {},
        "scale": call.scale,
    }
    warps = of.padded_queries // 8 * (int(of.constants["PADDED"]) // 32)  # each stores eight rows of 32 dimensions
    of.run_rows("backward_queries", "BackwardQueriesParams", values, -(-warps // of.tile.warps))
    return dq[..., : call.q.shape[3]].contiguous()


def _by_distance(of: _Pass) -> dict[str, Tensor]:
    """The table and psi at every distance that a tile can meet, so that the kernel copies them as they lie."""
    if of.call.q_positions is not None:
        return {}
    bias = of.call.plan.bias
    distance = torch.arange(of.diagonals, device=of.q.device) + of.first_distance
    found = {}
    if bias.table is not None:
        values, first = bias.table.values.float(), bias.table.first
        found["table"] = values[:, (distance - first).clamp(0, values.shape[1] - 1)].contiguous()
    if bias.profile is not None:
        values, first = bias.profile.psi.float(), bias.profile.first
        found["psi"] = values[(distance - first).clamp(0, values.shape[0] - 1)]
    return found


def _query_tiles(of: _Pass) -> Members:
    """q and grad_out of BackwardParams as the tiles that backward_sm90.cu copies."""
    shape = (of.call.q.shape[1], of.rows * int(of.constants["PADDED"]))
    tiles = {name: torch.empty(shape, dtype=of.q.dtype, device=of.q.device) for name in ("q_tiles", "grad_tiles")}
    values = {name: of.values[name] for name in ("q", "grad_out", "q_strides", "grad_out_strides")}
    blocks = of.padded_queries // of.tile.block_m
    of.run_rows("backward_tiles", "BackwardTilesParams", {**values, **tiles}, blocks, "backward_sm90_tiles.cu")
    return {"q": tiles["q_tiles"], "grad_out": tiles["grad_tiles"]}


def _with_slope(of: _Pass, lse2: Tensor) -> Tensor:
    """lse2 [H, rows] less a linear slope times the row's number in its block (LSE_HAS_SLOPE)."""
    slope, count = of.call.plan.bias.slope, sequences(of.call)
    if slope is None or not of.constants["LINEAR"] or of.call.q_positions is not None:
        return lse2
    number = torch.arange(of.tile.block_m, device=lse2.device) * LOG2E
    by_head = slope.slope.float().reshape(-1, lse2.shape[0]).T  # [H, 1 or B]
    sequence = 1 if of.call.mask.cu_seqlens_q is not None else count
    blocks = lse2.view(lse2.shape[0], sequence, -1, of.tile.block_m)
    return (blocks + by_head[:, :, None, None] * number).view_as(lse2)


def _main(of: _Pass, rows: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Runs attention_backward: dQ's accumulators, the sums of operands, and the gradients of k and v."""
    call, tile, bias = of.call, of.tile, of.call.plan.bias
    heads = call.q.shape[1]
    count, device = sequences(call), of.q.device
    accumulated = of.zeros(heads, of.rows * int(of.constants["PADDED"]))
    # Keys of no sequence are written by nobody.
    partial = call.mask.cu_seqlens_k is not None or call.mask.k_lengths is not None
    create = torch.zeros if partial else torch.empty
    dk, dv = (create(x.shape, dtype=x.dtype, device=device) for x in (of.k, of.v))
    sums, units = _sums(of), None
    dense = sums.get("ddense")
    turns = None
    if call.deterministic:
        if bias:
            units = bias_units(call, bias, of.grad_out, rows["minus_delta"])
        turns = torch.zeros(1 + heads * of.rows // tile.block_m, dtype=torch.int32, device=device)
    values = {
        **of.values,
        **sums,
        **rows,
        **_by_distance(of),
        "dq": accumulated,
        "dk": dk,
        "dv": dv,
        "turns": turns,
        "dk_strides": operands.strides(dk),
        "dv_strides": operands.strides(dv),
        "ddense_strides": {} if dense is None else dict(zip(("batch", "head", "query", "key"), steps(dense))),
        "units": units,
        "rows": of.rows,
        "slots": of.slots,
        "diagonals": of.diagonals,
        "first_distance": of.first_distance,
    }
    if of.by_wgmma:
        shared = hopper_shared_bytes(tile, int(of.constants["PADDED"]), of.constants)
        values.update(_query_tiles(of), lse2=_with_slope(of, rows["lse2"]))
    else:
        shared = shared_bytes(tile, int(of.constants["PADDED"]), of.constants)
    constants = {
        **of.constants,
        "BLOCKS_PER_SM": tile.blocks,
        "GRAD_STAGES": tile.grad_stages,
        "STRIP_ROWS": tile.strip_rows,
        "SHARED_BYTES": shared,
    }
    grid = (of.key_blocks * call.k.shape[1] * count,)
    run(tile.source, "attention_backward", "BackwardParams", constants, values, grid, 32 * tile.warps, shared, device)
    keys = {"k": dk[..., : call.k.shape[3]].contiguous(), "v": dv[..., : call.v.shape[3]].contiguous()}
    if units is not None:
        sums = {name: x if x.is_floating_point() else (x.double() / units).float() for name, x in sums.items()}
    return accumulated, sums, {name: grad for name, grad in keys.items() if name in of.needs}


def _sums(of: _Pass) -> dict[str, Tensor]:
    """Zeros for what attention_backward adds up over the operands, by member of BackwardParams."""
    call, bias, want = of.call, of.call.plan.bias, of.constants
    heads, slots = call.q.shape[1], of.slots
    explicit = call.q_positions is not None
    shapes: dict[str, tuple[int, ...]] = {}
    if want["WANT_TABLE"] and bias.table is not None:
        shapes["dtable"] = (slots, heads, bias.table.values.shape[1] if explicit else of.diagonals)
    if want["WANT_PSI"] and bias.profile is not None:
        shapes["dpsi"] = (slots, heads, bias.profile.psi.shape[0] if explicit else of.diagonals)
    if want["WANT_LINES"] and bias.profile is not None:
        shapes["drow_scale"] = (heads, of.rows)
        shapes["dsegments"] = (slots, heads, 2, bias.profile.knots.shape[0] + 1)
    if want["WANT_DENSE"] == _SHARED and bias.dense is not None:
        shapes["ddense"] = tuple(bias.dense.bias.shape)
    dtype = torch.int64 if call.deterministic else torch.float32
    sums = {name: torch.zeros(shape, dtype=dtype, device=of.q.device) for name, shape in shapes.items()}
    if want["WANT_SLOPE"]:
        sums["dslope"] = of.zeros(sequences(call), heads, of.key_blocks * of.tile.warps)
    if want["WANT_DENSE"] == _EACH_ONCE and bias.dense is not None:
        sums["ddense"] = of.zeros(*bias.dense.bias.shape)
    return sums


def _operand_gradients(of: _Pass, sums: dict[str, Tensor]) -> dict[str, Tensor]:
    call, bias = of.call, of.call.plan.bias
    explicit = call.q_positions is not None
    grads: dict[str, Tensor] = {}
    if "dslope" in sums and bias.slope is not None:
        grads["slope"] = slope_gradient(call, bias.slope, sums["dslope"].sum(2))
    if "dtable" in sums and bias.table is not None:
        grads["table"] = sums["dtable"].sum(0)
        if not explicit:
            length = bias.table.values.shape[1]
            grads["table"] = by_entry(grads["table"], of.first_distance, bias.table.first, length)
    profile = bias.profile
    if "dpsi" in sums and profile is not None:
        grads["psi"] = sums["dpsi"].sum((0, 1))
        if not explicit:
            grads["psi"] = by_entry(grads["psi"][None], of.first_distance, profile.first, profile.psi.shape[0])[0]
    if "dsegments" in sums and profile is not None:
        segments = sums["dsegments"].sum(0)
        grads["profile_intercept"], grads["profile_slope"] = segments[:, 0], segments[:, 1]
        grads["row_scale"] = gradients.row_scale(call, profile, sums["drow_scale"].sum(0), of.tile.block_m)
    if "ddense" in sums:
        grads["dense"] = sums["ddense"]
    return grads
