"""DTensors: attention on each rank's shards, cut along batches, heads and tokens; results lie as the queries do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard  # torch 2.5

from posattn.distributed.gathered import SumGradients
from posattn.distributed.parameters import LocalParameters
from posattn.encodings.base import Encoding
from posattn.errors import ArgumentTypeError, ArgumentValueError

BATCH, HEADS, TOKENS = 0, 1, 2


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position: Encoding | None,
    options: dict[str, Any],
    over_tokens: Callable[..., Any],
    alone: Callable[..., Any],
) -> Any:
    """What posattn.distributed.attention does with DTensors. `over_tokens` and `alone` run a rank's share: over a
    group, where tokens are cut, and by itself."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, DTensor):
            raise ArgumentTypeError(f"{name}: expected a DTensor as the others are, got {type(tensor).__name__}")
        if tensor.dim() != 4:
            raise ArgumentValueError(
                f"{name}: expected 4 dimensions [batch, heads, tokens, head_dim], got {list(tensor.shape)}"
            )
    assert isinstance(q, DTensor)
    assert isinstance(k, DTensor)
    assert isinstance(v, DTensor)
    mesh = q.device_mesh
    cut = _cut(q)
    for name, tensor in (("k", k), ("v", v)):
        if tensor.device_mesh != mesh:
            raise ArgumentValueError(f"{name}: expected a DTensor on q's mesh {mesh}, got one on {tensor.device_mesh}")
        for dim, (own, other) in enumerate(zip(q.placements, tensor.placements)):
            shared = other.is_replicate() and dim == cut.get(HEADS)
            if not shared and _dim(own) != _dim(other):
                raise ArgumentValueError(f"{name}: expected q's placements {q.placements}, got {tensor.placements}")
    if k.placements != v.placements:
        raise ArgumentValueError(f"v: expected k's placements {k.placements}, got {v.placements}")
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        for dim, placement in enumerate(tensor.placements):
            along = _dim(placement)
            if along is not None and tensor.shape[along] % mesh.size(dim):
                what = ("sequences", "heads", "tokens")[along]
                raise ArgumentValueError(
                    f"{name}: expected a number of {what} that {mesh.size(dim)} ranks divide, got {tensor.shape[along]}"
                )
    if position is not None and position.num_heads not in (None, q.shape[1]):
        raise ArgumentValueError(
            f"position: {type(position).__name__} was made for num_heads={position.num_heads}, got queries with "
            f"{q.shape[1]} heads"
        )
    sharded = [dim for dim, placement in enumerate(q.placements) if not placement.is_replicate()]
    sums = sharded if options.pop("sum_gradients", True) else []
    local = [q.to_local(), *(_keys(tensor, cut.get(HEADS)) for tensor in (k, v))]
    if position is not None and (sums or any(isinstance(p, DTensor) for p in position.parameters())):
        position = LocalParameters(position, {n: _whole(n, p, mesh, sums) for n, p in position.named_parameters()})
    sinks = options.get("sinks")
    if sinks is not None:
        sinks = options["sinks"] = _whole("sinks", sinks, mesh, sums)
    if HEADS in cut:
        count = local[0].shape[1]
        first = mesh.get_local_rank(cut[HEADS]) * count
        if position is not None:
            position = position.shard(first, count)
        if sinks is not None:
            options["sinks"] = sinks.narrow(0, first, count)
        if k.shape[1] != local[1].shape[1] * mesh.size(cut[HEADS]):
            local[1:] = [_heads_read(x, first, count, q.shape[1]) for x in local[1:]]
    if TOKENS in cut:
        group = mesh.get_group(cut[TOKENS])
        found = over_tokens(*local, position, group=group, layout="contiguous", sum_gradients=False, **options)
    else:
        found = alone(*local, position, **options)
    shape = (*q.shape[:3], v.shape[3])
    if not options.get("return_lse"):
        return _spread(found, mesh, q.placements, shape)
    # The log-sum-exp has a dimension less to count from the end.
    of_lse = [Shard(p.dim % 4) if isinstance(p, Shard) else p for p in q.placements]
    return _spread(found[0], mesh, q.placements, shape), _spread(found[1], mesh, of_lse, shape[:3])


def _dim(placement: Placement) -> int | None:
    """The dimension that a placement cuts, of four."""
    return placement.dim % 4 if isinstance(placement, Shard) else None


def _cut(q: DTensor) -> dict[int, int]:
    """By dimension of q, the mesh's dimension that cuts it."""
    found: dict[int, int] = {}
    for dim, placement in enumerate(q.placements):
        along = _dim(placement)
        if placement.is_replicate():
            continue
        if along is None or along > TOKENS or (along in found and along != BATCH):
            raise ArgumentValueError(
                "q: expected placements that replicate, cut the batch, cut the heads by one dimension of the mesh, or "
                f"the tokens by one, got {q.placements}"
            )
        found[along] = dim
    return found


def _keys(x: DTensor, heads: int | None) -> Tensor:
    """The local part; where ranks with other heads have the same keys, their gradients are summed."""
    if heads is None or not x.placements[heads].is_replicate():
        return x.to_local()
    placements = [Partial() if dim == heads else placement for dim, placement in enumerate(x.placements)]
    return x.to_local(grad_placements=placements)


def _heads_read(x: Tensor, first: int, count: int, heads: int) -> Tensor:
    """Of the keys of all heads, those that query heads first .. first + count - 1 of `heads` read."""
    shared = heads // x.shape[1]
    if count % shared and shared % count:
        raise ArgumentValueError(
            f"k, v: expected {x.shape[1]} key heads whose {shared} query heads each lie on one rank, or fill several, "
            f"got {count} query heads a rank"
        )
    return x.narrow(1, first // shared, max(count // shared, 1))


def _whole(name: str, x: Tensor, mesh: DeviceMesh, sums: list[int]) -> Tensor:
    """All of a parameter on this rank; its gradient is summed over the mesh's dimensions `sums`, whose ranks have other
    shares of the work."""
    if isinstance(x, DTensor):
        if x.device_mesh != mesh:
            raise ArgumentValueError(f"{name}: expected a DTensor on q's mesh {mesh}, got one on {x.device_mesh}")
        return x.full_tensor(grad_placements=[Partial() if dim in sums else Replicate() for dim in range(mesh.ndim)])
    if x.requires_grad and torch.is_grad_enabled():
        for dim in sums:
            (x,) = SumGradients.apply(mesh.get_group(dim), x)  # type: ignore[no-untyped-call]
    return x


def _spread(x: Tensor, mesh: DeviceMesh, placements: Any, shape: tuple[int, ...]) -> DTensor:
    stride = tuple(torch.empty(shape, device="meta").stride())
    return DTensor.from_local(x.contiguous(), mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)
