"""The layers hold: on the import statements and #include lines as they are, and the checker finds what breaks them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.packaging.imports import Import, breaches, cycles, imports, includes, modules

ROOT = Path(__file__).resolve().parents[2]
# Where pyproject.toml's package-dir puts them.
PACKAGES = {"posattn": ROOT / "posattn", "posattn.kernels": ROOT / "kernels", "posattn.bench": ROOT / "bench"}

# From the lowest up: a group imports itself and lower layers, never another group of its own layer or of a higher one.
# A group that others lie below is its __init__.py alone.
LAYERS = (
    ("posattn._cpu", "posattn.arguments", "posattn.kernels.common", "posattn.errors", "posattn.plan"),
    (
        "posattn.kernels.attention",
        "posattn.kernels.headmix",
        "posattn.jagged",
        "posattn.keywords",
        "posattn.paging",
        "posattn.plan_checks",
        "posattn.positions",
        "posattn.turning",
    ),
    ("posattn.kernels", "posattn.reference", "posattn.serialize", "posattn.sdpa_shapes"),
    ("posattn.encodings", "posattn.backends.common"),
    ("posattn.backends.cpu", "posattn.backends.cuda", "posattn.backends.triton"),
    ("posattn.backends",),
    ("posattn.appending", "posattn.ops", "posattn.validation"),
    ("posattn.attention",),
    ("posattn.kv_cache", "posattn.patch", "posattn.weights"),
    ("posattn.paged_cache",),
    ("posattn.nn",),
    ("posattn.parity",),
    ("posattn.checking",),
    ("posattn",),
    ("posattn.distributed", "posattn.targets"),
    ("posattn.integrations",),
    ("posattn.bench", "posattn.check_command", "posattn.plot"),
    ("posattn.demo",),
    ("posattn.experiments", "posattn.gpu"),
    ("posattn.cli",),
)
# Lower, and yet not to be seen: kernels know nothing but Triton, a backend knows plans and neither encodings nor the
# oracle that it is held against, and encodings know plans alone.
APART = (
    ("posattn.kernels", "posattn.errors"),
    ("posattn.kernels", "posattn.plan"),
    ("posattn.kernels", "posattn.positions"),
    ("posattn.kernels", "posattn._cpu"),
    ("posattn.backends", "posattn.reference"),
    ("posattn.backends", "posattn.encodings"),
    ("posattn.backends.cuda", "posattn.kernels"),
    ("posattn.backends.cpu", "posattn.kernels"),
    ("posattn.backends.common", "posattn.kernels"),
    ("posattn.backends.cuda", "posattn._cpu"),
    ("posattn.backends.triton", "posattn._cpu"),
    ("posattn.encodings", "posattn.kernels"),
    ("posattn.nn", "posattn.backends"),
    ("posattn.nn", "posattn.ops"),
    ("posattn.nn", "posattn.plan"),
    ("posattn.nn", "posattn.reference"),
    ("posattn.integrations", "posattn.backends"),
    ("posattn.integrations", "posattn.ops"),
    ("posattn.integrations", "posattn.kernels"),
)
# The same of csrc/cuda, whose `common` and `ptx` and `bias` are one layer below the families. A .cu file stands on top.
DEVICE_LAYERS = (("params.h", "common", "ptx", "bias"), ("forward", "backward", "headmix", "reach"))
BELOW_FAMILIES = ("params.h", "common", "ptx", "bias")


def device_breaches(folder: Path) -> list[str]:
    found = [
        Import(*(_folder(name) if _folder(name) in BELOW_FAMILIES else name for name in (edge.importer, edge.imported)))
        for edge in includes(folder)
    ]
    below = [edge for edge in found if not (edge.importer in BELOW_FAMILIES and edge.imported in BELOW_FAMILIES)]
    return breaches(below, DEVICE_LAYERS, separator="/")


def _folder(name: str) -> str:
    return name.split("/")[0]


def test_no_module_imports_a_higher_layer_or_its_peers() -> None:
    assert breaches(imports(modules(PACKAGES)), LAYERS, APART) == []


def test_kernels_import_nothing_of_posattn() -> None:
    kernels = [edge for edge in imports(modules(PACKAGES)) if edge.importer.startswith("posattn.kernels")]
    assert kernels
    assert [str(edge) for edge in kernels if not edge.imported.startswith("posattn.kernels")] == []


def test_modules_do_not_import_one_another_in_a_circle() -> None:
    assert cycles(imports(modules(PACKAGES))) == []


def test_device_code_that_families_share_includes_none_of_them() -> None:
    assert device_breaches(ROOT / "csrc" / "cuda") == []


def test_device_headers_do_not_include_one_another_in_a_circle() -> None:
    found = includes(ROOT / "csrc" / "cuda")
    assert found
    assert cycles(found) == []


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


SOUND = {
    "posattn/__init__.py": "from .attention import attention\n",
    "posattn/attention.py": "from posattn import ops\n",
    "posattn/ops.py": "from posattn import backends\nfrom posattn.plan import Plan\n",
    "posattn/plan.py": "class Plan: ...\n",
    "posattn/encodings/__init__.py": "from ..plan import Plan\n",
    "posattn/backends/__init__.py": "from . import cpu\nfrom .triton import forward\n",
    "posattn/backends/cpu.py": "from posattn import _cpu\n",
    "posattn/backends/triton/__init__.py": "from posattn.kernels.common import bias\n",
    "posattn/backends/cuda/__init__.py": "from posattn.plan import Plan\n",
    "posattn/backends/cuda/compiler.py": "",
    "kernels/__init__.py": "",
    "kernels/common/bias.py": "import triton\n",
    "kernels/attention/forward.py": "from ..common import bias\n",
}


def check(tmp_path: Path, changed: dict[str, str]) -> list[str]:
    tree = write(tmp_path, {**SOUND, **changed})
    found = imports(modules({"posattn": tree / "posattn", "posattn.kernels": tree / "kernels"}))
    return breaches(found, LAYERS, APART) + [" and ".join(circle) for circle in cycles(found)]


def test_the_checker_accepts_a_sound_tree(tmp_path: Path) -> None:
    assert check(tmp_path, {}) == []


@pytest.mark.parametrize(
    ("file", "text", "found"),
    [
        ("kernels/common/bias.py", "from posattn.plan import Plan", "posattn.kernels.common.bias imports posattn.plan"),
        ("kernels/common/bias.py", "from ..attention import forward", "posattn.kernels.attention is no lower layer"),
        ("kernels/attention/forward.py", "from ... import plan", "attention.forward imports posattn.plan"),
        ("posattn/backends/cuda/compiler.py", "import posattn.backends.triton", "posattn.backends.triton is no lower"),
        ("posattn/backends/cuda/compiler.py", "from .. import cpu", "posattn.backends.cpu is no lower layer"),
        ("posattn/backends/cpu.py", "def f():\n    from posattn.ops import x", "posattn.ops is no lower layer"),
        ("posattn/backends/cpu.py", "from posattn import encodings", "kept apart"),
        ("posattn/plan.py", "if TYPE_CHECKING:\n    from . import attention", "posattn.attention is no lower layer"),
        ("posattn/new.py", "from . import plan", "posattn.new is in no layer"),
        ("posattn/backends/rocm.py", "from .. import plan", "posattn.backends.rocm is in no layer"),
        ("posattn/backends/cuda/compiler.py", "from . import launch", "cuda.compiler and posattn.backends.cuda.launch"),
    ],
)  # fmt: skip
def test_the_checker_finds_a_forbidden_import(tmp_path: Path, file: str, text: str, found: str) -> None:
    launch = {"posattn/backends/cuda/launch.py": "from .compiler import compile_kernel\n"}
    messages = check(tmp_path, {**launch, file: f"{text}\n"})
    assert any(found in message for message in messages), messages


def test_the_checker_finds_a_forbidden_include(tmp_path: Path) -> None:
    sound = {"common/mask.h": '#include "ptx/ptx.h"', "ptx/ptx.h": "", "forward/block.h": '#include "common/mask.h"'}
    assert device_breaches(write(tmp_path, sound)) == []
    write(tmp_path, {"common/mask.h": '#include "forward/block.h"', "headmix/mlp.h": '#include "forward/block.h"'})
    first, second = device_breaches(tmp_path)
    assert "forward is no lower layer than common" in first
    assert "forward is no lower layer than headmix" in second
    assert cycles(includes(tmp_path)) == [["common/mask.h", "forward/block.h"]]
