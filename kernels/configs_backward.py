"""Tiles of the backward kernels, by architecture and head dimension."""

from __future__ import annotations

import torch

from posattn.plan import Call

from .operands import padded
from .tiles import Tile


def _dim(call: Call) -> int:
    return max(padded(call.q.shape[3]), padded(call.v.shape[3]))


def query_tile(arch: str, call: Call) -> Tile:
    if call.q.dtype == torch.float32:
        return Tile(32, 32, 4, 1, "")
    return Tile(64, 64, 4, 2, "")


def key_tile(arch: str, call: Call) -> Tile:
    if call.q.dtype == torch.float32:
        return Tile(32, 32, 4, 1, "")
    return Tile(64, 64, 4, 2, "")


def bias_tile(arch: str, call: Call) -> Tile:
    if call.q.dtype == torch.float32:
        return Tile(32, 32, 4, 1, "")
    return Tile(64, 64, 4, 2, "")
