"""Ctrl-C ends a long call at once with KeyboardInterrupt, and a signal whose handler returns leaves it alone."""

from __future__ import annotations

import subprocess
import sys

import pytest

# Sends itself a signal 0.3 s into a call of several seconds, and tells how the call ended, how long that took from the
# signal on, and how often the handler ran.
CHILD = """
import os, signal, sys, threading, time
import torch, posattn

kind, position, tokens, threads, name, caller = sys.argv[1:]
torch.set_num_threads(int(threads))
q, k, v = (torch.randn(1, 8, int(tokens), 64, requires_grad=True) for _ in range(3))
position = eval(position)
few = [x[:, :, :60].detach() for x in (q, k, v)]
expected = posattn.attention(*few, position, backend="cpu")
heard, sent, ended = [], [], []
if name == "SIGUSR1":
    signal.signal(signal.SIGUSR1, lambda *_: heard.append(posattn.attention(*few, position, backend="cpu")))

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
print(*ended, len(heard))
"""


def run(
    kind: str, position: str, tokens: int, threads: int = 2, signal: str = "SIGINT", caller: str = "main"
) -> tuple[str, float, int]:
    arguments = [kind, position, str(tokens), str(threads), signal, caller]
    child = subprocess.run([sys.executable, "-c", CHILD, *arguments], capture_output=True, text=True, timeout=300)
    assert child.returncode == 0, child.stderr[-3000:]
    ended, seconds, heard = child.stdout.split()
    return ended, float(seconds), int(heard)


@pytest.mark.parametrize(
    ("kind", "position", "tokens", "threads"),
    [
        ("forward", "posattn.FIRE(8)", 24000, 2),
        ("backward", "posattn.DAPE(posattn.Kerple(8), 8)", 4000, 2),
        pytest.param("forward", "posattn.FIRE(8)", 24000, 1, marks=pytest.mark.slow),
        pytest.param("backward", "posattn.FIRE(8)", 7000, 1, marks=pytest.mark.slow),
        pytest.param("backward", "posattn.FIRE(8)", 7000, 2, marks=pytest.mark.slow),
        pytest.param("forward", "posattn.DAPE(posattn.Kerple(8), 8)", 16000, 2, marks=pytest.mark.slow),
    ],
)
def test_a_long_call_ends_within_a_second(kind: str, position: str, tokens: int, threads: int) -> None:
    ended, seconds, _ = run(kind, position, tokens, threads)
    assert ended == "interrupted"
    assert seconds < 1.0


def test_a_handler_that_returns_runs_during_the_call() -> None:
    ended, _, heard = run("forward", "posattn.ALiBi(8)", 5000, signal="SIGUSR1")
    assert (ended, heard) == ("whole", 1)


def test_a_call_on_another_thread_is_left_alone() -> None:
    ended, _, heard = run("forward", "posattn.ALiBi(8)", 5000, caller="other")
    assert (ended, heard) == ("whole", 1)
