"""The canonical call of a dropout."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastattn.spec.checks import check_dropout, check_tensor, draw_dropout_state


class DropoutCall(NamedTuple):
    """The arguments of ``fastattn::dropout``, in order.

    Shapes: ``input`` [..., columns], all before the last dimension one row after another; ``dropout_state`` int64 [2].
    ``backend`` is "" for the automatic choice.
    """

    input: Tensor
    dropout_state: Tensor
    dropout_p: float
    backend: str


def dropout_call(
    input: Tensor, dropout_p: float, *, generator: torch.Generator | None = None, backend: str
) -> DropoutCall:
    """Validates the arguments of a dropout and returns their canonical form.

    Raises:
        ValueError: ``dropout_p`` is not in (0, 1), or ``input`` has no dimension.
        TypeError: ``input`` is no dense floating tensor.
    """
    check_tensor("input", input)
    state = draw_dropout_state(check_dropout(dropout_p), generator, input.device)
    if input.dim() == 0 or state is None:
        raise ValueError(f"dropout needs a dimension and dropout_p > 0, got {list(input.shape)} and {dropout_p}")
    return DropoutCall(input, state, float(dropout_p), backend)
