"""The Triton backend: when it serves, why it does not, and what only its kernels can get wrong."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from attention_cases import CASES, arguments, inputs
from conftest import TRITON

import fastattn
from fastattn.backends import BY_NAME, triton
from fastattn.errors import UnsupportedError
from fastattn.ops import _dispatch
from fastattn.spec.attention import attention_call

pytestmark = pytest.mark.skipif(not TRITON or torch.cuda.is_available(), reason="is about Triton's interpreter")


def call(head_dim=8, backend="triton"):
    query = torch.randn(1, 2, 5, head_dim)
    options = dict.fromkeys(("mask", "bias", "softmax_scale", "softcap", "sinks", "generator"))
    return attention_call(query, query, query, **options, dropout_p=0.0, backend=backend)


@pytest.fixture
def fresh():
    """Lets what is known of the installation be found out anew, before and after."""
    triton.missing.cache_clear()
    yield
    triton.missing.cache_clear()


def test_it_serves_who_asks_for_it_and_no_one_else_on_cpu():
    query = torch.randn(1, 2, 5, 8)
    chosen = []
    with _dispatch.observe(lambda op, call, backend: chosen.append(backend.name)):
        out = fastattn.attention(query, query, query, backend="triton")
        with fastattn.use_backend("triton"):
            again = fastattn.attention(query, query, query)
        usual = fastattn.attention(query, query, query)
    assert chosen[:2] == ["triton", "triton"]
    assert chosen[2] != "triton"
    assert torch.equal(out, again)
    torch.testing.assert_close(out, usual)
    assert any("for tests" in reason for reason in BY_NAME["triton"].refuses("attention", call(backend="")))


def test_without_the_interpreter_there_is_no_gpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    status = fastattn.backends()["triton"]
    assert not status.available
    assert "no GPU" in status.reason
    with pytest.raises(UnsupportedError, match=r"no GPU(.|\n)*runs on cuda, got tensors on cpu"):
        fastattn.attention(*(torch.randn(1, 2, 5, 8) for _ in range(3)), backend="triton")


@pytest.mark.usefixtures("fresh")
def test_without_triton(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert fastattn.backends()["triton"].reason.startswith("triton is not installed: pip install")


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize(
    ("version", "fits"), [("3.5.1", False), ("2.3.0", False), ("3.6.0", True), ("4.0.0+git1", True)]
)
def test_a_triton_that_is_too_old(version, fits, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    status = fastattn.backends()["triton"]
    assert status.available == fits
    assert fits or f"triton {version} is too old" in status.reason


def test_a_gpu_that_is_too_old(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    for capability, reason in [((7, 5), "Tesla T4 has compute capability 7.5, kernels need 8.0"), ((9, 0), None)]:
        triton.too_old.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert fastattn.backends()["triton"].reason == reason
    triton.too_old.cache_clear()


def test_what_it_has_no_kernel_for():
    reasons = BY_NAME["triton"].refuses("crochet", call(head_dim=300))
    assert reasons == ["has no kernel for crochet", "takes a head_dim of at most 256"]
    with pytest.raises(UnsupportedError, match="head_dim of at most 256"):
        fastattn.attention(*call(head_dim=300)[:3], backend="triton")


def test_triton_is_imported_by_its_first_call():
    code = (
        "import sys, torch, fastattn, fastattn.backends.triton; fastattn.backends()\n"
        "q = torch.randn(1, 1, 3, 8); fastattn.attention(q, q, q); assert 'triton' not in sys.modules\n"
        "fastattn.attention(q, q, q, backend='triton'); assert 'triton' in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("dim", range(3))
def test_offsets_beyond_32_bits(dim):
    """Queries, keys and values whose third entry lies 2^31 elements behind the first, in any dimension but the last."""
    shape = [1, 1, 1, 16]
    shape[dim] = 3
    apart = 2**30 + 16
    strides = [16 * (n == 1) + apart * (n == 3) for n in shape[:3]]
    try:
        memory = torch.empty(2 * apart + 16, dtype=torch.bfloat16)  # of which a few pages are touched
    except RuntimeError:
        pytest.skip("the system promises no 4 GB of memory")
    far = memory.as_strided(shape, (*strides, 1))
    far.copy_(torch.randn(shape))
    near = far.clone()
    found, expected = (fastattn.attention(t, t, t, backend="triton") for t in (far, near))
    assert torch.equal(found, expected)
    # As gradient it is read where it lies; the gradients themselves are written far away for a leaf that is far.
    leaves = [near.detach().clone().requires_grad_() for _ in range(3)]
    grads = [torch.autograd.grad(fastattn.attention(*leaves, backend="triton"), leaves, dout) for dout in (far, near)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_same_bits_again():
    case = CASES["everything"]
    given = inputs(case).to(torch.float32)
    first, second = (fastattn.attention(**arguments(given, backend="triton")) for _ in range(2))
    assert torch.equal(first, second)


COMPILE = """
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

class NoGpu:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)
    def get_current_device(self):
        return 0
    def get_current_stream(self, device):
        return 0
    def get_active_torch_device(self):
        return torch.device("cpu")

driver.set_active(NoGpu())
from fastattn.kernels import attention_forward, launch
from fastattn.masks import Causal, Dense
from fastattn.spec.attention import attention_call, empty_output
options = dict.fromkeys(("softmax_scale", "softcap", "sinks", "generator"))
for heads, queries, keys in ((1, 1, 64), (2, 64, 1)):
    q, k = torch.empty(1, heads, queries, 64).bfloat16(), torch.empty(1, heads, keys, 64).bfloat16()
    bias, mask = torch.empty(1, heads, queries, keys), Dense(torch.ones(1, heads, queries, keys).bool()) & Causal()
    call = attention_call(q, k, k, mask=mask, bias=bias, dropout_p=0.0, backend="triton", **options)
    arguments = attention_forward._arguments(call, *empty_output(call))
    sizes = attention_forward._options(call, launch.Tile(64, 32, 4, 1))
    kernel = attention_forward._attention_fwd_kernel.warmup(*arguments, grid=(1,), **sizes)
    assert kernel.asm["cubin"]
print("compiled")
"""


def test_calls_whose_numbers_are_one_compile():
    """Triton makes a constant of each 1, and 3.6 loses some of those in inner tuples (``arguments.Problem``)."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment, check=False)
    assert done.stdout.strip() == "compiled", done.stderr[-2000:]
