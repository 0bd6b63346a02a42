"""Attention weights, whole or reduced, a tile at a time: ``P = exp(S - lse)`` over visible keys, 0 elsewhere.

Every result has one program that adds it up, in one order. No program holds more than a tile of any head's weights.

Source: Dao, "FlashAttention-2", 2023, section 3.2 (recomputing P from the lse).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn.kernels import masking, philox, tiles
from fastattn.kernels.arguments import number, problem, view
from fastattn.kernels.launch import Configuration, Tile, architecture, cdiv, launch, padded, precision
from fastattn.kernels.tile import (
    LN_2,
    LOG2_E,
    accumulator,
    all_finite,
    finish_scores,
    load_rows,
    split_log_total,
    store_tile,
)
from fastattn.spec.attention import empty_output, lse_dtype
from fastattn.spec.attention_weights import WeightsCall, empty_result

# Of the largest weights, how many a program keeps while it goes over the keys.
MOST_RANKS = 32


@triton.jit
def _weights(
    query, key, lse, problem, batch, head, row_begin, row_end, column_begin, column_end, head_dim,
    PRECISION: tl.constexpr, SIZE: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Returns a tile of weights [SIZE, SIZE], 0 from row ``row_end`` and column ``column_end`` on, and their logarithms
    in powers of two (0 where the weight is 0). ``column_begin`` is a multiple of 4."""
    rows = row_begin + tl.arange(0, SIZE)
    columns = column_begin + tl.arange(0, SIZE)
    dtype: tl.constexpr = accumulator(query.data.dtype.element_ty)
    at = lse + (batch * problem.num_heads_q + head).to(tl.int64) * problem.seq_len_q
    log_total = tl.load(at + rows, mask=rows < row_end, other=float("-inf")) * LOG2_E
    empty = log_total == float("-inf")
    whole, rest = split_log_total(log_total)
    q = load_rows(query, batch, head, row_begin, row_end, head_dim, SIZE, DIM)
    limit = tl.minimum(masking.key_end(problem.mask, batch, problem.seq_len_k), column_end)
    k = load_rows(key, batch, head // problem.group_size, column_begin, limit, head_dim, SIZE, DIM)
    product = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=dtype)
    s, _ = finish_scores(problem, product, batch, head, rows[:, None], columns[None, :], limit, True)
    seen = s != float("-inf")
    s -= whole.to(dtype)[:, None]
    p = tl.exp2(s) * tl.exp2(rest).to(dtype)[:, None]
    there = (rows < row_end)[:, None] & seen & (empty == 0)[:, None]
    log_p = s + rest.to(dtype)[:, None]
    if problem.dropout.state is not None:
        plane = batch * problem.num_heads_q + head
        there &= philox.keep(problem.dropout, plane, row_begin, column_begin, SIZE, SIZE)
        p *= problem.dropout.rescale
        log_p += tl.log2(tl.full([1, 1], problem.dropout.rescale, dtype))
    p = tl.where(there, p, 0.0)
    return p, tl.where(p == 0, 0.0, log_p)


@triton.jit
def _weights_kernel(
    query,
    key,
    lse,
    out,
    problem,
    head_dim,
    summed_heads,
    factor,
    PRECISION: tl.constexpr,
    SIZE: tl.constexpr,
    DIM: tl.constexpr,
):
    """Writes a tile of weights, summed over neighbouring heads.

    Grid: tiles of keys times blocks of queries times batch * (num_heads_q // summed_heads).

    Args:
        query: View of [batch, num_heads_q, seq_len_q, head_dim]; ``key`` of [batch, num_heads_kv, seq_len_k, head_dim].
        lse: float64 [batch, num_heads_q, seq_len_q].
        out: View of [batch, num_heads_q // summed_heads, seq_len_q, seq_len_k].
        problem: Problem.
        factor: what sums are multiplied by.
    """
    tiles_k, blocks = tl.cdiv(problem.seq_len_k, SIZE), tl.cdiv(problem.seq_len_q, SIZE)
    column_begin = tl.program_id(0) % tiles_k * SIZE
    row_begin = tl.program_id(0) // tiles_k % blocks * SIZE
    plane = tl.program_id(0) // tiles_k // blocks
    heads = problem.num_heads_q // summed_heads
    batch, group = plane // heads, plane % heads
    total = tl.zeros([SIZE, SIZE], accumulator(query.data.dtype.element_ty))
    for member in range(summed_heads):
        p, _ = _weights(
            query, key, lse, problem, batch, group * summed_heads + member, row_begin, problem.seq_len_q, column_begin,
            problem.seq_len_k, head_dim, PRECISION, SIZE, DIM,
        )  # fmt: skip
        total += p
    total *= factor
    store_tile(out, batch, group, row_begin, column_begin, problem.seq_len_q, problem.seq_len_k, total, SIZE, SIZE)


@triton.jit
def _key_sum_kernel(
    query, key, lse, out, problem, head_dim, PRECISION: tl.constexpr, SIZE: tl.constexpr, DIM: tl.constexpr
):
    """Writes what a tile of keys receives of all queries.

    Grid: tiles of keys times batch * num_heads_q.

    Args:
        out: [batch, num_heads_q, seq_len_k]; the others are those of :func:`_weights_kernel`.
    """
    tiles_k = tl.cdiv(problem.seq_len_k, SIZE)
    column_begin, plane = tl.program_id(0) % tiles_k * SIZE, tl.program_id(0) // tiles_k
    batch, head = plane // problem.num_heads_q, plane % problem.num_heads_q
    limit = masking.key_end(problem.mask, batch, problem.seq_len_k)
    begin, end = masking.query_range(problem.mask, column_begin, column_begin + SIZE, limit, problem.seq_len_q)
    total = tl.zeros([SIZE], accumulator(query.data.dtype.element_ty))
    for row_begin in range(begin // SIZE * SIZE, end, SIZE):
        row_begin = tl.multiple_of(row_begin, SIZE)
        p, _ = _weights(
            query, key, lse, problem, batch, head, row_begin, problem.seq_len_q, column_begin, problem.seq_len_k,
            head_dim, PRECISION, SIZE, DIM,
        )  # fmt: skip
        total += tl.sum(p, axis=0)
    columns = column_begin + tl.arange(0, SIZE)
    to = out + plane.to(tl.int64) * problem.seq_len_k + columns
    tl.store(to, total.to(out.dtype.element_ty), mask=columns < problem.seq_len_k)


@triton.jit
def _entropy_kernel(
    query, key, lse, out, problem, head_dim, PRECISION: tl.constexpr, SIZE: tl.constexpr, DIM: tl.constexpr
):
    """Writes the entropy of a block of queries, in nats.

    Grid: blocks of queries times batch * num_heads_q.

    Args:
        out: [batch, num_heads_q, seq_len_q]; the others are those of :func:`_weights_kernel`.
    """
    blocks = tl.cdiv(problem.seq_len_q, SIZE)
    row_begin, plane = tl.program_id(0) % blocks * SIZE, tl.program_id(0) // blocks
    batch, head = plane // problem.num_heads_q, plane % problem.num_heads_q
    limit = masking.key_end(problem.mask, batch, problem.seq_len_k)
    begin, end = masking.key_range(problem.mask, row_begin, tl.minimum(row_begin + SIZE, problem.seq_len_q), limit)
    total = tl.zeros([SIZE], accumulator(query.data.dtype.element_ty))
    for column_begin in range(begin // SIZE * SIZE, end, SIZE):
        column_begin = tl.multiple_of(column_begin, SIZE)
        p, log_p = _weights(
            query, key, lse, problem, batch, head, row_begin, problem.seq_len_q, column_begin, problem.seq_len_k,
            head_dim, PRECISION, SIZE, DIM,
        )  # fmt: skip
        total += tl.sum(p * log_p, axis=1)
    rows = row_begin + tl.arange(0, SIZE)
    to = out + plane.to(tl.int64) * problem.seq_len_q + rows
    tl.store(to, (total * -LN_2).to(out.dtype.element_ty), mask=rows < problem.seq_len_q)


@triton.jit
def _top_k_kernel(
    query,
    key,
    lse,
    out,
    indices,
    problem,
    head_dim,
    top_k,
    PRECISION: tl.constexpr,
    RANKS: tl.constexpr,
    SIZE: tl.constexpr,
    DIM: tl.constexpr,
):
    """Writes the largest weights of a block of queries, falling, and their keys; of equal ones the first.

    It goes over the keys once for every RANKS of them. A weight and its key are one number of 64 bits, the weight's
    above, so that the best of a tile and the best so far are sorted as they are; a tile without any better one, as most
    are after a few, is not sorted.

    Grid: blocks of queries times batch * num_heads_q.

    Args:
        out: [batch, num_heads_q, seq_len_q, top_k]; likewise ``indices``, int64; the others are those of
            :func:`_weights_kernel`.
        RANKS: power of two, at most SIZE.
    """
    blocks = tl.cdiv(problem.seq_len_q, SIZE)
    row_begin, plane = tl.program_id(0) % blocks * SIZE, tl.program_id(0) // blocks
    batch, head = plane // problem.num_heads_q, plane % problem.num_heads_q
    limit = masking.key_end(problem.mask, batch, problem.seq_len_k)
    begin, end = masking.key_range(problem.mask, row_begin, tl.minimum(row_begin + SIZE, problem.seq_len_q), limit)
    rows = row_begin + tl.arange(0, SIZE)
    last = tl.full([SIZE], 0x7FFFFFFFFFFFFFFF, tl.int64)
    for first in range(0, top_k, RANKS):
        best = tl.zeros([SIZE, RANKS], tl.int64)
        is_nan = tl.zeros([SIZE], tl.int32)
        for column_begin in range(begin // SIZE * SIZE, end, SIZE):
            column_begin = tl.multiple_of(column_begin, SIZE)
            p, _ = _weights(
                query, key, lse, problem, batch, head, row_begin, problem.seq_len_q, column_begin, problem.seq_len_k,
                head_dim, PRECISION, SIZE, DIM,
            )  # fmt: skip
            is_nan = tl.maximum(is_nan, tl.max((p != p).to(tl.int32), axis=1))
            columns = (column_begin + tl.arange(0, SIZE))[None, :]
            # Bits of positive numbers are ordered as the numbers are; a key that comes first counts for more.
            found = (p.to(tl.int32, bitcast=True).to(tl.int64) << 32) + (0x7FFFFFFF - columns).to(tl.int64)
            found = tl.where((p > 0) & (found < last[:, None]), found, 0)
            if tl.max((found > tl.min(best, axis=1)[:, None]).to(tl.int32)) != 0:
                both = tl.join(best, tl.topk(found, RANKS))
                best = tl.topk(tl.reshape(both, [SIZE, 2 * RANKS]), RANKS)
        ranks = first + tl.arange(0, RANKS)
        to = (plane.to(tl.int64) * problem.seq_len_q + rows)[:, None] * top_k + ranks[None, :]
        inside = (rows < problem.seq_len_q)[:, None] & (ranks < top_k)[None, :]
        weight = (best >> 32).to(tl.int32).to(tl.float32, bitcast=True)
        weight = tl.where(is_nan[:, None] != 0, float("nan"), weight)
        tl.store(out + to, weight.to(out.dtype.element_ty), mask=inside)
        tl.store(indices + to, tl.where(best == 0, -1, 0x7FFFFFFF - (best & 0x7FFFFFFF)), mask=inside)
        last = tl.min(best, axis=1)


@triton.jit
def _top_k_float64_kernel(
    query,
    key,
    lse,
    out,
    indices,
    problem,
    head_dim,
    top_k,
    PRECISION: tl.constexpr,
    SIZE: tl.constexpr,
    DIM: tl.constexpr,
):
    """What :func:`_top_k_kernel` writes, for weights whose bits leave no room for a key's number beside them.

    It goes over the keys once for each rank: nothing is kept but the last one found.

    Grid: blocks of queries times batch * num_heads_q.

    Args:
        out: [batch, num_heads_q, seq_len_q, top_k]; likewise ``indices``, int64; the others are those of
            :func:`_weights_kernel`.
    """
    blocks = tl.cdiv(problem.seq_len_q, SIZE)
    row_begin, plane = tl.program_id(0) % blocks * SIZE, tl.program_id(0) // blocks
    batch, head = plane // problem.num_heads_q, plane % problem.num_heads_q
    limit = masking.key_end(problem.mask, batch, problem.seq_len_k)
    begin, end = masking.key_range(problem.mask, row_begin, tl.minimum(row_begin + SIZE, problem.seq_len_q), limit)
    rows = row_begin + tl.arange(0, SIZE)
    dtype: tl.constexpr = accumulator(query.data.dtype.element_ty)
    found = tl.full([SIZE], float("inf"), dtype)
    where = tl.full([SIZE], -1, tl.int32)
    for rank in range(top_k):
        best = tl.zeros([SIZE], dtype)
        best_at = tl.full([SIZE], -1, tl.int32)
        is_nan = tl.zeros([SIZE], tl.int32)
        for column_begin in range(begin // SIZE * SIZE, end, SIZE):
            column_begin = tl.multiple_of(column_begin, SIZE)
            p, _ = _weights(
                query, key, lse, problem, batch, head, row_begin, problem.seq_len_q, column_begin, problem.seq_len_k,
                head_dim, PRECISION, SIZE, DIM,
            )  # fmt: skip
            is_nan = tl.maximum(is_nan, tl.max((p != p).to(tl.int32), axis=1))
            columns = (column_begin + tl.arange(0, SIZE))[None, :]
            left = (p < found[:, None]) | ((p == found[:, None]) & (columns > where[:, None]))
            p = tl.where(left, p, 0.0)
            largest = tl.max(p, axis=1)
            at = tl.min(tl.where(p == largest[:, None], columns, 2147483647), axis=1)
            better = largest > best
            best, best_at = tl.where(better, largest, best), tl.where(better, at, best_at)
        to = (plane.to(tl.int64) * problem.seq_len_q + rows) * top_k + rank
        shown = tl.where(is_nan != 0, float("nan"), best)
        tl.store(out + to, shown.to(out.dtype.element_ty), mask=rows < problem.seq_len_q)
        tl.store(indices + to, best_at.to(tl.int64), mask=rows < problem.seq_len_q)
        found, where = best, best_at


@triton.jit
def _pooled_kernel(
    query,
    key,
    lse,
    out,
    problem,
    head_dim,
    pool_size,
    side,
    PRECISION: tl.constexpr,
    CELLS: tl.constexpr,
    SIZE: tl.constexpr,
    DIM: tl.constexpr,
):
    """Writes the mean weights of cells of pool_size queries and keys.

    Grid: squares of ``side`` times ``side`` cells, those along the keys first, times batch * num_heads_q.

    Args:
        out: [batch, num_heads_q, cells of queries, cells of keys]; the others are those of :func:`_weights_kernel`.
        side: 1, or as many cells as fit a tile.
        CELLS: power of two, from 16 on where it is not 1, that holds ``side``.
    """
    cells_q, cells_k = tl.cdiv(problem.seq_len_q, pool_size), tl.cdiv(problem.seq_len_k, pool_size)
    squares_q, squares_k = tl.cdiv(cells_q, side), tl.cdiv(cells_k, side)
    first_k = tl.program_id(0) % squares_k * side
    first_q = tl.program_id(0) // squares_k % squares_q * side
    plane = tl.program_id(0) // squares_k // squares_q
    batch, head = plane // problem.num_heads_q, plane % problem.num_heads_q
    first_row, first_column = first_q * pool_size, first_k * pool_size
    row_end = tl.minimum(first_row + side * pool_size, problem.seq_len_q)
    column_end = tl.minimum(first_column + side * pool_size, problem.seq_len_k)
    dtype: tl.constexpr = accumulator(query.data.dtype.element_ty)
    each = tl.arange(0, CELLS)
    total, lost = tl.zeros([CELLS, CELLS], dtype), tl.zeros([CELLS, CELLS], dtype)
    for row_begin in range(first_row, row_end, SIZE):
        row_begin = tl.multiple_of(row_begin, 1)
        # Dropout draws four columns at a time.
        for column_begin in range(first_column // 4 * 4, column_end, SIZE):
            column_begin = tl.multiple_of(column_begin, 4)
            p, _ = _weights(
                query, key, lse, problem, batch, head, row_begin, row_end, column_begin, column_end, head_dim,
                PRECISION, SIZE, DIM,
            )  # fmt: skip
            columns = column_begin + tl.arange(0, SIZE)
            p = tl.where((columns >= first_column)[None, :], p, 0.0)
            if CELLS == 1:
                total += tl.sum(p)
            else:
                of_row = (row_begin + tl.arange(0, SIZE) - first_row) // pool_size
                of_column = tl.maximum(columns - first_column, 0) // pool_size
                queries = (each[:, None] == of_row[None, :]).to(dtype)
                keys = (of_column[:, None] == each[None, :]).to(dtype)
                # 0 * NaN is NaN: a weight that is not finite is counted, and lost to its cell alone.
                finite = p - p == 0
                part = tl.dot(queries, tl.where(finite, p, 0.0), input_precision="ieee", out_dtype=dtype)
                total = tl.dot(part, keys, total, input_precision="ieee", out_dtype=dtype)
                if not all_finite(p):
                    part = tl.dot(
                        queries, tl.where(finite, 0.0, 1.0).to(dtype), input_precision="ieee", out_dtype=dtype
                    )
                    lost = tl.dot(part, keys, lost, input_precision="ieee", out_dtype=dtype)
    at_q, at_k = first_q + each, first_k + each
    high = tl.minimum((at_q + 1) * pool_size, problem.seq_len_q) - at_q * pool_size
    wide = tl.minimum((at_k + 1) * pool_size, problem.seq_len_k) - at_k * pool_size
    inside = ((each < side) & (at_q < cells_q))[:, None] & ((each < side) & (at_k < cells_k))[None, :]
    mean = tl.where(lost > 0, float("nan"), total) / (high.to(dtype)[:, None] * wide.to(dtype)[None, :])
    to = (plane.to(tl.int64) * cells_q + at_q)[:, None] * cells_k + at_k[None, :]
    tl.store(out + to, mean.to(out.dtype.element_ty), mask=inside)


def _launched(
    call: WeightsCall, result: Tensor, indices: Tensor, tile: Tile
) -> tuple[Any, int, tuple[Any, ...], dict[str, Any]]:
    """Returns ``(kernel, grid, arguments, options)`` for a call's reduction."""
    attention = call.attention
    batch, heads, seq_len_q, seq_len_k = attention.shape
    lse = call.lse.to(torch.float64).contiguous()
    inputs = (view(attention.query), view(attention.key), lse)
    size, planes, head_dim = tile.rows, batch * heads, attention.query.shape[3]
    options = {"PRECISION": precision(), "SIZE": size, "DIM": padded(head_dim), **tile.options}
    blocks, tiles_k, given = cdiv(seq_len_q, size), cdiv(seq_len_k, size), problem(attention)
    if call.reduce in ("none", "head_mean"):
        summed = heads if call.reduce == "head_mean" else 1
        out = view(result if call.reduce == "none" else result[:, None])
        sums = (*inputs, out, given, head_dim, summed, number(1.0 / summed, attention.query.dtype))
        return _weights_kernel, tiles_k * blocks * planes // summed, sums, options
    if call.reduce == "key_sum":
        return _key_sum_kernel, tiles_k * planes, (*inputs, result, given, head_dim), options
    if call.reduce == "entropy":
        return _entropy_kernel, blocks * planes, (*inputs, result, given, head_dim), options
    if call.reduce == "top_k":
        both = (*inputs, result, indices, given, head_dim, call.top_k)
        if lse_dtype(attention.query.dtype) == torch.float64:
            return _top_k_float64_kernel, blocks * planes, both, options
        ranks = max(4, min(MOST_RANKS, size, 1 << (call.top_k - 1).bit_length()))
        return _top_k_kernel, blocks * planes, both, {"RANKS": ranks, **options}
    # Cells begin at any column, and a tile at a multiple of 4.
    side = max(1, (size if call.pool_size % 4 == 0 else size - 3) // call.pool_size)
    squares = cdiv(result.shape[2], side) * cdiv(result.shape[3], side) * planes
    arguments = (*inputs, result, given, head_dim, call.pool_size, side)
    return _pooled_kernel, squares, arguments, {"CELLS": padded(side) if side > 1 else 1, **options}


def attention_weights_fwd(call: WeightsCall) -> tuple[Tensor, Tensor]:
    """Returns ``(result, indices)`` of a call that is not empty; ``indices`` is empty but for "top_k"."""
    result, indices = empty_result(call)

    def start(tile: Tile) -> None:
        kernel, programs, arguments, options = _launched(call, result, indices, tile)
        kernel[(programs,)](*arguments, **options)

    device = architecture(call.attention.query.device)
    launch(f"attention_weights, {call.reduce}", tiles.choose(tiles.WEIGHTS, call.attention, device), start)
    return result, indices


def configurations(architecture: int) -> Iterator[Configuration]:
    """Yields each kernel with every tile of the table for an architecture."""
    for name, attention, tile in tiles.calls(tiles.WEIGHTS, architecture, wanted=tiles.is_rich):
        bare = attention._replace(dropout_state=None, dropout_p=0.0)
        for reduce in ("none", "head_mean", "key_sum", "entropy", "top_k", "pooled"):
            call = WeightsCall(bare, empty_output(bare)[1], reduce, 4 if reduce == "top_k" else 0, 64)
            kernel, _, arguments, options = _launched(call, *empty_result(call), tile)
            yield Configuration(f"attention weights, {reduce} {name}", kernel, arguments, options)
