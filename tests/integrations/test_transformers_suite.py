"""transformers' own tests, ModelTesterMixin of its sdist: what passes with sdpa passes with posattn in its place."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as xml
from importlib.metadata import version
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
# One of each kind of mask, cache and bias, and the rest.
SLOW = ["llama", "gemma3", "gpt2", "bert", "vit", "t5"]
SWEEP = ["mistral", "qwen2", "qwen3", "gemma2", "gptneox", "cohere", "phi3", "olmo2", "roberta", "bart"]
FAMILIES = [pytest.param(name, marks=pytest.mark.slow) for name in SLOW]
FAMILIES += [pytest.param(name, marks=pytest.mark.sweep) for name in SWEEP]
# The sdist leaves these packages out; nothing in them is about attention in a forward pass.
LEFT_OUT = {"exporters/test_export.py": "ExportTesterMixin", "generation/test_utils.py": "GenerationTesterMixin"}
# That looks for what is left out, and that asks the hub.
DESELECTED = "not test_generation_tester_mixin_inheritance and not test_bc_torch_dtype"


@pytest.fixture(scope="session")
def suite(tmp_path_factory):
    """A folder with transformers' tests and ours of its mixin beside them."""
    folder = tmp_path_factory.mktemp("transformers")
    name = f"transformers=={version('transformers')}"
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--no-binary",
        ":all:",
    ]
    fetched = subprocess.run([*command, name], cwd=folder, capture_output=True, text=True, check=False)
    archives = list(folder.glob("transformers-*.tar.gz"))
    if not archives:
        pytest.skip(f"the sdist of {name}, which holds the tests, could not be fetched: {fetched.stderr[-200:]}")
    with tarfile.open(archives[0]) as archive:
        top = archives[0].name.removesuffix(".tar.gz")
        archive.extractall(
            folder, [m for m in archive.getmembers() if m.name.startswith(f"{top}/tests/")], filter="data"
        )
    tests = folder / top / "tests"
    for path, mixin in LEFT_OUT.items():
        (tests / path).parent.mkdir(exist_ok=True)
        (tests / path).write_text(f"class {mixin}: pass\n")
    (tests / "test_mixin_cases.py").write_text((HERE / "mixin_cases.py").read_text())
    (folder / top / "pytest.ini").write_text("[pytest]\n")
    return folder / top


def outcomes(suite: Path, family: str, posattn: bool) -> dict[str, str]:
    report = suite / f"{family}-{posattn}.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
    subprocess.run(
        [*command, "tests/test_mixin_cases.py", "-k", f"{family}Test and {DESELECTED}"],
        cwd=suite,
        env={
            **os.environ,
            "READ_SDPA_AS_POSATTN": str(int(posattn)),
            "PYTHONPATH": str(ROOT),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        check=False,
    )
    found = {}
    for case in xml.parse(report).iter("testcase"):
        kinds = {child.tag for child in case} & {"failure", "error", "skipped"}
        found[case.get("name")] = min(kinds, default="passed")
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_what_passes_with_sdpa_passes_with_posattn(suite, family):
    expected, got = outcomes(suite, family, False), outcomes(suite, family, True)
    print(family, sum(x == "passed" for x in expected.values()), sum(x == "passed" for x in got.values()))
    assert sum(x == "passed" for x in expected.values()) > 60
    different = {name: (x, got.get(name)) for name, x in expected.items() if got.get(name) != x}
    assert not different
    assert got.keys() == expected.keys()
