"""Control flow of a kernel's instructions, of whatever kind: basic blocks and natural loops."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

T = TypeVar("T")


@dataclass
class BasicBlock(Generic[T]):
    instructions: list[T]
    successors: list[int]


@dataclass(frozen=True)
class Loop:
    """Blocks of a natural loop; `always` are those that every iteration runs."""

    head: int
    body: frozenset[int]
    always: frozenset[int]


def connect(
    instructions: Sequence[T], leaders: set[int], jumps: Mapping[int, tuple[int | None, bool]]
) -> list[BasicBlock[T]]:
    """Basic blocks in the order of the code. leaders: the indices that blocks begin at. jumps: of each branch, the
    index that it goes to (None: away) and whether the next instruction may follow."""
    starts = sorted(index for index in leaders if index < len(instructions))
    number = {index: i for i, index in enumerate(starts)}
    found = []
    for i, start in enumerate(starts):
        end = starts[i + 1] if i + 1 < len(starts) else len(instructions)
        target, falls = jumps.get(end - 1, (None, True))
        successors = {number[target]} if target in number else set()
        if falls and i + 1 < len(starts):
            successors.add(i + 1)
        found.append(BasicBlock(list(instructions[start:end]), sorted(successors)))
    return found


def _dominators(graph: list[BasicBlock[Any]]) -> tuple[dict[int, set[int]], dict[int, list[int]]]:
    reached, frontier = {0}, [0]
    while frontier:
        for successor in graph[frontier.pop()].successors:
            if successor not in reached:
                reached.add(successor)
                frontier.append(successor)
    before: dict[int, list[int]] = {i: [] for i in reached}
    for i in reached:
        for successor in graph[i].successors:
            before[successor].append(i)
    dominated = {i: set(reached) for i in reached}
    dominated[0] = {0}
    changed = True
    while changed:
        changed = False
        for i in sorted(reached - {0}):
            now = set.intersection(*(dominated[p] for p in before[i])) | {i}
            if now != dominated[i]:
                dominated[i] = now
                changed = True
    return dominated, before


def loops(graph: list[BasicBlock[Any]]) -> list[Loop]:
    """Natural loops: the blocks between a back edge and the block that dominates it."""
    dominated, before = _dominators(graph)
    bodies: dict[int, set[int]] = defaultdict(set)
    latches: dict[int, set[int]] = defaultdict(set)
    for i in dominated:
        for head in graph[i].successors:
            if head not in dominated[i]:
                continue
            body, frontier = {head, i}, [i] if i != head else []
            while frontier:
                for p in before[frontier.pop()]:
                    if p not in body:
                        body.add(p)
                        frontier.append(p)
            bodies[head] |= body
            latches[head].add(i)
    return [
        Loop(head, frozenset(body), frozenset(set.intersection(*(dominated[i] for i in latches[head])) & body))
        for head, body in sorted(bodies.items())
    ]
