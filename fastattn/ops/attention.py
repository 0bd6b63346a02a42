"""Scaled dot product attention."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastattn import masks
from fastattn.backends.extension import plain
from fastattn.backends.reference import gradients
from fastattn.biases import RelativeBias
from fastattn.masks import Mask
from fastattn.ops import _dispatch
from fastattn.ops._registry import define, plain_apply
from fastattn.reference import attention as formula
from fastattn.spec.attention import DIFFERENTIABLE, AttentionCall, attention_call, empty_output, lse_dtype
from fastattn.spec.varlen_attention import check_packed

# The fields of AttentionCall, as the dispatcher writes them.
CALL_SCHEMA = """
    Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? relative_bias, Tensor? sinks, Tensor? dense_mask,
    Tensor? key_lengths, Tensor? segments_q, Tensor? segments_k, Tensor? dropout_state, SymInt diag_lo, SymInt diag_hi,
    float softmax_scale, float softcap, float dropout_p, str backend, Tensor? starts_q, Tensor? starts_k,
    SymInt longest_q, SymInt longest_k, bool from_end"""
_BANDS = (type(None), masks.Causal, masks.Window)  # the masks that are two numbers, whatever the shapes
_NUM_FIELDS = len(AttentionCall._fields)
_DIFFERENTIABLE_AT = tuple(AttentionCall._fields.index(f) for f in DIFFERENTIABLE)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Mask | Tensor | None = None,
    bias: Tensor | RelativeBias | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    generator: torch.Generator | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention: every query's average of the values, weighted by the softmax of its scores.

    ``out = dropout(softmax(softcap * tanh(softmax_scale * query @ key^T / softcap) + bias)) @ value`` over the
    visible keys; without ``softcap`` the score is ``softmax_scale * query @ key^T``.  A query that may see no key
    gives 0 and an lse of -inf, never NaN, and what is masked never reaches an output or a gradient.  Memory is
    O(seq_len), forward and backward.

    Args:
        query: [batch, num_heads_q, seq_len_q, head_dim]; float32, bfloat16, float16 or float64; any strides with a
            contiguous last dimension.
        key: [batch, num_heads_kv, seq_len_k, head_dim]; ``num_heads_q`` a multiple of ``num_heads_kv``: query head h
            uses key head ``h // (num_heads_q // num_heads_kv)``.
        value: [batch, num_heads_kv, seq_len_k, head_dim_v].
        mask: who may attend to whom (``fastattn.masks``; a bool tensor is ``Dense``).  True may attend.
        bias: added to the scores: float, broadcastable to [batch, num_heads_q, seq_len_q, seq_len_k], or ``Alibi``
            or ``RelativePosition``. Gets a gradient where it requires one.
        dropout_p: probability of dropping a weight, in [0, 1).  Applied whenever it is above 0.
        softmax_scale: by default ``1 / sqrt(head_dim)``.
        softcap: bounds the scores to (-softcap, softcap) by a tanh; None for no bound.
        sinks: float [num_heads_q]; one more logit a head that takes weight and has no value.
        return_lse: True also returns the log of the softmax's denominator.
        generator: source of the dropout's seed; by default the device's global one.
        backend: "reference" | "cpu" | "triton"; by default the first that supports the call.

    Returns:
        ``out`` [batch, num_heads_q, seq_len_q, head_dim_v] in query's dtype; with ``return_lse`` also ``lse``
        [batch, num_heads_q, seq_len_q], natural logarithm, float32 (float64 for float64 inputs), differentiable.

    Raises:
        ValueError: shapes, strides or numbers do not fit.
        TypeError: dtypes or devices do not fit.
        UnsupportedError: the backend asked for cannot serve the call.

    Differs from ``torch.nn.functional.scaled_dot_product_attention``: masks are values with a stated alignment,
    empty rows are 0, and dropout, bias gradients and lse cost no quadratic memory.

    Source: Vaswani et al., "Attention Is All You Need", 2017, equation 1; Dao, "FlashAttention-2", 2023.
    """
    if bias is softcap is sinks is None and type(mask) in _BANDS and not return_lse and _dispatch.may_be_plain(backend):
        left, right, align = (None, None, "") if mask is None else (mask.left, mask.right, mask.align)  # type: ignore
        last = align == "bottom_right"
        found = _try_plain(query, key, value, left, right, last, softmax_scale, dropout_p, True)
        if found is not None:
            return found
    call = attention_call(
        query,
        key,
        value,
        mask=mask,
        bias=bias,
        dropout_p=dropout_p,
        softmax_scale=softmax_scale,
        softcap=softcap,
        sinks=sinks,
        generator=generator,
        backend=_dispatch.resolve(backend),
    )
    out, lse = attend(call)
    return (out, lse.to(lse_dtype(query.dtype))) if return_lse else out


def attend(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Returns ``(out, lse)`` of a canonical call, differentiable; lse as the op keeps it (``kept_lse_dtype``)."""
    if _dispatch.needs_reference_derivatives(
        call.query, call.key, call.value, call.bias, call.relative_bias, call.sinks
    ):
        _dispatch.warn_reference("attention", "forward-mode derivatives and torch.func transforms have no kernel")
        return formula.attention(call)
    return _attention(*call)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Drop-in for ``torch.nn.functional.scaled_dot_product_attention``: the same signature and meaning.

    Args:
        query: [..., seq_len_q, head_dim], 2-D or more.
        key: [..., seq_len_k, head_dim]; leading dimensions broadcast with query's.
        value: [..., seq_len_k, head_dim_v].
        attn_mask: broadcastable to [..., seq_len_q, seq_len_k]; bool (True may attend) or float (added to the scores).
        dropout_p: probability of dropping a weight; applied whenever it is above 0.
        is_causal: query i sees the keys up to i (top-left alignment).
        scale: by default ``1 / sqrt(head_dim)``.
        enable_gqa: key and value heads may be fewer than query heads and are shared by groups.

    Returns:
        [..., seq_len_q, head_dim_v] in query's dtype.

    Raises:
        ValueError: shapes do not fit, or ``attn_mask`` is given together with ``is_causal``.
        TypeError: dtypes or devices do not fit.

    Differs from PyTorch's: a fully masked row gives 0 on every path, NaN in masked places stays there, and no input
    takes a path of quadratic memory.
    """
    if attn_mask is not None and is_causal:
        raise ValueError("attn_mask and is_causal=True exclude each other: pass one of them")
    if attn_mask is None and _dispatch.may_be_plain(None):
        right = 0 if is_causal else None
        found = _try_plain(query, key, value, None, right, False, scale, dropout_p, bool(enable_gqa))
        if found is not None:
            return found
    query, key, value, lead = _to_4d(query, key, value, enable_gqa)
    mask: Mask | None = masks.Causal("top_left") if is_causal else None
    bias = None
    if attn_mask is not None:
        if attn_mask.dim() > 2:
            attn_mask = _mask_to_4d(attn_mask, lead)
        if attn_mask.dtype == torch.bool:
            mask = masks.Dense(attn_mask)
        else:
            bias = attn_mask
    out = attention(query, key, value, mask=mask, bias=bias, dropout_p=dropout_p, softmax_scale=scale)
    assert isinstance(out, Tensor)
    return out if len(lead) == 2 else out.reshape(*lead, *out.shape[-2:])


def _to_4d(
    query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool
) -> tuple[Tensor, Tensor, Tensor, tuple[int, ...]]:
    """Broadcasts leading dimensions and folds them into [batch, heads]; also returns those of the result."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.dim() < 2:
            raise ValueError(f"{name} must be at least 2-D [..., seq_len, head_dim], got {list(tensor.shape)}")
    if enable_gqa and query.dim() >= 3:
        heads_q, heads_k, heads_v = query.shape[-3], key.shape[-3], value.shape[-3]
        if heads_k != heads_v:
            # PyTorch lets key and value have different numbers of heads: share each out to the query heads.
            key, value = (t.repeat_interleave(heads_q // t.shape[-3], dim=-3) for t in (key, value))
        lead_batch = _broadcast(query.shape[:-3], key.shape[:-3], value.shape[:-3])
        lead = (*lead_batch, heads_q)
        query, key, value = (t.expand(*lead_batch, *t.shape[-3:]) for t in (query, key, value))
    else:
        lead = _broadcast(query.shape[:-2], key.shape[:-2], value.shape[:-2])
        query, key, value = (t.expand(*lead, *t.shape[-2:]) for t in (query, key, value))
    query, key, value = (_fold(t) for t in (query, key, value))
    return query, key, value, lead


def _broadcast(*shapes: torch.Size) -> tuple[int, ...]:
    try:
        return tuple(torch.broadcast_shapes(*shapes))
    except RuntimeError:
        got = ", ".join(str(list(s)) for s in shapes)
        raise ValueError(f"leading dimensions of query, key and value must broadcast together, got {got}") from None


def _fold(tensor: Tensor) -> Tensor:
    if tensor.dim() < 4:
        tensor = tensor.reshape((1,) * (4 - tensor.dim()) + tuple(tensor.shape))
    elif tensor.dim() > 4:
        tensor = tensor.reshape(math.prod(tensor.shape[:-3]), *tensor.shape[-3:])
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        tensor = tensor.contiguous()
    return tensor


def _mask_to_4d(attn_mask: Tensor, lead: tuple[int, ...]) -> Tensor:
    """Folds a mask's leading dimensions as ``_to_4d`` folds the inputs', without writing out dimensions of size 1."""
    if len(lead) <= 2:
        return attn_mask
    outer = attn_mask.shape[:-3]
    if all(n == 1 for n in outer):
        return attn_mask.reshape(1, *attn_mask.shape[-3:])
    return attn_mask.expand(*lead[:-1], *attn_mask.shape[-3:]).reshape(math.prod(lead[:-1]), *attn_mask.shape[-3:])


def _kernel(*args: Any) -> tuple[Tensor, Tensor]:
    call = AttentionCall(*args)
    if call.starts_q is not None:
        check_packed(call)
    if call.is_empty:
        return _empty_result(call)
    return _dispatch.serve("attention", call, lambda backend: backend.attention(call))


def _empty_result(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """An average of nothing is 0; the denominator is the sinks alone."""
    out, lse = empty_output(call)
    if call.value.shape[3] == 0 and call.key.shape[2] > 0:
        return out, formula.attention(call)[1]
    lse.fill_(float("-inf"))
    if call.sinks is not None:
        lse.copy_(call.sinks[None, :, None].expand_as(lse))
    return out.zero_(), lse


def _fake(*args: Any) -> tuple[Tensor, Tensor]:
    return empty_output(AttentionCall(*args))


def _backward_kernel(*args: Any) -> list[Tensor | None]:
    call = AttentionCall(*args[:_NUM_FIELDS])
    out, lse, dout, dlse, needed = args[_NUM_FIELDS:]
    if call.starts_q is not None:
        check_packed(call)
    if call.is_empty:
        # A sink's gradient is that of its lse: the formula covers it.
        return gradients(lambda c: formula.attention(c), call, DIFFERENTIABLE, needed, _grad_outputs(lse, dout, dlse))
    return _dispatch.serve(
        "attention_backward", call, lambda backend: backend.attention_backward(call, out, lse, dout, dlse, needed)
    )


def _backward_fake(*args: Any) -> list[Tensor]:
    call = AttentionCall(*args[:_NUM_FIELDS])
    needed = args[-1]
    grads = []
    for field, need in zip(DIFFERENTIABLE, needed, strict=True):
        tensor = getattr(call, field)
        grads.append(call.query.new_empty(0) if tensor is None or not need else empty_gradient(tensor))
    return grads


def empty_gradient(tensor: Tensor) -> Tensor:
    """Returns uninitialised memory for the gradient of ``tensor``, in its shape, dtype and (if dense) strides."""
    return torch.empty_like(tensor)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        out, lse = _attention(*args)
        ctx.save_for_backward(*args[:11], out, lse)
        ctx.numbers = args[11:]
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, out, lse = ctx.saved_tensors
        call = AttentionCall(*tensors, *ctx.numbers)
        wanted = ctx.needs_input_grad
        needed = [wanted[k] for k in _DIFFERENTIABLE_AT]
        if dout is None and dlse is None:
            return (None,) * _NUM_FIELDS
        grads: list[Tensor | None] = [None] * _NUM_FIELDS
        for at, grad in zip(_DIFFERENTIABLE_AT, attention_gradients(call, out, lse, dout, dlse, needed), strict=True):
            grads[at] = grad
        return tuple(grads)


class _PlainAttention(torch.autograd.Function):
    """A plain call's node: its result is there, and its gradients are a plain call where nobody sees them."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, found: list[Tensor], numbers: tuple[Any, ...]
    ) -> Tensor:
        out, lse = found
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.numbers = numbers
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        needed = ctx.needs_input_grad
        if _dispatch.may_be_plain(None):
            found = plain.attention_backward(query, key, value, *ctx.numbers, out, lse, dout, needed)
            if found is not None:
                return (*found, None)
        query, key, value = (_fold(t) for t in (query, key, value))  # a hook may have laid them out anew
        left, right, last, softmax_scale, _, _ = ctx.numbers
        call = attention_call(
            query,
            key,
            value,
            mask=masks.Window(left, right, "bottom_right" if last else "top_left"),
            softmax_scale=softmax_scale,
            backend="",
        )
        needed = [*needed[:3], *(False,) * (len(DIFFERENTIABLE) - 3)]
        dquery, dkey, dvalue, *_ = attention_gradients(call, out, lse, dout, None, needed)
        return dquery, dkey, dvalue, None, None


_apply_plain = plain_apply(_PlainAttention)


def _try_plain(query: Tensor, key: Tensor, value: Tensor, *numbers: Any) -> Tensor | None:
    """Returns the result of a plain call, ``numbers`` being its further arguments; None where it is not plain."""
    found = plain.attention(query, key, value, *numbers)
    return _apply_plain(query, key, value, found, numbers) if type(found) is list else found


def attention_gradients(
    call: AttentionCall, out: Tensor, lse: Tensor, dout: Tensor | None, dlse: Tensor | None, needed: list[bool]
) -> list[Tensor | None]:
    """Returns the gradients of ``DIFFERENTIABLE`` that are needed."""
    if dout is None:
        dout = torch.zeros_like(out)
    if torch.is_grad_enabled():
        grad_outputs = _grad_outputs(lse, dout, dlse)
        found = gradients(lambda c: formula.attention(c), call, DIFFERENTIABLE, needed, grad_outputs, create_graph=True)
    else:
        if dout.stride(-1) != 1 and dout.shape[-1] > 1:
            dout = dout.contiguous()
        found = _attention_backward(*call, out, lse, dout, dlse, needed)
    return [grad if need else None for grad, need in zip(found, needed, strict=True)]


def _grad_outputs(lse: Tensor, dout: Tensor, dlse: Tensor | None) -> list[Tensor]:
    return [dout, torch.zeros_like(lse) if dlse is None else dlse]


_attention = define(
    "attention",
    f"({CALL_SCHEMA}) -> (Tensor out, Tensor lse)",
    kernel=_kernel,
    fake=_fake,
    function=_Attention,
    autocast=True,
)
_attention_backward = define(
    "attention_backward",
    f"({CALL_SCHEMA}, Tensor out, Tensor lse, Tensor dout, Tensor? dlse, bool[] needed) -> Tensor[]",
    kernel=_backward_kernel,
    fake=_backward_fake,
)
