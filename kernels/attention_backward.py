"""Attention backward (Dao, "FlashAttention-2", 2023, algorithm 2), without atomics: every sum has one owner and one order.

    S = Q K^T, P = exp(S - lse), dP = dO V^T, dS = P (dP - delta);  dV = P^T dO, dK = dS^T Q, dQ = dS K

``attention_backward_rows`` prepares a number or two a query. ``attention_backward_keys`` owns a tile of keys and values
and goes over the queries that see it; ``attention_backward_queries`` owns a block of queries and goes over their keys.
Scores are computed by both: that costs two products of seven and saves both the atomics and a buffer of partial sums.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastattn.kernels import masking, philox
from fastattn.kernels.tile import LOG2_E, accumulator, add_seen, all_finite, finish_scores, load_rows, store_rows


@triton.jit
def attention_backward_rows(
    out,
    dout,
    lse,
    dlse,
    shift,
    factor,
    delta,
    seq_len_q,
    num_heads_q,
    head_dim_v,
    ROWS: tl.constexpr,
    DIM_V: tl.constexpr,
):
    """Writes what the other kernels need of each query: a probability is ``exp2(score - shift) * factor``, and
    ``delta = sum(dout * out) - dlse``.

    The whole powers of two of lse are in the shift and the rest in the factor, so that nothing of lse is rounded away.

    Grid: blocks of queries; batch * num_heads_q.

    Args:
        out: View of [batch, num_heads_q, seq_len_q, head_dim_v]; likewise ``dout``.
        lse: float64 [batch, num_heads_q, seq_len_q]; likewise ``dlse``, or None.
        shift: like lse, in the dtype of accumulators; likewise ``factor`` and ``delta``.
    """
    block, plane = tl.program_id(0), tl.program_id(1)
    batch, head = plane // num_heads_q, plane % num_heads_q
    dtype: tl.constexpr = accumulator(out.data.dtype.element_ty)
    begin = block * ROWS
    o = load_rows(out, batch, head, begin, seq_len_q, head_dim_v, ROWS, DIM_V).to(dtype)
    do = load_rows(dout, batch, head, begin, seq_len_q, head_dim_v, ROWS, DIM_V).to(dtype)
    rows = begin + tl.arange(0, ROWS)
    at, inside = plane.to(tl.int64) * seq_len_q + rows, rows < seq_len_q
    log_total = tl.load(lse + at, mask=inside, other=float("-inf")) * LOG2_E
    empty = log_total == float("-inf")
    # Of an infinite lse nothing is left over; an empty row has no probabilities, whatever its scores.
    whole = tl.where(empty, 0.0, tl.floor(log_total + 0.5))
    rest = tl.where(tl.abs(log_total) == float("inf"), 0.0, whole - log_total)
    d = tl.sum(o * do, axis=1)
    if dlse is not None:
        d -= tl.load(dlse + at, mask=inside, other=0.0).to(dtype)
    tl.store(shift + at, whole.to(dtype), mask=inside)
    tl.store(factor + at, tl.where(empty, 0.0, tl.exp2(rest)).to(dtype), mask=inside)
    tl.store(delta + at, tl.where(empty, 0.0, d), mask=inside)


@triton.jit
def _softmax_backward(
    problem, q, k, v, do, statistics, batch, head, row_begin, column_begin, limit,
    PRECISION: tl.constexpr, MASKED: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Returns a tile's (dropped) probabilities, the gradients of its scores and those before the softcap; [ROWS, KEYS].

    Args:
        q: queries [ROWS, DIM]; likewise ``k``, ``v`` and ``do``.
        statistics: pointers to shift, factor and delta of the head's first query.
    """
    shift, factor, delta = statistics
    rows = row_begin + tl.arange(0, ROWS)
    columns = column_begin + tl.arange(0, KEYS)
    inside = rows < problem.seq_len_q
    dtype: tl.constexpr = accumulator(q.dtype)
    product = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=dtype)
    s, slope = finish_scores(problem, product, batch, head, rows[:, None], columns[None, :], limit, MASKED)
    p = tl.exp2(s - tl.load(shift + rows, mask=inside, other=0.0)[:, None])
    p *= tl.load(factor + rows, mask=inside, other=0.0)[:, None]
    dp = tl.dot(do, tl.trans(v), input_precision=PRECISION, out_dtype=dtype)
    dropped = p
    if problem.dropout.state is not None:
        plane = batch * problem.num_heads_q + head
        keep = philox.keep(problem.dropout, plane, row_begin, column_begin, ROWS, KEYS)
        dropped = tl.where(keep, p * problem.dropout.rescale, 0.0)
        dp = tl.where(keep, dp * problem.dropout.rescale, 0.0)
    ds = p * (dp - tl.load(delta + rows, mask=inside, other=0.0)[:, None])
    if MASKED:
        # What is invisible may be NaN, and so may what it is multiplied by.
        hidden = s == float("-inf")
        dropped = tl.where(hidden, 0.0, dropped)
        ds = tl.where(hidden, 0.0, ds)
    dx = ds
    if problem.softcap is not None:
        dx = tl.where(ds == 0, 0.0, ds * slope)
    return dropped, ds, dx


@triton.jit
def _add_queries(
    state, query, key_tile, value_tile, dout, statistics, problem, batch, head, column_begin, begin, end, limit,
    head_dim, head_dim_v, PRECISION: tl.constexpr, MASKED: tl.constexpr, POISONED: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr,
):  # fmt: skip
    """Adds the share of the queries in [begin, end), multiples of ROWS, to ``state = (dk, dv)``."""
    dk, dv = state
    for start in range(begin, end, ROWS):
        start = tl.multiple_of(start, ROWS)
        q = load_rows(query, batch, head, start, problem.seq_len_q, head_dim, ROWS, DIM)
        do = load_rows(dout, batch, head, start, problem.seq_len_q, head_dim_v, ROWS, DIM_V)
        p, _, dx = _softmax_backward(
            problem, q, key_tile, value_tile, do, statistics, batch, head, start, column_begin, limit, PRECISION,
            MASKED, ROWS, KEYS,
        )  # fmt: skip
        if POISONED:
            rows = (start + tl.arange(0, ROWS))[None, :]
            columns = (column_begin + tl.arange(0, KEYS))[:, None]
            seen = masking.visible(
                problem.mask, batch, head, rows, columns, limit, problem.seq_len_q, problem.seq_len_k
            )
            dv = add_seen(dv, tl.trans(p), do, seen, ROWS)
            dk = add_seen(dk, tl.trans(dx), q, seen, ROWS)
        else:
            dv = tl.dot(tl.trans(p.to(do.dtype)), do, dv, input_precision=PRECISION, out_dtype=dv.dtype)
            dk = tl.dot(tl.trans(dx.to(q.dtype)), q, dk, input_precision=PRECISION, out_dtype=dk.dtype)
    return dk, dv


@triton.jit
def attention_backward_keys(
    query,
    key,
    value,
    dout,
    shift,
    factor,
    delta,
    dkey,
    dvalue,
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

    Grid: tiles of keys; batch * num_heads_kv.

    Args:
        query: View of [batch, num_heads_q, seq_len_q, head_dim]; likewise ``dout``; ``key`` and ``value`` of
            [batch, num_heads_kv, seq_len_k, ...], as ``dkey`` and ``dvalue``.
        shift: what ``attention_backward_rows`` wrote; likewise ``factor`` and ``delta``.
        problem: Problem.
        scale: softmax_scale.
    """
    tile, plane = tl.program_id(0), tl.program_id(1)
    num_heads_kv = problem.num_heads_q // problem.group_size
    batch, head_kv = plane // num_heads_kv, plane % num_heads_kv
    column_begin = tile * KEYS
    dtype: tl.constexpr = accumulator(query.data.dtype.element_ty)
    limit = masking.key_end(problem.mask, batch, problem.seq_len_k)
    k = load_rows(key, batch, head_kv, column_begin, limit, head_dim, KEYS, DIM)
    v = load_rows(value, batch, head_kv, column_begin, limit, head_dim_v, KEYS, DIM_V)
    first, last = masking.query_parts(problem.mask, column_begin, column_begin + KEYS, limit, problem.seq_len_q, ROWS)
    state = (tl.zeros([KEYS, DIM], dtype), tl.zeros([KEYS, DIM_V], dtype))
    for member in range(problem.group_size):
        head = head_kv * problem.group_size + member
        row = (batch * problem.num_heads_q + head).to(tl.int64) * problem.seq_len_q
        statistics = (shift + row, factor + row, delta + row)
        for part in tl.static_range(3):
            state = _add_queries(
                state, query, k, v, dout, statistics, problem, batch, head, column_begin, first[part], last[part],
                limit, head_dim, head_dim_v, PRECISION, part != 1, False, ROWS, KEYS, DIM, DIM_V,
            )  # fmt: skip
    dk, dv = state
    if masking.hides(problem.mask.diag_lo, problem.mask.key_lengths, problem.mask.segments_q, problem.mask.dense.data):
        if not (all_finite(dk) & all_finite(dv)):
            # Perhaps by a query that may not see these keys: once more, touching only what may be seen.
            dk, dv = tl.zeros([KEYS, DIM], dtype), tl.zeros([KEYS, DIM_V], dtype)
            for member in range(problem.group_size):
                head = head_kv * problem.group_size + member
                row = (batch * problem.num_heads_q + head).to(tl.int64) * problem.seq_len_q
                statistics = (shift + row, factor + row, delta + row)
                dk, dv = _add_queries(
                    (dk, dv), query, k, v, dout, statistics, problem, batch, head, column_begin, first[0], last[2], limit,
                    head_dim, head_dim_v, PRECISION, True, True, ROWS, KEYS, DIM, DIM_V,
                )  # fmt: skip
    if dkey.data is not None:
        store_rows(dkey, batch, head_kv, column_begin, problem.seq_len_k, head_dim, dk * scale, KEYS, DIM)
    if dvalue.data is not None:
        store_rows(dvalue, batch, head_kv, column_begin, problem.seq_len_k, head_dim_v, dv, KEYS, DIM_V)


@triton.jit
def _add_keys(
    dq, query_block, key, value, dout_block, statistics, dbias, problem, batch, head, row_begin, begin, end, limit,
    head_dim, head_dim_v, PRECISION: tl.constexpr, MASKED: tl.constexpr, POISONED: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr,
):  # fmt: skip
    """Adds the share of the keys in [begin, end), multiples of KEYS, to dq; writes their tiles of dbias."""
    head_kv = head // problem.group_size
    for start in range(begin, end, KEYS):
        start = tl.multiple_of(start, KEYS)
        k = load_rows(key, batch, head_kv, start, limit, head_dim, KEYS, DIM)
        v = load_rows(value, batch, head_kv, start, limit, head_dim_v, KEYS, DIM_V)
        _, ds, dx = _softmax_backward(
            problem, query_block, k, v, dout_block, statistics, batch, head, row_begin, start, limit, PRECISION,
            MASKED, ROWS, KEYS,
        )  # fmt: skip
        if POISONED:
            rows = (row_begin + tl.arange(0, ROWS))[:, None]
            columns = (start + tl.arange(0, KEYS))[None, :]
            seen = masking.visible(
                problem.mask, batch, head, rows, columns, limit, problem.seq_len_q, problem.seq_len_k
            )
            dq = add_seen(dq, dx, k, seen, KEYS)
        else:
            dq = tl.dot(dx.to(k.dtype), k, dq, input_precision=PRECISION, out_dtype=dq.dtype)
        if dbias.data is not None:
            rows = row_begin + tl.arange(0, ROWS)
            columns = start + tl.arange(0, KEYS)
            to = dbias.data + batch.to(tl.int64) * dbias.batch + head.to(tl.int64) * dbias.head
            to += rows.to(tl.int64)[:, None] * dbias.row + columns[None, :]
            inside = (rows < problem.seq_len_q)[:, None] & (columns < problem.seq_len_k)[None, :]
            tl.store(to, ds.to(dbias.data.dtype.element_ty), mask=inside)
    return dq


@triton.jit
def attention_backward_queries(
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

    Grid: blocks of queries, the last first; batch * num_heads_q.

    Args:
        dquery: View of [batch, num_heads_q, seq_len_q, head_dim].
        dbias: View of [batch, num_heads_q, seq_len_q, seq_len_k] that is 0 already, for what no query sees.

    The others are those of :func:`attention_backward_keys`.
    """
    block, plane = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    batch, head = plane // problem.num_heads_q, plane % problem.num_heads_q
    row_begin = block * ROWS
    row_end = tl.minimum(row_begin + ROWS, problem.seq_len_q)
    dtype: tl.constexpr = accumulator(query.data.dtype.element_ty)
    q = load_rows(query, batch, head, row_begin, problem.seq_len_q, head_dim, ROWS, DIM)
    do = load_rows(dout, batch, head, row_begin, problem.seq_len_q, head_dim_v, ROWS, DIM_V)
    row = plane.to(tl.int64) * problem.seq_len_q
    statistics = (shift + row, factor + row, delta + row)
    limit = masking.key_end(problem.mask, batch, problem.seq_len_k)
    first, last = masking.key_parts(problem.mask, row_begin, row_end, limit, KEYS)
    dq = tl.zeros([ROWS, DIM], dtype)
    for part in tl.static_range(3):
        dq = _add_keys(
            dq, q, key, value, do, statistics, dbias, problem, batch, head, row_begin, first[part], last[part], limit,
            head_dim, head_dim_v, PRECISION, part != 1, False, ROWS, KEYS, DIM, DIM_V,
        )  # fmt: skip
    if masking.hides(problem.mask.diag_lo, problem.mask.key_lengths, problem.mask.segments_q, problem.mask.dense.data):
        if not all_finite(dq):
            dq = _add_keys(
                tl.zeros([ROWS, DIM], dtype), q, key, value, do, statistics, dbias, problem, batch, head, row_begin,
                first[0], last[2], limit, head_dim, head_dim_v, PRECISION, True, True, ROWS, KEYS, DIM, DIM_V,
            )  # fmt: skip
    if dquery.data is not None:
        store_rows(dquery, batch, head, row_begin, problem.seq_len_q, head_dim, dq * scale, ROWS, DIM)
