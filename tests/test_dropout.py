"""The dropout op of the modules: every backend draws the same elements, forward and backward."""

import pytest
import torch
from conftest import backend_or_triton

import fastattn
from fastattn.ops import dropout as op
from fastattn.reference.philox import keep_mask
from fastattn.spec.dropout import dropout_call

backend = backend_or_triton
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def call_of(x, p=0.3, seed=5, backend="cpu"):
    return dropout_call(x, p, generator=torch.Generator().manual_seed(seed), backend=backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (3, 70), (2, 5, 64), (40, 130), (257, 7)])
def test_values_and_gradient(backend, dtype, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    call = call_of(x, backend=backend)
    out = op._dropout(*call)
    keep = keep_mask(call.dropout_state, 0.3, 1, x.numel() // shape[-1], shape[-1]).view(shape)
    expected = (x.detach().double() / 0.7).where(keep, 0.0)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(out.detach().double(), expected, rtol=2 * eps, atol=6e-8)
    direction = torch.linspace(-1, 1, x.numel()).view(shape).to(dtype)
    (grad,) = torch.autograd.grad(out, [x], direction)
    torch.testing.assert_close(grad.double(), (direction.double() / 0.7).where(keep, 0.0), rtol=2 * eps, atol=6e-8)


def test_strides_and_special_numbers(backend):
    x = torch.randn(30, 64, generator=torch.Generator().manual_seed(2))
    x[3, 5], x[4, 6] = float("nan"), float("inf")
    call = call_of(x, backend=backend)
    turned = call._replace(input=x.t().contiguous().t())
    torch.testing.assert_close(op._dropout(*turned), op._dropout(*call), rtol=0, atol=0, equal_nan=True)
    keep = keep_mask(call.dropout_state, 0.3, 1, 30, 64)[0]
    assert torch.equal(op._dropout(*call) == 0, ~keep)


def test_second_derivatives(backend):
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    call = call_of(x, backend=backend)
    assert torch.autograd.gradgradcheck(lambda t: op._dropout(t, *call[1:]).square(), (x,))


def test_opcheck():
    x = torch.randn(4, 6, requires_grad=True)
    torch.library.opcheck(torch.ops.fastattn.dropout.default, tuple(call_of(x, backend="")))


@pytest.mark.parametrize("p", [0.0, 1.0, -0.1])
def test_bad_probability(p):
    with pytest.raises(ValueError, match="dropout_p"):
        call_of(torch.ones(3), p)


def test_layers_in_training_drop_what_they_say():
    """Of ones, a tenth is dropped, and the mean stays; small inputs and other modules go PyTorch's way."""
    torch.manual_seed(0)
    encoding = fastattn.nn.SinusoidalPositionalEncoding(512, 64, dropout=0.1)
    with torch.no_grad():
        out = encoding(torch.full((4, 64, 512), 3.0))
        exact = encoding.eval()(torch.full((4, 64, 512), 3.0))
    dropped = out == 0
    assert abs(float(dropped.float().mean()) - 0.1) < 0.01
    torch.testing.assert_close(out[~dropped], exact[~dropped] / 0.9)
    assert not op.has_kernel(torch.ones(8), 0.1)
    assert not op.has_kernel(torch.ones(1 << 16), 1.0)
    assert op.has_kernel(torch.ones(1 << 16), 0.5)
