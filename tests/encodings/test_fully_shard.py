"""Encodings under fully_shard on two processes: results and gradients are those of one process."""

from __future__ import annotations

import copy
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn

import posattn
import posattn.encodings as encodings

try:
    from torch.distributed.fsdp import fully_shard
except ImportError:  # before torch 2.6
    fully_shard = pytest.importorskip("torch.distributed._composable.fsdp").fully_shard

HEADS, DIM, TOKENS, RANKS = 4, 12, 10, 2
HOW = ("the encoding alone", "the model", "the model and every encoding in it")


def examples():
    """Encodings with each set of parameters that there is, the same ones on every rank."""
    torch.manual_seed(0)
    seen = set()
    for kind in encodings.__all__:
        for name, encoding in getattr(encodings, kind).examples(HEADS, DIM, TOKENS).items():
            parameters = kind, tuple(name for name, _ in encoding.named_parameters())
            if parameters[1] and parameters not in seen:
                seen.add(parameters)
                yield name, encoding
    yield "a sum", posattn.RoPE(DIM) + posattn.T5Bias(HEADS) + posattn.DAPE(posattn.FIRE(HEADS), HEADS)
    yield "BiPE with a parameter", encodings.BiPE(posattn.ALiBi(HEADS, learnable=True), 8, TOKENS)


class Layer(nn.Module):
    """Two calls of one encoding, with a projection between them."""

    def __init__(self, position):
        super().__init__()
        self.position = position
        self.project = nn.Linear(DIM, DIM)
        self.places = None
        if position.needs_positions:
            self.places = torch.arange(TOKENS) // 3

    def forward(self, q):
        options = {"q_positions": self.places, "k_positions": self.places, "causal": True}
        options["backend"] = "auto" if self.position.fused else "reference"
        q = posattn.attention(q, q, q, self.position, **options)
        return posattn.attention(self.project(q), q, q, self.position, **options)


def shard(layer, how):
    if how != "the model":
        for module in list(layer.position.modules())[::-1]:  # from the inside out
            # What BiPE adds to the embeddings is called by itself, outside of attention.
            apart = isinstance(module, encodings.Encoding if "every" in how else encodings.LearnedEmbedding)
            if (apart or module is layer.position) and list(module.parameters()):
                fully_shard(module)
    if "model" in how:
        fully_shard(layer)


def whole(value):
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def compare(encoding, how, rank):
    torch.manual_seed(0)
    inputs = torch.randn(RANKS, 2, HEADS, TOKENS, DIM)
    plain = Layer(copy.deepcopy(encoding))
    outs = [plain(q) for q in inputs]
    (sum(out.square().sum() for out in outs) / RANKS).backward()

    layer = Layer(copy.deepcopy(encoding))
    layer.load_state_dict(plain.state_dict())
    shard(layer, how)
    out = layer(inputs[rank])
    out.square().sum().backward()
    torch.testing.assert_close(out, outs[rank])
    expected = dict(plain.named_parameters())
    for key, parameter in layer.named_parameters():
        if key.startswith("project") and "model" not in how:
            continue
        got = whole(parameter.grad)
        if "intra." in key:  # not part of attention
            assert got is None
            continue
        torch.testing.assert_close(got, expected[key].grad, rtol=1e-4, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}")


def work(rank, file):
    torch.set_num_threads(1)
    # A rank that fails leaves the other waiting for it.
    limit = timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=RANKS, timeout=limit)
    for name, encoding in examples():
        for how in HOW:
            try:
                compare(encoding, how, rank)
            except Exception as error:
                raise AssertionError(f"{name}, {how}") from error
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")
def test_every_encoding_with_parameters_on_two_processes(tmp_path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    torch.multiprocessing.spawn(work, (tmp_path / "store",), nprocs=RANKS)
