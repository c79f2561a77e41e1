"""What the launches of one CUDA backward pass share: inputs in the kernels' layout, configuration, constants, sizes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from posattn.backends.common.operands import distances, k_max, q_max, sequences
from posattn.backends.common.reductions import LINES
from posattn.backends.cuda import launch, operands
from posattn.backends.cuda.configs.backward import BackwardConfig, Staging, backward_config, shared_bytes
from posattn.backends.cuda.configs.backward_sm90 import sm90_config, sm90_shared_bytes
from posattn.backends.cuda.constants import (
    EACH_ONCE,
    SHARED,
    BackwardSm90Constants,
    RowsConstants,
    TilesConstants,
    TurnConstants,
    WantConstants,
)
from posattn.backends.cuda.operands import LOG2E, Members
from posattn.backends.cuda.reach import THREADS, keys_in_reach, queries_in_reach
from posattn.backends.cuda.rotary import rotated_pair
from posattn.plan import Call


@dataclass(frozen=True)
class Pass:
    """What the launches of one backward pass share. Tensors come in 16-byte chunks, q and k rotated."""

    call: Call
    needs: frozenset[str]
    q: Tensor
    k: Tensor
    v: Tensor
    grad_out: Tensor
    config: BackwardConfig
    constants: BackwardSm90Constants  # those that backward.cu has as well
    values: Members  # of BackwardParams, as far as they do not hold results

    @property
    def rows(self) -> int:
        """Padded rows of all sequences, see BackwardRowsParams."""
        block, count = self.config.block_m, sequences(self.call)
        if self.call.mask.cu_seqlens_q is not None:
            return (self.call.q.shape[2] // block + count) * block
        return self.padded_queries * count

    @property
    def key_blocks(self) -> int:
        return -(-k_max(self.call) // self.config.block_n)

    @property
    def first_distance(self) -> int:
        """Of the first diagonal that a tile can meet; strips begin up to three earlier."""
        return distances(self.call)[0] - 1 - self.config.block_n - 4

    @property
    def diagonals(self) -> int:
        """Distances from the first on; a multiple of 4, for copies of 16 bytes."""
        return -(-(distances(self.call)[1] + 1 + self.config.block_m + 8 - self.first_distance) // 4) * 4

    @property
    def padded_dim(self) -> int:
        return self.constants.warps.padded

    @property
    def slots(self) -> int:
        """Into how many parts sums by distance are spread, so that few warps meet at one address: one a sequence, as
        long as all take no more than the tokens do. One long document among many short ones has no room for each."""
        tokens = self.call.q.shape[0] * (self.call.q.shape[2] + self.call.k.shape[2])
        return max(1, min(sequences(self.call), 2 * tokens // self.diagonals))

    def zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float32, device=self.q.device)

    def run_rows(
        self,
        source: str,
        entry: str,
        struct: str,
        constants: RowsConstants | TilesConstants,
        values: Members,
        blocks: int,
    ) -> None:
        """A kernel of `blocks` blocks for the queries of each sequence and head."""
        members = {"shape": self.values["shape"], "mask": self.values["mask"], "rows": self.rows, **values}
        grid = (blocks * self.call.q.shape[1] * sequences(self.call),)
        launch.run(source, entry, struct, constants, members, grid, 32 * self.config.warps, 0, self.q.device)

    def rows_constants(self) -> RowsConstants:
        own = self.constants
        return RowsConstants(
            own.element,
            own.mask.sequence,
            own.explicit,
            own.bias.operands.has_profile,
            own.rotary,
            own.pairs,
            own.warps,
        )

    @property
    def padded_queries(self) -> int:
        """Of the longest sequence."""
        return -(-q_max(self.call) // self.config.block_m) * self.config.block_m


def _wants(call: Call, needs: frozenset[str]) -> WantConstants:
    dense = 0
    if "dense" in needs and call.plan.bias.dense is not None:
        alone = call.plan.bias.dense.bias.shape == (*call.q.shape[:3], call.k.shape[2])
        dense = EACH_ONCE if alone else SHARED
    return WantConstants(
        want_slope="slope" in needs,
        want_table="table" in needs,
        want_psi="psi" in needs,
        want_lines=bool(needs & LINES),
        want_dense=dense,
    )


def prepared(call: Call, grad_out: Tensor, needs: frozenset[str]) -> Pass:
    """Inputs in the kernels' layout, their configuration and their constants."""
    q, k, v, grad_out = (operands.in_chunks(x) for x in (call.q, call.k, call.v, grad_out))
    q, k = rotated_pair(call, q, k)
    rotary, plan = call.plan.rotary, call.plan.bias
    mask, mask_constants = operands.mask(call)
    dropout = operands.dropout(call)
    staging = Staging(
        explicit=call.q_positions is not None,
        has_table=plan.table is not None,
        has_profile=plan.profile is not None,
        by_element=bool(dropout) or call.softcap != 0.0 or mask_constants.has_boolean or plan.dense is not None,
        want=_wants(call, needs),
    )
    arch = launch.architecture(q.device)
    dim = operands.padded(max(call.q.shape[3], call.v.shape[3]))
    config = sm90_config(arch, dim, staging) or backward_config(arch, dim, staging)
    warps = config.constants(dim)
    bias, bias_constants = operands.bias(call, plan, config.warp_queries, config.warp_keys)
    of_queries = keys_in_reach(call, q, k, config.block_m)
    constants = BackwardSm90Constants(
        element=operands.element(call),
        mask=mask_constants,
        explicit=staging.explicit,
        bias=bias_constants,
        has_dropout=bool(dropout),
        has_softcap=call.softcap != 0.0,
        rotary=rotary is not None,
        pairs=operands.pairs(rotary),
        want=staging.want,
        ordered=call.deterministic,
        warps=warps,
        strip_rows=config.strip_rows,
        blocks_per_sm=config.blocks,
        shared_bytes=(sm90_shared_bytes if config.sm90 else shared_bytes)(config, warps.padded, staging),
        reach=of_queries is not None,
    )
    values = {
        "q": q,
        "k": k,
        "v": v,
        "grad_out": grad_out,
        "q_strides": operands.strides(q),
        "k_strides": operands.strides(k),
        "v_strides": operands.strides(v),
        "grad_out_strides": operands.strides(grad_out),
        "shape": operands.shape(call, config.block_m, config.block_n),
        "mask": mask,
        "positions": operands.positions(call),
        "bias": bias,
        "k_angles": operands.angles(rotary.k_cos, rotary.k_sin) if rotary is not None else {},
        "dropout": dropout,
        "scale": call.scale,
        "scale2": call.scale * LOG2E,
        "softcap": call.softcap,
    }
    if of_queries is not None:
        turned = TurnConstants(mask_constants.sequence, config.block_m, config.block_n, THREADS)
        shape = operands.shape(call, config.block_m, config.block_n)
        values["reach"], values["first"] = queries_in_reach(call, of_queries, shape, mask, turned)
    return Pass(call, needs, q, k, v, grad_out, config, constants, values)
