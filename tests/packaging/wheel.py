"""What an installed wheel must do, away from the sources: a call on the CPU kernels as the reference computes it."""

import torch

import posattn
import posattn._cpu
import posattn.bench
import posattn.demo
import posattn.kernels

q = torch.randn(1, 2, 5, 8)
out = posattn.attention(q, q, q, posattn.ALiBi(2), causal=True, backend="cpu")
expected = posattn.attention(q, q, q, posattn.ALiBi(2), causal=True, backend="reference")
torch.testing.assert_close(out, expected)
print(posattn.__file__, posattn._cpu.__file__, posattn.bench.__file__, posattn.kernels.__file__, sep="\n")
