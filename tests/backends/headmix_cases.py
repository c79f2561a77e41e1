"""What both GPU backends' HeadMix (DAPE) is tested with: tensors, positions and options of a call."""

from __future__ import annotations

import torch

import posattn


def tensors(dtype=torch.bfloat16, heads=3, kv_heads=3, q_len=37, k_len=53, dim=32, batch=1):
    shapes = ((heads, q_len, dim), (kv_heads, k_len, dim), (kv_heads, k_len, dim))
    return [torch.randn(batch, *shape).to(dtype) for shape in shapes]


SHARED = {
    "no inner bias": ({}, lambda: posattn.DAPE(None, 3, width=8), lambda: {"causal": True}),
    "table, two sequences": (
        {"batch": 2}, lambda: posattn.DAPE(posattn.Kerple(3), 3, width=8), lambda: {"causal": True}
    ),
    "concat, slope, softcap": (
        {}, lambda: posattn.DAPE(posattn.ALiBi(3, learnable=True), 3, form="concat"), lambda: {"softcap": 3.0}
    ),
    "add, profile": ({}, lambda: posattn.DAPE(posattn.FIRE(3, width=6), 3, form="add"), dict),
    "outer bias, sinks, dropout, window, mask": (
        {"batch": 2}, lambda: posattn.DAPE(posattn.Kerple(3), 3, width=8),
        lambda: {"bias": torch.randn(2, 1, 37, 53), "sinks": torch.randn(3), "dropout_p": 0.3, "window": (20, None),
                 "mask": torch.rand(1, 3, 37, 53) < 0.7},
    ),
    "packed documents": (
        {"q_len": 60, "k_len": 50}, lambda: posattn.DAPE(posattn.Kerple(3), 3, width=8),
        lambda: {
            "causal": True,
            "cu_seqlens_q": torch.tensor([0, 5, 5, 60]),
            "cu_seqlens_k": torch.tensor([0, 20, 21, 50]),
        },
    ),
    "key lengths": (
        {"q_len": 5, "batch": 3}, lambda: posattn.DAPE(posattn.Kerple(3), 3, width=8),
        lambda: {"causal": True, "k_lengths": torch.tensor([0, 3, 49])},
    ),
}  # fmt: skip
