"""Tiles of the forward kernel, by architecture and head dimension."""

from __future__ import annotations

import torch

from posattn.plan import Call

from .operands import padded
from .tiles import Tile


def forward_tile(arch: str, call: Call) -> Tile:
    dim = max(padded(call.q.shape[3]), padded(call.v.shape[3]))
    if call.q.dtype == torch.float32:
        return Tile(32, 32, 4, 1, "")
    if dim <= 64:
        return Tile(128, 64, 4, 3, "")
    return Tile(128, 64, 8, 3, "")
