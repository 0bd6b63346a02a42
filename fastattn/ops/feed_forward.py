"""The Transformer's feed-forward block."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.backends.extension import load, plain
from fastattn.backends.products import fuses_on_tiles
from fastattn.backends.reference import gradients
from fastattn.ops import _dispatch
from fastattn.ops._registry import define, plain_apply
from fastattn.reference import feed_forward as formula
from fastattn.spec.feed_forward import DIFFERENTIABLE, FeedForwardCall, empty_output, feed_forward_call

_CALL_SCHEMA = """
    Tensor input, Tensor weight_in, Tensor? bias_in, Tensor? weight_gate, Tensor? bias_gate, Tensor weight_out,
    Tensor? bias_out, Tensor? residual, Tensor? dropout_state, Tensor? output_dropout_state, str activation,
    float dropout_p, float output_dropout_p, str backend"""
_NUM_FIELDS = len(FeedForwardCall._fields)
_NUM_TENSORS = FeedForwardCall._fields.index("activation")
_RESIDUAL_AT = FeedForwardCall._fields.index("residual")


def feed_forward(
    input: Tensor,
    weight_in: Tensor,
    bias_in: Tensor | None,
    weight_out: Tensor,
    bias_out: Tensor | None,
    *,
    activation: str = "relu",
    weight_gate: Tensor | None = None,
    bias_gate: Tensor | None = None,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    output_dropout_p: float = 0.0,
    generator: torch.Generator | None = None,
    backend: str | None = None,
) -> Tensor:
    """The feed-forward block: two linear maps with an activation, and optionally a gate, between them.

    ``hidden = dropout(act(x @ weight_in^T + bias_in) [* (x @ weight_gate^T + bias_gate)])``;
    ``out = [residual +] dropout(hidden @ weight_out^T + bias_out)``, each dropout with a probability of its own.  The
    hidden activation is never held whole: forward a block of tokens at a time, backward some 20 MB of it.

    Args:
        input: x, [..., model_dim]; float32, bfloat16, float16 or float64; any strides.
        weight_in: [ff_dim, model_dim], as ``nn.Linear`` stores it.
        bias_in: [ff_dim] or None.
        weight_out: [out_dim, ff_dim]; out_dim is usually model_dim.
        bias_out: [out_dim] or None.
        activation: "relu" | "gelu" | "gelu_tanh" | "silu".
        weight_gate: [ff_dim, model_dim]; with it the block is gated: GLU variants, "silu" for SwiGLU, "gelu" for GeGLU.
        bias_gate: [ff_dim] or None.
        residual: [..., out_dim] or None; added last.
        dropout_p: probability of dropping an element of the hidden activation, in [0, 1), as does the dropout between
            the two linear layers of ``nn.TransformerEncoderLayer``; survivors are scaled by ``1 / (1 - dropout_p)``.
            Applied whenever it is above 0.
        output_dropout_p: likewise, of an element of the second product, as does the last dropout of
            ``nn.TransformerEncoderLayer``.
        generator: source of the dropouts' seeds, the hidden activation's first; by default the device's global one.
        backend: "reference" | "cpu"; by default the first that supports the call.

    Returns:
        [..., out_dim], contiguous, in input's dtype.

    Raises:
        ValueError: shapes or numbers do not fit, or there is no such activation.
        TypeError: dtypes or devices do not fit.
        UnsupportedError: the backend asked for cannot serve the call.

    Differs from ``F.linear(act(F.linear(...)))``: in half precision the hidden activation stays in float32 (in
    bfloat16 on AMX it is rounded as PyTorch rounds it), and autograd stores the input alone and recomputes.

    Source: Vaswani et al., "Attention Is All You Need", 2017, equation 2; Shazeer, "GLU Variants Improve
    Transformer", 2020.
    """
    if _dispatch.may_be_plain(backend) and output_dropout_p == 0.0:
        tensors = (input, weight_in, bias_in, weight_gate, bias_gate, weight_out, bias_out)
        found = plain.feed_forward(*tensors, activation, dropout_p) if _adds_plainly(residual, input) else None
        if found is not None:
            out: Tensor = _apply_plain(*tensors, (found, activation)) if type(found) is list else found
            if residual is None:
                return out
            if residual.shape == out.shape:
                return out.add_(residual)
    call = feed_forward_call(
        input,
        weight_in,
        bias_in,
        weight_out,
        bias_out,
        activation=activation,
        weight_gate=weight_gate,
        bias_gate=bias_gate,
        residual=residual,
        dropout_p=dropout_p,
        output_dropout_p=output_dropout_p,
        generator=generator,
        backend=_dispatch.resolve(backend),
    )
    if _dispatch.needs_reference_derivatives(*(getattr(call, field) for field in (*DIFFERENTIABLE, "residual"))):
        _dispatch.warn_reference("feed_forward", "forward-mode derivatives and torch.func transforms have no kernel")
        return formula.feed_forward(call)
    return _feed_forward(*call)


def is_fastest(input: Tensor) -> bool:
    """Whether the op is faster than two linear layers that keep the hidden activation, with gradients and without."""
    extension = load()[0]
    return (
        extension is not None
        and input.is_cpu
        and _dispatch.resolve(None) in ("", "cpu")
        and fuses_on_tiles(extension.isa(), input.dtype, input.numel() // max(input.shape[-1], 1))
    )


def _adds_plainly(residual: Tensor | None, input: Tensor) -> bool:
    """Whether a plain call's result may have ``residual`` added in place, so far as is known without its shape."""
    return residual is None or (
        type(residual) in (Tensor, torch.nn.Parameter)
        and isinstance(input, Tensor)
        and (residual.dtype, residual.layout, residual.device) == (input.dtype, input.layout, input.device)
    )


def _kernel(*args: Any) -> Tensor:
    call = FeedForwardCall(*args)
    if call.num_tokens == 0:
        return empty_output(call)
    return _dispatch.serve("feed_forward", call, lambda backend: backend.feed_forward(call))


def _fake(*args: Any) -> Tensor:
    return empty_output(FeedForwardCall(*args))


def _backward_kernel(*args: Any) -> list[Tensor | None]:
    call = FeedForwardCall(*args[:_NUM_FIELDS])
    dout, needed = args[_NUM_FIELDS:]
    if call.num_tokens == 0:
        return [g.zero_() for g in _backward_fake(*args)]
    return _dispatch.serve(
        "feed_forward_backward", call, lambda backend: backend.feed_forward_backward(call, dout, needed)
    )


def _backward_fake(*args: Any) -> list[Tensor]:
    call, needed = FeedForwardCall(*args[:_NUM_FIELDS]), args[-1]
    tensors = [getattr(call, field) for field in DIFFERENTIABLE]
    return [
        t.new_empty(t.shape) if need and t is not None else call.input.new_empty(0)
        for t, need in zip(tensors, needed, strict=True)
    ]


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        ctx.save_for_backward(*args[:_NUM_TENSORS])
        ctx.numbers = args[_NUM_TENSORS:]
        return _feed_forward(*args)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        call = FeedForwardCall(*ctx.saved_tensors, *ctx.numbers)
        needed = ctx.needs_input_grad[: len(DIFFERENTIABLE)]
        grads = _gradients(call, dout, needed) if any(needed) else [None] * len(needed)
        dresidual = dout if ctx.needs_input_grad[_RESIDUAL_AT] else None
        return (*grads, dresidual, *(None,) * (_NUM_FIELDS - len(grads) - 1))


class _PlainFeedForward(torch.autograd.Function):
    """A plain call's node: its result is there, and its gradients are a plain call where nobody sees them."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        *tensors, ((out,), ctx.activation) = args
        ctx.save_for_backward(*tensors)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        tensors, needed = ctx.saved_tensors, ctx.needs_input_grad
        if _dispatch.may_be_plain(None):
            found = plain.feed_forward_backward(*tensors, ctx.activation, 0.0, dout, needed)
            if found is not None:
                return found
        call = FeedForwardCall._make((*tensors, None, None, None, ctx.activation, 0.0, 0.0, ""))
        return (*_gradients(call, dout, needed[: len(DIFFERENTIABLE)]), None)


_apply_plain = plain_apply(_PlainFeedForward)


def _gradients(call: FeedForwardCall, dout: Tensor, needed: tuple[bool, ...]) -> list[Tensor | None]:
    """Returns the gradients of ``DIFFERENTIABLE`` that are needed."""
    if torch.is_grad_enabled():
        found = gradients(lambda c: (formula.feed_forward(c),), call, DIFFERENTIABLE, needed, [dout], create_graph=True)
    else:
        found = _feed_forward_backward(*call, dout, needed)
    return [g if need else None for g, need in zip(found, needed, strict=True)]


_feed_forward = define(
    "feed_forward",
    f"({_CALL_SCHEMA}) -> Tensor",
    kernel=_kernel,
    fake=_fake,
    function=_FeedForward,
    autocast=True,
)
_feed_forward_backward = define(
    "feed_forward_backward",
    f"({_CALL_SCHEMA}, Tensor dout, bool[] needed) -> Tensor[]",
    kernel=_backward_kernel,
    fake=_backward_fake,
)
