"""Kernels of plain attention: forward, split keys, and the backward pass."""
