"""The public functions beside torch's own: shapes, broadcasting, masks, autocast, empty inputs, seeds, float64."""

from __future__ import annotations

import inspect
import sys

import pytest
import torch
import torch.nn.functional as F

import posattn
from posattn.attention import Options
from posattn.bench.memory import extra_peak
from posattn.parity import compare


def like_torch(got, *arguments, dtype=None, **options):
    """Within the tolerance rule of torch's own function, run in float64 and in the dtype at hand."""
    exact_arguments = [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in arguments]
    exact_options = {
        n: a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for n, a in options.items()
    }
    exact = F.scaled_dot_product_attention(*exact_arguments, **exact_options)
    naive = F.scaled_dot_product_attention(*arguments, **options)
    assert got.dtype == naive.dtype
    found = compare("out", got, naive, exact, torch.zeros(1), got.dtype)
    assert found.ok, found.worst


SHAPES = {
    "two dimensions": ((5, 8), (7, 8), (7, 8)),
    "three": ((4, 5, 8), (4, 7, 8), (4, 7, 8)),
    "four": ((2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 8)),
    "five": ((3, 2, 4, 5, 8), (3, 2, 4, 7, 8), (3, 2, 4, 7, 8)),
    "six with ones": ((3, 1, 2, 4, 5, 8), (3, 1, 2, 4, 7, 8), (3, 1, 2, 4, 7, 8)),
    "values of another width": ((2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 3)),
    "keys shared over the batch": ((2, 4, 5, 8), (1, 4, 7, 8), (1, 4, 7, 8)),
    "keys shared over the heads": ((2, 4, 5, 8), (2, 1, 7, 8), (2, 1, 7, 8)),
    "one query for a batch of keys": ((1, 4, 5, 8), (3, 4, 7, 8), (3, 4, 7, 8)),
    "one key set, many values": ((2, 4, 5, 8), (1, 1, 7, 8), (2, 4, 7, 8)),
    "fewer key dimensions": ((2, 4, 5, 8), (4, 7, 8), (7, 8)),
    "five, shared": ((3, 2, 4, 5, 8), (1, 2, 4, 7, 8), (3, 1, 1, 7, 8)),
    "more key dimensions": ((5, 8), (2, 4, 7, 8), (7, 8)),
    "three, values of another width": ((4, 5, 8), (4, 7, 8), (4, 7, 3)),
    "five, values of another width": ((3, 2, 4, 5, 8), (3, 2, 4, 7, 8), (3, 2, 4, 7, 11)),
}


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_sdpa_shapes(shapes, causal):
    q, k, v = (torch.randn(shape) for shape in shapes)
    out = posattn.scaled_dot_product_attention(q, k, v, is_causal=causal)
    like_torch(out, q, k, v, is_causal=causal)


@pytest.mark.parametrize(
    "shapes",
    [
        ((2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 8)),
        ((4, 5, 8), (2, 7, 8), (2, 7, 8)),
        ((3, 2, 4, 5, 8), (3, 2, 1, 7, 8), (3, 2, 1, 7, 8)),
        ((2, 4, 5, 8), (2, 2, 7, 8), (2, 1, 7, 8)),
    ],
    ids=str,
)
def test_sdpa_grouped_heads(shapes):
    q, k, v = (torch.randn(shape) for shape in shapes)
    out = posattn.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    like_torch(out, q, k, v, enable_gqa=True)


@pytest.mark.parametrize("kind", ["bool", "float", "-inf"])
@pytest.mark.parametrize(
    "shape", [(5, 7), (1, 7), (5, 1), (4, 5, 7), (2, 1, 5, 7), (1, 4, 1, 7), (2, 1, 1, 7)], ids=str
)
def test_sdpa_masks(shape, kind):
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 4, 7, 8), torch.randn(2, 4, 7, 8)
    mask = torch.rand(shape) < 0.6
    if kind == "float":
        mask = torch.randn(shape)
    elif kind == "-inf":
        mask = torch.zeros(shape).masked_fill(mask, -torch.inf)
    like_torch(posattn.scaled_dot_product_attention(q, k, v, mask), q, k, v, attn_mask=mask)


@pytest.mark.parametrize(
    "shape", [(5, 7), (4, 5, 7), (2, 4, 5, 7), (2, 1, 5, 7), (3, 2, 1, 5, 7), (1, 1, 4, 5, 7)], ids=str
)
def test_sdpa_masks_of_folded_batches(shape):
    q, k, v = torch.randn(3, 2, 4, 5, 8), torch.randn(3, 2, 4, 7, 8), torch.randn(3, 2, 4, 7, 8)
    mask = torch.randn(shape)
    like_torch(posattn.scaled_dot_product_attention(q, k, v, mask), q, k, v, attn_mask=mask)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sdpa_narrow_dtypes(dtype):
    q, k, v = (torch.randn(2, 4, 33, 16, dtype=dtype) for _ in range(3))
    mask = torch.randn(33, 33)
    like_torch(
        posattn.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.5), q, k, v, is_causal=True, scale=0.5
    )
    like_torch(posattn.scaled_dot_product_attention(q, k, v, mask.to(dtype)), q, k, v, attn_mask=mask.to(dtype))


def test_sdpa_rows_that_see_no_key_are_zero_with_zero_gradients():
    q, k, v = (torch.randn(1, 2, 6, 8, requires_grad=True) for _ in range(3))
    mask = torch.ones(6, 6, dtype=torch.bool)
    mask[2] = False
    out = posattn.scaled_dot_product_attention(q, k, v, mask)
    assert not out[:, :, 2].any()
    grad = torch.autograd.grad(out.sum(), q)[0]
    assert not grad[:, :, 2].any()
    assert grad.isfinite().all()


def test_sdpa_takes_a_position():
    """Top-left causal masking, and positions that still count from the last key."""
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 4, 7, 8), torch.randn(2, 4, 7, 8)
    alibi = posattn.ALiBi(4)
    out = posattn.scaled_dot_product_attention(q, k, v, is_causal=True, position=alibi)
    bias = alibi.bias(5, 7).masked_fill(~torch.ones(5, 7, dtype=torch.bool).tril(), -torch.inf)
    like_torch(out, q, k, v, attn_mask=bias)


@pytest.mark.parametrize("lengths", [(0, 7), (5, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("batch", [2, 0])
@pytest.mark.parametrize(
    "position", [None, posattn.Kerple(4), posattn.FIRE(4), posattn.DAPE(posattn.RoPE(8), 4)], ids=str
)
def test_nothing_to_attend_to_gives_zeros_as_in_torch(lengths, batch, position):
    q = torch.randn(batch, 4, lengths[0], 8, requires_grad=True)
    k = torch.randn(batch, 4, lengths[1], 8, requires_grad=True)
    out, lse = posattn.attention(q, k, k, position, causal=True, return_lse=True)
    assert torch.equal(out, F.scaled_dot_product_attention(q, k, k))
    assert torch.equal(lse, torch.full((batch, 4, lengths[0]), -torch.inf))
    for grad, leaf in zip(torch.autograd.grad(out.sum(), (q, k)), (q, k)):
        assert torch.equal(grad, torch.zeros_like(leaf))


def test_no_key_but_a_sink():
    q, k, sinks = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 0, 8), torch.randn(2, requires_grad=True)
    out, lse = posattn.attention(q, k, k, sinks=sinks, return_lse=True)
    assert not out.any()
    assert torch.equal(lse, sinks[:, None].expand(1, 2, 3))
    assert torch.equal(torch.autograd.grad(lse.sum(), sinks)[0], torch.tensor([3.0, 3.0]))


def test_autocast_casts_as_torch_does():
    q, k, v = (torch.randn(1, 4, 9, 16, requires_grad=True) for _ in range(3))
    kerple = posattn.Kerple(4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert F.scaled_dot_product_attention(q, k, v).dtype == torch.bfloat16
        out = posattn.attention(q, k.bfloat16(), v, kerple)
        sdpa = posattn.scaled_dot_product_attention(q, k.half(), v, torch.zeros(9, 9), position=kerple)
        assert posattn.attention(q.double(), k.double(), v.double()).dtype == torch.float64
    assert torch.equal(out, posattn.attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), kerple))
    assert sdpa.dtype == torch.bfloat16
    out.sum().backward()
    assert q.grad.dtype == kerple.p.grad.dtype == torch.float32


def test_float64_runs_on_the_reference_and_has_second_derivatives():
    q, k, v = (torch.randn(1, 2, 4, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    position = (posattn.RoPE(4) + posattn.DAPE(posattn.Kerple(2), 2, width=3)).double()
    parameters = tuple(position.parameters())

    def call(q, k, v, *_):
        return posattn.attention(q, k, v, position, causal=True, return_lse=True, softcap=3.0)

    assert torch.autograd.gradcheck(call, (q, k, v, *parameters))
    assert torch.autograd.gradgradcheck(lambda q: posattn.attention(q, k, v, causal=True), (q,))


def test_kernels_agree_with_finite_differences_of_the_reference(place):
    """Directional: the gradient along a direction beside the difference quotient of the float64 reference."""
    device, backend = place
    q, k, v = (torch.randn(1, 4, 19, 8, device=device) for _ in range(3))
    position = posattn.DAPE(posattn.Kerple(4), 4).to(device)
    torch.nn.init.uniform_(position.inner.p, 0.5, 1.5)  # away from Kerple's limits, where its gradient passes straight
    torch.nn.init.uniform_(position.inner.a, 0.2, 1.0)
    parameters = tuple(position.parameters())
    leaves = tuple(x.requires_grad_() for x in (q, k, v)) + parameters
    loss = posattn.attention(q, k, v, position, causal=True, backend=backend).square().sum()
    grads = torch.autograd.grad(loss, leaves)
    directions = [torch.randn_like(x).double() for x in leaves]

    def at(step):
        moved = [x.detach().double() + step * d for x, d in zip(leaves, directions)]
        state = dict(zip((name for name, _ in position.named_parameters()), moved[3:]))
        shifted = posattn.DAPE(posattn.Kerple(4), 4).double().to(device)
        shifted.load_state_dict(state)
        return posattn.attention(*moved[:3], shifted, causal=True).square().sum().item()

    slope = sum((g.double() * d).sum().item() for g, d in zip(grads, directions))
    assert slope == pytest.approx((at(1e-6) - at(-1e-6)) / 2e-6, rel=1e-4)


def test_dropout_follows_torch_manual_seed():
    q, k, v = (torch.randn(1, 2, 40, 8) for _ in range(3))
    torch.manual_seed(3)
    first, second = (posattn.attention(q, k, v, dropout_p=0.4) for _ in range(2))
    torch.manual_seed(3)
    again = posattn.attention(q, k, v, dropout_p=0.4)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


def test_log_sum_exp_is_that_of_the_true_logits(place):
    device, backend = place
    q, k, v = (torch.randn(1, 2, 21, 8, device=device) for _ in range(3))
    position = posattn.ALiBi(2).to(device)
    _, lse = posattn.attention(q, k, v, position, return_lse=True, backend=backend)
    logits = q.double() @ k.double().mT / 8**0.5 + position.double().bias(21, 21)
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse.double(), logits.logsumexp(-1), rtol=1e-6, atol=1e-6)


def test_results_do_not_depend_on_the_thread_count(place):
    device, backend = place
    q, k, v = (torch.randn(2, 4, 150, 16, device=device, requires_grad=True) for _ in range(3))
    for position in (posattn.Kerple(4), posattn.FIRE(4), posattn.DAPE(posattn.T5Bias(4), 4)):
        position.to(device)
        leaves = (q, k, v, *position.parameters())
        results = []
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            torch.manual_seed(0)
            out = posattn.attention(q, k, v, position, causal=True, dropout_p=0.1, deterministic=True, backend=backend)
            results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def test_gradients_only_where_wanted(place):
    device, backend = place
    q, k, v = (torch.randn(1, 2, 9, 8, device=device) for _ in range(3))
    position = posattn.Kerple(2).to(device)
    position.a.requires_grad_(False)
    for leaves in ((q,), (k,), (v,), (position.p,), (q, position.p), (k, v)):
        for tensor in (q, k, v, position.p):
            tensor.requires_grad_(any(tensor is leaf for leaf in leaves))
        out, lse = posattn.attention(q, k, v, position, return_lse=True, backend=backend)
        some = torch.autograd.grad(out.sum() + lse.sum(), leaves, allow_unused=True)
        assert all(grad is not None and grad.isfinite().all() for grad in some)
    assert not posattn.attention(q.detach(), k.detach(), v.detach(), backend=backend).requires_grad


def test_the_typed_options_are_the_keywords():
    parameters = inspect.signature(posattn.attention).parameters.values()
    keywords = {parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}
    assert keywords == {"return_lse", "mesh", *Options.__annotations__}


def test_only_the_log_sum_exp_is_used():
    q, k, v = (torch.randn(1, 2, 9, 8, requires_grad=True) for _ in range(3))
    _, lse = posattn.attention(q, k, v, return_lse=True)
    dq, dv = torch.autograd.grad(lse.sum(), (q, v))
    weights = (q @ k.mT / 8**0.5).softmax(-1)
    torch.testing.assert_close(dq, weights @ k / 8**0.5)
    assert not dv.any()


def test_in_place_changes_before_backward_are_noticed():
    q, k, v = (torch.randn(1, 2, 9, 8, requires_grad=True) for _ in range(3))
    scaled = q * 1.0
    out = posattn.attention(scaled, k, v)
    scaled.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.skipif(sys.platform != "linux", reason="measured with Linux's /proc")
@pytest.mark.parametrize("make", [lambda: posattn.FIRE(2), lambda: posattn.DAPE(posattn.Kerple(2), 2)])
def test_memory_grows_with_the_length_and_not_its_square(make):
    """A matrix of 16384 x 16384 numbers would be a gigabyte a head; a window keeps the time down, not the memory."""
    position = make()

    def run(tokens):
        q, k, v = (torch.randn(1, 2, tokens, 16, requires_grad=True) for _ in range(3))
        posattn.attention(q, k, v, position, causal=True, window=(64, 0)).sum().backward()

    run(512)
    short, long = (extra_peak(lambda tokens=tokens: run(tokens)) for tokens in (8192, 16384))
    assert short < 30, "megabytes, the inputs among them"
    assert long < 60
