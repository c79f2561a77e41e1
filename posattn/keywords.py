"""Arguments that attention functions elsewhere have, and what says the same here."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

from posattn.errors import ArgumentTypeError

# By function and by the names of torch, flash-attn, xformers, FlexAttention and transformers.
_ELSEWHERE: dict[str, dict[str, str]] = {
    "attention": {
        "is_causal": "causal, which counts from the last key (posattn.scaled_dot_product_attention's is_causal counts "
        "from the first)",
        "attn_mask": "mask for a boolean one (True: seen) and bias for a float one (added)",
        "attention_mask": "mask for a boolean one (True: seen) and bias for a float one (added)",
        "attn_bias": "bias",
        "key_padding_mask": "k_lengths, or mask=~key_padding_mask[:, None, None]",
        "softmax_scale": "scale",
        "scaling": "scale",
        "window_size": "window, whose sides are None, not -1, for no limit",
        "sliding_window": "window=(sliding_window - 1, 0), which counts the keys beside the query's own",
        "alibi_slopes": "position=posattn.ALiBi(heads, slopes=alibi_slopes)",
        "logits_soft_cap": "softcap",
        "logit_softcapping": "softcap",
        "enable_gqa": "nothing: k and v may have any number of heads that divides q's",
        "score_mod": "position: posattn.relative(fn, heads) for a function of the distance, or an Encoding",
        "block_mask": "causal, window, segments and mask, whose hidden tiles are skipped",
        "cu_seqlens": "cu_seqlens_q and cu_seqlens_k",
        "document_ids": "segments",
        "segment_ids": "segments",
        "cache_seqlens": "k_lengths",
        "cache_leftpad": "k_starts",
        "leftpad_k": "k_starts",
        "cache_position": "offset, where the first query sits on the keys' axis",
        "seqused_k": "k_lengths",
        "position_ids": "q_positions and k_positions",
        "return_attn_probs": "return_lse for the log-sum-exp",
    },
    "scaled_dot_product_attention": {
        "causal": "is_causal, which counts from the first key (posattn.attention's causal counts from the last)",
        "mask": "attn_mask",
        "bias": "attn_mask, of a floating dtype",
        "softmax_scale": "scale",
        "dropout": "dropout_p",
    },
}


def refuse(function: str, name: str, known: Iterable[str]) -> None:
    """TypeError for an argument that the function does not have, saying what to take instead."""
    instead = _ELSEWHERE[function].get(name)
    if instead is None:
        near = get_close_matches(name, list(known), n=1, cutoff=0.7)
        instead = near[0] if near else f"one of {', '.join(known)}"
    raise ArgumentTypeError(
        f"{name}: expected an argument of posattn.{function}, got one that it does not have; take {instead}"
    )
