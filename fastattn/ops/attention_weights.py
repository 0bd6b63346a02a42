"""Attention weights, whole or reduced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastattn.biases import RelativeBias
from fastattn.masks import Mask
from fastattn.ops import _dispatch
from fastattn.ops._registry import define
from fastattn.ops.attention import CALL_SCHEMA, attend
from fastattn.reference import attention_weights as formula
from fastattn.reference.attention import LONGEST_SUM
from fastattn.spec.attention import AttentionCall, attention_call, lse_dtype
from fastattn.spec.attention_weights import (
    DIFFERENTIABLE,
    Selection,
    WeightsCall,
    blocks,
    empty_result,
    select_heads,
    select_rows,
    weights_call,
)

_NUM_ATTENTION = len(AttentionCall._fields)
_NUM_FIELDS = _NUM_ATTENTION + len(WeightsCall._fields) - 1
_DIFFERENTIABLE_AT = (*(AttentionCall._fields.index(f) for f in DIFFERENTIABLE), _NUM_ATTENTION)
# Elements of a block of weights in the backward, the fastest of 2^15 to 2^21.  About fifteen such tensors are held at
# once.
_BLOCK_ELEMENTS = 1 << 19


def attention_weights(
    query: Tensor,
    key: Tensor,
    *,
    mask: Mask | Tensor | None = None,
    bias: Tensor | RelativeBias | None = None,
    softmax_scale: float | None = None,
    softcap: float | None = None,
    reduce: str = "none",
    rows: Selection = None,
    heads: Selection = None,
    top_k: int | None = None,
    pool_size: int = 64,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The weights that :func:`fastattn.attention` would give each value, or a summary of them.

    ``P[i, j] = exp(s[i, j] - lse[i])`` over the visible keys and 0 elsewhere; ``s`` is attention's score.  A query that
    may see no key has weights 0.  All but "none" are made from tiles and never hold each head's
    [seq_len_q, seq_len_k].

    Args:
        query: [batch, num_heads_q, seq_len_q, head_dim]; float32, bfloat16, float16 or float64.
        key: [batch, num_heads_kv, seq_len_k, head_dim]; ``num_heads_q`` a multiple of ``num_heads_kv``.
        mask: as in :func:`fastattn.attention`, like ``bias``, ``softmax_scale`` and ``softcap``.
        bias: added to the scores.
        softmax_scale: by default ``1 / sqrt(head_dim)``.
        softcap: bounds the scores by a tanh; None for no bound.
        reduce: what to return; see below.
        rows: the queries to look at, in this order: a slice or indices.  All by default.  Masks and biases keep their
            alignment.
        heads: the query heads to look at, likewise.
        top_k: for "top_k", how many keys a query.
        pool_size: for "pooled", the side of a cell.
        backend: "reference" | "cpu" | "triton"; by default the first that supports the call.

    Returns:
        In query's dtype, differentiable to any order, for ``reduce``:

        * "none": ``P`` [batch, num_heads_q, seq_len_q, seq_len_k];
        * "head_mean": ``mean_h P`` [batch, seq_len_q, seq_len_k];
        * "key_sum": ``sum_i P``, the attention each key receives, [batch, num_heads_q, seq_len_k];
        * "entropy": ``-sum_j P log P`` in nats, [batch, num_heads_q, seq_len_q]; 0 for an empty row;
        * "top_k": the largest weights, falling, and their keys, two of [batch, num_heads_q, seq_len_q, top_k]; keys
        int64, -1 where
          the weight is 0;
        * "pooled": ``P``'s mean over cells of ``pool_size`` rows and columns (fewer at the edges),
          [batch, num_heads_q, ceil(seq_len_q / pool_size), ceil(seq_len_k / pool_size)].

    Raises:
        ValueError: shapes or numbers do not fit.
        TypeError: dtypes or devices do not fit.
        UnsupportedError: the backend asked for cannot serve the call.

    Differs from ``torch.nn.MultiheadAttention(need_weights=True)``, PyTorch's nearest twin: no dropout, no NaN, and
    summaries cost no quadratic memory.

    Source: Dao, "FlashAttention-2", 2023, section 3.2 (recomputing P from the lse).
    """
    if torch.is_autocast_enabled(query.device.type) and query.dtype != torch.float64:
        # The op itself does not cast: its lse must stay what it is.
        query, key = (t.to(torch.get_autocast_dtype(query.device.type)) for t in (query, key))
    call = attention_call(
        query,
        key,
        key,
        mask=mask,
        bias=bias,
        softmax_scale=softmax_scale,
        softcap=softcap,
        backend=_dispatch.resolve(backend),
    )
    call = select_rows(select_heads(call, heads), rows)
    result, indices = weigh(weights_call(call, log_total(call), reduce, top_k, pool_size))
    return (result, indices) if reduce == "top_k" else result


def log_total(call: AttentionCall) -> Tensor:
    """Returns attention's lse, which takes no values: they are zeros here, one number for all of them.

    Values that a mask hides may be NaN, and those make a backend go over the keys once more.
    """
    no_values = call.key.new_zeros(1).expand(*call.key.shape[:3], 1)
    return attend(call._replace(value=no_values))[1]


def weigh(call: WeightsCall) -> tuple[Tensor, Tensor]:
    """Returns ``(result, indices)`` of a canonical call, differentiable."""
    attention = call.attention
    tensors = (attention.query, attention.key, attention.bias, attention.relative_bias, call.lse)
    if _dispatch.needs_reference_derivatives(*tensors):
        _dispatch.warn_reference(
            "attention_weights", "forward-mode derivatives and torch.func transforms have no kernel"
        )
        result, indices = formula.reduced_weights(call)
        return result.to(attention.query.dtype), indices
    return _attention_weights(*_flat(call))


def _flat(call: WeightsCall) -> tuple[Any, ...]:
    return (*call.attention, *call[1:])


def _unflat(args: tuple[Any, ...]) -> WeightsCall:
    return WeightsCall(AttentionCall(*args[:_NUM_ATTENTION]), *args[_NUM_ATTENTION:])


def _kernel(*args: Any) -> tuple[Tensor, Tensor]:
    call = _unflat(args)
    if 0 in call.attention.shape:
        result, indices = formula.reduced_weights(call)
        return result.to(call.attention.query.dtype), indices
    return _dispatch.serve("attention_weights", call.attention, lambda backend: backend.attention_weights(call))


def _fake(*args: Any) -> tuple[Tensor, Tensor]:
    return empty_result(_unflat(args))


def _backward_kernel(*args: Any) -> list[Tensor]:
    """Differentiates the formula, a block at a time."""
    call, dresult, needed = _unflat(args[:_NUM_FIELDS]), args[-2], args[-1]
    tensors = _inputs(call)
    wanted = [t is not None and need for t, need in zip(tensors, needed, strict=True)]
    # The blocks' gradients are added up unrounded, in the same blocks of `sums`.
    sums = [
        torch.zeros_like(t, dtype=lse_dtype(t.dtype)) if t is not None and w else t
        for t, w in zip(tensors, wanted, strict=True)
    ]
    if 0 not in call.attention.shape:
        # A product's sums over queries must be short too, for the same bits at any number of threads.
        calls, targets = (blocks(c, _BLOCK_ELEMENTS, LONGEST_SUM) for c in (call, _with_inputs(call, sums)))
        for block, target in zip(calls, targets, strict=True):
            leaves = [
                t.detach().to(lse_dtype(t.dtype)).requires_grad_() if t is not None and w else t
                for t, w in zip(_inputs(block.call), wanted, strict=True)
            ]
            with torch.enable_grad():
                result, _ = formula.reduced_weights(_with_inputs(block.call, leaves))
            direction = dresult[block.where].to(result.dtype) * block.share
            grads = torch.autograd.grad(result, _present(leaves, wanted), direction)
            for total, grad in zip(_present(_inputs(target.call), wanted), grads, strict=True):
                total += grad
    found = iter(_present(sums, wanted))
    return [
        torch.empty_like(t).copy_(next(found)) if t is not None and w else call.lse.new_empty(0)
        for t, w in zip(tensors, wanted, strict=True)
    ]


def _backward_fake(*args: Any) -> list[Tensor]:
    call, needed = _unflat(args[:_NUM_FIELDS]), args[-1]
    return [
        call.lse.new_empty(0) if t is None or not need else torch.empty_like(t)
        for t, need in zip(_inputs(call), needed, strict=True)
    ]


def _present(tensors: list[Tensor | None], wanted: list[bool]) -> list[Tensor]:
    return [t for t, w in zip(tensors, wanted, strict=True) if t is not None and w]


def _inputs(call: WeightsCall) -> list[Tensor | None]:
    return [*(getattr(call.attention, f) for f in DIFFERENTIABLE), call.lse]


def _with_inputs(call: WeightsCall, tensors: list[Tensor | None]) -> WeightsCall:
    fields: dict[str, Any] = dict(zip((*DIFFERENTIABLE, "lse"), tensors, strict=True))
    lse = fields.pop("lse")
    return call._replace(attention=call.attention._replace(**fields), lse=lse)


class _AttentionWeights(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        result, indices = _attention_weights(*args)
        ctx.mark_non_differentiable(indices)
        ctx.save_for_backward(*(a if isinstance(a, Tensor) else None for a in args))
        ctx.others = [None if isinstance(a, Tensor) else a for a in args]
        return result, indices

    @staticmethod
    def backward(ctx: Any, dresult: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        args = [o if t is None else t for t, o in zip(ctx.saved_tensors, ctx.others, strict=True)]
        needed = [ctx.needs_input_grad[k] for k in _DIFFERENTIABLE_AT]
        found = weights_gradients(_unflat(tuple(args)), needed, dresult)
        grads: list[Tensor | None] = [None] * _NUM_FIELDS
        for at, grad, need in zip(_DIFFERENTIABLE_AT, found, needed, strict=True):
            grads[at] = grad if need else None
        return tuple(grads)


def weights_gradients(call: WeightsCall, needed: list[bool], dresult: Tensor) -> list[Tensor | None]:
    """Returns the gradients of the ``DIFFERENTIABLE`` fields and of lse; where grad is enabled they are differentiable
    themselves."""
    if torch.is_grad_enabled():
        return _differentiable_gradients(call, needed, dresult)
    return _attention_weights_backward(*_flat(call), dresult, needed)


def _differentiable_gradients(call: WeightsCall, needed: list[bool], dresult: Tensor) -> list[Tensor | None]:
    """Returns the gradients through the whole formula, themselves differentiable."""
    tensors = _inputs(call)
    inputs = [t for t, need in zip(tensors, needed, strict=True) if need and t is not None]
    result = formula.reduced_weights(call)[0]
    found = iter(torch.autograd.grad(result, inputs, dresult.to(result.dtype), create_graph=True))
    return [next(found) if need and t is not None else None for t, need in zip(tensors, needed, strict=True)]


_SCHEMA = f"{CALL_SCHEMA}, Tensor lse, str reduce, SymInt top_k, SymInt pool_size"
_attention_weights: Callable[..., Any] = define(
    "attention_weights",
    f"({_SCHEMA}) -> (Tensor result, Tensor indices)",
    kernel=_kernel,
    fake=_fake,
    function=_AttentionWeights,
)
_attention_weights_backward: Callable[..., Any] = define(
    "attention_weights_backward",
    f"({_SCHEMA}, Tensor dresult, bool[] needed) -> Tensor[]",
    kernel=_backward_kernel,
    fake=_backward_fake,
)
