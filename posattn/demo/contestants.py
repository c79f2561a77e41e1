"""The encodings that the demo compares, by name."""

from __future__ import annotations

from collections.abc import Callable

import posattn
from posattn.demo.model import Shape
from posattn.encodings.base import Encoding

CONTESTANTS: dict[str, Callable[[Shape], Encoding]] = {
    "RoPE": lambda shape: posattn.RoPE(shape.head_dim),
    "ALiBi": lambda shape: posattn.ALiBi(shape.heads),
    "Kerple": lambda shape: posattn.Kerple(shape.heads),
    "FIRE": lambda shape: posattn.FIRE(shape.heads),
    "DAPE-Kerple": lambda shape: posattn.DAPE(posattn.Kerple(shape.heads), shape.heads),
}
