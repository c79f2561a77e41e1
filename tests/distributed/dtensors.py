"""What each process of a test does with DTensors: calls of whole tensors against calls of sharded ones."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import posattn
from posattn import distributed
from tests.distributed.ranks import DIM, HEADS, POSITIONS, gradients

BATCH, TOKENS = 2, 16
PLACEMENTS = {"B": Shard(0), "H": Shard(1), "T": Shard(2), "-T": Shard(-2), "all": Replicate(), "sum": Partial()}


def compare(case: dict[str, Any], mesh: Any) -> dict[str, float]:
    """By result, its error against float64 over what is allowed."""
    options = dict(case.get("options", {"causal": True}))
    placements = [PLACEMENTS[name] for name in case["cut"]]
    key_placements = [PLACEMENTS[name] for name in case.get("keys", case["cut"])]
    generator = torch.Generator().manual_seed(3)
    kv_heads = case.get("kv_heads", HEADS)
    tensors = [torch.randn(BATCH, h, TOKENS, DIM, generator=generator) for h in (HEADS, kv_heads, kv_heads)]
    shape = BATCH, HEADS, TOKENS
    grads = torch.randn(*shape, DIM, generator=generator), torch.randn(shape, generator=generator)
    sinks = torch.linspace(-1.0, 1.0, HEADS) if case.get("sinks") else None
    made = []
    for _ in range(3):
        torch.manual_seed(5)
        made.append(POSITIONS[case["position"]]())

    def whole(dtype: torch.dtype, position: Any) -> dict[str, Tensor]:
        given = dict(options) if sinks is None else {**options, "sinks": sinks.to(dtype)}
        position = position if position is None else position.to(dtype)
        moved = [x.to(dtype) for x in tensors]
        return gradients(
            posattn.attention, moved, position, (grads[0].to(dtype), grads[1].to(dtype)), backend="reference", **given
        )

    exact, naive = whole(torch.float64, made[0]), whole(torch.float32, made[1])

    position = made[2]
    if case.get("parameters"):
        for module in [] if position is None else position.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                kinds = [PLACEMENTS["B"] if kind == "cut" else Replicate() for kind in case["parameters"]]
                module.register_parameter(name, torch.nn.Parameter(distribute_tensor(parameter.detach(), mesh, kinds)))
    spread = [
        distribute_tensor(x, mesh, kinds).requires_grad_()
        for x, kinds in zip(tensors, (placements, key_placements, key_placements))
    ]
    wanted: dict[str, Tensor] = dict(zip(("dq", "dk", "dv"), spread))
    if sinks is not None:
        options["sinks"] = wanted["dsinks"] = sinks.detach().clone().requires_grad_()
    if position is not None:
        wanted |= {f"d{name}": p for name, p in position.named_parameters() if p.requires_grad}
    out, lse = posattn.attention(*spread, position, return_lse=True, **options)
    assert isinstance(out, DTensor)
    assert list(out.placements) == list(spread[0].placements)
    assert out.shape == spread[0].shape
    of_out, of_lse = (distribute_tensor(x, mesh, lse.placements).to_local() for x in grads)
    found = torch.autograd.grad([out.to_local(), lse.to_local()], list(wanted.values()), [of_out, of_lse])
    got = {"out": out, "lse": lse, **dict(zip(wanted, found))}
    over = {}
    for name, value in got.items():
        if isinstance(value, DTensor):
            value = value.full_tensor()
        error, allowed = ((x.double() - exact[name]).abs().max().item() for x in (value, naive[name]))
        eps = 4 * torch.finfo(torch.float32).eps
        over[name] = error / (2 * allowed + 8 * eps * max(exact[name].abs().max().item(), 1.0))
    return over


class Layer(torch.nn.Module):
    def __init__(self, position: Any, method: str) -> None:
        super().__init__()
        self.position, self.method = position, method
        self.project = torch.nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Any:
        q = self.project(x)
        return distributed.attention(q, q, q, self.position, causal=True, method=self.method, sum_gradients=False)


def under_fsdp(case: dict[str, Any]) -> dict[str, float]:
    """0 by parameter where a model under fully_shard, its sequence cut over the same ranks, has the gradients that it
    has
    without: FSDP takes their mean."""
    torch.manual_seed(5)
    bare = Layer(POSITIONS[case["position"]](), case["method"])
    model = copy.deepcopy(bare)
    fully_shard(model)
    x = distributed.shard(torch.randn(1, HEADS, TOKENS, DIM, generator=torch.Generator().manual_seed(3)))
    over = {}
    for layer in (bare, model):
        layer(x).square().sum().backward()
    for (name, one), other in zip(bare.named_parameters(), model.parameters()):
        dist.all_reduce(one.grad)
        mean = one.grad / dist.get_world_size()  # type: ignore[operator]
        close = torch.allclose(other.grad.full_tensor(), mean, rtol=1e-6, atol=1e-6)  # type: ignore[union-attr]
        over[name] = 0.0 if close and mean.abs().max() > 0 else 2.0
    return over


def refused(case: dict[str, Any], mesh: Any) -> str:
    """The error that this rank gets."""
    spread = [
        DTensor.from_local(
            torch.randn(1, HEADS // 2 if name == "H" else HEADS, TOKENS, DIM), mesh, [PLACEMENTS[name]], run_check=False
        )
        for name in case["cuts"]
    ]
    if case.get("plain"):
        spread[0] = spread[0].to_local()
    position = (
        {**POSITIONS, "wide": lambda: posattn.ALiBi(HEADS + 1)}[case["position"]]() if "position" in case else None
    )
    if case.get("parameters"):
        for module in position.modules():  # type: ignore[union-attr]
            for name, parameter in list(module.named_parameters(recurse=False)):
                module.register_parameter(name, torch.nn.Parameter(distribute_tensor(parameter, mesh, [Replicate()])))
    try:
        if case.get("sdpa"):
            posattn.scaled_dot_product_attention(*spread)
        elif case.get("local"):
            posattn.attention(*(x.to_local() for x in spread), position, mesh=mesh)
        else:
            posattn.attention(*spread, position, **case.get("options", {}))
    except (ValueError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def found_of(case: dict[str, Any], meshes: dict[int, Any]) -> Any:
    if "fsdp" in case:
        return under_fsdp(case)
    return refused(case, meshes[1]) if "cuts" in case else compare(case, meshes[len(case["cut"])])


def main(folder: Path, rank: int, ranks: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    cases = json.loads((folder / "cases.json").read_text())
    meshes = {1: init_device_mesh("cpu", (ranks,))}
    if ranks % 2 == 0:
        meshes[2] = init_device_mesh("cpu", (ranks // 2, 2), mesh_dim_names=("outer", "inner"))
    found = [found_of(case, meshes) for case in cases]
    (folder / f"found{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
