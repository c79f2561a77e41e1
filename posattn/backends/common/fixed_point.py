"""Units in which sums of gradients are integers, so that the order of additions does not matter."""

from __future__ import annotations

import torch
from torch import Tensor

from posattn.plan import Bias, Call, HeadMix


def units(call: Call, grad_out: Tensor, delta: Tensor, factor: Tensor | float = 1.0) -> Tensor:
    """[1] float32: the power of two of which integers of 62 bits hold any sum of logit gradients times `factor`.

    A row's weights sum to at most 1, so its gradients sum to at most what one of weight 1 can be."""
    largest_v = torch.linalg.vector_norm(call.v.float(), dim=-1).nan_to_num(0.0, 0.0, 0.0).max()
    rows = torch.linalg.vector_norm(grad_out.float(), dim=-1).sum() * largest_v / (1.0 - call.dropout_p)
    total = (rows + delta.abs().sum()) * factor
    return torch.exp2((61.0 - torch.log2(total).ceil()).clamp(-120.0, 120.0)).reshape(1)


def in_ones(sums: Tensor, units: Tensor) -> Tensor:
    """Integers that count `units` to 1, as float32."""
    return (sums.double() / units).float()


def most_into_inner(mix: HeadMix, heads: int) -> Tensor:
    """How much larger than the gradients of the logits those of the inner bias can be, summed over heads."""
    into = mix.w1[:, -heads:].float().abs().sum(1)
    return 1.0 + (mix.w2.float().abs() @ into).max()


def bias_units(call: Call, bias: Bias, grad_out: Tensor, delta: Tensor, most: Tensor | float = 1.0) -> Tensor:
    """units() that serve the gradients of all operands of `bias` alike; `most`: as most_into_inner has it."""
    factor = torch.ones((), device=delta.device)
    if bias.profile is not None:
        psi, scale, steep = (
            x.float().abs().max() for x in (bias.profile.psi, bias.profile.row_scale, bias.profile.segment_slope)
        )
        factor = torch.stack([factor, psi * scale, psi * steep, scale * steep]).max()
    return units(call, grad_out, delta, factor * most)
