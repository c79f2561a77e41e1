"""The faults, a line each: where, what stands there, what stands there instead, and the tests that should notice."""

from ..fault import Fault
from . import encodings, modules, native, package

FAULTS: tuple[Fault, ...] = (*native.FAULTS, *package.FAULTS, *encodings.FAULTS, *modules.FAULTS)
