"""What each process of a test does: whole calls against calls over the ranks of a gloo group."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import posattn
from posattn import distributed
from posattn.encodings.base import Encoding

HEADS, KV_HEADS, DIM = 4, 4, 16
PIECE = 6  # tokens a piece, of which a rank has two

POSITIONS: dict[str, Callable[[], Encoding | None]] = {
    "none": lambda: None,
    "RoPE": lambda: posattn.RoPE(DIM),
    "ALiBi": lambda: posattn.ALiBi(HEADS, learnable=True),
    "Kerple": lambda: posattn.Kerple(HEADS),
    "T5": lambda: posattn.T5Bias(HEADS),
    "Sandwich": lambda: posattn.Sandwich(HEADS),
    "FIRE": lambda: posattn.FIRE(HEADS, width=8, initial_length=9.0),
    "RoPE + ALiBi": lambda: posattn.RoPE(DIM) + posattn.ALiBi(HEADS, learnable=True),
    "YaRN": lambda: posattn.RoPE(DIM, scaling=posattn.YaRN(4.0, 8)),
    "RelativeTable2D": lambda: posattn.RelativeTable2D(HEADS, (24, 4)),
    "LogitScale": lambda: posattn.RoPE(DIM) + posattn.LogitScale("log", num_heads=HEADS),
    "learned RoPE": lambda: posattn.RoPE(DIM, learnable=True),
    "steep ALiBi": lambda: posattn.RoPE(DIM) + posattn.ALiBi(HEADS, learnable=True, slopes=[20.0] * HEADS),
    "steep Kerple": lambda: steep_kerple(),
    "DAPE-Kerple": lambda: posattn.DAPE(posattn.Kerple(HEADS), HEADS, width=8),
    "DAPE-FIRE": lambda: posattn.DAPE(posattn.FIRE(HEADS, width=8, initial_length=9.0), HEADS, width=8),
}


def steep_kerple() -> Encoding:
    kerple = posattn.Kerple(HEADS, form="power")
    with torch.no_grad():
        kerple.p.fill_(1.0)
        kerple.a.fill_(20.0)
    return kerple


def leaves(tokens: int, dtype: torch.dtype, kv_heads: int = KV_HEADS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    sizes = ((HEADS, DIM), (kv_heads, DIM), (kv_heads, DIM))
    return [torch.randn(1, heads, tokens, dim, generator=generator).to(dtype) for heads, dim in sizes]


def gradients(
    function: Callable[..., Any],
    tensors: list[Tensor],
    position: Encoding | None,
    grads: tuple[Tensor, Tensor],
    **options: Any,
) -> dict[str, Tensor]:
    """out, lse, and the gradients of q, k, v, sinks and the parameters."""
    own = [x.detach().requires_grad_() for x in tensors]
    wanted: dict[str, Tensor] = {"dq": own[0], "dk": own[1], "dv": own[2]}
    if options.get("sinks") is not None:
        options["sinks"] = wanted["dsinks"] = options["sinks"].detach().requires_grad_()
    if position is not None:
        wanted |= {f"d{name}": p for name, p in position.named_parameters() if p.requires_grad}
    out, lse = function(*own, position, return_lse=True, **options)
    found = torch.autograd.grad([out, lse], list(wanted.values()), list(grads))
    return {"out": out.detach(), "lse": lse.detach(), **dict(zip(wanted, found))}


def compare(case: dict[str, Any]) -> dict[str, float]:
    """By result, its error against float64 over what is allowed: below 1 where it is as it should be."""
    options = dict(case.get("options", {}))
    method, layout = case["method"], case.get("layout", "zigzag")
    ranks = dist.get_world_size()
    tokens = 2 * PIECE * ranks
    dtype = getattr(torch, case.get("dtype", "float32"))
    tensors = leaves(tokens, dtype, options.pop("kv_heads", KV_HEADS))
    if options.pop("sinks", False):
        options["sinks"] = torch.linspace(-1.0, 1.0, HEADS)
    documents = options.pop("documents", None)
    if case.get("huge"):
        # A key of the first piece that the last tokens see, for all the bias takes from it, in one head.
        key = tensors[1].shape[1] - 1
        tensors[1][:, key, 1] = 300.0 * tensors[0][:, -1, -1]
    generator = torch.Generator().manual_seed(4)
    grad_out = torch.randn(1, HEADS, tokens, DIM, generator=generator).to(dtype)
    grad_lse = torch.randn(1, HEADS, tokens, generator=generator)
    made = []
    for _ in range(3):
        torch.manual_seed(5)
        made.append(POSITIONS[case["position"]]())

    def whole(wide: torch.dtype, position: Encoding | None) -> dict[str, Tensor]:
        given = {n: x.to(wide) if isinstance(x, Tensor) else x for n, x in options.items()}
        if documents is not None:
            given["cu_seqlens_q"] = given["cu_seqlens_k"] = torch.tensor(documents, dtype=torch.int32)
        position = position.double() if wide == torch.float64 and position is not None else position
        grads = grad_out.to(wide), grad_lse.to(torch.float64 if wide == torch.float64 else torch.float32)
        moved = [x.to(wide) for x in tensors]
        return gradients(posattn.attention, moved, position, grads, backend="reference", **given)

    exact, naive = whole(torch.float64, made[0]), whole(dtype, made[1])
    function = getattr(distributed, f"{method}_attention", partial(posattn.attention, mesh=dist.group.WORLD))
    placed = {} if method == "auto" else {"layout": layout}
    given = dict(options) | ({} if documents is None else {"documents": documents})
    if method == "auto" and documents is not None:
        given.pop("documents")
        given["cu_seqlens_q"] = given["cu_seqlens_k"] = torch.tensor(documents, dtype=torch.int32)
    mine = [distributed.shard(x, None, layout) for x in (*tensors, grad_out, grad_lse)]
    with distributed.count_pairs() as pairs:
        got = gradients(
            function, mine[:3], made[2], (mine[3], mine[4]), **placed, backend=case.get("backend", "auto"), **given
        )
    over = {}
    if "pairs" in case:
        counted = [pairs.computed, pairs.masked, pairs.out_of_reach]
        over["pairs"] = 0.0 if counted == case["pairs"][dist.get_rank()] else 2.0
    for name, value in got.items():
        if name in ("out", "lse", "dq", "dk", "dv"):
            pair = [distributed.shard(one[name], None, layout) for one in (exact, naive)]
        else:
            pair = [exact[name], naive[name]]
        error, allowed = ((x.double() - pair[0]).abs().max().item() for x in (value, pair[1]))
        scale = pair[0].abs().max().item()
        eps = max(torch.finfo(value.dtype).eps, 4 * torch.finfo(torch.float32).eps)
        over[name] = error / (2 * allowed + 8 * eps * max(scale, 1.0))
    if case.get("twice"):
        again = gradients(
            function, mine[:3], made[2], (mine[3], mine[4]), **placed, backend=case.get("backend", "auto"), **given
        )
        over |= {f"{name} again": 0.0 if torch.equal(again[name], value) else 2.0 for name, value in got.items()}
    return over


def refused(case: dict[str, Any]) -> str:
    """The error that this rank gets."""
    tokens = case["tokens"][dist.get_rank()]
    q = torch.randn(1, HEADS, tokens, DIM)
    position: Encoding | None = None
    if case.get("position") == "dynamic":
        position = posattn.RoPE(DIM, scaling=posattn.DynamicNTK(2.0, 8))
    if case.get("position") == "DAPE V2":
        position = posattn.DAPE(posattn.Kerple(HEADS), HEADS, kernel=3)
    if case.get("position") == "DAPE":
        position = posattn.DAPE(posattn.Kerple(HEADS), HEADS)
    function = getattr(distributed, f"{case.get('method', 'ring')}_attention")
    try:
        function(q, q, q, position, **case.get("options", {}))
    except (ValueError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def main(folder: Path, rank: int, ranks: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    cases = json.loads((folder / "cases.json").read_text())
    found = [refused(case) if case.get("refused") else compare(case) for case in cases]
    (folder / f"found{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
