"""Softmax as a module."""

from __future__ import annotations

from torch import Tensor, nn

from fastattn.ops.softmax import softmax


class Softmax(nn.Softmax):
    """Drop-in for ``torch.nn.Softmax``: the same constructor, and ``isinstance`` of it.

    ``out = softmax(input, dim)``.

    Args:
        dim: the dimension to normalise over.  None is PyTorch's deprecated choice by the number of dimensions, with
            PyTorch's warning.

    Differs from PyTorch's: ``forward`` takes a ``mask`` besides (True is visible); a row with nothing visible is 0.
    """

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        """Returns the softmax of ``input``, [like it]; ``mask`` is bool and broadcasts to it."""
        dim = self.dim
        if dim is None:
            dim = nn.functional._get_softmax_dim("softmax", input.dim(), 4)  # type: ignore[attr-defined]
        return softmax(input, dim, mask=mask)
