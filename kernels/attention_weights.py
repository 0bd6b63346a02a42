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
from fastattn.kernels.tile import LN_2, LOG2_E, accumulator, finish_scores, load_rows, split_log_total, store_tile
from fastattn.spec.attention import empty_output
from fastattn.spec.attention_weights import WeightsCall, empty_result


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
    SIZE: tl.constexpr,
    DIM: tl.constexpr,
):
    """Writes the largest weights of a block of queries, falling, and their keys; of equal ones the first.

    It goes over the keys once for each: nothing is kept but the last one found.

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
    PRECISION: tl.constexpr,
    SIZE: tl.constexpr,
    DIM: tl.constexpr,
):
    """Writes the mean weight of a cell of pool_size queries and keys.

    Grid: cells of keys times cells of queries times batch * num_heads_q.

    Args:
        out: [batch, num_heads_q, cells of queries, cells of keys]; the others are those of :func:`_weights_kernel`.
    """
    cells_k, cells_q = tl.cdiv(problem.seq_len_k, pool_size), tl.cdiv(problem.seq_len_q, pool_size)
    first_column = tl.program_id(0) % cells_k * pool_size
    first_row = tl.program_id(0) // cells_k % cells_q * pool_size
    plane = tl.program_id(0) // cells_k // cells_q
    batch, head = plane // problem.num_heads_q, plane % problem.num_heads_q
    row_end = tl.minimum(first_row + pool_size, problem.seq_len_q)
    column_end = tl.minimum(first_column + pool_size, problem.seq_len_k)
    dtype: tl.constexpr = accumulator(query.data.dtype.element_ty)
    total = tl.zeros([SIZE], dtype)
    for row_begin in range(first_row, row_end, SIZE):
        row_begin = tl.multiple_of(row_begin, 1)
        for column_begin in range(first_column // 4 * 4, column_end, SIZE):
            column_begin = tl.multiple_of(column_begin, 4)
            p, _ = _weights(
                query, key, lse, problem, batch, head, row_begin, row_end, column_begin, column_end, head_dim,
                PRECISION, SIZE, DIM,
            )  # fmt: skip
            total += tl.where(column_begin + tl.arange(0, SIZE) >= first_column, tl.sum(p, axis=0), 0.0)
    mean = tl.sum(total, axis=0) / ((row_end - first_row).to(dtype) * (column_end - first_column).to(dtype))
    tl.store(out + tl.program_id(0).to(tl.int64), mean.to(out.dtype.element_ty))


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
        return _top_k_kernel, blocks * planes, both, options
    cells = result.shape[2] * result.shape[3] * planes
    return _pooled_kernel, cells, (*inputs, result, given, head_dim, call.pool_size), options


def attention_weights_fwd(call: WeightsCall) -> tuple[Tensor, Tensor]:
    """Returns ``(result, indices)`` of a call that is not empty; ``indices`` is empty but for "top_k"."""
    result, indices = empty_result(call)

    def start(tile: Tile) -> None:
        kernel, programs, arguments, options = _launched(call, result, indices, tile)
        kernel[(programs,)](*arguments, **options)

    device = architecture(call.attention.query.device)
    launch(f"attention_weights, {call.reduce}", tiles.choose(tiles.SQUARE, call.attention, device), start)
    return result, indices


def configurations(architecture: int) -> Iterator[Configuration]:
    """Yields each kernel with every tile of the table for an architecture."""
    for name, attention, tile in tiles.calls(tiles.SQUARE, architecture):
        bare = attention._replace(dropout_state=None, dropout_p=0.0)
        for reduce in ("none", "head_mean", "key_sum", "entropy", "top_k", "pooled"):
            call = WeightsCall(bare, empty_output(bare)[1], reduce, 4 if reduce == "top_k" else 0, 64)
            kernel, _, arguments, options = _launched(call, *empty_result(call), tile)
            yield Configuration(f"attention weights, {reduce} {name}", kernel, arguments, options)
