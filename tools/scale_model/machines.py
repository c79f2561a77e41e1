"""GPUs as the cost model knows them: kernels at the cycles of the static model (tools/gpu_budget)."""

from __future__ import annotations

from posattn.distributed.cost import Machine

# Cycles of a multiprocessor for 64 x 64 logits of one head at D = Dv = 128, bf16, two phases: forward
# (docs/lab/triton.md) and backward (docs/lab/cuda-sm90.md, docs/lab/cuda.md), plain and with a table over distances.
CYCLES = {
    ("H100", "none"): (776.0, 1680.0),
    ("H100", "table"): (830.0, 2040.0),
    ("A100", "none"): (1440.0, 3127.0),
    ("A100", "table"): (1484.0, 3482.0),
}
# Multiprocessors and their clock in Hz, as vendors give it for the boosted card under load.
CHIPS = {"H100": (132, 1.755e9), "A100": (108, 1.41e9)}
# FlashAttention's published speeds are 0.77 to 0.99 of what this model says of them (tools/gpu_budget/pipes.py).
SHARE = 0.8
HEAD_DIM = 128


def machine(chip: str, encoding: str = "none") -> Machine:
    forward, backward = CYCLES[chip, encoding]
    multiprocessors, clock = CHIPS[chip]
    products = 2.0 * 64 * 64 * 2 * HEAD_DIM  # of QK and PV, multiplications and additions
    per_cycle = multiprocessors * clock * SHARE * products
    return Machine(per_cycle / forward, call=3e-5, backward_rate=per_cycle * 2.5 / backward)
