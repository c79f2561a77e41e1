"""Doing one item: what it found, as numbers and words that JSON can hold."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import posattn
from posattn import parity
from posattn.backends.triton import launch
from posattn.bench.cases import Case, Mode, Variant
from posattn.bench.runner import ParityError, run_case
from posattn.bench.timing import interleave
from posattn.encodings.base import Encoding
from posattn.gpu import modelled
from posattn.gpu.items import HEAD_DIM, HEADS, KEYS, QUERIES, Item, catalogue

Found = dict[str, Any]
TUNING_VARIABLE = "POSATTN_TRITON_AUTOTUNE"
BATCH, TIMED_HEADS, TIMED_LENGTH = 2, 16, 4096  # of what is timed; lengths of the bench are its items' own
SPIN = 20_000_000  # cycles by which the clock is measured
OPERANDS = {"plain": "none", "slope": "ALiBi learnable", "table": "Kerple", "profile": "FIRE", "rotary": "RoPE"}


class Skipped(Exception):
    """What cannot be done here; the message says why."""


def do(item: Item, device: str, seconds: float = 2.0) -> Found:
    """What an item found; "ok" says whether it is as it should be. Raises Skipped, or what went wrong. `seconds` are of
    one timing."""
    found: Found = _STAGES[item.stage](item.parts, device, seconds)
    return found


def _parity(parts: tuple[str, ...], device: str, seconds: float) -> Found:
    backend, dtype, name = parts
    known = catalogue()
    if name not in known:
        raise ValueError(f"item: expected the name of an encoding, got {name!r}; {', '.join(known)} are known")
    position = known[name]
    q, k, v = _tensors(device, dtype)
    extra = parity.positions_for(position, QUERIES, KEYS)
    return _measured(q, k, v, position, {"causal": True, **extra}, backend, device)


def _options(parts: tuple[str, ...], device: str, seconds: float) -> Found:
    backend, dtype, option = parts
    sizes: dict[str, int] = {}
    given: dict[str, Any] = {"causal": True}
    generator = torch.Generator().manual_seed(1)
    position: Encoding = posattn.ALiBi(HEADS, learnable=True) + posattn.Kerple(HEADS)
    match option:
        case "full":
            given = {}
        case "window":
            given = {"window": (70, 3)}
        case "softcap":
            given["softcap"] = 4.0
        case "sinks":
            given["sinks"] = torch.randn(HEADS, generator=generator)
        case "dropout":
            given["dropout_p"] = 0.2
        case "mask":
            given["mask"] = torch.rand(QUERIES, KEYS, generator=generator) < 0.7
        case "bias":
            given["bias"] = torch.randn(HEADS, QUERIES, KEYS, generator=generator)
        case "documents":
            given["cu_seqlens_q"] = torch.tensor([0, QUERIES // 5, QUERIES // 5, QUERIES], dtype=torch.int32)
            given["cu_seqlens_k"] = torch.tensor([0, KEYS // 5, KEYS // 3, KEYS], dtype=torch.int32)
        case "lengths":
            given["k_lengths"] = torch.tensor([KEYS - KEYS // 3])
        case "starts":
            given["k_starts"] = torch.tensor([KEYS // 3])
        case "offset":
            given["offset"] = 40
        case "deterministic":
            given["deterministic"] = True
        case "grouped":
            sizes = {"kv_heads": 1}
        case "one query":
            sizes = {"queries": 1}
        case "dim 128" | "dim 256":
            sizes = {"dim": int(option.split()[1])}
        case "values wider":
            sizes = {"value_dim": 96}
        case _:
            raise ValueError(f"item: expected the name of an option, got {option!r}")
    return _measured(*_tensors(device, dtype, **sizes), position, given, backend, device)


def _tensors(
    device: str,
    dtype: str,
    queries: int | None = None,
    kv_heads: int | None = None,
    dim: int = HEAD_DIM,
    value_dim: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    kv_heads = kv_heads or HEADS
    shapes = ((HEADS, queries or QUERIES, dim), (kv_heads, KEYS, dim), (kv_heads, KEYS, value_dim or dim))
    q, k, v = (torch.randn(1, *shape, generator=generator).to(device, getattr(torch, dtype)) for shape in shapes)
    return q, k, v


def _measured(
    q: Tensor, k: Tensor, v: Tensor, position: Encoding | None, options: dict[str, Any], backend: str, device: str
) -> Found:
    torch.manual_seed(0)
    placed = None if position is None else position.to(device)
    given = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in options.items()}
    found = parity.measure(q, k, v, placed, given, backend)
    worst = max(found, key=lambda c: c.error / max(c.allowed, 1e-30))
    share = worst.error / max(worst.allowed, 1e-30)
    wrong = [c.worst for c in found if not c.ok]
    return {"ok": not wrong, "of_allowed": share, "worst": worst.name, "wrong": wrong}


def _sanitizer(parts: tuple[str, ...], device: str, seconds: float) -> Found:
    tool, backend, name = parts
    program = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if program is None:
        raise Skipped("no compute-sanitizer on the path")
    command = [program, "--tool", tool, "--error-exitcode", "9"]
    command += [sys.executable, "-m", "posattn.gpu", "--item", f"parity/{backend}/bfloat16/{name}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("=========")]
    return {"ok": done.returncode == 0, "summary": lines[-1] if lines else done.stdout[-300:], "lines": lines[:20]}


def _tuning(parts: tuple[str, ...], device: str, seconds: float) -> Found:
    mode, dim, name = parts
    call = _attention_call(name, "triton", mode, int(dim), True, device)
    shipped = interleave({"it": call}, seconds, device)["it"].median
    before = os.environ.get(TUNING_VARIABLE)
    os.environ[TUNING_VARIABLE] = "1"
    try:
        call()
        tuned = interleave({"it": call}, seconds, device)["it"].median
    finally:
        if before is None:
            del os.environ[TUNING_VARIABLE]
        else:
            os.environ[TUNING_VARIABLE] = before
    return {"ok": True, "shipped_ms": 1e3 * shipped, "tuned_ms": 1e3 * tuned, "gain": shipped / tuned}


def _bench(parts: tuple[str, ...], device: str, seconds: float) -> Found:
    mode, length, dim, name = parts
    modes: dict[str, Mode] = {"forward": "forward", "both": "both"}
    trained = {"ALiBi": "ALiBi learnable"}.get(name, name) if mode == "both" else name
    variants = [Variant("posattn", trained, backend) for backend in ("cuda", "triton")]
    variants += [Variant("sdpa"), Variant("flex", "ALiBi"), Variant("flash-attn"), Variant("flash-attn", "ALiBi")]
    case = Case(
        f"gpu-{mode}-{length}",
        tuple(variants),
        mode=modes[mode],
        dtype="bfloat16",
        batch=BATCH,
        heads=TIMED_HEADS,
        q_len=int(length),
        k_len=int(length),
        head_dim=int(dim),
        seconds=seconds * len(variants),
    )
    notes: list[str] = []
    try:
        rows = run_case(case, device, torch.get_num_threads(), notes.append)
    except ParityError as error:
        return {"ok": False, "wrong": [str(error)], "rows": [], "notes": notes}
    times = [
        {"variant": row.variant, "ms": 1e3 * row.median, "rate": row.rate, "share": row.share, "peak": row.peak_kind}
        for row in rows
    ]
    return {"ok": True, "rows": times, "notes": notes}


def _cycles(parts: tuple[str, ...], device: str, seconds: float) -> Found:
    backend, which, dim, operand = parts
    call = _attention_call(OPERANDS[operand], backend, which, int(dim), False, device)
    median = interleave({"it": call}, seconds, device)["it"].median
    hertz = clock(device)
    count = launch.processors(torch.device(device))
    tiles = BATCH * TIMED_HEADS * (TIMED_LENGTH // 64) ** 2
    seen = median * hertz * count / tiles
    model = modelled.cycles(backend, launch.architecture(torch.device(device)), which, int(dim), operand)
    found = {"ok": True, "ms": 1e3 * median, "clock_mhz": hertz * 1e-6, "processors": count, "cycles": seen}
    return found | {"modelled": model, "over_model": None if model is None else seen / model}


def clock(device: str) -> float:
    """Cycles a second of the multiprocessors at this moment, by a kernel that waits for a number of cycles."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(SPIN // 20)
    begin.record()
    torch.cuda._sleep(SPIN)
    end.record()
    torch.cuda.synchronize()
    return SPIN / (begin.elapsed_time(end) * 1e-3)


def _attention_call(name: str, backend: str, mode: str, dim: int, causal: bool, device: str) -> Callable[[], object]:
    """A call to time: "forward" without gradients, "both", or "backward" alone."""
    torch.manual_seed(0)
    position = {"none": None, **parity.examples(TIMED_HEADS, dim, TIMED_LENGTH)}[name]
    if position is not None:
        position = position.to(device).requires_grad_(mode != "forward")
    shape = (BATCH, TIMED_HEADS, TIMED_LENGTH, dim)
    q, k, v, grad = (torch.randn(shape, device=device).to(torch.bfloat16) for _ in range(4))
    leaves = [x.requires_grad_() for x in (q, k, v)] if mode != "forward" else []
    leaves += [] if position is None else [p for p in position.parameters() if p.requires_grad]

    def forward() -> Tensor:
        return posattn.attention(q, k, v, position, causal=causal, backend=backend)

    if mode == "forward":
        forward()
        return torch.no_grad()(forward)
    if mode == "both":
        return lambda: torch.autograd.grad(forward(), leaves, grad)
    out = forward()
    return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)


_STAGES: dict[str, Callable[[tuple[str, ...], str, float], Found]] = {
    "parity": _parity,
    "options": _options,
    "sanitizer": _sanitizer,
    "tuning": _tuning,
    "bench": _bench,
    "cycles": _cycles,
}
