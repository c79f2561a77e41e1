"""Compiled kernels on disk: one file an entry, named by the hash of all that went into it.

Several threads and processes may use one directory: an entry is written beside its place and renamed into it. A damaged
entry counts as absent. A directory that cannot be written costs a warning and the compilation in each process.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import warnings
from functools import cache
from pathlib import Path

_MAGIC = b"posattn-kernel-1\n"


def directory() -> Path:
    """POSATTN_CACHE_DIR, else the user's cache directory."""
    given = os.environ.get("POSATTN_CACHE_DIR")
    if given:
        return Path(given) / "cuda"
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "posattn" / "cuda"


def load(key: str) -> list[bytes] | None:
    """The parts stored under `key`; None if there is no such entry or it is not whole."""
    try:
        content = (directory() / key).read_bytes()
    except OSError:
        return None
    head = len(_MAGIC) + 32
    body = content[head:]
    if not content.startswith(_MAGIC) or hashlib.sha256(body).digest() != content[len(_MAGIC) : head]:
        return None
    parts = []
    while body:
        length = int.from_bytes(body[:8], "little")
        parts.append(body[8 : 8 + length])
        body = body[8 + length :]
    return parts


def store(key: str, parts: list[bytes]) -> None:
    """Keep `parts` under `key`, or warn once if that cannot be."""
    body = b"".join(len(part).to_bytes(8, "little") + part for part in parts)
    place = directory()
    try:
        place.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(dir=place)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(_MAGIC + hashlib.sha256(body).digest() + body)
            os.replace(partial, place / key)
        except OSError:
            os.unlink(partial)
            raise
    except OSError as error:
        _warn(str(place), str(error))


@cache
def _warn(place: str, reason: str) -> None:
    """Once for each directory and reason."""
    warnings.warn(
        f"posattn cannot keep compiled kernels in {place} ({reason}), so every process compiles them anew; "
        "POSATTN_CACHE_DIR names another place",
        RuntimeWarning,
        stacklevel=2,
    )
