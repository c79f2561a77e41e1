"""What is CUDA's own in HeadMix (DAPE), on the PTX machine: banks, sums in order, what it refuses and who serves it."""

from __future__ import annotations

import pytest
import torch

import posattn
from posattn import backends
from posattn.backends.cuda import compiler, launch
from posattn.backends.cuda.configs import headmix
from tests.backends.gpu_cases import CASES
from tests.backends.gpu_cases import tensors as tensors_of
from tests.ptxsim import Options
from tests.ptxsim.cuda_run import CompiledCuda
from tests.ptxsim.seam import behind_launch
from tests.tolerance import assert_parity

pytestmark = pytest.mark.skipif(compiler.missing() is not None, reason=str(compiler.missing()))


def tensors(heads=3, kv_heads=3, q_len=37, k_len=53, dim=32, **given):
    return tensors_of(heads=heads, kv_heads=kv_heads, q_len=q_len, k_len=k_len, dim=dim, **given)


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


def kernels_of_auto(qkv, position, options, monkeypatch, arch=80):
    """Which kernels the machine ran, CUDA's and Triton's, where CPU tensors have a GPU's backends; after parity."""
    monkeypatch.setitem(backends._AUTO, "cpu", backends._AUTO["cuda"])
    with behind_launch(arch) as machine:
        assert_parity(*qkv, position, options, "auto")
    of_cuda = {x.kernel for x in machine.launches if isinstance(x.compiled, CompiledCuda)}
    return of_cuda, {x.kernel for x in machine.launches if not isinstance(x.compiled, CompiledCuda)}


@pytest.mark.slow
def test_auto_hands_a_call_that_is_refused_to_triton(monkeypatch):
    """A case whose Triton kernels other quick tests compile, one hidden unit too wide for these."""
    monkeypatch.setattr(headmix, "MAX_WIDTH", 7)
    inputs = CASES["mix, outer bias, sinks, dropout, window, mask"].inputs()
    of_cuda, of_triton = kernels_of_auto(*inputs, monkeypatch, arch=90)
    assert of_cuda == set()
    assert "headmix_forward" in of_triton


@pytest.mark.slow
def test_auto_hands_a_backward_pass_that_is_refused_to_triton(monkeypatch):
    position = posattn.DAPE(posattn.Kerple(9), 9, width=64)
    qkv = tensors(heads=9, kv_heads=9, batch=2)
    of_cuda, of_triton = kernels_of_auto(qkv, position, {"causal": True}, monkeypatch)
    assert of_cuda == {"headmix_forward"}
    assert of_triton
    assert "headmix_forward" not in of_triton


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
