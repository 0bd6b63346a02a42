"""Packed sequences one after another, for a backend that has kernels for one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastattn.backends.reference import gradients
from fastattn.reference import attention as formula
from fastattn.spec.attention import DIFFERENTIABLE, AttentionCall, empty_output, lse_dtype
from fastattn.spec.varlen_attention import diagonals, sequences


def attention(call: AttentionCall, attend: Callable[[AttentionCall], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Returns ``(out, lse)`` of a packed call; ``attend`` computes one sequence that is not empty."""
    out, lse = empty_output(call)
    for rows, _, one in sequences(call):
        found = formula.attention(one) if one.is_empty else attend(one)
        for whole, part in zip((out, lse), found, strict=True):
            whole[:, :, rows].copy_(part)
    return out, lse


def attention_backward(
    call: AttentionCall,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    needed: Sequence[bool],
    differentiate: Callable[..., list[Tensor | None]],
) -> list[Tensor | None]:
    """Returns the gradients of ``DIFFERENTIABLE`` that are needed; ``differentiate`` computes those of one sequence."""
    wide = lse_dtype(call.query.dtype)
    # What sequences share is summed before it is rounded.
    shared = {f: getattr(call, f).to(wide) for f in ("relative_bias", "sinks") if getattr(call, f) is not None}
    tensors = {f: getattr(call, f) for f, need in zip(DIFFERENTIABLE, needed, strict=True) if need}
    grads = {
        f: torch.zeros_like(shared[f]) if f in shared else torch.empty_like(t)
        for f, t in tensors.items()
        if t is not None
    }
    for rows, columns, one in sequences(call._replace(**shared)):
        given = (out[:, :, rows], lse[:, :, rows], dout[:, :, rows], None if dlse is None else dlse[:, :, rows])
        if one.is_empty:
            both = [given[2], torch.zeros_like(given[1]) if given[3] is None else given[3]]
            parts = gradients(formula.attention, one, DIFFERENTIABLE, needed, both)
        else:
            parts = differentiate(one, *given, needed)
        for field, part in zip(DIFFERENTIABLE, parts, strict=True):
            if part is None or field not in grads:
                continue
            if field == "relative_bias":
                grads[field][:, diagonals(call, one.query.shape[2], one.key.shape[2])] += part
            elif field == "sinks":
                grads[field] += part
            else:
                grads[field][:, :, rows if field == "query" else columns].copy_(part)
    return [grads[f].to(tensors[f].dtype) if f in grads else None for f in DIFFERENTIABLE]
