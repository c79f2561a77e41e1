"""Faults in the Python code that is not an encoding: the reference, checks, serialisation, the rule, demo and bench."""

from __future__ import annotations

from ..fault import Fault

REFERENCE = "tests/api/test_reference.py"
SDPA = "tests/api/test_attention.py -k sdpa"
ATTENTION = "tests/api/test_attention.py -k 'not memory'"
BAD = "tests/api/test_bad_input.py"
NUMBERS = "tests/api/test_numbers.py"
OPS = "tests/api/test_ops.py -k 'not compile and not opcheck and not export'"
FLATTENED = "tests/api/test_ops.py -k 'flattening'"
OPCHECK = "tests/api/test_ops.py -k opcheck"
PLANS = "tests/api/test_plan_checks.py"
JAGGED = "tests/api/test_unusual_tensors.py -k nested"
RULE = "tests/api/test_rule.py"
DEMO = "tests/api/test_demo.py -m 'not slow'"
BENCH = "tests/api/test_bench.py -k 'not quick_run and not plots and not extra_peak'"
CLI = "tests/api/test_cli.py -k 'maps or check'"
CHECK = "tests/api/test_check.py"
EVERY = "tests/encodings/test_every_encoding.py"
MASKS = "tests/backends/test_parity_masks.py"
PLACES = "tests/backends/test_parity_places.py"
SHAPES = "tests/backends/test_parity_shapes.py -k 'views or strides or without_logits'"


def of(file: str, *rows: tuple[str, str, tuple[str, ...]]) -> list[Fault]:
    return [Fault(file, before, after, tests) for before, after, tests in rows]


FAULTS: list[Fault] = [
    Fault(
        "posattn/sdpa_shapes.py",
        "return attn_mask.reshape(«1», *rest)",
        "-1",
        (SDPA,),
        "every leading dimension is 1 there, so -1 stands for 1 too",
    ),
    *of(
        "posattn/reference.py",
        ("logits.masked_fill(«~allowed», NEG_INF)", "~allowed[:, :1]", (REFERENCE,)),
        ("weights = weights[..., «:-1»]", "1:", (REFERENCE,)),
        ("_dropout_keep(call) «/ (1.0 - call.dropout_p)»", "", (REFERENCE,)),
        ("«first * cos - second * sin», first", "first * cos + second * sin", (REFERENCE,)),
        ("turning[..., 0::2], turning[..., «1::2»]", "0::2", (REFERENCE,)),
        (
            "distance = «q_positions[:, :, None] - k_positions[:, None, :]»",
            "k_positions[:, None, :] - q_positions[:, :, None]",
            (REFERENCE,),
        ),
        ("return «q_index + offset», k_index", "q_index", (REFERENCE,)),
        ("if call.softcap: logits = call.softcap * torch.tanh(«logits / call.softcap»)", "logits", (REFERENCE,)),
        ('if inner is None «or mix.form == "add"» else', "", (REFERENCE,)),
        ('(logits if mix.form == «"concat"» else biased)', '"add"', (REFERENCE,)),
        ("F.linear(features.movedim(1, -1), w1, b1), «0.01»)", "0.1", (REFERENCE,)),
        ("(distance if «operand.signed» else distance.abs())", "True", (REFERENCE,)),
        (
            "index = (distance - operand.first)«.clamp(0, operand.values.shape[1] - 1)»",
            ".clamp(max=operand.values.shape[1] - 1)",
            (REFERENCE,),
        ),
        (
            "operand.psi[(distance - operand.first)«.clamp(0, operand.psi.shape[0] - 1)»]",
            ".clamp(max=operand.psi.shape[0] - 1)",
            (REFERENCE,),
        ),
        ("operand.row_scale[(q_positions «- operand.row_first»).clamp", "", (REFERENCE,)),
        ("torch.searchsorted(operand.knots, «y.detach()»)", "psi.detach().expand_as(y)", (REFERENCE,)),
        ("i, j = («q_index + offset»)[:, :, None]", "q_index", (REFERENCE,)),
        ("conditions.append(«j <= i»)", "j < i", (REFERENCE,)),
        ("conditions.append(«j >= i - mask.left»)", "j > i - mask.left", (REFERENCE,)),
        ("conditions.append(«j <= i + mask.right»)", "j < i + mask.right", (REFERENCE,)),
        ("conditions.append(«~hidden[:, None, :]»)", "hidden[:, None, :] >= 0", (REFERENCE,)),
        ("conditions.append((q_document[:, None] «==» k_document[None, :])[None])", ">=", (REFERENCE,)),
        ("mask.k_lengths is None else index «>=» mask", ">", (REFERENCE,)),
        ("mask.k_starts is None else index «<» mask", "<=", (REFERENCE,)),
        ("«x.repeat_interleave(heads // x.shape[1], dim=1)»", "x.repeat(1, heads // x.shape[1], 1, 1)", (REFERENCE,)),
        ("(group, row, «head», torch.zeros_like(group))", "head % heads", (REFERENCE,)),
        ("(seed & 0xFFFFFFFF, «seed >> 32 & 0xFFFFFFFF»)", "seed & 0xFFFFFFFF", (REFERENCE,)),
        ("keep = lanes «>=» math.ceil", "<", (REFERENCE,)),
    ),
    *of(
        "posattn/positions.py",
        ("torch.searchsorted(cu_seqlens.long(), token, «right=True»)", "right=False", (REFERENCE, EVERY)),
        ("offset = «cu_k.diff() - cu_q.diff()»", "cu_k.diff() - cu_k.diff()", (REFERENCE, EVERY)),
        ("k_index - «cu_k[k_document]», of_query", "cu_q[k_document]", (REFERENCE, EVERY)),
        ("if of.k_lengths is None else «of.k_lengths - q_tokens»", "of.k_lengths - k_tokens", (REFERENCE, EVERY)),
        ("offset = «k_tokens - q_tokens» if of.k_lengths is None", "0", (REFERENCE, EVERY)),
        ("k_index - starts, «offsets - starts»", "offsets", (REFERENCE, PLACES)),
    ),
    *of(
        "posattn/serialize.py",
        (
            "«_NO_LIMIT if mask.left is None else mask.left», _NO_LIMIT",
            "_NO_LIMIT if not mask.left else mask.left",
            (MASKS,),
        ),
        ("right=None if right == _NO_LIMIT else «right»,", "left", (FLATTENED, MASKS)),
        ("ints.extend((«profile.first, profile.row_first»))", "profile.row_first, profile.first", (FLATTENED,)),
        ('put("k_cos", «plan.rotary.k_cos»)', "plan.rotary.q_cos", (FLATTENED,)),
        ('Slope(slope, «prefix + "signed" in flags»)', '"signed" in flags', (FLATTENED,)),
        ('named["w2"], «named["b2"]»', 'named["b1"]', (FLATTENED,)),
        ("«offset_range if isinstance(offset, Tensor) else None»,", "None", (FLATTENED, PLACES)),
        ('deterministic=«"deterministic" in flags»,', "False", (FLATTENED,)),
        ("ints += [«mask.max_q, mask.max_k»]", "mask.max_k, mask.max_q", (FLATTENED,)),
        ("scale=«scale if scale_tensor is None else float(scale_tensor)»,", "scale", (FLATTENED,)),
        ('("q", "k", "v", «"scale", »"w1"', "", (NUMBERS,)),
        ('k_positions=«named.get("k_positions")»,', 'named.get("q_positions")', (FLATTENED,)),
    ),
    *of(
        "posattn/sdpa_shapes.py",
        (
            "rank = max(query.dim(), «key.dim(), »value.dim())\n    q, k, v = (",
            "",
            (SDPA, "tests/api/test_opinfo.py -k values"),
        ),
        ("attn_mask is not None and attn_mask.dim() > 3 and «len(lead) != 1»", "len(lead) > 2", (SDPA,)),
        ("q, k, v = (tensor.expand(*tensor.shape[:-3], «heads», -1, -1)", "-1", (SDPA,)),
        ("tensor.repeat_interleave(«heads // tensor.shape[-3]», -3)", "1", (SDPA,)),
        ("if own == 0 or «heads % own»:", "False", (BAD,)),
        ("«return _merge(attn_mask, lead)»", "return attn_mask.reshape(-1, *rest)", (SDPA,)),
        ("have not in («1, want») for", "1, have", (BAD,)),
        ("shape = (*lead, heads, q.shape[-2], «v.shape[-1]»)", "q.shape[-1]", (SDPA,)),
        ("return q, k, v, attn_mask, «shape[-rank:] if rank < len(shape) else shape»", "shape", (SDPA,)),
    ),
    *of(
        "posattn/validation.py",
        ("if not -_POSITION_LIMIT «<» low <= high", "<=", (BAD,)),
        ("low <= high «<» _POSITION_LIMIT:  # nor", "<=", (BAD,)),
        ("if not -_POSITION_LIMIT «<» first <= last < _POSITION_LIMIT:", "<=", (BAD,)),
        ("first <= last «<» _POSITION_LIMIT:", "<=", (BAD,)),
        (
            "(low < position_range[0] or «high > position_range[1]»)",
            "high > position_range[1] + 1",
            (BAD, "tests/api/test_compiled_graphs.py -k range"),
        ),
        ("if low < 0 or high «>» k.shape[2]:", ">=", (MASKS,)),
        ("if «low < 0» or high > k.shape[2]:", "False", (BAD,)),
        ("if bounds[0] != 0 «or bounds[-1] != tokens» or", "", (BAD,)),
        ("«bounds[0] != 0 or» bounds[-1]", "", (BAD,)),
        ("bounds[-1] != tokens «or min(lengths) < 0»:", "", (BAD,)),
        (
            "return «max(lengths)»",
            "lengths[0]",
            (FLATTENED, "tests/backends/test_parity_documents.py", "tests/api/test_plan_checks.py", BAD),
        ),
        ("if not 0.0 <= number «<=» 1.0:", "<", (NUMBERS,)),
        ("if «side < 0»:", "side <= 0", (MASKS,)),
        ("return «min(side, 2**31)» if type", "side", ("tests/api/test_edges.py -k wider",)),
        (
            "(window, window) if isinstance(window, int) else window",
            "(window, 0) if isinstance(window, int) else window",
            (MASKS, ATTENTION),
        ),
        ("heads != kv_heads and (kv_heads == 0 «or heads % kv_heads»)", "", (BAD,)),
        ("if v.shape[-2] «!=» k.shape[-2]:", "<", (BAD,)),
        ("if k.shape[-1] «!=» q.shape[-1]:", "<", (BAD,)),
        ("«have == 1 or have == want» for", "have <= want", (BAD,)),
        ("fits = «tensor.dim() <= 4 and» all(", "", (BAD,)),
        ("if sinks.dim() != 1 «or sinks.shape[0] != q.shape[1]»:", "", (BAD,)),
        ("positions.dim() in (1, 2) «and positions.shape[-1] == tokens»", "", (BAD,)),
        ("positions.shape[0] not in «(1, batch)»)", "(1, 2, 3, 4, batch)", (BAD,)),
        ("if «number < 0 or» 0 < number < smallest:", "", (BAD,)),
        ("return «1.0 / math.sqrt(max(int(head_dim), 1))», None", "1.0 / math.sqrt(head_dim)", (NUMBERS,)),
        (
            "tensor = tensor.clamp(«-(2**31)», 2**31 - 1)",
            "0",
            ("tests/api/test_edges.py -k traced", "tests/api/test_compiled_graphs.py -k wraps"),
        ),
    ),
    *of(
        "posattn/attention.py",
        ("right=«None if causal else right»,", "right", (MASKS,)),
        (
            "dense = Dense(«bias if inner is None else inner.bias + bias»)",
            "bias",
            ("tests/encodings/test_additive.py -k dense",),
        ),
        ("mask = replace(documents.mask, causal=is_causal, offset=«0 if is_causal else None»)", "None", (JAGGED,)),
        (
            "attn_mask.variant == CausalVariant.«UPPER_LEFT»",
            "LOWER_RIGHT",
            ("tests/api/test_unusual_tensors.py -k causal_bias",),
        ),
        ("«if dropout_p == 1.0: out = dropout(out, 1.0)»", "", (NUMBERS, SDPA, ATTENTION)),
        (
            "(attn_mask, None) if attn_mask.dtype == torch.bool else (None, attn_mask)",
            "(attn_mask != 0, None)",
            (SDPA,),
        ),
        ("torch.randint(«2**62», (1,)", "1", (ATTENTION,)),
        ("tensor.dtype == torch.«float64»: return", "float16", (ATTENTION, OPS)),
    ),
    *of(
        "posattn/ops.py",
        ("tensor.select(«dim», i) for", "0", (OPS,)),
        ('grads["sinks"] = grad_lse.sum(«(0, 2)»)', "0", (SHAPES, ATTENTION)),
        ('(grads["q"].double() * call.q.double()).sum() «/ call.scale»', "", (NUMBERS,)),
        ("lse.copy_(call.sinks«[:, None]»)", "[0]", (ATTENTION,)),
        ("grad_lse if «with_lse» else None", "False", (OPS,)),
        ("return one * («q[3] + v[3]») + mlp", "2 * q[3]", (NUMBERS,)),
        ("return one * (3 * q[3] + 2 * v[3]) + «3» * mlp", "2", (NUMBERS,)),
    ),
    *of(
        "posattn/backends/cpu.py",
        ("if step != 1 «and tensor.shape[-1] > 1»:", "and tensor.shape[-1] > 16", (SHAPES,)),
        ("(mask.k_lengths, mask.k_starts, «mask.cu_seqlens_q, »mask.offset, mask.q_segments)", "", (MASKS,)),
        ("(«mask.k_lengths, »mask.k_starts, mask.cu_seqlens_q, mask.offset, mask.q_segments)", "", (MASKS,)),
        ("(mask.k_lengths, «mask.k_starts, »mask.cu_seqlens_q, mask.offset, mask.q_segments)", "", (PLACES,)),
        ("mask.k_starts, mask.cu_seqlens_q«, mask.offset», mask.q_segments)", "", (PLACES,)),
        ("«and operand.slope.dim() == 1»: grads", "", ("tests/backends/test_parity_extremes.py -k slopes",)),
        (
            '"concat-residual": 0, "concat": «1», "add": 2',
            "0",
            ("tests/backends/test_parity_encodings.py -k test_causal",),
        ),
    ),
    *of(
        "posattn/plan_checks.py",
        ("if half < 1 or «2 * half > self.dim»:", "half > self.dim", (PLANS,)),
        ("(«tensor.shape[0] != 1 and tensor.shape[0] != self.batch»)", "False", (PLANS,)),
        ('inputs = 2 * self.heads if inner «and mix.form != "add"» else', "", ("tests/encodings/test_dape.py",)),
        ("lines = knots.shape[0] «+ 1»", "", ("tests/encodings/test_fire.py",)),
        ("tensor.expand(«self.heads», -1)", "2", (PLANS,)),
        ("if tensor.device «!=» self.device:\n            raise ArgumentValueError(\n", "is", (PLANS,)),
        ("«size >= 1» if isinstance(want, str)", "True", (PLANS,)),
        ('self.shaped("mix.w2", mix.w2, «self.heads, width», *kernel)', '"heads", width', (PLANS,)),
    ),
    *of(
        "posattn/jagged.py",
        ("cu_seqlens_k=«offsets[1]».to(torch.int32)", "offsets[0]", (JAGGED,)),
        ("max_k=«longest[1]»,", "longest[0]", (JAGGED,)),
        ("torch.equal(«offsets[1], offsets[2]»)", "offsets[1], offsets[1]", (JAGGED,)),
    ),
    *of(
        "posattn/parity.py",
        ("allowed = «2.0» * naive_error", "4.0", (RULE,)),
        ("SUMMATION_ULPS = «4.0»", "40.0", (RULE,)),
        ("+ rounding(got.dtype) * «scale» + rounding", "1.0", (RULE,)),
        ("rounding(dtype) * «sensitivity.max().item()»", "0.0", (RULE,)),
        ("rounding(dtype) * «sensitivity.max().item()»", "1000.0", (RULE,)),
        ("return self.error «<=» self.allowed", "<= 2.0 *", (RULE,)),
        (
            "return «max(torch.finfo(dtype).eps, SUMMATION_ULPS * torch.finfo(torch.float32).eps)»",
            "torch.finfo(torch.bfloat16).eps",
            (RULE,),
        ),
        ("nan_to_num(«nan=torch.inf», posinf=torch.inf)", "nan=0.0", (RULE,)),
        ("_errors(naive, exact).nan_to_num(posinf=«0.0»)", "torch.inf", (RULE,)),
        ("if got.shape != exact.shape: return Comparison(name, «torch.inf», 0.0, 0.0", "0.0", (RULE,)),
        (
            "relative = torch.finfo(torch.float32).eps «/ rounding(dtype)»",
            "/ rounding(dtype) * 1000.0",
            (RULE, "tests/backends/test_parity_masks.py -k can_fail"),
        ),
        ("reach + («1.0» + size) * grad_lse.abs()", "1000.0", (RULE,)),
        ('for name in «("bias", "sinks")»:', '("bias",)', (RULE,)),
        ('return {«"out": self.out.detach(), »"lse"', "", (RULE,)),
    ),
    *of(
        "posattn/check_command.py",
        ("failed += «not row[0]»", "0", (CLI,)),
        ("ok = «all(c.ok for c in found)»", "True", (CLI,)),
        ("failed += «not report.ok»", "0", (CHECK,)),
    ),
    *of(
        "posattn/checking.py",
        ("if not gradient.isfinite().all(): «raise _Wrong»(", "_Wrong", (CHECK,)),
        ("if abs(slope - derivative) > «DIFFERENCE» *", "10.0", (CHECK,)),
        ("rtol=1e-9, atol=«1e-9»", "10.0", (CHECK,)),
        ("if not torch.equal(first, second): «raise _Wrong»(", "_Wrong", (CHECK,)),
        ('«self.lowered(copy.deepcopy(self.position).to("meta"), 3, self.tokens, "meta")»', "pass", (CHECK,)),
    ),
    *of(
        "posattn/plot.py",
        ("k_cos[:, None] «+» q_sin", "-", (CLI,)),
        ("before = replace(call, plan=Plan(rotary=«plan.rotary», bias=Bias()))", "None", (CLI,)),
    ),
    *of(
        "posattn/demo/model.py",
        ("self.encoding, causal=«True», backend", "False", (DEMO,)),
        ("«self.encoding», causal=True", "None", (DEMO,)),
        ("«x = x + self.attention(self.norm_attention(x))»", "x = self.attention(self.norm_attention(x))", (DEMO,)),
        ("torch.manual_seed(«seed»)", "torch.seed()", (DEMO,)),
    ),
    *of(
        "posattn/demo/train.py",
        ("warm = min(1.0, (step + 1) / «WARMUP_STEPS»)", "steps", (DEMO,)),
        ("return warm * (0.55 «+» 0.45", "-", (DEMO,)),
        ("math.cos(«math.pi * step / max(steps, 1)»)", "2.0 * math.pi * step / max(steps, 1)", (DEMO,)),
        ("«schedule.step()»", "", (DEMO,)),
        ("«optimizer.step()»", "", (DEMO,)),
        ("window[:, «1:»].flatten()", ":-1", (DEMO,)),
        ("model(window[:, :-1])[0, «-scored:»]", ":scored", (DEMO,)),
        ("math.exp(total / («SCORED» * len(ends)))", "scored", (DEMO,)),
        ("range(«end - SCORED + scored», end + 1, scored)", "end", (DEMO,)),
        ("window = text[«stop - length» : stop + 1]", "stop - scored", (DEMO,)),
    ),
    *of(
        "posattn/demo/measure.py",
        ("statistics.«median»(seconds)", "fmean", (DEMO,)),
        ("return «statistics.median»(seconds)", "min", (DEMO,)),
        ("extra_peak(lambda: «both»(*long))", "forward", (DEMO,)),
        ("_median_seconds(«both», long), memory)", "forward", (DEMO,)),
        ("attend(q, k, v).sum()«.backward()»", "", (DEMO,)),
        ("encoding, causal=«True», backend=request.backend", "False", (DEMO,)),
        ("causal=True, backend=«request.backend»)", '"auto"', (DEMO,)),
        ("long = inputs(«request.length»)", "128", (DEMO,)),
    ),
    *of(
        "posattn/demo/__init__.py",
        ("{1e3 * cost.«both»:10.0f} ms", "forward", (DEMO,)),
    ),
    *of(
        "bench/work.py",
        ('{"forward": 2, "backward": «5», "both": 7}', "4", (BENCH,)),
        ('"both": «7»}[case.mode] #', "6", (BENCH,)),
        ('"backward": «3», "both": 4}', "2", (BENCH,)),
        ('«"bf16dot" if dtype == torch.bfloat16 else "fma"»', '"fma"', (BENCH,)),
        ('«dtype.itemsize», "read"', "4", (BENCH,)),
        ("first = case.k_len - case.q_len «+ 1»", "", (BENCH,)),
        ("return «2.0» * sum(p.numel()", "1.0", (BENCH,)),
        ("if p.dim() == 2) «/ case.heads»", "", (BENCH,)),
        ("native.probe_peak(«kind», threads)", '"fma"', (BENCH,)),
    ),
    *of(
        "bench/timing.py",
        ("statistics.«median»(ordered)", "fmean", (BENCH,)),
        ("Timing(«statistics.median(ordered)», at", "ordered[0]", (BENCH,)),
        ("for share in («0.2, 0.8»)", "0.8, 0.2", (BENCH,)),
        ("return (time.perf_counter() - start) «/ repeats»", "", (BENCH,)),
    ),
    *of(
        "bench/peers.py",
        ('inputs.position, causal=inputs.causal, backend=«"reference"»', '"auto"', (BENCH,)),
        ('"sdpa": «_sdpa»,', "_posattn", (BENCH,)),
        ('"sdpa-mask-grad": «_sdpa_mask_grad»,', "_sdpa", (BENCH,)),
        ('"eager": «_eager»,', "_posattn", (BENCH,)),
        (
            "future = torch.ones(q_len, k_len, dtype=torch.bool, device=mask.device).triu(«1 + k_len - q_len»)",
            "1",
            (BENCH,),
        ),
        (
            "inputs.q, inputs.k, inputs.v, inputs.position, causal=inputs.causal, backend=«variant.backend»",
            '"reference"',
            (BENCH,),
        ),
        ("if inputs.causal and «1 < q_len != k_len»:", "False", (BENCH,)),
    ),
    *of(
        "bench/runner.py",
        ('«note(f"{case.name}: {variant.name} left out: {error}")»', "pass", (BENCH,)),
        ("best = {key: «max»(value", "min", (BENCH,)),
        ("rate = amount.amount / «timing.median»", "timing.p20", (BENCH,)),
        ("median=«timing.median»,", "timing.p20", (BENCH,)),
        ("«wrong = wrong or parity.outputs_differ(variant, case, device, out)»", "wrong = wrong", (BENCH,)),
        ('if wrong and variant.peer == "posattn": raise «ParityError»', "Unavailable", (BENCH,)),
        ("amount = work(«case.shaped(variant)», variant.encoding)", "case", (BENCH,)),
    ),
    *of(
        "bench/parity.py",
        ("inputs.q[:, :, «-rows:»]", ":rows", (BENCH,)),
        ('{"causal": «case.causal»}', "False", (BENCH,)),
    ),
    *of(
        "bench/report.py",
        ("return «other.median / row.median»", "row.median / other.median", (BENCH,)),
        ("return abs(row.memory / other.memory «/ ratio» - 1.0)", "", (BENCH,)),
        ("row.median / other.median / ratio**«2» - 1.0", "1", (BENCH,)),
        ("return float(row.digest «==» other.digest)", "!=", (BENCH,)),
        ("value >= target.bound «if target.at_least else value <= target.bound»", "", (BENCH,)),
    ),
]
