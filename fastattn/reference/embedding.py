"""Embedding with positions, from the formula: ``dropout(scale * weight[ids] + position_table[positions])``."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.reference.philox import keep_mask
from fastattn.reference.rotary_embedding import frequencies
from fastattn.spec.attention import lse_dtype
from fastattn.spec.embedding import DIFFERENTIABLE, NO_PADDING, EmbeddingBackwardCall, EmbeddingCall


def embedding(call: EmbeddingCall) -> Tensor:
    """Returns the rows [..., seq_len, model_dim], rounded once."""
    dtype = lse_dtype(call.weight.dtype)
    padding_idx = None if call.padding_idx == NO_PADDING else call.padding_idx
    out = F.embedding(call.ids, call.weight, padding_idx=padding_idx).to(dtype) * call.scale
    if call.position_table is not None:
        out = out + _rows(call, call.position_table).to(dtype)
    if call.dropout_state is not None:
        keep = keep_mask(call.dropout_state, call.dropout_p, 1, call.ids.numel(), out.shape[-1])[0]
        out = (out * (1.0 / (1.0 - call.dropout_p))).where(keep.view(out.shape), 0.0)
    return out.to(call.weight.dtype)


def forward_of(call: EmbeddingBackwardCall) -> EmbeddingCall:
    """Returns a call with the same gradients: it is linear, so that what weight and table hold does not matter."""
    model_dim = call.dout.shape[-1]
    weight = call.dout.new_zeros(call.num_embeddings, model_dim)
    table = call.dout.new_zeros(call.num_positions, model_dim, dtype=call.table_dtype) if call.num_positions else None
    return EmbeddingCall(
        weight.requires_grad_(call.needed[0]),
        call.ids,
        None if table is None else table.requires_grad_(call.needed[1]),
        call.positions,
        call.dropout_state,
        call.offset,
        call.scale,
        call.padding_idx,
        call.dropout_p,
        call.backend,
    )


def differentiable(call: EmbeddingBackwardCall) -> list[Tensor | None]:
    """Returns the gradients of weight and position table, differentiable by dout to any order."""
    with torch.enable_grad():
        forward = forward_of(call)
        wanted = [getattr(forward, f) for f, need in zip(DIFFERENTIABLE, call.needed, strict=True) if need]
        found = list(torch.autograd.grad(embedding(forward), wanted, call.dout, create_graph=True))
    return [found.pop(0) if need else None for need in call.needed]


def sinusoids(positions: Tensor, model_dim: int, base: float = 10000.0) -> Tensor:
    """Returns sines and cosines of geometrically spaced wavelengths, side by side: float64 [positions, model_dim].

    ``PE[pos, 2i] = sin(pos / base^(2i / model_dim))``, ``PE[pos, 2i + 1] = cos(pos / base^(2i / model_dim))``.
    """
    angle = positions[:, None].to(torch.float64) * frequencies(base, model_dim, positions.device)
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(-2)[:, :model_dim]


def sinusoidal_table(length: int, model_dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns at least ``length`` rows of :func:`sinusoids`, from position 0 on."""
    # Longer than asked for, so that a sequence that grows asks for a new one only now and then.
    rows = max(512, 1 << max(length - 1, 0).bit_length())
    make = _sinusoidal_table.__wrapped__ if torch.compiler.is_compiling() else _sinusoidal_table
    return make(rows, model_dim, dtype, device)


@cache
def _sinusoidal_table(rows: int, model_dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return sinusoids(torch.arange(rows), model_dim).to(dtype=dtype).to(device)


def _rows(call: EmbeddingCall, table: Tensor) -> Tensor:
    seq_len = call.ids.shape[-1]
    if call.positions is None:
        return table[call.offset : call.offset + seq_len]
    rows = F.embedding(call.positions, table)
    return rows if rows.shape[0] == seq_len else rows.view(*call.ids.shape, -1)
