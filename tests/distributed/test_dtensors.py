"""Attention of DTensors is attention of whole tensors: outputs and all gradients by the tolerance rule."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.ranks import POSITIONS
from tests.distributed.test_attention import Case, assert_right, on_ranks

ALONE = "tests.distributed.dtensors"
OF_HEADS: list[Case] = [
    {"cut": ["H"], "position": name}
    for name in POSITIONS
    if not name.startswith(("DAPE", "none", "steep", "LogitScale", "YaRN"))
]
OTHERS: list[Case] = [
    {"cut": ["H"], "position": "ALiBi", "sinks": True, "kv_heads": 2},
    {"cut": ["H"], "keys": ["all"], "position": "Kerple", "kv_heads": 1},
    {"cut": ["H"], "keys": ["all"], "position": "RoPE", "kv_heads": 4},
    {"cut": ["H"], "position": "Kerple", "parameters": ["cut"]},
    {"cut": ["H"], "position": "FIRE", "parameters": ["all"]},
    {"cut": ["T"], "position": "RoPE + ALiBi"},
    {"cut": ["T"], "position": "DAPE-Kerple", "parameters": ["all"]},
    {"cut": ["-T"], "position": "Kerple", "parameters": ["cut"], "sinks": True, "options": {"window": [5, 2]}},
    {"cut": ["T"], "position": "ALiBi", "kv_heads": 1},  # gathers
    {"cut": ["B"], "position": "DAPE-FIRE"},
    {"cut": ["B"], "position": "T5", "parameters": ["all"]},
    {"cut": ["all"], "position": "Kerple", "parameters": ["all"]},
    {"cut": ["all"], "position": "FIRE"},
]
FSDP: list[Case] = [
    {"fsdp": True, "method": method, "position": name}
    for name in ("FIRE", "DAPE-Kerple")
    for method in ("ring", "all_gather")
]
TWO: list[Case] = [
    {"cut": ["T", "H"], "position": "Kerple", "sinks": True},
    {"cut": ["H", "T"], "position": "FIRE", "parameters": ["all", "all"]},
    {"cut": ["B", "T"], "position": "DAPE-Kerple", "parameters": ["all", "cut"]},
    {"cut": ["B", "H"], "position": "RoPE + ALiBi", "kv_heads": 2},
    {"cut": ["all", "T"], "position": "T5"},
]
WRONG: list[tuple[Case, str]] = [
    ({"cuts": ["sum", "sum", "sum"]}, "q: expected placements that replicate, cut the batch"),
    ({"cuts": ["H", "T", "T"]}, "k: expected q's placements"),
    ({"cuts": ["H", "all", "H"]}, "v: expected k's placements"),
    ({"cuts": ["H", "H", "H"], "position": "DAPE-Kerple"}, "position: expected an encoding whose heads stand alone"),
    ({"cuts": ["T", "T", "T"], "position": "wide"}, "position: ALiBi was made for num_heads=5, got queries with 4"),
    ({"cuts": ["T", "T", "T"], "plain": True}, "k: expected a torch.Tensor, got a DTensor"),
    ({"cuts": ["T", "T", "T"], "sdpa": True}, "query: expected a torch.Tensor, got a DTensor"),
    ({"cuts": ["T", "T", "T"], "options": {"offset": 3}}, "offset: expected none over the ranks of a mesh"),
    ({"cuts": ["T"] * 3, "local": True, "position": "Kerple", "parameters": True}, "got a DTensor in p"),
]


def test_two_ranks(tmp_path: Path) -> None:
    assert_right([*OF_HEADS, *OTHERS, *FSDP], 2, tmp_path, ALONE)


@pytest.mark.slow
def test_meshes_of_two_dimensions(tmp_path: Path) -> None:
    assert_right(TWO, 4, tmp_path, ALONE)


def test_what_is_refused_is_refused_on_every_rank(tmp_path: Path) -> None:
    found = on_ranks([case for case, _ in WRONG], 2, tmp_path, ALONE)
    for rank in range(2):
        for (case, message), error in zip(WRONG, found[rank]):
            assert message in error, (case, error)
