"""`module:name` of a command line: an encoding of the user's own, from an instance, a class or a function."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import inspect
import sys
from pathlib import Path
from types import ModuleType

from posattn import parity
from posattn.encodings.base import Encoding
from posattn.errors import ArgumentTypeError, ArgumentValueError

_HEADS = ("num_heads", "heads", "n_heads")
_HEAD_DIM = ("head_dim", "head_size")
_TOKENS = ("tokens", "max_distance", "max_positions", "max_length")


def chosen(options: argparse.Namespace, parser: argparse.ArgumentParser) -> dict[str, Encoding]:
    """What options.encoding names: a target, or one of posattn's own examples. Mistakes end in a usage error."""
    if ":" in options.encoding:
        try:
            return load(options.encoding, options.heads, options.head_dim, options.tokens)
        except (ArgumentValueError, ArgumentTypeError) as error:
            parser.error(str(error))
    catalogue = examples_of(options, parser, every=True)
    found = {name.lower(): name for name in catalogue}
    name = found.get(options.encoding.lower())
    if name is None:
        parser.error(f"ENCODING: expected module:name or one of {', '.join(catalogue)}, got {options.encoding!r}")
    return {name: catalogue[name]}


def examples_of(
    options: argparse.Namespace, parser: argparse.ArgumentParser, every: bool = False
) -> dict[str, Encoding]:
    """The examples for a command line's sizes, with `every` those too that no kernel computes; sizes that an encoding
    refuses end the program with a usage error."""
    try:
        return parity.examples(options.heads, options.head_dim, options.tokens, every)
    except ValueError as error:
        parser.error(f"--heads {options.heads} --head-dim {options.head_dim} --tokens {options.tokens}: {error}")


def load(target: str, num_heads: int, head_dim: int, tokens: int) -> dict[str, Encoding]:
    """The encodings that `module:name` or `file.py:name` stands for, by name.

    name is an Encoding, a subclass (its `examples` if it has them, else an instance), or a function that returns an
    Encoding or a dict of them. Classes and functions are given num_heads, head_dim and tokens where they ask for an
    argument so called. ValueError or TypeError, saying what is wrong, for anything else.
    """
    place, _, name = target.rpartition(":")
    module = _module(place)
    found: object = module
    for part in name.split("."):
        if not hasattr(found, part):
            raise ArgumentValueError(f"{target}: expected a name in {place}, got {name!r}, which is not there")
        found = getattr(found, part)
    if isinstance(found, type) and issubclass(found, Encoding) and "examples" in vars(found):
        return found.examples(num_heads, head_dim, tokens)
    if not isinstance(found, Encoding) and callable(found):
        found = found(**_given(target, found, num_heads, head_dim, tokens))
    made: dict[str, Encoding] = {}
    for key, value in (found if isinstance(found, dict) else {name: found}).items():
        if not isinstance(value, Encoding):
            raise ArgumentTypeError(
                f"{target}: expected an Encoding, a subclass, or a function that makes one, got {type(value).__name__}"
            )
        made[str(key)] = value
    return made


def _module(place: str) -> ModuleType:
    if not place.endswith(".py"):
        if "" not in sys.path:
            sys.path.insert(0, "")  # as `python -m` has it: a module beside which the command is run
        try:
            return importlib.import_module(place)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{place}.".startswith(f"{error.name}."):
                raise  # the module is there, and misses another
            raise ArgumentValueError(f"{place}: expected a module that can be imported, got {error}") from error
    path = Path(place)
    if not path.is_file():
        raise ArgumentValueError(f"{place}: expected a file, got none of that name")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def _given(target: str, maker: object, num_heads: int, head_dim: int, tokens: int) -> dict[str, int]:
    """Arguments for `maker`, a class or a function, by the names of its parameters."""
    sizes = dict.fromkeys(_HEADS, num_heads) | dict.fromkeys(_HEAD_DIM, head_dim)
    sizes |= dict.fromkeys(_TOKENS, tokens)
    given, lacking = {}, []
    for name, parameter in inspect.signature(maker).parameters.items():  # type: ignore[arg-type]
        needed = parameter.default is parameter.empty and parameter.kind not in (
            parameter.VAR_POSITIONAL,
            parameter.VAR_KEYWORD,
        )
        if name in sizes and needed and parameter.kind is not parameter.POSITIONAL_ONLY:
            given[name] = sizes[name]
        elif needed:
            lacking.append(name)
    if lacking:
        raise ArgumentTypeError(
            f"{target}: expected arguments called num_heads, head_dim or tokens, which are given, got "
            f"{', '.join(lacking)} besides; name an instance, or a function that makes one, or write `examples`"
        )
    return given
