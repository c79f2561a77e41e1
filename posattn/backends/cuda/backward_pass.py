"""What the launches of one CUDA backward pass share: inputs in the kernels' layout, the tile, constants, sizes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from posattn.backends.common.operands import k_max, q_max, sequences
from posattn.backends.common.reductions import LINES
from posattn.backends.cuda import launch, operands
from posattn.backends.cuda.attention_forward import run, turned
from posattn.backends.cuda.configs.backward import BackwardTile, backward_tile
from posattn.backends.cuda.configs.backward_sm90 import hopper_tile
from posattn.backends.cuda.operands import Constants, Members
from posattn.plan import Call

LOG2E = math.log2(math.e)
EACH_ONCE, SHARED = 1, 2  # WANT_DENSE: elements of the dense gradient are stored, or added up


@dataclass(frozen=True)
class Pass:
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

    def run_rows(self, entry: str, struct: str, values: Members, blocks: int, source: str = "backward/rows.cu") -> None:
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
        dense = EACH_ONCE if alone else SHARED
    return {
        "WANT_SLOPE": "slope" in needs,
        "WANT_TABLE": "table" in needs,
        "WANT_PSI": "psi" in needs,
        "WANT_LINES": bool(needs & LINES),
        "WANT_DENSE": dense,
        "ORDERED": call.deterministic,
    }


def prepared(call: Call, grad_out: Tensor, needs: frozenset[str]) -> Pass:
    """Inputs in the kernels' layout, their tile and their constants."""
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
    arch = launch.architecture(q.device)
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
    return Pass(call, needs, q, k, v, grad_out, tile, {**constants, **bias_constants, **tile.constants()}, values)
