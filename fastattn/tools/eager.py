"""The ops as one writes them in plain PyTorch, rounding after every step: the yardstick for errors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    visible: Tensor | None = None,
    bias: Tensor | None = None,
    softmax_scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    keep: Tensor | None = None,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Returns ``softmax(query @ key^T) @ value`` and its lse, in the inputs' dtype.

    Args:
        query: [batch, num_heads_q, seq_len_q, head_dim].
        key: [batch, num_heads_kv, seq_len_k, head_dim].
        value: [batch, num_heads_kv, seq_len_k, head_dim_v].
        visible: bool, broadcastable to [batch, num_heads_q, seq_len_q, seq_len_k]; True may attend.
        bias: float, broadcastable to the same shape.
        softmax_scale: by default ``1 / sqrt(head_dim)``.
        softcap: bounds the scores by a tanh.
        sinks: [num_heads_q], one more logit a head.
        keep: bool, like ``visible``: which weights dropout leaves.
        dropout_p: probability that ``keep`` was drawn with.
    """
    group_size = query.shape[1] // key.shape[1]
    if group_size > 1:
        key, value = key.repeat_interleave(group_size, dim=1), value.repeat_interleave(group_size, dim=1)
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    if visible is not None:
        # The lowest finite number and not -inf, whose softmax over a whole row is NaN.
        scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
    logits = scores
    if sinks is not None:
        logits = torch.cat([scores, sinks[None, :, None, None].to(scores.dtype).expand(*scores.shape[:3], 1)], dim=-1)
    weights = logits.softmax(dim=-1)[..., : scores.shape[-1]]
    lse = logits.logsumexp(dim=-1)
    if visible is not None:
        weights = weights.masked_fill(~visible, 0.0)
        if sinks is None:
            lse = lse.masked_fill(~visible.any(dim=-1), float("-inf"))
    if keep is not None:
        weights = weights * keep / (1.0 - dropout_p)
    return weights @ value, lse


def softmax(input: Tensor, mask: Tensor | None = None, scale: float = 1.0) -> Tensor:
    """Returns the softmax over the last dimension: exp, sum and division each rounded."""
    scaled = _masked(input * scale, mask)
    exponentials = (scaled - scaled.amax(dim=-1, keepdim=True)).exp()
    probabilities = exponentials / exponentials.sum(dim=-1, keepdim=True)
    return probabilities if mask is None else probabilities.masked_fill(~mask, 0.0)


def log_softmax(input: Tensor, mask: Tensor | None = None, scale: float = 1.0) -> Tensor:
    """Returns the logarithm of the softmax over the last dimension; -inf where masked."""
    scaled = _masked(input * scale, mask)
    shifted = scaled - scaled.amax(dim=-1, keepdim=True)
    result = shifted - shifted.exp().sum(dim=-1, keepdim=True).log()
    return result if mask is None else result.masked_fill(~mask, float("-inf"))


def layer_norm(input: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    centred = input - input.mean(dim=-1, keepdim=True)
    return centred * (centred.square().mean(dim=-1, keepdim=True) + eps).rsqrt() * weight + bias


def rms_norm(input: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    return input * (input.square().mean(dim=-1, keepdim=True) + eps).rsqrt() * weight


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}


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
) -> Tensor:
    """Returns ``linear(activation(linear(input)))``; times the gate if ``weight_gate`` is given."""
    hidden = F.linear(input, weight_in, bias_in)
    act = _ACTIVATIONS[activation]
    hidden = act(hidden) if weight_gate is None else act(hidden) * F.linear(input, weight_gate, bias_gate)
    return F.linear(hidden, weight_out, bias_out)


def _masked(scores: Tensor, mask: Tensor | None) -> Tensor:
    return scores if mask is None else scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
