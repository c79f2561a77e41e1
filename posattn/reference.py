"""The naive oracle: attention with dense logits in plain PyTorch, for every plan and every option of a `Call`.

It computes in the dtype of q, so float64 inputs give the value to compare with, and a narrower dtype gives the error
that naive PyTorch makes there. Autograd differentiates it. No backend imports it.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from posattn.plan import Bias, Call, Decay, Dense, Gated, HeadMix, Profile, RelativeKeys, Slope, Table
from posattn.positions import document_index, token_indices

NEG_INF = float("-inf")


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """Out [B, Hq, Tq, Dv] in q.dtype and log-sum-exp [B, Hq, Tq] float32 (float64 if q is float64).

    A query that sees no key gets zeros, zero gradients and a log-sum-exp of -inf (its sink, where there are sinks).
    """
    weights, lse = _softmax(call, None)
    if call.dropout_p > 0.0:
        weights = weights * _dropout_keep(call) / (1.0 - call.dropout_p)
    value = _repeat_heads(_hide_padding(call, call.v), call.q.shape[1])
    return weights @ value, lse.to(torch.promote_types(lse.dtype, torch.float32))


def weights(call: Call, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The softmax weights [B, Hq, rows, Tk] of these queries, int64 [rows], before any dropout, and their log-sum-exp
    [B, Hq, rows]: O(rows * Tk) memory."""
    return _softmax(call, rows)


def _softmax(call: Call, rows: Tensor | None) -> tuple[Tensor, Tensor]:
    """The softmax weights and the log-sum-exp of those queries; of all for None."""
    logits = _logits(call, rows)
    allowed = _allowed(call, rows)
    if allowed is not None:
        logits = logits.masked_fill(~allowed, NEG_INF)
    if call.sinks is not None:
        sink = call.sinks.to(logits.dtype)[None, :, None, None].expand(*logits.shape[:3], 1)
        logits = torch.cat([logits, sink], dim=-1)

    # Softmax of a row of -inf is NaN in value and in gradient, so such rows are set aside on both sides of it.
    empty = (logits == NEG_INF).all(dim=-1)
    finite = logits.masked_fill(empty[..., None], 0.0)
    weights = torch.softmax(finite, dim=-1).masked_fill(empty[..., None], 0.0)
    lse = torch.logsumexp(finite, dim=-1).masked_fill(empty, NEG_INF)
    if call.sinks is not None:
        weights = weights[..., :-1]
    return weights, lse


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Turn the pairs of x [B, H, T, D] by the angles of cos and sin [B or 1, T, rotary_dim / 2], or with a dimension of
    heads before T; the rest passes."""
    half = cos.shape[-1]
    if cos.dim() == 3:
        cos, sin = cos[:, None], sin[:, None]
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    turning, passing = x[..., : 2 * half], x[..., 2 * half :]
    if interleaved:
        first, second = turning[..., 0::2], turning[..., 1::2]
    else:
        first, second = turning[..., :half], turning[..., half:]
    turned = (first * cos - second * sin, first * sin + second * cos)
    joined = torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)
    return torch.cat([joined, passing], dim=-1)


def dense_bias(bias: Bias, q_positions: Tensor, k_positions: Tensor) -> Tensor:
    """The sum of a Bias's operands, [B or 1, H or 1, Tq, Tk], for positions [B or 1, Tq] and [B or 1, Tk]."""
    distance = q_positions[:, :, None] - k_positions[:, None, :]
    terms = []
    if bias.slope is not None:
        terms.append(_slope_bias(bias.slope, distance))
    if bias.table is not None:
        terms.append(_table_bias(bias.table, distance))
    if bias.profile is not None:
        terms.append(_profile_bias(bias.profile, distance, q_positions))
    if bias.dense is not None:
        terms.append(bias.dense.bias)
    if bias.decay is not None:
        terms.append(_decay_bias(bias.decay))
    if not terms:
        raise ValueError("dense_bias: expected a Bias with at least one operand, got an empty one")
    return sum(terms[1:], start=terms[0])


def philox_4x32_10(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Four random 32-bit words per counter, as int64 (Salmon et al. 2011, "Parallel random numbers", table 2)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # int64 products wrap like unsigned ones, and the masks drop the sign that the shift drags in.
        low, high = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (
            (high >> 32 & 0xFFFFFFFF) ^ c1 ^ k0,
            high & 0xFFFFFFFF,
            (low >> 32 & 0xFFFFFFFF) ^ c3 ^ k1,
            low & 0xFFFFFFFF,
        )
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def _positions(call: Call, rows: Tensor | None) -> tuple[Tensor, Tensor]:
    if call.q_positions is not None and call.k_positions is not None:
        return _of(rows, call.q_positions, 1), call.k_positions
    q_index, k_index, offset = _indices(call, rows)
    return q_index + offset, k_index


def _indices(call: Call, rows: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    q_index, k_index, offset = token_indices(call.q.shape[2], call.k.shape[2], call.q.device, call.mask)
    return _of(rows, q_index, 1), k_index, _of(rows, offset, 1)


def _of(rows: Tensor | None, x: Tensor, dim: int) -> Tensor:
    """x of those queries alone; what all queries share stays."""
    return x if rows is None or x.shape[dim] == 1 else x.index_select(dim, rows)


def _bias_of(rows: Tensor | None, bias: Bias) -> Bias:
    if rows is None:
        return bias
    dense = None if bias.dense is None else Dense(_of(rows, bias.dense.bias, 2))
    decay = None if bias.decay is None else replace(bias.decay, q=bias.decay.q.index_select(2, rows))
    return replace(bias, dense=dense, decay=decay)


def call_logits(call: Call) -> Tensor:
    """The logits [B, Hq, Tq, Tk] before the mask, O(N^2) memory: for looking at."""
    return _logits(call, None)


def _logits(call: Call, rows: Tensor | None) -> Tensor:
    plan = call.plan
    q, k = call.q, _hide_padding(call, call.k)
    if plan.rotary is not None:
        turn = plan.rotary
        q = rotate(q, turn.q_cos, turn.q_sin, turn.interleaved)
        k = rotate(k, turn.k_cos, turn.k_sin, turn.interleaved)
    if plan.amplitude is not None:
        q = q * plan.amplitude[..., None].to(q.dtype)
    q = q if rows is None else q.index_select(2, rows)
    scale = call.scale if call.scale_tensor is None else call.scale_tensor.to(q.device, q.dtype)
    q_positions, k_positions = _positions(call, rows)
    k = _repeat_heads(k, q.shape[1])
    logits = q @ k.transpose(-1, -2)
    if plan.relative is not None:
        logits = logits + _relative_keys(plan.relative, q, k, q_positions[:, :, None] - k_positions[:, None, :])
    logits = logits * scale
    if call.softcap:
        logits = call.softcap * torch.tanh(logits / call.softcap)
    if plan.mix is not None:
        inner = None
        if plan.mix.inner:
            inner = dense_bias(_bias_of(rows, plan.mix.inner), q_positions, k_positions).to(logits.dtype)
        logits = _mix_heads(plan.mix, logits, inner, call, rows)
    bias = None
    if plan.bias:
        bias = dense_bias(_bias_of(rows, plan.bias), q_positions, k_positions).to(logits.dtype)
    if plan.gated is not None:
        logits = logits + _at_gated_positions(plan.gated, logits, bias, call, rows)
    return logits if bias is None else logits + bias


def _relative_keys(operand: RelativeKeys, q: Tensor, k: Tensor, distance: Tensor) -> Tensor:
    """What relative keys add to q [B, H, Tq, D] times k [B, H, Tk, D], [B, H, Tq, Tk]; distance [B or 1, Tq, Tk]."""
    index = distance - operand.first
    if operand.rows is not None:
        index = operand.rows[index.clamp(0, operand.rows.shape[0] - 1)]

    def of(x: Tensor, table: Tensor, at: Tensor) -> Tensor:
        products = x @ table.to(x.dtype).mT  # [B, H, T, L]
        return products.gather(-1, at.clamp(0, table.shape[1] - 1)[:, None].expand(*x.shape[:3], -1))

    terms = []
    if operand.q_rows is not None:
        shifted = q if operand.v is None else q + operand.v[:, None].to(q.dtype)
        terms.append(of(shifted, operand.q_rows, index))
    if operand.k_rows is not None:
        terms.append(of(k, operand.k_rows, index.mT).mT)
    if operand.u is not None:
        terms.append((k @ operand.u[:, :, None].to(k.dtype)).mT)
    return sum(terms[1:], start=terms[0])


def _at_gated_positions(gated: Gated, logits: Tensor, bias: Tensor | None, call: Call, rows: Tensor | None) -> Tensor:
    """q . e [B, H, Tq, Tk] at the positions that the gates of these logits add up to, in float32 at least: sums of
    gates in bfloat16 would be whole numbers from 128 on."""
    gates = torch.sigmoid(logits.to(torch.promote_types(logits.dtype, torch.float32)))
    allowed = _allowed(call, rows)
    if allowed is not None:
        gates = gates.masked_fill(~allowed, 0.0)
    if bias is not None:
        gates = gates.masked_fill(bias == NEG_INF, 0.0)
    last = gated.weight.shape[1] - 1
    positions = gates.flip(-1).cumsum(-1).flip(-1).clamp(max=last)
    below, above = positions.floor().long(), positions.ceil().long()
    share = positions - below
    products = _of(rows, call.q, 2).to(share.dtype) @ gated.weight.to(share.dtype).mT  # [B, H, Tq, L]
    added = products.gather(-1, below) * (1.0 - share) + products.gather(-1, above) * share
    if gated.scaled:
        added = added * (call.scale if call.scale_tensor is None else call.scale_tensor.to(added.device, added.dtype))
    return added.to(logits.dtype)


def _mix_heads(mix: HeadMix, logits: Tensor, inner: Tensor | None, call: Call, rows: Tensor | None) -> Tensor:
    biased = logits if inner is None else logits + inner
    features = biased if inner is None or mix.form == "add" else torch.cat([logits, inner.expand_as(logits)], dim=1)
    w1, b1, w2, b2 = (t.to(logits.dtype) for t in (mix.w1, mix.b1, mix.w2, mix.b2))
    if w1.dim() == 3:
        mixed = _convolved(mix, features, call, rows)
    else:
        hidden = F.leaky_relu(F.linear(features.movedim(1, -1), w1, b1), 0.01)
        mixed = F.linear(hidden, w2, b2).movedim(-1, 1)
    return (logits if mix.form == "concat" else biased) + mixed


def _convolved(mix: HeadMix, features: Tensor, call: Call, rows: Tensor | None) -> Tensor:
    """f [B, H, Tq, Tk] of features [B, C, Tq, Tk], both layers convolved along the keys."""
    w1, b1, w2, b2 = (t.to(features.dtype) for t in (mix.w1, mix.b1, mix.w2, mix.b2))
    allowed = _allowed(call, rows)
    if allowed is not None:
        by_head = allowed if allowed.shape[1] == 1 else allowed.repeat(1, features.shape[1] // call.q.shape[1], 1, 1)
        features = features.masked_fill(~by_head, 0.0)
    half = w1.shape[2] // 2
    past = half if mix.edge == "causal" else 0  # columns of the hidden layer past the last key
    hidden = F.leaky_relu(F.conv2d(F.pad(features, (half, half + past)), w1[:, :, None], b1), 0.01)
    own = _of_sequence(call, rows)
    if own:
        before = torch.stack([condition.cumsum(-1) == 0 for condition in own]).any(0)
        hidden = hidden.masked_fill(F.pad(before, (0, past))[:, None], 0.0)
    return F.conv2d(F.pad(hidden, (half, half - past)), w2[:, :, None], b2)


def _slope_bias(operand: Slope, distance: Tensor) -> Tensor:
    slope = operand.slope if operand.slope.dim() == 2 else operand.slope[None]
    return -slope[:, :, None, None] * (distance if operand.signed else distance.abs())[:, None]


def _table_bias(operand: Table, distance: Tensor) -> Tensor:
    index = (distance - operand.first).clamp(0, operand.values.shape[1] - 1)
    return operand.values[:, index].movedim(0, 1)


def _decay_bias(operand: Decay) -> Tensor:
    return operand.q.double()[:, :, :, None] - operand.k.double()[:, :, None, :]


def _profile_bias(operand: Profile, distance: Tensor, q_positions: Tensor) -> Tensor:
    psi = operand.psi[(distance - operand.first).clamp(0, operand.psi.shape[0] - 1)]
    row_scale = operand.row_scale[(q_positions - operand.row_first).clamp(0, operand.row_scale.shape[0] - 1)]
    y = psi * row_scale[:, :, None]
    segment = torch.searchsorted(operand.knots, y.detach())
    return (operand.segment_slope[:, segment] * y + operand.segment_intercept[:, segment]).movedim(0, 1)


def _allowed(call: Call, rows: Tensor | None) -> Tensor | None:
    """True where a query may see a key, [B or 1, H or 1, Tq, Tk]; None if it always may."""
    mask = call.mask
    q_index, k_index, offset = _indices(call, rows)
    i, j = (q_index + offset)[:, :, None], k_index[:, None, :]
    conditions = []
    if mask.causal:
        conditions.append(j <= i)
    if mask.left is not None:
        conditions.append(j >= i - mask.left)
    if mask.right is not None:
        conditions.append(j <= i + mask.right)
    allowed = [c[:, None] for c in (*conditions, *_of_sequence(call, rows))]
    if mask.boolean is not None:
        allowed.append(_of(rows, mask.boolean, 2))
    result = None
    for condition in allowed:
        result = condition if result is None else result & condition
    return result


def _of_sequence(call: Call, rows: Tensor | None) -> list[Tensor]:
    """Conditions [B or 1, Tq or 1, Tk], true for the keys of a query's own sequence: in its row, or in its document."""
    mask = call.mask
    conditions = []
    hidden = _hidden(call)
    if hidden is not None:
        conditions.append(~hidden[:, None, :])
    if mask.cu_seqlens_q is not None and mask.cu_seqlens_k is not None:
        q_document = _of(rows, document_index(mask.cu_seqlens_q, call.q.shape[2]), 0)
        k_document = document_index(mask.cu_seqlens_k, call.k.shape[2])
        conditions.append((q_document[:, None] == k_document[None, :])[None])
    if mask.q_segments is not None and mask.k_segments is not None:
        q_segment, k_segment = _of(rows, mask.q_segments, 1)[:, :, None], mask.k_segments[:, None, :]
        conditions.append((q_segment == k_segment) & (q_segment >= 0))
    return conditions


def _hidden(call: Call) -> Tensor | None:
    """True for keys before k_starts and from k_lengths on, [B, Tk]; None if there are none."""
    mask = call.mask
    index = torch.arange(call.k.shape[2], device=call.k.device)
    before = None if mask.k_starts is None else index < mask.k_starts[:, None]
    past = None if mask.k_lengths is None else index >= mask.k_lengths[:, None]
    return past if before is None else before if past is None else before | past


def _hide_padding(call: Call, x: Tensor) -> Tensor:
    """Zero the hidden keys: a cache may hold anything there, and 0 * NaN would be NaN."""
    hidden = _hidden(call)
    return x if hidden is None else x.masked_fill(hidden[:, None, :, None], 0.0)


def _repeat_heads(x: Tensor, heads: int) -> Tensor:
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def _dropout_keep(call: Call) -> Tensor:
    if call.seed is None:
        raise ValueError("seed: expected an int64 [1] tensor where dropout_p > 0, got None")
    batch, heads, q_len, _ = call.q.shape
    k_len = call.k.shape[2]
    seed = int(call.seed)
    device = call.q.device
    group = torch.arange((k_len + 3) // 4, device=device)[None, None, :]
    row = torch.arange(q_len, device=device)[None, :, None]
    head = torch.arange(batch * heads, device=device)[:, None, None]
    words = philox_4x32_10((group, row, head, torch.zeros_like(group)), (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF))
    lanes = torch.stack(words, dim=-1).flatten(-2)[..., :k_len]
    keep = lanes >= math.ceil(call.dropout_p * 2**32)
    return keep.reshape(batch, heads, q_len, k_len).to(call.q.dtype)
