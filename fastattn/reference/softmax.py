"""Softmax and log-softmax, from the formula.

``softmax(x)[i] = exp(scale * x[i]) / sum_j exp(scale * x[j])`` over the visible ``j``, and its logarithm.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.spec.attention import lse_dtype
from fastattn.spec.softmax import SoftmaxBackwardCall, SoftmaxCall


def softmax(call: SoftmaxCall) -> Tensor:
    """Returns the (log-)softmax of a canonical call, in its out_dtype; accumulates in float32 (float64 for float64)."""
    dim, mask = call.dim, call.mask
    x = call.input.to(lse_dtype(call.input.dtype)) * call.scale
    if x.shape[dim] == 0:
        return x.to(call.out_dtype)
    if mask is not None:
        # -inf minus -inf is NaN, so a row without a visible element is computed over zeros and overwritten.
        x = torch.where(mask, x, torch.where(mask.any(dim, keepdim=True), float("-inf"), 0.0))
    x = x - x.detach().amax(dim, keepdim=True)
    out = x - x.exp().sum(dim, keepdim=True).log() if call.log else x.exp() / x.exp().sum(dim, keepdim=True)
    if mask is not None:
        out = torch.where(mask, out, float("-inf") if call.log else 0.0)
    return out.to(call.out_dtype)


def softmax_backward(call: SoftmaxBackwardCall) -> Tensor:
    """Returns the gradient of the input, [like ``out``] in ``call.dtype``, from the result alone.

    ``scale * p * (dout - sum(p * dout))`` for the softmax p; ``scale * (dout - exp(out) * sum(dout))`` for its
    logarithm.  Differentiable in ``out`` and ``dout``, which is how higher derivatives are made.
    """
    dtype, dim, mask = lse_dtype(call.out.dtype), call.dim, call.mask
    out, dout = call.out.to(dtype), call.dout.to(dtype)
    if mask is not None:
        dout = torch.where(mask, dout, 0.0)
    if call.log:
        grad = dout - out.exp() * dout.sum(dim, keepdim=True)
    else:
        grad = out * (dout - (out * dout).sum(dim, keepdim=True))
    if mask is not None:
        grad = torch.where(mask, grad, 0.0)
    return (grad * call.scale).to(call.dtype)
