"""Attention, from the formula.

``P[i, j] = exp(s[i, j] - lse[i])`` over the visible keys, ``lse[i] = log(exp(sink) + sum_j exp(s[i, j]))``, ``out =
dropout(P) @ V``. It holds the whole [seq_len_q, seq_len_k] matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn import masks
from fastattn.reference.philox import keep_mask
from fastattn.spec.attention import AttentionCall, kept_lse_dtype, lse_dtype
from fastattn.spec.varlen_attention import sequences

# Most terms of a sum that one matrix product takes, where the number of threads must not show.
LONGEST_SUM = 512


def attention(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Returns ``(out, lse)`` of a canonical call.

    ``out`` [batch, num_heads_q, seq_len_q, head_dim_v] in query's dtype; ``lse`` [batch, num_heads_q, seq_len_q] in
    ``kept_lse_dtype``.  Accumulates in float32 (float64 for float64) and rounds once, at the end.  Empty rows give 0
    and -inf.
    """
    if call.starts_q is not None:
        found = [attention(one) for _, _, one in sequences(call)]
        return torch.cat([out for out, _ in found], dim=2), torch.cat([lse for _, lse in found], dim=2)
    weights, lse, allowed = _weights(call)
    value = _visible_rows(call.value, call, allowed)
    if _all_finite(value):
        out = weights @ value
    else:
        # 0 * NaN is NaN: where only some queries see a non-finite value, the others must not touch it.
        out = torch.where(allowed[..., None], weights[..., None] * value[:, :, None], 0.0).sum(dim=3)
    return out.to(call.query.dtype), lse


def scores(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Returns the scores before the softmax, -inf where invisible, and the visible set.

    Shapes: scores [batch, num_heads_q, seq_len_q, seq_len_k] in ``lse_dtype``; visible bool, the same shape.
    """
    dtype = lse_dtype(call.query.dtype)
    allowed = masks.visible(call.mask, call.shape, call.query.device).expand(call.shape)
    query = call.query.to(dtype)
    key = _visible_rows(call.key, call, allowed)
    if _all_finite(query) and _all_finite(key):
        s = _product(query, key)
    else:
        # As in attention(), but for the gradients: a masked score's gradient of 0 must not meet a NaN.
        pair = allowed[..., None]
        s = (torch.where(pair, query[:, :, :, None], 0.0) * torch.where(pair, key[:, :, None], 0.0)).sum(dim=-1)
    s = s * call.softmax_scale
    if call.softcap:
        s = call.softcap * torch.tanh(s / call.softcap)
    if call.bias is not None:
        s = s + call.bias.to(dtype)
    if call.relative_bias is not None:
        s = s + _relative(call).to(dtype)
    return torch.where(allowed, s, float("-inf")), allowed


def _product(query: Tensor, key: Tensor) -> Tensor:
    """Returns ``query @ key^T``."""
    # The gradient of the queries is a sum over all keys, which PyTorch cuts up by the number of threads: short sums it
    # does not, and those of the pieces are added up in one order.
    pieces = [query @ piece.transpose(-1, -2) for piece in key.split(LONGEST_SUM, dim=2)]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-1)


def _weights(call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
    s, allowed = scores(call)
    if s.shape[-1]:
        # The gradient of logsumexp over nothing but -inf is NaN: such a row takes it over zeros and is overwritten.
        empty = s.isneginf().all(dim=-1)
        lse = _logsumexp(torch.where(empty[..., None], 0.0, s)).masked_fill(empty, float("-inf"))
    else:
        lse = s.new_full(s.shape[:3], float("-inf"), dtype=kept_lse_dtype(s.device))
    if call.sinks is not None:
        lse = _logaddexp(lse, call.sinks.to(lse.dtype)[None, :, None])
    return probabilities(call, s, allowed, lse), lse, allowed


def probabilities(call: AttentionCall, s: Tensor, allowed: Tensor, lse: Tensor) -> Tensor:
    """Returns ``dropout(exp(s - lse))`` over the visible keys, 0 elsewhere, in the dtype of ``s``."""
    # -inf minus -inf is NaN, so an empty row subtracts 0 instead.  What rounding lse to the dtype of the scores loses
    # comes back as a factor of the row.
    finite = torch.where(lse.isneginf(), 0.0, lse)
    shift = finite.detach().to(s.dtype)
    lost = torch.where(shift.isinf(), 0.0, shift - finite).exp().to(s.dtype)[..., None]
    weights = torch.where(allowed, (torch.where(allowed, s, shift[..., None]) - shift[..., None]).exp() * lost, 0.0)
    if call.dropout_state is not None:
        keep = keep_mask(call.dropout_state, call.dropout_p, s.shape[0] * s.shape[1], s.shape[2], s.shape[3])
        weights = weights * keep.view(s.shape) / (1.0 - call.dropout_p)
    return weights


def _logsumexp(s: Tensor) -> Tensor:
    """Returns the log of each row's sum of exponentials, in ``kept_lse_dtype``."""
    # An infinite maximum is not subtracted: inf - inf is NaN.
    top = s.detach().amax(dim=-1)
    top = torch.where(top.isinf(), 0.0, top)
    dtype = kept_lse_dtype(s.device)
    return top.to(dtype) + (s - top[..., None]).exp().sum(dim=-1).to(dtype).log()


def _logaddexp(lse: Tensor, sink: Tensor) -> Tensor:
    """Returns ``log(exp(lse) + exp(sink))``; where lse is -inf it is the sink, with a gradient of 0 to lse."""
    absent = lse.isneginf()
    both = torch.logaddexp(torch.where(absent, 0.0, lse), sink)
    return torch.where(absent, sink, both)


def _visible_rows(tensor: Tensor, call: AttentionCall, allowed: Tensor) -> Tensor:
    """Returns key or value for each query head, in ``lse_dtype``, with 0 in the rows that no query may see."""
    rows = tensor.to(lse_dtype(tensor.dtype))
    if call.group_size > 1:
        rows = rows.repeat_interleave(call.group_size, dim=1)
    return torch.where(allowed.any(dim=2)[..., None], rows, 0.0)


def _all_finite(tensor: Tensor) -> bool:
    # Data-dependent, so only where data can be looked at; elsewhere the plain product stands.
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return True
    return bool(tensor.isfinite().all())


def _relative(call: AttentionCall) -> Tensor:
    assert call.relative_bias is not None
    _, _, seq_len_q, seq_len_k = call.shape
    if seq_len_q == 0:
        return call.relative_bias.new_empty((1, call.relative_bias.shape[0], 0, seq_len_k))
    # Row i is entries seq_len_q - 1 - i and after: windows, because the gradient of indexing is added up in any order.
    return call.relative_bias.unfold(1, seq_len_k, 1).flip(1)[None]
