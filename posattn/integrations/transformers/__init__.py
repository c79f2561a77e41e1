"""posattn as an attention implementation of Hugging Face transformers.

    import posattn.integrations.transformers
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="posattn")

Importing registers the name. `convert(model)` routes what the name alone does not reach: T5's biases as tables, and the
attention of BLOOM, MPT, Falcon and GPT-Neo. `continuous_batching(model)` is for `generate_batch`, and `from_hf(config)`
gives the encoding that a config stands for.
"""

from transformers import AttentionInterface, AttentionMaskInterface

from posattn.integrations.transformers.attention import attention_forward
from posattn.integrations.transformers.batching import continuous_batching
from posattn.integrations.transformers.config import from_hf
from posattn.integrations.transformers.convert import convert
from posattn.integrations.transformers.masks import AttentionMask, attention_mask

__all__ = [
    "AttentionMask",
    "attention_forward",
    "attention_mask",
    "continuous_batching",
    "convert",
    "from_hf",
    "register",
]


def register(name: str = "posattn") -> None:
    """Make `attn_implementation=name` mean posattn. Importing this module has done so for "posattn".

    A name of transformers' own is replaced: register("sdpa") reroutes every model that loads without naming one.
    """
    if not isinstance(name, str) or not name:
        raise ValueError(f"name: expected a name for attn_implementation, got {name!r}")
    AttentionInterface.register(name, attention_forward)
    AttentionMaskInterface.register(name, attention_mask)


register()
