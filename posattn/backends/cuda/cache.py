"""Compiled kernels on disk: one file an entry, named by the hash of all that went into it.

A damaged entry counts as absent, and so does one that was moved to another's place: its hash holds its name.
"""

from __future__ import annotations

import hashlib

from posattn.backends.common import disk_cache

_MAGIC = b"posattn-kernel-2\n"


def load(key: str) -> list[bytes] | None:
    """The parts stored under `key`; None if there is no such entry or it is not whole."""
    content = disk_cache.read(f"cuda/{key}")
    head = len(_MAGIC) + 32
    if content is None or not content.startswith(_MAGIC):
        return None
    body = content[head:]
    if _digest(key, body) != content[len(_MAGIC) : head]:
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
    disk_cache.write(f"cuda/{key}", _MAGIC + _digest(key, body) + body)


def _digest(key: str, body: bytes) -> bytes:
    return hashlib.sha256(key.encode() + b"\0" + body).digest()
