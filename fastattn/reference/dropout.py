"""Dropout, from the formula."""

from __future__ import annotations

from torch import Tensor

from fastattn.reference.philox import keep_mask
from fastattn.spec.dropout import DropoutCall


def dropout(call: DropoutCall) -> Tensor:
    """Returns ``input / (1 - p)`` where it survives and 0 elsewhere, contiguous."""
    x = call.input.reshape(-1, call.input.shape[-1])
    keep = keep_mask(call.dropout_state, call.dropout_p, 1, *x.shape)[0]
    return (x * (1.0 / (1.0 - call.dropout_p))).where(keep, 0.0).view(call.input.shape)
