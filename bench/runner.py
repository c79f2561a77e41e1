"""Run cases: parity, warm-up, peaks, interleaved timing, rows, verdicts."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from . import footprint, parity
from .cases import Case, Variant
from .peers import Contender, Unavailable, contender
from .report import Row
from .timing import Timing, interleave
from .work import peak, work

MAY_FAIL = (Unavailable, NotImplementedError, RuntimeError, ValueError)


class ParityError(Exception):
    """posattn disagrees with the reference; nothing was timed."""


def run_case(case: Case, device: str, threads: int, note: Callable[[str], None]) -> list[Row]:
    """The rows of one case. A peer that cannot run is noted and left out; ParityError if posattn is wrong."""
    if case.memory:
        return [_memory_row(case, variant, device, threads) for variant in case.variants]
    calls: dict[str, Callable[[], object]] = {}
    digests: dict[str, str] = {}
    kept: list[Variant] = []
    for variant in case.variants:
        own = variant.threads or threads
        try:
            with _threads(own):
                call, digests[variant.name] = _checked(variant, case, device)
        except Unavailable as error:
            note(f"{case.name}: {variant.name} left out: {error}")
            continue
        kept.append(variant)
        calls[variant.name] = _with_threads(call, own, threads)
    if not kept:
        return []
    before = _peaks(case, kept, device, threads)
    timings = interleave(calls, case.seconds, device)
    after = _peaks(case, kept, device, threads)
    # The better of two looks: a share of the peak must not gain from a probe that was disturbed.
    best = {key: max(value, after[key]) for key, value in before.items()}
    return [_row(case, v, timings[v.name], best, digests[v.name], v.threads or threads) for v in kept]


def _checked(variant: Variant, case: Case, device: str) -> tuple[Callable[[], object], str]:
    """The call to time, after parity, and a digest of its results."""
    try:
        wrong = parity.posattn_differs(variant, case, device) if variant.peer == "posattn" else None
        ready = contender(variant, case, device)
        out, results = _first_call(ready, case)
        wrong = wrong or parity.outputs_differ(variant, case, device, out)
    except MAY_FAIL as error:
        if variant.peer == "posattn" and variant.backend == "auto":
            raise
        raise Unavailable(str(error).splitlines()[0] if str(error) else type(error).__name__) from error
    if wrong and variant.peer == "posattn":
        raise ParityError(f"{case.name}: {variant.name}: {wrong}")
    if wrong:
        raise Unavailable(f"it disagrees with the reference: {wrong}")
    return _call(ready, case), _digest(results)


def _first_call(ready: Contender, case: Case) -> tuple[Tensor, list[Tensor]]:
    """The warm-up: out, and out with all gradients."""
    with torch.set_grad_enabled(case.mode != "forward"):
        out = ready.forward()
        gradients = ready.backward(out) if case.mode != "forward" else ()
    out = out.detach()
    return out, [out, *(g for g in gradients if g is not None)]


def _call(ready: Contender, case: Case) -> Callable[[], object]:
    if case.mode == "forward":
        return torch.no_grad()(ready.forward)
    if case.mode == "both":
        return lambda: ready.backward(ready.forward())
    out = ready.forward()
    return lambda: ready.backward(out, retain_graph=True)


def _digest(results: list[Tensor]) -> str:
    digest = hashlib.sha256()
    for result in results:
        digest.update(result.cpu().reshape(-1).view(torch.uint8).numpy().tobytes())  # a scalar has no bytes to view
    return digest.hexdigest()[:16]


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _with_threads(call: Callable[[], object], count: int, usual: int) -> Callable[[], object]:
    if count == usual:
        return call

    def limited() -> object:
        with _threads(count):
            return call()

    return limited


def _peaks(case: Case, variants: list[Variant], device: str, threads: int) -> dict[tuple[str, int], float]:
    """By kind and thread count, for the kinds and counts that the case's rows need."""
    wanted = {(work(case, v.encoding).peak, v.threads or threads) for v in variants}
    return {(kind, count): peak(kind, device, count, case.dtype) for kind, count in wanted}


def _row(
    case: Case,
    variant: Variant,
    timing: Timing,
    best: dict[tuple[str, int], float],
    digest: str,
    threads: int,
) -> Row:
    amount = work(case.shaped(variant), variant.encoding)
    rate = amount.amount / timing.median
    limit = best[amount.peak, threads] or float("nan")
    return replace(
        _blank(case, variant, threads),
        median=timing.median,
        p20=timing.p20,
        p80=timing.p80,
        rounds=timing.rounds,
        rate=rate,
        peak_kind=amount.peak,
        peak=limit,
        share=rate / limit,
        digest=digest,
    )


def _memory_row(case: Case, variant: Variant, device: str, threads: int) -> Row:
    return replace(_blank(case, variant, threads), memory=footprint.measure(variant, case, device, threads))


def _blank(case: Case, variant: Variant, threads: int) -> Row:
    shape = case.shaped(variant)
    return Row(
        case=case.name,
        variant=variant.name,
        encoding=variant.encoding,
        peer=variant.peer,
        mode=case.mode,
        dtype=case.dtype,
        batch=shape.batch,
        heads=shape.heads,
        kv_heads=shape.kv_heads or shape.heads,
        q_len=shape.q_len,
        k_len=shape.k_len,
        head_dim=shape.head_dim,
        causal=shape.causal,
        threads=threads,
    )
