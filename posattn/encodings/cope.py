"""CoPE: q_i . e[p_ij] at p_ij = min(sum of sigmoid(x_ij') over j' = j .. i, max_positions - 1), x the scaled logits and
e linear between its rows (Golovneva 2024, arXiv 2405.18719)."""

from __future__ import annotations

import torch
from torch import nn

from posattn.encodings._checks import check_flag, check_float32, check_positive_int
from posattn.encodings._heads import check_head_dim
from posattn.encodings.base import Context, Encoding
from posattn.plan import Bias, Gated, Plan


class CoPE(Encoding):
    """Contextual positions: how many of the keys from j to the query the query's own gates count.

    The gate of a key is the sigmoid of its logit, so each row counts what it attends to: words, sentences, a token.
    Only keys that the query sees count, from the last one back, as they lie in memory; positions of the call's tokens
    change nothing, and a cache gives what the whole text does. Where a query also sees keys after itself, those count
    too.
    Gates are of the scaled logits, after any softcap and rotation, before any bias; q . e takes q as it came.

    Public codes disagree. The paper's listing adds q . e as it is, with all heads' gates from the logits that also
    attend; that is the default. The authors' released module by default divides q . e by sqrt(D), like the logits:
    `scaled=True` (theirs without it is --cope-nodiv). Its gates from separate keys or from values are not offered. Both
    share e between the heads (theirs is [1, D, L], transposed here); some others do not: `shared=False`. At a whole
    position the derivative is 0 there and here.

    Fused kernels do not compute it: backend="reference", in memory that grows with Tq * Tk.

    Args:
        num_heads: number of query heads H.
        head_dim: dimension D of a head.
        max_positions: rows L of `weight`, for positions 0 to L - 1; one more than the keys there are clamps none.
        scaled: multiply q . e by the call's scale, as the logits are.
        shared: one `weight` [L, D] for all heads, or one for each, [H, L, D].
        std: of the normal numbers that `weight` is at first; 0 as in the paper, which starts from no positions.
    """

    has_bias = False
    fractional = True
    fused = False
    sole_operands = frozenset({"gated"})

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        max_positions: int,
        scaled: bool = False,
        shared: bool = True,
        std: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_heads = check_positive_int("num_heads", num_heads)
        self.head_dim = check_positive_int("head_dim", head_dim)
        self.max_positions = check_positive_int("max_positions", max_positions)
        self.scaled, self.shared = check_flag("scaled", scaled), check_flag("shared", shared)
        self.std = check_float32("std", std)
        if std < 0.0:
            raise ValueError(f"std: expected a number from 0 on, got {std}")
        shape = (max_positions, head_dim) if shared else (num_heads, max_positions, head_dim)
        self.weight = nn.Parameter(torch.empty(shape))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.std == 0.0:
            nn.init.zeros_(self.weight)
        else:
            nn.init.normal_(self.weight, std=self.std)

    def build(self, context: Context) -> Plan:
        check_head_dim(self, self.head_dim, context)
        weight = self.weight.to(context.table_dtype(self.weight))
        return Plan(bias=Bias(), gated=Gated(weight[None] if self.shared else weight, self.scaled))

    @classmethod
    def examples(cls, num_heads: int, head_dim: int, tokens: int) -> dict[str, Encoding]:
        count = max(tokens // 3, 2)  # fewer than the positions of a long row
        return {
            "CoPE": cls(num_heads, head_dim, count, std=1.0),
            "CoPE per head": cls(num_heads, head_dim, count, scaled=True, shared=False, std=1.0),
        }

    def extra_repr(self) -> str:
        options = f"scaled={self.scaled}, shared={self.shared}, std={self.std:g}"
        return f"{self.num_heads}, {self.head_dim}, {self.max_positions}, {options}"
