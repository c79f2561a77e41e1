"""The attention layer of a transformer: projections, heads that share keys, a position, and a cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from posattn.attention import attention
from posattn.encodings.base import Encoding
from posattn.errors import ArgumentTypeError, ArgumentValueError
from posattn.kv_cache import KVCache, check_size
from posattn.validation import check_dropout, check_flags


class Attention(nn.Module):
    """softmax(q k^T) v of x [B, T, dim], projected into heads and back.

        layer = posattn.nn.Attention(512, 8, kv_heads=2, position=posattn.RoPE(64), causal=True)
        y = layer(x)                                    # training, or a whole prompt
        y = layer(token, cache=cache)                   # one step of generation

    Parameters are named as in Llama, Qwen and Mistral: `q_proj`, `k_proj`, `v_proj`, `o_proj`, with `q_norm` and
    `k_norm` where there are norms and `sinks` where there are sinks; those of the encoding are below `position`.

    Args:
        dim: width of the model.
        heads: query heads.
        kv_heads: key and value heads, a divisor of `heads`; `heads` by default.
        head_dim: dimension of a head; dim / heads by default.
        position: an encoding, a sum of encodings, or None.
        bias: whether the projections have a bias.
        out_bias: whether `o_proj` has one; as `bias` by default (Qwen 2 has True and False).
        qk_norm: RMSNorm of each head of q and k, before the position, with an epsilon of 1e-6 (Qwen 3).
        causal, window, scale, softcap: as in `posattn.attention`.
        sinks: a learned sink logit a head, zero at first.
        dropout: share of the softmax weights dropped in training.
        cross: keys and values come from `memory`, not from x.
        memory_dim: width of the memory; `dim` by default.
        backend: as in `posattn.attention`.
        device, dtype: of the parameters.

    Raises:
        TypeError, ValueError: sizes that do not go together, or causal or window with cross.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        position: Encoding | None = None,
        bias: bool = False,
        *,
        out_bias: bool | None = None,
        qk_norm: bool = False,
        causal: bool = False,
        window: int | tuple[int | None, int | None] | None = None,
        scale: float | None = None,
        softcap: float | None = None,
        sinks: bool = False,
        dropout: float = 0.0,
        cross: bool = False,
        memory_dim: int | None = None,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.heads = check_size("dim", dim), check_size("heads", heads)
        self.kv_heads = check_size("kv_heads", heads if kv_heads is None else kv_heads)
        if heads % self.kv_heads:
            raise ArgumentValueError(f"kv_heads: expected a divisor of heads={heads}, got {kv_heads}")
        if head_dim is None and dim % heads:
            raise ArgumentValueError(f"heads: expected a divisor of dim={dim} (or head_dim), got {heads}")
        self.head_dim = check_size("head_dim", dim // heads if head_dim is None else head_dim)
        if position is not None and not isinstance(position, Encoding):
            raise ArgumentTypeError(f"position: expected an encoding or None, got {type(position).__name__}")
        check_flags(bias=bias, qk_norm=qk_norm, causal=causal, sinks=sinks, cross=cross)
        check_flags(out_bias=bias if out_bias is None else out_bias)
        if cross and (causal or window is not None):
            raise ArgumentValueError(
                "cross: expected no causal and no window with it, got one: memory has no order in x"
            )
        if memory_dim is not None and not cross:
            raise ArgumentValueError(f"memory_dim: expected None without cross, got {memory_dim}")
        self.dropout = check_dropout(dropout, "dropout")
        self.causal, self.window, self.scale, self.softcap = causal, window, scale, softcap
        self.cross, self.backend = cross, backend
        source = check_size("memory_dim", dim if memory_dim is None else memory_dim)
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        kv_dim = self.kv_heads * self.head_dim
        self.q_proj = nn.Linear(dim, heads * self.head_dim, bias=bias, **made)
        self.k_proj = nn.Linear(source, kv_dim, bias=bias, **made)
        self.v_proj = nn.Linear(source, kv_dim, bias=bias, **made)
        self.o_proj = nn.Linear(heads * self.head_dim, dim, bias=bias if out_bias is None else out_bias, **made)
        self.q_norm = nn.RMSNorm(self.head_dim, eps=1e-6, **made) if qk_norm else None
        self.k_norm = nn.RMSNorm(self.head_dim, eps=1e-6, **made) if qk_norm else None
        self.sinks = nn.Parameter(torch.zeros(heads, **made)) if sinks else None
        self.position = position

    def reset_parameters(self) -> None:
        """The sinks' first values; modules inside have a reset_parameters of their own."""
        if self.sinks is not None:
            nn.init.zeros_(self.sinks)

    def forward(
        self,
        x: Tensor,
        memory: Tensor | None = None,
        *,
        cache: KVCache | None = None,
        lengths: Tensor | None = None,
        starts: Tensor | None = None,
        positions: Tensor | None = None,
        memory_positions: Tensor | None = None,
        position_range: tuple[int, int] | None = None,
        mask: Tensor | None = None,
        bias: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        memory_cu_seqlens: Tensor | None = None,
        segments: Tensor | None = None,
    ) -> Tensor:
        """y [B, T, dim] of x [B, T, dim].

        Args:
            memory: [B, S, memory_dim], with cross alone. With a cache it is given once and projected once: later calls
                leave it out.
            cache: keys and values of the tokens before x (with cross: of the memory). This call's are put behind them.
            lengths: [B] integers, right padding: how many of the T tokens of each row of x are its own. With cross, of
                the memory's S tokens.
            starts: [B] integers, left padding: where each sequence begins on the keys' axis, cache included. Positions
                count from there. Give it in every step.
            positions: [T], [1, T] or [B, T] integers, where the tokens of x sit for `position`; a cache keeps them.
            memory_positions: the same for the memory.
            position_range: as in `posattn.attention`.
            mask, bias: as there, [.., T, keys].
            cu_seqlens: [documents + 1] integers, x is [1, all tokens, dim] of packed documents.
            memory_cu_seqlens: the same for the memory.
            segments: [B, T] integers, the document of each token, in rows of documents.

        Raises:
            TypeError, ValueError: arguments that do not go together, and all that `posattn.attention` raises.
        """
        if x.dim() != 3 or x.shape[-1] != self.dim:
            raise ArgumentValueError(f"x: expected [B, T, {self.dim}], got {list(x.shape)}")
        q = self.q_proj(x).unflatten(-1, (self.heads, self.head_dim))
        if self.q_norm is not None:
            q = self.q_norm(q)
        q = q.transpose(1, 2)
        options: dict[str, Any] = {
            "q_positions": positions,
            "position_range": position_range,
            "mask": mask,
            "bias": bias,
        }
        if starts is not None:
            options["k_starts"] = starts
        if segments is not None:
            options["segments"] = segments
        if self.cross:
            keys = self._memory(memory, cache, lengths, memory_positions)
        else:
            if memory is not None or memory_positions is not None or memory_cu_seqlens is not None:
                raise ArgumentValueError("memory: expected None in a layer made without cross, got one")
            keys = self._own(x, cache, lengths, positions)
            memory_cu_seqlens = cu_seqlens
        if cu_seqlens is not None or memory_cu_seqlens is not None:
            if cache is not None or lengths is not None:
                raise ArgumentValueError("cu_seqlens: expected no cache and no lengths with it, got one")
            options |= {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": memory_cu_seqlens}
        out: Tensor = attention(
            q,
            position=self.position,
            causal=self.causal,
            window=self.window,
            scale=self.scale,
            softcap=self.softcap,
            sinks=self.sinks,
            dropout_p=self.dropout if self.training else 0.0,
            backend=self.backend,
            **keys,
            **options,
        )
        return self.o_proj(out.transpose(1, 2).flatten(2))

    def _project(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """k and v [B, Hkv, S, D] of [B, S, width]."""
        k = self.k_proj(source).unflatten(-1, (self.kv_heads, self.head_dim))
        if self.k_norm is not None:
            k = self.k_norm(k)
        v = self.v_proj(source).unflatten(-1, (self.kv_heads, self.head_dim))
        return k.transpose(1, 2), v.transpose(1, 2)

    def _own(
        self, x: Tensor, cache: KVCache | None, lengths: Tensor | None, positions: Tensor | None
    ) -> dict[str, Any]:
        k, v = self._project(x)
        if cache is not None:
            return dict(cache.append(k, v, lengths, positions))
        keys: dict[str, Any] = {"k": k, "v": v, "k_positions": positions}
        if lengths is not None:
            keys |= {"k_lengths": lengths, "offset": 0}  # query i is token i, however few of them are keys
        return keys

    def _memory(
        self, memory: Tensor | None, cache: KVCache | None, lengths: Tensor | None, positions: Tensor | None
    ) -> dict[str, Any]:
        if memory is None:
            if cache is None:
                raise ArgumentValueError("memory: expected [B, S, width], or a cache that holds it, got neither")
            if lengths is not None or positions is not None:
                raise ArgumentValueError(
                    "lengths, memory_positions: expected them with memory alone: the cache holds them"
                )
            return dict(cache.keys())
        if memory.dim() != 3 or memory.shape[-1] != self.k_proj.in_features:
            raise ArgumentValueError(f"memory: expected [B, S, {self.k_proj.in_features}], got {list(memory.shape)}")
        k, v = self._project(memory)
        if cache is None:
            keys: dict[str, Any] = {"k": k, "v": v, "k_positions": positions}
            return keys if lengths is None else {**keys, "k_lengths": lengths}
        if not torch.compiler.is_compiling() and cache.lengths.device.type == "cpu" and cache.lengths.any():
            raise ArgumentValueError(
                "memory: expected None, for the cache holds one already (cache.reset() empties it)"
            )
        found = dict(cache.append(k, v, lengths, positions))
        found.pop("offset", None)
        return found

    def extra_repr(self) -> str:
        shown = {"kv_heads": self.kv_heads, "head_dim": self.head_dim, "causal": self.causal, "window": self.window}
        return ", ".join(
            [
                f"{self.dim}, heads={self.heads}",
                *(f"{k}={v}" for k, v in shown.items() if v),
                *(["cross=True"] if self.cross else []),
            ]
        )
