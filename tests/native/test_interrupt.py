"""Ctrl-C ends a long call at once with KeyboardInterrupt, and a signal whose handler returns leaves it alone."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

# Sends itself a signal 0.3 s into a call of several seconds, and tells how the call ended, how long that took from the
# signal on, and how often the handler ran.
CHILD = """
import json, os, signal, sys, threading, time
import torch, posattn

signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background begins with it ignored

def one(kind, position, tokens, threads, name, caller):
    torch.set_num_threads(threads)
    q, k, v = (torch.randn(1, 8, tokens, 64, requires_grad=True) for _ in range(3))
    position = eval(position)
    few = [x[:, :, :60].detach() for x in (q, k, v)]
    expected = posattn.attention(*few, position, backend="cpu")
    heard, sent, ended = [], [], []
    handler = lambda *_: heard.append(posattn.attention(*few, position, backend="cpu"))
    signal.signal(signal.SIGUSR1, handler if name == "SIGUSR1" else signal.SIG_DFL)

    def send():
        sent.append(time.monotonic())
        os.kill(os.getpid(), getattr(signal, name))

    def work():
        if kind == "backward":
            out = posattn.attention(q, k, v, position, backend="cpu").sum()
        threading.Timer(0.3, send).start()
        try:
            out.backward() if kind == "backward" else posattn.attention(q, k, v, position, backend="cpu")
            ended.append("whole")
        except KeyboardInterrupt:
            ended.append("interrupted")
        ended.append(time.monotonic() - sent[0])

    if caller == "main":
        work()
    else:
        threading.Thread(target=work).start()
        while len(ended) < 2:
            try:
                time.sleep(0.05)
            except KeyboardInterrupt:
                heard.append(expected)
    assert torch.equal(posattn.attention(*few, position, backend="cpu"), expected), "a later call is wrong"
    assert all(torch.equal(x, expected) for x in heard), "a call in the handler is wrong"
    return *ended, len(heard)

for given in json.loads(sys.argv[1]):
    print(json.dumps(one(*given)), flush=True)
"""

LONG_FIRE, DAPE, KERPLE = (
    ("forward", "posattn.FIRE(8)", 24000),
    "posattn.DAPE(posattn.Kerple(8), 8)",
    "posattn.Kerple(8)",
)
INTERRUPTED = [(*LONG_FIRE, 2), ("backward", DAPE, 4000, 2)]
MORE = [
    (*LONG_FIRE, 1),
    ("backward", "posattn.FIRE(8)", 7000, 1),
    ("backward", "posattn.FIRE(8)", 7000, 2),
    ("forward", DAPE, 16000, 2),
]


def run(calls: list[tuple[Any, ...]]) -> list[tuple[str, float, int]]:
    """How each call ended; one process makes them all, as it takes longer to start than most of them."""
    child = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(calls)], capture_output=True, text=True, timeout=300
    )
    ends = [json.loads(line) for line in child.stdout.splitlines()]
    assert child.returncode == 0, f"call {len(ends)} of {calls}: {child.stderr[-3000:]}"
    return ends


def test_a_long_call_is_interrupted_and_no_other() -> None:
    """It ends within a second; one during which a handler returns, and one on another thread, are left alone."""
    alone = [("forward", KERPLE, 12000, 2, "SIGUSR1", "main"), ("forward", KERPLE, 12000, 2, "SIGINT", "other")]
    *interrupted, handled, other = run([(*call, "SIGINT", "main") for call in INTERRUPTED] + alone)
    for ended, seconds, _ in interrupted:
        assert ended == "interrupted"
        assert seconds < 1.0
    assert (handled[0], handled[2]) == ("whole", 1)
    assert (other[0], other[2]) == ("whole", 1)


@pytest.mark.slow
def test_other_long_calls_end_within_a_second() -> None:
    for call, (ended, seconds, _) in zip(MORE, run([(*call, "SIGINT", "main") for call in MORE]), strict=True):
        assert ended == "interrupted", call
        assert seconds < 1.0, call
