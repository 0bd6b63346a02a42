"""Attention backward, without atomics: every sum has one owner and one order.

    S = Q K^T, P = exp(S - lse), dP = dO V^T, dS = P (dP - delta);  dV = P^T dO, dK = dS^T Q, dQ = dS K

``_attention_bwd_rows_kernel`` prepares three numbers a query. ``_attention_bwd_keys_kernel`` owns a tile of keys
and values and goes over the queries that see it; ``_attention_bwd_queries_kernel`` owns a block of queries and goes
over their keys. Scores are computed by both: that costs two products of seven and saves both the atomics and a buffer
of partial sums. ``attention_bias_backward.py`` has the gradients of biases that many queries or heads share.

Source: Dao, "FlashAttention-2", 2023, algorithm 2.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn.kernels import masking, tiles
from fastattn.kernels.arguments import broadcast, number, problem, view
from fastattn.kernels.attention_bias_backward import bias_gradient, relative_bias_gradient
from fastattn.kernels.launch import Configuration, Tile, architecture, cdiv, launch, padded, precision
from fastattn.kernels.scores import empty_statistics, load_statistics, score_gradients
from fastattn.kernels.tile import (
    LOG2_E,
    accumulator,
    add_seen,
    all_finite,
    block_and_plane,
    load_rows,
    split_log_total,
    store_rows,
    store_tile,
)
from fastattn.spec.attention import DIFFERENTIABLE, AttentionCall, empty_output


@triton.jit
def _attention_bwd_rows_kernel(
    query,
    key,
    value,
    out,
    dout,
    lse,
    dlse,
    sinks,
    shift,
    factor,
    delta,
    problem,
    head_dim,
    head_dim_v,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_V: tl.constexpr,
):
    """Writes what the other kernels need of each query: a probability is ``exp2(score - shift) * factor``, and
    ``delta = sum(dout * out) - dlse``.

    The whole powers of two of lse are in the shift and the rest in the factor, so that nothing of lse is rounded away.
    ``dP - delta`` cancels where few keys share the weight: a block of queries all of whose keys lie in one tile takes
    ``sum(P dP)`` of the very dP that the other kernels compute, so that what should cancel does.

    Grid: blocks of queries times batch * num_heads_q.

    Args:
        query: View of [batch, num_heads_q, seq_len_q, head_dim]; ``out`` and ``dout`` of [..., head_dim_v]; ``key`` and
            ``value`` of [batch, num_heads_kv, seq_len_k, ...].
        lse: float64 [batch, num_heads_q, seq_len_q]; likewise ``dlse``, or None.
        sinks: [num_heads_q], or None.
        shift: like lse, in the dtype of accumulators; likewise ``factor`` and ``delta``.
        problem: Problem.
    """
    block, plane = block_and_plane(problem.seq_len_q, ROWS)
    batch, head = plane // problem.num_heads_q, plane % problem.num_heads_q
    dtype: tl.constexpr = accumulator(out.data.dtype.element_ty)
    begin = block * ROWS
    do = load_rows(dout, batch, head, begin, problem.seq_len_q, head_dim_v, ROWS, DIM_V)
    rows = begin + tl.arange(0, ROWS)
    first_row = plane.to(tl.int64) * problem.seq_len_q
    inside = rows < problem.seq_len_q
    log_total = tl.load(lse + first_row + rows, mask=inside, other=float("-inf")) * LOG2_E
    empty = log_total == float("-inf")
    whole, rest = split_log_total(log_total)
    # An empty row has no probabilities, whatever its scores.
    share = tl.where(empty, 0.0, tl.exp2(rest)).to(dtype)
    whole = whole.to(dtype)

    limit = masking.key_end(problem.mask, batch, problem.seq_len_k)
    row_end = tl.minimum(begin + ROWS, problem.seq_len_q)
    parts = masking.key_parts(problem.mask, begin, row_end, limit, KEYS)
    column_begin, column_end = parts[0], parts[3]
    if column_end - column_begin <= KEYS:
        head_kv = head // problem.group_size
        q = load_rows(query, batch, head, begin, problem.seq_len_q, head_dim, ROWS, DIM)
        k = load_rows(key, batch, head_kv, column_begin, limit, head_dim, KEYS, DIM)
        v = load_rows(value, batch, head_kv, column_begin, limit, head_dim_v, KEYS, DIM_V)
        p, _, weighted, _ = score_gradients(
            problem, q, k, v, do, whole, share, tl.zeros([ROWS], dtype), batch, head, begin, column_begin, limit,
            PRECISION, True, False, ROWS, KEYS,
        )  # fmt: skip
        d = tl.sum(weighted, axis=1)
        if sinks is None:
            # They add up to 1 but for rounding, which is as large as what should cancel.
            d /= tl.where(empty, 1.0, tl.sum(p, axis=1))
    else:
        o = load_rows(out, batch, head, begin, problem.seq_len_q, head_dim_v, ROWS, DIM_V)
        d = tl.sum(o.to(dtype) * do.to(dtype), axis=1)
    if dlse is not None:
        d -= tl.load(dlse + first_row + rows, mask=inside, other=0.0).to(dtype)
    tl.store(shift + first_row + rows, whole, mask=inside)
    tl.store(factor + first_row + rows, share, mask=inside)
    tl.store(delta + first_row + rows, tl.where(empty, 0.0, d), mask=inside)


@triton.jit
def _add_queries(
    state, query, key_tile, value_tile, dout, statistics, problem, batch, head, column_begin, begin, end,
    gap_begin, gap, limit, head_dim, head_dim_v, PRECISION: tl.constexpr, MASKED: tl.constexpr,
    POISONED: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr,
):  # fmt: skip
    """Adds the share of the queries in [begin, end) to ``state = (dk, dv, db)``, but for ``gap`` from ``gap_begin`` on;
    all but ``end`` are multiples of ROWS."""
    dk, dv, db = state
    for at in range(begin, end - gap, ROWS):
        start = tl.multiple_of(tl.where(at < gap_begin, at, at + gap), ROWS)
        q = load_rows(query, batch, head, start, problem.seq_len_q, head_dim, ROWS, DIM, MASKED)
        do = load_rows(dout, batch, head, start, problem.seq_len_q, head_dim_v, ROWS, DIM_V, MASKED)
        shift, factor, delta = load_statistics(statistics, start, problem.seq_len_q, ROWS)
        _, p, ds, dx = score_gradients(
            problem, q, key_tile, value_tile, do, shift, factor, delta, batch, head, start, column_begin, limit,
            PRECISION, MASKED, True, ROWS, KEYS,
        )  # fmt: skip
        db += tl.sum(ds, axis=1)
        if POISONED:
            rows = (start + tl.arange(0, ROWS))[None, :]
            columns = (column_begin + tl.arange(0, KEYS))[:, None]
            seen = masking.visible(
                problem.mask, batch, head, rows, columns, limit, problem.seq_len_q, problem.seq_len_k
            )
            dv = add_seen(dv, p, do, seen)
            dk = add_seen(dk, dx, q, seen)
        else:
            dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION, out_dtype=dv.dtype)
            dk = tl.dot(dx.to(q.dtype), q, dk, input_precision=PRECISION, out_dtype=dk.dtype)
    return dk, dv, db


@triton.jit
def _attention_bwd_keys_kernel(
    query,
    key,
    value,
    dout,
    shift,
    factor,
    delta,
    dkey,
    dvalue,
    dbias,
    problem,
    scale,
    head_dim,
    head_dim_v,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_V: tl.constexpr,
):
    """Writes the gradients of a tile of keys and values: summed over queries, then over the heads of their group.

    Grid: tiles of keys times batch * num_heads_kv.

    Args:
        query: View of [batch, num_heads_q, seq_len_q, head_dim]; likewise ``dout``; ``key`` and ``value`` of
            [batch, num_heads_kv, seq_len_k, ...], as ``dkey`` and ``dvalue``.
        shift: what ``_attention_bwd_rows_kernel`` wrote; likewise ``factor`` and ``delta``.
        dbias: [batch, num_heads_q, seq_len_k] in the dtype of accumulators, for a bias that all queries share, or None.
        problem: Problem.
        scale: softmax_scale.
    """
    tile, plane = block_and_plane(problem.seq_len_k, KEYS)
    num_heads_kv = problem.num_heads_q // problem.group_size
    batch, head_kv = plane // num_heads_kv, plane % num_heads_kv
    column_begin = tile * KEYS
    dtype: tl.constexpr = accumulator(query.data.dtype.element_ty)
    limit = masking.key_end(problem.mask, batch, problem.seq_len_k)
    k = load_rows(key, batch, head_kv, column_begin, limit, head_dim, KEYS, DIM)
    v = load_rows(value, batch, head_kv, column_begin, limit, head_dim_v, KEYS, DIM_V)
    begin, free_begin, free_end, end = masking.query_parts(
        problem.mask, column_begin, column_begin + KEYS, limit, problem.seq_len_q, ROWS
    )
    dk, dv = tl.zeros([KEYS, DIM], dtype), tl.zeros([KEYS, DIM_V], dtype)
    for member in range(problem.group_size):
        head = head_kv * problem.group_size + member
        row = (batch * problem.num_heads_q + head).to(tl.int64) * problem.seq_len_q
        statistics = (shift + row, factor + row, delta + row)
        state = (dk, dv, tl.zeros([KEYS], dtype))
        state = _add_queries(
            state, query, k, v, dout, statistics, problem, batch, head, column_begin, free_begin, free_end, free_end, 0,
            limit, head_dim, head_dim_v, PRECISION, False, False, ROWS, KEYS, DIM, DIM_V,
        )  # fmt: skip
        state = _add_queries(
            state, query, k, v, dout, statistics, problem, batch, head, column_begin, begin, end, free_begin,
            free_end - free_begin, limit, head_dim, head_dim_v, PRECISION, True, False, ROWS, KEYS, DIM, DIM_V,
        )  # fmt: skip
        dk, dv, db = state
        if dbias is not None:
            columns = column_begin + tl.arange(0, KEYS)
            to = dbias + (batch * problem.num_heads_q + head).to(tl.int64) * problem.seq_len_k
            tl.store(to + columns, db, mask=columns < problem.seq_len_k)
    if masking.hides(problem.mask.diag_lo, problem.mask.key_lengths, problem.mask.segments_q, problem.mask.dense.data):
        if not (all_finite(dk) & all_finite(dv)):
            # Perhaps by a query that may not see these keys: once more, touching only what may be seen.
            dk, dv = tl.zeros([KEYS, DIM], dtype), tl.zeros([KEYS, DIM_V], dtype)
            for member in range(problem.group_size):
                head = head_kv * problem.group_size + member
                row = (batch * problem.num_heads_q + head).to(tl.int64) * problem.seq_len_q
                statistics = (shift + row, factor + row, delta + row)
                dk, dv, _ = _add_queries(
                    (dk, dv, tl.zeros([KEYS], dtype)), query, k, v, dout, statistics, problem, batch, head,
                    column_begin, begin, end, end, 0, limit, head_dim, head_dim_v, PRECISION, True, True, ROWS, KEYS,
                    DIM, DIM_V,
                )  # fmt: skip
    if dkey.data is not None:
        store_rows(dkey, batch, head_kv, column_begin, problem.seq_len_k, head_dim, dk * scale, KEYS, DIM)
    if dvalue.data is not None:
        store_rows(dvalue, batch, head_kv, column_begin, problem.seq_len_k, head_dim_v, dv, KEYS, DIM_V)


@triton.jit
def _add_keys(
    dq, query_block, key, value, dout_block, statistics, dbias, problem, batch, head, row_begin, begin, end,
    gap_begin, gap, limit, head_dim, head_dim_v, PRECISION: tl.constexpr, MASKED: tl.constexpr,
    POISONED: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr,
):  # fmt: skip
    """Adds the share of the keys in [begin, end) to dq, but for ``gap`` from ``gap_begin`` on; writes their tiles of
    dbias. All but ``end`` are multiples of KEYS."""
    head_kv = head // problem.group_size
    for at in range(begin, end - gap, KEYS):
        start = tl.multiple_of(tl.where(at < gap_begin, at, at + gap), KEYS)
        k = load_rows(key, batch, head_kv, start, limit, head_dim, KEYS, DIM, MASKED)
        v = load_rows(value, batch, head_kv, start, limit, head_dim_v, KEYS, DIM_V, MASKED)
        _, _, ds, dx = score_gradients(
            problem, query_block, k, v, dout_block, *statistics, batch, head, row_begin, start, limit, PRECISION,
            MASKED, False, ROWS, KEYS,
        )  # fmt: skip
        if POISONED:
            rows = (row_begin + tl.arange(0, ROWS))[:, None]
            columns = (start + tl.arange(0, KEYS))[None, :]
            seen = masking.visible(
                problem.mask, batch, head, rows, columns, limit, problem.seq_len_q, problem.seq_len_k
            )
            dq = add_seen(dq, dx, k, seen)
        else:
            dq = tl.dot(dx.to(k.dtype), k, dq, input_precision=PRECISION, out_dtype=dq.dtype)
        if dbias.data is not None:
            store_tile(dbias, batch, head, row_begin, start, problem.seq_len_q, problem.seq_len_k, ds, ROWS, KEYS)
    return dq


@triton.jit
def _attention_bwd_queries_kernel(
    query,
    key,
    value,
    dout,
    shift,
    factor,
    delta,
    dquery,
    dbias,
    problem,
    scale,
    head_dim,
    head_dim_v,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_V: tl.constexpr,
):
    """Writes the gradients of a block of queries and, where each query has a bias of its own, those of its bias.

    Grid: blocks of queries times batch * num_heads_q.

    Args:
        dquery: View of [batch, num_heads_q, seq_len_q, head_dim].
        dbias: View of [batch, num_heads_q, seq_len_q, seq_len_k] that is 0 already, for what no query sees.

    The others are those of :func:`_attention_bwd_keys_kernel`.
    """
    block, plane = block_and_plane(problem.seq_len_q, ROWS)
    batch, head = plane // problem.num_heads_q, plane % problem.num_heads_q
    row_begin = block * ROWS
    row_end = tl.minimum(row_begin + ROWS, problem.seq_len_q)
    dtype: tl.constexpr = accumulator(query.data.dtype.element_ty)
    q = load_rows(query, batch, head, row_begin, problem.seq_len_q, head_dim, ROWS, DIM)
    do = load_rows(dout, batch, head, row_begin, problem.seq_len_q, head_dim_v, ROWS, DIM_V)
    row = plane.to(tl.int64) * problem.seq_len_q
    statistics = load_statistics((shift + row, factor + row, delta + row), row_begin, problem.seq_len_q, ROWS)
    limit = masking.key_end(problem.mask, batch, problem.seq_len_k)
    begin, free_begin, free_end, end = masking.key_parts(problem.mask, row_begin, row_end, limit, KEYS)
    dq = _add_keys(
        tl.zeros([ROWS, DIM], dtype), q, key, value, do, statistics, dbias, problem, batch, head, row_begin, free_begin,
        free_end, free_end, 0, limit, head_dim, head_dim_v, PRECISION, False, False, ROWS, KEYS, DIM, DIM_V,
    )  # fmt: skip
    dq = _add_keys(
        dq, q, key, value, do, statistics, dbias, problem, batch, head, row_begin, begin, end, free_begin,
        free_end - free_begin, limit, head_dim, head_dim_v, PRECISION, True, False, ROWS, KEYS, DIM, DIM_V,
    )  # fmt: skip
    if masking.hides(problem.mask.diag_lo, problem.mask.key_lengths, problem.mask.segments_q, problem.mask.dense.data):
        if not all_finite(dq):
            dq = _add_keys(
                tl.zeros([ROWS, DIM], dtype), q, key, value, do, statistics, dbias, problem, batch, head, row_begin,
                begin, end, end, 0, limit, head_dim, head_dim_v, PRECISION, True, True, ROWS, KEYS, DIM, DIM_V,
            )  # fmt: skip
    if dquery.data is not None:
        store_rows(dquery, batch, head, row_begin, problem.seq_len_q, head_dim, dq * scale, ROWS, DIM)


def _common(call: AttentionCall, dout: Tensor, statistics: Sequence[Tensor]) -> tuple[Any, ...]:
    return (view(call.query), view(call.key), view(call.value), view(dout), *statistics)


def _numbers(call: AttentionCall) -> tuple[Any, ...]:
    return (problem(call), number(call.softmax_scale, call.query.dtype), call.query.shape[3], call.value.shape[3])


def _options(call: AttentionCall, tile: Tile) -> dict[str, Any]:
    dims = {"DIM": padded(call.query.shape[3]), "DIM_V": padded(call.value.shape[3])}
    return {"PRECISION": precision(), "ROWS": tile.rows, "KEYS": tile.columns, **dims, **tile.options}


def _row_arguments(
    call: AttentionCall, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None, statistics: Sequence[Tensor]
) -> tuple[Any, ...]:
    inputs = (view(call.query), view(call.key), view(call.value), view(out), view(dout), lse, dlse, call.sinks)
    return (*inputs, *statistics, problem(call), call.query.shape[3], call.value.shape[3])


def attention_bwd(
    call: AttentionCall, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None, needed: Sequence[bool]
) -> list[Tensor | None]:
    """Returns the gradients of ``DIFFERENTIABLE`` that are needed, of a call that is not empty."""
    grads = [
        torch.empty_like(tensor) if need and tensor is not None else None
        for tensor, need in zip((getattr(call, f) for f in DIFFERENTIABLE), needed, strict=True)
    ]
    dquery, dkey, dvalue, dbias, drelative_bias, dsinks = grads
    batch, num_heads_q, seq_len_q, seq_len_k = call.shape
    planes, planes_kv = batch * num_heads_q, batch * call.key.shape[1]
    dout = dout if dout.shape[-1] <= 1 or dout.stride(-1) == 1 else dout.contiguous()
    lse = lse.to(torch.float64).contiguous()
    dlse = None if dlse is None else dlse.to(torch.float64).contiguous()
    statistics = empty_statistics(call, lse)
    device = architecture(call.query.device)

    def rows(tile: Tile) -> None:
        arguments = _row_arguments(call, out, lse, dout, dlse, statistics)
        _attention_bwd_rows_kernel[(cdiv(seq_len_q, tile.rows) * planes,)](*arguments, **_options(call, tile))

    launch("attention_backward, rows", tiles.choose(tiles.SQUARE, call, device), rows)

    # Where each query has a bias of its own, its gradient is a tile of the queries' kernel; where all share one, a sum
    # of the keys'.
    own = dbias is not None and dbias.shape == call.shape
    shared = dbias is not None and not own and dbias.shape[2] == 1 and dbias.shape[3] == seq_len_k > 1
    if dkey is not None or dvalue is not None or shared:
        of_keys = statistics[0].new_empty((batch, num_heads_q, seq_len_k)) if shared else None

        def keys(tile: Tile) -> None:
            _attention_bwd_keys_kernel[(cdiv(seq_len_k, tile.columns) * planes_kv,)](
                *_common(call, dout, statistics), broadcast(dkey), broadcast(dvalue), of_keys, *_numbers(call),
                **_options(call, tile),
            )  # fmt: skip

        launch("attention_backward, keys", tiles.choose(tiles.BACKWARD_KEYS, call, device), keys)
        if of_keys is not None and dbias is not None:
            dbias.copy_(of_keys[:, :, None].to(torch.float64).sum_to_size(dbias.shape))
    if dquery is not None or own:
        written = dbias.zero_() if own and dbias is not None else None

        def queries(tile: Tile) -> None:
            _attention_bwd_queries_kernel[(cdiv(seq_len_q, tile.rows) * planes,)](
                *_common(call, dout, statistics), broadcast(dquery), broadcast(written), *_numbers(call),
                **_options(call, tile),
            )  # fmt: skip

        launch("attention_backward, queries", tiles.choose(tiles.BACKWARD_QUERIES, call, device), queries)

    sink_weight = None
    if call.sinks is not None:
        sink_weight = torch.where(lse.isneginf(), 0.0, (call.sinks.to(lse.dtype)[:, None] - lse).exp())
    if dbias is not None and not own and not shared:
        if dbias.shape[3] == 1:
            # dS of a row adds up to dlse + delta * (the sink's weight): sum(P dP) is sum(dout * out).
            of_rows = torch.zeros_like(lse) if dlse is None else dlse
            if sink_weight is not None:
                of_rows = of_rows + statistics[2] * sink_weight
            of_rows = torch.where(lse.isneginf(), 0.0, of_rows)
            dbias.copy_(of_rows[..., None].sum_to_size(dbias.shape))
        else:
            bias_gradient(call, dout, statistics, dbias)
    if drelative_bias is not None:
        relative_bias_gradient(call, dout, statistics, drelative_bias)
    if dsinks is not None and sink_weight is not None:
        dsinks.copy_(-(sink_weight * statistics[2]).sum(dim=(0, 2)))
    return grads


def configurations(architecture: int) -> Iterator[Configuration]:
    """Yields each kernel with every tile of its table for an architecture."""
    for name, call, tile in tiles.calls(tiles.SQUARE, architecture):
        out, lse = empty_output(call)
        statistics = empty_statistics(call, lse)
        arguments = _row_arguments(call, out, lse, out, lse, statistics)
        yield Configuration(
            f"attention backward, rows {name}", _attention_bwd_rows_kernel, arguments, _options(call, tile)
        )
    for name, call, tile in tiles.calls(tiles.BACKWARD_KEYS, architecture):
        out, lse = empty_output(call)
        statistics = empty_statistics(call, lse)
        of_keys = None if call.bias is None else statistics[0].new_empty(call.bias.shape[1:])
        arguments = (
            *_common(call, out, statistics), broadcast(call.key), broadcast(call.value), of_keys, *_numbers(call)
        )  # fmt: skip
        yield Configuration(
            f"attention backward, keys {name}", _attention_bwd_keys_kernel, arguments, _options(call, tile)
        )
    for name, call, tile in tiles.calls(tiles.BACKWARD_QUERIES, architecture):
        out, lse = empty_output(call)
        statistics = empty_statistics(call, lse)
        arguments = (*_common(call, out, statistics), broadcast(call.query), broadcast(call.bias), *_numbers(call))
        yield Configuration(
            f"attention backward, queries {name}", _attention_bwd_queries_kernel, arguments, _options(call, tile)
        )
