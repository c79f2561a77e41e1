"""Checks of the public functions' arguments, each done once and naming the argument, what was expected and what came.

Looks at values (lengths, positions) cost a wait for the device, so they are done on CPU tensors alone, and not while
torch.compile traces. They are the bounds that kernels on the CPU rely on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.attention.bias import CausalBias

from posattn.backends import NAMES
from posattn.encodings._checks import check_flag as check_flag
from posattn.encodings.base import Encoding
from posattn.errors import SWAPPED, ArgumentTypeError, ArgumentValueError, described

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_PLAIN_TYPES = (Tensor, torch.nn.Parameter)
_INTEGERS = (torch.int32, torch.int64)
_POSITION_LIMIT = 2**31
_OFFSET_LIMIT = 2**28  # sums with lengths and a window's sides stay within int32


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))


def _readable(tensor: Tensor) -> bool:
    """True if looking at values costs no device wait and they are real ones, not a trace's."""
    return (
        not torch.compiler.is_compiling()
        and tensor.device.type == "cpu"
        and type(tensor) in _PLAIN_TYPES
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )


def is_dtensor(value: object) -> bool:
    """Asked of the attribute, for torch.distributed.tensor takes a while to import; of plain tensors by their type."""
    return type(value) not in _PLAIN_TYPES and hasattr(value, "device_mesh")


def check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise ArgumentTypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if is_dtensor(value):
        raise ArgumentTypeError(
            f"{name}: expected a torch.Tensor, got a DTensor; posattn.attention takes q, k and v as DTensors, all three"
        )
    if value.layout != torch.strided or value.is_nested:
        layout = "a nested tensor" if value.is_nested else str(value.layout)
        raise ArgumentTypeError(f"{name}: expected a dense tensor with strides, got {layout}")


def check_flags(**flags: object) -> None:
    for name, value in flags.items():
        check_flag(name, value)


def check_same(name: str, tensor: Tensor, q: Tensor, q_name: str) -> None:
    if tensor.device != q.device:
        raise ArgumentValueError(f"{name}: expected device {q.device} like {q_name}, got {tensor.device}")


def check_qkv(q: Tensor, k: Tensor, v: Tensor, names: tuple[str, str, str], rank: int | None) -> None:
    """Types, dtypes, devices and ranks (`rank`, or at least 2 where it is None), and the lengths that must agree."""
    for name, tensor in zip(names, (q, k, v)):
        check_tensor(name, tensor)
        if rank is None and tensor.dim() < 2:
            raise ArgumentValueError(
                f"{name}: expected at least 2 dimensions [..., tokens, head_dim], got {_shape(tensor)}"
            )
        if rank is not None and tensor.dim() != rank:
            raise ArgumentValueError(
                f"{name}: expected {rank} dimensions [batch, heads, tokens, head_dim], got {_shape(tensor)}"
            )
    if q.dtype not in DTYPES:
        raise ArgumentTypeError(f"{names[0]}: expected float32, bfloat16, float16 or float64, got {q.dtype}")
    for name, tensor in zip(names[1:], (k, v)):
        if tensor.dtype != q.dtype:
            raise ArgumentTypeError(f"{name}: expected dtype {q.dtype} like {names[0]}, got {tensor.dtype}")
        check_same(name, tensor, q, names[0])
    if k.shape[-1] != q.shape[-1]:
        raise ArgumentValueError(f"{names[1]}: expected head_dim {q.shape[-1]} like {names[0]}, got {k.shape[-1]}")
    if v.shape[-2] != k.shape[-2]:
        raise ArgumentValueError(f"{names[2]}: expected {k.shape[-2]} tokens like {names[1]}, got {v.shape[-2]}")


def check_heads(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Batch sizes and head counts of attention()'s q, k and v; Hq must be a multiple of Hkv."""
    for name, tensor in (("k", k), ("v", v)):
        if tensor.shape[0] != q.shape[0]:
            raise ArgumentValueError(f"{name}: expected batch size {q.shape[0]} like q, got {tensor.shape[0]}")
    if v.shape[1] != k.shape[1]:
        raise ArgumentValueError(f"v: expected {k.shape[1]} heads like k, got {v.shape[1]}")
    heads, kv_heads = q.shape[1], k.shape[1]
    if heads != kv_heads and (kv_heads == 0 or heads % kv_heads):
        tokens, kv_tokens = q.shape[2], k.shape[2]
        swapped = kv_heads > 0 and kv_tokens > 0 and (tokens == kv_tokens or tokens % kv_tokens == 0)
        raise ArgumentValueError(
            f"k, v: expected a head count that divides q's {heads}, got {kv_heads}{SWAPPED if swapped else ''}"
        )


def check_position(position: object) -> None:
    if not isinstance(position, Encoding):
        hint = "; a boolean mask goes in mask, a float one in bias" if isinstance(position, Tensor) else ""
        raise ArgumentTypeError(f"position: expected an encoding of posattn or None, got {described(position)}{hint}")


def check_no_positions(positions: tuple[Tensor | None, Tensor | None]) -> None:
    """Without an encoding nothing would read them, and masks count tokens."""
    if positions[0] is not None:
        raise ArgumentValueError(
            "q_positions, k_positions: expected None without a position to read them, got tensors; masks count tokens"
        )


def check_backend(backend: str) -> str:
    if backend != "auto" and backend not in NAMES:
        raise ArgumentValueError(f'backend: expected "auto", {", ".join(map(repr, NAMES))}, got {backend!r}')
    return backend


def _number(name: str, value: object) -> float:
    """A finite number that float32 can hold."""
    if not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        if isinstance(value, Tensor) and value.requires_grad:
            raise ArgumentTypeError(
                f"{name}: expected a number, got a tensor that requires grad, which it has none for"
            )
        if isinstance(value, Tensor) and value.numel() != 1:
            raise ArgumentTypeError(f"{name}: expected a number, got a tensor of shape {list(value.shape)}")
        if isinstance(value, str) or not hasattr(value, "__float__"):
            raise ArgumentTypeError(f"{name}: expected a number, got {value!r}")
    number = float(value)
    if not abs(number) <= torch.finfo(torch.float32).max:
        raise ArgumentValueError(f"{name}: expected a finite number, within float32's range, got {value}")
    return number


def _no_flag(name: str, value: object) -> object:
    """True and False are numbers for torch's scale, and for nothing else."""
    if isinstance(value, bool):
        raise ArgumentTypeError(f"{name}: expected a number, got {value!r}")
    return value


def check_scale(scale: float | Tensor | None, head_dim: int) -> tuple[float, Tensor | None]:
    """The scale as a number, 1 / sqrt(head_dim) for None, and as a tensor if it came as one: the number is then not to
    be relied on while torch.compile traces, and the gradient goes to the tensor."""
    if scale is None:
        return 1.0 / math.sqrt(max(int(head_dim), 1)), None  # int: a graph is of one head dimension
    if not isinstance(scale, Tensor):
        return _number("scale", scale), None
    check_tensor("scale", scale)
    if scale.numel() != 1 or not scale.is_floating_point():
        raise ArgumentTypeError(f"scale: expected one number of a floating dtype, got {scale.dtype} {_shape(scale)}")
    scale = scale.reshape(())
    if not _readable(scale):
        return 1.0, scale
    number = _number("scale", scale.detach())
    if number == 0.0 and scale.requires_grad:
        raise ArgumentValueError("scale: expected a number other than 0 where it requires grad, got 0")
    return number, scale


def check_softcap(softcap: float | None) -> float:
    """The cap, 0 for none."""
    if softcap is None:
        return 0.0
    number = _number("softcap", _no_flag("softcap", softcap))
    smallest = torch.finfo(torch.float32).tiny
    if number < 0 or 0 < number < smallest:
        raise ArgumentValueError(
            f"softcap: expected a finite number of at least {smallest:.3g} (0 or None for no cap), got {softcap}"
        )
    return number


def check_dropout(dropout_p: float, name: str = "dropout_p") -> float:
    number = _number(name, _no_flag(name, dropout_p))
    if not 0.0 <= number <= 1.0:
        raise ArgumentValueError(f"{name}: expected 0 <= {name} <= 1, got {dropout_p}")
    return number


def check_window(window: int | tuple[int | None, int | None] | None) -> tuple[int | None, int | None]:
    """(left, right), None for unlimited; an int w means (w, w)."""
    if window is None:
        return None, None
    sides: Sequence[int | None] = (window, window) if isinstance(window, int) else window
    if not isinstance(sides, (tuple, list)) or len(sides) != 2:
        raise ArgumentTypeError(f"window: expected an int or (left, right), got {window!r}")
    for side in sides:
        if side is None or isinstance(side, torch.SymInt):
            continue
        if isinstance(side, bool) or not isinstance(side, int):
            raise ArgumentTypeError(f"window: expected ints or None, got {window!r}")
        if side < 0:
            raise ArgumentValueError(f"window: expected sides >= 0 (None for unlimited), got {window!r}")
    # Wider than any sequence: positions plus a side must not overflow.
    return _clamped(sides[0]), _clamped(sides[1])


def _clamped(side: int | None) -> int | None:
    return min(side, 2**31) if type(side) is int else side  # a traced length stays symbolic


def check_sinks(sinks: Tensor | None, q: Tensor) -> Tensor | None:
    if sinks is None:
        return None
    check_tensor("sinks", sinks)
    check_same("sinks", sinks, q, "q")
    if not sinks.is_floating_point():
        raise ArgumentTypeError(f"sinks: expected a floating dtype, got {sinks.dtype}")
    if sinks.dim() != 1 or sinks.shape[0] != q.shape[1]:
        raise ArgumentValueError(
            f"sinks: expected shape [{q.shape[1]}], one number per query head, got {_shape(sinks)}"
        )
    if _readable(sinks) and sinks.isnan().any():
        raise ArgumentValueError("sinks: expected numbers (-inf for no sink), got NaN")
    return sinks.float().contiguous()


def check_logit_shaped(name: str, tensor: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """A bias or mask that broadcasts to [B, Hq, Tq, Tk], as a view of four dimensions."""
    target = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    if tensor.device != q.device:
        raise ArgumentValueError(f"{name}: expected device {q.device} like the queries, got {tensor.device}")
    fits = tensor.dim() <= 4 and all(
        have == 1 or have == want for have, want in zip(reversed(tensor.shape), reversed(target))
    )
    if not fits:
        hint = _reshaped(name, tensor, target)
        raise ArgumentValueError(
            f"{name}: expected a shape that broadcasts to {list(target)}, got {_shape(tensor)}{hint}"
        )
    while tensor.dim() < 4:
        tensor = tensor[None]
    return tensor


def _reshaped(name: str, tensor: Tensor, target: tuple[int, int, int, int]) -> str:
    """The end of a message, where a dimension that is missing would make the tensor fit."""
    batch, heads, q_tokens, k_tokens = target
    missing = {
        (batch, k_tokens): "[:, None, None] hides keys of each sequence",
        (batch, q_tokens, k_tokens): "[:, None] is one for all heads",
        (batch, heads, k_tokens): "[:, :, None] is one for all queries",
    }
    shape = tuple(tensor.shape)
    if shape in missing:
        return f"; {name}{missing[shape]}"
    return SWAPPED if len(shape) >= 2 and shape[-2:] == (heads, heads) and q_tokens < heads else ""


def check_bias(bias: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    if bias is None:
        return None
    check_tensor("bias", bias)
    if not bias.is_floating_point():
        raise ArgumentTypeError(f"bias: expected a floating dtype (a boolean one goes in mask), got {bias.dtype}")
    return check_logit_shaped("bias", bias, q, k)


def check_mask(mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    if mask is None:
        return None
    check_tensor("mask", mask)
    if mask.dtype != torch.bool:
        raise ArgumentTypeError(
            f"mask: expected torch.bool, True where allowed (a float one goes in bias), got {mask.dtype}"
        )
    return check_logit_shaped("mask", mask, q, k)


def check_attn_mask(attn_mask: Tensor | None, query: Tensor) -> None:
    """The type and dtype of scaled_dot_product_attention's mask."""
    if attn_mask is None:
        return
    check_tensor("attn_mask", attn_mask)
    if attn_mask.dtype not in (torch.bool, torch.float32, query.dtype):
        raise ArgumentTypeError(
            f"attn_mask: expected torch.bool, torch.float32 or {query.dtype}, got {attn_mask.dtype}"
        )


def check_causal_bias(attn_mask: CausalBias, is_causal: bool, query: Tensor, key: Tensor) -> None:
    """torch's own name for a causal mask, which it says without elements."""
    if is_causal:
        raise ArgumentValueError("attn_mask, is_causal: expected one or the other with a CausalBias, got both")
    for name, tensor, length in (("query", query, attn_mask.seq_len_q), ("key", key, attn_mask.seq_len_kv)):
        if tensor.shape[-2] != length:
            raise ArgumentValueError(
                f"attn_mask: expected a CausalBias for the {tensor.shape[-2]} tokens of {name}, got one for {length}"
            )


def check_key_bounds(
    k_lengths: Tensor | None, k_starts: Tensor | None, cu_seqlens: Tensor | None, q: Tensor, k: Tensor
) -> tuple[Tensor | None, Tensor | None, int]:
    """Both as contiguous int32 [B], within 0 .. Tk, no start past its length; and where the longest sequence ends, as
    far as a look may tell."""
    for name, bounds in (("k_lengths", k_lengths), ("k_starts", k_starts)):
        if bounds is not None and cu_seqlens is not None:
            raise ArgumentValueError(f"{name}, cu_seqlens_k: expected one or the other, got both")
    lengths, end = _check_key_bounds("k_lengths", "length", k_lengths, q, k)
    starts, _ = _check_key_bounds("k_starts", "start", k_starts, q, k)
    if lengths is not None and starts is not None:
        if not (_readable(lengths) and _readable(starts)):
            starts = torch.minimum(starts, lengths)
        elif (starts > lengths).any():
            b = int((starts > lengths).int().argmax())
            raise ArgumentValueError(
                f"k_starts: expected starts up to k_lengths, got {int(starts[b])} for a sequence of {int(lengths[b])}"
            )
    return lengths, starts, end


def _check_key_bounds(name: str, what: str, bounds: Tensor | None, q: Tensor, k: Tensor) -> tuple[Tensor | None, int]:
    """The bounds as contiguous int32, and the greatest, Tk where a look would wait."""
    if bounds is None:
        return None, k.shape[2]
    _check_one_each(name, what, bounds, q.shape[0], q)
    high = k.shape[2]
    if _readable(bounds) and bounds.numel():
        low, high = _extremes(bounds)
        if low < 0 or high > k.shape[2]:
            raise ArgumentValueError(f"{name}: expected {what}s from 0 to {k.shape[2]}, got {low} to {high}")
    return _narrowed(bounds, 0, k.shape[2]), high


def check_offset(
    offset: int | Tensor | None, cu_seqlens: Tensor | None, q: Tensor, k: Tensor, max_q: int, max_k: int
) -> tuple[int | Tensor | None, tuple[int, int] | None]:
    """An int, or contiguous int32 [sequences] and the range of its values, which may be wider where a look would
    wait."""
    if offset is None:
        return None, None
    if not isinstance(offset, Tensor):
        if isinstance(offset, bool) or not isinstance(offset, (int, torch.SymInt)):
            raise ArgumentTypeError(f"offset: expected an int, a torch.Tensor or None, got {offset!r}")
        if isinstance(offset, int) and abs(offset) > _OFFSET_LIMIT:
            raise ArgumentValueError(f"offset: expected an int within +-2^28, got {offset}")
        return offset, None
    _check_one_each("offset", "number", offset, q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1, q)
    found = -max_q, max_k
    if _readable(offset) and offset.numel():
        low, high = _extremes(offset)
        if low < -max_q or high > max_k:
            raise ArgumentValueError(f"offset: expected numbers from {-max_q} to {max_k}, got {low} to {high}")
        found = low, high
    return _narrowed(offset, -max_q, max_k), found


def check_segments(
    segments: Tensor | tuple[Tensor, Tensor] | None, others: Mapping[str, object], q: Tensor, k: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Those of queries and of keys, contiguous int32 [B, T] each."""
    if segments is None:
        return None, None
    for name, other in others.items():
        if other is not None:
            raise ArgumentValueError(f"segments, {name}: expected one or the other, got both")
    if not isinstance(segments, Tensor) and not (isinstance(segments, (tuple, list)) and len(segments) == 2):
        raise ArgumentTypeError(
            f"segments: expected a torch.Tensor, or one for queries and one for keys, got {type(segments).__name__}"
        )
    if isinstance(segments, Tensor) and q.shape[2] != k.shape[2]:
        raise ArgumentValueError(
            f"segments: expected a pair, for {q.shape[2]} queries and {k.shape[2]} keys, got one tensor"
        )
    of_queries, of_keys = (segments, segments) if isinstance(segments, Tensor) else segments
    checked = _check_segments(of_queries, q, q.shape[2])
    return checked, checked if of_keys is of_queries else _check_segments(of_keys, q, k.shape[2])


def _check_segments(segments: Tensor, q: Tensor, tokens: int) -> Tensor:
    _check_integers("segments", segments, q)
    batch = q.shape[0]
    if segments.dim() not in (1, 2) or segments.shape[-1] != tokens or segments.shape[:-1] not in ((), (1,), (batch,)):
        raise ArgumentValueError(
            f"segments: expected shape [{tokens}], [1, {tokens}] or [{batch}, {tokens}], got {_shape(segments)}"
        )
    if _readable(segments) and segments.numel():
        low, high = _extremes(segments)
        if low < -(2**31) or high >= 2**31:
            raise ArgumentValueError(f"segments: expected numbers that fit in 32 bits, got {low} to {high}")
        for row in segments if segments.dim() == 2 else segments[None]:
            documents = torch.unique_consecutive(row)
            documents, runs = documents[documents >= 0].unique(return_counts=True)
            if (runs > 1).any():
                twice = int(documents[runs > 1][0])
                raise ArgumentValueError(f"segments: expected each document in one run of a row, got two of {twice}")
    return _narrowed(segments, -(2**31), 2**31 - 1).expand(batch, tokens).contiguous()


def check_pages(
    q: Tensor, k: Tensor, v: Tensor, block_table: Tensor, k_lengths: Tensor | None, cu_seqlens: object
) -> tuple[Tensor, Tensor]:
    """block_table and k_lengths of keys in pages, k and v [pages, page, Hkv, D]: what can be read is in bounds.

    What pages and other keys have in common is checked after they were gathered.
    """
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, tensor)
        if tensor.dim() != 4:
            shape = "[batch, heads, tokens, head_dim]" if name == "q" else "[pages, page, kv_heads, head_dim]"
            raise ArgumentValueError(f"{name}: expected 4 dimensions {shape} with block_table, got {_shape(tensor)}")
        check_same(name, tensor, q, "q")
    if v.shape[:3] != k.shape[:3]:
        raise ArgumentValueError(
            f"v: expected pages {list(k.shape[:3])} [pages, page, kv_heads] like k, got {list(v.shape[:3])}"
        )
    if k.shape[0] == 0:
        raise ArgumentValueError("k: expected at least one page with block_table, got none")
    if cu_seqlens is not None:
        raise ArgumentValueError("block_table, cu_seqlens_k: expected one or the other, got both")
    _check_integers("block_table", block_table, q)
    batch, pages, page = q.shape[0], k.shape[0], k.shape[1]
    if block_table.dim() != 2 or block_table.shape[0] != batch:
        raise ArgumentValueError(
            f"block_table: expected shape [{batch}, n], the pages of each sequence, got {_shape(block_table)}"
        )
    if k_lengths is None:
        raise ArgumentValueError("block_table: expected k_lengths with it, the keys of each sequence, got None")
    _check_one_each("k_lengths", "length", k_lengths, batch, q)
    if _readable(block_table) and _readable(k_lengths):
        longest = int(k_lengths.max()) if batch else 0
        if longest > block_table.shape[1] * page:
            raise ArgumentValueError(
                f"k_lengths: expected lengths from 0 to {block_table.shape[1] * page}, what {block_table.shape[1]} "
                f"pages of {page} hold, got {longest}"
            )
        used = block_table[torch.arange(block_table.shape[1]) * page < k_lengths[:, None]]
        if used.numel():
            low, high = _extremes(used)
            if low < 0 or high >= pages:
                raise ArgumentValueError(
                    f"block_table: expected pages from 0 to {pages - 1} in the entries that k_lengths uses, "
                    f"got {low if low < 0 else high}"
                )
    return block_table, k_lengths


def check_cu_seqlens(
    cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, q: Tensor, k: Tensor
) -> tuple[Tensor | None, Tensor | None, int, int]:
    """Both as contiguous int32, and the longest document's queries and keys (token counts where a look would wait)."""
    if cu_seqlens_q is None and cu_seqlens_k is None:
        return None, None, q.shape[2], k.shape[2]
    if cu_seqlens_q is None or cu_seqlens_k is None:
        raise ArgumentValueError("cu_seqlens_q, cu_seqlens_k: expected both or neither, got one")
    if q.shape[0] != 1:
        raise ArgumentValueError(
            f"cu_seqlens_q: expected packed documents in a batch of 1, got a batch of {q.shape[0]}"
        )
    max_q = _check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, q, q.shape[2])
    max_k = _check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, q, k.shape[2])
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ArgumentValueError(
            f"cu_seqlens_k: expected as many documents as cu_seqlens_q, {cu_seqlens_q.shape[0] - 1}, "
            f"got {cu_seqlens_k.shape[0] - 1}"
        )
    return _narrowed(cu_seqlens_q, 0, q.shape[2]), _narrowed(cu_seqlens_k, 0, k.shape[2]), max_q, max_k


def _check_cu_seqlens(name: str, cu_seqlens: Tensor, q: Tensor, tokens: int) -> int:
    _check_integers(name, cu_seqlens, q)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ArgumentValueError(
            f"{name}: expected shape [documents + 1] with at least one document, got {_shape(cu_seqlens)}"
        )
    if not _readable(cu_seqlens):
        return tokens
    bounds: list[int] = cu_seqlens.tolist()
    lengths = [end - start for start, end in pairwise(bounds)]
    if bounds[0] != 0 or bounds[-1] != tokens or min(lengths) < 0:
        raise ArgumentValueError(f"{name}: expected non-decreasing bounds from 0 to {tokens}, got {_brief(bounds)}")
    return max(lengths)


def check_positions(
    q_positions: Tensor | None,
    k_positions: Tensor | None,
    q: Tensor,
    k: Tensor,
    position_range: tuple[int, int] | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Both as contiguous int64 [B or 1, T], or float64 if one has a floating dtype, from [T] or [B or 1, T]; within the
    range, where they can be looked at."""
    if position_range is not None:
        _check_position_range(position_range, q_positions)
    if q_positions is None and k_positions is None:
        return None, None
    if q_positions is None or k_positions is None:
        raise ArgumentValueError("q_positions, k_positions: expected both or neither, got one")
    checked = (
        _check_positions("q_positions", q_positions, q, q.shape[2], position_range),
        _check_positions("k_positions", k_positions, q, k.shape[2], position_range),
    )
    if any(positions.is_floating_point() for positions in checked):
        return checked[0].double(), checked[1].double()
    return checked


def check_takes_fractions(position: Encoding) -> None:
    if not position.fractional:
        raise ArgumentTypeError(
            "q_positions, k_positions: expected integers, got fractions, which only encodings that turn or scale q and "
            f"k take, and {type(position).__name__} adds a bias of the distance"
        )


def _check_position_range(position_range: tuple[int, int], q_positions: Tensor | None) -> None:
    if not isinstance(position_range, (tuple, list)) or len(position_range) != 2:
        raise ArgumentTypeError(f"position_range: expected (first, last), got {position_range!r}")
    first, last = position_range
    if any(isinstance(end, bool) or not isinstance(end, int) for end in position_range):
        raise ArgumentTypeError(f"position_range: expected two ints, got {position_range!r}")
    if q_positions is None:
        raise ArgumentValueError("position_range: expected q_positions and k_positions with it, got None")
    if not -_POSITION_LIMIT < first <= last < _POSITION_LIMIT:
        raise ArgumentValueError(f"position_range: expected first <= last within +-2^31, got {position_range!r}")


def _check_positions(
    name: str, positions: Tensor, q: Tensor, tokens: int, position_range: tuple[int, int] | None
) -> Tensor:
    check_tensor(name, positions)
    if not positions.is_floating_point():
        _check_integers(name, positions, q)
    check_same(name, positions, q, "q")
    batch = q.shape[0]
    fits = positions.dim() in (1, 2) and positions.shape[-1] == tokens
    if not fits or (positions.dim() == 2 and positions.shape[0] not in (1, batch)):
        raise ArgumentValueError(
            f"{name}: expected shape [{tokens}], [1, {tokens}] or [{batch}, {tokens}], got {_shape(positions)}"
        )
    if _readable(positions) and positions.numel():
        low, high = (x.item() for x in positions.aminmax())
        if not -_POSITION_LIMIT < low <= high < _POSITION_LIMIT:  # nor NaN
            raise ArgumentValueError(f"{name}: expected positions between -2^31 and 2^31, got {low} to {high}")
        if position_range is not None and (low < position_range[0] or high > position_range[1]):
            raise ArgumentValueError(
                f"{name}: expected positions in position_range {tuple(position_range)}, got {low} to {high}"
            )
    rows = positions if positions.dim() == 2 else positions[None]
    return (rows.double() if rows.is_floating_point() else rows.long()).contiguous()


def _check_integers(name: str, tensor: Tensor, q: Tensor) -> None:
    check_tensor(name, tensor)
    if tensor.dtype not in _INTEGERS:
        raise ArgumentTypeError(f"{name}: expected int32 or int64, got {tensor.dtype}")
    check_same(name, tensor, q, "q")


def _check_one_each(name: str, what: str, tensor: Tensor, count: int, q: Tensor) -> None:
    """Integers [count], one for each sequence."""
    _check_integers(name, tensor, q)
    if tensor.dim() != 1 or tensor.shape[0] != count:
        raise ArgumentValueError(f"{name}: expected shape [{count}], one {what} per sequence, got {_shape(tensor)}")


def _extremes(tensor: Tensor) -> tuple[int, int]:
    low, high = tensor.aminmax()
    return int(low), int(high)


def _narrowed(tensor: Tensor, least: int, most: int) -> Tensor:
    """Contiguous int32. A number that nobody could look at must not wrap into another one: the CPU kernels still refuse
    it, those of other devices, which look at nothing, take the nearest that is in bounds."""
    if not _readable(tensor):
        on_cpu = tensor.device.type == "cpu"
        tensor = tensor.clamp(-(2**31), 2**31 - 1) if on_cpu else tensor.clamp(least, most)
    return tensor.to(torch.int32).contiguous()


def _brief(values: Sequence[int]) -> str:
    return str(list(values)) if len(values) <= 8 else f"[{', '.join(map(str, values[:4]))}, ..., {values[-1]}]"
