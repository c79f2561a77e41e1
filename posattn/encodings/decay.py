"""Decay: b[h](i, j) = c[h, i] - c[h, j] for j <= i, what a running sum over the tokens gained between key and query."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from posattn import plan
from posattn.encodings.base import Context, Encoding
from posattn.errors import ArgumentTypeError, ArgumentValueError, described
from posattn.positions import document_index, segment_runs, token_indices


class Decay(Encoding):
    """A bias of two numbers a token, made for one call: key j is weighed down by what c lost from j to the query i.

        c = -torch.nn.functional.softplus(layer(x)).double().cumsum(1).transpose(1, 2)    # [B, H, T], falling
        out = attention(q, k, v, Decay(c), causal=True)

    The additive form of GRAPE (Zhang 2025) and context-aware biases (CABLE, Veisi 2025, arXiv 2503.08067) are running
    sums of this kind. It is O(T) memory on every backend that runs it; where c falls far, keys out of its reach are not
    computed.

    Args:
        c: [B or 1, H or 1, T] in float64 or float32, of the T keys of a call (all that a cache holds; entries past the
            last key are not read). Query i has the c of the key that it sits at; other positions than the tokens' own
            do not count. The graph that made c gets the gradient.
    """

    _name = "c"  # of the argument

    def __init__(self, c: Tensor) -> None:
        super().__init__()
        self._tokens = _checked(self._name, c)
        self.num_heads = c.shape[1] if c.shape[1] > 1 else None

    def running_sum(self) -> Tensor:
        """c, [B or 1, H or 1, T]."""
        return self._tokens

    def build(self, context: Context) -> plan.Plan:
        q_tokens, k_tokens = context.tokens
        c = self.running_sum()
        if c.shape[2] < k_tokens:
            raise ArgumentValueError(
                f"position: expected a {type(self).__name__} of the call's {k_tokens} keys, those in a cache too, got "
                f"one of {c.shape[2]} tokens"
            )
        of_keys = c[:, :, :k_tokens]
        decay = plan.Decay(self._of_queries(of_keys, context, q_tokens), of_keys)
        return plan.Plan(bias=plan.Bias(decay=decay))

    def _of_queries(self, c: Tensor, context: Context, q_tokens: int) -> Tensor:
        """c of each query's own key, or of the nearest one where it sits before the first or past the last."""
        k_tokens = c.shape[2]
        nothing_moves = context.k_lengths is None and context.offset is None and context.k_starts is None
        if context.cu_seqlens_q is None and context.q_segments is None and nothing_moves and q_tokens <= k_tokens:
            return c[:, :, k_tokens - q_tokens :]
        if k_tokens == 0:
            return c.new_zeros(*c.shape[:2], q_tokens)
        at = self._key_of_queries(context, q_tokens, k_tokens).clamp(0, k_tokens - 1)
        batch = max(at.shape[0], c.shape[0])
        index = at[:, None].expand(batch, c.shape[1], q_tokens)
        return c.expand(batch, -1, -1).gather(2, index)

    @staticmethod
    def _key_of_queries(context: Context, q_tokens: int, k_tokens: int) -> Tensor:
        """Where each query sits among the keys as they lie in memory, [B or 1, Tq]."""
        index, _, offset = token_indices(q_tokens, k_tokens, context.device, context)
        at = index + offset
        if context.cu_seqlens_q is not None and context.cu_seqlens_k is not None:
            document = document_index(context.cu_seqlens_q, q_tokens)
            return at + context.cu_seqlens_k.long()[document.clamp(0, context.cu_seqlens_k.shape[0] - 1)]
        if context.q_segments is not None and context.k_segments is not None:
            return at + segment_runs(context.k_segments, context.q_segments)[0]
        return at if context.k_starts is None else at + context.k_starts.long()[:, None]

    @classmethod
    def examples(cls, num_heads: int, head_dim: int, tokens: int) -> dict[str, Encoding]:
        return {}  # it is of the tokens of one call, where examples serve calls of any

    def extra_repr(self) -> str:
        return str(list(self._tokens.shape))


class ForgetGate(Decay):
    """Forgetting attention (FoX; Lin 2025, arXiv 2503.02130): b(i, j) = sum of ln sigmoid(f) over tokens j + 1 .. i.

        f = gate(x).transpose(1, 2)    # [B, H, T], a Linear(dim, H) of the layer's input
        out = attention(q, k, v, ForgetGate(f), causal=True)

    The gate of token j does not weigh down j itself. RoPE may be added, and no position is needed.

    Args:
        f: [B or 1, H or 1, T], the logits of the gates of this call; with a cache, those of all its keys.
    """

    _name = "f"

    def __init__(self, f: Tensor) -> None:
        super().__init__(f)

    def running_sum(self) -> Tensor:
        return F.logsigmoid(self._tokens.double()).cumsum(-1)


def _checked(name: str, x: object) -> Tensor:
    if not isinstance(x, Tensor):
        raise ArgumentTypeError(f"{name}: expected a torch.Tensor, got {described(x)}")
    if not x.is_floating_point():
        raise ArgumentTypeError(f"{name}: expected a floating dtype, got {x.dtype}")
    if x.dim() != 3:
        raise ArgumentValueError(f"{name}: expected [batch, heads, tokens], got {list(x.shape)}")
    return x
