"""What every encoding is: a module that lowers to a plan, and that adds to others with `+`.

To add an encoding, subclass `Encoding`, set `num_heads`, and write `build(context)`, which turns parameters into plan
operands with differentiable PyTorch. Name it in `posattn/encodings/__init__.py` and the tests and benches find it.
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from posattn import plan_checks, reference
from posattn.encodings._checks import check_positive_int
from posattn.encodings._plans import check_values, copied, head_slice
from posattn.encodings.context import Context as Context
from posattn.errors import SWAPPED, ArgumentTypeError, ArgumentValueError, described
from posattn.plan import Bias, Decay, Dense, Plan, Slope, Table


class Encoding(nn.Module):
    """A positional encoding for attention. `lower` gives its plan; `bias` shows an additive one; `+` composes.

    A module with parameters or buffers of its own has `reset_parameters`, which gives those, and not those of modules
    inside, the values of a new one: for models that are made on the meta device.
    """

    num_heads: int | None = None
    """Query heads that it was made for; None if any number will do."""
    has_bias: bool = True
    """Whether the plan adds a bias to the logits; a rotary encoding's does not."""
    needs_positions: bool = False
    """Whether it makes sense only with explicit positions."""
    fractional: bool = False
    """Whether positions may be fractions: they may where nothing is looked up by a distance."""
    sole_operands: frozenset[str] = frozenset()
    """Those of "rotary", "mix", "profile", "gated" and "relative", of which a plan holds one each, that it is known to
    set: a sum with two of one is refused when it is made, where this says so, and else when it is lowered."""
    fused: bool = True
    """Whether kernels compute it; what none does is for backend="reference" alone."""

    if TYPE_CHECKING:

        def __call__(self, context: Context) -> Plan: ...

    def build(self, context: Context) -> Plan:
        """The plan of this encoding, by differentiable PyTorch. Subclasses write this; callers use `lower`.

        It lowers encodings inside this one by calling them: `inner(context)`.
        """
        raise NotImplementedError(f"{type(self).__name__} must define build(context)")

    def lower(self, context: Context) -> Plan:
        """The plan for one call. ValueError if the head count is wrong, or for NaN in a parameter or in the plan.

        It calls the module, so that hooks (those of fully_shard, above all) run. Values are looked at on the CPU alone.
        """
        plan = self(context)
        if not torch.compiler.is_compiling():
            check_values(self, plan)
        return plan

    def forward(self, context: Context) -> Plan:
        """What `lower` gives, with no look at values."""
        if self.num_heads is not None and self.num_heads != context.num_heads:
            swapped = context.q_len == self.num_heads
            raise ValueError(
                f"position: {type(self).__name__} was made for num_heads={self.num_heads}, "
                f"got queries with {context.num_heads} heads{SWAPPED if swapped else ''}"
            )
        plan: object = self.build(context)
        if not isinstance(plan, Plan):
            got = plan_checks.misplaced(plan, Plan)
            raise ArgumentTypeError(f"position: expected {type(self).__name__}.build to return a Plan, got {got}")
        # fully_shard frees the parameters right after this, and an operand may be one of them or a view of it.
        return copied(plan) if self._forward_hooks else plan

    def shard(self, first: int, count: int) -> Encoding:
        """Heads first .. first + count - 1 of this encoding, for a tensor-parallel rank that holds those alone.

            attention(q, k, v, encoding.shard(rank * heads, heads))         # q with `heads` heads, of all of them

        It shares this encoding's parameters, whose gradients are of these heads: sum them over the ranks. The plan of
        all heads is built and sliced. ValueError, when lowered, for a DAPE: it needs the logits of all heads.
        An encoding that any number of heads may use gives itself.
        """
        return self if self.num_heads is None else Shard(self, first, count)

    def bias(
        self, q_len: int, k_len: int, *, q_positions: Tensor | None = None, k_positions: Tensor | None = None
    ) -> Tensor:
        """The dense additive bias [H, q_len, k_len], for looking at; query i sits at position i + k_len - q_len.

        [B, H, q_len, k_len] if it differs between the B sequences of a batch, as with slopes [B, H]. Explicit positions
        are integers [q_len] and [k_len]. TypeError for an encoding that is no additive bias: a rotary one, or one that
        depends on the logits.
        """
        if (q_positions is None) != (k_positions is None):
            raise ValueError("q_positions, k_positions: expected both or neither, got one")
        tensors = [*self.parameters(), *self.buffers()]
        device = tensors[0].device if tensors else torch.device("cpu")
        context = Context(
            q_len=q_len,
            k_len=k_len,
            num_heads=self.num_heads or 1,
            head_dim=None,
            device=device,
            dtype=torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32,
            q_positions=_one_row("q_positions", q_positions, q_len, device),
            k_positions=_one_row("k_positions", k_positions, k_len, device),
        )
        plan = self.lower(context)
        if plan.mix is not None:
            raise TypeError(
                f"{type(self).__name__} depends on the logits and has no fixed bias; "
                "take .bias of its inner encoding, or pass real logits through posattn.reference"
            )
        if plan.rotary is not None:
            raise TypeError(
                f"{type(self).__name__} turns q and k and is not an additive bias; turn them with RoPE.rotate(x), "
                "and take .bias of the additive part alone"
            )
        if plan.amplitude is not None:
            raise TypeError(
                f"{type(self).__name__} multiplies the logits and is no additive bias; take .bias of the additive part "
                "alone"
            )
        if plan.gated is not None:
            raise TypeError(
                f"{type(self).__name__} goes by the logits and has no fixed bias; take .bias of the additive part alone"
            )
        if plan.relative is not None:
            raise TypeError(
                f"{type(self).__name__} depends on q and k and has no fixed bias; take .bias of the additive part alone"
            )
        sizes = {operand.shape[0] for operand in _by_sequence(plan.bias)} - {1}
        batch = sizes.pop() if sizes else 1
        q, k = (torch.empty(1, device=device).expand(batch, context.num_heads, n, 1) for n in (q_len, k_len))
        bias = plan_checks.checked(plan, type(self).__name__, q, k).bias
        if not bias:
            return torch.zeros(context.num_heads, q_len, k_len, dtype=context.dtype, device=device)
        places = context.token_positions() if plan.places is None else (plan.places.q, plan.places.k)
        dense = reference.dense_bias(bias, *places).expand(batch, context.num_heads, q_len, k_len)
        return dense if batch > 1 else dense[0]

    @classmethod
    def examples(cls, num_heads: int, head_dim: int, tokens: int) -> dict[str, Encoding]:
        """An instance of each form, by name, for up to `tokens` queries and keys: what tests and benches run."""
        raise NotImplementedError(f"{cls.__name__} must define examples(num_heads, head_dim, tokens)")

    def __add__(self, other: Encoding) -> Encoding:
        _check_addend(other)
        return Sum(self, other) if isinstance(other, Encoding) else NotImplemented

    def __radd__(self, other: object) -> Encoding:
        _check_addend(other)
        return NotImplemented


class Sum(Encoding):
    """The composition of encodings: biases add, at most one part turns q and k, and at most one mixes the heads.

    The bias of a part beside a head-mixing one (DAPE) is added after the mix.
    """

    parts: nn.ModuleList

    def __init__(self, *parts: Encoding) -> None:
        super().__init__()
        flat: list[Encoding] = []
        for part in parts:
            flat.extend(cast(list[Encoding], part.parts) if isinstance(part, Sum) else [part])
        heads = {p.num_heads for p in flat} - {None}
        if len(heads) > 1:
            raise ValueError(f"+: expected encodings with equal num_heads, got {sorted(h for h in heads if h)}")
        taken: set[str] = set()
        for part in flat:
            _check_sole(taken & part.sole_operands)
            taken |= part.sole_operands
        self.parts = nn.ModuleList(flat)
        self.num_heads = heads.pop() if heads else None
        self.sole_operands = frozenset(taken)
        self.has_bias = any(p.has_bias for p in flat)
        self.fractional = all(p.fractional for p in flat)
        self.needs_positions = any(p.needs_positions for p in flat)
        self.fused = all(p.fused for p in flat)

    def build(self, context: Context) -> Plan:
        plan = Plan(bias=Bias())
        for part in self.parts:
            plan = add_plans(plan, cast(Encoding, part)(context), context)
        return plan


class Shard(Encoding):
    """Some of the heads of a whole encoding; `Encoding.shard` makes one."""

    def __init__(self, whole: Encoding, first: int, count: int) -> None:
        super().__init__()
        if isinstance(first, bool) or not isinstance(first, int):
            raise TypeError(f"first: expected an int, got {type(first).__name__}")
        check_positive_int("count", count)
        heads = whole.num_heads
        if heads is None:
            raise ValueError(f"whole: expected an encoding made for a number of heads, got {type(whole).__name__}")
        if not 0 <= first <= heads - count:
            raise ValueError(
                f"first, count: expected heads within the {heads} of {type(whole).__name__}, got {first} and {count}"
            )
        self.whole = whole
        self._whole_heads = heads
        self.first = first
        self.num_heads = count
        self.has_bias = whole.has_bias
        self.fractional = whole.fractional
        self.needs_positions = whole.needs_positions
        self.sole_operands = whole.sole_operands
        self.fused = whole.fused

    def build(self, context: Context) -> Plan:
        plan = self.whole(replace(context, num_heads=self._whole_heads, kv_heads=None))  # the whole's own key heads
        return head_slice(plan, self.first, context.num_heads)

    def extra_repr(self) -> str:
        return f"first={self.first}, count={self.num_heads}"


def add_plans(a: Plan, b: Plan, context: Context) -> Plan:
    """The plan of a sum of encodings. ValueError for two of what a plan holds one of."""
    sole = ("rotary", "mix", "gated", "relative")
    _check_sole({name for name in sole if getattr(a, name) is not None and getattr(b, name) is not None})
    if a.places is not None or b.places is not None:
        a, b = _in_one_place(a, b, context)
    amplitude = a.amplitude if b.amplitude is None else b.amplitude
    if a.amplitude is not None and b.amplitude is not None:
        amplitude = a.amplitude * b.amplitude
    return Plan(
        rotary=a.rotary or b.rotary,
        mix=a.mix or b.mix,
        bias=_add_biases(a.bias, b.bias, context),
        amplitude=amplitude,
        places=a.places or b.places,
        gated=a.gated or b.gated,
        relative=a.relative or b.relative,
    )


def _in_one_place(a: Plan, b: Plan, context: Context) -> tuple[Plan, Plan]:
    """Two plans of which at most one has biases that go by positions, for kernels know one position of a token: those
    of the other become dense."""
    if not (_goes_by_places(a) and _goes_by_places(b)):
        return a, b
    return (_made_dense(a, context), b) if a.places is not None else (a, _made_dense(b, context))


def _made_dense(plan: Plan, context: Context) -> Plan:
    places = context.token_positions() if plan.places is None else (plan.places.q, plan.places.k)

    def dense(bias: Bias) -> Bias:
        by_places = replace(bias, decay=None)
        return Bias(dense=dense_bias(by_places, *places), decay=bias.decay) if by_places else bias

    mix = None if plan.mix is None else replace(plan.mix, inner=dense(plan.mix.inner))
    return replace(plan, bias=dense(plan.bias), mix=mix, places=None)


def _goes_by_places(plan: Plan) -> bool:
    biases = (plan.bias, Bias() if plan.mix is None else plan.mix.inner)
    return plan.relative is not None or any(
        bias.slope is not None or bias.table is not None or bias.profile is not None for bias in biases
    )


def dense_bias(bias: Bias, q_positions: Tensor, k_positions: Tensor) -> Dense:
    """The sum of a bias's operands as one dense one. The gradient of its table has an order that no thread changes."""
    rest = replace(bias, table=None)
    dense = reference.dense_bias(rest, q_positions, k_positions) if rest else None
    if bias.table is not None:
        values, first = bias.table.values, bias.table.first
        distance = q_positions[:, :, None] - k_positions[:, None, :]
        index = (distance - first).clamp(0, values.shape[1] - 1)
        # Not values[...], whose gradient is summed in an order that depends on threads.
        table = F.embedding(index, values.T).permute(0, 3, 1, 2)
        dense = table if dense is None else dense + table
    if dense is None:
        raise ValueError("bias: expected a Bias with at least one operand, got an empty one")
    return Dense(dense)


def _add_biases(a: Bias, b: Bias, context: Context) -> Bias:
    _check_sole({"profile"} if a.profile is not None and b.profile is not None else set())
    slope, table, dense = a.slope or b.slope, a.table or b.table, a.dense or b.dense
    if a.table is not None and b.table is not None:
        table = Table(a.table.values + b.table.values, a.table.first)
    if a.dense is not None and b.dense is not None:
        dense = Dense(a.dense.bias + b.dense.bias)
    if a.slope is not None and b.slope is not None:
        if a.slope.signed == b.slope.signed:
            slope = Slope(a.slope.slope + b.slope.slope, a.slope.signed)
        else:
            # One operand cannot be both signed and symmetric, so one of the slopes becomes a table.
            slope, other = (a.slope, b.slope) if b.slope.slope.dim() == 1 else (b.slope, a.slope)
            extra = _slope_table(other, context)
            table = extra if table is None else Table(table.values + extra.values, table.first)
    decay = a.decay or b.decay
    if a.decay is not None and b.decay is not None:
        decay = Decay(a.decay.q + b.decay.q, a.decay.k + b.decay.k)
    return Bias(slope, table, a.profile or b.profile, dense, decay)


def _slope_table(slope: Slope, context: Context) -> Table:
    if slope.slope.dim() > 1:
        raise ValueError(
            "+: expected at most one encoding with slopes [B, H] where signed and unsigned ones meet, got two; "
            "a table of distances is shared by the batch"
        )
    distance = context.distances()
    values = -slope.slope[:, None] * (distance if slope.signed else distance.abs())
    return Table(values, context.distance_range[0])


_SOLE = {
    "rotary": "one rotary encoding, got two; q and k can be turned only once",
    "mix": "one DAPE, got two; the heads can be mixed only once",
    "profile": "one FIRE, got two; a plan holds a single profile",
    "relative": "one encoding of relative keys, got two; a plan holds a single set of them",
    "gated": "one CoPE, got two; a plan holds a single set of gated positions",
}


def _check_sole(twice: Set[str]) -> None:
    for name in _SOLE:
        if name in twice:
            raise ArgumentValueError(f"+: expected at most {_SOLE[name]}")


def _check_addend(other: object) -> None:
    if isinstance(other, type) and issubclass(other, Encoding):
        raise ArgumentTypeError(f"+: expected an encoding, got {described(other)}")


def _by_sequence(bias: object) -> Iterator[Tensor]:
    """The operands of a bias that may have a batch; whether they are fit for one is checked later."""
    slope, dense, decay = (getattr(bias, name, None) for name in ("slope", "dense", "decay"))
    operands = ((getattr(slope, "slope", None), 2), (getattr(dense, "bias", None), 4), (getattr(decay, "k", None), 3))
    for operand, dims in operands:
        if isinstance(operand, Tensor) and operand.dim() == dims:
            yield operand


def _one_row(name: str, positions: Tensor | None, tokens: int, device: torch.device) -> Tensor | None:
    if positions is None:
        return None
    if positions.shape != (tokens,) or positions.is_floating_point():
        raise ValueError(f"{name}: expected integers [{tokens}], got {positions.dtype} {list(positions.shape)}")
    return positions.to(device, torch.int64)[None]
