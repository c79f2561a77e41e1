"""POSATTN_TRITON_AUTOTUNE on the PTX machine with a clock that the test sets: what is launched, kept and read again."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import torch

import posattn

pytest.importorskip("triton")

from posattn.backends.triton import autotune
from posattn.backends.triton.configs.forward import FORWARD
from tests.ptxsim.seam import Machine, behind_launch

FAST = FORWARD["sm_80"][64]["dense"]


@pytest.fixture
def machine(tmp_path, monkeypatch) -> Iterator[Machine]:
    monkeypatch.setenv("POSATTN_TRITON_AUTOTUNE", "1")
    monkeypatch.setenv("POSATTN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(autotune, "_chosen", {})
    monkeypatch.setattr(autotune, "device_name", lambda device: "a GPU")
    with behind_launch(80) as machine:
        yield machine


def clock(monkeypatch, timed):
    """Every candidate runs once; FAST is said to be the fastest."""

    def milliseconds(run):
        def time(tile):
            run(tile)
            timed.append(tile)
            return 1.0 if tile == FAST else 2.0

        return time

    monkeypatch.setattr(autotune, "milliseconds", milliseconds)


def attend(tokens=40):
    q = torch.randn(1, 1, tokens, 64, dtype=torch.bfloat16)
    return q, posattn.attention(q, q, q, backend="triton")


def test_the_fastest_is_launched_and_kept(machine, monkeypatch, tmp_path):
    timed = []
    clock(monkeypatch, timed)
    q, out = attend()
    shape = machine.launches[-1].constexprs["BLOCK_M"], machine.launches[-1].constexprs["BLOCK_N"]
    assert shape == (FAST.block_m, FAST.block_n)
    assert FAST in timed
    assert len(timed) == len(set(timed)) > 1
    want = posattn.attention(q.double(), q.double(), q.double(), backend="reference")
    torch.testing.assert_close(out.double(), want, atol=2e-2, rtol=0)

    (entry,) = json.loads((tmp_path / "triton_tiles.json").read_text()).items()
    assert entry[0].startswith("forward|a GPU|plain|64")
    assert (entry[1]["block_m"], entry[1]["block_n"]) == shape

    # Another process: nothing in memory, so the file decides and nothing is timed.
    monkeypatch.setattr(autotune, "_chosen", {})
    count = len(timed)
    attend()
    assert machine.launches[-1].constexprs["BLOCK_N"] == FAST.block_n
    assert len(timed) == count
    attend(tokens=130)  # other lengths are another entry
    assert len(timed) > count
    assert len(json.loads((tmp_path / "triton_tiles.json").read_text())) == 2


@pytest.mark.slow
def test_what_fits_differently_is_chosen_for_itself(machine, monkeypatch, tmp_path):
    """Up to 16 queries, of whatever batch, have keys turned in the kernel, which takes shared memory."""
    clock(monkeypatch, [])

    def entries(tokens, *position, **options):
        q = torch.randn(1, 1, tokens, 64, dtype=torch.bfloat16)
        posattn.attention(q, q, q, *position, backend="triton", **options)
        return set(json.loads((tmp_path / "triton_tiles.json").read_text()))

    plain = entries(16)
    turned = entries(16, posattn.RoPE(64)) - plain
    assert len(turned) == 1
    assert len(entries(17, posattn.RoPE(64)) - plain - turned) == 1
    documents = torch.arange(0, 33, 16)
    assert entries(32, posattn.RoPE(64), cu_seqlens_q=documents, cu_seqlens_k=documents) >= turned
    assert len(entries(16, posattn.RoPE(64))) == 3


def test_a_tile_that_is_not_shipped_is_not_taken(machine, monkeypatch, tmp_path):
    clock(monkeypatch, [])
    attend()
    path = tmp_path / "triton_tiles.json"
    (entry,) = json.loads(path.read_text())
    path.write_text(path.read_text().replace('"block_n": ', '"block_n": 1'))
    monkeypatch.setattr(autotune, "_chosen", {})
    timed = []
    clock(monkeypatch, timed)
    attend()
    assert timed
    assert json.loads(path.read_text())[entry]["block_n"] < 1000


@pytest.mark.parametrize("content", ["{", "[]", '{"forward|a GPU|plain|64|torch.bfloat16|6|6|full": {"block_m": 1}}'])
def test_a_damaged_file_is_written_anew(machine, monkeypatch, tmp_path, content):
    timed = []
    clock(monkeypatch, timed)
    (tmp_path / "triton_tiles.json").write_text(content)
    attend()
    assert timed
    assert len(json.loads((tmp_path / "triton_tiles.json").read_text())) == 1


def test_without_the_variable_nothing_is_timed(machine, monkeypatch, tmp_path):
    monkeypatch.setenv("POSATTN_TRITON_AUTOTUNE", "0")
    timed = []
    clock(monkeypatch, timed)
    attend()
    assert timed == []
    assert list(tmp_path.iterdir()) == []
