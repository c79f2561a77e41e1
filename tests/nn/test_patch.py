"""patch_sdpa: models that call torch's function run here, in this thread, until the end, whatever happens."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import posattn
from posattn import patch_sdpa

THEIRS = F.scaled_dot_product_attention
POSITION = posattn.ALiBi(4)


@pytest.fixture(autouse=True)
def _left_as_it_was():
    yield
    assert F.scaled_dot_product_attention is THEIRS
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What reached posattn's operator."""
    found: list[str] = []
    run = posattn.attention.__globals__["ops"]._run_forward

    def counted(call: object, backend: str) -> tuple[Tensor, Tensor]:
        found.append(backend)
        return run(call, backend)  # type: ignore[no-any-return]

    monkeypatch.setattr("posattn.ops._run_forward", counted)
    return found


class Block(nn.Module):
    """Attention as diffusers' AttnProcessor2_0 does it: heads by view and transpose, an additive mask, keywords."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(32, 32) for _ in range(3))

    def forward(self, hidden: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = (
            to(x).view(x.shape[0], -1, 4, 8).transpose(1, 2)
            for to, x in ((self.to_q, hidden), (self.to_k, context), (self.to_v, context))
        )
        if mask is not None:
            mask = mask.repeat_interleave(4, 0).view(hidden.shape[0], 4, -1, mask.shape[-1])
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=0.0, is_causal=False)
        return out.transpose(1, 2).reshape(hidden.shape[0], -1, 32).to(q.dtype)


def diffusers_style(masked: bool) -> Callable[[], Tensor]:
    block, hidden, context = Block(), torch.randn(2, 9, 32), torch.randn(2, 5, 32)
    mask = torch.where(torch.arange(5) < torch.tensor([[5], [3]]), 0.0, -10000.0)[:, None] if masked else None
    return lambda: block(hidden, context, mask)


def multihead(train: bool) -> Callable[[], Tensor]:
    module, x = nn.MultiheadAttention(32, 4, batch_first=True).train(train), torch.randn(2, 9, 32)
    padding = torch.arange(9) >= torch.tensor([[9], [6]])
    return lambda: module(x, x, x, key_padding_mask=padding, need_weights=False)[0]


def encoder(train: bool) -> Callable[[], Tensor]:
    layer = nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=True).train(train)
    x, mask = torch.randn(2, 9, 32), nn.Transformer.generate_square_subsequent_mask(9)
    return lambda: layer(x, src_mask=mask, is_causal=True)


def grouped() -> Callable[[], Tensor]:
    q, k = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 9, 8)
    return lambda: torch.nn.functional.scaled_dot_product_attention(
        query=q, key=k, value=k, is_causal=True, scale=0.3, enable_gqa=True
    )


MODELS = {
    "diffusers": diffusers_style(False),
    "diffusers, masked": diffusers_style(True),
    "MultiheadAttention": multihead(True),
    "MultiheadAttention, eval": multihead(False),
    "encoder layer": encoder(True),
    "encoder layer, eval": encoder(False),
    "keywords": grouped(),
}


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "grad"])
def test_models_run_here(model: Callable[[], Tensor], grad: bool, calls: list[str]) -> None:
    with torch.set_grad_enabled(grad):
        expected = model()
        assert calls == []
        with patch_sdpa():
            got = model()
        assert len(calls) == 1
        torch.testing.assert_close(got, expected, rtol=2e-5, atol=5e-6)
        with patch_sdpa(POSITION):
            moved = model()
        assert not torch.allclose(moved, expected, atol=1e-3)
        model()
        assert len(calls) == 2


def test_gradients_after_the_end() -> None:
    q = torch.randn(1, 2, 5, 8, requires_grad=True)
    with patch_sdpa():
        out = F.scaled_dot_product_attention(q, q, q)
    (got,) = torch.autograd.grad(out.square().sum(), q)
    (expected,) = torch.autograd.grad(F.scaled_dot_product_attention(q, q, q).square().sum(), q)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def run() -> Tensor:
    torch.manual_seed(0)
    q = torch.randn(1, 4, 6, 8)
    return F.scaled_dot_product_attention(q, q, q)


def test_the_innermost_counts() -> None:
    plain = run()
    other = posattn.Sandwich(4)
    with patch_sdpa(POSITION):
        outer = run()
        with patch_sdpa(other):
            inner = run()
            with patch_sdpa():
                torch.testing.assert_close(run(), plain)
            assert torch.equal(run(), inner)
        assert torch.equal(run(), outer)
    assert not torch.allclose(outer, inner)
    assert torch.equal(run(), plain)


def test_one_object_many_times() -> None:
    patch = patch_sdpa(POSITION)
    plain = run()
    with patch, patch:
        first = run()
    with patch:
        assert torch.equal(run(), first)
    assert torch.equal(run(), plain)


def test_as_a_decorator() -> None:
    decorated = patch_sdpa(POSITION)(run)
    with patch_sdpa(POSITION):
        expected = run()
    assert torch.equal(decorated(), expected)
    assert F.scaled_dot_product_attention is THEIRS


def test_it_ends_after_an_exception(calls: list[str]) -> None:
    with pytest.raises(ValueError, match="inside"), patch_sdpa(), patch_sdpa(POSITION):
        raise ValueError("inside")
    run()
    assert calls == []


def test_other_threads_keep_torchs(calls: list[str]) -> None:
    inside, done = threading.Event(), threading.Event()
    found: dict[str, Tensor] = {}

    def other() -> None:
        with patch_sdpa(POSITION):
            found["patched"] = run()
            inside.set()
            done.wait(10)
            found["still patched"] = run()

    plain = run()
    thread = threading.Thread(target=other)
    thread.start()
    assert inside.wait(10)
    assert torch.equal(run(), plain)
    assert F.scaled_dot_product_attention is not THEIRS
    with patch_sdpa():
        torch.testing.assert_close(run(), plain)
    assert len(calls) == 2
    done.set()
    thread.join()
    assert torch.equal(found["patched"], found["still patched"])
    assert not torch.allclose(found["patched"], plain)


def test_every_thread() -> None:
    found: list[Tensor] = []
    with patch_sdpa(POSITION, every_thread=True):
        here = run()
        thread = threading.Thread(target=lambda: found.append(run()))
        thread.start()
        thread.join()
        with patch_sdpa():  # this thread's own goes before
            assert not torch.allclose(run(), here)
    assert torch.equal(found[0], here)


def test_many_threads_at_once() -> None:
    plain = run()
    wrong: list[str] = []

    def work(index: int) -> None:
        q = torch.randn(1, 4, 6, 8, generator=torch.Generator().manual_seed(index))
        expected = posattn.scaled_dot_product_attention(q, q, q, position=POSITION)
        for _ in range(30):
            with patch_sdpa(POSITION):
                if not torch.equal(F.scaled_dot_product_attention(q, q, q), expected):
                    wrong.append("patched")
            if torch.allclose(F.scaled_dot_product_attention(q, q, q), expected, atol=1e-4):
                wrong.append("not patched")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert torch.equal(run(), plain)


def test_somebody_elses_patch_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = run()
    seen: list[int] = []
    with monkeypatch.context() as patched:
        with patch_sdpa(POSITION):
            ours = F.scaled_dot_product_attention

            def theirs(*args: Tensor) -> Tensor:
                seen.append(1)
                return ours(*args)

            patched.setattr(F, "scaled_dot_product_attention", theirs)
            run()
        assert F.scaled_dot_product_attention is theirs
        assert torch.equal(run(), plain)
        assert len(seen) == 2
    # monkeypatch put back what it found, our function, which passes every call on.
    assert torch.equal(run(), plain)
    F.scaled_dot_product_attention = THEIRS


def test_compiled_inside() -> None:
    q = torch.randn(1, 4, 6, 8)
    with patch_sdpa(POSITION):
        compiled = torch.compile(lambda q: F.scaled_dot_product_attention(q, q, q), backend="aot_eager")
        torch.testing.assert_close(compiled(q), F.scaled_dot_product_attention(q, q, q))


def test_a_wrong_position() -> None:
    with pytest.raises(TypeError, match="position: expected an encoding of posattn or None, got str"):
        patch_sdpa("alibi")  # type: ignore[arg-type]
