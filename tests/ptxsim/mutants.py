"""Small changes to PTX, each of which a test of the kernel should notice.

sync: a synchronisation instruction deleted, moved past a neighbouring memory access, or made to wait for less; a
release or an acquire made relaxed.
mask: a comparison of integers off by one (< for <=).
fragment: two registers of a matrix operand exchanged.
rescale: a float multiplication left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

_SYNC = re.compile(
    r"\s*(?:bar|barrier)\.(?:cta\.)?(?:warp\.)?(?:sync|arrive)|\s*cp\.async\.(?:bulk\.)?(?:commit|wait)|"
    r"\s*fence\.(?:proxy|mbarrier_init)|\s*wgmma\.(?:fence|commit|wait)|"
    r"\s*mbarrier\.arrive|\s*\{[^}]*mbarrier\.(?:try|test)_wait[^}]*\}"
)
_MEMORY = re.compile(
    r"\s*(?:\{\s*\.reg[^;]*;[^;]*;\s*)?(?:@!?%?\w+\s+)?(?:ld\.shared|st\.shared|ldmatrix|stmatrix|cp\.async|wgmma\.mma|atom|red)"
)
_EDGE = re.compile(r"\s*(?:\$?\w+:|(?:@!?%\w+\s+)?(?:bra|ret|exit))")
_COMPARE = re.compile(r"(\s*(?:@!?%\w+\s+)?setp\.)(lt|le|gt|ge)(\.(?:and\.|or\.|xor\.)?[su]\d+\s)")
_OFF_BY_ONE = {"lt": "le", "le": "lt", "gt": "ge", "ge": "gt"}
_PRODUCT = re.compile(r"(\s*(?:@!?%\w+\s+)?)mul(?:\.rn)?(?:\.ftz)?\.f32\s+(%\w+), (%\w+), [^;]+;")
_ORDERED = re.compile(r"\b(ld|st|atom|red)\.(acquire|release|acq_rel)\b")
_FRAGMENTS = re.compile(r"\b(?:mma\.sync|ldmatrix|wgmma\.mma_async)\S*")
_WAIT = re.compile(r"(wait_group(?:\.sync\.aligned)?\s+)(\d+)")


@dataclass(frozen=True)
class Mutant:
    """A changed kernel: what was changed, where, and its PTX."""

    kind: str
    change: str
    line: int
    ptx: str


def _code(line: str) -> str:
    return line.split("//")[0].rstrip()


def _moved(lines: list[str], at: int, step: int) -> list[str] | None:
    """The sync instruction at `at` moved past the nearest memory access in its basic block."""
    i = at + step
    while 0 <= i < len(lines) and not _EDGE.match(lines[i]) and not _SYNC.match(lines[i]):
        if _MEMORY.match(lines[i]):
            rest = lines[:at] + lines[at + 1 :]
            return [*rest[:i], lines[at], *rest[i:]]  # the far side of the access, whichever way it went
        i += step
    return None


def _with(lines: list[str], at: int, text: str) -> str:
    return "\n".join([*lines[:at], text, *lines[at + 1 :]])


def _sync(lines: list[str]) -> Iterator[Mutant]:
    for i, line in enumerate(lines):
        ordered = _ORDERED.search(_code(line))
        if ordered:
            relaxed = _with(lines, i, line.replace(ordered[0], f"{ordered[1]}.relaxed"))
            yield Mutant("sync", f"{_code(line).strip()} becomes relaxed", i + 1, relaxed)
        if not _SYNC.match(line):
            continue
        name = _code(line).strip()
        yield Mutant("sync", f"delete {name}", i + 1, _with(lines, i, ""))
        for step, way in ((1, "later"), (-1, "earlier")):
            moved = _moved(lines, i, step)
            if moved:
                yield Mutant("sync", f"move {name} {way}", i + 1, "\n".join(moved))
        wait = _WAIT.search(line)
        if wait:
            looser = line.replace(wait[0], f"{wait[1]}{int(wait[2]) + 1}")
            yield Mutant("sync", f"{name} leaves one more", i + 1, _with(lines, i, looser))


def _mask(lines: list[str]) -> Iterator[Mutant]:
    for i, line in enumerate(lines):
        found = _COMPARE.match(line)
        if found:
            change = _OFF_BY_ONE[found[2]]
            text = found[1] + change + line[found.end(2) :]
            yield Mutant("mask", f"{found[2]} becomes {change}: {_code(line).strip()}", i + 1, _with(lines, i, text))


def _fragment(lines: list[str]) -> Iterator[Mutant]:
    for i, line in enumerate(lines):
        found = _FRAGMENTS.search(_code(line))
        if not found:
            continue
        start, end = i, i
        while ";" not in _code(lines[end])[found.end() if end == start else 0 :]:
            end += 1  # Triton writes one instruction over several lines
        text = " ".join(_code(part) for part in lines[start : end + 1])
        is_matrix = not found[0].startswith("ldmatrix")
        groups = list(re.finditer(r"\{([^}]*)\}", text[found.end() :]))
        for number, group in enumerate(groups[:3] if is_matrix else groups[:1]):
            registers = [name.strip() for name in group[1].split(",")]
            if len(registers) < 2:
                continue
            swapped = ", ".join([registers[1], registers[0], *registers[2:]])
            at, to = (found.end() + edge for edge in group.span(1))
            operand = "DAB"[number] if is_matrix else "result"
            ptx = "\n".join([*lines[:start], text[:at] + swapped + text[to:], *lines[end + 1 :]])
            yield Mutant("fragment", f"swap registers 0 and 1 of {operand}: {found[0]}", i + 1, ptx)


def _rescale(lines: list[str]) -> Iterator[Mutant]:
    for i, line in enumerate(lines):
        found = _PRODUCT.match(line)
        if found:
            text = f"{found[1]}mov.b32 {found[2]}, {found[3]};"
            yield Mutant("rescale", f"drop {_code(line).strip()}", i + 1, _with(lines, i, text))


_KINDS = {"sync": _sync, "mask": _mask, "fragment": _fragment, "rescale": _rescale}
KINDS = tuple(_KINDS)


def mutants(ptx: str, kind: str, limit: int = 0) -> list[Mutant]:
    """Every mutant of one kind; with a limit, that many of them at even distances."""
    found = list(_KINDS[kind](ptx.split("\n")))
    if not limit or len(found) <= limit:
        return found
    return [found[i * len(found) // limit] for i in range(limit)]
