"""Kernels of attention with an MLP over the heads (DAPE)."""
