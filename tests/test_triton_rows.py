"""What only the Triton kernels of the ops besides attention can get wrong: offsets, refusals, memory."""

from __future__ import annotations

import pytest
import torch
from conftest import TRITON
from torch import Tensor

import fastattn
from fastattn.ops import linear
from fastattn.spec.linear import linear_call

pytestmark = pytest.mark.skipif(not TRITON or torch.cuda.is_available(), reason="is about Triton's interpreter")

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


def far_rows(values: Tensor) -> Tensor:
    """Returns three rows the last of which lies 2^31 elements behind the first."""
    apart = 2**30 + 16
    try:
        memory = torch.empty(2 * apart + 16, dtype=values.dtype)  # of which a few pages are touched
    except RuntimeError:
        pytest.skip("the system promises no 4 GB of memory")
    return memory.as_strided((3, 16), (apart, 1)).copy_(values)


@pytest.mark.parametrize("name", OPS)
def test_offsets_beyond_32_bits(name):
    values = torch.linspace(-3, 3, 48).cos().view(3, 16).bfloat16()
    results = []
    for x in (far_rows(values), values):
        leaf = x.detach().requires_grad_()
        out = OPS[name](leaf)
        (grad,) = torch.autograd.grad(out, leaf, torch.linspace(-1, 1, out.numel()).view(out.shape).to(out.dtype))
        results.append((out.detach(), grad))
    for far, near in zip(*results, strict=True):
        assert torch.equal(far, near)


def test_the_loss_works_in_blocks_of_classes(monkeypatch):
    """What the backward holds at a time is bounded, whatever the vocabulary."""
    monkeypatch.setattr("fastattn.kernels.linear_cross_entropy.LOGITS_BYTES", 1)
    from fastattn.kernels.linear_cross_entropy import class_blocks
    from fastattn.spec.linear_cross_entropy import LinearCrossEntropyCall

    target = torch.zeros(7, dtype=torch.int64)
    call = LinearCrossEntropyCall(torch.zeros(7, 4), torch.zeros(600, 4), target, None, -100, 0.0, "mean", "triton")
    assert [(block.start, block.stop) for block in class_blocks(call)] == [(0, 256), (256, 512), (512, 600)]


def test_the_backend_says_what_it_cannot_do(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(fastattn.UnsupportedError, match="no GPU"):
        fastattn.softmax(torch.randn(3, 4), backend="triton")
