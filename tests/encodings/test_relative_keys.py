"""Relative keys: the papers' formulas and transformers' own attention beside them, and what holds of the operand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import posattn
from posattn.distributed import blocks
from posattn.encodings.base import Context
from posattn.plan import Bias, Call, Mask, Plan, RelativeKeys
from posattn.serialize import flatten, unflatten

HEADS, TOKENS, DIM = 3, 9, 8
KINDS = ("TransformerXL", "TransformerXL bidirectional", "ShawRelative", "DeBERTa", "DeBERTa without buckets")


def qkv(tokens: int = TOKENS, batch: int = 2, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(batch, HEADS, tokens, DIM, dtype=dtype) for _ in range(3)]


def made(name: str) -> posattn.encodings.Encoding:
    """That example with parameters of size 1, so that each counts."""
    encoding = posattn.parity.examples(HEADS, DIM, TOKENS, every=True)[name].double()
    torch.manual_seed(1)
    for parameter in encoding.parameters():
        nn.init.normal_(parameter)
    return encoding


def attend(q: Tensor, k: Tensor, v: Tensor, position: posattn.encodings.Encoding, **options: Any) -> Tensor:
    out: Tensor = posattn.attention(q, k, v, position, backend="reference", **options)
    return out


def rel_shift(x: Tensor) -> Tensor:
    """The trick of Transformer-XL's appendix B: a column of zeros, another shape, a row less."""
    rows, columns = x.shape[-2:]
    padded = torch.cat([x.new_zeros(*x.shape[:-1], 1), x], dim=-1)
    return padded.view(*x.shape[:-2], columns + 1, rows)[..., 1:, :].view(x.shape)


def sinusoid(distance: Tensor, dim: int) -> Tensor:
    inverse = torch.tensor([1.0 / 10000 ** (2.0 * c / dim) for c in range(dim // 2)], dtype=torch.float64)
    angle = torch.outer(distance.double(), inverse)
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


def test_transformer_xl_is_the_papers_shift() -> None:
    position = made("TransformerXL")
    assert isinstance(position, posattn.TransformerXL)
    q, k, v = qkv()
    r = position.rel(sinusoid(torch.arange(TOKENS - 1, -1, -1), HEADS * DIM)).view(TOKENS, HEADS, DIM)
    content = torch.einsum("bhid,bhjd->bhij", q + position.u[:, None], k)
    places = torch.einsum("bhid,jhd->bhij", q + position.v[:, None], r)
    logits = (content + rel_shift(places)) / math.sqrt(DIM)
    hidden = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)
    expected = logits.masked_fill(hidden, -torch.inf).softmax(-1) @ v
    torch.testing.assert_close(attend(q, k, v, position, causal=True), expected)


def test_without_directions_keys_ahead_are_at_distance_zero() -> None:
    position = made("TransformerXL")
    q, k, v = qkv()
    both = posattn.TransformerXL(HEADS, DIM, bidirectional=True).double()
    both.load_state_dict(position.state_dict())
    torch.testing.assert_close(attend(q, k, v, position, causal=True), attend(q, k, v, both, causal=True))
    first = attend(q[:, :, :1], k, v, position, offset=0)  # all keys but one are ahead
    same = attend(q[:, :, :1], k, v, both, q_positions=torch.zeros(1).long(), k_positions=torch.zeros(TOKENS).long())
    torch.testing.assert_close(first, same)
    assert not torch.allclose(first, attend(q[:, :, :1], k, v, both, offset=0))


def test_it_is_a_conformers_attention() -> None:
    from transformers import Wav2Vec2ConformerConfig
    from transformers.models.wav2vec2_conformer import modeling_wav2vec2_conformer as theirs

    config = Wav2Vec2ConformerConfig(
        hidden_size=HEADS * DIM, num_attention_heads=HEADS, max_source_positions=32, attn_implementation="eager"
    )
    torch.manual_seed(0)
    layer = theirs.Wav2Vec2ConformerSelfAttention(config).double().eval()
    nn.init.normal_(layer.pos_bias_u)
    nn.init.normal_(layer.pos_bias_v)
    nn.init.normal_(layer.linear_pos.weight)
    x = torch.randn(2, TOKENS, HEADS * DIM, dtype=torch.float64)
    # Their own sinusoids are of float32; what is compared is the attention.
    places = sinusoid(torch.arange(TOKENS - 1, -TOKENS, -1), HEADS * DIM)
    turns = places.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
    expected = layer(x, relative_position_embeddings=turns[None])[0]
    near = theirs.Wav2Vec2ConformerRelPositionalEmbedding(config)(x)
    torch.testing.assert_close(near, turns[None], rtol=0.0, atol=1e-5)

    position = posattn.TransformerXL(HEADS, DIM, bidirectional=True).double()
    columns = torch.cat([torch.arange(0, HEADS * DIM, 2), torch.arange(1, HEADS * DIM, 2)])
    state = {"u": layer.pos_bias_u, "v": layer.pos_bias_v, "rel.weight": layer.linear_pos.weight[:, columns]}
    position.load_state_dict(state)
    heads = [f(x).unflatten(-1, (HEADS, DIM)).transpose(1, 2) for f in (layer.linear_q, layer.linear_k, layer.linear_v)]
    out = layer.linear_out(attend(*heads, position).transpose(1, 2).flatten(-2))
    torch.testing.assert_close(out, expected)


def test_shaw_adds_clipped_rows_to_the_keys() -> None:
    position = made("ShawRelative")
    assert isinstance(position, posattn.ShawRelative)
    q, k, v = qkv()
    reach, weight = position.max_distance, position.weight
    assert reach < TOKENS - 1
    logits = torch.empty(2, HEADS, TOKENS, TOKENS, dtype=torch.float64)
    for i in range(TOKENS):
        for j in range(TOKENS):
            a = weight[min(max(j - i, -reach), reach) + reach]
            logits[:, :, i, j] = (q[:, :, i] * (k[:, :, j] + a)).sum(-1) / math.sqrt(DIM)
    torch.testing.assert_close(attend(q, k, v, position), logits.softmax(-1) @ v)


@pytest.mark.parametrize(("buckets", "most"), [(8, 16), (6, 40), (None, 5)], ids=str)
def test_it_is_debertas_attention(buckets: int | None, most: int) -> None:
    from transformers import DebertaV2Config
    from transformers.models.deberta_v2 import modeling_deberta_v2 as theirs

    tokens, span = 23, most if buckets is None else buckets
    config = DebertaV2Config(
        hidden_size=HEADS * DIM,
        num_attention_heads=HEADS,
        relative_attention=True,
        position_buckets=-1 if buckets is None else buckets,
        max_relative_positions=most,
        pos_att_type=["c2p", "p2c"],
        share_att_key=True,
    )
    torch.manual_seed(0)
    layer = theirs.DisentangledSelfAttention(config).double().eval()
    x, table = (torch.randn(n, HEADS * DIM, dtype=torch.float64) for n in (tokens, 2 * span))
    everything = torch.ones(1, 1, tokens, tokens)
    expected = layer(x[None], everything, rel_embeddings=table)[0]

    def heads(f: nn.Module, given: Tensor) -> Tensor:
        split: Tensor = f(given).unflatten(-1, (HEADS, DIM)).transpose(0, 1)
        return split

    shared = {"rel_k": heads(layer.key_proj, table), "rel_q": heads(layer.query_proj, table)}
    position = posattn.DeBERTa(HEADS, DIM, buckets, most, **shared)
    assert not list(position.parameters())
    q, k, v = (heads(f, x)[None] for f in (layer.query_proj, layer.key_proj, layer.value_proj))
    out = attend(q, k, v, position, scale=position.scale).transpose(1, 2).flatten(-2)
    torch.testing.assert_close(out, expected)
    ours, wanted = (torch.autograd.grad(y.square().sum(), layer.key_proj.weight)[0] for y in (out, expected))
    torch.testing.assert_close(ours, wanted)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("causal", [False, True])
def test_a_cache_documents_and_padding_give_what_each_text_does(name: str, causal: bool) -> None:
    position = made(name)
    q, k, v = qkv(batch=1)
    whole = attend(q, k, v, position, causal=causal)
    torch.testing.assert_close(attend(q[:, :, 5:], k, v, position, causal=causal), whole[:, :, 5:])
    parts = ((0, 4), (4, 9))
    alone = torch.cat([attend(*(x[:, :, a:b] for x in (q, k, v)), position, causal=causal) for a, b in parts], 2)
    cu = torch.tensor([0, 4, 9], dtype=torch.int32)
    torch.testing.assert_close(attend(q, k, v, position, causal=causal, cu_seqlens_q=cu, cu_seqlens_k=cu), alone)
    segments = torch.tensor([[0] * 4 + [1] * 5])
    torch.testing.assert_close(attend(q, k, v, position, causal=causal, segments=segments), alone)
    padded = [x.clone().index_fill_(2, torch.arange(4), torch.nan) for x in (k, v)]
    starts = torch.tensor([4])
    torch.testing.assert_close(attend(q, *padded, position, causal=causal, k_starts=starts)[:, :, 4:], alone[:, :, 4:])


@pytest.mark.parametrize("name", KINDS)
def test_grouped_heads_share_keys_and_not_rows(name: str) -> None:
    position = made(name)
    q, k, v = qkv()
    expected = attend(q, k[:, :1].expand_as(k), v[:, :1].expand_as(v), position)
    torch.testing.assert_close(attend(q, k[:, :1], v[:, :1], position), expected)


@pytest.mark.parametrize("name", KINDS)
def test_gradients(name: str) -> None:
    position = made(name)
    leaves = [x[:1, :, :4].clone().requires_grad_() for x in qkv()]
    assert torch.autograd.gradcheck(
        lambda q, k, v, *_: attend(q, k, v, position, softcap=3.0), (*leaves, *position.parameters()), atol=1e-6
    )


@pytest.mark.parametrize("name", KINDS)
def test_it_survives_serialization(name: str) -> None:
    q, k, v = qkv()
    position = made(name) + posattn.RelativeTable(HEADS, 4).double()
    plan = position.lower(Context.of(q, k, Mask()))
    flat = flatten(Call(q, k, v, plan, Mask(causal=True), scale=1.0), "cpu")
    back = unflatten(q, k, v, flat.operands, flat.ints, 1.0, 0.0, 0.0, flat.spec).plan
    assert back.relative == plan.relative
    assert back.bias == plan.bias


def test_biases_beside_it_add_and_tables_over_cells_do_not_move_it() -> None:
    position = made("TransformerXL bidirectional")
    q, k, v = qkv()
    alibi = posattn.ALiBi(HEADS).double()
    dense = alibi.bias(TOKENS, TOKENS)
    torch.testing.assert_close(attend(q, k, v, position + alibi), attend(q, k, v, position, bias=dense))
    cells = posattn.RelativeTable2D(HEADS, (3, 3)).double()
    nn.init.normal_(cells.weight)
    dense = cells.bias(TOKENS, TOKENS)
    for both in (position + cells, cells + position):
        torch.testing.assert_close(attend(q, k, v, both), attend(q, k, v, position, bias=dense))


def test_heads_of_a_shard_are_those_of_the_whole() -> None:
    q, k, v = qkv()
    for name in KINDS:
        position = made(name)
        some = attend(q[:, 1:], k[:, 1:], v[:, 1:], position.shard(1, 2))
        torch.testing.assert_close(some, attend(q, k, v, position)[:, 1:])


@pytest.mark.parametrize("backend", ["auto", "cpu", "cuda", "triton"])
def test_fused_backends_refuse_it(backend: str) -> None:
    q, k, v = qkv(dtype=torch.float32)
    with pytest.raises(ValueError, match="vector a distance" if backend in ("auto", "cpu") else "cannot run this call"):
        posattn.attention(q, k, v, posattn.ShawRelative(HEADS, DIM, 4), backend=backend)


class Given(posattn.encodings.Encoding):
    def __init__(self, *fields: Any, **more: Any) -> None:
        super().__init__()
        self.fields, self.more = fields, more

    def build(self, context: Context) -> Plan:
        return Plan(bias=Bias(), relative=RelativeKeys(*self.fields, **self.more))


def test_what_does_not_fit_is_refused() -> None:
    q, k, v = qkv()
    shaw, rows = made("ShawRelative"), torch.zeros(1, 5, DIM, dtype=torch.float64)
    cases: list[tuple[posattn.encodings.Encoding, str]] = [
        (posattn.ShawRelative(HEADS, 6, 2), "ShawRelative was made for head_dim=6, got 8"),
        (posattn.RoPE(DIM) + shaw, "expected no rotary beside relative keys"),
        (posattn.DAPE(shaw, HEADS), "expected no mix beside relative keys"),
        (posattn.LogitScale("log") + shaw, "expected no amplitude beside relative keys"),
        (Given(None, None, 0), "relative.q_rows or relative.k_rows .* got None"),
        (Given(rows, rows[:, 1:], 0), r"relative.k_rows .* of shape \[1, 5, 8\], got \[1, 4, 8\]"),
        (Given(rows, None, 0, v=rows[0]), r"relative.v .* of shape \[3, 8\], got \[5, 8\]"),
        (
            Given(rows, None, 0, torch.zeros(0, dtype=torch.int64)),
            r"relative.rows .* of shape \[distances\], got \[0\]",
        ),
    ]
    for position, message in cases:
        with pytest.raises(ValueError, match=message):
            attend(q, k, v, position)
    with pytest.raises(TypeError, match=r"relative.rows .* int64, got torch.int32"):
        attend(q, k, v, Given(rows, None, 0, torch.zeros(3, dtype=torch.int32)))
    with pytest.raises(ValueError, match=r"\+: expected at most one encoding of relative keys"):
        shaw + shaw
    with pytest.raises(ValueError, match="position: expected no relative keys, got some"):
        blocks.probe(shaw, HEADS, DIM, q.device)
    with pytest.raises(ValueError, match="dim: expected an even number"):
        posattn.TransformerXL(HEADS, DIM, 5)
    with pytest.raises(ValueError, match="rel_k, rel_q: expected both or neither"):
        posattn.DeBERTa(HEADS, DIM, 4, 16, rel_k=rows)
    with pytest.raises(ValueError, match=r"rel_k: expected a tensor \[3, 8, 8\], got \[1, 5, 8\]"):
        posattn.DeBERTa(HEADS, DIM, 4, 16, rows, rows)
    with pytest.raises(ValueError, match="buckets, max_position: expected at least 2"):
        posattn.DeBERTa(HEADS, DIM, 8, 5)
