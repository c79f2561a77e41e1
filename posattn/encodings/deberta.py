"""Disentangled attention: x = s * (<q_i, k_j> + <q_i, Kr_h[r]> + <k_j, Qr_h[r]>), r = clamp(bucket(i - j) + span, 0,
2 * span - 1) (He 2021, arXiv 2006.03654; buckets as in DeBERTa v2 and v3)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from posattn.encodings._checks import check_positive_int
from posattn.encodings._heads import check_head_dim
from posattn.encodings.base import Context, Encoding
from posattn.plan import Bias, Plan, RelativeKeys


class DeBERTa(Encoding):
    """Content to position and position to content, `rel_k` and `rel_q` [H, 2 * span, D].

    They are parameters, or the tensors given, for a call by a model that projects a table that its layers share. The
    three terms have the scale 1 / sqrt(3 D): pass attention `scale=position.scale`.

    Fused kernels do not compute it: backend="reference", in memory that grows with Tq * Tk.

    Args:
        num_heads: number of query heads H.
        head_dim: dimension D of a head.
        buckets: distances in both directions have 2 * buckets rows, span = buckets; those up to buckets / 2 each their
            own, the others logarithmic (`position_buckets`). None for a row each, span = max_position.
        max_position: the distance at which the last bucket starts (`max_relative_positions`, or
            `max_position_embeddings` where that is -1).
        rel_k, rel_q: this call's, in place of parameters; both or neither.
    """

    has_bias = False
    fused = False
    sole_operands = frozenset({"relative"})

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        buckets: int | None,
        max_position: int,
        rel_k: Tensor | None = None,
        rel_q: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.num_heads = check_positive_int("num_heads", num_heads)
        self.head_dim = check_positive_int("head_dim", head_dim)
        self.max_position = check_positive_int("max_position", max_position)
        self.buckets = None if buckets is None else check_positive_int("buckets", buckets)
        if buckets is not None and (buckets < 2 or max_position <= buckets // 2 + 1):
            raise ValueError(
                "buckets, max_position: expected at least 2 and more than buckets / 2 + 1, got "
                f"{buckets} and {max_position}"
            )
        self.span = max_position if buckets is None else buckets
        if (rel_k is None) != (rel_q is None):
            raise ValueError("rel_k, rel_q: expected both or neither, got one")
        shape = (num_heads, 2 * self.span, head_dim)
        self.rel_k: Tensor
        self.rel_q: Tensor
        if rel_k is None or rel_q is None:
            self.rel_k, self.rel_q = nn.Parameter(torch.empty(shape)), nn.Parameter(torch.empty(shape))
            self.reset_parameters()
            return
        for name, given in (("rel_k", rel_k), ("rel_q", rel_q)):
            if not isinstance(given, Tensor):
                raise TypeError(f"{name}: expected a torch.Tensor, got {type(given).__name__}")
            if given.shape != shape:
                raise ValueError(f"{name}: expected a tensor {list(shape)}, got {list(given.shape)}")
        # Not a module's to move, save or reset, even if they are a module's parameters.
        object.__setattr__(self, "rel_k", rel_k)
        object.__setattr__(self, "rel_q", rel_q)

    @property
    def scale(self) -> float:
        """1 / sqrt(3 D), for attention's `scale`."""
        return 1.0 / math.sqrt(3.0 * self.head_dim)

    def reset_parameters(self) -> None:
        for parameter in self._parameters.values():
            if parameter is not None:
                nn.init.normal_(parameter, std=0.02)

    def build(self, context: Context) -> Plan:
        check_head_dim(self, self.head_dim, context)
        dtype = context.table_dtype(self.rel_k, self.rel_q)
        rows = self.bucket(context.distances()).add(self.span).clamp(0, 2 * self.span - 1)
        first = context.distance_range[0]
        return Plan(bias=Bias(), relative=RelativeKeys(self.rel_k.to(dtype), self.rel_q.to(dtype), first, rows))

    def bucket(self, distance: Tensor) -> Tensor:
        """The signed bucket of distances i - j, int64. Logarithms are float32, as in transformers: their rounding
        decides where a bucket ends."""
        if self.buckets is None:
            return distance
        mid = self.buckets // 2
        far = distance.abs().clamp(min=mid)
        widest = torch.log(torch.tensor((self.max_position - 1) / mid, device=distance.device))
        log = torch.ceil(torch.log(far / mid) / widest * (mid - 1)) + mid
        return torch.where(distance.abs() <= mid, distance, log.long() * distance.sign())

    @classmethod
    def examples(cls, num_heads: int, head_dim: int, tokens: int) -> dict[str, Encoding]:
        return {
            "DeBERTa": cls(num_heads, head_dim, 4, max(tokens, 4)),
            "DeBERTa without buckets": cls(num_heads, head_dim, None, max(tokens // 2, 1)),
        }

    def extra_repr(self) -> str:
        return f"{self.num_heads}, {self.head_dim}, buckets={self.buckets}, max_position={self.max_position}"
