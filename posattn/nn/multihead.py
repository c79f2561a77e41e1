"""torch.nn.MultiheadAttention on posattn's kernels, with a position."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from posattn.attention import attention
from posattn.encodings.base import Encoding
from posattn.errors import ArgumentTypeError, ArgumentValueError
from posattn.kv_cache import check_size
from posattn.validation import check_dropout, check_flags
from posattn.weights import weights

# Rows of attention weights made at a time, so that those of all heads are never held where their mean is wanted.
ROWS = 256


class MultiheadAttention(nn.MultiheadAttention):
    """A drop-in for torch.nn.MultiheadAttention: its arguments, its results, its state_dict; and `position`.

    Three things differ. A query that may see no key gives zeros (and weights of zero), where torch gives NaN. The keys
    that add_bias_kv and add_zero_attn add have no place in the sequence, so `position` does not touch them. Nested
    tensors are not taken, and torch's fused fast path is never used.

    Args:
        embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn: as in torch.nn.MultiheadAttention.
        kdim, vdim, batch_first, device, dtype: as there.
        position: an encoding, a sum of encodings, or None; its parameters are below `position` in the state_dict.
            Query i sits at key position i + (S - L).
        backend: as in `posattn.attention`.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        position: Encoding | None = None,
        backend: str = "auto",
    ) -> None:
        if position is not None and not isinstance(position, Encoding):
            raise ArgumentTypeError(f"position: expected an encoding or None, got {type(position).__name__}")
        for name, size in {"embed_dim": embed_dim, "num_heads": num_heads}.items():
            check_size(name, size)
        for name, width in {"kdim": kdim, "vdim": vdim}.items():
            check_size(name, embed_dim if width is None else width)
        if embed_dim % num_heads:
            raise ArgumentValueError(f"num_heads: expected a divisor of embed_dim={embed_dim}, got {num_heads}")
        check_flags(bias=bias, add_bias_kv=add_bias_kv, add_zero_attn=add_zero_attn, batch_first=batch_first)
        check_dropout(dropout, "dropout")
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype
        )
        self.position = position
        self.backend = backend
        # torch.nn.TransformerEncoderLayer, where this module may stand, computes by itself with our weights unless a
        # module inside has a hook.
        self.register_forward_pre_hook(_unchanged)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        q_positions: Tensor | None = None,
        k_positions: Tensor | None = None,
        position_range: tuple[int, int] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The output, and the weights or None.

        Args:
            query: [L, N, E], [N, L, E] with batch_first, or [L, E].
            key, value: the same with S tokens of kdim and vdim.
            key_padding_mask: [N, S] or [S]; bool, True where a key is hidden, or a float that is added.
            need_weights: also return the softmax weights, after dropout. They are [N, L, S], so this costs O(L S)
                memory and runs in plain PyTorch; say False where they are not looked at.
            attn_mask: [L, S] or [N * heads, L, S]; bool, True where a key is hidden, or a float that is added.
            average_attn_weights: the mean over the heads, [N, L, S]; else [N, heads, L, S].
            is_causal: a hint that attn_mask is the causal mask.
            q_positions, k_positions, position_range: as in `posattn.attention`.

        Raises:
            TypeError, ValueError: an argument of the wrong type, dtype or shape.
        """
        batched, first = query.dim() == 3, self.batch_first or query.dim() == 2
        self._check(query, key, value, key_padding_mask, attn_mask, is_causal)
        if not batched:
            query, key, value = query[None], key[None], value[None]
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        q, k, v = (self._heads(x, first) for x in self._project(query, key, value))
        options = self._masks(attn_mask, key_padding_mask, is_causal, q, k)
        options |= {"q_positions": q_positions, "k_positions": k_positions, "position_range": position_range}
        dropout = self.dropout if self.training else 0.0
        extra = self._extra_logits(q)
        if need_weights:
            out, shown = self._by_weights(q, k, v, extra, options, dropout, average_attn_weights)
        else:
            out, shown = self._fused(q, k, v, extra, options, dropout), None
        joined = (out.transpose(1, 2) if first else out.permute(2, 0, 1, 3)).flatten(2)
        found = self.out_proj(joined)
        if batched:
            return found, shown
        return found[0], None if shown is None else shown[0]

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        if self._qkv_same_embed_dim and query is key and key is value:
            return F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        if self._qkv_same_embed_dim:
            matrices: tuple[Any, ...] = self.in_proj_weight.chunk(3)
        else:
            matrices = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases: Any = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return tuple(F.linear(x, w, b) for x, w, b in zip((query, key, value), matrices, biases))

    def _heads(self, x: Tensor, batch_first: bool) -> Tensor:
        x = x.unflatten(-1, (self.num_heads, self.head_dim))
        return x.transpose(1, 2) if batch_first else x.permute(1, 2, 0, 3)

    def _masks(
        self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, is_causal: bool, q: Tensor, k: Tensor
    ) -> dict[str, Any]:
        """attention()'s words for torch's masks. A causal mask is said without elements where that is the same."""
        options: dict[str, Any] = {}
        if is_causal and q.shape[2] == k.shape[2]:
            options["causal"], attn_mask = True, None
        if attn_mask is not None and attn_mask.dim() == 3:
            attn_mask = attn_mask.unflatten(0, (q.shape[0], self.num_heads))
        if key_padding_mask is not None:
            key_padding_mask = key_padding_mask[:, None, None]
        for given in (attn_mask, key_padding_mask):
            if given is not None and given.dtype == torch.bool:
                options["mask"] = ~given if "mask" not in options else options["mask"] & ~given
            elif given is not None:
                options["bias"] = given if "bias" not in options else options["bias"] + given
        return options

    def _extra_logits(self, q: Tensor) -> Tensor | None:
        """<q, bias_k> / sqrt(D) of the key that add_bias_kv adds, [N, heads, L]."""
        if self.bias_k is None:
            return None
        key = self.bias_k.view(self.num_heads, self.head_dim, 1).to(q.dtype)
        return (q @ key)[..., 0].float() * self.head_dim**-0.5

    def _fused(
        self, q: Tensor, k: Tensor, v: Tensor, extra: Tensor | None, options: dict[str, Any], dropout: float
    ) -> Tensor:
        """The output. A key of zeros is a sink of logit 0; that of add_bias_kv joins by the log-sum-exp."""
        options = {**options, "dropout_p": dropout, "backend": self.backend}
        if self.add_zero_attn:
            options["sinks"] = q.new_zeros(self.num_heads, dtype=torch.float32)
        if extra is None:
            return attention(q, k, v, self.position, **options)
        out, lse = attention(q, k, v, self.position, return_lse=True, **options)
        extra = extra.to(lse.dtype)
        total = torch.logaddexp(lse, extra)
        own, added = (lse - total).exp(), F.dropout((extra - total).exp(), dropout)
        return (out * own[..., None] + added[..., None] * self._extra_value(q)).to(q.dtype)

    def _extra_value(self, q: Tensor) -> Tensor:
        assert self.bias_v is not None
        return self.bias_v.view(self.num_heads, 1, self.head_dim).to(q.dtype)

    def _by_weights(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        extra: Tensor | None,
        options: dict[str, Any],
        dropout: float,
        average: bool,
    ) -> tuple[Tensor, Tensor]:
        """The output [N, heads, L, D], and the weights [N, L, S] or [N, heads, L, S], those of added keys too."""
        sinks = q.new_zeros(self.num_heads, dtype=torch.float32) if self.add_zero_attn else None
        outs, shown = [], []
        for start in range(0, max(q.shape[2], 1), ROWS):
            rows = range(start, min(start + ROWS, q.shape[2]))
            w, total = weights(q, k, self.position, rows=rows, sinks=sinks, return_lse=True, **options)
            columns = [w]
            if extra is not None:
                own, added = total, extra[:, :, start : start + ROWS].to(total.dtype)
                total = torch.logaddexp(own, added)
                columns = [w * (own - total).exp()[..., None], (added - total).exp()[..., None]]
            if self.add_zero_attn:
                columns.append((-total).exp()[..., None])
            w = F.dropout(torch.cat(columns, -1), dropout).to(q.dtype)
            out = w[..., : k.shape[2]] @ v
            if extra is not None:
                out = out + w[..., k.shape[2], None] * self._extra_value(q)
            outs.append(out)
            shown.append(w.mean(1) if average else w)
        return torch.cat(outs, 2), torch.cat(shown, -2)

    def _check(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        is_causal: bool,
    ) -> None:
        for name, x, width in (("query", query, self.embed_dim), ("key", key, self.kdim), ("value", value, self.vdim)):
            if not isinstance(x, Tensor) or x.is_nested:
                kind = "a nested tensor" if isinstance(x, Tensor) else type(x).__name__
                raise ArgumentTypeError(f"{name}: expected a dense torch.Tensor, got {kind}")
            if x.dim() not in (2, 3) or x.dim() != query.dim() or x.shape[-1] != width:
                rank = "2 or 3" if name == "query" else f"{query.dim()}"
                raise ArgumentValueError(
                    f"{name}: expected {rank} dimensions, the last of {width}, got {list(x.shape)}"
                )
        if value.shape[:-1] != key.shape[:-1]:
            raise ArgumentValueError(f"value: expected {list(key.shape[:-1])} like key, got {list(value.shape[:-1])}")
        token = 0 if query.dim() == 2 else int(self.batch_first)
        batch = 1 if query.dim() == 2 else query.shape[1 - token]
        queries, keys = query.shape[token], key.shape[token]
        if query.dim() == 3 and key.shape[1 - token] != batch:
            raise ArgumentValueError(f"key: expected a batch of {batch} like query, got {key.shape[1 - token]}")
        if is_causal and attn_mask is None:
            raise ArgumentValueError("attn_mask: expected the mask that is_causal is a hint of, got None")
        padding = ((keys,),) if query.dim() == 2 else ((batch, keys),)
        masks = ((queries, keys), (batch * self.num_heads, queries, keys))
        for name, mask, shapes in (("key_padding_mask", key_padding_mask, padding), ("attn_mask", attn_mask, masks)):
            if mask is None:
                continue
            if not isinstance(mask, Tensor):
                raise ArgumentTypeError(f"{name}: expected a torch.Tensor, got {type(mask).__name__}")
            if mask.dtype != torch.bool and not mask.is_floating_point():
                raise ArgumentTypeError(f"{name}: expected torch.bool or a floating dtype, got {mask.dtype}")
            if tuple(mask.shape) not in shapes:
                wanted = " or ".join(str(list(shape)) for shape in shapes)
                raise ArgumentValueError(f"{name}: expected {wanted}, got {list(mask.shape)}")


def _unchanged(module: nn.Module, arguments: Any) -> None:
    """A hook that does nothing."""
