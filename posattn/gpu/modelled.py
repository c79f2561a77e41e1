"""Cycles of one 64 x 64 tile of logits of one head by the static model (tools/gpu_budget): two phases, tensor cores and
everything else one after the other. bfloat16, the leanest loop, by backend, architecture, pass, dimension, operand."""

from __future__ import annotations

OPERANDS = ("plain", "slope", "table", "profile", "rotary")

# (backend, architecture, pass): {head dimension: cycles in the order of OPERANDS}
_CYCLES: dict[tuple[str, str, str], dict[int, tuple[int, ...]]] = {
    ("cuda", "sm_80", "forward"): {64: (768, 772, 768, 807, 768), 128: (1280, 1312, 1339, 1405, 1280)},
    ("cuda", "sm_80", "backward"): {64: (1583, 1684, 1834, 2166, 1583), 128: (3127, 3302, 3486, 3810, 3127)},
    ("cuda", "sm_90", "forward"): {64: (512, 512, 518, 538, 512), 128: (768, 784, 794, 828, 768)},
    ("cuda", "sm_90", "backward"): {64: (960, 1008, 1189, 2206, 960), 128: (1680, 1728, 2039, 3850, 1680)},
    ("triton", "sm_80", "forward"): {64: (784, 791, 790, 812, 784), 128: (1440, 1514, 1484, 1574, 1454)},
    ("triton", "sm_80", "backward"): {64: (1746, 1837, 2110, 3406, 1740), 128: (3583, 3842, 4448, 5954, 3588)},
    ("triton", "sm_90", "forward"): {64: (520, 520, 572, 610, 520), 128: (776, 808, 830, 877, 776)},
    ("triton", "sm_90", "backward"): {64: (1291, 1354, 1609, 2415, 1284), 128: (2093, 2196, 2517, 3399, 2093)},
}


def cycles(backend: str, arch: str, which: str, dim: int, operand: str) -> int | None:
    """The model's cycles, or None for an architecture that it has no figures of. sm_86 and sm_89 run sm_80's code at
    other rates, so they have none."""
    by_dim = _CYCLES.get((backend, arch, which))
    return None if by_dim is None else by_dim[dim][OPERANDS.index(operand)]
