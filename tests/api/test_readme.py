"""The README's table knows every encoding, its figure and numbers are those of the data, its links lead somewhere."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

import posattn
from posattn.backends.cuda.configs import headmix
from posattn.encodings import Context
from posattn.plan import Call, HeadMix, Mask
from tools.site import figure

README = Path(__file__).resolve().parents[2] / "README.md"


def test_every_encoding_is_in_the_table() -> None:
    text = README.read_text()
    assert [name for name in posattn.encodings.__all__ if f"`{name}`" not in text] == []


def test_links_lead_somewhere() -> None:
    prose = re.sub(r"```.*?```", "", README.read_text(), flags=re.DOTALL)
    links = re.findall(r"\]\((?!https?:)([^)#]+)", prose)
    assert links
    assert [link for link in links if not (README.parent / link).exists()] == []


def test_the_figure_is_drawn_from_its_data(tmp_path: Path) -> None:
    figure.draw(tmp_path / "again.svg")
    assert (tmp_path / "again.svg").read_text() == figure.PICTURE.read_text()


def test_the_numbers_beside_the_figure_are_its_own() -> None:
    rows = json.loads(figure.DATA.read_text())["rows"]

    def at_4096(variant: str, key: str, dtype: str = "float32") -> float:
        return figure.series(rows, variant, key, dtype)[4096]

    times = {
        variant: [at_4096(variant, "median", dtype) / at_4096("sdpa", "median", dtype) for dtype in figure.DTYPES]
        for variant in figure.LINES
    }
    text = " ".join(README.read_text().split())
    mask, kerple, alibi = (times[name] for name in figure.LINES if name != "sdpa")
    assert f"takes {mask[0]:.1f} times (float32) and {mask[1]:.0f} times (bfloat16) as long" in text
    assert f"and {at_4096('sdpa-mask-build:Kerple', 'memory'):.0f} MB;" in text
    assert f"takes {kerple[0]:.2f} and {kerple[1]:.2f} of the time of no position" in text
    assert (
        f"and {at_4096('posattn:Kerple', 'memory'):.0f} MB, with learned ALiBi {alibi[0]:.2f} and {alibi[1]:.2f}"
        in text
    )


def dape_call(heads: int, head_dim: int) -> tuple[Call, HeadMix]:
    """A call of DAPE over Kerple, W = 32."""
    q = torch.zeros(1, heads, 8, head_dim, dtype=torch.bfloat16)
    mask = Mask(causal=True, max_q=8, max_k=8)
    plan = posattn.DAPE(posattn.Kerple(heads), heads).lower(Context.of(q, q, mask))
    assert plan.mix is not None
    return Call(q, q, q, plan, mask, 1.0), plan.mix


@pytest.mark.parametrize(
    ("arch", "head_dim", "forward", "backward"),
    [
        ("sm_80", 64, 32, 16),
        ("sm_90", 64, 32, 16),
        ("sm_80", 128, 16, 8),
        ("sm_120", 64, 19, 9),
        ("sm_120", 128, 13, 6),
    ],
)
def test_dape_takes_as_many_heads_as_it_says(arch: str, head_dim: int, forward: int, backward: int) -> None:
    for heads, judge in ((forward, headmix.forward_unsupported), (backward, headmix.backward_unsupported)):
        assert judge(*dape_call(heads, head_dim), arch) is None
        assert judge(*dape_call(heads + 1, head_dim), arch) is not None
    text = " ".join(README.read_text().split())
    assert "at D = 64 of up to 32 heads forward and 16 with gradients, at D = 128 of 16 and 8" in text
    assert "(compute capability 12.0: 19 and 9, 13 and 6)" in text
