"""What no fused kernel does: some mixes of heads, positions by gates, relative keys; and what the CPU's alone do."""

from __future__ import annotations

from posattn.plan import Call


def unsupported_decay(call: Call) -> str | None:
    """Why the kernels for GPUs do not run this call's decay; None if there is none."""
    if call.plan.bias.decay is None:
        return None
    return "its bias is a decay, a difference of two numbers a token, which runs on the CPU and in the reference alone"


def unsupported(call: Call) -> str | None:
    """Why no kernel runs this call's mix, gated positions or relative keys; None if one may."""
    if call.plan.gated is not None:
        return (
            "its positions are sums of gates over the keys after each (CoPE), which a row's tiles would hand on from "
            "the last key to the first; that is written for the reference alone"
        )
    if call.plan.relative is not None:
        return (
            "its queries or keys meet a vector a distance (relative keys), a second product in each tile that is read "
            "on a slant; that is written for the reference alone"
        )
    mix = call.plan.mix
    if mix is None:
        return None
    if mix.inner.decay is not None:
        return "a decay inside a mix of heads is written for the reference alone; beside the mix, it is added after it"
    if mix.w1.dim() == 2:
        return None
    return (
        f"its mix of heads convolves over {mix.w1.shape[2]} keys (DAPE V2), for which a tile would need its "
        "neighbours' logits of all heads; that is written for the reference alone"
    )
