"""The CPU backend: hands a `Call`'s tensors to the native kernels of csrc/cpu as addresses and strides, in a struct
Problem that is laid out as the module's own text of problem.h says.

The native module knows no tensor type, so one build serves every torch. Everything that a kernel will read is proved
in bounds by posattn/validation.py before it comes here.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from posattn.backends.common import mixes
from posattn.backends.common.reductions import sink_gradient
from posattn.backends.common.strides import rows_like, steps
from posattn.backends.common.structs import Header
from posattn.plan import Bias, Call, HeadMix, Rotary

try:
    from posattn import _cpu as native
except ImportError as error:  # a source tree that was never built: every other backend still works
    native = None
    _missing = str(error)

MAX_HEAD_DIM = 1024  # MAX_WIDTH of pack.h
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # DType of problem.h
_FORMS = {"concat-residual": 0, "concat": 1, "add": 2}  # MixForm
_CPU = torch.device("cpu")
# Bytes from which a result is sure to hold a 2 MB page.
_HUGE = 4 << 20

Struct = Any  # a struct of problem.h


def unsupported(call: Call) -> str | None:
    """Why this backend cannot run `call`, or None."""
    if native is None:
        return f"the native module posattn._cpu is not built ({_missing})"
    q, v = call.q, call.v
    if not q.is_cpu:
        return f"it runs on CPU tensors, and query is on {q.device}"
    if q.dtype not in _DTYPES:
        return f"it computes float32, bfloat16 and float16, and query is {q.dtype}"
    if max(q.shape[-1], v.shape[-1]) > MAX_HEAD_DIM:
        return f"head dimensions go up to {MAX_HEAD_DIM}, and these are {q.shape[-1]} and {v.shape[-1]}"
    return mixes.unsupported(call)


def unsupported_pages(call: Call) -> str | None:
    """Why keys in pages are gathered before the kernels run; None if they read through the block table."""
    if any(x.stride(-1) != 1 and x.shape[-1] > 1 for x in (call.k, call.v)):
        return "the last dimension of these pages is not contiguous, and a copy of the pool would be larger"
    return None


@cache
def _structs() -> tuple[Struct, Struct, Struct]:
    """Problem, View and Append, laid out as in the build that is loaded."""
    structs = Header("problem.h", native.PROBLEM_H).structs
    if (size := ctypes.sizeof(structs["Problem"])) != len(native.BLANK):
        raise RuntimeError(f"problem.h: expected a Problem of {len(native.BLANK)} bytes, as compiled, got {size}")
    return structs["Problem"], structs["View"], structs["Append"]


class _Binding:
    """A Problem together with the tensors whose memory it points at."""

    def __init__(self, call: Call) -> None:
        problem, self._view, _ = _structs()
        self.problem = problem.from_buffer_copy(native.BLANK)
        self.keep: list[Tensor] = []
        self._call(call)

    def address(self, tensor: Tensor | None, dtype: torch.dtype = torch.float32) -> int:
        if tensor is None:
            return 0
        if tensor.dtype != dtype or not tensor.is_contiguous():
            tensor = tensor.detach().to(dtype).contiguous()
        self.keep.append(tensor)
        return tensor.data_ptr()

    def view(self, tensor: Tensor) -> Struct:
        """A [B, H, T, D] tensor with contiguous rows; dimensions of size one broadcast."""
        batch, head, row, step = tensor.stride()
        if step != 1 and tensor.shape[-1] > 1:
            tensor = tensor.contiguous()
            batch, head, row, _ = tensor.stride()
        self.keep.append(tensor)
        return self._view(tensor.data_ptr(), batch, head, row, _DTYPES[tensor.dtype])

    def broadcast_view(self, tensor: Tensor, dtype: int) -> tuple[Struct, int]:
        """A tensor that broadcasts to [B, H, Tq, Tk], and its stride over keys."""
        self.keep.append(tensor)
        batch, head, row, key = steps(tensor)
        return self._view(tensor.data_ptr(), batch, head, row, dtype), key

    def _call(self, call: Call) -> None:
        p, q, k, v, mask = self.problem, call.q, call.k, call.v, call.mask
        p.batch, p.heads, p.q_len, p.head_dim = q.shape
        p.kv_heads, p.k_len, p.value_dim = k.shape[1], call.k_tokens, v.shape[3]
        p.q, p.k, p.v = self.view(q), self.view(k), self.view(v)
        p.scale = call.scale
        if call.softcap:
            p.softcap = call.softcap
        p.threads = torch.get_num_threads()
        p.two_parts = torch.get_float32_matmul_precision() == "medium"
        if call.block_table is not None:
            p.block_table, p.block_entries = self.address(call.block_table, torch.int32), call.block_table.shape[1]
            p.pages, p.page = k.shape[0], k.shape[2]
        if call.sinks is not None:
            p.sinks = self.address(call.sinks)
        p.causal = mask.causal
        if mask.left is not None:
            p.left = mask.left
        if mask.right is not None:
            p.right = mask.right
        if mask.boolean is not None:
            p.boolean, p.boolean_key = self.broadcast_view(mask.boolean.view(torch.uint8), 0)
        if mask.cu_seqlens_q is not None:
            p.lengths.cu_seqlens_q = self.address(mask.cu_seqlens_q, torch.int32)
            p.lengths.cu_seqlens_k = self.address(mask.cu_seqlens_k, torch.int32)
            p.lengths.documents = mask.cu_seqlens_q.shape[0] - 1
        elif mask.q_segments is not None:
            p.lengths.q_segments = self.address(mask.q_segments, torch.int32)
            p.lengths.k_segments = self.address(mask.k_segments, torch.int32)
        elif mask.k_lengths is not None or mask.k_starts is not None:
            p.lengths.k_lengths = self.address(mask.k_lengths, torch.int32)
            p.lengths.k_starts = self.address(mask.k_starts, torch.int32)
        if isinstance(mask.offset, Tensor):
            p.lengths.offsets = self.address(mask.offset, torch.int32)
        elif mask.offset is not None:
            p.lengths.has_offset, p.lengths.offset = True, mask.offset
        if call.q_positions is not None and call.k_positions is not None:
            p.q_positions, p.q_positions_batch = self._batched(call.q_positions, torch.int64)
            p.k_positions, p.k_positions_batch = self._batched(call.k_positions, torch.int64)
        if call.dropout_p and call.seed is not None:
            p.dropout_p, p.seed = call.dropout_p, int(call.seed.item()) & 0xFFFFFFFFFFFFFFFF
        plan = call.plan
        if plan.rotary is not None:
            self._rotary(plan.rotary)
        if plan.bias:
            self.bias(p.bias, plan.bias)
        if plan.mix is not None:
            p.mix = True
            self._mix(p.head_mix, plan.mix)

    def _batched(self, tensor: Tensor, dtype: torch.dtype) -> tuple[int, int]:
        """The address of a [B or 1, ...] tensor and its batch stride, 0 where it broadcasts."""
        return self.address(tensor, dtype), 0 if tensor.shape[0] == 1 else tensor[0].numel()

    def _rotary(self, rotary: Rotary) -> None:
        to = self.problem.rotary
        to.q_cos, to.q_batch = self._batched(rotary.q_cos, torch.float32)
        to.q_sin = self.address(rotary.q_sin)
        to.k_cos, to.k_batch = self._batched(rotary.k_cos, torch.float32)
        to.k_sin = self.address(rotary.k_sin)
        to.half, to.interleaved = rotary.q_cos.shape[-1], rotary.interleaved

    def bias(self, to: Struct, bias: Bias) -> None:
        if bias.slope is not None:
            slope = bias.slope.slope
            to.slope, to.slope_signed = self.address(slope), bias.slope.signed
            to.slope_batch = 0 if slope.dim() == 1 else slope.shape[1]
        if bias.table is not None:
            to.table, to.table_first = self.address(bias.table.values), bias.table.first
            to.table_len = bias.table.values.shape[1]
        if bias.profile is not None:
            f = bias.profile
            to.psi, to.psi_len, to.psi_first = self.address(f.psi), f.psi.shape[0], f.first
            to.row_scale, to.row_len, to.row_first = self.address(f.row_scale), f.row_scale.shape[0], f.row_first
            to.knots, to.n_knots = self.address(f.knots), f.knots.shape[0]
            to.segment_slope, to.segment_intercept = self.address(f.segment_slope), self.address(f.segment_intercept)
        if bias.dense is not None:
            dense = bias.dense.bias.detach()
            dense = dense if dense.dtype in _DTYPES else dense.float()
            to.dense, to.dense_key = self.broadcast_view(dense, _DTYPES[dense.dtype])
        if bias.decay is not None:
            p = self.problem
            to.decay_q = self.address(bias.decay.q.expand(p.batch, p.heads, -1), torch.float64)
            to.decay_k = self.address(bias.decay.k.expand(p.batch, p.heads, -1), torch.float64)

    def _mix(self, to: Struct, mix: HeadMix) -> None:
        to.w1, to.b1, to.w2, to.b2 = (self.address(x) for x in (mix.w1, mix.b1, mix.w2, mix.b2))
        to.width, to.inputs = mix.w1.shape
        to.form, to.has_inner = _FORMS[mix.form], bool(mix.inner)
        self.bias(to.inner, mix.inner)


def appends(new: Tensor, pool: Tensor) -> bool:
    """Whether `append` can put these tokens into that pool."""
    for x in (new, pool):
        if type(x) is not Tensor or x.device.type != "cpu" or x.stride(-1) != 1 or x.is_neg():
            return False
    return native is not None and new.dtype == pool.dtype in _DTYPES and new.shape[-1] <= MAX_HEAD_DIM


def append(new: Tensor, pool: Tensor, index: Tensor, turn: tuple[Tensor, Tensor, bool] | None) -> None:
    """Put tokens of new [B, H, T, D] into pool [pages, page, H, D] in one pass.

    index int64 [3, tokens] has each token's batch entry, its place in new, and its slot in the pool; turn is cos and
    sin float32 [tokens, half] and whether pairs are interleaved, or None.
    """
    _, view, tokens = _structs()
    index, pages = index.contiguous(), pool.transpose(1, 2)
    given = tokens(
        source=view(new.data_ptr(), *new.stride()[:3], _DTYPES[new.dtype]),
        to=view(pages.data_ptr(), *pages.stride()[:3], _DTYPES[pool.dtype]),
        tokens=index.shape[1],
        heads=new.shape[1],
        width=new.shape[3],
        page=pool.shape[1],
        entries=index[0].data_ptr(),
        sources=index[1].data_ptr(),
        slots=index[2].data_ptr(),
        threads=torch.get_num_threads(),
    )
    if turn is not None:
        cos, sin = (x.contiguous() for x in turn[:2])
        given.cos, given.sin, given.half, given.interleaved = cos.data_ptr(), sin.data_ptr(), cos.shape[-1], turn[2]
    native.append(given)
    if not pool.is_inference():
        torch.autograd.graph.increment_version(pool)  # as torch's own writes do


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Uninitialised memory for a result; tests replace it to fill results with NaN beforehand."""
    result = torch.empty(shape, dtype=dtype, device=_CPU)  # whatever torch.set_default_device says
    if (size := result.numel() * result.element_size()) >= _HUGE:
        native.prefer_huge_pages(result.data_ptr(), size)
    return result


def _zeros(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    return empty(shape, dtype).zero_()


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """out [B, Hq, Tq, Dv] in the query's dtype and lse [B, Hq, Tq] float32."""
    binding = _Binding(call)
    batch, heads, q_len, _ = call.q.shape
    out = rows_like(call, call.v.shape[-1], lambda shape: empty(shape, call.q.dtype))
    lse = empty((batch, heads, q_len), torch.float32)
    binding.problem.out, binding.problem.lse = binding.view(out), lse.data_ptr()
    native.forward(binding.problem)
    return out, lse


def backward(
    call: Call, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None, needs: frozenset[str]
) -> dict[str, Tensor]:
    """Gradients by operand name (posattn/plan.py). Every sum has one order, whatever the number of threads."""
    binding = _Binding(call)
    p, (batch, heads, q_len, _) = binding.problem, call.q.shape
    grads: dict[str, Tensor] = {}
    p.out, p.lse = binding.view(out), binding.address(lse)
    p.grad_out = binding.view(grad_out.to(call.q.dtype))
    p.grad_lse = binding.address(grad_lse)
    delta = empty((batch, heads, q_len), torch.float32)
    p.delta = delta.data_ptr()
    if "q" in needs:
        grads["q"] = empty(call.q.shape, call.q.dtype)
        # float32 gradients are summed in place; the others in a float32 copy that is rounded once at the end.
        total = grads["q"].zero_() if call.q.dtype == torch.float32 else _zeros(call.q.shape)
        binding.keep.append(total)
        p.grad_q, p.grad_q_sum = binding.view(grads["q"]), total.data_ptr()
    # Keys outside a sequence's bounds, those that its offset hides from all its queries, and those of a document
    # without queries are in no task.
    mask = call.mask
    bounds = (mask.k_lengths, mask.k_starts, mask.cu_seqlens_q, mask.offset, mask.q_segments)
    covered = q_len > 0 and all(x is None for x in bounds)
    for name, tensor in (("k", call.k), ("v", call.v)):
        if name in needs:
            grads[name] = empty(tensor.shape, tensor.dtype) if covered else _zeros(tensor.shape, tensor.dtype)
            setattr(p, f"grad_{name}", binding.view(grads[name]))
    _bias_grads(p.bias, call.plan.bias, "", call, needs, grads)
    if call.plan.mix is not None:
        _bias_grads(p.head_mix.inner, call.plan.mix.inner, "inner.", call, needs, grads)
        for name in ("w1", "b1", "w2", "b2"):
            if name in needs:
                grads[name] = _zeros(getattr(call.plan.mix, name).shape)
                setattr(p.head_mix, f"grad_{name}", grads[name].data_ptr())
    native.backward(p)
    if "sinks" in needs and call.sinks is not None:
        grads["sinks"] = sink_gradient(call.sinks, lse, delta)
    decay = call.plan.bias.decay
    if decay is not None:
        for name, part in (("decay_q", decay.q), ("decay_k", decay.k)):
            if name in needs:
                grads[name] = grads[name].sum_to_size(part.shape)
    for name, operand in (("slope", call.plan.bias.slope), ("inner.slope", _inner(call).slope)):
        if name in grads and operand is not None and operand.slope.dim() == 1:
            grads[name] = grads[name].sum(0)
    return grads


def _inner(call: Call) -> Bias:
    return Bias() if call.plan.mix is None else call.plan.mix.inner


def _bias_grads(
    to: Struct, bias: Bias, prefix: str, call: Call, needs: frozenset[str], grads: dict[str, Tensor]
) -> None:
    """Zeroed sums for the wanted gradients of one `Bias`, in `grads` and in the native struct."""

    def want(name: str, operand: Tensor | None, shape: Sequence[int], field: str) -> None:
        if operand is not None and prefix + name in needs:
            grads[prefix + name] = _zeros(shape)
            setattr(to, field, grads[prefix + name].data_ptr())

    if bias.slope is not None:
        want("slope", bias.slope.slope, call.q.shape[:2], "grad_slope")
    if bias.table is not None:
        want("table", bias.table.values, bias.table.values.shape, "grad_table")
    if bias.profile is not None:
        f = bias.profile
        want("psi", f.psi, f.psi.shape, "grad_psi")
        want("row_scale", f.row_scale, f.row_scale.shape, "grad_row_scale")
        want("segment_slope", f.segment_slope, f.segment_slope.shape, "grad_segment_slope")
        want("segment_intercept", f.segment_intercept, f.segment_intercept.shape, "grad_segment_intercept")
    if bias.decay is not None and needs & {prefix + "decay_q", prefix + "decay_k"}:
        for name, operand in (("decay_q", bias.decay.q), ("decay_k", bias.decay.k)):
            grads[prefix + name] = _zeros((*call.q.shape[:2], operand.shape[2]))
            setattr(to, f"grad_{name}", grads[prefix + name].data_ptr())
    if bias.dense is not None:
        dense = bias.dense.bias
        want("dense", dense, dense.shape, "grad_dense")
        if prefix + "dense" in grads:
            to.grad_dense_batch, to.grad_dense_head, to.grad_dense_row, to.grad_dense_key = steps(
                grads[prefix + "dense"]
            )
