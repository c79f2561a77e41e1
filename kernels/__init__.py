"""Triton kernels, installed as `posattn.kernels`: device code alone; `posattn/backends/triton/` launches it."""
