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


def embedding(
    ids: Tensor,
    weight: Tensor,
    *,
    position_table: Tensor | None = None,
    positions: Tensor | None = None,
    offset: int = 0,
    scale: float = 1.0,
    padding_idx: int | None = None,
    keep: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Returns ``scale * weight[ids] + position_table[positions]``, and of that what ``keep`` (bool) leaves."""
    out = F.embedding(ids, weight, padding_idx=padding_idx) * scale
    if position_table is not None:
        rows = position_table[offset : offset + ids.shape[-1]] if positions is None else position_table[positions]
        out = out + rows.to(weight.dtype)
    return out if keep is None else out * keep / (1.0 - dropout_p)


def rotary_embedding(
    query: Tensor,
    key: Tensor,
    positions: Tensor | None = None,
    *,
    inv_freq: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    offset: int = 0,
    rotary_dim: int | None = None,
    interleaved: bool = False,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Returns query and key [batch, heads, seq_len, head_dim] rotated as Hugging Face's models do it, but by float64's
    angles.
    """
    dim = query.shape[-1] if rotary_dim is None else rotary_dim
    if cos is None or sin is None:
        device = query.device
        positions = torch.arange(offset, offset + query.shape[2], device=device) if positions is None else positions
        even = torch.arange(0, dim, 2, dtype=torch.float64, device=device)
        frequencies = 10000.0 ** (-even / dim) if inv_freq is None else inv_freq.double()
        angle = positions[..., None].double() * frequencies
        cos, sin = angle.cos() * scale, angle.sin() * scale
    if cos.shape[-1] == dim // 2:
        cos, sin = (t.repeat_interleave(2, -1) if interleaved else torch.cat((t, t), -1) for t in (cos, sin))
    cos, sin = (t.to(query.dtype)[..., None, :, :] for t in (cos, sin))
    outs = []
    for x in (query, key):
        turned = x[..., :dim]
        if interleaved:
            other = torch.stack((-turned[..., 1::2], turned[..., ::2]), dim=-1).flatten(-2)
        else:
            other = torch.cat((-turned[..., dim // 2 :], turned[..., : dim // 2]), dim=-1)
        outs.append(torch.cat((turned * cos + other * sin, x[..., dim:]), dim=-1))
    return outs[0], outs[1]


def _masked(scores: Tensor, mask: Tensor | None) -> Tensor:
    return scores if mask is None else scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
