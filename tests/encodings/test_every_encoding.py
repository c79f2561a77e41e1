"""What holds for every encoding in `posattn.encodings.__all__`, so that a new one cannot be left out."""

from __future__ import annotations

import copy
import dataclasses
import io

import pytest
import torch
from torch import Tensor

import posattn.encodings as encodings
from posattn import reference
from posattn.encodings import FIRE, ALiBi, BiPE, Context, Encoding, Kerple, RoPE
from posattn.plan import Bias, Call, Mask

WIDE = torch.float64
HEADS, DIM, TOKENS = 4, 12, 10
EVERY = {
    name: encoding
    for kind in encodings.__all__
    for name, encoding in getattr(encodings, kind).examples(HEADS, DIM, TOKENS).items()
}
IMPLICIT = {name: encoding for name, encoding in EVERY.items() if not encoding.needs_positions}
every = pytest.mark.parametrize("encoding", EVERY.values(), ids=EVERY.keys())
with_implicit_positions = pytest.mark.parametrize("encoding", IMPLICIT.values(), ids=IMPLICIT.keys())


def qkv(dtype=WIDE, q_len=TOKENS, k_len=TOKENS, batch=1):
    torch.manual_seed(0)
    return (torch.randn(batch, HEADS, n, DIM, dtype=dtype) for n in (q_len, k_len, k_len))


def positions_of(encoding, q_len, k_len):
    """Explicit positions for an encoding that needs them, such as segment numbers; else none."""
    if not encoding.needs_positions:
        return None, None
    k_positions = (torch.arange(k_len) // 3)[None]
    return k_positions[:, k_len - q_len :], k_positions


def attend(encoding, q, k, v, mask=None, positions=None):
    mask = mask or Mask(causal=True)
    q_positions, k_positions = positions or positions_of(encoding, q.shape[2], k.shape[2])
    plan = encoding.lower(Context.of(q, k, mask, q_positions, k_positions))
    if plan.places is not None:
        q_positions, k_positions = plan.places.q, plan.places.k
    call = Call(q, k, v, plan, mask, 0.3, q_positions=q_positions, k_positions=k_positions)
    return reference.forward(call)[0]


def operands(value):
    """Every tensor of a plan."""
    if isinstance(value, Tensor):
        yield value
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from operands(getattr(value, field.name))


def test_all_holds_encodings_with_examples():
    for kind in encodings.__all__:
        assert issubclass(getattr(encodings, kind), Encoding)
        # Those that are made of one call's tokens have none: tests/native/test_decay.py.
        assert getattr(encodings, kind).examples(HEADS, DIM, TOKENS) or kind in ("Decay", "ForgetGate")
    defined = {kind.__name__ for kind in Encoding.__subclasses__() if kind.__module__.startswith("posattn.encodings")}
    assert defined - {"Sum", "Shard", "RotaryEncoding"} <= set(encodings.__all__)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("q_len", "k_len"), [(6, TOKENS), (TOKENS, TOKENS), (TOKENS, 6)])
@with_implicit_positions
def test_implicit_and_explicit_positions_agree(encoding, q_len, k_len, causal):
    if q_len > k_len and isinstance(encoding, encodings.RelativeTable2D):
        pytest.skip("its window has no cell for a query before the first key")
    encoding = copy.deepcopy(encoding).double()
    q, k, v = qkv(q_len=q_len, k_len=k_len)
    explicit = torch.arange(k_len - q_len, k_len)[None], torch.arange(k_len)[None]
    mask = Mask(causal=causal)
    torch.testing.assert_close(attend(encoding, q, k, v, mask, explicit), attend(encoding, q, k, v, mask))
    # In another order, and farther apart than tables of implicit positions reach.
    order, stretched = torch.randperm(k_len), tuple(3 * p for p in explicit)
    shuffled = attend(encoding, q, k[:, :, order], v[:, :, order], Mask(), (explicit[0], explicit[1][:, order]))
    if not isinstance(encoding, encodings.CoPE):  # which counts keys as they lie, whatever their positions
        torch.testing.assert_close(shuffled, attend(encoding, q, k, v, Mask()))
    if not isinstance(encoding, encodings.RelativeTable2D):
        spread = attend(encoding, q, k, v, Mask(), stretched)
        far_k = torch.zeros(1, HEADS, 3 * TOKENS, DIM, dtype=WIDE)
        far_v = torch.zeros_like(far_k)
        far_k[:, :, : 3 * k_len : 3], far_v[:, :, : 3 * k_len : 3] = k, v
        seen = torch.zeros(1, 1, q_len, 3 * TOKENS, dtype=torch.bool)
        seen[..., : 3 * k_len : 3] = True
        wide = (stretched[0], torch.arange(3 * TOKENS)[None])
        torch.testing.assert_close(attend(encoding, q, far_k, far_v, Mask(boolean=seen), wide), spread)


@pytest.mark.parametrize("causal", [True, False])
@with_implicit_positions
def test_lengths_and_documents_agree_with_sequences_of_their_own(encoding, causal):
    encoding = copy.deepcopy(encoding).double()
    q, k, v = qkv(batch=2, q_len=4)
    lengths = torch.tensor([TOKENS, 7])
    padded = attend(encoding, q, k, v, Mask(causal=causal, k_lengths=lengths, max_q=4, max_k=TOKENS))
    for b, n in enumerate(lengths.tolist()):
        alone = attend(encoding, q[b, None], k[b, None, :, :n], v[b, None, :, :n], Mask(causal=causal))
        torch.testing.assert_close(padded[b, None], alone)
    packed_q, packed_k, packed_v = (torch.cat([x[0, None], x[1, None, :, :n]], 2) for x, n in ((q, 4), (k, 7), (v, 7)))
    cu_q, cu_k = torch.tensor([0, 4, 8]), torch.tensor([0, TOKENS, TOKENS + 7])
    mask = Mask(causal=causal, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, max_q=4, max_k=TOKENS)
    packed = attend(encoding, packed_q, packed_k, packed_v, mask)
    torch.testing.assert_close(packed, torch.cat([padded[0, None], padded[1, None]], 2))


@every
def test_every_parameter_gets_a_finite_gradient(encoding):
    encoding = copy.deepcopy(encoding).double()
    q, k, v = qkv()
    attend(encoding, q.requires_grad_(), k, v).square().sum().backward()
    for name, parameter in encoding.named_parameters():
        if name.startswith("intra."):
            continue
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@every
def test_state_dict_round_trip(encoding):
    file = io.BytesIO()
    torch.save(encoding.state_dict(), file)
    file.seek(0)
    other = copy.deepcopy(encoding)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1.0)
    other.load_state_dict(torch.load(file))
    q, k, v = qkv()
    assert torch.equal(attend(other, q, k, v), attend(encoding, q, k, v))


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_operands_are_float32_or_float64(encoding, dtype):
    encoding = copy.deepcopy(encoding).to(dtype)
    q, k, _ = qkv(dtype)
    plan = encoding.lower(Context.of(q, k, Mask(), *positions_of(encoding, TOKENS, TOKENS)))
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    found = [x for x in operands(plan) if x.is_floating_point()]
    assert found
    assert {x.dtype for x in found} == {wanted}


@with_implicit_positions
def test_operands_are_on_the_parameters_device(encoding):
    """The meta device stands in for an accelerator: mixing in a CPU tensor there is an error."""
    encoding = copy.deepcopy(encoding).to("meta")
    q, k, _ = (x.to("meta") for x in qkv(torch.float32))
    assert {x.device.type for x in operands(encoding.lower(Context.of(q, k, Mask())))} == {"meta"}


@with_implicit_positions
@pytest.mark.parametrize(("q_len", "k_len"), [(1, 1), (3, 10), (10, 3), (0, 5), (5, 0), (0, 0)])
def test_tables_cover_the_distances(encoding, q_len, k_len):
    if q_len > k_len and isinstance(encoding, encodings.RelativeTable2D):
        q_len, k_len = k_len, q_len  # its window has no cell for a query before the first key
    q, k, v = qkv(torch.float32, q_len, k_len)
    plan = encoding.lower(Context.of(q, k, Mask()))
    bias = plan.bias if plan.places is None else Bias()  # over numbers of its own, whatever the call's
    for operand, count in ((bias.table, "values"), (bias.profile, "psi"), (bias.profile, "row_scale")):
        if operand is not None:
            first = operand.row_first if count == "row_scale" else operand.first
            assert first == 1 - q_len
            assert getattr(operand, count).shape[-1] == max(q_len + k_len - 1, 1)
    assert attend(encoding, q, k, v).shape == (1, HEADS, q_len, DIM)


@pytest.mark.slow
@with_implicit_positions
def test_lowering_compiles_whole(encoding):
    """As part of a whole layer, in float32 and with its gradients, tests/api/test_ops.py compiles it quickly."""
    torch._dynamo.reset()
    q, k, _ = qkv()

    def lowered(q, k):
        return list(operands(encoding.lower(Context.of(q, k, Mask(causal=True)))))

    compiled = torch.compile(lowered, fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(q, k), lowered(q, k), strict=True):
        torch.testing.assert_close(got, expected)


@every
def test_nan_in_a_parameter_is_named(encoding):
    for name, _ in encoding.named_parameters():
        broken = copy.deepcopy(encoding)
        with torch.no_grad():
            broken.get_parameter(name).view(-1)[-1] = float("nan")
        with pytest.raises(ValueError, match=rf"{name}: expected finite values, got NaN"):
            attend(broken, *qkv())


@every
def test_wrong_head_count(encoding):
    q = torch.randn(1, HEADS + 1, TOKENS, DIM)
    context = Context.of(q, q, Mask(), *positions_of(encoding, TOKENS, TOKENS))
    if encoding.num_heads is None:
        encoding.lower(context)
    else:
        with pytest.raises(ValueError, match=f"num_heads={HEADS}, got queries with {HEADS + 1} heads"):
            encoding.lower(context)


@every
def test_additive_encodings_show_their_bias_and_others_say_why_not(encoding):
    plan = encoding.lower(Context.of(*list(qkv())[:2], Mask(), *positions_of(encoding, TOKENS, TOKENS)))
    given = dict(zip(("q_positions", "k_positions"), positions_of(encoding, TOKENS, TOKENS), strict=True))
    given = {name: value[0] for name, value in given.items() if value is not None}
    assert encoding.has_bias == (bool(plan.bias) or plan.mix is not None)
    if plan.mix is None and plan.rotary is None and plan.amplitude is None and not (plan.gated or plan.relative):
        assert encoding.bias(TOKENS, TOKENS, **given).shape == (HEADS, TOKENS, TOKENS)
    else:
        with pytest.raises(TypeError, match=r"\.bias of"):
            encoding.bias(TOKENS, TOKENS, **given)


def test_positions_too_far_apart_for_a_table():
    positions = torch.tensor([[0, 2**40]])
    q, k, v = qkv(q_len=2, k_len=2)
    for encoding in (Kerple(HEADS), FIRE(HEADS)):
        with pytest.raises(
            ValueError, match=r"q_positions, k_positions, offset: expected at most 134217728 table entries"
        ):
            attend(encoding, q, k, v, positions=(positions, positions))
    for encoding in (ALiBi(HEADS), RoPE(DIM)):
        assert attend(encoding, q, k, v, positions=(positions, positions)).isfinite().all()


def test_positions_of_a_bias_are_checked():
    two = torch.arange(2)
    with pytest.raises(ValueError, match="q_positions, k_positions: expected both or neither"):
        ALiBi(2).bias(2, 2, q_positions=two)
    for bad in (two.float(), two[None], torch.arange(3)):
        with pytest.raises(ValueError, match=r"k_positions: expected integers \[2\], got torch"):
            ALiBi(2).bias(2, 2, q_positions=two, k_positions=bad)


def test_no_positions_at_all():
    none = torch.zeros(1, 0, dtype=torch.int64)
    q, k, v = qkv(q_len=0, k_len=0)
    assert attend(Kerple(HEADS), q, k, v, positions=(none, none)).shape == (1, HEADS, 0, DIM)


def test_functional_transforms_over_parameters():
    """An ensemble: vmap over stacked parameters, which no check may try to read."""
    model = Kerple(HEADS).double()
    stacked = {name: torch.stack([p.detach(), p.detach() + 1]) for name, p in model.named_parameters()}
    q, k, v = qkv()

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.position = model

        def forward(self):
            return attend(self.position, q, k, v)

    layer = Layer()

    def run(parameters):
        return torch.func.functional_call(layer, {f"position.{n}": p for n, p in parameters.items()})

    both = torch.func.vmap(run)(stacked)
    torch.testing.assert_close(both[1], run({name: p[1] for name, p in stacked.items()}))


def test_a_new_encoding_needs_only_build():
    class Nothing(Encoding):
        pass

    with pytest.raises(NotImplementedError, match=r"Nothing must define build"):
        Nothing().lower(Context(1, 1, 1, 1, torch.device("cpu"), WIDE))
    with pytest.raises(NotImplementedError, match=r"Nothing must define examples"):
        Nothing.examples(1, 1, 1)


def test_bipe_is_found_to_need_positions_wherever_it_is():
    bipe = BiPE.with_alibi(HEADS, 8, 4)
    assert bipe.needs_positions
    assert (bipe + RoPE(DIM)).needs_positions
    assert encodings.DAPE(bipe, HEADS).needs_positions
    assert not (ALiBi(HEADS) + RoPE(DIM)).needs_positions
