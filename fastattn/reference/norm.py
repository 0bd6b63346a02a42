"""Layer norm and rms norm, from the formula.

``total = input + residual``; ``out = (total - mean(total)) / sqrt(var(total) + eps) * weight + bias``, and for rms norm
``out = total / sqrt(mean(total^2) + eps) * weight``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.spec.attention import lse_dtype
from fastattn.spec.norm import NormCall


def norm(call: NormCall) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns ``(out, total, mean, rstd)`` of a canonical call.

    ``out`` and ``total`` in input's dtype, rounded once; ``total`` is empty without a residual.  ``mean`` (empty for
    rms norm) and ``rstd`` are the row statistics in float32, or float64 for float64.
    """
    dtype = lse_dtype(call.input.dtype)
    total = call.input.to(dtype)
    if call.residual is not None:
        total = total + call.residual.to(dtype)
    dims = tuple(range(-call.num_dims, 0))
    mean = total.new_zeros(0)
    centered = total
    if not call.rms:
        mean = total.mean(dims, keepdim=True)
        centered = total - mean
        mean = mean.reshape(call.lead)
    rstd = torch.rsqrt(centered.square().mean(dims, keepdim=True) + call.eps)
    out = centered * rstd
    if call.weight is not None:
        out = out * call.weight.to(dtype)
    if call.bias is not None:
        out = out + call.bias.to(dtype)
    kept = call.input.new_empty(0) if call.residual is None else total.to(call.input.dtype)
    return out.to(call.input.dtype), kept, mean, rstd.reshape(call.lead)
