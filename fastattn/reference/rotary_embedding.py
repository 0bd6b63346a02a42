"""Rotary embedding, from the formula, and the angles that kernels take.

``(x1, x2) -> (x1 cos a - x2 sin a, x2 cos a + x1 sin a)`` with ``a = position * inv_freq[i]`` for pair ``i``.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from fastattn.spec.attention import lse_dtype
from fastattn.spec.rotary_embedding import RotaryEmbeddingCall


def rotary_embedding(call: RotaryEmbeddingCall) -> tuple[Tensor, Tensor]:
    """Returns query and key rotated, rounded once; the second is empty without a key."""
    cos, sin = (table[:, None] for table in tables(call))
    query = _rotated(call.query, cos, sin, call)
    return query, query.new_empty(0) if call.key is None else _rotated(call.key, cos, sin, call)


def tables(call: RotaryEmbeddingCall) -> tuple[Tensor, Tensor]:
    """Returns cosine and sine, [batch or 1, seq_len, rotary_dim / 2], times ``scale``, in the accumulator's dtype.

    The sine is that of the negative angle for an inverse rotation.
    """
    dtype = lse_dtype(call.query.dtype)
    cos, sin = call.cos, call.sin
    if cos is None or sin is None:
        # float64: a float32 angle at position 10^5 is already off by 4e-3 radians.
        angle = _positions(call)[..., None] * _frequencies(call)
        cos, sin = angle.cos(), angle.sin()
        return (cos * call.scale).to(dtype), (sin * (-call.scale if call.inverse else call.scale)).to(dtype)
    return cos.to(dtype) * call.scale, sin.to(dtype) * (-call.scale if call.inverse else call.scale)


def with_tables(call: RotaryEmbeddingCall) -> RotaryEmbeddingCall:
    """Returns the same call with its angles' cosines and sines, for kernels that could not compute them as well.

    Kernels count angles in 2^-64 of a turn: whole positions alone, and too coarsely for float64.
    """
    whole = call.positions is None or not call.positions.is_floating_point()
    if call.cos is not None or (whole and call.query.dtype != torch.float64):
        return call
    cos, sin = tables(call)
    return call._replace(positions=None, inv_freq=None, cos=cos, sin=sin, offset=0, scale=1.0, inverse=False)


def turns(call: RotaryEmbeddingCall) -> Tensor:
    """Returns how far each pair turns from one position to the next: int64 [rotary_dim / 2], in 2^-64 of a turn.

    Times any whole position, modulo 2^64, it is the angle to within ``position * 2^-53`` of itself, as in float64:
    whole turns drop out by overflow, exactly.
    """
    if call.inv_freq is not None:
        return _turns(call.inv_freq)
    return turns_of_base(call.base, call.rotary_dim, call.query.device)


def frequencies(base: float, rotary_dim: int, device: torch.device | None = None) -> Tensor:
    """Returns ``base^(-2i / rotary_dim)`` as float64 [ceil(rotary_dim / 2)]."""
    even = torch.arange(0, rotary_dim, 2, dtype=torch.float64, device=device)
    return torch.exp(even * (-math.log(base) / rotary_dim))


@cache
def turns_of_base(base: float, rotary_dim: int, device: torch.device) -> Tensor:
    """Returns :func:`turns` of the frequencies ``base^(-2i / rotary_dim)``."""
    return _turns(frequencies(base, rotary_dim)).to(device)


def _turns(inv_freq: Tensor) -> Tensor:
    turn = inv_freq.detach() * (0.5 / math.pi)
    # The nearest whole turn taken off leaves [-1/2, 1/2], of which 1/2 itself is no int64.
    part = turn - torch.floor(turn + 0.5)
    return (part * 2.0**64).to(torch.int64)


def _positions(call: RotaryEmbeddingCall) -> Tensor:
    if call.positions is not None:
        return call.positions.to(torch.float64)
    seq_len = call.query.shape[2]
    return torch.arange(call.offset, call.offset + seq_len, device=call.query.device).to(torch.float64)[None]


def _frequencies(call: RotaryEmbeddingCall) -> Tensor:
    if call.inv_freq is not None:
        return call.inv_freq
    return frequencies(call.base, call.rotary_dim, call.query.device)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, call: RotaryEmbeddingCall) -> Tensor:
    turned, rest = x[..., : call.rotary_dim].to(cos.dtype), x[..., call.rotary_dim :]
    if call.interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
    else:
        first, second = turned.chunk(2, dim=-1)
    pair = (first * cos - second * sin, second * cos + first * sin)
    turned = torch.stack(pair, dim=-1).flatten(-2) if call.interleaved else torch.cat(pair, dim=-1)
    return torch.cat((turned.to(x.dtype), rest), dim=-1)
