"""Positional encodings. `__all__` holds those that attention takes; tests and benches discover them from it."""

from posattn.encodings.alibi import ALiBi
from posattn.encodings.base import Context as Context
from posattn.encodings.base import Encoding as Encoding
from posattn.encodings.base import Sum as Sum
from posattn.encodings.bias import Bias
from posattn.encodings.bipe import BiPE
from posattn.encodings.bipe import segment_positions as segment_positions
from posattn.encodings.cope import CoPE
from posattn.encodings.dape import DAPE
from posattn.encodings.deberta import DeBERTa
from posattn.encodings.decay import Decay, ForgetGate
from posattn.encodings.embeddings import LearnedEmbedding as LearnedEmbedding
from posattn.encodings.embeddings import SinusoidalEmbedding as SinusoidalEmbedding
from posattn.encodings.fire import FIRE
from posattn.encodings.kerple import Kerple
from posattn.encodings.logit_scale import LogitScale
from posattn.encodings.relative import RelativeTable
from posattn.encodings.relative_2d import RelativeTable2D, RelativeTable3D
from posattn.encodings.relative_function import Relative
from posattn.encodings.rope import RoPE
from posattn.encodings.rope import RotaryEncoding as RotaryEncoding
from posattn.encodings.rope_axes import AxialRoPE, MRoPE
from posattn.encodings.sandwich import Sandwich
from posattn.encodings.scaling import DynamicNTK as DynamicNTK
from posattn.encodings.scaling import Linear as Linear
from posattn.encodings.scaling import Llama3 as Llama3
from posattn.encodings.scaling import LongRoPE as LongRoPE
from posattn.encodings.scaling import Proportional as Proportional
from posattn.encodings.scaling import Scaling as Scaling
from posattn.encodings.scaling import YaRN as YaRN
from posattn.encodings.shaw import ShawRelative
from posattn.encodings.t5 import T5Bias
from posattn.encodings.transformer_xl import TransformerXL
from posattn.encodings.xpos import XPos

__all__ = [
    "DAPE",
    "FIRE",
    "ALiBi",
    "AxialRoPE",
    "BiPE",
    "Bias",
    "CoPE",
    "DeBERTa",
    "Decay",
    "ForgetGate",
    "Kerple",
    "LogitScale",
    "MRoPE",
    "Relative",
    "RelativeTable",
    "RelativeTable2D",
    "RelativeTable3D",
    "RoPE",
    "Sandwich",
    "ShawRelative",
    "T5Bias",
    "TransformerXL",
    "XPos",
]
