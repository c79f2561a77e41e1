"""Relative keys of sinusoids: x = s * (<q_i + u_h, k_j> + <q_i + v_h, R_h[i - j]>), R_h[d] = (W sinusoid(d))_h (Dai
2019, arXiv 1901.02860)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from posattn.encodings._checks import check_flag, check_positive_int
from posattn.encodings._heads import check_head_dim
from posattn.encodings._linear import weight_and_bias
from posattn.encodings.base import Context, Encoding
from posattn.plan import Bias, Plan, RelativeKeys


class TransformerXL(Encoding):
    """The relative attention of Transformer-XL; with `bidirectional`, of Conformer and wav2vec2-conformer.

    Parameters: `u`, `v` [H, D], added to q where it meets keys and where it meets distances, and `rel`, a Linear(dim,
    H * D) without bias of the sinusoids sin(d w_c), then cos(d w_c), w_c = 10000^(-2c / dim). Conformers have sines and
    cosines in turn: their projection is this one with its columns in the order 0, 2, 4 .., then 1, 3, 5 ..

    Fused kernels do not compute it: backend="reference", in memory that grows with Tq * Tk.

    Args:
        num_heads: number of query heads H.
        head_dim: dimension D of a head.
        dim: of the sinusoid, even; H * D by default.
        bidirectional: keys after the query have vectors of their own; else they have that of distance 0.
    """

    has_bias = False
    fused = False
    sole_operands = frozenset({"relative"})

    def __init__(self, num_heads: int, head_dim: int, dim: int | None = None, bidirectional: bool = False) -> None:
        super().__init__()
        self.num_heads = check_positive_int("num_heads", num_heads)
        self.head_dim = check_positive_int("head_dim", head_dim)
        self.dim = check_positive_int("dim", num_heads * head_dim if dim is None else dim)
        if self.dim % 2:
            raise ValueError(f"dim: expected an even number, a sine and a cosine each, got {self.dim}")
        self.bidirectional = check_flag("bidirectional", bidirectional)
        self.u = nn.Parameter(torch.empty(num_heads, head_dim))
        self.v = nn.Parameter(torch.empty(num_heads, head_dim))
        self.rel = nn.Linear(self.dim, num_heads * head_dim, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.u, std=0.02)
        nn.init.normal_(self.v, std=0.02)

    def build(self, context: Context) -> Plan:
        check_head_dim(self, self.head_dim, context)
        weight, _ = weight_and_bias(self.rel)
        dtype = context.table_dtype(self.u, weight)
        distance = context.distances()
        first = context.distance_range[0]
        if not self.bidirectional:
            last = max(first + distance.shape[0] - 1, 0)
            first = max(first, 0)
            distance = torch.arange(first, last + 1, device=context.device)
        keys = F.linear(_sinusoids(distance, self.dim).to(dtype), weight.to(dtype))  # [L, H * D]
        keys = keys.unflatten(1, (self.u.shape[0], self.head_dim)).transpose(0, 1)
        return Plan(bias=Bias(), relative=RelativeKeys(keys, None, first, None, self.u.to(dtype), self.v.to(dtype)))

    @classmethod
    def examples(cls, num_heads: int, head_dim: int, tokens: int) -> dict[str, Encoding]:
        return {
            "TransformerXL": cls(num_heads, head_dim),
            "TransformerXL bidirectional": cls(num_heads, head_dim, 2 * head_dim, bidirectional=True),
        }

    def extra_repr(self) -> str:
        return f"{self.num_heads}, {self.head_dim}, dim={self.dim}, bidirectional={self.bidirectional}"


def _sinusoids(distance: Tensor, dim: int) -> Tensor:
    """[L, dim] float64: a float32 angle at a distance of 100,000 is off by a hundredth already."""
    c = torch.arange(dim // 2, dtype=torch.float64, device=distance.device)
    angle = distance[:, None].double() * 10000.0 ** (-2.0 * c / dim)
    return torch.cat([angle.sin(), angle.cos()], dim=1)
