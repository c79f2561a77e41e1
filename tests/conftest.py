"""What every test shares: the backends of this machine, compiled GPU kernels, one thread a worker, and memory that
starts as NaN."""

from __future__ import annotations

import os
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from posattn.parity import available

# Almost all the time of a GPU test is its kernels' compilation, so workers and runs share them. Both caches know a
# kernel by its source, its constants and its compiler, so what changes is compiled anew.
KERNELS = Path(__file__).resolve().parents[1] / "build" / "test-kernels"
KERNELS_LIMIT = 4 << 30  # bytes; kernels of sources that are gone pile up
os.environ["POSATTN_CACHE_DIR"] = str(KERNELS / "cuda")
os.environ["TRITON_CACHE_DIR"] = str(KERNELS / "triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The shared suites compute in float32 too, so they run the backends that do; CUDA's has suites of its own.
BACKENDS = [(device, name) for device in dict.fromkeys(("cpu", DEVICE)) for name in available(device, torch.float32)]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--part", default="1/1", help="k/n: only those tests that fall to the k-th of n parts")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Parts are drawn by the tests' names, so what a part holds does not change with the tests around it."""
    try:
        part, parts = (int(number) for number in config.getoption("--part").split("/"))
        valid = 1 <= part <= parts
    except ValueError:
        valid = False
    if not valid:
        raise pytest.UsageError(f"--part: expected k/n with 1 <= k <= n, got {config.getoption('--part')}")
    here = [item for item in items if zlib.crc32(item.nodeid.encode()) % parts == part - 1]
    if len(here) < len(items):
        config.hook.pytest_deselected(items=[item for item in items if item not in set(here)])
        items[:] = here


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that asks for `place` runs once for each fused backend of this machine, as (device, backend)."""
    if "place" in metafunc.fixturenames:
        metafunc.parametrize("place", BACKENDS, ids=lambda place: place[1])


def pytest_sessionstart(session: pytest.Session) -> None:
    if not BACKENDS:
        raise pytest.UsageError("no fused backend runs here; `posattn info` says why")
    if "PYTEST_XDIST_WORKER" not in os.environ and _size(KERNELS) > KERNELS_LIMIT:
        shutil.rmtree(KERNELS)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.fixture(autouse=True)
def _quiet_and_seeded() -> Iterator[None]:
    """Workers run side by side, so each takes one thread; a test that needs more sets them itself."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """torch.empty and its like return NaN (the largest integer for integers), so a result left unwritten shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    filling = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = filling
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
