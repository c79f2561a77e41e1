"""A launch configuration: tile shape, warps and pipeline stages, with its reason."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """`reason` is the measured or modelled ground for these numbers."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    reason: str
