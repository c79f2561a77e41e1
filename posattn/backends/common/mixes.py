"""What no fused kernel does with a mix of heads."""

from __future__ import annotations

from posattn.plan import Call


def unsupported(call: Call) -> str | None:
    """Why no kernel runs this call's mix; None if one may."""
    mix = call.plan.mix
    if mix is None or mix.w1.dim() == 2:
        return None
    return (
        f"its mix of heads convolves over {mix.w1.shape[2]} keys (DAPE V2), for which a tile would need its "
        "neighbours' logits of all heads; that is written for the reference alone"
    )
