"""The canonical call of a linear layer."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from fastattn.spec.checks import check_like, check_shape, check_tensor


class LinearCall(NamedTuple):
    """The arguments of ``fastattn::linear``, in order.

    Shapes: ``input`` [..., in_dim]; ``weight`` [out_dim, in_dim]; ``bias`` [out_dim].  The result is cut into ``parts``
    tensors [..., out_dim / parts].  ``backend`` is "" for the automatic choice.
    """

    input: Tensor
    weight: Tensor
    bias: Tensor | None
    parts: int
    backend: str

    @property
    def num_tokens(self) -> int:
        return math.prod(self.input.shape[:-1])

    @property
    def part_dim(self) -> int:
        return self.weight.shape[0] // self.parts


# The fields of LinearCall that gradients flow to, in the order in which linear_backward returns them.
DIFFERENTIABLE = ("input", "weight", "bias")


def linear_call(input: Tensor, weight: Tensor, bias: Tensor | None, *, parts: int, backend: str) -> LinearCall:
    """Validates the arguments of a linear layer and returns their canonical form.

    Raises:
        ValueError: shapes or numbers do not fit.
        TypeError: dtypes or devices do not fit.
    """
    check_tensor("input", input)
    if input.dim() < 1 or input.shape[-1] == 0:
        raise ValueError(f"input must be [..., in_dim] with in_dim >= 1, got {list(input.shape)}")
    check_like("weight", weight, "input", input)
    if weight.dim() != 2 or weight.shape[0] == 0 or weight.shape[1] != input.shape[-1]:
        raise ValueError(f"weight must be [out_dim >= 1, in_dim={input.shape[-1]}], got {list(weight.shape)}")
    if bias is not None:
        check_like("bias", bias, "input", input)
        check_shape("bias", bias, (weight.shape[0],))
    if parts < 1 or weight.shape[0] % parts != 0:
        raise ValueError(f"parts must divide out_dim={weight.shape[0]}, got {parts}")
    return LinearCall(input, weight, bias, parts, backend)


def empty_outputs(call: LinearCall) -> list[Tensor]:
    """Returns uninitialised memory for the parts of the result: contiguous [..., part_dim] in input's dtype."""
    shape = (*call.input.shape[:-1], call.part_dim)
    return [call.input.new_empty(shape) for _ in range(call.parts)]
