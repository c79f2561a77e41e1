"""Files that one process leaves for the next: compiled kernels and chosen tiles, which are code, or as good as code.

So nothing is taken from anybody else: the folder and each file must be the user's own, the folder writable by nobody
else, the file a regular one and no link. A folder that is not fit costs a warning, and the work in each process.
Several threads and processes may use one folder: a file is written beside its place and renamed into it.
"""

from __future__ import annotations

import functools
import os
import stat
import tempfile
import warnings
from pathlib import Path


def read(name: str) -> bytes | None:
    """What was written under `name` (one or several parts of a path); None if nothing, or nothing fit."""
    folder = _folder(Path(name).parent, make=False)
    if folder is None:
        return None
    # Not blocking: a pipe in the file's place would never be opened.
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
    path = folder / Path(name).name
    try:
        handle = os.open(path, flags)
    except FileNotFoundError:
        return None
    except OSError as error:
        _warn(str(path), str(error))
        return None
    with os.fdopen(handle, "rb") as file:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode) or not _own(found):
            _warn(str(path), "it is no regular file of yours")
            return None
        return file.read()


def write(name: str, content: bytes) -> None:
    """Keep `content` under `name`, or warn once if that cannot be."""
    folder = _folder(Path(name).parent, make=True)
    if folder is None:
        return
    try:
        handle, partial = tempfile.mkstemp(dir=folder)  # a new file of mode 0600
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            os.replace(partial, folder / Path(name).name)
        except OSError:
            os.unlink(partial)
            raise
    except OSError as error:
        _warn(str(folder), str(error))


def base() -> Path | None:
    """POSATTN_CACHE_DIR, else posattn's folder in the user's cache directory; None where there is no such user."""
    given, shared = os.environ.get("POSATTN_CACHE_DIR"), os.environ.get("XDG_CACHE_HOME")
    if given:
        return Path(given)
    if shared:
        return Path(shared) / "posattn"
    try:
        return Path.home() / ".cache" / "posattn"
    except RuntimeError as error:  # no HOME, and no entry for the user
        _warn("the user's cache directory", str(error))
        return None


def _folder(below: Path, make: bool) -> Path | None:
    """The folder `below` the base, if it is there (or could be made) and fit to be trusted."""
    root = base()
    if root is None:
        return None
    folder = root / below
    try:
        if make:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for place in {root, folder}:
            found = os.stat(place)
            if not _own(found):
                raise PermissionError(f"{place} is not yours")
            if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                raise PermissionError(f"others may write to {place}")
    except OSError as error:
        if isinstance(error, FileNotFoundError) and not make:
            return None
        _warn(str(folder), str(error))
        return None
    return folder


def _own(found: os.stat_result) -> bool:
    return not hasattr(os, "getuid") or found.st_uid == os.getuid()


@functools.cache
def _warn(place: str, reason: str) -> None:
    """Once for each place and reason."""
    warnings.warn(
        f"posattn keeps nothing in {place} and takes nothing from there ({reason}), so every process does that work "
        "anew; POSATTN_CACHE_DIR names another folder",
        RuntimeWarning,
        stacklevel=3,
    )
