"""Encodings as modules: made on the meta device, cast to narrow types, saved and loaded, hooked."""

from __future__ import annotations

import pytest
import torch

import posattn
import posattn.encodings as encodings
from posattn.encodings import DAPE, FIRE, ALiBi, BiPE, Context, RoPE, T5Bias

HEADS, DIM, TOKENS = 4, 12, 10
KINDS = [getattr(encodings, kind) for kind in encodings.__all__]
EVERY = {name: form for kind in KINDS for name, form in kind.examples(HEADS, DIM, TOKENS).items()}
every = pytest.mark.parametrize("name", EVERY)
WIDTH = 4096  # enough numbers that the means of two draws agree


def remade(name):
    """The example of this name, made anew."""
    return next(found[name] for kind in KINDS if name in (found := kind.examples(HEADS, DIM, TOKENS)))


def values(encoding):
    """Parameters and buffers, with those that are in no state_dict."""
    return dict(encoding.named_parameters()) | dict(encoding.named_buffers())


def from_meta(make):
    """Made on meta, given memory that holds nonsense, and reset module by module."""
    with torch.device("meta"):
        encoding = make()
    assert all(value.is_meta for value in values(encoding).values())
    encoding.to_empty(device="cpu")
    with torch.no_grad():
        for value in values(encoding).values():
            value.fill_(777.0)
    for module in encoding.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return encoding


@every
def test_every_module_with_values_of_its_own_can_reset_them(name):
    for module in EVERY[name].modules():
        if list(module.parameters(recurse=False)) + list(module.buffers(recurse=False)):
            assert hasattr(module, "reset_parameters"), type(module).__name__


@every
def test_reset_after_meta_gives_what_construction_gives(name):
    torch.manual_seed(1)
    found = values(from_meta(lambda: remade(name)))
    made = values(remade(name))
    assert list(found) == list(made)
    for key, value in found.items():
        torch.manual_seed(1)
        again = values(remade(name))[key]
        assert value.dtype == again.dtype
        assert value.shape == again.shape
        if torch.equal(made[key], again):  # not a random one
            assert torch.equal(value, again), key
        else:
            assert value.abs().max() <= 4 * max(made[key].abs().max(), again.abs().max()), key


@pytest.mark.parametrize(
    "make",
    [
        lambda: posattn.Kerple(WIDTH),
        lambda: T5Bias(WIDTH),
        lambda: posattn.RelativeTable(WIDTH, 1),
        lambda: posattn.RelativeTable2D(WIDTH, (2, 2)),
        lambda: FIRE(2, WIDTH),
        lambda: DAPE(None, 2, WIDTH),
        lambda: BiPE(RoPE(8), WIDTH, 2),
    ],
)
def test_reset_after_meta_draws_from_the_distribution_of_construction(make):
    found, made = values(from_meta(make)), values(make())
    for key, value in made.items():
        if value.numel() >= WIDTH:
            for statistic in (torch.mean, torch.std):
                got, expected = statistic(found[key]).item(), statistic(value).item()
                assert abs(got - expected) < 6 * value.std().item() / value.numel() ** 0.5, (key, statistic)


def test_reset_after_meta_keeps_what_the_encoding_was_made_with():
    assert from_meta(lambda: FIRE(2, initial_c=0.3)).c.item() == pytest.approx(0.3)
    for learnable in (False, True):
        assert from_meta(lambda fixed=learnable: ALiBi(2, fixed, slopes=[3.0, 0.25])).slopes.tolist() == [3.0, 0.25]


# quantize_dynamic is deprecated in favour of torchao, and still what many use.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.skipif(torch.backends.quantized.engine == "none", reason="this torch quantizes nothing")
@pytest.mark.parametrize("dtype", [torch.qint8, torch.float16], ids=str)
@pytest.mark.parametrize("name", [name for name in EVERY if "FIRE" in name or "DAPE" in name])
def test_quantized_layers_are_read_as_they_multiply(name, dtype):
    encoding = remade(name)
    if isinstance(encoding, DAPE):
        torch.nn.init.normal_(encoding.mlp[2].weight)  # enough to tell from none
    quantized = torch.ao.quantization.quantize_dynamic(encoding, {torch.nn.Linear}, dtype)
    assert not any(type(module) is torch.nn.Linear for module in quantized.modules())
    q, k, v = (torch.randn(1, HEADS, TOKENS, DIM) for _ in range(3))
    with torch.no_grad():
        got = posattn.attention(q, k, v, quantized, causal=True)
        for path, layer in encoding.named_modules():
            if isinstance(layer, torch.nn.Linear):
                rounded = quantized.get_submodule(path)
                units = torch.eye(layer.in_features)  # which need no rounding themselves
                layer.weight.copy_((rounded(units) - rounded(0 * units)).t())
        torch.testing.assert_close(got, posattn.attention(q, k, v, encoding, causal=True))


# ALiBi's fixed slopes are computed, not state.


@pytest.mark.parametrize("make", [lambda: ALiBi(12), lambda: BiPE.with_alibi(12, 8, 4), lambda: DAPE(ALiBi(12), 12)])
@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_fixed_slopes_stay_float32(make, narrow):
    def slopes(encoding):
        return next(value for name, value in encoding.named_buffers() if name.endswith("slopes"))

    expected = slopes(make())
    assert expected.dtype == torch.float32
    encoding = make().to(narrow)
    assert {p.dtype for p in encoding.parameters()} <= {narrow}
    assert slopes(encoding).dtype == torch.float32
    assert torch.equal(slopes(encoding), expected)
    assert torch.equal(slopes(encoding.float()), expected)
    torch.set_default_dtype(narrow)
    try:
        encoding = make()
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(slopes(encoding), expected)
    assert slopes(make().double()).dtype == torch.float64


def test_learnable_slopes_are_a_parameter_like_any_other():
    encoding = ALiBi(12, learnable=True)
    assert isinstance(encoding.slopes, torch.nn.Parameter)
    assert list(encoding.state_dict()) == ["slopes"]
    assert encoding.bfloat16().slopes.dtype == torch.bfloat16
    other = ALiBi(12, learnable=True)
    other.load_state_dict({"slopes": torch.arange(12.0)})
    assert other.slopes.tolist() == list(range(12))


def test_fixed_slopes_changed_in_place_survive_a_cast():
    encoding = ALiBi(2)
    encoding.slopes.copy_(torch.tensor([0.1, 0.2]))
    assert torch.equal(encoding.half().slopes, torch.tensor([0.1, 0.2]))


@pytest.mark.parametrize("make", [lambda: ALiBi(3), lambda: BiPE.with_alibi(3, 8, 4), lambda: ALiBi(3) + RoPE(8)])
def test_fixed_slopes_are_no_state_and_those_of_an_old_file_are_understood(make):
    encoding = make()
    state = encoding.state_dict()
    assert not any("slopes" in name for name in state)
    prefix, slopes = next((n[: -len("slopes")], b) for n, b in encoding.named_buffers() if n.endswith("slopes"))
    for old in (slopes.clone(), slopes.bfloat16(), slopes.to("meta")):
        other = make()
        other.load_state_dict(state | {f"{prefix}slopes": old})
        assert torch.equal(other.get_buffer(f"{prefix}slopes"), slopes)
    for wrong in (2 * slopes, slopes[:1], slopes[:2]):
        with pytest.raises(ValueError, match=rf"{prefix}slopes: expected \[.*\], which ALiBi was made with, got"):
            make().load_state_dict(state | {f"{prefix}slopes": wrong})


def test_fixed_slopes_of_a_model_loaded_from_meta_by_assignment():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.position, self.out = ALiBi(3), torch.nn.Linear(4, 4)

    with torch.device("meta"):
        model = Model()
    model.load_state_dict(Model().state_dict(), assign=True)
    q = torch.randn(1, 3, 5, 4)
    expected = posattn.attention(q, q, q, ALiBi(3))
    assert torch.equal(posattn.attention(q, q, q, model.position), expected)
    assert torch.equal(model.position.slopes, ALiBi(3).slopes)


def test_slopes_come_back_from_meta_by_to_empty_alone():
    with torch.device("meta"):
        encoding = ALiBi(3)
    assert torch.equal(encoding.to_empty(device="cpu").slopes, ALiBi(3).slopes)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("make", [lambda: FIRE(3), lambda: DAPE(RoPE(8) + FIRE(3), 3)])
def test_scalars_of_fire_load_from_files_where_they_had_no_dimension(make, assign):
    encoding = make()
    scalars = {n: p for n, p in encoding.named_parameters() if n.endswith((".c", "length_multiplier")) or n == "c"}
    assert {tuple(p.shape) for p in scalars.values()} == {(1,)}
    assert len(scalars) == 2
    old = encoding.state_dict() | {name: torch.tensor(0.5 + n) for n, name in enumerate(scalars)}
    encoding.load_state_dict(old, assign=assign)
    assert [encoding.get_parameter(name).tolist() for name in scalars] == [[0.5], [1.5]]
    assert all(old[name].dim() == 0 for name in scalars)


# Lowering is a call of the module.


@every
def test_hooks_run_for_the_encoding_and_for_each_inside_it(name):
    encoding = remade(name)
    inside = [m for m in encoding.modules() if isinstance(m, encodings.Encoding)]
    seen = []
    for module in inside:
        module.register_forward_pre_hook(lambda m, _: seen.append(m))
    q = torch.randn(1, HEADS, TOKENS, DIM)
    places = torch.arange(TOKENS)
    for _ in range(2):
        backend = "auto" if encoding.fused else "reference"
        posattn.attention(q, q, q, encoding, q_positions=places, k_positions=places, backend=backend)
    assert len(seen) == 2 * len(inside)
    assert {id(m) for m in seen} == {id(m) for m in inside}


@every
def test_a_plan_of_a_hooked_module_outlives_its_parameters(name):
    """fully_shard frees them in a forward hook; here they are overwritten."""
    encoding = remade(name)
    context = Context.of(*torch.randn(2, 1, HEADS, TOKENS, DIM), posattn.plan.Mask())
    if encoding.needs_positions:
        places = torch.arange(TOKENS)[None]
        context = Context.of(*torch.randn(2, 1, HEADS, TOKENS, DIM), posattn.plan.Mask(), places, places)
    plain = {n: x.clone() for n, x in posattn.encodings._plans.named_operands(encoding.lower(context))}

    def free(module, arguments, plan):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.fill_(777.0)

    for module in encoding.modules():
        if isinstance(module, encodings.Encoding):
            module.register_forward_hook(free)
    found = dict(posattn.encodings._plans.named_operands(encoding.lower(context)))
    assert found.keys() == plain.keys()
    for key, operand in found.items():
        assert torch.equal(operand, plain[key]), key
