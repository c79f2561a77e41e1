"""RoPE: pair c of q and k turns by pos * theta_c, theta_c = base^(-2c/rotary_dim) (Su 2021, "RoFormer", 2104.09864)."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TypeAlias

import torch
from torch import Tensor, nn

from posattn import reference
from posattn.encodings._checks import check_choice, check_positive, check_positive_int
from posattn.encodings.base import Context, Encoding
from posattn.encodings.scaling import Scaling, YaRN, rotary_exponents, rotary_frequencies
from posattn.plan import Bias, Plan, Rotary

LAYOUTS = ("half", "interleaved")

Factor: TypeAlias = "float | tuple[Tensor, Tensor]"


class RotaryEncoding(Encoding):
    """What rotary encodings share. A subclass gives `angles`; cosines and sines follow, in float32 or float64.

    Args:
        head_dim: dimension D of a head.
        base: the base of the frequencies.
        layout: pairs are (c, c + rotary_dim / 2) for "half" (GPT-NeoX, Llama), (2c, 2c + 1) for "interleaved" (GPT-J).
        rotary_dim: how many leading dimensions turn; all by default.
        scaling: a rule for lengths past the training length, or None.
    """

    has_bias = False
    fractional = True
    sole_operands = frozenset({"rotary"})

    def __init__(
        self, head_dim: int, base: float, layout: str, rotary_dim: int | None, scaling: Scaling | None = None
    ) -> None:
        super().__init__()
        self.head_dim = check_positive_int("head_dim", head_dim)
        self.base = check_positive("base", base)
        self.layout = check_choice("layout", layout, LAYOUTS)
        self.rotary_dim = check_positive_int("rotary_dim", head_dim if rotary_dim is None else rotary_dim)
        if self.rotary_dim > head_dim or self.rotary_dim % 2:
            raise ValueError(f"rotary_dim: expected an even number up to head_dim={head_dim}, got {self.rotary_dim}")
        if scaling is not None and not isinstance(scaling, Scaling):
            raise TypeError(f"scaling: expected a Scaling or None, got {type(scaling).__name__}")
        self.scaling = scaling
        if scaling is not None:
            _check_frequencies(scaling, self.rotary_dim, self.base)

    def frequencies(self, context: Context) -> tuple[Tensor, Tensor, Factor]:
        """theta of the queries and of the keys, and the attention factor (of queries and of keys, where it goes by the
        length, [B or 1, T or 1, 1]); one tensor for both where they agree.

        theta is float64, radians per position, [rotary_dim / 2] or [B or 1, T or 1, rotary_dim / 2]; or whatever the
        subclass's `angles` makes of it.
        """
        if self.scaling is None:
            theta = rotary_frequencies(self.rotary_dim, self.base, context.device)
            return theta, theta, 1.0
        if not self.scaling.dynamic:
            theta, factor = self.scaling.frequencies(self.rotary_dim, self.base, context.k_len, context.device)
            assert not isinstance(factor, Tensor)
            return theta, theta, factor
        q_lengths, k_lengths = self.sequence_lengths(context)
        k_theta, factor = self.scaling.frequencies(self.rotary_dim, self.base, k_lengths, context.device)
        if q_lengths is k_lengths:
            return k_theta, k_theta, (factor, factor) if isinstance(factor, Tensor) else factor
        q_theta, q_factor = self.scaling.frequencies(self.rotary_dim, self.base, q_lengths, context.device)
        if isinstance(factor, Tensor):
            assert isinstance(q_factor, Tensor)
            return q_theta, k_theta, (q_factor, factor)
        return q_theta, k_theta, factor

    def sequence_lengths(self, context: Context) -> tuple[Tensor, Tensor]:
        """What dynamic rules go by, for each query and each key; as `Context.sequence_lengths`."""
        return context.sequence_lengths()

    def angles(self, positions: Tensor, theta: Tensor) -> Tensor:
        """The angle in radians, float64 [B or 1, T, rotary_dim / 2], of each pair at positions [B or 1, T]; a
        dimension of heads comes before T where they differ."""
        return positions[..., None] * theta

    def token_positions(self, context: Context) -> tuple[Tensor, Tensor]:
        """The positions of queries and keys that `angles` takes; the same tensor where they agree."""
        return context.token_positions()

    def build(self, context: Context) -> Plan:
        if context.head_dim is not None and context.head_dim != self.head_dim:
            raise ValueError(
                f"position: {type(self).__name__} was made for head_dim={self.head_dim}, got {context.head_dim}"
            )
        dtype = context.table_dtype()
        q_positions, k_positions = self.token_positions(context)
        q_theta, k_theta, factor = self.frequencies(context)
        q_factor, k_factor = factor if isinstance(factor, tuple) else (factor, factor)
        if context.k_rotated:
            q_cos, q_sin = self._turn(q_positions, q_theta, q_factor, dtype)
            if q_cos.dim() == 3:  # one number stands for the keys' tables
                stand_in = q_cos.new_ones(1).expand(1, k_positions.shape[-1], q_cos.shape[-1])
                rotary = Rotary(q_cos, q_sin, stand_in, stand_in, self.layout == "interleaved")
                return Plan(rotary=rotary, bias=Bias())
        k_cos, k_sin = self._turn(k_positions, k_theta, k_factor, dtype)
        if q_positions is k_positions and q_theta is k_theta:
            q_cos, q_sin = k_cos, k_sin
        else:
            q_cos, q_sin = self._turn(q_positions, q_theta, q_factor, dtype)
        rotary = Rotary(q_cos, q_sin, k_cos, k_sin, self.layout == "interleaved")
        # Spelled out because torch.compile cannot trace the default of a dataclass field that is itself a dataclass.
        return Plan(rotary=rotary, bias=Bias())

    def tables(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin float32 [1, T, rotary_dim / 2] of integer positions [T], where no length counts."""
        tokens = positions.shape[0]
        context = Context(tokens, tokens, 1, self.head_dim, positions.device, torch.float32)
        _, theta, factor = self.frequencies(context)
        if isinstance(factor, tuple):
            raise ValueError("scaling: expected one attention factor for every length, got one that goes by it")
        return self._turn(positions[None], theta, factor, torch.float32)

    def rotate(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """Turn x [B, H, T, D] itself, at positions [B or 1, T], 0 .. T-1 if None: for caches of turned keys.

        Differentiable, in x and in what is learned. Where heads differ, x has those of the queries or of the keys.
        """
        if x.dim() != 4 or x.shape[-1] != self.head_dim:
            raise ValueError(f"x: expected [B, H, T, {self.head_dim}], got {list(x.shape)}")
        if positions is None:
            positions = torch.arange(x.shape[2], device=x.device)[None]
        heads = self.num_heads or x.shape[1]
        context = Context(x.shape[2], x.shape[2], heads, x.shape[3], x.device, x.dtype, positions, positions)
        turn = self.build(context).rotary
        assert turn is not None
        cos, sin = turn.k_cos, turn.k_sin
        if cos.dim() == 4 and cos.shape[1] != x.shape[1]:
            cos, sin = turn.q_cos, turn.q_sin
            if cos.shape[1] != x.shape[1]:
                raise ValueError(f"x: expected {cos.shape[1]} or {turn.k_cos.shape[1]} heads, got {x.shape[1]}")
        return reference.rotate(x, cos, sin, turn.interleaved)

    def _turn(
        self, positions: Tensor, theta: Tensor, factor: float | Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        # Angles of thousands of radians keep too few bits in float32, so they are float64 up to here.
        angles = self.angles(positions, theta)
        return (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)


class RoPE(RotaryEncoding):
    """Rotary embedding: the logit of q at position i and k at position j depends on i - j alone.

    Args:
        head_dim: dimension D of a head.
        base: the base of the frequencies.
        layout: pairs are (c, c + rotary_dim / 2) for "half" (GPT-NeoX, Llama), (2c, 2c + 1) for "interleaved" (GPT-J).
        rotary_dim: how many leading dimensions turn, an even number; all by default.
        scaling: a rule for lengths past the training length (Linear, DynamicNTK, YaRN, Llama3, LongRoPE), or None.
        learnable: True learns the frequencies, `theta` [rotary_dim / 2], radians per position; "base" their base,
            `log_base` [1]. They start as they would be fixed. A scaling multiplies each frequency by what it makes of
            the one that stood there at the start.
    """

    def __init__(
        self,
        head_dim: int,
        base: float = 10000.0,
        layout: str = "half",
        rotary_dim: int | None = None,
        scaling: Scaling | None = None,
        learnable: bool | str = False,
    ) -> None:
        super().__init__(head_dim, base, layout, rotary_dim, scaling)
        if not isinstance(learnable, bool) and learnable != "base":
            raise ValueError(f"learnable: expected True, False or 'base', got {learnable!r}")
        self.learnable = learnable
        if learnable is True:
            self.theta = nn.Parameter(torch.empty(self.rotary_dim // 2))
        elif learnable == "base":
            self.log_base = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        with torch.no_grad():
            if self.learnable is True:
                self.theta.copy_(rotary_frequencies(self.rotary_dim, self.base, self.theta.device))
            elif self.learnable:
                self.log_base.fill_(math.log(self.base))

    def frequencies(self, context: Context) -> tuple[Tensor, Tensor, Factor]:
        q_theta, k_theta, factor = super().frequencies(context)
        if not self.learnable:
            return q_theta, k_theta, factor
        if self.learnable is True:
            theta = self.theta.double()
        else:
            theta = torch.exp(rotary_exponents(self.rotary_dim, context.device) * -self.log_base.double())
        if self.scaling is None:
            return theta, theta, factor
        initial = rotary_frequencies(self.rotary_dim, self.base, context.device)
        scaled = theta * (k_theta / initial)
        return scaled if q_theta is k_theta else theta * (q_theta / initial), scaled, factor

    def build(self, context: Context) -> Plan:
        if not self._shares(context):
            return super().build(context)
        kind = self.head_dim, self.base, self.layout, self.rotary_dim, self.scaling
        return Plan(rotary=_shared_tables(*kind, context, torch.is_inference_mode_enabled()), bias=Bias())

    def _shares(self, context: Context) -> bool:
        """Whether the tables follow from sizes alone, and are few enough to be kept for the next call that is alike.

        Only on the CPU: elsewhere they may lie in a captured graph's memory, and making them costs no wait.
        """
        sizes = context.q_tokens, context.k_tokens
        return (
            type(self) is RoPE
            and not self.learnable
            and context.device.type == "cpu"
            and context.plain
            and not torch.compiler.is_compiling()
            and not torch._C._len_torch_dispatch_stack()
            and not torch._C._are_functorch_transforms_active()
            and context.head_dim == self.head_dim
            and (self.scaling is None or type(self.scaling).__module__ == Scaling.__module__)
            and sum(size or 0 for size in sizes) * self.rotary_dim <= _MOST_SHARED
        )

    @classmethod
    def examples(cls, num_heads: int, head_dim: int, tokens: int) -> dict[str, Encoding]:
        if head_dim < 2:
            return {}
        even, part = head_dim // 2 * 2, (head_dim // 2 + 1) // 2 * 2
        return {
            "RoPE": cls(head_dim, rotary_dim=even),
            "RoPE interleaved": cls(head_dim, layout="interleaved", rotary_dim=even),
            "RoPE partial": cls(head_dim, rotary_dim=part, scaling=YaRN(4.0, max(tokens // 2, 1))),
            "RoPE learnable": cls(head_dim, rotary_dim=part, scaling=YaRN(4.0, max(tokens // 2, 1)), learnable=True),
        }

    def extra_repr(self) -> str:
        return (
            f"{self.head_dim}, base={self.base}, layout={self.layout!r}, rotary_dim={self.rotary_dim}, "
            f"scaling={self.scaling}, learnable={self.learnable!r}"
        )


_MOST_SHARED = 2**20  # numbers: 4 MB


@lru_cache(maxsize=4)
def _shared_tables(
    head_dim: int,
    base: float,
    layout: str,
    rotary_dim: int,
    scaling: Scaling | None,
    context: Context,
    inference: bool,  # tensors of inference mode serve no call with gradients
) -> Rotary:
    """The tables of the last few plain calls: layers of a model share them, and they take longer than a small call."""
    turn = RotaryEncoding(head_dim, base, layout, rotary_dim, scaling).build(context).rotary
    assert turn is not None
    return turn


def _check_frequencies(scaling: Scaling, rotary_dim: int, base: float) -> None:
    """ValueError where a rule and a rotary embedding do not go together; a rule checks what it is given by itself."""
    length = torch.tensor([1, 2**31], device="cpu") if scaling.dynamic else 1
    theta, factor = scaling.frequencies(rotary_dim, base, length, "cpu")
    positive = bool((factor > 0.0).all()) if isinstance(factor, Tensor) else 0.0 < factor < math.inf
    if not theta.isfinite().all() or not positive:
        raise ValueError(
            f"scaling: expected finite frequencies and a positive attention factor with base={base}, got "
            f"{theta.tolist()} and {factor} of {scaling}"
        )
