"""The canonical call of layer norm and rms norm."""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from fastattn.spec.attention import lse_dtype
from fastattn.spec.checks import check_finite, check_like, check_shape, check_tensor, empty_contiguous


class NormCall(NamedTuple):
    """The arguments of ``fastattn::norm``, in order.

    ``input`` and ``residual`` have one shape, whose last ``num_dims`` dimensions are normalised over and are the shape
    of ``weight`` and ``bias``.  ``rms`` chooses rms norm, which has no bias.
    """

    input: Tensor
    residual: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    num_dims: int
    eps: float
    rms: bool
    backend: str

    @property
    def lead(self) -> torch.Size:
        """Shape of the statistics."""
        return self.input.shape[: self.input.dim() - self.num_dims]

    @property
    def columns(self) -> int:
        """Elements that are normalised together."""
        return prod(self.input.shape[self.input.dim() - self.num_dims :])


class NormBackwardCall(NamedTuple):
    """The arguments of ``fastattn::norm_backward``, in order.

    ``input`` is what was normalised, the sum with the residual where there was one; ``mean`` and ``rstd`` [lead] in the
    accumulator's dtype (``mean`` is empty for rms norm); ``dout`` and ``dtotal`` are the gradients of the result and of
    that sum; ``needed`` says which of the gradients of input, weight and bias are wanted.
    """

    input: Tensor
    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor
    rstd: Tensor
    dout: Tensor
    dtotal: Tensor | None
    num_dims: int
    eps: float
    rms: bool
    needed: list[bool]
    backend: str


# The fields of NormCall that gradients flow to besides the residual, whose gradient is the input's.
DIFFERENTIABLE = ("input", "weight", "bias")


def norm_call(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    residual: Tensor | None,
    eps: float,
    rms: bool,
    backend: str,
) -> NormCall:
    """Validates what the user passed to ``layer_norm`` or ``rms_norm`` and returns its canonical form.

    Raises:
        ValueError: shapes do not fit, or eps is negative.
        TypeError: dtypes or devices do not fit.
    """
    check_tensor("input", input)
    if residual is not None:
        check_like("residual", residual, "input", input)
        check_shape("residual", residual, input.shape)
    shape = input.shape[-1:] if input.dim() else input.shape
    for name, parameter in (("bias", bias), ("weight", weight)):
        if parameter is None:
            continue
        check_tensor(name, parameter)
        if parameter.device != input.device:
            raise TypeError(f"{name} must be on input's device {input.device}, got {parameter.device}")
        shape = parameter.shape
    if len(shape) == 0:
        raise ValueError(f"there must be a dimension to normalise over, got input {list(input.shape)}")
    if input.shape[input.dim() - len(shape) :] != shape or len(shape) > input.dim():
        raise ValueError(f"input must end with weight's shape {list(shape)}, got {list(input.shape)}")
    if weight is not None and bias is not None:
        check_shape("bias", bias, weight.shape)
    if check_finite("eps", eps) < 0:
        raise ValueError(f"eps must be >= 0, got {eps}")
    weight, bias = (_parameter(p, input) for p in (weight, bias))
    return NormCall(input, residual, weight, bias, len(shape), float(eps), rms, backend)


def empty_outputs(call: NormCall) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns uninitialised ``(out, total, mean, rstd)``; ``total`` is empty without a residual, ``mean`` for rms."""
    like = call.input
    statistics = lse_dtype(like.dtype)
    rstd = like.new_empty(call.lead, dtype=statistics)
    return (
        empty_contiguous(like),
        like.new_empty(0) if call.residual is None else empty_contiguous(like),
        like.new_empty(0, dtype=statistics) if call.rms else torch.empty_like(rstd),
        rstd,
    )


def _parameter(parameter: Tensor | None, input: Tensor) -> Tensor | None:
    # Kernels load a parameter of another precision as it is, but they accumulate in one type.
    if parameter is not None and (parameter.dtype == torch.float64) != (input.dtype == torch.float64):
        return parameter.to(lse_dtype(input.dtype))
    return parameter
