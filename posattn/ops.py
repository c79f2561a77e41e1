"""The operators posattn::attention_forward and posattn::attention_backward, and the shorter way round them.

torch.compile, torch.export, opcheck, functorch and dispatch modes see the operators. An eager call on plain tensors
goes through a torch.autograd.Function over the same two functions instead, which spares the dispatcher's Python layers
(about half of a small call's time). There are no second derivatives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from posattn import backends, reference
from posattn.backends.common.strides import rows, rows_like
from posattn.paging import gathered_call
from posattn.plan import Call
from posattn.serialize import DIFFERENTIABLE, MAX_K, flatten, parse, unflatten
from posattn.turning import in_front, scaled, turned

_CALL = (
    "Tensor q, Tensor k, Tensor v, Tensor[] operands, SymInt[] ints, float scale, float softcap, float dropout_p, "
    "str spec"
)
torch.library.define(
    "posattn::attention_forward", f"({_CALL}) -> (Tensor, Tensor)", tags=(torch.Tag.pt2_compliant_tag,)
)
torch.library.define(
    "posattn::attention_backward",
    f"({_CALL}, Tensor out, Tensor lse, Tensor grad_out, Tensor? grad_lse, str needs) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)

_PLAIN_TYPES = (Tensor, torch.nn.Parameter)
_NO_SECOND_DERIVATIVE = 'posattn attention has no second derivative; backend="reference", plain PyTorch, has one'

Numbers: TypeAlias = "tuple[float, float, float, str]"  # scale, softcap, dropout_p, spec


def attend(call: Call, backend: str) -> tuple[Tensor, Tensor]:
    """out [B, Hq, Tq, Dv] and the log-sum-exp [B, Hq, Tq] of a checked call; differentiable."""
    if backends.goes_to_reference(call, backend):
        return reference.forward(gathered_call(call))
    call = scaled(call)
    if call.plan.rotary is not None and in_front(call.plan.rotary):
        call = turned(gathered_call(call))
    tensors: tuple[Tensor, ...] = (call.q, call.k, call.v)
    if _is_bare(call) and not _needs_dispatcher(tensors) and not _wants_gradients(tensors):
        return _run_forward(call, backend)
    flat = flatten(call, backend)
    tensors = (*tensors, *flat.operands)
    if call.block_table is not None and (_wants_gradients(tensors) or torch._C._are_functorch_transforms_active()):
        call = gathered_call(call)
        flat = flatten(call, backend)
        tensors = (call.q, call.k, call.v, *flat.operands)
    numbers = (call.scale, call.softcap, call.dropout_p, flat.spec)
    found: Any
    if _needs_dispatcher(tensors):
        found = torch.ops.posattn.attention_forward.default(*tensors[:3], flat.operands, flat.ints, *numbers)
    elif torch._C._are_functorch_transforms_active():
        found = _Attend.apply(flat.ints, numbers, *tensors)  # type: ignore[no-untyped-call]
    elif _wants_gradients(tensors):
        found = _EagerAttend.apply(call, flat.ints, numbers, *tensors)  # type: ignore[no-untyped-call]
    else:
        found = _run_forward(call, backend)
    out, lse = found
    return out, lse


def attend_known(call: Call, backend: str, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """As `attend`, where out and lse are known: those of the call's rows over its keys and more. Gradients are the
    share that these keys have in them; nothing is computed before. For eager calls on plain tensors, not the reference.
    """
    call = scaled(call)
    if call.plan.rotary is not None and in_front(call.plan.rotary):
        call = turned(call)
    flat = flatten(call, backend)
    numbers = (call.scale, call.softcap, call.dropout_p, flat.spec)
    tensors = (call.q, call.k, call.v, *flat.operands)
    found: Any = _KnownAttend.apply(out, lse, flat.ints, numbers, *tensors)  # type: ignore[no-untyped-call]
    return found[0], found[1]


def _is_bare(call: Call) -> bool:
    """Whether a call has no tensor but q, k and v, so that an eager one needs no flat form to be looked at."""
    plan, mask = call.plan, call.mask
    return (
        plan.rotary is None
        and plan.mix is None
        and plan.gated is None
        and plan.relative is None
        and not plan.bias
        and mask.boolean is None
        and mask.k_lengths is None
        and mask.k_starts is None
        and mask.cu_seqlens_q is None
        and mask.q_segments is None
        and not isinstance(mask.offset, Tensor)
        and call.sinks is None
        and call.q_positions is None
        and call.seed is None
        and call.scale_tensor is None
        and call.block_table is None
        and not torch._C._are_functorch_transforms_active()
    )


def _wants_gradients(tensors: Sequence[Tensor]) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _needs_dispatcher(tensors: Sequence[Tensor]) -> bool:
    """True if a compiler, a mode, the meta device or a tensor subclass has to see the operator."""
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or tensors[0].is_meta
        or any(map(_is_not_plain, tensors))
    ):
        return True
    if torch._C._get_tracing_state() is not None:
        raise NotImplementedError("posattn attention cannot be traced by torch.jit; use torch.compile or torch.export")
    if forward_ad._current_level >= 0:
        raise NotImplementedError("posattn attention has no forward-mode derivative; use reverse mode")
    return False


def _is_not_plain(tensor: Tensor) -> bool:
    """True unless the tensor's memory holds its values: a subclass may keep them elsewhere; a view may say that they
    are to be negated or conjugated, or zeros without memory, which the dispatcher resolves."""
    return type(tensor) not in _PLAIN_TYPES or tensor.is_neg() or tensor.is_conj() or tensor._is_zerotensor()


def _run_forward(call: Call, backend: str) -> tuple[Tensor, Tensor]:
    q, v = call.q, call.v
    if q.numel() and v.numel() and (call.block_table is None or call.k_tokens):
        chosen = backends.choose(call, backend)
        if call.block_table is not None and backends.reason_to_gather(chosen, call) is not None:
            call = gathered_call(call)
        return chosen.forward(call)
    lse = q.new_empty(q.shape[:3], dtype=_lse_dtype(q))
    if call.sinks is None:
        lse.fill_(-torch.inf)
    else:
        lse.copy_(call.sinks[:, None])
    return rows_like(call, v.shape[3], q.new_zeros), lse


def _run_backward(
    call: Call,
    backend: str,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    named: dict[str, Tensor],
) -> list[Tensor]:
    """The gradients of `named`, in its order, each in its operand's dtype."""
    if call.block_table is not None:
        raise NotImplementedError("attention over pages has no gradient by itself; gather its keys before")
    if call.q.numel() and call.v.numel():
        chosen = backends.choose(call, backend, backward=True)
        needs = frozenset(named)
        if "scale" in needs:
            needs = needs - {"scale"} | {"q"}
        grads = chosen.backward(call, out, lse, grad_out, grad_lse, needs)
        if "scale" in named:
            # Logits are linear in q, so what moves them along q is what scales them.
            grads["scale"] = (grads["q"].double() * call.q.double()).sum() / call.scale
    else:
        grads = {name: torch.zeros_like(operand) for name, operand in named.items()}
        if grad_lse is not None and "sinks" in grads:
            grads["sinks"] = grad_lse.sum((0, 2))
    return [grads[name].to(operand.dtype) for name, operand in named.items()]


def _lse_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _names(spec: str) -> tuple[str, ...]:
    return ("q", "k", "v", *parse(spec).names)


class _EagerAttend(torch.autograd.Function):
    """attention_forward without the dispatcher."""

    @staticmethod
    def forward(ctx: Any, call: Call, ints: list[int], numbers: Numbers, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        output = _run_forward(call, parse(numbers[3]).backend)
        _save(ctx, ints, numbers, tensors, output)
        return output

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        return (None, None, None, *_gradients(ctx, grad_out, grad_lse, ctx.needs_input_grad[3:]))


class _KnownAttend(torch.autograd.Function):
    """The backward pass alone of attention_forward, for an output that is known."""

    @staticmethod
    def forward(
        ctx: Any, out: Tensor, lse: Tensor, ints: list[int], numbers: Numbers, *tensors: Tensor
    ) -> tuple[Tensor, Tensor]:
        output = out.view_as(out), lse.view_as(lse)
        _save(ctx, ints, numbers, tensors, output)
        return output

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        return (None, None, None, None, *_gradients(ctx, grad_out, grad_lse, ctx.needs_input_grad[4:]))


class _Attend(torch.autograd.Function):
    """attention_forward as functorch can transform it, which a registered autograd formula is not.

    Apart from _EagerAttend because a Function with setup_context binds its signature anew in each call: 30 us.
    """

    @staticmethod
    def forward(ints: list[int], numbers: Numbers, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v, *operands = tensors
        return _run_forward(unflatten(q, k, v, operands, ints, *numbers), parse(numbers[3]).backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ints, numbers, *tensors = inputs
        _save(ctx, ints, numbers, tensors, output)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        return (None, None, *_gradients(ctx, grad_out, grad_lse, ctx.needs_input_grad[2:]))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], ints: list[int], numbers: Numbers, *tensors: Tensor) -> Any:
        return _loop(info.batch_size, in_dims[2:], tensors, _Attend, (ints, numbers))


class _AttendBackward(torch.autograd.Function):
    """attention_backward without the dispatcher, where create_graph or functorch makes it part of a graph."""

    @staticmethod
    def forward(ints: list[int], numbers: Numbers, needs: str, with_lse: bool, *tensors: Tensor) -> tuple[Tensor, ...]:
        *call_tensors, out, lse, grad_out, grad_lse = tensors
        q, k, v, *operands = call_tensors
        call = unflatten(q, k, v, operands, ints, *numbers)
        named = _needed(needs, numbers[3], call_tensors)
        backend = parse(numbers[3]).backend
        return tuple(_run_backward(call, backend, out, lse, grad_out, grad_lse if with_lse else None, named))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        raise NotImplementedError(_NO_SECOND_DERIVATIVE)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        options, tensors = args[:4], args[4:]
        return _loop(info.batch_size, in_dims[4:], tensors, _AttendBackward, options)


def _loop(
    batch_size: int,
    in_dims: tuple[int | None, ...],
    tensors: tuple[Tensor, ...],
    function: Any,
    options: tuple[Any, ...],
) -> Any:
    """vmap one example after the other: each is a whole attention call, so there is little to win by merging them."""
    results = [
        function.apply(
            *options, *(tensor if dim is None else tensor.select(dim, i) for tensor, dim in zip(tensors, in_dims))
        )
        for i in range(batch_size)
    ]
    stacked = tuple(torch.stack(parts) for parts in zip(*results))
    return stacked, (0,) * len(stacked)


def _save(
    ctx: Any, ints: list[int], numbers: Numbers, tensors: Sequence[Tensor], output: tuple[Tensor, Tensor]
) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output)
    ctx.rest = ints, numbers


def _gradients(
    ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None, needed: Sequence[bool]
) -> list[Tensor | None]:
    """One gradient or None for each tensor given to _save."""
    *tensors, out, lse = ctx.saved_tensors
    ints, numbers = ctx.rest
    if grad_out is None and grad_lse is None:
        return [None] * len(tensors)
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    q, k, v, *operands = tensors
    spec = numbers[3]
    names = _names(spec)
    needs = [name for name, need in zip(names, needed) if need and name in DIFFERENTIABLE]
    found: Any
    if _needs_dispatcher((*tensors, grad_out) if grad_lse is None else (*tensors, grad_out, grad_lse)):
        found = torch.ops.posattn.attention_backward.default(
            q, k, v, operands, ints, *numbers, out, lse, grad_out, grad_lse, ",".join(needs)
        )
    elif torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
        results = (out, lse, grad_out, lse if grad_lse is None else grad_lse)
        found = _AttendBackward.apply(  # type: ignore[no-untyped-call]
            ints, numbers, ",".join(needs), grad_lse is not None, *tensors, *results
        )
    else:
        call = unflatten(q, k, v, operands, ints, *numbers)
        named = {name: tensor for name, tensor in zip(names, tensors) if name in needs}
        found = _run_backward(call, parse(spec).backend, out, lse, grad_out, grad_lse, named)
    grads = dict(zip(needs, found))
    return [grads.get(name) for name in names]


@torch.library.impl("posattn::attention_forward", "default")
def _forward(
    q: Tensor, k: Tensor, v: Tensor, operands: list[Tensor], ints: list[int], *numbers: Any
) -> tuple[Tensor, Tensor]:
    call = unflatten(q, k, v, operands, ints, *numbers)
    out, lse = _run_forward(call, parse(numbers[3]).backend)
    return out, lse


@torch.library.register_fake("posattn::attention_forward")  # type: ignore[untyped-decorator]
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    out = rows(q, v.shape[3], "tokens_first" in parse(rest[-1]).flags, q.new_empty)
    return out, q.new_empty(q.shape[:3], dtype=_lse_dtype(q))


@torch.library.impl("posattn::attention_backward", "default")
def _backward(q: Tensor, k: Tensor, v: Tensor, operands: list[Tensor], ints: list[int], *rest: Any) -> list[Tensor]:
    scale, softcap, dropout_p, spec, out, lse, grad_out, grad_lse, needs = rest
    call = unflatten(q, k, v, operands, ints, scale, softcap, dropout_p, spec)
    named = _needed(needs, spec, (q, k, v, *operands))
    grads = _run_backward(call, parse(spec).backend, out, lse, grad_out, grad_lse, named)
    return [grad.contiguous() for grad in grads]


@torch.library.register_fake("posattn::attention_backward")  # type: ignore[untyped-decorator]
def _(q: Tensor, k: Tensor, v: Tensor, operands: list[Tensor], ints: list[int], *rest: Any) -> list[Tensor]:
    spec, needs = rest[3], rest[-1]
    return [tensor.new_empty(tensor.shape) for tensor in _needed(needs, spec, (q, k, v, *operands)).values()]


def _needed(needs: str, spec: str, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    named = dict(zip(_names(spec), tensors))
    return {name: named[name] for name in needs.split(",") if name}


def _setup_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, operands, ints, *numbers = inputs
    _save(ctx, ints, tuple(numbers), (q, k, v, *operands), output)


def _backward_of_forward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    needed = (*ctx.needs_input_grad[:3], *ctx.needs_input_grad[3])
    dq, dk, dv, *rest = _gradients(ctx, grad_out, grad_lse, needed)
    return dq, dk, dv, rest, None, None, None, None, None


def _backward_of_backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
    raise NotImplementedError(_NO_SECOND_DERIVATIVE)


torch.library.register_autograd("posattn::attention_forward", _backward_of_forward, setup_context=_setup_forward)
torch.library.register_autograd("posattn::attention_backward", _backward_of_backward)


def _flops(
    q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], operands: list[Any], ints: list[Any], spec: str
) -> tuple[int, int]:
    """Floating-point operations of the products with D and Dv columns, and of DAPE's MLP, of every (query, key)."""
    layout = parse(spec)
    pairs = q[0] * q[1] * q[2] * (ints[MAX_K] if "block_table" in layout.names else k[2])
    mlp = 0
    if layout.form:
        shapes = dict(zip(layout.names, operands))
        (width, inputs), (heads, _) = shapes["w1"], shapes["w2"]
        mlp = 2 * pairs // heads * width * (inputs + heads)
    return 2 * pairs, mlp


@register_flop_formula(torch.ops.posattn.attention_forward)
def _(q: Any, k: Any, v: Any, operands: Any, ints: Any, *rest: Any, **_: Any) -> int:
    one, mlp = _flops(q, k, v, operands, ints, rest[3])
    return one * (q[3] + v[3]) + mlp


@register_flop_formula(torch.ops.posattn.attention_backward)
def _(q: Any, k: Any, v: Any, operands: Any, ints: Any, *rest: Any, **_: Any) -> int:
    """As torch counts its own: the recomputed products, and one of each for every gradient."""
    one, mlp = _flops(q, k, v, operands, ints, rest[3])
    return one * (3 * q[3] + 2 * v[3]) + 3 * mlp
