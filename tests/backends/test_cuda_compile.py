"""CUDA kernels compiled at first use: the cache and its damage, races, absent packages, parameters, the launch."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import posattn
from posattn.backends import cuda
from posattn.backends.common import disk_cache
from posattn.backends.cuda import cache, compiler, launch, params
from posattn.backends.cuda.constants import CombineConstants
from posattn.parity import plain_call
from tests.ptxsim.seam import behind_launch

pytest.importorskip("cuda.core")

SOURCES = Path(__file__).parents[2] / "csrc" / "cuda"

# The smallest kernel of the package.
COMBINE = ("forward/combine.cu", "attention_combine", "CombineParams")
CONSTANTS = CombineConstants(bf16=True, dim_v=32, has_sinks=False, max_splits=64, threads=128)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty cache, on disk and in memory."""
    monkeypatch.setenv("POSATTN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(compiler, "_kernels", {})
    return tmp_path / "cuda"


@pytest.fixture
def compilations(monkeypatch):
    """How often NVRTC ran."""
    count = []
    compile_ = compiler._compile
    monkeypatch.setattr(compiler, "_compile", lambda *given: count.append(given) or compile_(*given))
    return count


def compiled(arch="sm_80", **constants):
    return compiler.compile_kernel(*COMBINE, CONSTANTS._replace(**constants), arch)


def forget():
    compiler._kernels.clear()


def test_a_kernel_is_compiled_once_and_then_found(folder, compilations):
    first = compiled()
    assert first.name == "attention_combine"
    assert ".target sm_80" in first.ptx
    assert first.cubin.startswith(b"\x7fELF")
    assert compiled() is first
    forget()
    assert compiled() == first  # from disk
    assert len(compilations) == 1


def test_every_part_of_a_specialisation_has_its_own_entry(folder, compilations):
    for arch, constants in (("sm_80", {}), ("sm_90a", {}), ("sm_80", {"dim_v": 64}), ("sm_80", {"has_sinks": True})):
        compiled(arch, **constants)
    assert len(compilations) == len(list(folder.iterdir())) == 4


@pytest.mark.parametrize(
    "damage",
    [lambda whole: b"", lambda whole: whole[:-100], lambda whole: whole[:200] + b"x" + whole[201:], lambda whole: b"?"],
    ids=["empty", "cut short", "a byte changed", "something else"],
)
def test_a_damaged_entry_is_compiled_again(folder, compilations, damage):
    first = compiled()
    (entry,) = folder.iterdir()
    whole = entry.read_bytes()
    entry.write_bytes(damage(whole))
    forget()
    assert compiled() == first
    assert len(compilations) == 2
    assert cache.load(entry.name) == [first.cubin, first.ptx.encode()]


def test_a_cache_that_cannot_be_written_costs_a_warning(tmp_path, folder, compilations):
    folder.write_text("a file where the folder should be")
    disk_cache._warn.cache_clear()
    with pytest.warns(RuntimeWarning, match="POSATTN_CACHE_DIR names another folder"):
        first = compiled()
    forget()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compiled() == first  # compiled anew, and said nothing more
    assert len(compilations) == 2


def test_threads_wait_for_one_compilation(folder, compilations):
    found = []
    threads = [threading.Thread(target=lambda: found.append(compiled())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert len({id(kernel) for kernel in found}) == len(compilations) == 1


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="forks what is imported")
def test_processes_share_a_cache(folder):
    context = multiprocessing.get_context("fork")
    both, sizes = context.Barrier(2), context.Queue()

    def race():
        both.wait(60)
        sizes.put(len(compiled().cubin))

    running = [context.Process(target=race, daemon=True) for _ in range(2)]
    for process in running:
        process.start()
    assert sizes.get(timeout=60) == sizes.get(timeout=60)
    for process in running:
        process.join(60)
    assert [process.exitcode for process in running] == [0, 0]
    (entry,) = folder.iterdir()  # one entry, and nothing half written beside it
    assert cache.load(entry.name) is not None


def test_a_changed_source_changes_the_key(tmp_path, monkeypatch):
    """Headers in subfolders too: no kernel is loaded that was compiled from other sources."""
    tree = tmp_path / "copy"
    shutil.copytree(SOURCES, tree)
    monkeypatch.setattr(compiler, "files", lambda package: tree)
    for cached in (compiler._sources, compiler._source_hash):
        monkeypatch.setattr(compiler, cached.__name__, cached.__wrapped__)

    def key():
        return compiler._key("text", "entry", "sm_80")

    first = key()
    sources = [path for path in tree.rglob("*") if path.suffix in (".h", ".cu")]
    assert {path.parent.relative_to(tree).as_posix() for path in sources} >= {".", "common", "backward/sm90"}
    for path in sources:
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + b" ")
        assert key() != first, path
        path.write_bytes(whole)
    assert key() == first
    sources[0].rename(sources[0].with_stem("renamed"))
    assert key() != first


def test_what_nvrtc_refuses_is_said(folder):
    with pytest.raises(compiler.CompileError, match=r"attention_combine for sm_80 does not compile(.|\n)*DIM_V"):
        compiled(dim_v="a head dimension")


def test_a_wrong_layout_does_not_compile(folder, monkeypatch):
    monkeypatch.setattr(params, "size", lambda struct: 8)
    with pytest.raises(compiler.CompileError, match="static assertion failed"):
        compiled()


@pytest.mark.parametrize("absent", ["cuda.core", "cuda.bindings"])
def test_a_missing_package_is_a_reason(absent, monkeypatch):
    monkeypatch.setitem(sys.modules, absent, None)
    for found in (compiler.missing, compiler._nvrtc_version):
        monkeypatch.setattr(compiler, found.__name__, found.__wrapped__)
    assert_refused(r"pip install 'cuda-core\[cu13\]'")


def assert_refused(reason):
    q = torch.zeros(1, 1, 2, 32, dtype=torch.float16)
    with behind_launch(80), pytest.raises(ValueError, match=f"cannot run this call: .*{reason}"):
        posattn.attention(q, q, q, backend="cuda")


@pytest.mark.parametrize(
    ("found", "version", "reason"),
    [
        ("_cuda_core_version", (0, 7), r"needs cuda\.core 1\.0 or later, got 0\.7"),
        ("_nvrtc_version", (12, 0), r"needs NVRTC 12\.1 or later, got 12\.0"),
    ],
)
def test_an_old_package_is_a_reason(found, version, reason, monkeypatch):
    monkeypatch.setattr(compiler, "missing", compiler.missing.__wrapped__)
    monkeypatch.setattr(compiler, found, lambda: version)
    assert_refused(reason)


@pytest.mark.parametrize(
    ("arch", "reason"),
    [("sm_75", "8.0 or later, got 7.5"), ("sm_990", "does not know sm_990"), ("sm_80", None), ("sm_90", None)],
)
def test_an_unsupported_architecture_is_a_reason(arch, reason, monkeypatch):
    monkeypatch.setattr(launch, "has_device", lambda device: True)
    monkeypatch.setattr(launch, "architecture", lambda device: arch)
    call = plain_call("cpu")
    half = type(call)(call.q.half(), call.k.half(), call.v.half(), call.plan, call.mask, call.scale)
    found = cuda.unsupported(half)
    assert found is None if reason is None else reason in found


def test_float32_and_cpu_tensors_are_refused(monkeypatch):
    q = torch.zeros(1, 1, 2, 32)
    with pytest.raises(ValueError, match="needs an NVIDIA GPU, got cpu tensors"):
        posattn.attention(q, q, q, backend="cuda")
    monkeypatch.setattr(launch, "has_device", lambda device: True)
    with pytest.raises(ValueError, match=r"computes float16 and bfloat16, got torch\.float32"):
        posattn.attention(q, q, q, backend="cuda")


def test_parameters_are_packed_as_the_compiler_lays_them_out():
    q, out, cos = torch.zeros(2), torch.zeros(3), torch.zeros(4)
    packed = params.pack(
        "ForwardParams",
        {"q": q, "out": out, "sinks": None, "q_angles": {"cos": cos, "batch": 7}, "scale": 0.5, "split_tiles": -1},
    )
    assert len(packed) == params.size("ForwardParams")
    addresses = [int.from_bytes(packed[at : at + 8], "little") for at in (0, 24, 40)]
    assert addresses == [q.data_ptr(), out.data_ptr(), 0]
    assert {id(tensor) for tensor in packed.tensors} == {id(q), id(out), id(cos)}
    assert {id(tensor) for tensor in packed.read_only} == {id(q), id(cos)}
    with pytest.raises(ValueError, match="no member 'scales'"):
        params.pack("ForwardParams", {"scales": 1.0})
    with pytest.raises(ValueError, match=r"expected one of .*ForwardParams.*, got 'Forward'"):
        params.pack("Forward", {})


@pytest.fixture(scope="module")
def driver_log(tmp_path_factory):
    """Runs Python code beside a CUDA driver that only writes down what it is asked; gives the lines."""
    folder = tmp_path_factory.mktemp("driver")
    source = Path(__file__).parents[1] / "native" / "cuda_driver.c"
    soname = "libcuda.so.1"
    build = ["cc", "-shared", "-fPIC", "-w", f"-Wl,-soname,{soname}", "-o", str(folder / soname), str(source)]
    subprocess.run(build, check=True)

    def run(code):
        log = folder / "log"
        log.write_text("")
        cache = str(folder / "cache")
        found = {"LD_LIBRARY_PATH": str(folder), "CUDA_DRIVER_LOG": str(log), "POSATTN_CACHE_DIR": cache}
        done = subprocess.run([sys.executable, "-c", code], env=os.environ | found, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return log.read_text().splitlines()

    return run


def test_what_the_driver_is_asked(driver_log):
    """cuda.core and its bindings are the real ones. One load for each kernel, device and size of shared memory; a
    launch asks for nothing else, so CUDA graphs can capture it."""
    lines = driver_log(
        f"""
import torch
from types import SimpleNamespace as Some
from posattn.backends.cuda import compiler, launch, params
from posattn.backends.cuda.constants import CombineConstants
kernel = compiler.compile_kernel(*{COMBINE}, {CONSTANTS}, "sm_80")
image = params.pack("CombineParams", {{"rows": 5}})
arguments = params.Arguments(b"\\x2a" + bytes(image)[1:], [Some(is_cuda=False, device=Some(index=0))])
for stream in (77, 78):
    torch.cuda.current_stream = lambda: Some(cuda_stream=stream)
    launch.launch(kernel, (3,), (128,), 64, arguments)
launch.launch(kernel, (4, 2), (128,), 100_000, arguments)
"""
    )
    parameters = "first word 2a, extra 0"
    assert lines == [
        "load ELF",
        "get attention_combine from 0x20",
        "set 8 to 64 of 0x30 on 0",  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        f"launch 0x30 on 0x4d, grid 3 1 1, block 128 1 1, shared 64, {parameters}",
        f"launch 0x30 on 0x4e, grid 3 1 1, block 128 1 1, shared 64, {parameters}",
        "load ELF",
        "get attention_combine from 0x20",
        "set 8 to 100000 of 0x30 on 0",
        f"launch 0x30 on 0x4e, grid 4 2 1, block 128 1 1, shared 100000, {parameters}",
    ]


def test_what_the_driver_refuses_is_said(folder, monkeypatch):
    from cuda.bindings import driver

    packed = params.pack("CombineParams", {"partial": torch.zeros(2), "rows": 5})
    monkeypatch.setattr(driver, "cuLaunchKernel", lambda *given: (driver.CUresult.CUDA_ERROR_INVALID_VALUE,))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=77))
    monkeypatch.setattr(launch, "_loaded", lambda kernel, device, shared: ("owner", "function"))
    with pytest.raises(RuntimeError, match=r"attention_combine \(grid \(3,\)\): CUDA_ERROR_INVALID_VALUE"):
        launch.launch(compiled(), (3,), (128,), 64, packed)
