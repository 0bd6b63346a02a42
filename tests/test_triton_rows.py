"""What only the Triton kernels of the ops besides attention can get wrong: refusals, memory."""

from __future__ import annotations

import pytest
import torch
from conftest import TRITON

import fastattn

pytestmark = pytest.mark.skipif(not TRITON or torch.cuda.is_available(), reason="is about Triton's interpreter")


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


def test_what_divides_rows():
    """The compiler is told of 2, 4 and 8 alone: 16 it finds by itself, and where columns lie apart it needs none."""
    from fastattn.kernels.rows import row_views, unit

    def found(tensor, dim=1):
        views, sizes = row_views(dim, tensor)
        return unit(views, sizes[3])

    x = torch.empty(3, 24)
    assert [found(t) for t in (x, x[:, :20], x[:, :6], x[:, :5], torch.empty(3, 32))] == [8, 4, 2, 1, 1]
    assert found(x, dim=0) == 1
