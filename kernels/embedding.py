"""Rows of an embedding, scaled, with positions and dropout, and the gradients of both tables without atomics.

The backward sorts the tokens by the row that they came from; a program then owns a row of a gradient, adds up its
tokens in their order and writes it, once, also where it is 0.

Source: Vaswani et al., "Attention Is All You Need", 2017, sections 3.4 and 3.5.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn.kernels import philox
from fastattn.kernels.dropout import dropout_argument
from fastattn.kernels.launch import Configuration, Launch, run
from fastattn.kernels.numbers import number
from fastattn.kernels.replay import replayed
from fastattn.kernels.rows import matrix, power_of_two, warps
from fastattn.kernels.tile import accumulator
from fastattn.spec.embedding import EmbeddingBackwardCall, EmbeddingCall, empty_gradients, empty_output

# Elements of a tile: 16 bytes a thread of four warps, twice.
_TILE = 2048
# Columns of a tile, as many as a row's; a sum's tile has more rows instead, all of which are on their way at once.
_COLUMNS, _SUM_COLUMNS = 1024, 512
_SUM_TILE = 4096


@triton.jit(do_not_specialize=["offset"])
def embedding_forward(
    weight,
    ids,
    table,
    positions,
    out,
    dropout,
    weight_stride,
    table_stride,
    num_embeddings,
    num_positions,
    tokens,
    columns,
    period,
    offset,
    scale: tl.float64,
    rescale: tl.float64,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Writes a tile of ``dropout(scale * weight[ids] + table[positions])``; NaN for an id or a position without a row.

    Grid: all tiles of tokens and columns, those of a token one after another.

    Args:
        weight: [num_embeddings, columns], adjacent columns; likewise ``table`` of num_positions rows, or None.
        ids: int64 [tokens].
        positions: int64 [period], of token t at t % period; None for ``offset + t % period``.
        out: [tokens, columns], contiguous.
        dropout: Dropout, whose state is None for none.
    """
    dtype: tl.constexpr = accumulator(weight.dtype.element_ty)
    tiles = tl.cdiv(columns, COLUMNS)
    first_row = (tl.program_id(0) // tiles).to(tl.int64) * ROWS
    first_column = tl.program_id(0) % tiles * COLUMNS
    row = first_row + tl.arange(0, ROWS)
    column = first_column + tl.arange(0, COLUMNS)
    there = row < tokens
    inside = there[:, None] & (column < columns)[None, :]
    at = tl.load(ids + row, mask=there, other=0)
    known = (at >= 0) & (at < num_embeddings)
    values = tl.load(weight + at[:, None] * weight_stride + column[None, :], mask=inside & known[:, None], other=0.0)
    values = values.to(dtype) * number(scale, dtype)[:, None]
    if table is not None:
        at = row % period + offset
        if positions is not None:
            at = tl.load(positions + row % period, mask=there, other=0)
        known &= (at >= 0) & (at < num_positions)
        added = tl.load(table + at[:, None] * table_stride + column[None, :], mask=inside & known[:, None], other=0.0)
        values += added.to(dtype)
    if dropout.state is not None:
        keep = philox.keep(dropout, 0 * first_row, first_row, first_column, ROWS, COLUMNS)
        values = tl.where(keep, values * number(rescale, dtype)[:, None], 0.0)
    values = tl.where(known[:, None], values, float("nan"))
    tl.store(out + row[:, None] * columns + column[None, :], values.to(out.dtype.element_ty), mask=inside)


@triton.jit
def embedding_backward(
    dout,
    starts,
    order,
    grad,
    dropout,
    dout_stride,
    columns,
    padding,
    factor: tl.float64,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Writes a tile of columns of one row of a gradient: the sum of dout over its tokens, times ``factor``.

    Grid: rows of the gradient; tiles of columns, those of a row one after another, on the same axis.

    Args:
        dout: [tokens, columns], adjacent columns.
        starts: int64 [rows + 1]: row r is made of tokens ``order[starts[r]]`` to ``order[starts[r + 1] - 1]``.
        grad: [rows, columns], contiguous.
        padding: the row that is 0 in any case.
    """
    dtype: tl.constexpr = accumulator(dout.dtype.element_ty)
    tiles = tl.cdiv(columns, COLUMNS)
    row = (tl.program_id(0) // tiles).to(tl.int64)
    first_column = tl.program_id(0) % tiles * COLUMNS
    column = first_column + tl.arange(0, COLUMNS)
    begin = tl.load(starts + row)
    end = tl.load(starts + row + 1)
    end = tl.where(row == padding, begin, end)
    total = tl.zeros([ROWS, COLUMNS], dtype)
    for start in range(begin, end, ROWS):
        at = start + tl.arange(0, ROWS)
        token = tl.load(order + at, mask=at < end, other=0)
        inside = (at < end)[:, None] & (column < columns)[None, :]
        values = tl.load(dout + token[:, None] * dout_stride + column[None, :], mask=inside, other=0.0).to(dtype)
        if dropout.state is not None:
            keep = philox.keep_of(dropout, 0 * token[:, None], token[:, None], first_column, ROWS, COLUMNS)
            values = tl.where(keep, values, 0.0)
        total += values
    found = tl.sum(total, axis=0) * number(factor, dtype)
    tl.store(grad + row * columns + column, found.to(grad.dtype.element_ty), mask=column < columns)


@replayed
def embedding_fwd(call: EmbeddingCall) -> Tensor:
    """Returns the result of a canonical call, contiguous."""
    out = empty_output(call)
    run(_forward(call, out))
    return out


def embedding_bwd(call: EmbeddingBackwardCall) -> list[Tensor | None]:
    """Returns the gradients of weight and position table, None where not needed."""
    dweight, dtable = grads = empty_gradients(call)
    if dweight is not None:
        order, starts = _grouped(call.ids.reshape(-1), call.num_embeddings)
        run(_backward(call, dweight, order, starts, call.padding_idx, call.scale))
    if dtable is not None:
        order, starts = _grouped(_positions(call), call.num_positions)
        run(_backward(call, dtable, order, starts, -1, 1.0))
    return grads


def _grouped(keys: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Returns the tokens in the order of their rows, and where each row's begin and the last one's end.

    Keys that are no row come before the first or behind the last.
    """
    ordered, order = torch.sort(keys, stable=True)
    return order, torch.searchsorted(ordered, torch.arange(rows + 1, device=keys.device))


def _positions(call: EmbeddingBackwardCall) -> Tensor:
    """Returns the position of each token."""
    tokens = call.ids.numel()
    positions = call.positions
    if positions is None:
        positions = torch.arange(call.offset, call.offset + call.ids.shape[-1], device=call.ids.device)
    return positions.expand(tokens // len(positions), -1).reshape(-1)


def _forward(call: EmbeddingCall, out: Tensor) -> Launch:
    tokens, columns = call.ids.numel(), call.weight.shape[1]
    tile_columns = max(4, min(power_of_two(columns), _COLUMNS))
    tile_rows = min(power_of_two(tokens), max(1, _TILE // tile_columns))
    dropout = dropout_argument(call.dropout_state, call.dropout_p)
    weight, table = _adjacent(call.weight), None if call.position_table is None else _adjacent(call.position_table)
    arguments = (
        weight,
        call.ids.reshape(-1).contiguous(),
        table,
        None if call.positions is None else call.positions.contiguous(),
        out,
        dropout,
        weight.stride(0),
        0 if table is None else table.stride(0),
        len(weight),
        0 if table is None else len(table),
        tokens,
        columns,
        call.ids.shape[-1] if call.positions is None else call.positions.numel(),
        call.offset,
        call.scale,
        dropout.rescale,
    )
    options = {"ROWS": tile_rows, "COLUMNS": tile_columns, "num_warps": warps(tile_rows * tile_columns)}
    return embedding_forward, (-(-tokens // tile_rows) * -(-columns // tile_columns),), arguments, options


def _backward(
    call: EmbeddingBackwardCall, grad: Tensor, order: Tensor, starts: Tensor, padding: int, scale: float
) -> Launch:
    rows, columns = grad.shape
    dout = matrix(call.dout, columns)
    tile_columns = max(4, min(power_of_two(columns), _SUM_COLUMNS))
    tile_rows = max(1, min(32, _SUM_TILE // tile_columns))
    dropout = dropout_argument(call.dropout_state, call.dropout_p)
    arguments = (
        dout,
        starts,
        order,
        grad,
        dropout,
        dout.stride(0),
        columns,
        padding,
        scale * dropout.rescale,
    )
    options = {"ROWS": tile_rows, "COLUMNS": tile_columns, "num_warps": 4}
    return embedding_backward, (rows * -(-columns // tile_columns),), arguments, options


def _adjacent(table: Tensor) -> Tensor:
    """Returns ``table`` with adjacent columns."""
    return table if table.shape[1] <= 1 or table.stride(1) == 1 else table.contiguous()


def configurations(architecture: int) -> Iterator[Configuration]:
    """Yields the kernels for every size of element, with and without positions and dropout."""
    for dtype, columns, table, dropout_p in (
        (torch.bfloat16, 512, True, 0.1),
        (torch.bfloat16, 4096, False, 0.0),
        (torch.float32, 768, True, 0.1),
        (torch.float64, 512, True, 0.0),
    ):
        weight = torch.empty(32000, columns, dtype=dtype, device="meta")
        rows = weight.new_empty(1024, columns) if table else None
        ids = torch.empty(8, 1024, dtype=torch.int64, device="meta")
        state = torch.empty(2, dtype=torch.int64, device="meta") if dropout_p else None
        call = EmbeddingCall(weight, ids, rows, None, state, 0, 22.6, -1, dropout_p, "triton")
        dout = weight.new_empty(8, 1024, columns)
        backward = EmbeddingBackwardCall(
            dout, ids, None, state, 32000, 1024, dtype, 0, 22.6, -1, dropout_p, [True, True], "triton"
        )
        order, starts = ids.view(-1), torch.empty(32001, dtype=torch.int64, device="meta")
        kind = f"{dtype} {columns}{' positions' if table else ''}{' dropout' if dropout_p else ''}"
        for name, launch in (
            ("forward", _forward(call, dout)),
            ("backward", _backward(backward, weight, order, starts, -1, 22.6)),
        ):
            kernel, _, arguments, options = launch
            yield Configuration(f"embedding {name} {kind}".replace("torch.", ""), kernel, arguments, options)
