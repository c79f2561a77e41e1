"""The launch seam: the package's own GPU wrapper runs on the machine, and a finding there is an error."""

import struct
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl

import posattn
from posattn.backends.cuda import launch
from posattn.backends.cuda.params import Arguments
from posattn.backends.triton import launch as seam
from tests.ptxsim import Findings
from tests.ptxsim.seam import Machine, behind_launch, ptx_machine  # noqa: F401


def test_the_triton_backend_runs_behind_the_seam(ptx_machine: Machine) -> None:  # noqa: F811
    q, k, v = (torch.randn(1, 2, 70, 64, dtype=torch.float16) for _ in range(3))
    out = posattn.attention(q, k, v, posattn.ALiBi(2), causal=True, backend="triton")
    want = posattn.attention(q.float(), k.float(), v.float(), posattn.ALiBi(2), causal=True, backend="cpu")
    assert [launched.kernel for launched in ptx_machine.launches] == ["attention_forward"]
    assert (out.float() - want).abs().max() < 2e-3


def test_the_seam_closes() -> None:
    before = seam.launch, seam.has_device, seam.architecture, seam.processors
    with behind_launch(80) as machine:
        assert seam.has_device(torch.device("cpu"))
        assert seam.architecture(torch.device("cpu")) == "sm_80"
        assert seam.launch == machine.launch
    assert (seam.launch, seam.has_device, seam.architecture, seam.processors) == before


def test_an_unknown_architecture_is_named() -> None:
    with pytest.raises(ValueError, match=r"expected one of \[80, 90, 100\], got 75"), behind_launch(75):
        pass


@triton.jit
def every_block_stores(out):
    tl.store(out, tl.program_id(0))


def test_a_finding_is_an_error_that_names_the_kernel() -> None:
    out = torch.zeros(1, dtype=torch.int32)
    with behind_launch(80) as machine:
        with pytest.raises(Findings, match=r"every_block_stores\(2,\) on sm_80.*\n.*global_race"):
            seam.launch(every_block_stores, (2,), (out,), {}, 1, 1)
        machine.ignore = ("global_race",)
        seam.launch(every_block_stores, (2,), (out,), {}, 1, 1)


STORE = """.version 8.6
.target sm_90a
.address_size 64
.visible .entry every_warp_stores(.param .align 8 .b8 p[16])
{
.reg .b64 %at; .reg .b32 %t;
mov.u32 %t, %tid.x;
ld.param.b64 %at, [p];
st.global.b32 [%at], %t;
ret;
}
"""


def test_a_cuda_launch() -> None:
    out = torch.zeros(1, dtype=torch.int32)
    arguments = Arguments(struct.pack("QQ", out.data_ptr(), 0), tensors=(out,))
    kernel = SimpleNamespace(ptx=STORE, name="every_warp_stores", arch="sm_90a")
    with behind_launch(90):
        launch.launch(kernel, (1,), (1,), 0, arguments)
        with pytest.raises(Findings, match=r"every_warp_stores\(1,\) on sm_90.*\n.*global_race"):
            launch.launch(kernel, (1,), (64,), 0, arguments)
    with behind_launch(80), pytest.raises(ValueError, match="expected sm_80, got 'sm_90a'"):
        launch.launch(kernel, (1,), (1,), 0, arguments)
