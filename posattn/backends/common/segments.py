"""Documents given as numbers of tokens (Mask.q_segments, k_segments), for backends whose kernels take offsets of packed
documents: a call is run row by row, each row with the offsets that its numbers say. Finding them waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from posattn.backends.common.strides import rows_like
from posattn.plan import Bias, Call, Dense, HeadMix, Mask, Plan, Rotary

Forward = Callable[[Call], tuple[Tensor, Tensor]]
Backward = Callable[[Call, Tensor, Tensor, Tensor, "Tensor | None", "frozenset[str]"], "dict[str, Tensor]"]

_BY_TOKEN = ("q", "k", "v")


def unsupported(call: Call) -> str | None:
    """Why a call with segments cannot be run row by row; None if it can, or has none."""
    if call.mask.q_segments is not None and call.dropout_p and call.q.shape[0] > 1:
        return "it runs segments row by row, where dropout would draw every row's mask anew; use cu_seqlens"
    return None


def forward(call: Call, run: Forward) -> tuple[Tensor, Tensor]:
    """`run` over the rows of `call`."""
    if call.mask.q_segments is None:
        return run(call)
    out = rows_like(call, call.v.shape[3], lambda shape: torch.empty(shape, dtype=call.q.dtype, device=call.q.device))
    lse = torch.empty(call.q.shape[:3], dtype=torch.float32, device=call.q.device)
    for b, row in enumerate(_rows(call)):
        out[b : b + 1], lse[b : b + 1] = run(row)
    return out, lse


def backward(
    call: Call,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    needs: frozenset[str],
    run: Backward,
) -> dict[str, Tensor]:
    """`run` over the rows of `call`; what rows share adds up in their order."""
    if call.mask.q_segments is None:
        return run(call, out, lse, grad_out, grad_lse, needs)
    each = []
    for b, row in enumerate(_rows(call)):
        of_row = slice(b, b + 1)
        of_lse = None if grad_lse is None else grad_lse[of_row]
        each.append(run(row, out[of_row], lse[of_row], grad_out[of_row], of_lse, needs))
    return {name: _joined(call, name, [grads[name] for grads in each]) for name in needs}


def _joined(call: Call, name: str, grads: list[Tensor]) -> Tensor:
    own = name.removeprefix("inner.")
    bias = call.plan.mix.inner if own != name and call.plan.mix is not None else call.plan.bias
    if (
        own in _BY_TOKEN
        or (own == "slope" and bias.slope is not None and bias.slope.slope.dim() == 2)
        or (own == "dense" and bias.dense is not None and bias.dense.bias.shape[0] > 1)
    ):
        return torch.cat(grads)
    return sum(grads[1:], start=grads[0])


def _rows(call: Call) -> list[Call]:
    mask, rows = call.mask, []
    if mask.q_segments is None or mask.k_segments is None:
        raise ValueError("segments: expected those of queries and of keys, got none")
    documents = zip(mask.q_segments.tolist(), mask.k_segments.tolist())
    for b, (of_queries, of_keys) in enumerate(documents):
        cu_q, cu_k = _offsets(of_queries, of_keys)
        row = slice(b, b + 1)
        rows.append(
            replace(
                call,
                q=call.q[row],
                k=call.k[row],
                v=call.v[row],
                plan=_plan_of_row(call.plan, b),
                mask=Mask(
                    causal=mask.causal,
                    left=mask.left,
                    right=mask.right,
                    boolean=_of_row(mask.boolean, b),
                    cu_seqlens_q=torch.tensor(cu_q, dtype=torch.int32, device=call.q.device),
                    cu_seqlens_k=torch.tensor(cu_k, dtype=torch.int32, device=call.q.device),
                    max_q=max(end - start for start, end in pairwise(cu_q)),
                    max_k=max(end - start for start, end in pairwise(cu_k)),
                ),
                q_positions=_of_row(call.q_positions, b),
                k_positions=_of_row(call.k_positions, b),
            )
        )
    return rows


def _offsets(of_queries: list[int], of_keys: list[int]) -> tuple[list[int], list[int]]:
    """cu_seqlens of documents in the order in which both sides have them; a run that the other side lacks is a document
    of its own, as is every run of tokens without one."""
    q_runs, k_runs = _runs(of_queries), _runs(of_keys)
    shared = [number for number, _ in q_runs if number >= 0 and any(number == other for other, _ in k_runs)]
    if shared != [number for number, _ in k_runs if number in set(shared)]:
        raise ValueError("segments: expected the documents of queries and of keys in one order, got two")
    cu_q, cu_k = [0], [0]
    in_both = set(shared)
    i = j = 0
    while i < len(q_runs) or j < len(k_runs):
        if i < len(q_runs) and q_runs[i][0] not in in_both:
            cu_q.append(q_runs[i][1])
            cu_k.append(cu_k[-1])
            i += 1
        elif j < len(k_runs) and k_runs[j][0] not in in_both:
            cu_q.append(cu_q[-1])
            cu_k.append(k_runs[j][1])
            j += 1
        else:
            cu_q.append(q_runs[i][1])
            cu_k.append(k_runs[j][1])
            i, j = i + 1, j + 1
    return cu_q, cu_k


def _runs(row: list[int]) -> list[tuple[int, int]]:
    """(number, end) of every run."""
    found: list[tuple[int, int]] = []
    for t, number in enumerate(row):
        if found and found[-1][0] == number:
            found[-1] = number, t + 1
        else:
            found.append((number, t + 1))
    return found


def _of_row(x: Tensor | None, b: int) -> Tensor | None:
    return x if x is None else _entry(x, b)


def _entry(x: Tensor, b: int) -> Tensor:
    """Row b of x, or x itself where it serves every row."""
    return x if x.shape[0] == 1 else x[b : b + 1]


def _plan_of_row(plan: Plan, b: int) -> Plan:
    rotary, mix = plan.rotary, plan.mix
    if rotary is not None:
        cos_sin = (rotary.q_cos, rotary.q_sin, rotary.k_cos, rotary.k_sin)
        q_cos, q_sin, k_cos, k_sin = (_entry(x, b) for x in cos_sin)
        rotary = Rotary(q_cos, q_sin, k_cos, k_sin, rotary.interleaved)
    if mix is not None:
        mix = HeadMix(mix.w1, mix.b1, mix.w2, mix.b2, mix.form, _bias_of_row(mix.inner, b))
    return Plan(rotary, mix, _bias_of_row(plan.bias, b))


def _bias_of_row(bias: Bias, b: int) -> Bias:
    slope, dense = bias.slope, bias.dense
    if slope is not None and slope.slope.dim() == 2:
        slope = replace(slope, slope=slope.slope[b : b + 1])
    if dense is not None:
        dense = Dense(_entry(dense.bias, b))
    return replace(bias, slope=slope, dense=dense)
