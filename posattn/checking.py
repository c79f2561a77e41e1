"""posattn.check: whether an encoding, one's own or posattn's, is what attention expects, and right everywhere."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from posattn import parity, plan_checks
from posattn.attention import attention
from posattn.encodings._plans import named_operands
from posattn.encodings.base import Context, Encoding
from posattn.encodings.rope import RotaryEncoding
from posattn.errors import described
from posattn.plan import Mask

STEP = 1e-6  # of the finite differences, in float64
DIFFERENCE = 1e-4  # their error, relative to the derivative


@dataclass(frozen=True)
class Finding:
    """One thing looked at: whether it is as it should be, and what was seen."""

    what: str
    ok: bool
    detail: str

    def __str__(self) -> str:
        return f"{'ok' if self.ok else 'FAILED':8}{self.what:28}{self.detail}"


@dataclass
class Report:
    """What `check` found of the encoding `name`: `findings`, in order. True if all is as it should be. Print it."""

    name: str
    findings: list[Finding] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return all(finding.ok for finding in self.findings)

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        failed = sum(not finding.ok for finding in self.findings)
        verdict = f"{failed} of {len(self.findings)} checks failed" if failed else "all is as it should be"
        return "\n".join([self.name, *(f"  {finding}" for finding in self.findings), f"  {verdict}"])


def check(
    position: Encoding,
    *,
    num_heads: int | None = None,
    head_dim: int | None = None,
    tokens: int = 75,
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16, torch.float16),
    finite_differences: bool = True,
) -> Report:
    """Look at an encoding from all sides, on every backend that runs here.

        report = posattn.check(MyEncoding(12))
        print(report)                                           # a line a check
        assert report

    Its plan: operands of the right shapes, for one query and many, on the device of the call. The sizes that it must
    serve or refuse. That explicit positions, sequences padded on either side, chunks placed by offset and packed
    documents give what they should. Gradients: finite, and as finite differences in float64 say. That a copy, a
    state_dict and narrower parameters keep its values. On every backend and in every dtype: output, log-sum-exp and all
    gradients against a float64 reference by posattn's rule (an error at most twice that of plain PyTorch in that dtype,
    plus rounding), and twice the same bits with deterministic=True. It takes seconds and leaves `position` as it is.

    Args:
        position: the encoding, on any device.
        num_heads: query heads of the calls; those it was made for, or 4.
        head_dim: head dimension of the calls; that of a rotary encoding in it, or 32.
        tokens: keys of the calls, at least 8.
        dtypes: of the calls.
        finite_differences: compare gradients with them; not for a straight-through estimator, which means to differ
            (as Kerple's does below its smallest parameters).

    Raises:
        TypeError: position is no encoding.
    """
    if not isinstance(position, Encoding):
        raise TypeError(f"position: expected an Encoding, got {described(position)}")
    if head_dim is None:
        head_dim = next((m.head_dim for m in position.modules() if isinstance(m, RotaryEncoding)), 32)
    heads = num_heads or position.num_heads or 4
    checks = _Checks(copy.deepcopy(position).cpu(), heads, head_dim, max(tokens, 8), finite_differences)
    report = Report(f"{type(position).__name__}: {checks.heads} heads of {head_dim}, {checks.tokens} tokens")
    for what, function in checks.steps():
        report.findings.append(_finding(what, function))
        if what == "plan" and not report.ok:
            return report  # nothing else would run
    report.findings.extend(checks.backends(dtypes))
    return report


def _finding(what: str, function: Callable[[], str]) -> Finding:
    """A check returns what it saw, and raises what is wrong."""
    try:
        return Finding(what, True, function())
    except Exception as error:  # of any kind: `build` is anybody's code
        text = str(error).strip()
        kind = "" if isinstance(error, _Wrong) else f"{type(error).__name__}: "
        return Finding(what, False, f"{kind}{text.splitlines()[0] if text else ''}")


class _Wrong(Exception):
    """What a check found wrong."""


class _Checks:
    def __init__(self, position: Encoding, heads: int, head_dim: int, tokens: int, finite_differences: bool) -> None:
        self.position, self.heads, self.head_dim, self.tokens = position, heads, head_dim, tokens
        self.finite_differences = finite_differences

    def steps(self) -> Iterator[tuple[str, Callable[[], str]]]:
        yield "plan", self.plan
        yield "sizes", self.sizes
        if not self.position.needs_positions:
            yield "positions", self.positions
            yield "batches and documents", self.sequences
            yield "device", self.device
        yield "gradients", self.gradients
        yield "state", self.state
        yield "narrow parameters", self.narrow

    def qkv(self, q_len: int, k_len: int, dtype: torch.dtype = torch.float64, batch: int = 1) -> list[Tensor]:
        generator = torch.Generator().manual_seed(q_len)
        shapes = [(batch, self.heads, n, self.head_dim) for n in (q_len, k_len, k_len)]
        return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]

    def attend(self, position: Encoding, q: Tensor, k: Tensor, v: Tensor, **options: object) -> Tensor:
        given = {"causal": True, **parity.positions_for(position, q.shape[2], k.shape[2]), **options}
        out: Tensor = attention(q, k, v, position, backend="reference", **given)
        return out

    def lowered(self, position: Encoding, q_len: int, k_len: int, device: str = "cpu") -> dict[str, Tensor]:
        """The plan's operands by name, after the checks that every call makes."""
        q, k, _ = (x.to(device) for x in self.qkv(q_len, k_len, torch.float32))
        places = parity.positions_for(position, q_len, k_len)
        rows = {name: value[None].to(device) for name, value in places.items()}
        context = Context.of(q, k, Mask(causal=True, max_q=q_len, max_k=k_len), **rows)
        plan = plan_checks.checked(position.lower(context), type(position).__name__, q, k)
        return dict(named_operands(plan))

    def plan(self) -> str:
        for q_len in (1, 3, self.tokens):
            operands = self.lowered(self.position, q_len, self.tokens)
        return ", ".join(f"{name} {list(value.shape)}" for name, value in operands.items()) or "adds nothing"

    def sizes(self) -> str:
        for q_len, k_len in ((1, 1), (0, 5), (0, 0)):
            self.lowered(self.position, q_len, k_len)
        if self.position.num_heads is None:
            return "no tokens and one; any number of heads"
        if self.position.num_heads != self.heads:
            raise _Wrong(f"num_heads is {self.position.num_heads}, the call has {self.heads} heads")
        q = torch.zeros(1, self.heads + 1, 3, self.head_dim)
        try:
            self.attend(self.position, q, q, q)
        except ValueError:
            return f"no tokens and one; {self.heads + 1} heads are refused"
        raise _Wrong(f"made for num_heads={self.heads}, and {self.heads + 1} heads are not refused")

    def positions(self) -> str:
        position = copy.deepcopy(self.position).double()
        q, k, v = self.qkv(5, self.tokens)
        places = torch.arange(self.tokens)
        explicit = self.attend(position, q, k, v, q_positions=places[-5:], k_positions=places)
        _same("explicit positions 0, 1, 2, ...", explicit, self.attend(position, q, k, v), "implicit ones")
        return "explicit and implicit ones agree"

    def sequences(self) -> str:
        position, short = copy.deepcopy(self.position).double(), self.tokens // 2
        q, k, v = self.qkv(3, self.tokens, batch=2)
        both = self.attend(position, q, k, v, k_lengths=torch.tensor([self.tokens, short]))
        alone = self.attend(position, q[1:], k[1:, :, :short], v[1:, :, :short])
        _same("a padded sequence", both[1:], alone, "it alone")
        left = [torch.cat([x[:1], F.pad(x[1:, :, :short], (0, 0, self.tokens - short, 0))]) for x in (k, v)]
        starts = torch.tensor([0, self.tokens - short])
        _same("a left-padded sequence", self.attend(position, q, *left, k_starts=starts)[1:], alone, "it alone")
        chunk = self.attend(position, q, k, v, offset=short - 3)
        _same("a chunk placed by offset", chunk[1:], alone, "it alone")
        packed = [torch.cat([x[:1], x[1:, :, :n]], 2) for x, n in ((q, 3), (k, short), (v, short))]
        cu_q, cu_k = torch.tensor([0, 3, 6]), torch.tensor([0, self.tokens, self.tokens + short])
        out = self.attend(position, *packed, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
        _same("a packed document", out[:, :, 3:], alone, "it alone")
        # No longer than a call by itself: lowering knows no length of theirs but the row's.
        rest = self.tokens - short
        packed[1:] = [torch.cat([x[:1, :, :rest], x[1:, :, :short]], 2) for x in (k, v)]
        ids = torch.tensor([[0, 0, 0, 1, 1, 1]]), (torch.arange(self.tokens) >= rest).int()[None]
        out = self.attend(position, *packed, segments=ids)
        _same("a document told by segments", out[:, :, 3:], alone, "it alone")
        return "each is what it is alone"

    def device(self) -> str:
        """The meta device stands in for any: a tensor that stays on the CPU is an error there too."""
        self.lowered(copy.deepcopy(self.position).to("meta"), 3, self.tokens, "meta")
        return "everything moves along"

    def gradients(self) -> str:
        position = copy.deepcopy(self.position).double()
        named = {name: p for name, p in position.named_parameters() if p.requires_grad}
        q, k, v = (x.requires_grad_() for x in self.qkv(min(self.tokens, 9), min(self.tokens, 9)))
        weight = torch.randn(q.shape, generator=torch.Generator().manual_seed(1), dtype=q.dtype)

        def loss() -> Tensor:
            return (self.attend(position, q, k, v) * weight).sum()

        leaves = {"q": q, "k": k, "v": v, **named}
        found: tuple[Tensor | None, ...] = torch.autograd.grad(loss(), list(leaves.values()), allow_unused=True)
        unused = [name for name, gradient in zip(leaves, found) if gradient is None]
        for (name, leaf), gradient in zip(leaves.items(), found):
            if gradient is None:
                continue
            if not gradient.isfinite().all():
                raise _Wrong(f"the gradient of {name} is not finite")
            if self.finite_differences:
                _check_derivative(name, leaf, gradient, loss)
        seen = f"{len(named) - len(unused)} parameters, q, k and v"
        seen += ", as finite differences say" if self.finite_differences else ", finite"
        return f"{seen}; attention does not use {', '.join(unused)}" if unused else seen

    def state(self) -> str:
        q, k, v = self.qkv(5, self.tokens, torch.float32)
        before = self.attend(self.position, q, k, v)
        other = copy.deepcopy(self.position)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.add_(1.0)
        changed = any(True for _ in other.parameters()) and not torch.equal(self.attend(other, q, k, v), before)
        _same("the original", self.attend(self.position, q, k, v), before, "before its copy changed", exact=True)
        other.load_state_dict(self.position.state_dict())
        _same("a copy with its state_dict", self.attend(other, q, k, v), before, "the original", exact=True)
        return "copies stand alone, and state_dict carries all" if changed else "nothing learned that changes it"

    def narrow(self) -> str:
        for dtype in (torch.bfloat16, torch.float16):
            for name, value in self.lowered(copy.deepcopy(self.position).to(dtype), 3, self.tokens).items():
                if value.dtype not in (torch.float32, torch.int64) and not name.endswith("dense.bias"):
                    raise _Wrong(f"{name} is {value.dtype} where parameters are {dtype}, expected float32")
        return "operands stay float32"

    def backends(self, dtypes: Sequence[torch.dtype]) -> Iterator[Finding]:
        if not self.position.fused:
            yield Finding("backends", True, 'none computes it; backend="reference" does')
            return
        devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
        for device in devices:
            for dtype in dtypes:
                for backend in parity.available(device, dtype):
                    what = f"{backend}, {str(dtype).removeprefix('torch.')}"
                    yield _finding(what, lambda: self.parity(device, backend, dtype))  # noqa: B023 - called at once

    def parity(self, device: str, backend: str, dtype: torch.dtype) -> str:
        position = copy.deepcopy(self.position).to(device)
        q, k, v = (x.to(device) for x in self.qkv(self.tokens, self.tokens, dtype))
        options = {"causal": True, **parity.positions_for(position, self.tokens, self.tokens)}
        options = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in options.items()}
        found = parity.measure(q, k, v, position, options, backend)
        wrong = [comparison for comparison in found if not comparison.ok]
        if wrong:
            raise _Wrong(wrong[0].worst)
        runs = [self._bits(position, (q, k, v), options, backend) for _ in range(2)]
        for (name, first), second in zip(runs[0].items(), runs[1].values()):
            if not torch.equal(first, second):
                raise _Wrong(f"{name} differs between two runs with deterministic=True")
        worst = max(found, key=lambda c: c.error / max(c.allowed, 1e-30))
        return f"worst {worst.name}: {worst.error:.1e} of {worst.allowed:.1e} allowed; twice the same"

    def _bits(
        self, position: Encoding, tensors: tuple[Tensor, ...], options: dict[str, object], backend: str
    ) -> dict[str, Tensor]:
        leaves = {name: x.detach().requires_grad_() for name, x in zip("qkv", tensors)}
        out: Tensor = attention(*leaves.values(), position, **options, backend=backend, deterministic=True)  # type: ignore[call-overload]
        leaves |= {name: p for name, p in position.named_parameters() if p.requires_grad}
        found = torch.autograd.grad(out.float().square().sum(), list(leaves.values()), allow_unused=True)
        named = {f"the gradient of {name}": g for name, g in zip(leaves, found) if g is not None}
        return {"the output": out.detach(), **named}


def _check_derivative(name: str, leaf: Tensor, gradient: Tensor, loss: Callable[[], Tensor]) -> None:
    """Along one random way through the leaf, which is as it was afterwards to a rounding."""
    way = torch.randn(leaf.shape, generator=torch.Generator().manual_seed(2), dtype=leaf.dtype)
    with torch.no_grad():
        leaf.add_(way, alpha=STEP)
        above = loss()
        leaf.add_(way, alpha=-2.0 * STEP)
        slope = ((above - loss()) / (2.0 * STEP)).item()
        leaf.add_(way, alpha=STEP)
    derivative = (gradient * way).sum().item()
    if abs(slope - derivative) > DIFFERENCE * max(abs(slope), abs(derivative), 1e-3):
        raise _Wrong(
            f"along one way {name} changes the result by {slope:.6g} where its gradient says {derivative:.6g}; does "
            ".item(), .detach() or .data cut it off? (finite_differences=False for a straight-through estimator)"
        )


def _same(what: str, got: Tensor, expected: Tensor, other: str, exact: bool = False) -> None:
    if torch.equal(got, expected) or (not exact and torch.allclose(got, expected, rtol=1e-9, atol=1e-9)):
        return
    raise _Wrong(f"{what} differs from {other} by up to {(got - expected).abs().max().item():.3g}")
