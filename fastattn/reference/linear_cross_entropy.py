"""A linear layer and the cross entropy of its result, from the formula; it holds the [tokens, vocab_size] logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.spec.attention import lse_dtype
from fastattn.spec.linear_cross_entropy import LinearCrossEntropyCall


def linear_cross_entropy(call: LinearCrossEntropyCall) -> tuple[Tensor, Tensor]:
    """Returns ``(loss, lse)`` in float32 (float64 for float64): loss [...] or [], lse [...], the logits' logsumexp.

    Ignored tokens have a loss and an lse of 0.
    """
    dtype = lse_dtype(call.hidden.dtype)
    counted = call.target != call.ignore_index
    # What is ignored does not exist: NaN there would reach weight's gradient as 0 * NaN.
    hidden = torch.where(counted[..., None], call.hidden.to(dtype), 0.0)
    logits = F.linear(hidden, call.weight.to(dtype), None if call.bias is None else call.bias.to(dtype))
    lse = logits.logsumexp(dim=-1)
    target = torch.where(counted, call.target, 0)
    loss = lse - logits.gather(-1, target[..., None])[..., 0]
    if call.label_smoothing > 0.0:
        loss = (1.0 - call.label_smoothing) * loss + call.label_smoothing * (lse - logits.mean(dim=-1))
    loss, lse = torch.where(counted, loss, 0.0), torch.where(counted, lse, 0.0)
    return reduce(loss, call), lse


def reduce(loss: Tensor, call: LinearCrossEntropyCall, counted: int | None = None) -> Tensor:
    """Reduces a loss a token [...] as ``call.reduction`` says; the mean over no token is 0.

    Args:
        loss: of each token, 0 for those that do not count.
        call: the canonical call.
        counted: how many count, where that is known.
    """
    if call.reduction == "none":
        return loss
    total = loss.sum()
    if call.reduction == "sum":
        return total
    return total / (max(counted, 1) if counted is not None else (call.target != call.ignore_index).sum().clamp(min=1))
