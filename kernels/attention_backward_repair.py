"""Attention's backward once more, where a gradient was not finite and a mask hides something.

Perhaps what is hidden was NaN or infinite, and a product touched it; in here only what may be seen is touched.

It is a kernel of its own, that nearly always looks at a flag and ends, because as a branch of the others it would take
registers from their loops.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastattn.kernels import masking, packing
from fastattn.kernels.attention_backward_sums import store_of_keys
from fastattn.kernels.scores import load_statistics, score_gradients
from fastattn.kernels.tile import accumulator, add_seen, is_flagged, load_rows, store_rows


@triton.jit
def _keys(
    query, key, value, dout, statistics, dkey, dvalue, problem, scale, head_dim, head_dim_v, batch, head, plane,
    base_plane, column_begin, PRECISION: tl.constexpr, SIZE: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr,
):  # fmt: skip
    """Writes the gradients of a tile of keys and values."""
    dtype: tl.constexpr = accumulator(query.data.dtype.element_ty)
    first_row, limit = packing.first_row(problem, batch, head), masking.key_end(problem.mask, batch, problem.seq_len_k)
    k = load_rows(key, batch, head // problem.group_size, column_begin, limit, head_dim, SIZE, DIM)
    v = load_rows(value, batch, head // problem.group_size, column_begin, limit, head_dim_v, SIZE, DIM_V)
    dk, dv = tl.zeros([SIZE, DIM], dtype), tl.zeros([SIZE, DIM_V], dtype)
    columns = (column_begin + tl.arange(0, SIZE))[:, None]
    begin, end = masking.query_range(problem.mask, column_begin, column_begin + SIZE, limit, problem.seq_len_q)
    for start in range(begin // SIZE * SIZE, end, SIZE):
        start = tl.multiple_of(start, SIZE)
        q = load_rows(query, batch, head, start, problem.seq_len_q, head_dim, SIZE, DIM)
        do = load_rows(dout, batch, head, start, problem.seq_len_q, head_dim_v, SIZE, DIM_V)
        loaded = load_statistics(statistics, first_row, start, problem.seq_len_q, SIZE, True, True)
        _, p, _, dx = score_gradients(
            problem, q, k, v, do, loaded, batch, head, start, column_begin, limit, PRECISION, True, True, SIZE, SIZE
        )
        rows = (start + tl.arange(0, SIZE))[None, :]
        seen = masking.visible(problem.mask, batch, head, rows, columns, limit, problem.seq_len_q, problem.seq_len_k)
        dv = add_seen(dv, p, do, seen)
        dk = add_seen(dk, dx, q, seen)
    store_of_keys(
        dkey, dvalue, dk * scale, dv, problem, batch, head, plane, base_plane, column_begin, head_dim, head_dim_v, SIZE,
        DIM, DIM_V,
    )  # fmt: skip


@triton.jit
def _queries(
    query, key, value, dout, statistics, dquery, problem, scale, head_dim, head_dim_v, batch, head, row_begin,
    PRECISION: tl.constexpr, SIZE: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr,
):  # fmt: skip
    """Writes the gradients of a block of queries."""
    dtype: tl.constexpr = accumulator(query.data.dtype.element_ty)
    first_row, limit = packing.first_row(problem, batch, head), masking.key_end(problem.mask, batch, problem.seq_len_k)
    q = load_rows(query, batch, head, row_begin, problem.seq_len_q, head_dim, SIZE, DIM)
    do = load_rows(dout, batch, head, row_begin, problem.seq_len_q, head_dim_v, SIZE, DIM_V)
    loaded = load_statistics(statistics, first_row, row_begin, problem.seq_len_q, SIZE, False, True)
    dq = tl.zeros([SIZE, DIM], dtype)
    rows = (row_begin + tl.arange(0, SIZE))[:, None]
    begin, end = masking.key_range(problem.mask, row_begin, tl.minimum(row_begin + SIZE, problem.seq_len_q), limit)
    for start in range(begin // SIZE * SIZE, end, SIZE):
        start = tl.multiple_of(start, SIZE)
        k = load_rows(key, batch, head // problem.group_size, start, limit, head_dim, SIZE, DIM)
        v = load_rows(value, batch, head // problem.group_size, start, limit, head_dim_v, SIZE, DIM_V)
        _, _, _, dx = score_gradients(
            problem, q, k, v, do, loaded, batch, head, row_begin, start, limit, PRECISION, True, False, SIZE, SIZE
        )
        columns = (start + tl.arange(0, SIZE))[None, :]
        seen = masking.visible(problem.mask, batch, head, rows, columns, limit, problem.seq_len_q, problem.seq_len_k)
        dq = add_seen(dq, dx, k, seen)
    store_rows(dquery, batch, head, row_begin, problem.seq_len_q, head_dim, dq * scale, SIZE, DIM)


@triton.jit(do_not_specialize=["first_plane", "num_planes", "base_plane"])
def attention_bwd_repair_kernel(
    query,
    key,
    value,
    dout,
    shift,
    factor,
    delta,
    dquery,
    dkey,
    dvalue,
    key_flags,
    query_flags,
    problem,
    scale,
    head_dim,
    head_dim_v,
    first_plane,
    num_planes,
    base_plane,
    PRECISION: tl.constexpr,
    SIZE: tl.constexpr,
    DIM: tl.constexpr,
    DIM_V: tl.constexpr,
):
    """Writes again what a flag says is not finite.

    Grid: tiles of SIZE keys times num_planes, and after them blocks of SIZE queries times num_planes.

    Args:
        dquery: View of [batch, num_heads_q, seq_len_q, head_dim], or one without data.
        key_flags: int32 [batch * num_heads_q, ceil(seq_len_k / FLAGGED)]; likewise ``query_flags``.
        first_plane: batch entry times num_heads_q plus head of the first of num_planes.

    The others are those of ``attention_bwd_keys_kernel``.
    """
    tiles_k, blocks = tl.cdiv(problem.seq_len_k, SIZE), tl.cdiv(problem.seq_len_q, SIZE)
    program = tl.program_id(0) - tiles_k * num_planes
    of_keys = program < 0
    plane = first_plane + tl.where(of_keys, tl.program_id(0) // tiles_k, program // blocks)
    begin = tl.where(of_keys, tl.program_id(0) % tiles_k, program % blocks) * SIZE
    if of_keys:
        flagged = is_flagged(key_flags, plane, begin, problem.seq_len_k, SIZE)
    else:
        flagged = is_flagged(query_flags, plane, begin, problem.seq_len_q, SIZE)
    if not flagged:
        return
    batch, head = plane // problem.num_heads_q, plane % problem.num_heads_q
    problem, batch = packing.own(problem, batch, packing.numbers(problem, batch))
    query = packing.at(problem, query, packing.queries(problem, query))
    key = packing.at(problem, key, packing.keys(problem, key))
    value = packing.at(problem, value, packing.keys(problem, value))
    dout = packing.at(problem, dout, packing.queries(problem, dout))
    dquery = packing.at(problem, dquery, packing.queries(problem, dquery))
    statistics = (shift, factor, delta)
    if of_keys:
        _keys(
            query, key, value, dout, statistics, dkey, dvalue, problem, scale, head_dim, head_dim_v, batch, head, plane,
            base_plane, begin, PRECISION, SIZE, DIM, DIM_V,
        )  # fmt: skip
    elif dquery.data is not None:
        _queries(
            query, key, value, dout, statistics, dquery, problem, scale, head_dim, head_dim_v, batch, head, begin,
            PRECISION, SIZE, DIM, DIM_V,
        )  # fmt: skip
