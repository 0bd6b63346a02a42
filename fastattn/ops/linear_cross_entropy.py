"""A linear layer and the cross entropy of its result, without the logits in between."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastattn.backends.reference import gradients
from fastattn.ops import _dispatch
from fastattn.ops._registry import define
from fastattn.reference import linear_cross_entropy as formula
from fastattn.spec.linear_cross_entropy import (
    DIFFERENTIABLE,
    LinearCrossEntropyCall,
    check_targets,
    empty_output,
    linear_cross_entropy_call,
)

_CALL_SCHEMA = """
    Tensor hidden, Tensor weight, Tensor target, Tensor? bias, int ignore_index, float label_smoothing, str reduction,
    str backend"""
_NUM_FIELDS = len(LinearCrossEntropyCall._fields)
_NUM_TENSORS = LinearCrossEntropyCall._fields.index("ignore_index")
_DIFFERENTIABLE_AT = tuple(LinearCrossEntropyCall._fields.index(f) for f in DIFFERENTIABLE)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """The cross entropy of a linear layer's logits, ``F.cross_entropy(hidden @ weight^T + bias, target)``.

    ``loss[t] = lse[t] - (1 - s) * logits[t, target[t]] - s * mean_c(logits[t, c])`` with ``lse = logsumexp(logits)``
    and s = ``label_smoothing``.  The logits exist only a block at a time, forward and backward.
    On GPUs a reduced loss that needs gradients computes them in the forward, without computing the logits twice.

    Args:
        hidden: [..., model_dim]; float32, bfloat16, float16 or float64; any strides.
        weight: [vocab_size, model_dim], as ``nn.Linear`` stores it.
        target: int64 [...], class indices in [0, vocab_size) or ``ignore_index``.
        bias: [vocab_size] or None.
        ignore_index: tokens with this target do not count: their loss and their gradients are 0 whatever they hold.
        label_smoothing: probability taken from the target and spread evenly over all classes, in [0, 1].
        reduction: "none" (a loss a token), "sum", or "mean" over the tokens that count.
        backend: "reference" | "cpu"; by default the first that supports the call.

    Returns:
        [...] for "none", else []; float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes or numbers do not fit, or, on a CPU, a target is no class.
        TypeError: dtypes or devices do not fit.
        UnsupportedError: the backend asked for cannot serve the call.

    Differs from ``F.cross_entropy``: half-precision inputs give a float32 loss; the mean over no token is 0 with zero
    gradients, not NaN; NaN in an ignored token's hidden state reaches no gradient.

    Source: Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models", 2024, section 4.
    """
    call = linear_cross_entropy_call(
        hidden,
        weight,
        target,
        bias=bias,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction=reduction,
        backend=_dispatch.resolve(backend),
    )
    if _dispatch.needs_reference_derivatives(hidden, weight, bias):
        _dispatch.warn_reference(
            "linear_cross_entropy", "forward-mode derivatives and torch.func transforms have no kernel"
        )
        return formula.linear_cross_entropy(call)[0]
    return _linear_cross_entropy(*call)[0]


def _kernel(*args: Any) -> tuple[Tensor, Tensor]:
    call = LinearCrossEntropyCall(*args)
    check_targets(call)
    if call.num_tokens == 0:
        loss, lse = empty_output(call)
        return loss.zero_(), lse
    return _dispatch.serve("linear_cross_entropy", call, lambda backend: backend.linear_cross_entropy(call))


def _fake(*args: Any) -> tuple[Tensor, Tensor]:
    return empty_output(LinearCrossEntropyCall(*args))


def _backward_kernel(*args: Any) -> list[Tensor]:
    call = LinearCrossEntropyCall(*args[:_NUM_FIELDS])
    lse, dloss, needed = args[_NUM_FIELDS:]
    if call.num_tokens == 0:
        return [g.zero_() for g in _backward_fake(*args)]
    found = _dispatch.serve(
        "linear_cross_entropy_backward",
        call,
        lambda backend: backend.linear_cross_entropy_backward(call, lse, dloss, needed),
    )
    return [call.hidden.new_empty(0) if g is None else g for g in found]


def _backward_fake(*args: Any) -> list[Tensor]:
    call, needed = LinearCrossEntropyCall(*args[:_NUM_FIELDS]), args[-1]
    tensors = [getattr(call, field) for field in DIFFERENTIABLE]
    return [
        t.new_empty(t.shape) if need and t is not None else call.hidden.new_empty(0)
        for t, need in zip(tensors, needed, strict=True)
    ]


def goes_in_one_pass(call: LinearCrossEntropyCall) -> bool:
    """Whether the forward also computes the gradients, which the backward then multiplies by the loss' own.

    Not for losses of single tokens, whose gradients are not known then; nor in float16, where a gradient that is not
    multiplied by the loss' scale yet would underflow.
    """
    return (
        call.reduction != "none"
        and call.num_tokens > 0
        and _dispatch.first("linear_cross_entropy", call).has_one_pass_loss(call.hidden.dtype)
    )


def _one_pass_kernel(*args: Any) -> list[Tensor | None]:
    call, needed = LinearCrossEntropyCall(*args[:_NUM_FIELDS]), args[-1]
    check_targets(call)
    return _dispatch.serve(
        "linear_cross_entropy", call, lambda backend: backend.linear_cross_entropy_one_pass(call, needed)
    )


def _one_pass_fake(*args: Any) -> list[Tensor]:
    call = LinearCrossEntropyCall(*args[:_NUM_FIELDS])
    return [*empty_output(call), *_backward_fake(*args)]


def _scaled(call: LinearCrossEntropyCall, grads: Sequence[Tensor | None], factor: Tensor) -> Sequence[Tensor | None]:
    """Returns gradients times ``factor`` [], where they stand unless a compiler must see it."""
    present = [g for g in grads if g is not None]
    if torch.compiler.is_compiling() or not all(type(t) is Tensor for t in (*present, factor)):
        return [None if g is None else (g.to(factor.dtype) * factor).to(g.dtype) for g in grads]
    backend = _dispatch.first("linear_cross_entropy", call)
    with backend.on_device_of(call):
        backend.scale(present, factor)
    return grads


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        ctx.grads = None
        if goes_in_one_pass(LinearCrossEntropyCall(*args)):
            needed = [ctx.needs_input_grad[k] for k in _DIFFERENTIABLE_AT]
            loss, lse, *ctx.grads = _linear_cross_entropy_one_pass(*args, needed)
        else:
            loss, lse = _linear_cross_entropy(*args)
        ctx.save_for_backward(*args[:_NUM_TENSORS], lse)
        ctx.numbers = args[_NUM_TENSORS:]
        ctx.mark_non_differentiable(lse)
        return loss, lse

    @staticmethod
    def backward(ctx: Any, dloss: Tensor, _dlse: None) -> tuple[Tensor | None, ...]:
        *tensors, lse = ctx.saved_tensors
        call = LinearCrossEntropyCall(*tensors, *ctx.numbers)
        needed = [ctx.needs_input_grad[k] for k in _DIFFERENTIABLE_AT]
        found: Sequence[Tensor | None]
        if torch.is_grad_enabled():
            found = gradients(
                lambda c: formula.linear_cross_entropy(c)[:1], call, DIFFERENTIABLE, needed, [dloss], create_graph=True
            )
        elif ctx.grads is not None:
            # They are the caller's from here on, who may come again if he kept the graph.
            found, ctx.grads = _scaled(call, ctx.grads, dloss), None
        elif goes_in_one_pass(call):
            found = _scaled(call, _linear_cross_entropy_one_pass(*call, needed)[2:], dloss)
        else:
            found = _linear_cross_entropy_backward(*call, lse, dloss, needed)
        grads: list[Tensor | None] = [None] * _NUM_FIELDS
        for at, grad, need in zip(_DIFFERENTIABLE_AT, found, needed, strict=True):
            grads[at] = grad if need else None
        return tuple(grads)


_linear_cross_entropy = define(
    "linear_cross_entropy",
    f"({_CALL_SCHEMA}) -> (Tensor loss, Tensor lse)",
    kernel=_kernel,
    fake=_fake,
    function=_LinearCrossEntropy,
    autocast=True,
)
_linear_cross_entropy_one_pass = define(
    "linear_cross_entropy_one_pass",
    f"({_CALL_SCHEMA}, bool[] needed) -> Tensor[]",
    kernel=_one_pass_kernel,
    fake=_one_pass_fake,
)
_linear_cross_entropy_backward = define(
    "linear_cross_entropy_backward",
    f"({_CALL_SCHEMA}, Tensor lse, Tensor dloss, bool[] needed) -> Tensor[]",
    kernel=_backward_kernel,
    fake=_backward_fake,
)
