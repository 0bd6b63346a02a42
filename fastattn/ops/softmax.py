"""Softmax and log-softmax."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.backends.extension import plain
from fastattn.ops import _dispatch
from fastattn.ops._registry import define, plain_apply
from fastattn.reference import softmax as formula
from fastattn.spec.softmax import SoftmaxBackwardCall, SoftmaxCall, softmax_call


def softmax(
    input: Tensor,
    dim: int = -1,
    *,
    mask: Tensor | None = None,
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """Softmax of ``scale * input`` along ``dim``, over the visible elements.

    ``out[i] = exp(scale * input[i]) / sum_j exp(scale * input[j])``.  Where ``mask`` is False, ``out`` is 0 and
    ``input`` is not looked at: a NaN or Inf there reaches no output and no gradient.  A row with nothing visible is
    0, never NaN.

    Args:
        input: any shape, any strides; float32, bfloat16, float16 or float64, or with ``dtype`` any real dtype.
        dim: the dimension to normalise over.
        mask: bool, broadcastable to ``input``; True is visible (may be attended to).
        scale: multiplies ``input`` inside, in float32.
        dtype: of the result; ``input`` is cast to it first.
        backend: "reference" | "cpu"; by default the first that supports the call.

    Returns:
        [like ``input``], contiguous.

    Raises:
        ValueError: ``dim`` is out of range, ``mask`` does not broadcast, or ``scale`` is not finite.
        TypeError: dtypes or devices do not fit.
        UnsupportedError: the backend asked for cannot serve the call.

    Differs from ``torch.softmax`` in ``mask`` and ``scale`` alone.  As there, -inf in ``input`` is a value like any
    other: a row that is visible and holds nothing else is NaN.

    Source: Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018, for merging partial sums.
    """
    return _run(input, dim, mask, scale, dtype, False, backend)


def log_softmax(
    input: Tensor,
    dim: int = -1,
    *,
    mask: Tensor | None = None,
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """Logarithm of :func:`softmax`: ``scale * input - log(sum_j exp(scale * input[j]))``, without its underflow.

    Arguments and errors are :func:`softmax`'s.  Where ``mask`` is False the result is -inf and no gradient flows, so
    a row with nothing visible is -inf throughout, with a gradient of 0.
    """
    return _run(input, dim, mask, scale, dtype, True, backend)


def _run(
    input: Tensor,
    dim: int,
    mask: Tensor | None,
    scale: float,
    dtype: torch.dtype | None,
    log: bool,
    backend: str | None,
) -> Tensor:
    if mask is None and dtype is None and _dispatch.may_be_plain(backend):
        found = plain.softmax(input, dim, scale, log)
        if found is not None:
            return _apply_plain(input, found, (dim, scale, log)) if type(found) is list else found
    if isinstance(input, Tensor) and input.dim() == 0:
        return _run(input[None], dim, mask, scale, dtype, log, backend)[0]
    call = softmax_call(input, dim, mask=mask, scale=scale, dtype=dtype, log=log, backend=_dispatch.resolve(backend))
    if _dispatch.needs_reference_derivatives(call.input):
        return formula.softmax(call)
    return _softmax(*call)


def _kernel(*args: Any) -> Tensor:
    call = SoftmaxCall(*args)
    if call.input.numel() == 0:
        return _fake(*args)
    return _dispatch.serve("softmax", call, lambda backend: backend.softmax(call))


def _fake(*args: Any) -> Tensor:
    call = SoftmaxCall(*args)
    return call.input.new_empty(call.input.shape, dtype=call.out_dtype)


def _backward_kernel(*args: Any) -> Tensor:
    call = SoftmaxBackwardCall(*args)
    if call.out.numel() == 0:
        return _backward_fake(*args)
    return _dispatch.serve("softmax_backward", call, lambda backend: backend.softmax_backward(call))


def _backward_fake(*args: Any) -> Tensor:
    call = SoftmaxBackwardCall(*args)
    return call.out.new_empty(call.out.shape, dtype=call.dtype)


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        out = _softmax(*args)
        call = SoftmaxCall(*args)
        ctx.save_for_backward(out, call.mask)
        ctx.rest = (call.dim, call.scale, call.input.dtype, call.log, call.backend)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        out, mask = ctx.saved_tensors
        return _gradient(SoftmaxBackwardCall(out, dout, mask, *ctx.rest)), None, None, None, None, None, None


class _PlainSoftmax(torch.autograd.Function):
    """A plain call's node: its result is there, and its gradient is a plain call where nobody sees it."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, found: list[Tensor], numbers: tuple[int, float, bool]) -> Tensor:
        (out,) = found
        ctx.save_for_backward(out)
        ctx.numbers = numbers
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        (out,) = ctx.saved_tensors
        dim, scale, log = ctx.numbers
        grads = plain.softmax_backward(out, dim, scale, log, dout) if _dispatch.may_be_plain(None) else None
        if grads is None:
            call = SoftmaxBackwardCall(out, dout, None, dim % out.dim(), scale, out.dtype, log, "")
            grads = _gradient(call), None
        return (*grads, None)


def _gradient(call: SoftmaxBackwardCall) -> Tensor:
    # ``out`` is its node's own result, so what the formula makes of it is differentiable again.
    if torch.is_grad_enabled():
        return formula.softmax_backward(call)
    return _softmax_backward(*call)


_apply_plain = plain_apply(_PlainSoftmax)

_softmax = define(
    "softmax",
    "(Tensor input, Tensor? mask, int dim, float scale, ScalarType? dtype, bool log, str backend) -> Tensor",
    kernel=_kernel,
    fake=_fake,
    function=_Softmax,
    autocast_float32=("cuda",),
)
_softmax_backward = define(
    "softmax_backward",
    "(Tensor out, Tensor dout, Tensor? mask, int dim, float scale, ScalarType dtype, bool log, str backend) -> Tensor",
    kernel=_backward_kernel,
    fake=_backward_fake,
)
