"""What the commands' argument parsers share: a mistake is one line on stderr and exit status 2, without a traceback."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that leaves the usage to --help."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} ({self.prog} --help says more)\n")

    def folder(self, option: str, path: Path) -> Path:
        """The folder, made if it is not there; a usage error if it cannot be."""
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            self.error(f"{option}: expected a folder that can be made, got {str(path)!r}: {error.strerror}")
        if not os.access(path, os.W_OK):
            self.error(f"{option}: expected a folder to write into, got {str(path)!r}, where writing is not allowed")
        return path


def positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return value


def readable_file(text: str) -> Path:
    path = Path(text)
    if not path.is_file() or not os.access(path, os.R_OK):
        why = "a folder" if path.is_dir() else "one that may not be read" if path.exists() else "none of that name"
        raise argparse.ArgumentTypeError(f"expected a file to read, got {why}: {text!r}")
    return path


def writable_file(text: str) -> Path:
    path = Path(text)
    folder = path.absolute().parent
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"expected a file to write, got a folder: {text!r}")
    if not folder.is_dir():
        raise argparse.ArgumentTypeError(f"expected a file in a folder that is there, got {text!r}")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise argparse.ArgumentTypeError(f"expected a file to write, got one where writing is not allowed: {text!r}")
    return path
