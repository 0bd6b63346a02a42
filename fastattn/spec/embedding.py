"""The canonical call of an embedding with positions."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastattn.spec.attention import lse_dtype
from fastattn.spec.checks import check_dropout, check_finite, check_tensor, draw_dropout_state

_INTEGERS = (torch.int64, torch.int32)
NO_PADDING = -1


class EmbeddingCall(NamedTuple):
    """The arguments of ``fastattn::embedding``, in order.

    Shapes: ``weight`` [num_embeddings, model_dim]; ``ids`` int64 [..., seq_len]; ``position_table`` [num_positions,
    model_dim] or None; ``positions`` int64 [seq_len] for all sequences or [tokens] one by one, None for ``offset,
    offset + 1, ...``; ``dropout_state`` int64 [2] or None.  ``padding_idx`` is -1 where there is none.
    """

    weight: Tensor
    ids: Tensor
    position_table: Tensor | None
    positions: Tensor | None
    dropout_state: Tensor | None
    offset: int
    scale: float
    padding_idx: int
    dropout_p: float
    backend: str


class EmbeddingBackwardCall(NamedTuple):
    """The arguments of ``fastattn::embedding_backward``, in order.

    ``dout`` [..., seq_len, model_dim] is the gradient of the result; ``needed`` says which of the gradients of weight
    [num_embeddings, model_dim], in dout's dtype, and of the position table [num_positions, model_dim], in
    ``table_dtype``, are wanted.  The others are those of :class:`EmbeddingCall`.
    """

    dout: Tensor
    ids: Tensor
    positions: Tensor | None
    dropout_state: Tensor | None
    num_embeddings: int
    num_positions: int
    table_dtype: torch.dtype
    offset: int
    scale: float
    padding_idx: int
    dropout_p: float
    needed: list[bool]
    backend: str


# The fields of EmbeddingCall that gradients flow to.
DIFFERENTIABLE = ("weight", "position_table")


def embedding_call(
    ids: Tensor,
    weight: Tensor,
    *,
    position_table: Tensor | None,
    positions: Tensor | None,
    offset: int,
    scale: float | None,
    padding_idx: int | None,
    dropout_p: float,
    generator: torch.Generator | None,
    backend: str,
) -> EmbeddingCall:
    """Validates what the user passed to ``embedding`` and returns its canonical form; ids are looked at by the kernels.

    Raises:
        ValueError: shapes or values do not fit.
        TypeError: dtypes or devices do not fit.
    """
    check_tensor("weight", weight)
    if weight.dim() != 2:
        raise ValueError(f"weight must be [num_embeddings, model_dim], got {list(weight.shape)}")
    _check_whole("ids", ids, weight)
    if ids.dim() == 0:
        raise ValueError("ids must be [..., seq_len], got a scalar")
    seq_len = ids.shape[-1]
    if offset < 0:
        raise ValueError(f"offset must be non-negative, got {offset}")
    if position_table is None:
        if positions is not None or offset != 0:
            raise ValueError("positions and offset mean rows of a position_table, which is not given")
    else:
        position_table = _table(position_table, weight)
        if positions is not None:
            positions = _positions(positions, offset, ids, weight)
        elif offset + seq_len > len(position_table):
            raise ValueError(
                f"positions up to {offset + seq_len - 1} asked for, but position_table has {len(position_table)}"
            )
    num_embeddings = len(weight)
    if padding_idx is not None:
        if not -num_embeddings <= padding_idx < num_embeddings:
            raise ValueError(f"padding_idx must be within num_embeddings={num_embeddings}, got {padding_idx}")
        padding_idx %= num_embeddings
    return EmbeddingCall(
        weight,
        ids.to(torch.int64),
        position_table,
        positions,
        draw_dropout_state(check_dropout(dropout_p), generator, weight.device),
        offset,
        1.0 if scale is None else check_finite("scale", scale),
        NO_PADDING if padding_idx is None else padding_idx,
        float(dropout_p),
        backend,
    )


def empty_output(call: EmbeddingCall) -> Tensor:
    """Returns an uninitialised result, [..., seq_len, model_dim] in weight's dtype."""
    return call.weight.new_empty((*call.ids.shape, call.weight.shape[1]))


def empty_gradients(call: EmbeddingBackwardCall) -> list[Tensor | None]:
    """Returns the uninitialised gradients of weight and position table that are needed."""
    model_dim = call.dout.shape[-1]
    need_weight, need_table = call.needed
    return [
        call.dout.new_empty((call.num_embeddings, model_dim)) if need_weight else None,
        call.dout.new_empty((call.num_positions, model_dim), dtype=call.table_dtype) if need_table else None,
    ]


def _check_whole(name: str, value: object, weight: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.dtype not in _INTEGERS:
        raise TypeError(f"{name} must be int64 or int32, got {value.dtype}")
    if value.device != weight.device:
        raise TypeError(f"{name} must be on weight's device {weight.device}, got {value.device}")


def _table(table: Tensor, weight: Tensor) -> Tensor:
    check_tensor("position_table", table)
    if table.device != weight.device:
        raise TypeError(f"position_table must be on weight's device {weight.device}, got {table.device}")
    if table.dim() != 2 or table.shape[1] != weight.shape[1]:
        raise ValueError(
            f"position_table must be [num_positions, model_dim={weight.shape[1]}], got {list(table.shape)}"
        )
    # Kernels load a table of another precision as it is, but they accumulate in one type.
    if (table.dtype == torch.float64) != (weight.dtype == torch.float64):
        return table.to(lse_dtype(weight.dtype))
    return table


def _positions(positions: Tensor, offset: int, ids: Tensor, weight: Tensor) -> Tensor:
    _check_whole("positions", positions, weight)
    if offset != 0:
        raise ValueError(f"positions are given one by one: they go without an offset, got {offset}")
    if positions.shape == ids.shape[-1:]:
        return positions.to(torch.int64)
    if positions.dim() != ids.dim() or any(p not in (1, n) for p, n in zip(positions.shape, ids.shape, strict=True)):
        raise ValueError(
            f"positions must be [seq_len] or broadcastable to ids' shape {list(ids.shape)}, got {list(positions.shape)}"
        )
    return positions.to(torch.int64).expand(ids.shape).reshape(-1)
