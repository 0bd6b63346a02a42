"""The canonical call of the rotary embedding."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastattn.spec.checks import check_finite, check_last_dim_contiguous, check_like, check_tensor

_INTEGERS = (torch.int64, torch.int32)


class RotaryEmbeddingCall(NamedTuple):
    """The arguments of ``fastattn::rotary_embedding``, in order.

    Shapes: ``query`` [batch, num_heads_q, seq_len, head_dim], ``key`` [batch, num_heads_kv, seq_len, head_dim] or None;
    ``positions`` int64 or float64 [batch or 1, seq_len], None for ``offset, offset + 1, ...``; ``inv_freq`` float64
    [rotary_dim / 2], None for ``base^(-2i / rotary_dim)``; ``cos`` and ``sin`` [batch or 1, seq_len, rotary_dim / 2],
    rows contiguous, instead of both.  ``inverse`` rotates by the negative angles.
    """

    query: Tensor
    key: Tensor | None
    positions: Tensor | None
    inv_freq: Tensor | None
    cos: Tensor | None
    sin: Tensor | None
    base: float
    offset: int
    rotary_dim: int
    interleaved: bool
    scale: float
    inverse: bool
    backend: str


def rotary_embedding_call(
    query: Tensor,
    key: Tensor | None,
    positions: Tensor | None,
    *,
    base: float,
    inv_freq: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    offset: int,
    rotary_dim: int | None,
    interleaved: bool,
    scale: float,
    backend: str,
) -> RotaryEmbeddingCall:
    """Validates what the user passed to ``rotary_embedding`` and returns its canonical form.

    Raises:
        ValueError: shapes or values do not fit.
        TypeError: dtypes or devices do not fit.
    """
    check_tensor("query", query)
    _check_heads("query", query)
    if key is not None:
        check_like("key", key, "query", query)
        _check_heads("key", key)
        if (key.shape[0], *key.shape[2:]) != (query.shape[0], *query.shape[2:]):
            raise ValueError(
                "key must have query's batch, seq_len and head_dim, "
                f"got key {list(key.shape)} and query {list(query.shape)}"
            )
    head_dim = query.shape[-1]
    rotary_dim = head_dim if rotary_dim is None else rotary_dim
    if not 0 < rotary_dim <= head_dim or rotary_dim % 2:
        raise ValueError(f"rotary_dim must be even, from 2 to head_dim={head_dim}, got {rotary_dim}")
    if check_finite("base", base) <= 0:
        raise ValueError(f"base must be positive, got {base}")
    if offset < 0:
        raise ValueError(f"offset must be non-negative, got {offset}")
    if (cos is None) != (sin is None):
        raise ValueError("cos and sin come together, got one without the other")
    if cos is not None and not (positions is None and inv_freq is None and offset == 0):
        raise ValueError("cos and sin hold the angles already: they go without positions, inv_freq and offset")
    if positions is not None:
        if offset != 0:
            raise ValueError(f"positions are given one by one: they go without an offset, got {offset}")
        positions = _positions(positions, query)
    return RotaryEmbeddingCall(
        query,
        key,
        positions,
        _inv_freq(inv_freq, query, rotary_dim),
        _table("cos", cos, query, rotary_dim, interleaved),
        _table("sin", sin, query, rotary_dim, interleaved),
        float(base),
        offset,
        rotary_dim,
        interleaved,
        check_finite("scale", scale),
        False,
        backend,
    )


def empty_outputs(call: RotaryEmbeddingCall) -> tuple[Tensor, Tensor]:
    """Returns uninitialised results, laid out like query and key; the second is empty without a key."""
    return _empty(call.query), call.query.new_empty(0) if call.key is None else _empty(call.key)


def _empty(like: Tensor) -> Tensor:
    out = torch.empty_like(like)
    # Of an expanded tensor another dimension may have become the innermost.
    return (
        out
        if like.shape[-1] <= 1 or out.stride(-1) == 1
        else torch.empty(like.shape, dtype=like.dtype, device=like.device)
    )


def _check_heads(name: str, value: Tensor) -> None:
    if value.dim() != 4:
        raise ValueError(f"{name} must be [batch, heads, seq_len, head_dim], got shape {list(value.shape)}")
    check_last_dim_contiguous(name, value)


def _check_device(name: str, value: object, query: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.device != query.device:
        raise TypeError(f"{name} must be on query's device {query.device}, got {value.device}")


def _positions(positions: Tensor, query: Tensor) -> Tensor:
    _check_device("positions", positions, query)
    if positions.dtype not in _INTEGERS and not positions.is_floating_point():
        raise TypeError(f"positions must be int64, int32 or floating, got {positions.dtype}")
    batch, _, seq_len, _ = query.shape
    if tuple(positions.shape) not in ((seq_len,), (1, seq_len), (batch, seq_len)):
        raise ValueError(
            f"positions must be [seq_len] or [batch, seq_len], with batch={batch} and seq_len={seq_len}, "
            f"got {list(positions.shape)}"
        )
    return positions.to(torch.float64 if positions.is_floating_point() else torch.int64).reshape(-1, seq_len)


def _inv_freq(inv_freq: Tensor | None, query: Tensor, rotary_dim: int) -> Tensor | None:
    if inv_freq is None:
        return None
    _check_device("inv_freq", inv_freq, query)
    check_tensor("inv_freq", inv_freq)
    if tuple(inv_freq.shape) != (rotary_dim // 2,):
        raise ValueError(f"inv_freq must have shape [rotary_dim / 2 = {rotary_dim // 2}], got {list(inv_freq.shape)}")
    return inv_freq.to(torch.float64)


def _table(name: str, table: Tensor | None, query: Tensor, rotary_dim: int, interleaved: bool) -> Tensor | None:
    """Returns a table of one number a pair; of a table that names each number twice, the first."""
    if table is None:
        return None
    _check_device(name, table, query)
    check_tensor(name, table)
    batch, _, seq_len, _ = query.shape
    fits = table.dim() in (2, 3) and table.shape[-2] == seq_len and (table.dim() == 2 or table.shape[0] in (1, batch))
    if not fits or table.shape[-1] not in (rotary_dim, rotary_dim // 2):
        raise ValueError(
            f"{name} must be [seq_len, width] or [batch, seq_len, width], with batch={batch}, seq_len={seq_len} and "
            f"width {rotary_dim} or {rotary_dim // 2}, got {list(table.shape)}"
        )
    table = table if table.dim() == 3 else table[None]
    if table.shape[-1] == rotary_dim:
        table = table[..., ::2] if interleaved else table[..., : rotary_dim // 2]
    return table if table.shape[-1] <= 1 or table.stride(-1) == 1 else table.contiguous()
