"""Tensor maps for cp.async.bulk.tensor, made from a tensor by the rules of the driver's cuTensorMapEncodeTiled.

    encode(k.flatten(0, 2), box=(64, 128), swizzle=128)   # tiles of 128 rows of 64 elements

The driver's own format is not published; this one has its size, and only the PTX machine reads it
(machine/tensor_map.h). Sizes, boxes and coordinates count from the innermost dimension, as there.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch

_MAGIC = b"tnsormap"
_DIMENSIONS = 5
_SWIZZLES = (0, 32, 64, 128)


def encode(tensor: torch.Tensor, box: Sequence[int], swizzle: int = 0, nan_fill: bool = False) -> bytes:
    """The 128 bytes of a map of `tensor` (contiguous in its last dimension) in tiles of `box` elements.

    swizzle: 0, 32, 64 or 128 bytes, the length of a row of the box then. nan_fill: elements outside the tensor arrive
    as NaN instead of zero.
    """
    size = tensor.element_size()
    sizes, strides = tensor.shape[::-1], [stride * size for stride in tensor.stride()[::-1]]
    if not 1 <= tensor.dim() <= _DIMENSIONS:
        raise ValueError(f"tensor: expected 1 to {_DIMENSIONS} dimensions, got {tensor.dim()}")
    if len(box) != tensor.dim() or any(not 1 <= n <= 256 for n in box):
        raise ValueError(f"box: expected {tensor.dim()} sizes from 1 to 256, got {tuple(box)}")
    if strides[0] != size or any(stride % 16 for stride in strides[1:]):
        raise ValueError(f"tensor: expected a contiguous last dimension and strides of 16 bytes, got {tensor.stride()}")
    if tensor.data_ptr() % 16:
        raise ValueError("tensor: expected an address that is a multiple of 16")
    row = box[0] * size
    if swizzle not in _SWIZZLES or row % 16 or (swizzle and row != swizzle):
        raise ValueError(f"swizzle: expected one of {_SWIZZLES} and boxes as wide, got {swizzle} and {row} bytes")
    none = _DIMENSIONS - tensor.dim()
    head = struct.pack("<8sQ4I", _MAGIC, tensor.data_ptr(), tensor.dim(), size, swizzle, nan_fill)
    extents = struct.pack("<10I", *sizes, *[1] * none, *box, *[1] * none)
    return (head + extents + struct.pack("<4Q", *strides[1:], *[0] * none)).ljust(128, b"\0")
