"""The list of faults fits the source, and the switch of the native build does what it says."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tools.mutation.fault import ROOT, Fault, Stale
from tools.mutation.faults import FAULTS
from tools.mutation.native import switched


def test_every_fault_has_its_place_and_its_tests() -> None:
    """A line of the source that was rewritten takes its faults along: rewrite them, or drop what does not apply."""
    sources = {fault.file: (ROOT / fault.file).read_text() for fault in FAULTS}
    assert len(FAULTS) >= 200
    assert len(set(FAULTS)) == len(FAULTS)
    for fault in FAULTS:
        assert fault.applied(sources[fault.file]) != sources[fault.file], fault.name
        assert fault.tests, fault.name
        assert all((ROOT / tests.split("::")[0].split()[0]).exists() for tests in fault.tests), fault.name


def test_faults_of_python_are_python() -> None:
    for fault in FAULTS:
        if not fault.native:
            compile(fault.applied((ROOT / fault.file).read_text()), fault.file, "exec")


def test_a_place_is_one_text_whatever_its_line_breaks() -> None:
    fault = Fault("x.h", "f(«a + b», c)", "a - b", ())
    assert fault.applied("x = f(a +\n      b, c);") == "x = f(a - b, c);"
    for text in ("f(a, c)", "f(a + b, c) f(a + b, c)"):
        with pytest.raises(Stale, match="expected this text once"):
            fault.applied(text)


def test_faults_beside_and_inside_one_another_are_switched_each_by_its_number() -> None:
    text = "int f(int a) { if (a > 1) return a + 1; return g(a); }"
    faults = [
        (1, Fault("x.h", "«a > 1»", "a >= 1", ())),
        (2, Fault("x.h", "return «a + 1»;", "a", ())),
        (3, Fault("x.h", "«return g(a);»", "return 0;", ())),
        (4, Fault("x.h", "g(«a»)", "a + 1", ())),
        (5, Fault("x.h", "«a > 1»", "true", ())),
    ]
    choose = "::posattn::fault == "
    inner = f"return g(({choose}4 ? (a + 1) : (a)));"
    assert switched(text, faults) == (
        f"int f(int a) {{ if (({choose}1 ? (a >= 1) : {choose}5 ? (true) : (a > 1))) "
        f"return ({choose}2 ? (a) : (a + 1)); if ({choose}3) {{ return 0; }} else {{ {inner} }} }}"
    )
    with pytest.raises(ValueError, match="crossing"):
        switched("a + b + c", [(1, Fault("x.h", "«a + b» + c", "", ())), (2, Fault("x.h", "a + «b + c»", "", ()))])


@pytest.mark.slow
def test_a_sample_of_faults_in_the_python_code_is_noticed() -> None:
    """`python -m tools.mutation` tries all; those in C++ need a build of their own, of minutes."""
    command = [sys.executable, "-m", "tools.mutation", "--only", "posattn/", "--sample", "8", "--seed", "5"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
