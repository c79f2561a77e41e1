"""A process group, and whether its ranks agree on a call before anything is sent that could hang."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from posattn.errors import ArgumentTypeError, ArgumentValueError

Group = dist.ProcessGroup


def group_of(group: Group | DeviceMesh | None) -> Group:
    """The process group that is meant: that of a one-dimensional mesh, or all ranks for None."""
    if not (dist.is_available() and dist.is_initialized()):
        raise ArgumentValueError("group: expected an initialized torch.distributed, got none (init_process_group)")
    if group is None:
        world = dist.group.WORLD
        assert world is not None
        return world
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ArgumentValueError(
                f"group: expected a mesh of one dimension, got {group.ndim}; mesh['name'] takes one"
            )
        return group.get_group()
    if not isinstance(group, Group):
        raise ArgumentTypeError(f"group: expected a process group, a mesh or None, got {type(group).__name__}")
    return group


def check_agreement(group: Group, facts: Sequence[object], device: torch.device) -> None:
    """ValueError on every rank if any rank's facts (shapes, dtypes, options) are not those of rank 0.

    It is one small gather: what differs would otherwise be a hang, or another rank's numbers read in a wrong shape.
    """
    own = repr(tuple(facts)).encode()
    number = int.from_bytes(sha256(own).digest()[:7], "big")
    mine = torch.tensor([number], dtype=torch.int64, device=device)
    everyone = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(everyone, mine, group=group)
    differing = [rank for rank, other in enumerate(everyone) if int(other) != int(everyone[0])]
    if differing:
        raise ArgumentValueError(
            "q, k, v and options: expected the same shapes, dtypes and options on every rank, got others than rank 0's "
            f"on rank {', '.join(map(str, differing))}; here {', '.join(map(str, facts))}"
        )


class Ring:
    """Passes tensors to a later rank and takes those of the rank as far before, while the caller computes."""

    def __init__(self, group: Group) -> None:
        self.group = group

    def start(self, tensors: Sequence[Tensor], hop: int = 1) -> Passing:
        rank, ranks = self.group.rank(), self.group.size()
        after, before = (dist.get_global_rank(self.group, (rank + by) % ranks) for by in (hop, -hop))
        received = [torch.empty_like(tensor) for tensor in tensors]
        operations = [dist.P2POp(dist.isend, tensor, after, self.group) for tensor in tensors]
        operations += [dist.P2POp(dist.irecv, tensor, before, self.group) for tensor in received]
        return Passing(dist.batch_isend_irecv(operations), received, tensors)


class Passing:
    """Tensors on their way; `wait` gives those that came."""

    def __init__(self, works: Sequence[dist.Work], received: list[Tensor], sent: Sequence[Tensor]) -> None:
        self.works, self.received, self.sent = works, received, sent  # what is sent must live until it is

    def wait(self) -> list[Tensor]:
        for work in self.works:
            work.wait()
        return self.received
