"""The text of the demo, as bytes: the Python standard library's own source, which every machine has, or a file."""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

HELD_OUT = 10  # one file in ten, or the last tenth of a single file, is kept from training


class TooShort(ValueError):
    """A text with too few bytes."""


@dataclass(frozen=True)
class Corpus:
    """`train` and `held_out` are uint8 [bytes]; `source` says where they came from."""

    train: Tensor
    held_out: Tensor
    source: str


def load(path: Path | None, shortest: int) -> Corpus:
    """The corpus in `path`, or the standard library's if None; TooShort if a part has under `shortest` bytes."""
    if path is None:
        train, held_out, source = _standard_library()
    else:
        data = path.read_bytes()
        cut = len(data) - len(data) // HELD_OUT
        train, held_out, source = data[:cut], data[cut:], str(path)
    if min(len(train), len(held_out)) < shortest:
        raise TooShort(
            f"text: expected at least {shortest} bytes to train on and {shortest} held out, "
            f"got {len(train)} and {len(held_out)} from {source}"
        )
    return Corpus(_as_tensor(train), _as_tensor(held_out), source)


def _standard_library() -> tuple[bytes, bytes, str]:
    """The top-level modules alone: about 5 MB, and no test data or vendored packages among them."""
    folder = Path(sysconfig.get_path("stdlib"))
    files = [path.read_bytes() for path in sorted(folder.glob("*.py"))]
    held_out = files[HELD_OUT - 1 :: HELD_OUT]
    train = [text for index, text in enumerate(files) if index % HELD_OUT != HELD_OUT - 1]
    return b"\n".join(train), b"\n".join(held_out), "the Python standard library's source"


def _as_tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
