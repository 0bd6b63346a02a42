"""Attention and the mean over the heads of its weights, in one pass: what modules call, no part of the public API."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.ops import _dispatch
from fastattn.ops import attention_weights as weights_op
from fastattn.ops._registry import define
from fastattn.ops.attention import CALL_SCHEMA, attend, attention_gradients
from fastattn.ops.attention_weights import weigh
from fastattn.spec.attention import DIFFERENTIABLE, AttentionCall, empty_output
from fastattn.spec.attention_weights import WeightsCall, empty_result

_NUM_FIELDS = len(AttentionCall._fields)
_NUM_TENSORS = AttentionCall._fields.index("diag_lo")
_DIFFERENTIABLE_AT = tuple(AttentionCall._fields.index(f) for f in DIFFERENTIABLE)


def attend_with_weights(call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
    """Returns ``(out, lse, weights)`` of a canonical call, differentiable.

    ``out, lse`` are :func:`fastattn.ops.attention.attend`'s, bit for bit; ``weights = mean_h dropout(P_h)``
    [batch, seq_len_q, seq_len_k], in query's dtype, are what ``reduce="head_mean"`` gives with this lse.
    """
    tensors = (call.query, call.key, call.value, call.bias, call.relative_bias, call.sinks)
    if _dispatch.needs_reference_derivatives(*tensors):
        return _in_two_passes(call)
    return _attention_with_weights(*call)


def _in_two_passes(call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
    out, lse = attend(call)
    return out, lse, weigh(_weights_call(call, lse))[0]


def _weights_call(call: AttentionCall, lse: Tensor) -> WeightsCall:
    return WeightsCall(call, lse, "head_mean", 0, 1)


def _kernel(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    call = AttentionCall(*args)
    if call.is_empty:
        return _in_two_passes(call)

    def in_one_pass(backend: Any) -> tuple[Tensor, ...]:
        # Those that cannot return nothing for the weights.
        one_pass = getattr(backend, "attention_with_weights", None)
        return backend.attention(call) if one_pass is None else one_pass(call)

    out, lse, *weights = _dispatch.serve("attention", call, in_one_pass)
    return out, lse, weights[0] if weights else weigh(_weights_call(call, lse))[0]


def _fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    call = AttentionCall(*args)
    out, lse = empty_output(call)
    return out, lse, empty_result(_weights_call(call, lse))[0]


class _AttentionWithWeights(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        out, lse, weights = _attention_with_weights(*args)
        ctx.save_for_backward(*args[:_NUM_TENSORS], out, lse)
        ctx.numbers = args[_NUM_TENSORS:]
        # A gradient that is not wanted stays None, and then nothing is computed for it.
        ctx.set_materialize_grads(False)
        return out, lse, weights

    @staticmethod
    def backward(
        ctx: Any, dout: Tensor | None, dlse: Tensor | None, dweights: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        *tensors, out, lse = ctx.saved_tensors
        call = AttentionCall(*tensors, *ctx.numbers)
        needed = [ctx.needs_input_grad[k] for k in _DIFFERENTIABLE_AT]
        of_weights: dict[str, Tensor | None] = {}
        if dweights is not None:
            # The weights were made of this lse: their gradient by it joins its own.
            wanted = dict(zip(DIFFERENTIABLE, needed, strict=True))
            fields = (*weights_op.DIFFERENTIABLE, "lse")
            found = weights_op.weights_gradients(
                _weights_call(call, lse), [wanted.get(f, True) for f in fields], dweights
            )
            of_weights = dict(zip(fields, found, strict=True))
            dlse = _sum(dlse, of_weights.pop("lse"))
        grads: list[Tensor | None] = [None] * _NUM_FIELDS
        if dout is None and dlse is None:
            return tuple(grads)
        of_attention = attention_gradients(call, out, lse, dout, dlse, needed)
        for at, field, grad in zip(_DIFFERENTIABLE_AT, DIFFERENTIABLE, of_attention, strict=True):
            grads[at] = _sum(grad, of_weights.get(field)) if grad is not None else None
        return tuple(grads)


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


_attention_with_weights = define(
    "attention_with_weights",
    f"({CALL_SCHEMA}) -> (Tensor out, Tensor lse, Tensor weights)",
    kernel=_kernel,
    fake=_fake,
    function=_AttentionWithWeights,
    autocast=True,
)
