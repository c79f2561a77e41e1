"""Every constructor of the package with every argument wrong: a ValueError or TypeError that names the argument."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch

import posattn
import posattn.nn

H = 4
# Arguments that each class stands on; the others keep their defaults.
CASES: dict[Callable[..., Any], dict[str, object]] = {
    posattn.ALiBi: {"num_heads": H},
    posattn.AxialRoPE: {"head_dim": 16, "width": 4},
    posattn.BiPE: {"inter": posattn.RoPE(16), "dim": 16, "max_segment_length": 4},
    posattn.Bias: {"values": torch.zeros(H, 5), "first": 0},
    posattn.CoPE: {"num_heads": H, "head_dim": 16, "max_positions": 8},
    posattn.DeBERTa: {"num_heads": H, "head_dim": 16, "buckets": 8, "max_position": 32},
    posattn.ShawRelative: {"num_heads": H, "head_dim": 16, "max_distance": 4},
    posattn.TransformerXL: {"num_heads": H, "head_dim": 16},
    posattn.DAPE: {"inner": None, "num_heads": H},
    posattn.Decay: {"c": torch.zeros(1, H, 8)},
    posattn.ForgetGate: {"f": torch.zeros(1, H, 8)},
    posattn.FIRE: {"num_heads": H},
    posattn.Kerple: {"num_heads": H},
    posattn.LogitScale: {},
    posattn.MRoPE: {"head_dim": 16, "sections": (2, 3, 3)},
    posattn.Relative: {"fn": lambda d: d.float().expand(H, -1), "num_heads": H},
    posattn.RelativeTable: {"num_heads": H, "max_distance": 8},
    posattn.RelativeTable2D: {"num_heads": H, "window": (4, 4)},
    posattn.RelativeTable3D: {"num_heads": H, "window": (2, 2, 2)},
    posattn.RoPE: {"head_dim": 16},
    posattn.Sandwich: {"num_heads": H},
    posattn.T5Bias: {"num_heads": H},
    posattn.XPos: {"head_dim": 16},
    posattn.Linear: {"factor": 2.0},
    posattn.DynamicNTK: {"factor": 2.0, "original_length": 64},
    posattn.YaRN: {"factor": 2.0, "original_length": 64},
    posattn.Llama3: {"factor": 2.0, "original_length": 64},
    posattn.LongRoPE: {
        "short_factor": [1.0] * 8,
        "long_factor": [2.0] * 8,
        "original_length": 64,
        "factor": 2.0,
    },
    posattn.PagedCache: {"pages": 3, "page": 4, "rows": 2, "kv_heads": H, "head_dim": 16},
    posattn.nn.StaticCache: {"batch": 2, "kv_heads": H, "tokens": 8, "head_dim": 16},
    posattn.nn.Attention: {"dim": 64, "heads": H},
    posattn.nn.MultiheadAttention: {"embed_dim": 64, "num_heads": H},
    posattn.nn.TransformerEncoderLayer: {"d_model": 64, "nhead": H},
}
WRONG = (None, "x", -1, 1.5, float("nan"), torch.zeros(3), [1, 2], (None, None), {}, True, object())
# torch's own words for these; what is looked at when it is called.
ELSEWHERE = {"device", "dtype", "activation", "layer_norm_eps", "backend", "scale", "softcap", "window"}


@pytest.mark.filterwarnings("ignore:factor. expected at least 1")
@pytest.mark.parametrize("made", CASES, ids=lambda made: made.__name__)
def test_wrong_arguments_are_named(made: Callable[..., Any]) -> None:
    given = CASES[made]
    made(**given)
    for name in inspect.signature(made).parameters.keys() - ELSEWHERE:
        refused = 0
        for value in WRONG:
            error = _error_of(made, {**given, name: value})
            assert error is None or name in error, f"{name}={value!r}: {error}"
            refused += error is not None
        assert refused >= 3, f"{name} takes nearly everything"


def _error_of(made: Callable[..., Any], arguments: dict[str, Any]) -> str | None:
    try:
        made(**arguments)
    except (ValueError, TypeError) as error:
        return str(error)
    return None


def test_no_encoding_is_left_out() -> None:
    public = {x for x in vars(posattn).values() if isinstance(x, type) and issubclass(x, posattn.encodings.Encoding)}
    assert public <= set(CASES)
