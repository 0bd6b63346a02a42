"""Rows of any length in Triton: their aligned middles and their edges."""

from __future__ import annotations

import pytest
import torch
from conftest import TRITON
from memory_watch import watching

import fastattn

pytestmark = pytest.mark.skipif(not TRITON or torch.cuda.is_available(), reason="is about Triton's interpreter")


def test_rows_that_begin_anywhere():
    """Their middles and edges are moved apart where all tensors' rows begin alike, and are long enough."""
    from fastattn.kernels.rows import ANYWHERE, row_views, unit

    def found(*tensors):
        views, sizes = row_views(1, *tensors)
        return unit(views, sizes[3])

    x = torch.empty(3, 101)
    assert found(x) == found(x, torch.empty(3, 101, dtype=torch.bool)) == ANYWHERE.value
    assert found(x[:, :63]) == found(x, torch.empty(3, 102)[:, :101]) == found(x[1:]) == 1
    assert found(torch.empty(3, 100)) == 4


@pytest.mark.parametrize("rows", [1, 5, 18])
def test_odd_rows(rows):
    """Nothing outside of a row is touched, and every element counts once."""
    generator = torch.Generator().manual_seed(rows)
    x, dout, weight = (torch.randn(rows, 517, generator=generator, dtype=torch.float64) for _ in range(3))
    calls = {
        "softmax": lambda x, weight, backend: fastattn.softmax(x, backend=backend) + 0.0 * weight,
        "layer": lambda x, weight, backend: fastattn.layer_norm(x, weight, weight, backend=backend),
        "rms": lambda x, weight, backend: fastattn.rms_norm(x, weight, residual=x, backend=backend)[0],
    }
    for name, call in calls.items():
        found = []
        for backend in ("triton", "reference"):
            leaves = [x.float().to(x.dtype).requires_grad_(), weight[0].clone().requires_grad_()]
            with watching():
                out = call(*leaves, backend)
                found.append([out, *torch.autograd.grad(out, leaves, dout)])
        for ours, exact in zip(*found, strict=True):
            torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-12, msg=name)
