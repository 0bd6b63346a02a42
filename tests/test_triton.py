"""The Triton backend: when it serves, why it does not, and what only its kernels can get wrong."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from attention_cases import CASES, arguments, inputs
from conftest import TRITON

import fastattn
from fastattn.backends import BY_NAME
from fastattn.ops import _dispatch
from fastattn.spec.attention import attention_call

pytestmark = pytest.mark.skipif(not TRITON or torch.cuda.is_available(), reason="is about Triton's interpreter")


def call(head_dim=8, backend="triton"):
    query = torch.randn(1, 2, 5, head_dim)
    options = dict.fromkeys(("mask", "bias", "softmax_scale", "softcap", "sinks", "generator"))
    return attention_call(query, query, query, **options, dropout_p=0.0, backend=backend)


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


def test_triton_is_imported_by_its_first_call():
    code = (
        "import sys, torch, fastattn, fastattn.backends.triton; fastattn.backends()\n"
        "q = torch.randn(1, 1, 3, 8); fastattn.attention(q, q, q); assert 'triton' not in sys.modules\n"
        "fastattn.attention(q, q, q, backend='triton'); assert 'triton' in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


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
    tile = launch.Tile(64, 32, 4, 1)
    arguments = attention_forward._arguments(call, *empty_output(call), tile, 90)
    sizes = attention_forward._options(call, tile)
    kernel = attention_forward._attention_fwd_kernel.warmup(*arguments, grid=(1,), **sizes)
    assert kernel.asm["cubin"]
print("compiled")
"""


def test_calls_whose_numbers_are_one_compile():
    """Triton makes a constant of each 1, and 3.6 loses some of those in inner tuples (``arguments.Problem``)."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment, check=False)
    assert done.stdout.strip() == "compiled", done.stderr[-2000:]
