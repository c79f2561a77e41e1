"""Every operand of a plan, checked once for every backend: an encoding, posattn's own or a user's, is an input too.

Kernels read what a plan says without looking: a table of one head for a call of twelve would be read out of bounds.
Shapes that broadcast naturally over the heads (a table [1, L], one slope) are expanded, and so is their gradient.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

import torch
from torch import SymInt, Tensor

from posattn.errors import ArgumentTypeError, ArgumentValueError
from posattn.plan import (
    EDGES,
    FORMS,
    Bias,
    Decay,
    Dense,
    Gated,
    HeadMix,
    Places,
    Plan,
    Profile,
    RelativeKeys,
    Rotary,
    Slope,
    Table,
)

_Operand = TypeVar("_Operand")

# Where each part of a plan belongs, for who put it elsewhere.
_PLACES: dict[type, str] = {
    Rotary: "Plan(rotary=...)",
    HeadMix: "Plan(mix=...)",
    Places: "Plan(places=...)",
    Gated: "Plan(gated=...)",
    RelativeKeys: "Plan(relative=...)",
    Bias: "Plan(bias=...)",
    Slope: "Plan(bias=Bias(slope=...))",
    Table: "Plan(bias=Bias(table=...))",
    Profile: "Plan(bias=Bias(profile=...))",
    Dense: "Plan(bias=Bias(dense=...))",
    Decay: "Plan(bias=Bias(decay=...))",
}


def misplaced(value: object, wanted: type) -> str:
    """The end of a message: what came where a Plan or a part of one, `wanted`, was expected, and where that belongs."""
    kind = type(value)
    if kind in _PLACES:
        return f"{kind.__name__}; a {kind.__name__} goes in {_PLACES[kind]}"
    if kind.__module__.startswith("posattn.encodings"):
        return f"the encoding posattn.{kind.__name__}; its plan is position(context)"
    if isinstance(value, (Tensor, tuple)):
        if wanted is Dense:
            return f"{kind.__name__}; a matrix [B or 1, H or 1, Tq, Tk] goes in Dense(bias)"
        table = "Table(values, first)"
        place = table if wanted is Table else f"Plan(bias=Bias(table={table}))"
        return f"{kind.__name__}; values [H, L] over distances go in {place}"
    return kind.__name__


def checked(plan: Plan, source: str, q: Tensor, k: Tensor) -> Plan:
    """The plan that an encoding (`source`) built for q [B, Hq, Tq, D] and k [B, Hkv, Tk, D], fit for every kernel."""
    checks = _Checks(source, q, k)
    if plan.rotary is not None:
        checks.rotary(checks.kind("rotary", plan.rotary, Rotary))
    bias = checks.bias("bias", plan.bias)
    mix = None if plan.mix is None else checks.head_mix(checks.kind("mix", plan.mix, HeadMix))
    if plan.amplitude is not None:
        checks.amplitude(plan.amplitude)
    if plan.places is not None:
        checks.places(checks.kind("places", plan.places, Places))
    if plan.gated is not None:
        checks.gated(checks.kind("gated", plan.gated, Gated), mix is not None)
    if plan.relative is not None:
        checks.relative(checks.kind("relative", plan.relative, RelativeKeys))
        for other in ("rotary", "amplitude", "mix"):
            if getattr(plan, other) is not None:
                raise ArgumentValueError(f"position: expected no {other} beside relative keys, got both in {source}")
    if bias is plan.bias and mix is plan.mix:
        return plan
    return replace(plan, mix=mix, bias=bias)


class _Checks:
    def __init__(self, source: str, q: Tensor, k: Tensor) -> None:
        self.source, self.device = source, q.device
        self.batch, self.heads, self.q_tokens, self.dim = q.shape
        self.kv_heads, self.k_tokens = k.shape[1], k.shape[2]

    def kind(self, name: str, operand: object, expected: type[_Operand]) -> _Operand:
        if not isinstance(operand, expected):
            raise ArgumentTypeError(f"{self._what(name)} a {expected.__name__}, got {misplaced(operand, expected)}")
        return operand

    def tensor(self, name: str, tensor: object) -> Tensor:
        """Of any shape: floating numbers on q's device."""
        if not isinstance(tensor, Tensor):
            raise ArgumentTypeError(f"{self._what(name)} a torch.Tensor, got {type(tensor).__name__}")
        if tensor.device != self.device:
            raise ArgumentValueError(
                f"{self._what(name)} on {self.device} like q, got {tensor.device}; an encoding moves with its model, "
                "or by .to(device)"
            )
        if not tensor.is_floating_point():
            raise ArgumentTypeError(f"{self._what(name)} of a floating dtype, got {tensor.dtype}")
        return tensor

    def shaped(self, name: str, tensor: object, *expected: int | str) -> Tensor:
        """Of a shape in which a word stands for any length from 1 on."""
        tensor = self.tensor(name, tensor)
        fits = tensor.dim() == len(expected) and all(
            size >= 1 if isinstance(want, str) else size == want for size, want in zip(tensor.shape, expected)
        )
        if not fits:
            raise self._wrong_shape(name, tensor, *expected)
        return tensor

    def by_head(self, name: str, tensor: object, length: int | str) -> Tensor:
        """[heads, length], from that or from [1, length]."""
        tensor = self.tensor(name, tensor)
        if tensor.dim() == 2 and tensor.shape[0] == 1 and self.heads != 1:
            tensor = tensor.expand(self.heads, -1)
        if tensor.dim() == 1:
            raise self._wrong_shape(name, tensor, self.heads, length, hint="; [None] makes one row for all heads of it")
        return self.shaped(name, tensor, self.heads, length)

    def first(self, name: str, first: object) -> None:
        """The distance or position of an operand's entry 0, an int (or a traced one)."""
        if isinstance(first, (bool, Tensor)) or not isinstance(first, (int, SymInt)):
            raise ArgumentTypeError(f"{self._what(name)} an int, got {type(first).__name__}")

    def rotary(self, rotary: Rotary) -> None:
        half = self.tensor("rotary.q_cos", rotary.q_cos).shape[-1]
        for name, heads, tokens in (("q", self.heads, self.q_tokens), ("k", self.kv_heads, self.k_tokens)):
            self._angles(f"rotary.{name}_cos", getattr(rotary, f"{name}_cos"), heads, tokens, half)
            self._angles(f"rotary.{name}_sin", getattr(rotary, f"{name}_sin"), heads, tokens, half)
        if half < 1 or 2 * half > self.dim:
            raise ArgumentValueError(
                f"{self._what('rotary')} of 1 to {self.dim // 2} pairs for head_dim={self.dim}, got {half}"
            )
        for cos, sin in ((rotary.q_cos, rotary.q_sin), (rotary.k_cos, rotary.k_sin)):
            if cos.shape != sin.shape:
                raise self._wrong_shape("rotary's sines", sin, *cos.shape)

    def _angles(self, name: str, tensor: object, heads: int, tokens: int, half: int) -> None:
        tensor = self.tensor(name, tensor)
        of_heads = tensor.dim() == 4
        fits = (of_heads or tensor.dim() == 3) and tensor.shape[-2] == tokens and tensor.shape[-1] == half
        if fits and of_heads:
            fits = tensor.shape[1] == 1 or tensor.shape[1] == heads
        if not fits or (tensor.shape[0] != 1 and tensor.shape[0] != self.batch):
            by_head = (f"{heads} or 1",) if of_heads else ()
            raise self._wrong_shape(name, tensor, f"{self.batch} or 1", *by_head, tokens, half)

    def amplitude(self, amplitude: object) -> None:
        self._by_token("amplitude", self.tensor("amplitude", amplitude), self.q_tokens)

    def _by_token(self, name: str, tensor: Tensor, tokens: int) -> None:
        """[batch or 1, heads or 1, tokens]."""
        target = (self.batch, self.heads)
        fits = tensor.dim() == 3 and tensor.shape[2] == tokens
        if not fits or any(size != 1 and size != want for size, want in zip(tensor.shape, target)):
            raise self._wrong_shape(name, tensor, *(f"{n} or 1" for n in target), tokens)

    def _integers(self, name: str, tensor: object) -> Tensor:
        """Of any shape: int64 on q's device."""
        if not isinstance(tensor, Tensor) or tensor.dtype != torch.int64:
            got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ArgumentTypeError(f"{self._what(name)} a torch.Tensor of int64, got {got}")
        if tensor.device != self.device:
            raise ArgumentValueError(f"{self._what(name)} on {self.device} like q, got {tensor.device}")
        return tensor

    def places(self, places: Places) -> None:
        for name, tensor, tokens in (("q", places.q, self.q_tokens), ("k", places.k, self.k_tokens)):
            name = f"places.{name}"
            tensor = self._integers(name, tensor)
            # Compared one by one: `in` is no comparison of sizes that a compiler knows by name.
            fits = tensor.dim() == 2 and tensor.shape[1] == tokens
            if not fits or not (tensor.shape[0] == 1 or tensor.shape[0] == self.batch):
                raise self._wrong_shape(name, tensor, f"{self.batch} or 1", tokens)

    def gated(self, gated: Gated, mixed: bool) -> None:
        self._shared("gated.weight", gated.weight, "positions", self.dim)
        if mixed:
            raise ArgumentValueError(f"{self._what('gated')} None beside a mix of heads, got {type(gated).__name__}")

    def relative(self, relative: RelativeKeys) -> None:
        self.first("relative.first", relative.first)
        rows: int | str = "rows"
        for name in ("q_rows", "k_rows"):
            if (table := getattr(relative, name)) is not None:
                rows = self._shared(f"relative.{name}", table, rows, self.dim).shape[1]
        if rows == "rows":
            raise ArgumentValueError(f"{self._what('relative.q_rows or relative.k_rows')} a torch.Tensor, got None")
        for name in ("u", "v"):
            if (shift := getattr(relative, name)) is not None:
                self._shared(f"relative.{name}", shift, self.dim)
        if relative.rows is not None:
            index = self._integers("relative.rows", relative.rows)
            if index.dim() != 1 or not index.shape[0]:
                raise self._wrong_shape("relative.rows", index, "distances")

    def _shared(self, name: str, tensor: object, *rest: int | str) -> Tensor:
        """[heads or 1, *rest]."""
        tensor = self.tensor(name, tensor)
        shared = tensor.dim() == 1 + len(rest) and tensor.shape[0] == 1
        return self.shaped(name, tensor, 1 if shared else self.heads, *rest)

    def bias(self, name: str, bias: object) -> Bias:
        bias = self.kind(name, bias, Bias)
        slope, table, profile, dense = bias.slope, bias.table, bias.profile, bias.dense
        if slope is not None:
            slope = self._slope(f"{name}.slope", self.kind(f"{name}.slope", slope, Slope))
        if table is not None:
            table = self._table(f"{name}.table", self.kind(f"{name}.table", table, Table))
        if profile is not None:
            profile = self._profile(f"{name}.profile", self.kind(f"{name}.profile", profile, Profile))
        if dense is not None:
            self._dense(f"{name}.dense.bias", self.kind(f"{name}.dense", dense, Dense).bias)
        if bias.decay is not None:
            self._decay(f"{name}.decay", self.kind(f"{name}.decay", bias.decay, Decay))
        if slope is bias.slope and table is bias.table and profile is bias.profile:
            return bias
        return Bias(slope, table, profile, dense, bias.decay)

    def _slope(self, name: str, slope: Slope) -> Slope:
        tensor = self.tensor(f"{name}.slope", slope.slope)
        if tensor.dim() == 1 and tensor.shape[0] == 1 and self.heads != 1:
            return Slope(tensor.expand(self.heads), slope.signed)
        if tensor.dim() == 2:
            self.shaped(f"{name}.slope", tensor, self.batch, self.heads)
        else:
            self.shaped(f"{name}.slope", tensor, self.heads)
        return slope

    def _decay(self, name: str, decay: Decay) -> None:
        for part, tokens in (("q", self.q_tokens), ("k", self.k_tokens)):
            whole = f"{name}.{part}"
            tensor = self.tensor(whole, getattr(decay, part))
            if tensor.dtype not in (torch.float32, torch.float64):
                raise ArgumentTypeError(f"{self._what(whole)} in float64 or float32, got {tensor.dtype}")
            self._by_token(whole, tensor, tokens)

    def _table(self, name: str, table: Table) -> Table:
        self.first(f"{name}.first", table.first)
        values = self.by_head(f"{name}.values", table.values, "distances")
        return table if values is table.values else Table(values, table.first)

    def _profile(self, name: str, profile: Profile) -> Profile:
        self.first(f"{name}.first", profile.first)
        self.first(f"{name}.row_first", profile.row_first)
        self.shaped(f"{name}.psi", profile.psi, "distances")
        self.shaped(f"{name}.row_scale", profile.row_scale, "positions")
        knots = self.tensor(f"{name}.knots", profile.knots)
        if knots.dim() != 1:
            raise self._wrong_shape(f"{name}.knots", knots, "knots")
        lines = knots.shape[0] + 1
        slope = self.by_head(f"{name}.segment_slope", profile.segment_slope, lines)
        intercept = self.by_head(f"{name}.segment_intercept", profile.segment_intercept, lines)
        if slope is profile.segment_slope and intercept is profile.segment_intercept:
            return profile
        return replace(profile, segment_slope=slope, segment_intercept=intercept)

    def _dense(self, name: str, dense: object) -> None:
        tensor = self.tensor(name, dense)
        target = (self.batch, self.heads, self.q_tokens, self.k_tokens)
        # Comparisons spelled out: `in` cannot tell traced lengths apart.
        if tensor.dim() != 4 or any(size != 1 and size != want for size, want in zip(tensor.shape, target)):
            hint = {2: "; [None, None] makes one for all heads of it", 3: "; [None] makes one for every sequence of it"}
            raise self._wrong_shape(name, tensor, *(f"{n} or 1" for n in target), hint=hint.get(tensor.dim(), ""))

    def head_mix(self, mix: HeadMix) -> HeadMix:
        inner = self.bias("mix.inner", mix.inner)
        if mix.form not in FORMS:
            raise ArgumentValueError(f"{self._what('mix.form')} one of {', '.join(map(repr, FORMS))}, got {mix.form!r}")
        inputs = 2 * self.heads if inner and mix.form != "add" else self.heads
        if mix.edge not in EDGES:
            raise ArgumentValueError(f"{self._what('mix.edge')} one of {', '.join(map(repr, EDGES))}, got {mix.edge!r}")
        kernel: tuple[int | str, ...] = ()
        if self.tensor("mix.w1", mix.w1).dim() == 3:
            kernel = (mix.w1.shape[2],)
            if mix.w1.shape[2] % 2 == 0:
                raise ArgumentValueError(f"{self._what('mix.w1')} an odd kernel, got {list(mix.w1.shape)}")
        width = self.shaped("mix.w1", mix.w1, "width", inputs, *kernel).shape[0]
        self.shaped("mix.b1", mix.b1, width)
        self.shaped("mix.w2", mix.w2, self.heads, width, *kernel)
        self.shaped("mix.b2", mix.b2, self.heads)
        return mix if inner is mix.inner else replace(mix, inner=inner)

    def _what(self, name: str) -> str:
        return f"position: expected {name} of the plan of {self.source} to be"

    def _wrong_shape(self, name: str, tensor: Tensor, *expected: int | str, hint: str = "") -> ArgumentValueError:
        return ArgumentValueError(
            f"{self._what(name)} of shape [{', '.join(map(str, expected))}], got {list(tensor.shape)}{hint}"
        )
