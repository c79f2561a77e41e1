"""Attention over several processes (gloo) is attention in one: outputs and all gradients by the tolerance rule."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.ranks import POSITIONS

ROOT = Path(__file__).resolve().parents[2]
Case = dict[str, Any]


def on_ranks(cases: list[Case], ranks: int, folder: Path, script: str = "tests.distributed.ranks") -> list[list[Any]]:
    """What each rank found of each case."""
    (folder / "cases.json").write_text(json.dumps(cases))
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", script, str(folder), str(rank), str(ranks)],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        errors = [process.communicate(timeout=300)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode == 0 for process in processes), "\n".join(error[-3000:] for error in errors)
    return [json.loads((folder / f"found{rank}.json").read_text()) for rank in range(ranks)]


def assert_right(cases: list[Case], ranks: int, folder: Path, script: str = "tests.distributed.ranks") -> None:
    found = on_ranks(cases, ranks, folder, script)
    wrong = [
        (case, rank, name, share)
        for rank, results in enumerate(found)
        for case, shares in zip(cases, results)
        for name, share in shares.items()
        if not share < 1.0
    ]
    assert wrong == []


EVERY: list[Case] = [
    {"method": "ring", "position": name, "options": {"causal": True}, "twice": name == "DAPE-FIRE"}
    for name in POSITIONS
]
OPTIONS: list[Case] = [
    {"method": method, "position": "RoPE + ALiBi", "layout": layout, "options": options}
    for method in ("ring", "all_gather", "ulysses")
    for layout, options in (
        ("contiguous", {"causal": True, "softcap": 3.0}),
        ("zigzag", {"window": [5, 2], "sinks": True}),
        ("zigzag", {"causal": True, "window": [4, 0], "scale": 0.4}),
        ("zigzag", {"causal": True, "documents": [0, 5, 5, 17, 24]}),
        ("contiguous", {"documents": [0, 11, 24]}),
    )
]
OTHERS: list[Case] = [
    {"method": "all_gather", "position": "DAPE-FIRE", "options": {"causal": True}},
    {"method": "all_gather", "position": "FIRE", "options": {"causal": True, "window": [5, 0]}},
    {"method": "ulysses", "position": "FIRE", "options": {"causal": True}},
    {"method": "ulysses", "position": "Kerple", "options": {"causal": True, "sinks": True}},
    {"method": "ring", "position": "FIRE", "options": {"causal": True, "documents": [0, 7, 24]}},
    {"method": "ring", "position": "Kerple", "dtype": "bfloat16", "options": {"causal": True}},
    {"method": "ring", "position": "DAPE-Kerple", "dtype": "float64", "options": {"causal": True}},
    {"method": "ring", "position": "RoPE", "backend": "reference", "options": {"causal": True, "sinks": True}},
    {"method": "ring", "position": "ALiBi", "options": {"causal": True, "kv_heads": 2}},
    {"method": "ulysses", "position": "ALiBi", "options": {"causal": True, "kv_heads": 2}},
    {"method": "ring", "position": "T5", "options": {}},
    {"method": "all_gather", "position": "RelativeTable2D", "options": {"causal": True}},
    {"method": "auto", "position": "DAPE-Kerple", "options": {"causal": True, "sinks": True}},
    {"method": "auto", "position": "ALiBi", "options": {"window": [5, 2], "documents": [0, 7, 24], "kv_heads": 1}},
]
# Pieces of a zigzag on two ranks: 0 and 3, 1 and 2. By rank: pairs computed, masked, out of reach.
REACH: list[Case] = [
    {"position": "steep ALiBi", "pairs": [[3, 3, 2], [4, 3, 1]]},
    {"position": "steep Kerple", "pairs": [[3, 3, 2], [4, 3, 1]]},
    {"position": "steep ALiBi", "huge": True, "pairs": [[4, 3, 1], [5, 3, 0]]},
    {"position": "steep Kerple", "huge": True, "pairs": [[4, 3, 1], [5, 3, 0]]},
    {"position": "ALiBi", "pairs": [[5, 3, 0], [5, 3, 0]]},
]
REACH = [{"method": "ring", "options": {"causal": True}, **case} for case in REACH]
# Rings that stop early: no rank sees more than one or two shards back.
SHORT: list[Case] = [
    {"method": "ring", "position": "RoPE + ALiBi", "layout": "contiguous", "options": options}
    for options in ({"causal": True, "window": [4, 0]}, {"window": [15, 0], "sinks": True}, {"window": [0, 3]})
]
WRONG: list[tuple[Case, str]] = [
    (
        {"tokens": [6, 8]},
        "expected the same shapes, dtypes and options on every rank, got others than rank 0's on rank 1",
    ),
    ({"tokens": [5, 5]}, "layout: expected an even number of tokens a rank for 'zigzag', got 5"),
    (
        {"tokens": [6, 6], "options": {"layout": "spiral"}},
        "layout: expected one of 'zigzag', 'contiguous', got 'spiral'",
    ),
    ({"tokens": [6, 6], "options": {"dropout_p": 0.1}}, "dropout_p: expected 0.0, got 0.1"),
    ({"tokens": [6, 6], "options": {"documents": [0, 5]}}, "documents: expected ascending bounds from 0 to 12"),
    ({"tokens": [6, 6], "position": "dynamic"}, "position: expected a scaling that knows its length"),
    (
        {"tokens": [6, 6], "position": "DAPE", "method": "ulysses"},
        "position: expected an encoding whose heads are apart",
    ),
    ({"tokens": [6, 6], "position": "DAPE V2"}, "position: expected a mix of one key at a time"),
    ({"tokens": [6, 6], "options": {"window": -1}}, "window"),
]


def test_two_ranks(tmp_path: Path) -> None:
    assert_right([*EVERY, *OPTIONS, *OTHERS, *REACH], 2, tmp_path)


@pytest.mark.slow
def test_rings_that_stop_early(tmp_path: Path) -> None:
    assert_right(SHORT, 3, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [3, 4, 8])
def test_more_ranks(ranks: int, tmp_path: Path) -> None:
    cases = [
        case for case in EVERY + OTHERS[:2] if ranks > 3 or case["position"] in ("RoPE + ALiBi", "DAPE-FIRE", "FIRE")
    ]
    cases.append(
        {"method": "ring", "position": "Kerple", "options": {"causal": True, "documents": [0, 13, 20, 12 * ranks]}}
    )
    assert_right(cases, ranks, tmp_path)


def test_what_is_refused_is_refused_on_every_rank(tmp_path: Path) -> None:
    found = on_ranks([case | {"refused": True} for case, _ in WRONG], 2, tmp_path)
    for rank in range(2):
        for (case, message), error in zip(WRONG, found[rank]):
            assert message in error, (case, error)


DYING = """
import datetime, os, sys, torch, torch.distributed as dist
from posattn.distributed import ring_attention
rank = int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}/store", rank=rank, world_size=2,
                        timeout=datetime.timedelta(seconds=20))
q = torch.randn(1, 2, 4, 8, requires_grad=True)
out = ring_attention(q, q, q, causal=True)
if rank:
    os._exit(1)
try:
    out.sum().backward()
except RuntimeError as error:
    print("RuntimeError", error)
"""


def test_a_rank_that_dies_is_an_error_on_the_others(tmp_path: Path) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", DYING, str(tmp_path), str(rank)], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    try:
        printed = processes[0].communicate(timeout=90)[0]
    finally:
        for process in processes:
            process.kill()
    assert printed.startswith("RuntimeError")


def test_one_rank_is_a_call(tmp_path: Path) -> None:
    cases: list[Case] = [
        {"method": name, "position": "FIRE", "options": {"causal": True}} for name in ("ring", "ulysses")
    ]
    assert_right(cases, 1, tmp_path)


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_zigzag_shares_the_causal_work(ranks: int) -> None:
    from posattn.distributed.layout import order, spans

    tokens = 8
    work = [
        sum(i + 1 for span in spans("zigzag", tokens, rank, ranks) for i in range(span.first, span.end))
        for rank in range(ranks)
    ]
    assert len(set(work)) == 1
    for layout in ("zigzag", "contiguous"):
        covered = [i for span in order(layout, tokens, ranks) for i in range(span.first, span.end)]
        assert covered == list(range(tokens * ranks))


def test_blocks_that_see_nothing_are_left_out() -> None:
    import torch

    from posattn.distributed.blocks import Settings, block_of
    from posattn.distributed.layout import Span

    def settings(**given: Any) -> Settings:
        base = {"causal": False, "left": None, "right": None, "scale": None, "softcap": 0.0, "deterministic": False}
        return Settings(**{**base, "backend": "auto", "documents": None, "absolute": False, "falls": False, **given})

    early, late = Span(0, 8, 0), Span(8, 8, 0)
    cpu = torch.device("cpu")
    assert block_of(early, late, settings(causal=True), cpu) is None
    assert block_of(late, early, settings(causal=True), cpu) is not None
    near = block_of(late, early, settings(left=3), cpu)
    assert near is not None
    assert (near.keys, near.options["offset"]) == (slice(5, 8), 3)
    assert block_of(Span(32, 8, 0), early, settings(left=3), cpu) is None
    assert block_of(late, early, settings(documents=(0, 8, 16)), cpu) is None
    across = block_of(late, early, settings(documents=(0, 5, 11, 16)), cpu)
    assert across is not None
    assert (across.queries, across.keys, across.options) == (slice(0, 3), slice(5, 8), {"offset": 3})


def test_without_a_group_it_says_so() -> None:
    import torch

    from posattn.distributed import ring_attention

    q = torch.randn(1, 2, 4, 8)
    with pytest.raises(ValueError, match=r"group: expected an initialized torch.distributed, got none"):
        ring_attention(q, q, q)
