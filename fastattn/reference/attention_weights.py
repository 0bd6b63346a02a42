"""Attention weights from the formula, and what may be asked of them instead of all of them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.reference.attention import probabilities, scores
from fastattn.spec.attention import AttentionCall, lse_dtype
from fastattn.spec.attention_weights import WeightsCall, blocks, result_shape

# Elements of the largest block of weights that a reduction holds: 2^22 float32 are 16 MiB, so that it stays near the
# cores.
BLOCK_ELEMENTS = 1 << 22


def attention_weights(call: AttentionCall, lse: Tensor) -> Tensor:
    """Returns ``dropout(exp(s - lse))`` over the visible keys, 0 elsewhere.

    Shape: [batch, num_heads_q, seq_len_q, seq_len_k] in float32 (float64 for float64).  With the lse of the same call
    it is the softmax.
    """
    s, allowed = scores(call)
    return probabilities(call, s, allowed, lse)


def reduced_weights(call: WeightsCall) -> tuple[Tensor, Tensor]:
    """Returns ``(result, indices)`` of a canonical call, unrounded; ``indices`` is empty but for "top_k"."""
    return reduce_weights(attention_weights(call.attention, call.lse), call)


def reduced_in_blocks(call: WeightsCall) -> tuple[Tensor, Tensor]:
    """Returns what :func:`reduced_weights` does, in query's dtype and a block at a time; not differentiable.

    Each block's result is added to its place: one kept by itself would pin the heap between the blocks' weights.
    """
    dtype = call.attention.query.dtype
    result = call.lse.new_zeros(result_shape(call), dtype=lse_dtype(dtype))
    indices = call.lse.new_empty(result.shape if call.reduce == "top_k" else (0,), dtype=torch.int64)
    for block in blocks(call, BLOCK_ELEMENTS):
        found, found_indices = reduced_weights(block.call)
        result[block.where] += found * block.share
        if call.reduce == "top_k":
            indices[block.where] = found_indices
    return result.to(dtype), indices


def reduce_weights(weights: Tensor, call: WeightsCall) -> tuple[Tensor, Tensor]:
    """Reduces weights [batch, num_heads_q, rows, seq_len_k], or any block of their rows."""
    indices = torch.empty(0, dtype=torch.int64, device=weights.device)
    if call.reduce == "none":
        return weights, indices
    if call.reduce == "head_mean":
        return weights.mean(dim=1), indices
    if call.reduce == "key_sum":
        return weights.sum(dim=2), indices
    if call.reduce == "entropy":
        # 0 * log(0) counts as 0, and so does its derivative.
        return -(weights * torch.where(weights > 0, weights, 1.0).log()).sum(dim=3), indices
    if call.reduce == "top_k":
        found, indices = weights.topk(call.top_k, dim=3)
        return found, torch.where(found > 0, indices, -1)
    assert call.reduce == "pooled"
    if weights.numel() == 0:
        return weights.sum(dim=(2, 3), keepdim=True)[:, :, : weights.shape[2], : weights.shape[3]], indices
    return F.avg_pool2d(weights, call.pool_size, ceil_mode=True), indices
