"""torch.nn.TransformerEncoderLayer on posattn's kernels, with a position."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from posattn.encodings.base import Encoding
from posattn.errors import ArgumentValueError
from posattn.kv_cache import check_size
from posattn.nn.multihead import MultiheadAttention
from posattn.validation import check_dropout, check_flags


class TransformerEncoderLayer(nn.TransformerEncoderLayer):
    """A drop-in for torch.nn.TransformerEncoderLayer: its arguments, its results, its state_dict; and `position`.

    It stands in torch.nn.TransformerEncoder too, which copies it, position and all, for each layer. What differs from
    torch's is what differs in `MultiheadAttention`; masks stay boolean where they are, so hidden keys cost nothing.

    Args:
        d_model, nhead, dim_feedforward, dropout, activation: as in torch.nn.TransformerEncoderLayer.
        layer_norm_eps, batch_first, norm_first, bias, device, dtype: as there.
        position: an encoding, a sum of encodings, or None.
        backend: as in `posattn.attention`.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        position: Encoding | None = None,
        backend: str = "auto",
    ) -> None:
        for name, size in {"d_model": d_model, "nhead": nhead, "dim_feedforward": dim_feedforward}.items():
            check_size(name, size)
        if d_model % nhead:
            raise ArgumentValueError(f"nhead: expected a divisor of d_model={d_model}, got {nhead}")
        check_flags(batch_first=batch_first, norm_first=norm_first, bias=bias)
        check_dropout(dropout, "dropout")
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(
            d_model,
            nhead,
            dim_feedforward,
            dropout,
            activation,
            layer_norm_eps,
            batch_first,
            norm_first,
            bias,
            **made,
        )
        # Made without memory and given what torch's has drawn, so that both begin equal from the same seed.
        drawn = self.self_attn.state_dict()
        made["device"] = "meta"
        self.self_attn = MultiheadAttention(
            d_model, nhead, dropout, bias, batch_first=batch_first, position=position, backend=backend, **made
        )
        self.self_attn.load_state_dict(drawn, strict=False, assign=True)
        # torch.nn.TransformerEncoder makes nested tensors for layers whose activation its fused kernel knows.
        self.activation_relu_or_gelu = 0

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """src [T, N, E], [N, T, E] with batch_first, or [T, E], of the same shape; masks as in MultiheadAttention."""
        if self.norm_first:
            x = src + self._sa_block(self.norm1(src), src_mask, src_key_padding_mask, is_causal=is_causal)
            return x + self._ff_block(self.norm2(x))
        x = self.norm1(src + self._sa_block(src, src_mask, src_key_padding_mask, is_causal=is_causal))
        return self.norm2(x + self._ff_block(x))
