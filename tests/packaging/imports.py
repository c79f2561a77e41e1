"""What imports what, read from the sources themselves: Python's import statements and C++'s #include lines.

Names are those of the installed package: `kernels/common/bias.py` is posattn.kernels.common.bias.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)


@dataclass(frozen=True)
class Import:
    """One module naming another. at_import: when it is loaded itself, and not later or for the type checker alone."""

    importer: str
    imported: str
    at_import: bool = True

    def __str__(self) -> str:
        return f"{self.importer} imports {self.imported}"


def modules(packages: Mapping[str, Path]) -> dict[str, Path]:
    """Every module below these folders (package name to folder), by its dotted name."""
    found = {}
    for package, folder in packages.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join((package, *(part for part in parts if part != "__init__")))] = path
    return found


def imports(found: Mapping[str, Path]) -> set[Import]:
    """Every import of a module's own family (the first part of its name), from anywhere in its text. What an import
    names is a module if there is one of that name, else the module that holds the name; one that does not exist as
    Python (an extension) stays as it is written."""
    return {
        Import(module, _module_of(name, found), at_import)
        for module, path in found.items()
        for name, at_import in _named(module, path)
        if name.split(".")[0] == module.split(".")[0]
    }


def _module_of(name: str, found: Mapping[str, Path]) -> str:
    parent = name.rpartition(".")[0]
    private = name.rpartition(".")[2].startswith("_") and parent in found and _is_package(found[parent])
    return name if name in found or private or parent not in found else parent


def _is_package(path: Path) -> bool:
    return path.name == "__init__.py"


def _named(module: str, path: Path) -> Iterator[tuple[str, bool]]:
    parts = module.split(".") + (["__init__"] if _is_package(path) else [])
    for node, at_import in _statements(ast.parse(path.read_text()), True):
        if isinstance(node, ast.Import):
            yield from ((alias.name, at_import) for alias in node.names)
        else:
            base = [*parts[: len(parts) - node.level]] if node.level else []
            base += [node.module] if node.module else []
            yield from ((".".join((*base, alias.name)), at_import) for alias in node.names)


def _statements(node: ast.AST, at_import: bool) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, at_import
            continue
        later = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        typing = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test)
        yield from _statements(child, at_import and not later and not typing)


def includes(folder: Path) -> set[Import]:
    """Every file below `folder` that includes another of it, by their paths within it."""
    return {
        Import(path.relative_to(folder).as_posix(), included)
        for path in sorted(folder.rglob("*"))
        if path.suffix in (".h", ".cu")
        for included in _INCLUDE.findall(path.read_text())
    }


def group_of(name: str, groups: Iterable[str], separator: str = ".") -> str | None:
    """The group that a name belongs to: itself, or what it lies below. A group that others lie below is one file."""
    named = set(groups)
    folders = {group for group in named if not any(other.startswith(group + separator) for other in named)}
    fitting = (group for group in named if name == group or (group in folders and name.startswith(group + separator)))
    return next(fitting, None)


def breaches(
    edges: Iterable[Import],
    layers: Sequence[Sequence[str]],
    apart: Iterable[tuple[str, str]] = (),
    separator: str = ".",
) -> list[str]:
    """What breaks the order of `layers`, lowest first: a group imports itself and the groups of lower layers, and none
    of the pairs (importer, imported) in `apart`. A name that belongs to no group is a breach too."""
    height = {group: number for number, layer in enumerate(layers) for group in layer}
    found = []
    for edge in edges:
        importer, imported = (group_of(name, height, separator) for name in (edge.importer, edge.imported))
        if importer is None or imported is None:
            unplaced = edge.importer if importer is None else edge.imported
            found.append(f"{edge}: {unplaced} is in no layer")
        elif importer != imported and height[imported] >= height[importer]:
            found.append(f"{edge}: {imported} is no lower layer than {importer}")
        elif any(
            group_of(edge.importer, [one], separator) and group_of(edge.imported, [other], separator)
            for one, other in apart
        ):
            found.append(f"{edge}: the two are kept apart")
    return sorted(found)


def cycles(edges: Iterable[Import]) -> list[list[str]]:
    """Groups of modules that import one another as they are loaded."""
    after: dict[str, set[str]] = {}
    for edge in edges:
        if edge.at_import and edge.importer != edge.imported:
            after.setdefault(edge.importer, set()).add(edge.imported)
    reached = {name: _reach(name, after) for name in after}
    circles = {frozenset(b for b in reached[a] if a in reached.get(b, ())) for a in after if a in reached[a]}
    return sorted(sorted(circle) for circle in circles)


def _reach(start: str, after: Mapping[str, set[str]]) -> set[str]:
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        for name in after.get(waiting.pop(), set()) - seen:
            seen.add(name)
            waiting.append(name)
    return seen
