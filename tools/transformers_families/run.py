"""Many families, each in a process that may take neither long nor much."""

from __future__ import annotations

import multiprocessing
import resource
import signal
import warnings
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from tools.transformers_families.sweep import Finding, look_at

SECONDS = 60  # a family that takes longer is not small
BYTES = 8 << 30  # of address space for a process


def find(family: str) -> Finding:
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))

    def stop(*_: Any) -> None:
        raise TimeoutError(f"longer than {SECONDS} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        return look_at(family, CONFIG_MAPPING[family])
    except (TimeoutError, MemoryError) as problem:
        return Finding(family, "not made", None, str(problem))
    finally:
        signal.alarm(0)


def families() -> list[str]:
    return list(MODEL_MAPPING._model_mapping)


def findings(names: list[str], jobs: int) -> list[Finding]:
    # Processes live for some families: one of large defaults may leave memory behind.
    with multiprocessing.get_context("spawn").Pool(jobs, maxtasksperchild=40) as pool:
        found = []
        for finding in pool.imap(find, names):
            print(finding.family, finding.way, finding.error, dict(finding.counts), finding.reason, flush=True)
            found.append(finding)
        return found
