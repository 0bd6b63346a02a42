"""Gradients of biases that heads, batch entries or diagonals share: one program owns a tile of them, in one order.

``dbias = sum of dS``, over whatever the bias is broadcast along (``attention_backward.py`` says what dS is).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fastattn.kernels import masking, packing, tiles
from fastattn.kernels.arguments import broadcast, problem, view
from fastattn.kernels.launch import Configuration, Launch, Tile, architecture, cdiv, launch, padded, precision, run
from fastattn.kernels.scores import Statistics, empty_statistics, load_statistics, score_gradients
from fastattn.kernels.tile import accumulator, load_rows, store_tile
from fastattn.spec.attention import AttentionCall, empty_output


@triton.jit
def _tile(
    query, key, value, dout, shift, factor, delta, problem, head_dim, head_dim_v, batch, head, row_begin, column_begin,
    PRECISION: tl.constexpr, SIZE: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr,
):  # fmt: skip
    """Returns the gradients of a tile of scores [SIZE, SIZE]."""
    head_kv = head // problem.group_size
    limit = masking.key_end(problem.mask, batch, problem.seq_len_k)
    first_row = packing.first_row(problem, batch, head)
    statistics = load_statistics((shift, factor, delta), first_row, row_begin, problem.seq_len_q, SIZE, False, True)
    q = load_rows(query, batch, head, row_begin, problem.seq_len_q, head_dim, SIZE, DIM)
    do = load_rows(dout, batch, head, row_begin, problem.seq_len_q, head_dim_v, SIZE, DIM_V)
    k = load_rows(key, batch, head_kv, column_begin, limit, head_dim, SIZE, DIM)
    v = load_rows(value, batch, head_kv, column_begin, limit, head_dim_v, SIZE, DIM_V)
    _, _, ds, _ = score_gradients(
        problem,
        q,
        k,
        v,
        do,
        statistics,
        batch,
        head,
        row_begin,
        column_begin,
        limit,
        PRECISION,
        True,
        False,
        SIZE,
        SIZE,
    )
    return ds


@triton.jit
def _bias_bwd_kernel(
    query,
    key,
    value,
    dout,
    shift,
    factor,
    delta,
    dbias,
    problem,
    head_dim,
    head_dim_v,
    num_batches,
    bias_batches,
    bias_heads,
    PRECISION: tl.constexpr,
    SIZE: tl.constexpr,
    DIM: tl.constexpr,
    DIM_V: tl.constexpr,
):
    """Writes a tile of the gradient of a bias, summed over the batch entries and heads that share it.

    Grid: tiles of keys, times blocks of queries, times bias_batches * bias_heads.

    Args:
        query: View of [batch, num_heads_q, seq_len_q, head_dim]; likewise ``dout``; ``key`` and ``value`` of
            [batch, num_heads_kv, seq_len_k, ...].
        shift: what ``_attention_bwd_rows_kernel`` wrote; likewise ``factor`` and ``delta``.
        dbias: View of [bias_batches, bias_heads, seq_len_q, seq_len_k].
        problem: Problem.
    """
    tiles_k, blocks = tl.cdiv(problem.seq_len_k, SIZE), tl.cdiv(problem.seq_len_q, SIZE)
    column_begin = tl.program_id(0) % tiles_k * SIZE
    row_begin = tl.program_id(0) // tiles_k % blocks * SIZE
    plane = tl.program_id(0) // tiles_k // blocks
    batch, head = plane // bias_heads, plane % bias_heads
    total = tl.zeros([SIZE, SIZE], accumulator(query.data.dtype.element_ty))
    for other in range((num_batches // bias_batches) * (problem.num_heads_q // bias_heads)):
        # Where the bias has a batch entry or a head for each, there is one step of it.
        at_batch = batch + other // (problem.num_heads_q // bias_heads)
        at_head = head + other % (problem.num_heads_q // bias_heads)
        limit = masking.key_end(problem.mask, at_batch, problem.seq_len_k)
        begin, end = masking.key_range(problem.mask, row_begin, tl.minimum(row_begin + SIZE, problem.seq_len_q), limit)
        if (column_begin < end) & (column_begin + SIZE > begin):
            total += _tile(
                query, key, value, dout, shift, factor, delta, problem, head_dim, head_dim_v, at_batch, at_head,
                row_begin, column_begin, PRECISION, SIZE, DIM, DIM_V,
            )  # fmt: skip
    store_tile(dbias, batch, head, row_begin, column_begin, problem.seq_len_q, problem.seq_len_k, total, SIZE, SIZE)


@triton.jit
def _relative_bias_bwd_kernel(
    query,
    key,
    value,
    dout,
    shift,
    factor,
    delta,
    drelative,
    problem,
    head_dim,
    head_dim_v,
    num_batches,
    bias_heads,
    PRECISION: tl.constexpr,
    SIZE: tl.constexpr,
    DIM: tl.constexpr,
    DIM_V: tl.constexpr,
):
    """Writes the gradients of SIZE neighbouring diagonals, summed along them and over the heads that share them.

    Diagonals ``key - query`` of [first, first + SIZE) cross two tiles of each block of queries: rotating row r of a
    tile by r puts each diagonal into a column, part of it from the one tile and part from the other.

    Grid: groups of SIZE diagonals, the first beginning at the last multiple of SIZE that is not above the first
    diagonal; times bias_heads; times packed sequences.

    Args:
        drelative: [bias_heads, seq_len_q + seq_len_k - 1]; of packed sequences [bias_heads, tokens_q + tokens_k], those
            of each from where its queries and keys begin.
        num_batches: to sum over, 1 of packed sequences.

    The others are those of :func:`_bias_bwd_kernel`.
    """
    before = tl.cdiv(problem.seq_len_q - 1, SIZE)
    groups = before + tl.cdiv(problem.seq_len_k, SIZE)
    first = (tl.program_id(0) % groups - before) * SIZE
    head = tl.program_id(0) // groups % bias_heads
    batch = tl.program_id(0) // groups // bias_heads
    problem, batch = packing.own(problem, batch, packing.numbers(problem, batch))
    query = packing.at(problem, query, packing.queries(problem, query))
    key = packing.at(problem, key, packing.keys(problem, key))
    value = packing.at(problem, value, packing.keys(problem, value))
    dout = packing.at(problem, dout, packing.queries(problem, dout))
    diagonals = problem.seq_len_q + problem.seq_len_k - 1
    rows = tl.arange(0, SIZE)[:, None]
    turned = rows + tl.arange(0, SIZE)[None, :]
    dtype: tl.constexpr = accumulator(query.data.dtype.element_ty)
    total = tl.zeros([SIZE], dtype)
    seen = True
    if problem.mask.diag_lo is not None:
        seen = (first + SIZE > problem.mask.diag_lo) & (first <= problem.mask.diag_hi)
    if seen:
        for step in range(2 * num_batches * (problem.num_heads_q // bias_heads)):
            other, part = step // 2, step % 2
            at_batch = batch + other // (problem.num_heads_q // bias_heads)
            at_head = head + other % (problem.num_heads_q // bias_heads)
            limit = masking.key_end(problem.mask, at_batch, problem.seq_len_k)
            ahead = first + part * SIZE
            begin, end = tl.maximum(-ahead, 0), tl.minimum(problem.seq_len_q, limit - ahead)
            for row_begin in range(begin, end, SIZE):
                row_begin = tl.multiple_of(row_begin, SIZE)
                ds = _tile(
                    query, key, value, dout, shift, factor, delta, problem, head_dim, head_dim_v, at_batch, at_head,
                    row_begin, row_begin + ahead, PRECISION, SIZE, DIM, DIM_V,
                )  # fmt: skip
                here = (turned < SIZE) == (part == 0)
                total += tl.sum(tl.where(here, tl.gather(ds, turned % SIZE, axis=1), 0.0), axis=0)
    at = first + tl.arange(0, SIZE) + problem.seq_len_q - 1
    if problem.packing.starts_q is not None:
        to = drelative + head.to(tl.int64) * (problem.packing.tokens_q + problem.packing.tokens_k)
        to += problem.packing.begin_q + problem.packing.begin_k + at
    else:
        to = drelative + head.to(tl.int64) * diagonals + at
    tl.store(to, total.to(drelative.dtype.element_ty), mask=(at >= 0) & (at < diagonals))


@triton.jit
def _sum_sequences_kernel(x, out, problem, sequences, SIZE: tl.constexpr):
    """Writes the sums over packed sequences of what they give SIZE diagonals of the longest; in one order.

    Grid: tiles of diagonals times bias_heads.

    Args:
        x: what :func:`_relative_bias_bwd_kernel` wrote.
        out: [bias_heads, seq_len_q + seq_len_k - 1].
        problem: Problem.
    """
    diagonals = problem.seq_len_q + problem.seq_len_k - 1
    head = (tl.program_id(0) // tl.cdiv(diagonals, SIZE)).to(tl.int64)
    at = tl.program_id(0) % tl.cdiv(diagonals, SIZE) * SIZE + tl.arange(0, SIZE)
    start = x + head * (problem.packing.tokens_q + problem.packing.tokens_k)
    total = tl.zeros([SIZE], tl.float64)
    for sequence in range(sequences):
        begin_q, len_q, begin_k, len_k, _, _, _, _ = packing.numbers(problem, sequence)
        # All end at the last key.
        own = at - (problem.seq_len_k - len_k)
        inside = (own >= 0) & (own < len_q + len_k - 1)
        total += tl.load(start + (begin_q + begin_k) + own, mask=inside, other=0.0).to(tl.float64)
    tl.store(out + head * diagonals + at, total.to(out.dtype.element_ty), mask=at < diagonals)


def _common(call: AttentionCall, dout: Tensor, statistics: Statistics) -> tuple[Any, ...]:
    return (view(call.query), view(call.key), view(call.value), view(dout), *statistics)


def _numbers(call: AttentionCall) -> tuple[Any, ...]:
    batches = call.shape.batch if call.starts_q is None else 1
    return (problem(call), call.query.shape[3], call.value.shape[3], batches)


def _options(call: AttentionCall, tile: Tile) -> dict[str, Any]:
    dims = {"DIM": padded(call.query.shape[3]), "DIM_V": padded(call.value.shape[3])}
    return {"PRECISION": precision(), "SIZE": tile.rows, **dims, **tile.options}


def bias_gradient(call: AttentionCall, dout: Tensor, statistics: Statistics, dbias: Tensor) -> None:
    """Writes the gradient of a bias of [batch or 1, num_heads_q or 1, seq_len_q, seq_len_k].

    Args:
        call: the call.
        dout: gradient of its output.
        statistics: shift, factor and delta of ``_attention_bwd_rows_kernel``.
        dbias: to write to.
    """
    batches, heads, seq_len_q, seq_len_k = dbias.shape

    def start(tile: Tile) -> None:
        grid = (cdiv(seq_len_k, tile.columns) * cdiv(seq_len_q, tile.rows) * batches * heads,)
        _bias_bwd_kernel[grid](
            *_common(call, dout, statistics), broadcast(dbias), *_numbers(call), batches, heads, **_options(call, tile)
        )

    launch("attention_backward, bias", tiles.choose(tiles.SQUARE, call, architecture(dbias.device)), start)


def relative_bias_gradient(call: AttentionCall, dout: Tensor, statistics: Statistics, to: Tensor) -> None:
    """Writes the gradient of a ``relative_bias`` [num_heads_q or 1, diagonals]; see :func:`bias_gradient`."""
    heads = to.shape[0]
    batch, _, seq_len_q, seq_len_k = call.shape
    packed = call.starts_q is not None
    # Of packed sequences each writes its own first.
    tokens = call.query.shape[2] + call.key.shape[2]
    own = statistics[0].new_empty((heads, tokens)) if packed else to

    def start(tile: Tile) -> None:
        grid = ((cdiv(seq_len_q - 1, tile.rows) + cdiv(seq_len_k, tile.rows)) * heads * (batch if packed else 1),)
        _relative_bias_bwd_kernel[grid](
            *_common(call, dout, statistics), own, *_numbers(call), heads, **_options(call, tile)
        )

    launch("attention_backward, diagonals", tiles.choose(tiles.SQUARE, call, architecture(to.device)), start)
    if packed:
        run(_sequences_launch(call, own, to))


def _sequences_launch(call: AttentionCall, own: Tensor, to: Tensor) -> Launch:
    arguments = (own, to, problem(call), call.shape.batch)
    return _sum_sequences_kernel, (cdiv(to.shape[1], 128) * len(to),), arguments, {"SIZE": 128, "num_warps": 4}


def configurations(architecture: int) -> Iterator[Configuration]:
    """Yields each kernel with every tile of its table for an architecture."""
    for name, call, tile in tiles.calls(tiles.SQUARE, architecture, wanted=tiles.is_rich):
        out, lse = empty_output(call)
        statistics = empty_statistics(call, lse)
        _, _, seq_len_q, seq_len_k = call.shape
        bias = lse.new_empty((1, 1, seq_len_q, seq_len_k), dtype=call.query.dtype)
        common, numbers, options = _common(call, out, statistics), _numbers(call), _options(call, tile)
        yield Configuration(
            f"attention backward, bias {name}", _bias_bwd_kernel, (*common, broadcast(bias), *numbers, 1, 1), options
        )
        yield Configuration(
            f"attention backward, diagonals {name}",
            _relative_bias_bwd_kernel,
            (*common, bias.new_empty((1, seq_len_q + seq_len_k - 1)), *numbers, 1),
            options,
        )
    for name, call, tile in tiles.calls(tiles.SQUARE, architecture, packed=True, wanted=tiles.is_rich):
        out, lse = empty_output(call)
        statistics = empty_statistics(call, lse)
        own = statistics[0].new_empty((4, call.query.shape[2] + call.key.shape[2]))
        arguments = (*_common(call, out, statistics), own, *_numbers(call), 4)
        yield Configuration(
            f"attention backward, diagonals {name}", _relative_bias_bwd_kernel, arguments, _options(call, tile)
        )
        assert call.relative_bias is not None
        kernel, _, arguments, options = _sequences_launch(call, own, call.relative_bias)
        yield Configuration(f"attention backward, diagonals' sums {name}", kernel, arguments, options)
