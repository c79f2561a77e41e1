"""The API pages hold every public name, each once, and every docstring says what a reader needs."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from types import ModuleType

import pytest

import posattn
from posattn import encodings, plan
from tests.docs.pages import ROOT

DIRECTIVE = re.compile(r"^::: ([\w.]+)$", re.MULTILINE)
EVERY = [name for page in sorted((ROOT / "docs" / "api").glob("*.md")) for name in DIRECTIVE.findall(page.read_text())]
# The integrations import what they integrate: their names are read, not imported.
INTEGRATIONS = [name for name in EVERY if name.startswith("posattn.integrations.")]
NAMES = [name for name in EVERY if name not in INTEGRATIONS]


def resolved(path: str) -> object:
    """The object of a dotted path: a module's, or a module. (posattn.attention is both a module and its function.)"""
    module, _, name = path.rpartition(".")
    found = vars(importlib.import_module(module))
    return found[name] if name in found else importlib.import_module(path)


def public() -> dict[str, object]:
    """Every name that a user may import, by where from."""
    found = {f"posattn.{name}": getattr(posattn, name) for name in posattn.__all__ if name != "__version__"}
    found |= {f"posattn.encodings.{name}": getattr(encodings, name) for name in encodings.__all__}
    found |= {f"posattn.nn.{name}": getattr(posattn.nn, name) for name in posattn.nn.__all__}
    found.pop("posattn.nn", None)  # a module
    operands = {n: x for n, x in vars(plan).items() if dataclasses.is_dataclass(x) and x.__module__ == plan.__name__}
    return found | {f"posattn.plan.{name}": value for name, value in operands.items()}


def test_every_public_name_is_on_a_page():
    shown = [resolved(name) for name in NAMES]
    assert [name for name, value in public().items() if not any(value is x for x in shown)] == []


@pytest.mark.parametrize("package", sorted((ROOT / "posattn" / "integrations").glob("*/__init__.py")), ids=str)
def test_every_name_of_an_integration_is_on_a_page(package):
    (names,) = re.findall(r"^__all__ = \[(.*?)\]", package.read_text(), re.DOTALL | re.MULTILINE)
    module = f"posattn.integrations.{package.parent.name}"
    assert {f"{module}.{name}" for name in re.findall(r'"(\w+)"', names)} == {
        name for name in INTEGRATIONS if name.startswith(f"{module}.")
    }


def test_nothing_is_there_twice():
    assert len(NAMES) == len({id(resolved(name)) for name in NAMES})


@pytest.mark.parametrize("name", NAMES)
def test_every_argument_is_explained(name):
    """What has arguments names each of them in its docstring (a class's may be in its own or in a base's)."""
    value = resolved(name)
    text = inspect.getdoc(value)
    assert text, f"{name} has no docstring"
    if isinstance(value, ModuleType):
        return
    if inspect.isclass(value):
        text = "\n".join(
            filter(None, (inspect.getdoc(base) for base in value.__mro__ if base.__module__ != "builtins"))
        )
    code = inspect.unwrap(value) if inspect.isfunction(value) else value
    try:
        parameters = inspect.signature(code).parameters.values()
    except ValueError:
        return
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    missing = [p.name for p in parameters if p.kind not in kinds and not re.search(rf"\b{p.name}\b", text)]
    assert missing == [], f"{name}: {missing}"
