"""Faults in the encodings: a formula, a bound, an offset in what every backend shares with the reference."""

from __future__ import annotations

from ..fault import Fault

ADDITIVE = "tests/encodings/test_additive.py"
OWN = "tests/encodings/test_own_tables.py"
PLACES = "tests/backends/test_parity_places.py"
PLACED = "tests/encodings/test_placed_tables.py"
DAPE = "tests/encodings/test_dape.py"
FIRE = "tests/encodings/test_fire.py"
ROPE = "tests/encodings/test_rope.py"
EMBEDDINGS = "tests/encodings/test_embeddings.py"
EVERY = "tests/encodings/test_every_encoding.py"
MODULES = "tests/encodings/test_modules.py"
SHARD = "tests/encodings/test_shard.py"
VALUES = "tests/encodings/test_values.py"


def of(file: str, *rows: tuple[str, str, tuple[str, ...]]) -> list[Fault]:
    return [Fault(f"posattn/encodings/{file}", before, after, tests) for before, after, tests in rows]


FAULTS: list[Fault] = [
    *of(
        "alibi.py",
        ("2.0 ** (-8.0 * («h + 1») / below)", "h", (ADDITIVE,)),
        ("range(«0», 2 * below, 2)]", "1", (ADDITIVE,)),
        ("return slopes + extra[: «num_heads - below»]", "num_heads - below + 1", (ADDITIVE, MODULES)),
        ("Slope(slopes.to(context.table_dtype(slopes)), «self.signed»)", "False", (ADDITIVE,)),
        ("after.dtype not in («torch.float32, »torch.float64)", "torch.bfloat16, torch.float32, ", (MODULES,)),
    ),
    *of(
        "bias.py",
        ("index = (context.distances() - self.first).clamp(«0», values", "1", (OWN,)),
        (".clamp(0, values.shape[1] - «1»)", "2", (OWN,)),
        ("if self._fixed and self.values.dtype not in «_WIDE»:", "(*_WIDE, torch.bfloat16)", (OWN,)),
        ("self.num_heads = values.shape[0] if values.shape[0] «> 1» else None", "> 0", (OWN,)),
        ("self._computed = values.requires_grad «and not isinstance(values, nn.Parameter)»", "", (OWN,)),
    ),
    *of(
        "relative_function.py",
        ("if x.is_floating_point() and x.dtype.itemsize «<» dtype.itemsize", ">", (OWN,)),
        ("distances = context.distances()«.to(dtype)»", "", (OWN,)),
        ("value if isinstance(value, nn.Parameter) else nn.Parameter(«copied(value)»)", "value", (OWN,)),
        ("learns = «isinstance(value, nn.Module) and any(True for _ in value.parameters())»", "False", (OWN,)),
        ("value.requires_grad and «value.is_leaf»", "True", (OWN,)),
        ("codes.extend(«constant for constant in code.co_consts if isinstance(constant, CodeType)»)", "()", (OWN,)),
    ),
    *of(
        "base.py",
        ("taken |= «part.sole_operands»", "set()", (DAPE,)),
        ("return dense if batch > «1» else dense[0]", "0", ("tests/api/test_plan_checks.py -k bias",)),
    ),
    *of(
        "rope_axes.py",
        ("q_last, k_last = (ids.«amax»(0)", "amin", (ROPE,)),
    ),
    *of(
        "kerple.py",
        ("torch.log1p(«a * distance»)", "distance", (ADDITIVE,)),
        ("distance = context.distances()«.abs()»", "", (ADDITIVE,)),
        ('«2.0» if self.form == "power"', "3.0", (ADDITIVE,)),
        ("x.detach().clamp(SMALLEST, largest) «+ (x - x.detach())»", "", (ADDITIVE,)),
        ("self.p.uniform_(0.0, «2.0»)", "1.0", (ADDITIVE,)),
        ("context.distance_range[0]", "context.distance_range[0] + 1", (ADDITIVE, EVERY)),
    ),
    *of(
        "relative.py",
        ("distance.abs().clamp(max=«self.max_distance»)", "self.max_distance - 1", (ADDITIVE,)),
        (
            "distance.clamp(-self.max_distance, self.max_distance) «+ self.max_distance»",
            "+ self.max_distance - 1",
            (ADDITIVE,),
        ),
        ("Table(values, «context.distance_range[0]»)", "context.distance_range[0] - 1", (ADDITIVE,)),
    ),
    *of(
        "relative_2d.py",
        ("self._steps[0] * (2 * length «- 1»))", "", (ADDITIVE, PLACED)),
        ("for length, step in zip(reversed(self.window), «reversed(self._steps)»):", "self._steps", (ADDITIVE, PLACED)),
        ("q = torch.where(q_positions == 0, «3 * self._last + 2», q)", "self._last + 1", (PLACED,)),
        ("max(q_last, k_last) «>=» self.tokens", ">", (ADDITIVE, PLACED)),
        ("if «min(q_first, k_first) < 0» or", "False", (ADDITIVE,)),
    ),
    *of(
        "sandwich.py",
        ('start = «1 if self.form == "centered" else 0»', "0", (ADDITIVE,)),
        ("total = total «- pairs»", "", (ADDITIVE,)),
        ("head = torch.arange(«1, context.num_heads + 1»", "0.5, context.num_heads + 0.5", (ADDITIVE,)),
        ("pair = torch.arange(start, start + pairs, dtype=torch.«float64»", "float32", (ADDITIVE,)),
    ),
    *of(
        "t5.py",
        ("(distance «<» 0).long() * side", "<=", (ADDITIVE,)),
        ("distance.clamp(«min=0»), torch", "min=1", (ADDITIVE,)),
        (".clamp(max=«side - 1»)", "side", (ADDITIVE,)),
        ("torch.where(reach «<» exact, reach, far)", "<=", (ADDITIVE,)),
        ("if max_distance «<=» self._exact:", "<", (ADDITIVE,)),
        ("return self._side // «2»", "4", (ADDITIVE,)),
        ("weight[self.buckets(«context.distances()»)].t()", "-context.distances()", (ADDITIVE,)),
    ),
    *of(
        "fire.py",
        ("torch.maximum(«position», threshold)", "position.abs()", (FIRE, EVERY)),
        ("threshold = (self.length_multiplier.to(dtype) * self.initial_length)«.abs()»", "", (FIRE,)),
        ("psi = psi * «distance.sign()»", "-distance.sign()", (FIRE,)),
        ("threshold)) «+ self.eps»)", "", (FIRE,)),
        ("on_at_start = ((a < 0) | («(a == 0) & (b > 0)»)).double()", "a != a", (FIRE,)),
        ("torch.where(«a < 0», below, knots).sort()", "a > 0", (FIRE,)),
        ("prefix(weight @ (b * start) «+ bias», weight", "", (FIRE,)),
        ("rest = on_at_start + leak * (1.0 - on_at_start), (1.0 - leak) * «side»", "1.0", (FIRE,)),
        ("on_at_start + leak * («1.0 - on_at_start»), (1.0", "1.0", (FIRE,)),
        ("return torch.log1p((c * y)«.abs()»)", "", (FIRE,)),
        ("psi, context.distance_range[0], row_scale, «row_first», knots", "row_first + 1", (FIRE, EVERY)),
        ("psi, «context.distance_range[0]», row_scale", "context.distance_range[0] + 1", (FIRE, EVERY)),
    ),
    *of(
        "dape.py",
        ('both = inner is not None and inner.has_bias «and form != "add"»', "", (DAPE,)),
        ("self.form, «inner.bias», self.edge", "Bias()", (DAPE,)),
        ("return replace(«inner», mix=mix, bias=Bias())", "Plan()", (DAPE,)),
        ("w2.to(dtype), «b2.to(dtype)»,", "b1.to(dtype)[: self.num_heads]", (DAPE,)),
    ),
    *of(
        "bipe.py",
        ("ALIBI_STRENGTH = «96.0»", "9.6", (EMBEDDINGS,)),
        (
            "segment_positions(tokens, separators, «self.intra.max_positions»)",
            "self.intra.max_positions + 1",
            (EMBEDDINGS,),
        ),
    ),
    *of(
        "embeddings.py",
        ("torch.stack([«angles.sin(), angles.cos()»], dim=-1)", "angles.cos(), angles.sin()", (EMBEDDINGS,)),
        ("or largest «>=» self.max_positions", ">", (EMBEDDINGS,)),
        ("if «smallest < 0» or largest", "False", (EMBEDDINGS,)),
        ("if not 0 <= positions «<=» self.max_positions:", "<", (EMBEDDINGS,)),
    ),
    *of(
        "rope.py",
        ("(angles.cos() «* factor»).to(dtype)", "", (ROPE,)),
        ("(angles.sin() «* factor»).to(dtype)", "", (ROPE,)),
        ("if q_positions is k_positions «and q_theta is k_theta»:", "", (ROPE,)),
        ("if «q_positions is k_positions and» q_theta is k_theta:", "", (ROPE, EVERY)),
        ('k_cos, k_sin, self.layout == «"interleaved"»)', '"half"', (ROPE,)),
        ("if self.rotary_dim > head_dim «or self.rotary_dim % 2»:", "", (ROPE,)),
        (
            "q_theta, q_factor = self.scaling.frequencies(self.rotary_dim, self.base, «q_lengths», context.device)",
            "k_lengths",
            (ROPE, "tests/encodings/test_rope.py -k documents"),
        ),
        ("positions = torch.arange(«x.shape[2]», device=x.device)[None]", "1, x.shape[2] + 1", (ROPE,)),
        ("return reference.rotate(x, «cos», sin, turn.interleaved)", "cos.abs()", (ROPE,)),
    ),
    *of(
        "rope_axes.py",
        ("theta = rotary_frequencies(self.rotary_dim «// 2», self.base", "", (ROPE,)),
        ("column = positions.remainder(«self.width»)", "self.width + 1", (ROPE,)),
        (
            "torch.cat([«row[..., None] * theta, column[..., None] * theta»], dim=-1)",
            "column[..., None] * theta, row[..., None] * theta",
            (ROPE,),
        ),
        ("ids.shape[1] not in «(1, context.batch)»:", "(1, 2, 3, context.batch)", (ROPE,)),
        ("owners = tuple(c % axes if c «<» self.sections", "<=", (ROPE,)),
        (
            "placed._k_ids = «placed._q_ids if k_ids is None else» self._check_ids",
            "placed._q_ids if k_ids is not None else",
            (ROPE,),
        ),
        ("return self._q_ids, «self._k_ids»", "self._q_ids", (ROPE,)),
    ),
    *of(
        "scaling.py",
        (".clamp(min=«self.original_length»).double()", "1", (ROPE,)),
        ("(self.factor * times - («self.factor - 1.0»)).log()", "self.factor", (ROPE,)),
        ("self.original_length, 1.0) - («self.factor - 1.0»)", "self.factor", (ROPE,)),
        ("length / self.original_length, «1.0»)", "0.0", (ROPE,)),
        ("power = rotary_dim / («rotary_dim - 2»)", "rotary_dim - 1", (ROPE,)),
        ("low, high = max(low, 0), min(high, «rotary_dim - 1»)", "rotary_dim // 2 - 1", (ROPE,)),
        ("low, high = max(low, 0), min(high, «rotary_dim - 1»)", "rotary_dim", (ROPE,)),
        ("low, high = «max(low, 0)», min", "low", (ROPE,)),
        ("theta * («ramp / self.factor + (1.0 - ramp)»)", "ramp + (1.0 - ramp) / self.factor", (ROPE,)),
        ("«math.floor(low), math.ceil(high)»", "math.ceil(low), math.floor(high)", (ROPE,)),
        ("1.0 if self.factor «<=» 1.0 else 0.1", ">", (ROPE,)),
        ("return self._mscale(self.mscale) / «self._mscale(self.mscale_all_dim)»", "1.0", (ROPE,)),
        ("turns = self.original_length * theta / («2.0» * math.pi)", "1.0", (ROPE,)),
        ("keep + («1.0 - keep») / self.factor", "1.0", (ROPE,)),
        ("is_long = (length.to(device) «>» self.original_length)", ">=", (ROPE,)),
        ("is_longer = length «>» self.original_length", ">=", (ROPE,)),
        ("math.sqrt(«1.0» + max(math.log", "2.0", (ROPE,)),
        ("max(math.log(self.factor), 0.0) / math.log(«self.original_length»)", "self.factor", (ROPE,)),
        ("theta / torch.where(is_long, «long, short»), factors", "short, long", (ROPE,)),
    ),
    *of(
        "context.py",
        ("return «1 - self.q_len», self.k_len - 1, 0", "-self.q_len", (ADDITIVE, EVERY)),
        ("return «1 - self.q_len», pairs", "2 - self.q_len", (ADDITIVE, EVERY)),
        ("return least - «max(self.k_len - 1, 0)»", "0", (PLACES,)),
        ("«greatest - least + »pairs", "", (PLACES,)),
        ("else offsets[0] «- self.k_len» return", "", (PLACES,)),
        ("(after if «self.causal» else torch.maximum(after, k_end))", "False", (ROPE,)),
        ("max(self.q_len + self.k_len «- 1», 1)", "- 2", (ADDITIVE, EVERY)),
        ("return «q_first - k_last», _check_range", "q_first - k_last + 1", (EVERY,)),
        ("(q_last - q_first) + (k_last - k_first) «+ 1», self.num_heads", "", (EVERY,)),
        ("q_last - q_first «+ 1», 1)", "", (EVERY, FIRE)),
        ("self.offset is None «and q_tokens == k_tokens»", "", (EVERY,)),
        ('document, positions[0] «+ 1», "amax")', "", (ROPE,)),
        ("longest = torch.maximum(«q_last», k_last) + 1", "k_last", (ROPE,)),
        ("longest = torch.maximum(q_last, k_last) «+ 1»", "", (ROPE,)),
        ("torch.where(slot «<» self.k_lengths", "<=", (ROPE,)),
        ("last = torch.full((1,), «self.k_len», dtype", "self.q_len", (ROPE,)),
        ("return longest[q_document][None], «longest[k_document][None]»", "longest[q_document][None]", (ROPE,)),
        ("«self.cu_seqlens_k».long().diff()) if", "self.cu_seqlens_q", (ROPE,)),
        ("return torch.«float64» if wide else", "float32", (EVERY,)),
        ("if count * heads «>» MAX_TABLE_ENTRIES:", ">=", (EVERY, MODULES)),
    ),
    *of(
        "base.py",
        ("Table(a.table.values «+ b.table.values», a.table.first)", "", (MODULES, EVERY)),
        ("Slope(a.slope.slope «+ b.slope.slope», a.slope.signed)", "", (DAPE,)),
        ("if a.slope.signed «==» b.slope.signed:", "!=", (DAPE,)),
        ("values = «-slope.slope»[:, None] * (distance if", "slope.slope", (DAPE,)),
        (
            "extra if table is None else Table(«table.values + extra.values», table.first)",
            "extra.values",
            (MODULES, EVERY, ADDITIVE),
        ),
        ("Dense(a.dense.bias «+ b.dense.bias»)", "", (MODULES, EVERY)),
        ("return head_slice(plan, «self.first», context.num_heads)", "0", (SHARD,)),
        ("if not 0 <= first «<=» heads - count:", "<", (SHARD,)),
        ("rotary=«a.rotary or b.rotary»,", "a.rotary", (DAPE,)),
        ("bias=_add_biases(«a.bias, b.bias», context)", "a.bias, a.bias", (MODULES, EVERY)),
    ),
    *of(
        "_plans.py",
        ("return operand if operand.shape[dim] == 1 else operand.narrow(dim, «first», count)", "0", (SHARD,)),
        ("slope=of(slope.slope, «-1»))", "0", (SHARD,)),
        ("Dense(of(dense.bias, «1»))", "0", (SHARD,)),
        ("math.isnan(parameter.sum().item()) «and parameter.isnan().any()»", "", (VALUES,)),
        ('"knots": «math.inf»}', "-math.inf", (VALUES, FIRE)),
        ('{"values": «-math.inf», "bias"', "math.inf", (VALUES,)),
    ),
]
