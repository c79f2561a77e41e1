"""torch.nn.functional.scaled_dot_product_attention routed to posattn, for a while."""

from __future__ import annotations

import threading
from contextlib import ContextDecorator
from functools import wraps
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F

from posattn.attention import scaled_dot_product_attention
from posattn.encodings.base import Encoding
from posattn.validation import check_position

_lock = threading.Lock()
_here = threading.local()  # .stack: the patches of this thread, innermost last
_everywhere: list[patch_sdpa] = []  # those of every thread
_saved: list[Any] = []  # while anything is patched: torch's function, ours, and whether torch's fast path was on
_count = 0


class patch_sdpa(ContextDecorator):
    """Inside it, torch.nn.functional.scaled_dot_product_attention is posattn's: models that call it are not changed.

        with posattn.patch_sdpa():
            y = model(x)                        # the backward pass may run outside

        @posattn.patch_sdpa(position=posattn.ALiBi(12))
        def evaluate(model, x): ...

    It may be nested, where the innermost counts, and used again; whatever happens inside, torch's own function is back
    when the last one ends. Other threads keep torch's, unless `every_thread` is set. While any is active, torch's fast
    path of nn.MultiheadAttention and nn.TransformerEncoderLayer, which calls no such function, is off in all threads.

    What it does not reach: code that took the function by name before (`from torch.nn.functional import ...`), and
    a compiled model whose graph was made outside. A checkpoint (torch.utils.checkpoint) runs the forward again in
    the backward pass, so that must be inside too, and on a GPU, where it is another thread, with `every_thread`.

    Args:
        position: an encoding that every call gets, or None.
        every_thread: route the calls of all threads.

    Raises:
        TypeError: a position that is no encoding.
    """

    def __init__(self, position: Encoding | None = None, *, every_thread: bool = False) -> None:
        if position is not None:
            check_position(position)
        self.position = position
        self.every_thread = every_thread

    def __enter__(self) -> patch_sdpa:
        global _count
        with _lock:
            if _count == 0:
                _install()
            _count += 1
            _stack(self).append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        global _count
        with _lock:
            stack = _stack(self)
            # The last of itself: patches of several threads may end in any order.
            del stack[len(stack) - 1 - stack[::-1].index(self)]
            _count -= 1
            if _count == 0:
                _restore()


def _stack(patch: patch_sdpa) -> list[patch_sdpa]:
    if patch.every_thread:
        return _everywhere
    if not hasattr(_here, "stack"):
        _here.stack = []
    found: list[patch_sdpa] = _here.stack
    return found


def _install() -> None:
    theirs = F.scaled_dot_product_attention

    @wraps(theirs)
    def routed(*args: Any, **kwargs: Any) -> Any:
        stack = getattr(_here, "stack", None) or _everywhere
        if not stack:
            return theirs(*args, **kwargs)
        return scaled_dot_product_attention(*args, **{"position": stack[-1].position, **kwargs})

    _saved[:] = [theirs, routed, torch.backends.mha.get_fastpath_enabled()]
    F.scaled_dot_product_attention = routed
    torch.backends.mha.set_fastpath_enabled(False)


def _restore() -> None:
    theirs, routed, fast_path = _saved
    # Somebody else's patch, put on inside and still there, stays; it ends in a function of ours that passes calls on.
    if F.scaled_dot_product_attention is routed:
        F.scaled_dot_product_attention = theirs
    torch.backends.mha.set_fastpath_enabled(fast_path)
    _saved.clear()
