"""Offsets of Triton's kernels in tensors of more than 2^31 elements, and grids over them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TRITON
from torch import Tensor

import fastattn
from fastattn.masks import Dense
from fastattn.ops import linear
from fastattn.spec.dropout import DropoutCall
from fastattn.spec.linear import linear_call
from fastattn.spec.norm import NormBackwardCall, NormCall, empty_outputs
from fastattn.spec.softmax import SoftmaxBackwardCall, softmax_call

pytestmark = pytest.mark.skipif(not TRITON, reason="needs Triton")
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="is about Triton's interpreter")
APART = 2**30 + 16


def far(values: Tensor, dim: int) -> Tensor:
    """Returns a copy whose third entry of a dimension lies 2^31 elements behind the first; few pages are touched."""
    strides = list(values.contiguous().stride())
    strides[dim] = APART
    try:
        memory = torch.empty(2 * APART + values.numel(), dtype=values.dtype)
    except RuntimeError:
        pytest.skip("the system promises no 4 GB of memory")
    return memory.as_strided(values.shape, strides).copy_(values)


def test_no_offset_is_a_product_in_32_bits():
    """All kernels, by what the compiler makes of them: a product of 32-bit numbers is not widened by where it goes."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    program = [sys.executable, Path(__file__).with_name("triton_offsets.py")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    checked = 0
    for part in [subprocess.Popen([*program, f"{number}", "2"], **pipes) for number in range(2)]:
        found, said = part.communicate()
        assert part.returncode == 0, said[-2000:]
        *narrow, last = found.splitlines()
        assert not narrow, found
        checked += int(last.removeprefix("checked "))
    assert checked > 100


@interpreted
@pytest.mark.parametrize("dim", range(3))
def test_queries_keys_and_values(dim):
    shape = [1, 1, 1, 16]
    shape[dim] = 3
    near = torch.linspace(-3, 3, 48).sin().view(shape).bfloat16()
    apart = far(near, dim)
    found, expected = (fastattn.attention(t, t, t, backend="triton") for t in (apart, near))
    assert torch.equal(found, expected)
    # As gradient it is read where it lies.
    leaves = [near.clone().requires_grad_() for _ in range(3)]
    grads = [torch.autograd.grad(fastattn.attention(*leaves, backend="triton"), leaves, dout) for dout in (apart, near)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@interpreted
@pytest.mark.parametrize("dim", range(4))
@pytest.mark.parametrize("kind", ["bias", "mask"])
def test_masks_and_biases(kind, dim):
    generator = torch.Generator().manual_seed(dim)
    query = torch.randn(3, 3, 3, 16, generator=generator).requires_grad_()
    near = torch.randn(3, 3, 3, 3, generator=generator).bfloat16()
    near = near > 0 if kind == "mask" else near
    found = []
    for tensor in (far(near, dim), near):
        option = {"mask": Dense(tensor)} if kind == "mask" else {"bias": tensor}
        out = fastattn.attention(query, query, query, **option, backend="triton")
        weights = fastattn.attention_weights(query.detach(), query.detach(), **option, backend="triton")
        found.append((out, weights, *torch.autograd.grad(out, query, query.detach())))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def grids(launches) -> list[tuple[int, ...]]:
    return [grid for _, grid, _, _ in launches]


@pytest.mark.parametrize("shape", [(2**31 + 64, 16), (70000, 70000), (16, 2**31 + 64)], ids=str)
def test_grids_of_tensors_over_2_31_elements(shape):
    """A GPU starts 2^31 - 1 programs along x, and 65,535 along y and z."""
    from fastattn.kernels import dropout, norm, softmax, sums
    from fastattn.kernels.rows import row_views

    x = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    launched = grids([dropout._launch(DropoutCall(x, x.new_empty(2, dtype=torch.int64), 0.1, "triton"), x)])
    launched += grids([sums._sums(x, x.new_empty(sums.MOST_BLOCKS, shape[1], dtype=torch.float32))])
    for dim in range(2):
        forward = softmax_call(x, dim, mask=None, scale=1.0, dtype=None, log=False, backend="triton")
        backward = SoftmaxBackwardCall(x, x, None, dim, 1.0, x.dtype, False, "triton")
        for call, tensors in ((forward, 2), (backward, 3)):
            views, sizes = row_views(dim, *[x] * tensors, None)
            launched += grids(softmax.launches(call, views, sizes, x.dtype, backward=tensors == 3))
    call = NormCall(x, x, x[0], x[0], 1, 1e-5, False, "triton")
    out, total, mean, rstd = empty_outputs(call)
    partial = rstd.new_empty(norm.MOST_BLOCKS, shape[1])
    call_backward = NormBackwardCall(x, x[0], x[0], mean, rstd, x, x, 1, 1e-5, False, [True] * 3, "triton")
    launched += grids([norm.forward_launch(call, out, total, mean, rstd)])
    launched += grids(norm.backward_launches(call_backward, x, partial, partial))
    for grid in launched:
        assert all(1 <= size < limit for size, limit in zip(grid, (2**31, 65536, 65536), strict=False)), launched


WEIGHT = torch.linspace(-1, 1, 5 * 16).sin().view(5, 16).bfloat16()
TARGET = torch.tensor([0, -100, 4])
OPS = {
    "softmax": lambda x: fastattn.softmax(x, backend="triton"),
    "softmax of columns": lambda x: fastattn.softmax(x, 0, backend="triton"),
    "norm": lambda x: fastattn.layer_norm(x, None, None, backend="triton"),
    "linear": lambda x: linear._linear(*linear_call(x, WEIGHT, None, parts=1, backend="triton"))[0],
    "linear's weight": lambda x: linear._linear(*linear_call(WEIGHT, x, None, parts=1, backend="triton"))[0],
    "feed-forward": lambda x: fastattn.feed_forward(x, WEIGHT, None, WEIGHT.t(), None, backend="triton"),
    "loss": lambda x: fastattn.linear_cross_entropy(x, WEIGHT, TARGET, backend="triton"),
    "loss' weight": lambda x: fastattn.linear_cross_entropy(WEIGHT[:2], x, TARGET[:1].expand(2), backend="triton"),
}


@interpreted
@pytest.mark.parametrize("name", OPS)
def test_rows(name):
    near = torch.linspace(-3, 3, 48).cos().view(3, 16).bfloat16()
    results = []
    for x in (far(near, 0), near):
        leaf = x.detach().requires_grad_()
        out = OPS[name](leaf)
        (grad,) = torch.autograd.grad(out, leaf, torch.linspace(-1, 1, out.numel()).view(out.shape).to(out.dtype))
        results.append((out.detach(), grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_what_divides_rows():
    """The compiler is told of 2, 4 and 8 alone: 16 it finds by itself, and where columns lie apart it needs none."""
    from fastattn.kernels.rows import row_views, unit

    def found(tensor, dim=1):
        views, sizes = row_views(dim, tensor)
        return unit(views, sizes[3])

    x = torch.empty(3, 24)
    assert [found(t) for t in (x, x[:, :20], x[:, :6], x[:, :5], torch.empty(3, 32))] == [8, 4, 2, 1, 1]
    assert found(x, dim=0) == 1
