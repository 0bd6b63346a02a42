"""A linear layer: what modules call, and no part of the public API."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.backends.extension import load, plain
from fastattn.backends.products import multiplies_on_tiles
from fastattn.backends.reference import gradients
from fastattn.ops import _dispatch
from fastattn.ops._registry import define
from fastattn.reference import linear as formula
from fastattn.spec.linear import DIFFERENTIABLE, LinearCall, empty_outputs, linear_call

_CALL_SCHEMA = "Tensor input, Tensor weight, Tensor? bias, int parts, str backend"
_NUM_FIELDS = len(LinearCall._fields)
_NUM_TENSORS = LinearCall._fields.index("parts")


def linear(input: Tensor, weight: Tensor, bias: Tensor | None, parts: int = 1) -> tuple[Tensor, ...]:
    """A linear layer whose result comes in parts: ``input @ weight^T + bias``, cut along its last dimension.

    Args:
        input: [..., in_dim], of a floating dtype.
        weight: [out_dim, in_dim], as ``nn.Linear`` stores it, in input's dtype.
        bias: [out_dim] in input's dtype, or None.
        parts: how many tensors to return; it divides out_dim.

    Returns:
        ``parts`` tensors [..., out_dim / parts] in input's dtype.

    Raises:
        ValueError: shapes do not fit; a RuntimeError, of ``F.linear``, where that does the work.
        TypeError: dtypes or devices do not fit; likewise.

    Differs from ``F.linear``, which does the work wherever it is as fast: each part of many rows has memory of its own,
    so that neither the parts nor, in the backward, their gradients are copied; a few rows in float32 are a plain call.
    """
    if not _has_kernel(input, weight):
        out = plain.linear(input, weight, bias) if _dispatch.may_be_plain(None) else None
        if out is None:
            out = F.linear(input, weight, bias)
        return (out,) if parts == 1 else out.chunk(parts, dim=-1)
    return tuple(_linear(*linear_call(input, weight, bias, parts=parts, backend="")))


def _has_kernel(input: Tensor, weight: Tensor) -> bool:
    """Whether the op is faster than ``F.linear``, and nobody needs what only the latter has."""
    # A compiler fuses around F.linear, and autocast keeps the weights that it casts for it.
    if torch.compiler.is_compiling() or not input.is_cpu or torch._C._is_any_autocast_enabled():
        return False
    extension = load()[0]
    if extension is None or input.dtype != weight.dtype or input.dim() < 2 or weight.dim() != 2:
        return False
    in_dim = input.shape[-1]
    return (
        in_dim == weight.shape[1]
        and multiplies_on_tiles(extension.isa(), input.dtype, input.numel() // in_dim, weight.shape[0], in_dim)
        and _dispatch.resolve(None) in ("", "cpu")
        and not _dispatch.needs_reference_derivatives(input, weight)
    )


def _kernel(*args: Any) -> list[Tensor]:
    call = LinearCall(*args)
    if call.num_tokens == 0:
        return empty_outputs(call)
    return _dispatch.serve("linear", call, lambda backend: backend.linear(call))


def _fake(*args: Any) -> list[Tensor]:
    return empty_outputs(LinearCall(*args))


def _backward_kernel(*args: Any) -> list[Tensor]:
    call = LinearCall(*args[:_NUM_FIELDS])
    douts, needed = args[_NUM_FIELDS:]
    if call.num_tokens == 0:
        return [g.zero_() for g in _backward_fake(*args)]
    found = _dispatch.serve("linear_backward", call, lambda backend: backend.linear_backward(call, douts, needed))
    return [call.input.new_empty(0) if g is None else g for g in found]


def _backward_fake(*args: Any) -> list[Tensor]:
    call, needed = LinearCall(*args[:_NUM_FIELDS]), args[-1]
    tensors = [getattr(call, field) for field in DIFFERENTIABLE]
    return [
        t.new_empty(t.shape) if need and t is not None else call.input.new_empty(0)
        for t, need in zip(tensors, needed, strict=True)
    ]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*args[:_NUM_TENSORS])
        ctx.numbers = args[_NUM_TENSORS:]
        return tuple(_linear(*args))

    @staticmethod
    def backward(ctx: Any, *douts: Tensor) -> tuple[Tensor | None, ...]:
        call = LinearCall(*ctx.saved_tensors, *ctx.numbers)
        needed = list(ctx.needs_input_grad[: len(DIFFERENTIABLE)])
        if torch.is_grad_enabled():
            found = gradients(formula.linear, call, DIFFERENTIABLE, needed, douts, create_graph=True)
        else:
            found = _linear_backward(*call, list(douts), needed)
        grads = [g if need else None for g, need in zip(found, needed, strict=True)]
        return (*grads, *(None,) * (_NUM_FIELDS - len(grads)))


_linear = define(
    "linear",
    f"({_CALL_SCHEMA}) -> Tensor[]",
    kernel=_kernel,
    fake=_fake,
    function=_Linear,
    autocast=True,
)
_linear_backward = define(
    "linear_backward",
    f"({_CALL_SCHEMA}, Tensor[] douts, bool[] needed) -> Tensor[]",
    kernel=_backward_kernel,
    fake=_backward_fake,
)
