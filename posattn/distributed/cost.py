"""What a call over ranks costs: an alpha-beta model of the links, kernels at a rate, and which way is the shortest.

`attention(method="auto")` decides by it; `tools/scale_model` draws it for thousands of ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

METHODS = ("ring", "all_gather", "ulysses")
BACKWARD = 2.5  # of a forward pass: five products for two


@dataclass(frozen=True)
class Link:
    """What a message of n bytes takes: latency + n / bandwidth.

    Args:
        latency: seconds a message, with the calls on both sides.
        bandwidth: bytes a second that a rank sends while it receives as many.
    """

    latency: float
    bandwidth: float


# What a rank gets of its node's links, below the data sheets' figures as collectives are: NVLink 4, InfiniBand NDR with
# a card a GPU, 100 Gb Ethernet, and gloo between processes of one machine.
LINKS = {
    "nvlink": Link(8e-6, 350e9),
    "infiniband": Link(15e-6, 42e9),
    "ethernet": Link(40e-6, 10e9),
    "gloo": Link(150e-6, 1.5e9),
}


@dataclass(frozen=True)
class Work:
    """A call's sizes, as the whole sequence has them.

    Args:
        ranks: P.
        batch, heads, kv_heads, head_dim, value_dim: B, Hq, Hkv, D, Dv.
        tokens: T, of which a rank has T / P.
        element: bytes of an element of q, k and v.
        causal: half of the pairs are seen.
        window: keys that a query sees at most; None for all.
        mixes: a DAPE, for which no rank can have a share of the heads.
        layout: "zigzag" or "contiguous"; the second leaves the last rank with twice the mean of causal work.
        backward: count the backward pass too.
    """

    ranks: int
    batch: int
    heads: int
    kv_heads: int
    tokens: int
    head_dim: int
    value_dim: int
    element: int = 2
    causal: bool = True
    window: int | None = None
    mixes: bool = False
    layout: str = "zigzag"
    backward: bool = True


@dataclass(frozen=True)
class Machine:
    """A rank's kernels.

    Args:
        rate: multiplications and additions a second, of what attention needs of both.
        call: seconds that a call of a kernel takes besides, host code and filling included.
        backward_rate: that of the backward pass; `rate` where it is None.
    """

    rate: float
    call: float = 3e-5
    backward_rate: float | None = None


# Of a device in general; the order of two ways hardly ever depends on it.
MACHINES = {"cuda": Machine(3e14), "cpu": Machine(1e11, 3e-4)}


@dataclass(frozen=True)
class Cost:
    """Seconds of one call (forward, and backward where that was asked for) on the rank that has the most to do.

    Attributes:
        seconds: all of it.
        kernels: computing alone.
        links: sending alone, as if nothing overlapped.
        hidden: the share of `links` during which kernels run.
        memory: bytes on a rank at the most, its own q, k, v, result and their gradients included.
    """

    seconds: float
    kernels: float
    links: float
    hidden: float
    memory: float


def cost(method: str, work: Work, link: Link, machine: Machine) -> Cost:
    """What `method` takes. ValueError for one that this work cannot go by."""
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(map(repr, METHODS))}, got {method!r}")
    reason = impossible(method, work)
    if reason is not None:
        raise ValueError(f"method: {method} cannot do this work: {reason}")
    ranks, own = work.ranks, work.batch * work.tokens / work.ranks
    wide = work.head_dim + work.value_dim
    keys = own * work.kv_heads * wide * work.element  # bytes of a rank's keys and values
    key_gradients = own * work.kv_heads * wide * 4.0
    queries = own * work.heads * wide * work.element  # of its queries and their result
    forward = 2.0 * own * work.heads * wide * seen(work)
    kernels = forward / machine.rate
    back = BACKWARD * forward / (machine.backward_rate or machine.rate) if work.backward else 0.0
    both = 2.0 if work.backward else 1.0
    # q, k, v and the result; as much again for gradients, dQ, dK and dV of a ring in float32.
    base = keys + queries + (keys + queries + own * work.heads * work.head_dim * 4.0 + key_gradients) * (both - 1.0)
    if method == "ring":
        steps, pairs = _ring_steps(work), 4 if work.layout == "zigzag" else 1
        calls = (2 * steps if pairs == 4 and work.causal else pairs * steps) * machine.call
        step = (kernels + calls) / steps
        sent = link.latency + keys / link.bandwidth
        seconds = step + (steps - 1) * max(step, sent)
        links, exposed = (steps - 1) * sent, (steps - 1) * max(sent - step, 0.0)
        memory = base + keys
        kernels += calls
        if work.backward:
            step = (back + calls) / steps
            returned = key_gradients / link.bandwidth + link.latency
            passed = sent + returned
            last = returned if steps > 1 else 0.0
            seconds += step + (steps - 1) * max(step, passed) + last
            links += (steps - 1) * passed + last
            exposed += (steps - 1) * max(passed - step, 0.0) + last
            kernels += back + calls
            memory += keys + 2.0 * key_gradients
    elif method == "all_gather":
        calls = (2 if work.layout == "zigzag" else 1) * machine.call
        links = (ranks - 1) * (link.latency + keys / link.bandwidth)
        memory = base + ranks * keys
        kernels += calls
        if work.backward:
            links += 2.0 * (ranks - 1) * (link.latency + key_gradients / link.bandwidth)
            memory += 2.0 * ranks * key_gradients
            kernels += back + calls
        seconds, exposed = kernels + links, links
    else:
        sent = (ranks - 1) / ranks * (keys + queries)
        links = both * (4.0 * (ranks - 1) * link.latency + sent / link.bandwidth)
        kernels += back + both * machine.call
        memory = base + both * (keys + queries)
        seconds, exposed = kernels + links, links
    return Cost(seconds, kernels, links, 1.0 - exposed / links if links else 1.0, memory)


def seen(work: Work) -> float:
    """Keys that a query of the rank with the most work sees, on average."""
    keys = float(work.tokens)
    if work.window is not None and work.window < keys:
        return float(work.window)
    if not work.causal:
        return keys
    return keys * (1.0 - 0.5 / work.ranks) if work.layout == "contiguous" else keys / 2.0


def impossible(method: str, work: Work) -> str | None:
    """Why `method` cannot do this work, or None."""
    if method != "ulysses":
        return None
    if work.mixes:
        return "a DAPE mixes the logits of all heads"
    if work.kv_heads % work.ranks:
        return f"{work.ranks} ranks do not divide {work.kv_heads} key heads"
    return None


def shortest(work: Work, link: Link, machine: Machine) -> str:
    """The method that takes the least time of those whose memory does not grow with the sequence, and of gathering
    where the gathered keys and values are at most twice a rank's queries and result."""
    allowed = [
        method
        for method in METHODS
        if impossible(method, work) is None and (method != "all_gather" or work.ranks * work.kv_heads <= 2 * work.heads)
    ]
    return min(allowed, key=lambda method: cost(method, work, link, machine).seconds)


def _ring_steps(work: Work) -> int:
    """Steps that have pairs in them: fewer under a window where shards lie in a run (posattn.distributed.pairs)."""
    if work.layout != "contiguous" or work.window is None or not work.causal:
        return work.ranks
    own = max(work.tokens // work.ranks, 1)
    return min(work.ranks, 1 + -(-max(work.window - 1, 0) // own))
