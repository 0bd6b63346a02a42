"""Attention forward: a block of queries against tiles of keys with a running softmax.

Source: Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018; Dao, "FlashAttention-2", 2023.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fastattn.kernels import masking, philox, tiles
from fastattn.kernels.arguments import problem, view
from fastattn.kernels.launch import Configuration, Tile, architecture, cdiv, launch, padded, precision
from fastattn.kernels.tile import (
    LN_2,
    LOG2_E,
    accumulator,
    add_seen,
    all_finite,
    block_and_plane,
    finish_scores,
    load_rows,
    store_rows,
)
from fastattn.spec.attention import AttentionCall, empty_output


@triton.jit
def _tiles(
    state,
    query,
    key,
    value,
    problem,
    batch,
    head,
    row_begin,
    begin,
    end,
    limit,
    head_dim,
    head_dim_v,
    PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
    POISONED: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_V: tl.constexpr,
):
    """Moves the state over the tiles of keys in [begin, end), multiples of KEYS.

    Args:
        state: ``(out, top, total)``: output before its division [ROWS, DIM_V], running maximum of the scores in powers
            of two and running sum of their exponentials [ROWS].
        MASKED: whether anything may be invisible.
        POISONED: whether values may be NaN or infinite where they are invisible.
    """
    out, top, total = state
    head_kv = head // problem.group_size
    rows = (row_begin + tl.arange(0, ROWS))[:, None]
    for start in range(begin, end, KEYS):
        start = tl.multiple_of(start, KEYS)
        columns = (start + tl.arange(0, KEYS))[None, :]
        k = load_rows(key, batch, head_kv, start, limit, head_dim, KEYS, DIM)
        product = tl.dot(query, tl.trans(k), input_precision=PRECISION, out_dtype=out.dtype)
        s, _ = finish_scores(problem, product, batch, head, rows, columns, limit, MASKED)
        now = tl.maximum(top, tl.max(s, axis=1))
        # -inf minus -inf is NaN: a row that has seen nothing yet subtracts 0.
        shift = tl.where(now == float("-inf"), 0.0, now)
        p = tl.exp2(s - shift[:, None])
        alpha = tl.exp2(top - shift)
        total = total * alpha + tl.sum(p, axis=1)
        top = now
        if problem.dropout.state is not None:
            plane = batch * problem.num_heads_q + head
            p = tl.where(philox.keep(problem.dropout, plane, row_begin, start, ROWS, KEYS), p, 0.0)
        v = load_rows(value, batch, head_kv, start, limit, head_dim_v, KEYS, DIM_V)
        out *= alpha[:, None]
        if POISONED:
            seen = masking.visible(
                problem.mask, batch, head, rows, columns, limit, problem.seq_len_q, problem.seq_len_k
            )
            out = add_seen(out, p, v, seen, KEYS)
        else:
            out = tl.dot(p.to(v.dtype), v, out, input_precision=PRECISION, out_dtype=out.dtype)
    return out, top, total


@triton.jit
def _attention_fwd_kernel(
    query,
    key,
    value,
    out,
    lse,
    sinks,
    problem,
    head_dim,
    head_dim_v,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_V: tl.constexpr,
):
    """Writes out and lse of a block of queries of one head.

    Grid: blocks of queries times batch * num_heads_q, as ``tile.block_and_plane`` takes it apart.

    Args:
        query: View of [batch, num_heads_q, seq_len_q, head_dim]; likewise ``key``, ``value`` and ``out``.
        lse: float64 [batch, num_heads_q, seq_len_q].
        sinks: [num_heads_q], or None.
        problem: Problem.
        PRECISION: how float32 is multiplied.
        ROWS: queries a block.
        KEYS: keys a tile.
        DIM: power of two that holds head_dim; DIM_V likewise.
    """
    block, plane = block_and_plane(problem.seq_len_q, ROWS)
    batch, head = plane // problem.num_heads_q, plane % problem.num_heads_q
    row_begin = block * ROWS
    row_end = tl.minimum(row_begin + ROWS, problem.seq_len_q)
    dtype: tl.constexpr = accumulator(query.data.dtype.element_ty)

    q = load_rows(query, batch, head, row_begin, problem.seq_len_q, head_dim, ROWS, DIM)
    state = (
        tl.zeros([ROWS, DIM_V], dtype),
        tl.full([ROWS], float("-inf"), dtype),
        tl.zeros([ROWS], dtype),
    )
    limit = masking.key_end(problem.mask, batch, problem.seq_len_k)
    first, last = masking.key_parts(problem.mask, row_begin, row_end, limit, KEYS)
    for part in tl.static_range(3):
        state = _tiles(
            state, q, key, value, problem, batch, head, row_begin, first[part], last[part], limit, head_dim,
            head_dim_v, PRECISION, part != 1, False, ROWS, KEYS, DIM, DIM_V,
        )  # fmt: skip
    result, top, total = state
    if masking.hides(problem.mask.diag_lo, problem.mask.key_lengths, problem.mask.segments_q, problem.mask.dense.data):
        if not all_finite(result):
            # Perhaps by a value that its row may not see: once more, touching only what may be seen.
            state = (tl.zeros([ROWS, DIM_V], dtype), tl.full([ROWS], float("-inf"), dtype), tl.zeros([ROWS], dtype))
            result, top, total = _tiles(
                state, q, key, value, problem, batch, head, row_begin, first[0], last[2], limit, head_dim, head_dim_v,
                PRECISION, True, True, ROWS, KEYS, DIM, DIM_V,
            )  # fmt: skip

    # A sink is one more score, without a value.
    shift = tl.where(top == float("-inf"), 0.0, top)
    nothing = total == 0
    total = tl.where(nothing, 1.0, total)
    log_total = tl.where(nothing, float("-inf"), shift.to(tl.float64) + tl.log2(total.to(tl.float64)))
    log_total = tl.where(top == float("inf"), float("inf"), log_total)
    factor = tl.where(nothing, 0.0, 1.0 / total)
    if sinks is not None:
        sink = tl.load(sinks + head).to(tl.float64) * LOG2_E
        greater = tl.maximum(log_total, sink)
        both = greater + tl.log2(tl.exp2(log_total - greater) + tl.exp2(sink - greater))
        both = tl.where(greater == float("-inf"), greater, both)
        factor = tl.where(nothing, 0.0, tl.exp2(shift.to(tl.float64) - both)).to(dtype)
        log_total = both
    if problem.dropout.state is not None:
        factor *= problem.dropout.rescale
    store_rows(out, batch, head, row_begin, problem.seq_len_q, head_dim_v, result * factor[:, None], ROWS, DIM_V)
    rows = row_begin + tl.arange(0, ROWS)
    tl.store(lse + plane.to(tl.int64) * problem.seq_len_q + rows, log_total * LN_2, mask=rows < problem.seq_len_q)


def _arguments(call: AttentionCall, out: Tensor, lse: Tensor) -> tuple[Any, ...]:
    return (
        view(call.query),
        view(call.key),
        view(call.value),
        view(out),
        lse,
        call.sinks,
        problem(call),
        call.query.shape[3],
        call.value.shape[3],
    )


def _options(call: AttentionCall, tile: Tile) -> dict[str, Any]:
    dims = {"DIM": padded(call.query.shape[3]), "DIM_V": padded(call.value.shape[3])}
    return {"PRECISION": precision(), "ROWS": tile.rows, "KEYS": tile.columns, **dims, **tile.options}


def attention_fwd(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Returns ``(out, lse)`` of a call that is not empty."""
    out, lse = empty_output(call)
    batch, num_heads_q, seq_len_q, _ = call.shape
    arguments = _arguments(call, out, lse)

    def start(tile: Tile) -> None:
        grid = (cdiv(seq_len_q, tile.rows) * batch * num_heads_q,)
        _attention_fwd_kernel[grid](*arguments, **_options(call, tile))

    launch("attention", tiles.choose(tiles.FORWARD, call, architecture(call.query.device)), start)
    return out, lse


def configurations(architecture: int) -> Iterator[Configuration]:
    """Yields the kernel with every tile of its table for an architecture."""
    for name, call, tile in tiles.calls(tiles.FORWARD, architecture):
        out, lse = empty_output(call)
        yield Configuration(
            f"attention forward {name}", _attention_fwd_kernel, _arguments(call, out, lse), _options(call, tile)
        )
