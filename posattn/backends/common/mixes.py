"""What no fused kernel does with a mix of heads, with positions that go by gates, or with relative keys."""

from __future__ import annotations

from posattn.plan import Call


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
    if mix is None or mix.w1.dim() == 2:
        return None
    return (
        f"its mix of heads convolves over {mix.w1.shape[2]} keys (DAPE V2), for which a tile would need its "
        "neighbours' logits of all heads; that is written for the reference alone"
    )
