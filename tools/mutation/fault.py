"""One fault: a place in the source, what stands there instead, and the tests that should notice.

The text before marks the place by «»: "lo = imax(lo, «at - p.left»)" is the expression between the marks, and what lies
around it makes it unique in its file; without marks the whole text is meant. Any whitespace stands for any other.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


class Stale(Exception):
    """The source no longer has the text that a fault replaces."""


@dataclass(frozen=True)
class Fault:
    """`tests` are pytest's arguments, each string a run of its own; `equivalent` says why no test can notice."""

    file: str
    before: str
    after: str
    tests: tuple[str, ...]
    equivalent: str = ""

    @property
    def native(self) -> bool:
        return self.file.startswith("csrc/")

    @property
    def name(self) -> str:
        return f"{self.file}: {self.before}  ->  {self.after or 'nothing'}"

    def span(self, text: str) -> tuple[int, int]:
        """Where in `text` the replaced piece begins and ends."""
        pieces = re.split("[«»]", self.before)
        if len(pieces) == 1:
            pieces = ["", *pieces, ""]
        if len(pieces) != 3:
            raise Stale(f"{self.name}: expected one «piece», got {len(pieces)} parts")
        pattern = "".join(f"({_flexible(piece)})" for piece in pieces)
        found = list(re.finditer(pattern, text))
        if len(found) != 1:
            raise Stale(f"{self.name}: expected this text once, found it {len(found)} times")
        return found[0].span(2)

    def applied(self, text: str) -> str:
        """The source with the fault in it."""
        begin, end = self.span(text)
        return text[:begin] + self.after + text[end:]


def _flexible(text: str) -> str:
    """A pattern in which every run of whitespace matches any other; clang-format may break a line anywhere."""
    return r"\s+".join(re.escape(part) for part in re.split(r"\s+", text))
