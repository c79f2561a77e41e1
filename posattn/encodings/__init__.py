"""Positional encodings. `__all__` holds those that attention takes; tests and benches discover them from it."""

from posattn.encodings.alibi import ALiBi
from posattn.encodings.base import Context as Context
from posattn.encodings.base import Encoding as Encoding
from posattn.encodings.base import Sum as Sum
from posattn.encodings.kerple import Kerple
from posattn.encodings.rope import RoPE

__all__ = ["ALiBi", "Kerple", "RoPE"]
