"""The memory of a launch: which bytes each tensor may touch, and copies that keep tensors far from one another."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable

import torch

# More than any row of a test's tensors, so that a wrong stride lands in a gap and not in a neighbour.
GAP = 1 << 20
_ALIGNMENT = 256


def extent(tensor: torch.Tensor) -> tuple[int, int]:
    """The first byte of a view relative to its storage, and the number of bytes up to its last element's end."""
    if tensor.numel() == 0:
        return tensor.storage_offset() * tensor.element_size(), 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.storage_offset() * tensor.element_size(), (last + 1) * tensor.element_size()


class Arena:
    """Copies of the storages behind some tensors, each between gaps that no tensor owns.

    Views of one storage stay views of one copy, and every copy keeps the alignment of its original.
    """

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        self._storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors if t.numel()}
        room = GAP + sum(s.nbytes() + GAP + 2 * _ALIGNMENT for s in self._storages.values())
        self._memory = torch.empty(room, dtype=torch.uint8)
        self._bases: dict[int, int] = {}
        at = GAP
        for original, storage in self._storages.items():
            at += (original - (self._memory.data_ptr() + at)) % _ALIGNMENT
            self._bases[original] = self._memory.data_ptr() + at
            # Not tensor copies: those wake every OpenMP thread for a few kilobytes.
            ctypes.memmove(self._bases[original], original, storage.nbytes())
            at += storage.nbytes() + GAP

    def address(self, tensor: torch.Tensor) -> int:
        """Where the copy of `tensor` starts; 0 for an empty tensor."""
        if not tensor.numel():
            return 0
        return self._bases[tensor.untyped_storage().data_ptr()] + extent(tensor)[0]

    def moved(self, image: bytes) -> bytes:
        """A parameter struct whose pointers (its aligned 64-bit words that lie in a storage) point into the copies."""
        words = bytearray(image)
        for at in range(0, len(image) - 7, 8):
            word = int.from_bytes(image[at : at + 8], "little")
            for original, storage in self._storages.items():
                if original <= word < original + storage.nbytes():
                    words[at : at + 8] = (word - original + self._bases[original]).to_bytes(8, "little")
        return bytes(words)

    def copy_back(self) -> None:
        """Writes every copy into its original."""
        for original, storage in self._storages.items():
            ctypes.memmove(original, self._bases[original], storage.nbytes())
