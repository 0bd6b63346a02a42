"""Results so large that kernels write them past the caches: the bits of the same rows in calls too small for that."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

import fastattn

_COLUMNS = 512
# From 16 MiB on results are streamed; a part of a few rows is not.
_BYTES = 16 << 20
_PARTS = (slice(0, 3), slice(1001, 1301), slice(-130, None))

_weight = torch.linspace(-2, 2, _COLUMNS)
_bias = torch.linspace(1, -1, _COLUMNS)
_mask = torch.arange(_COLUMNS) % 3 != 1
OPS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": partial(fastattn.softmax, scale=1.7),
    "log_softmax": fastattn.log_softmax,
    "masked softmax": partial(fastattn.softmax, mask=_mask),
    "masked log_softmax": partial(fastattn.log_softmax, mask=_mask, scale=-0.5),
    "layer_norm": lambda x: fastattn.layer_norm(x, _weight.to(x.dtype), _bias.to(x.dtype)),
    "rms_norm": lambda x: fastattn.rms_norm(x, _weight.to(x.dtype), eps=1e-5),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_bits_of_small_calls(backend, op, dtype):
    if backend == "reference":
        pytest.skip("it has no stores of its own")
    rows = _BYTES // (_COLUMNS * dtype.itemsize)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(rows, _COLUMNS, generator=generator).to(dtype)
    dout = torch.randn(rows, _COLUMNS, generator=generator).to(dtype)

    def run(part: slice) -> tuple[Tensor, Tensor]:
        leaf = x[part].clone().requires_grad_()
        with fastattn.use_backend(backend):
            out = OPS[op](leaf)
            (gradient,) = torch.autograd.grad(out, leaf, dout[part].clone())
        return out.detach(), gradient

    out, gradient = run(slice(None))
    for part in _PARTS:
        expected, expected_gradient = run(part)
        assert torch.equal(out[part], expected)
        assert torch.equal(gradient[part], expected_gradient)
    again, gradient_again = run(slice(None))
    assert torch.equal(out, again)
    assert torch.equal(gradient, gradient_again)
