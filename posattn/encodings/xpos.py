"""xPos: RoPE with pair c of q times zeta_c^(p / 512) and of k over it, so that what it adds to the logit falls as
zeta_c^(d / 512), zeta_c = (2c / D + 0.4) / 1.4 (Sun 2022, "A Length-Extrapolatable Transformer", arXiv 2212.10554)."""

from __future__ import annotations

import torch
from torch import Tensor

from posattn.encodings._checks import check_positive
from posattn.encodings.base import Context, Encoding
from posattn.encodings.rope import RotaryEncoding
from posattn.plan import Bias, Plan, Rotary


class XPos(RotaryEncoding):
    """For causal attention: keys after their query would grow.

    Powers are of positions less the middle one, so that neither side grows beyond what half the length makes of it:
    with scale_base = 512, float16 holds some 8,000 tokens and the other dtypes some 70,000.

    Args:
        head_dim, base, rotary_dim: as in `RoPE`.
        layout: "interleaved" by default, as the authors'.
        scale_base: positions per power; 512.
        gamma: 0.4.
    """

    def __init__(
        self,
        head_dim: int,
        base: float = 10000.0,
        layout: str = "interleaved",
        rotary_dim: int | None = None,
        scale_base: float = 512.0,
        gamma: float = 0.4,
    ) -> None:
        super().__init__(head_dim, base, layout, rotary_dim)
        self.scale_base = check_positive("scale_base", scale_base)
        self.gamma = check_positive("gamma", gamma)

    def build(self, context: Context) -> Plan:
        if context.k_rotated:
            raise ValueError("k_rotated: expected False with XPos, for queries and keys share its powers, got True")
        turn = super().build(context).rotary
        assert turn is not None
        q_positions, k_positions = self.token_positions(context)
        middle = self._middle(context, q_positions, k_positions)
        of_q, of_k = self._powers(q_positions - middle), self._powers(middle - k_positions)
        q_cos, q_sin = ((x * of_q).to(x.dtype) for x in (turn.q_cos, turn.q_sin))
        k_cos, k_sin = ((x * of_k).to(x.dtype) for x in (turn.k_cos, turn.k_sin))
        return Plan(rotary=Rotary(q_cos, q_sin, k_cos, k_sin, turn.interleaved), bias=Bias())

    def _middle(self, context: Context, q_positions: Tensor, k_positions: Tensor) -> int | Tensor:
        """Any number will do that a call's queries and keys share: their middle, with no look at the device."""
        if not context.explicit or not q_positions.numel() or not k_positions.numel():
            return context.k_len // 2
        low = torch.minimum(q_positions.amin(), k_positions.amin())
        high = torch.maximum(q_positions.amax(), k_positions.amax())
        return (low + high).div(2, rounding_mode="floor")

    def _powers(self, positions: Tensor) -> Tensor:
        """zeta_c^(positions / scale_base), float64 [B or 1, T, rotary_dim / 2]."""
        share = torch.arange(0, self.rotary_dim, 2, dtype=torch.float64, device=positions.device) / self.rotary_dim
        zeta = (share + self.gamma) / (1.0 + self.gamma)
        return torch.exp(positions.double()[..., None] / self.scale_base * zeta.log())

    def tables(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Not here, for the reason of `rotate`."""
        raise TypeError("rotation: xPos turns queries and keys differently; give it to attention as `position`")

    def rotate(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """Not here: queries grow and keys shrink, by powers that a call's queries and keys have in common."""
        raise TypeError("rotate: xPos turns queries and keys differently; give it to attention as `position`")

    @classmethod
    def examples(cls, num_heads: int, head_dim: int, tokens: int) -> dict[str, Encoding]:
        even = head_dim // 2 * 2
        return {"XPos": cls(head_dim, rotary_dim=even, scale_base=32.0)} if even else {}

    def extra_repr(self) -> str:
        return (
            f"{self.head_dim}, base={self.base}, layout={self.layout!r}, rotary_dim={self.rotary_dim}, "
            f"scale_base={self.scale_base}, gamma={self.gamma}"
        )
