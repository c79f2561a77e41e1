"""HeadMix (DAPE) in CUDA, the PTX of its kernels on the PTX machine: every form and operand, and what it refuses."""

from __future__ import annotations

import pytest
import torch

import posattn
from posattn import backends
from posattn.backends.cuda import compiler, launch
from posattn.backends.cuda.configs import headmix
from posattn.parity import compare
from tests.backends.headmix_cases import SHARED, tensors
from tests.ptxsim import Options
from tests.ptxsim.seam import behind_launch
from tests.tolerance import assert_parity

pytestmark = pytest.mark.skipif(compiler.missing() is not None, reason=str(compiler.missing()))


CASES = {
    **SHARED,
    "rotary, grouped heads": (
        {"heads": 12, "kv_heads": 4, "dim": 64, "dtype": torch.float16},
        lambda: posattn.DAPE(posattn.RoPE(64) + posattn.Kerple(12), 12), lambda: {"causal": True},
    ),
    "explicit positions": (
        {"q_len": 5}, lambda: posattn.DAPE(posattn.FIRE(3, width=6), 3, width=8),
        lambda: {"q_positions": torch.randint(0, 30, (5,)), "k_positions": torch.randint(0, 30, (53,))},
    ),
    "deterministic, window, bias for all heads": (
        {"q_len": 50, "batch": 2},
        lambda: posattn.DAPE(posattn.Kerple(3) + posattn.ALiBi(3, learnable=True), 3, width=8),
        lambda: {"window": (30, 9), "bias": torch.randn(1, 1, 50, 53), "deterministic": True},
    ),
    "deterministic, profile, packed documents": (
        {"q_len": 60, "k_len": 50}, lambda: posattn.DAPE(posattn.FIRE(3, width=6), 3, width=8),
        lambda: {
            "causal": True,
            "cu_seqlens_q": torch.tensor([0, 5, 5, 60]),
            "cu_seqlens_k": torch.tensor([0, 20, 21, 50]),
            "deterministic": True,
        },
    ),
    "128 dimensions": ({"heads": 4, "kv_heads": 2, "dim": 128}, lambda: posattn.DAPE(posattn.Kerple(4), 4), dict),
    "88 dimensions, one head": (
        {"heads": 1, "kv_heads": 1, "dim": 88, "dtype": torch.float16}, lambda: posattn.DAPE(None, 1), dict
    ),
}  # fmt: skip


# The source is one for all architectures; on sm_90 only what NVRTC makes of it differs.
ALSO_ON_SM_90 = (
    "table, two sequences",
    "deterministic, window, bias for all heads",
    "rotary, grouped heads",
    "packed documents",
)


@pytest.mark.parametrize(
    ("arch", "case"), [(80, case) for case in CASES] + [(90, case) for case in ALSO_ON_SM_90], ids=str
)
def test_parity(arch, case):
    shape, position, options = CASES[case]
    torch.manual_seed(3)
    with behind_launch(arch):
        assert_parity(*tensors(**shape), position(), options(), "cuda")


FORWARD_ONLY = {
    "sixteen heads": ({"heads": 16, "kv_heads": 16, "dim": 64}, lambda: posattn.DAPE(posattn.ALiBi(16), 16)),
    "two heads to a warp, the last one alone": (
        {"heads": 25, "kv_heads": 5, "dim": 64}, lambda: posattn.DAPE(posattn.Kerple(25), 25)
    ),
    "32 heads, 64 hidden units": (
        {"heads": 32, "kv_heads": 4, "dim": 64, "dtype": torch.float16}, lambda: posattn.DAPE(None, 32, width=64)
    ),
    "96 dimensions": ({"heads": 5, "kv_heads": 5, "dim": 96}, lambda: posattn.DAPE(None, 5, form="add")),
}  # fmt: skip


@pytest.mark.parametrize("case", FORWARD_ONLY.values(), ids=FORWARD_ONLY)
def test_forward_of_calls_too_large_for_the_backward_kernel(case):
    shape, position = case
    torch.manual_seed(4)
    q, k, v = tensors(**shape)
    position = position()
    with torch.no_grad(), behind_launch(80):
        got = posattn.attention(q, k, v, position, causal=True, return_lse=True, backend="cuda")
        naive = posattn.attention(q, k, v, position, causal=True, return_lse=True, backend="reference")
        wide = (x.double() for x in (q, k, v))
        exact = posattn.attention(*wide, position.double(), causal=True, return_lse=True, backend="reference")
    for name, x, y, z in zip(("out", "lse"), got, naive, exact):
        comparison = compare(name, x, y, z, torch.zeros(1), q.dtype)
        assert comparison.ok, comparison.worst


def test_keys_and_values_past_the_length_are_not_read():
    q, k, v = tensors(batch=2)
    k[:, :, 20:] = v[:, :, 20:] = torch.nan
    position = posattn.DAPE(posattn.Kerple(3), 3, width=8)
    with torch.no_grad(), behind_launch(80):
        out = posattn.attention(q, k, v, position, k_lengths=torch.tensor([20, 13]), backend="cuda")
    assert out.isfinite().all()


def test_no_bank_conflicts():
    """Twelve heads of dimension 64 with a table, the shape that the layout was made for, forward and backward."""
    q, k, v = (x.requires_grad_() for x in tensors(heads=12, kv_heads=12, q_len=70, k_len=100, dim=64))
    with behind_launch(80, Options(stats=True)) as machine:
        out = posattn.attention(q, k, v, posattn.DAPE(posattn.Kerple(12), 12), causal=True, backend="cuda")
        out.sum().backward()
    assert {launched.kernel for launched in machine.launches} == {"headmix_forward", "headmix_backward"}
    for launched in machine.launches:
        counters = launched.report.counters
        assert counters["shared_wavefronts"] == counters["shared_ideal_wavefronts"], launched.kernel


@pytest.mark.parametrize(
    ("heads", "dim", "width", "reason"),
    [
        (33, 32, 8, "up to 32 heads"),
        (4, 32, 65, "up to 64 hidden units"),
        (24, 128, 8, "outputs of all heads in registers"),
    ],
)
def test_what_does_not_fit_is_refused(heads, dim, width, reason):
    q, k, v = tensors(heads=heads, kv_heads=heads, dim=dim)
    with behind_launch(80), pytest.raises(ValueError, match=reason):
        posattn.attention(q, k, v, posattn.DAPE(None, heads, width=width), backend="cuda")


def gradients(deterministic, reverse):
    torch.manual_seed(5)
    q, k, v = (x.requires_grad_() for x in tensors(q_len=100, k_len=130))
    position = posattn.DAPE(posattn.Kerple(3) + posattn.FIRE(3, width=6), 3, width=8)
    with behind_launch(80, Options(reverse=reverse, stats=False)):
        out = posattn.attention(q, k, v, position, causal=True, deterministic=deterministic, backend="cuda")
        (out * torch.linspace(-1, 1, 32)).sum().backward()
    return [x.grad for x in (q, k, v, *position.parameters())]


def test_deterministic_gradients_do_not_depend_on_the_order_of_blocks():
    assert all(map(torch.equal, gradients(True, reverse=False), gradients(True, reverse=True)))
    assert not all(map(torch.equal, gradients(False, reverse=False), gradients(False, reverse=True)))


@pytest.mark.parametrize(
    ("heads", "width", "reason"),
    [
        (20, 32, "dK and dV of all heads in registers"),
        (12, 64, "64 hidden units do not fit"),
    ],
)
def test_backward_says_what_it_cannot_do(heads, width, reason):
    q, k, v = (x.requires_grad_() for x in tensors(heads=heads, kv_heads=heads, q_len=3, k_len=3, dim=64))
    position = posattn.DAPE(posattn.Kerple(heads), heads, width=width)
    with behind_launch(80):
        out = posattn.attention(q, k, v, position, backend="cuda")
        with pytest.raises(ValueError, match=reason):
            out.sum().backward()


def kernels_of_auto(heads, width, monkeypatch):
    """Which kernels the machine ran, where CPU tensors have a GPU's backends; after parity."""
    monkeypatch.setitem(backends._AUTO, "cpu", backends._AUTO["cuda"])
    with behind_launch(80) as machine:
        position = posattn.DAPE(posattn.Kerple(heads), heads, width=width)
        assert_parity(*tensors(heads=heads, kv_heads=heads, batch=2), position, {"causal": True}, "auto")
    return {launched.kernel for launched in machine.launches}


def test_auto_hands_a_call_that_is_refused_to_triton(monkeypatch):
    """A width that Triton's kernels are compiled for elsewhere in the tests, one too many for these."""
    monkeypatch.setattr(headmix, "MAX_WIDTH", 7)
    kernels = kernels_of_auto(3, 8, monkeypatch)
    assert "headmix_forward" in kernels
    assert not any(kernel.startswith("headmix") for kernel in kernels)


def test_auto_hands_a_backward_pass_that_is_refused_to_triton(monkeypatch):
    kernels = kernels_of_auto(9, 64, monkeypatch)
    assert "headmix_forward" in kernels
    assert "headmix_forward" not in kernels
    assert "headmix_backward" not in kernels
    assert any(kernel.startswith("headmix_") for kernel in kernels)


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"])
def test_compiles_everywhere_without_local_arrays(arch, monkeypatch):
    """What a launch would compile, for GPUs that the machine does not model."""
    compiled = []
    monkeypatch.setattr(launch, "architecture", lambda device: arch)
    monkeypatch.setattr(launch, "has_device", lambda device: True)
    monkeypatch.setattr(launch, "launch", lambda kernel, *_: compiled.append(kernel))
    q, k, v = tensors(heads=12, kv_heads=12, q_len=24, k_len=24, dim=64)
    with torch.no_grad():
        posattn.attention(q, k, v, posattn.DAPE(posattn.Kerple(12), 12), causal=True, backend="cuda")
    (kernel,) = compiled
    assert kernel.name == "headmix_forward"
    assert kernel.arch.startswith(arch)
    assert ".local" not in kernel.ptx
