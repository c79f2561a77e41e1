"""Memory of the GPU backends grows with N and not with N^2: what their wrappers take, with launches that do nothing.

Kernels have no memory but what their wrappers hand them, so none need run here.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from importlib import import_module
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import posattn
from posattn.backends.cuda import compiler
from posattn.backends.cuda import launch as cuda_launch
from posattn.backends.triton import launch as triton_launch
from posattn.parity import examples, positions_for

HEADS, DIM, TOKENS = 2, 64, 2048
# A bias of one's own that broadcasts over queries, or over keys. (RelativeTable2D is a dense bias of T x T entries.)
BIASES = ("bias of keys", "bias of queries")
NAMES = [
    "none",
    *BIASES,
    *(f"DAPE, {name}" for name in BIASES),
    *(name for name in examples(HEADS, DIM, 64) if name != "RelativeTable2D"),
]


class Peak(TorchDispatchMode):
    """The most bytes that tensors made inside hold at once."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0
        self.held: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor.untyped_storage())
        return found

    def _note(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self.held:
            self.held[storage._cdata] = storage.nbytes()
            weakref.finalize(storage, self.held.pop, storage._cdata)
            self.most = max(self.most, sum(self.held.values()))


@pytest.fixture(autouse=True)
def idle_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An A100 that does nothing."""
    pytest.importorskip("cuda.core")
    device = {"architecture": lambda _: "sm_80", "processors": lambda _: 108, "launch": lambda *_: None}
    monkeypatch.setattr(compiler, "compile_kernel", lambda *_: None)
    with (
        mock.patch.multiple(triton_launch, has_device=lambda _: True, **device),
        mock.patch.multiple(cuda_launch, has_device=lambda _: True, **device),
    ):
        yield


def taken(
    monkeypatch: pytest.MonkeyPatch, backend: str, name: str, tokens: int, deterministic: bool = False, **given: Any
) -> int:
    """Bytes that the backend takes for one call, forward and backward, gradients included."""
    module, peak = import_module(f"posattn.backends.{backend}"), Peak()

    def counted(function: Any) -> Any:
        def run(*args: Any) -> Any:
            with peak:
                return function(*args)

        return run

    position = examples(HEADS, DIM, tokens).get(name.split(", ")[0])
    options: dict[str, Any] = {"causal": True, "deterministic": deterministic, **given}
    options.update(positions_for(position, tokens, tokens))
    if name.endswith(BIASES):
        shape = (1, tokens) if name.endswith("keys") else (tokens, 1)
        options["bias"] = torch.zeros(1, HEADS, *shape, requires_grad=True)
    q, k, v = (torch.randn(1, HEADS, tokens, DIM, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    with monkeypatch.context() as patched:
        for way in ("forward", "backward"):
            patched.setattr(module, way, counted(getattr(module, way)))
        posattn.attention(q, k, v, position, backend=backend, **options).sum().backward()
    return peak.most


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("deterministic", [False, True], ids=["any order", "deterministic"])
def test_it_at_most_doubles(monkeypatch: pytest.MonkeyPatch, name: str, backend: str, deterministic: bool) -> None:
    small, large = (taken(monkeypatch, backend, name, tokens, deterministic) for tokens in (TOKENS, 2 * TOKENS))
    assert small > 3 * TOKENS * HEADS * DIM * 2  # the gradients at least
    assert large < 2.05 * small


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_it_does_not_grow_with_the_number_of_documents_beside_a_long_one(
    monkeypatch: pytest.MonkeyPatch, name: str, backend: str
) -> None:
    half = TOKENS // 2
    few, many = (torch.tensor([*range(0, half, length), half, TOKENS]) for length in (half // 4, 4))
    small, large = (
        taken(monkeypatch, backend, name, TOKENS, cu_seqlens_q=starts, cu_seqlens_k=starts) for starts in (few, many)
    )
    # Each document may begin a block of its own: up to nine times as many as without.
    assert large < 9 * small
