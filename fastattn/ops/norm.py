"""Layer norm and rms norm, with the residual's sum fused."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.backends.extension import plain
from fastattn.backends.reference import gradients
from fastattn.ops import _dispatch
from fastattn.ops._registry import define, plain_apply
from fastattn.reference import norm as formula
from fastattn.spec.norm import DIFFERENTIABLE, NormBackwardCall, NormCall, empty_outputs, norm_call


def layer_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Layer norm, of a sum where a residual is given.

    ``total = input + residual``; ``out = (total - mean) / sqrt(variance + eps) * weight + bias``.

    Args:
        input: [..., *normalized_shape]; float32, bfloat16, float16 or float64; any strides.
        weight: [*normalized_shape], of any float dtype; None for ones.
        bias: [*normalized_shape]; None for zeros.  Where both are None the last dimension alone is normalised over.
        residual: like input; added before the norm, in the accumulator's precision.
        eps: added to the variance; >= 0.
        backend: "reference" | "cpu"; by default the first that supports the call.

    Returns:
        ``out`` like input, contiguous; with ``residual`` also ``total``, rounded to input's dtype.

    Raises:
        ValueError: shapes do not fit, or eps is negative.
        TypeError: dtypes or devices do not fit.
        UnsupportedError: the backend asked for cannot serve the call.

    Differs from ``torch.nn.functional.layer_norm``: the shape to normalise over is weight's, and half precisions go
    with float32 weights on the same path.

    Source: Ba, Kiros and Hinton, "Layer Normalization", 2016, equation 3.
    """
    return _run(input, weight, bias, residual, eps, False, backend)


def rms_norm(
    input: Tensor,
    weight: Tensor | None,
    *,
    residual: Tensor | None = None,
    eps: float | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Root mean square norm: ``out = total / sqrt(mean(total^2) + eps) * weight`` with ``total = input + residual``.

    Arguments, results and errors are :func:`layer_norm`'s, without a bias; ``eps`` is by default the smallest step at 1
    of input's dtype, as in ``torch.nn.functional.rms_norm``.

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019, equation 4.
    """
    if eps is None:
        eps = torch.finfo(input.dtype).eps if isinstance(input, Tensor) and input.is_floating_point() else 0.0
    return _run(input, weight, None, residual, eps, True, backend)


def _run(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    rms: bool,
    backend: str | None,
) -> Tensor | tuple[Tensor, Tensor]:
    if _dispatch.may_be_plain(backend):
        found = plain.norm(input, weight, bias, residual, eps, rms)
        if found is not None:
            if type(found) is not list:
                return found
            return _apply_plain(input, weight, bias, residual, (found, eps, rms))
    call = norm_call(input, weight, bias, residual=residual, eps=eps, rms=rms, backend=_dispatch.resolve(backend))
    if _dispatch.needs_reference_derivatives(call.input, call.residual, call.weight, call.bias):
        _dispatch.warn_reference("norm", "forward-mode derivatives and torch.func transforms have no kernel")
        out, total, _, _ = formula.norm(call)
    else:
        out, total, _, _ = _norm(*call)
    return out if residual is None else (out, total)


def _kernel(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    call = NormCall(*args)
    if call.input.numel() == 0:
        # Nothing to write but the statistics of rows without columns: those of an empty mean.
        out, total, mean, rstd = empty_outputs(call)
        return out, total, mean.fill_(float("nan")), rstd.fill_(float("nan"))
    return _dispatch.serve("norm", call, lambda backend: backend.norm(call))


def _fake(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return empty_outputs(NormCall(*args))


def _backward_kernel(*args: Any) -> list[Tensor | None]:
    call = NormBackwardCall(*args)
    if call.input.numel() == 0:
        return [g.zero_() for g in _backward_fake(*args)]
    return _dispatch.serve("norm_backward", call, lambda backend: backend.norm_backward(call))


def _backward_fake(*args: Any) -> list[Tensor]:
    call = NormBackwardCall(*args)
    tensors = (call.input, call.weight, call.bias)
    return [
        call.input.new_empty(0) if t is None or not need else t.new_empty(t.shape)
        for t, need in zip(tensors, call.needed, strict=True)
    ]


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        call = NormCall(*args)
        out, total, mean, rstd = _norm(*args)
        # Only what was normalised is kept: the sum where there is one, which is this node's own result.
        normalised = call.input if call.residual is None else total
        ctx.save_for_backward(normalised, call.weight, call.bias, mean, rstd)
        ctx.rest = args[4:]
        ctx.mark_non_differentiable(mean, rstd, *(() if call.residual is not None else (total,)))
        ctx.set_materialize_grads(False)
        return out, total, mean, rstd

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dtotal: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        input, weight, bias, mean, rstd = ctx.saved_tensors
        call = NormCall(input, None, weight, bias, *ctx.rest)
        grads = _gradients(call, mean, rstd, dout, dtotal, ctx.needs_input_grad[:4])
        return (*grads, *(None,) * len(ctx.rest))


class _PlainNorm(torch.autograd.Function):
    """A plain call's node: its results are there, and its gradients are a plain call where nobody sees them."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        rest: tuple[list[Tensor], float, bool],
    ) -> Tensor | tuple[Tensor, ...]:
        (*outs, statistics), ctx.eps, ctx.rms = rest
        ctx.save_for_backward(input if residual is None else outs[1], weight, bias, statistics)
        ctx.set_materialize_grads(False)
        return outs[0] if residual is None else tuple(outs)

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dtotal: Tensor | None = None) -> tuple[Tensor | None, ...]:
        input, weight, bias, statistics = ctx.saved_tensors
        needs, eps, rms = ctx.needs_input_grad, ctx.eps, ctx.rms
        if _dispatch.may_be_plain(None):
            found = plain.norm_backward(input, weight, bias, None, eps, rms, statistics, dout, dtotal, needs)
            if found is not None:
                return found
        parameter = bias if weight is None else weight
        num_dims = 1 if parameter is None else parameter.dim()
        call = NormCall(input, None, weight, bias, num_dims, eps, rms, "")
        mean, rstd = statistics.contiguous().view(2, *call.lead)
        dinput, dresidual, dweight, dbias = _gradients(
            call, mean, rstd, dout, dtotal, (needs[0], needs[3], needs[1], needs[2])
        )
        return dinput, dweight, dbias, dresidual, None


_apply_plain = plain_apply(_PlainNorm)


def _gradients(
    call: NormCall, mean: Tensor, rstd: Tensor, dout: Tensor | None, dtotal: Tensor | None, needs: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """Returns the gradients of input, residual, weight and bias that are needed; ``call.input`` is their sum."""
    need_input, need_residual, need_weight, need_bias = needs
    grad, dweight, dbias = dtotal, None, None
    if dout is not None:
        needed = [need_input or need_residual, need_weight, need_bias]
        if torch.is_grad_enabled():
            grad, dweight, dbias = gradients(
                lambda c: formula.norm(c)[:1], call, DIFFERENTIABLE, needed, [dout], create_graph=True
            )
            if grad is not None and dtotal is not None:
                grad = grad + dtotal
        else:
            input, _, weight, bias, *rest, backend = call
            grad, dweight, dbias = _norm_backward(input, weight, bias, mean, rstd, dout, dtotal, *rest, needed, backend)
    return (
        grad if need_input else None,
        grad if need_residual else None,
        dweight if need_weight else None,
        dbias if need_bias else None,
    )


_norm = define(
    "norm",
    "(Tensor input, Tensor? residual, Tensor? weight, Tensor? bias, int num_dims, float eps, bool rms, str backend)"
    " -> (Tensor out, Tensor total, Tensor mean, Tensor rstd)",
    kernel=_kernel,
    fake=_fake,
    function=_Norm,
)
_norm_backward = define(
    "norm_backward",
    "(Tensor input, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd, Tensor dout, Tensor? dtotal, int num_dims,"
    " float eps, bool rms, bool[] needed, str backend) -> Tensor[]",
    kernel=_backward_kernel,
    fake=_backward_fake,
)
