"""The two kernels that attention's backward spends its time in; ``attention_backward.py`` says what they compute."""

from __future__ import annotations

import triton
import triton.language as tl

from fastattn.kernels import masking, packing, slabs
from fastattn.kernels.numbers import empty_sum
from fastattn.kernels.scores import load_statistics, score_gradients
from fastattn.kernels.tile import accumulator, block_and_plane, load_rows, set_flags, store_rows, store_tile


@triton.jit
def _add_queries(
    state, query, query_box, key_tile, value_tile, dout, dout_box, statistics, first_row, dkey, dvalue, of_keys, dbias,
    room, room_box, where, problem, batch, head, column_begin, begin, end, gap_begin, gap, limit, head_dim, head_dim_v,
    PRECISION: tl.constexpr, MASKED: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr,
    DIM_V: tl.constexpr,
):  # fmt: skip
    """Adds the share of the queries in [begin, end) to ``state = (dk, dv, db)``, but for ``gap`` from ``gap_begin`` on,
    and leaves the gradients of their scores; all but ``end`` are multiples of ROWS."""
    dk, dv, db = state
    for at in range(begin, end - gap, ROWS):
        start = tl.multiple_of(tl.where(at < gap_begin, at, at + gap), ROWS)
        q = load_rows(query, batch, head, start, problem.seq_len_q, head_dim, ROWS, DIM, MASKED, query_box)
        do = load_rows(dout, batch, head, start, problem.seq_len_q, head_dim_v, ROWS, DIM_V, MASKED, dout_box)
        loaded = load_statistics(statistics, first_row, start, problem.seq_len_q, ROWS, True, MASKED)
        _, p, ds, dx = score_gradients(
            problem, q, key_tile, value_tile, do, loaded, batch, head, start, column_begin, limit, PRECISION,
            MASKED, True, ROWS, KEYS,
        )  # fmt: skip
        if dvalue.data is not None:
            dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION, out_dtype=dv.dtype)
        rounded = dx.to(q.dtype)
        if dkey.data is not None:
            dk = tl.dot(rounded, q, dk, input_precision=PRECISION, out_dtype=dk.dtype)
        if room.data is not None:
            slabs.store(room, room_box, where, start, rounded, KEYS, ROWS)
        if of_keys is not None:
            db += tl.sum(ds, axis=1)
        if dbias.data is not None:
            ds = tl.trans(ds)
            store_tile(dbias, batch, head, start, column_begin, problem.seq_len_q, problem.seq_len_k, ds, ROWS, KEYS)
    return dk, dv, db


@triton.jit(
    do_not_specialize=[
        "first_plane", "num_planes", "base_plane", "first_slab", "num_slabs", "first_tile", "num_tiles", "other_tile",
    ]
)  # fmt: skip
def attention_bwd_keys_kernel(
    query,
    key,
    value,
    dout,
    shift,
    factor,
    delta,
    dkey,
    dvalue,
    of_keys,
    dbias,
    room,
    flags,
    problem,
    query_box,
    key_box,
    value_box,
    dout_box,
    room_box,
    scale,
    head_dim,
    head_dim_v,
    first_plane,
    num_planes,
    base_plane,
    first_slab,
    num_slabs,
    first_tile,
    num_tiles,
    other_tile,
    PRECISION: tl.constexpr,
    PAIRED: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_V: tl.constexpr,
):
    """Writes the gradients of a tile of keys and values, summed over the queries of one head, and leaves the gradients
    of its scores in a slab.

    Grid: tiles of a share times its planes. The first tiles come first, because under a causal mask they are seen by
    most queries: then nobody begins with much when the others have nearly done.

    Args:
        query: View of [batch, num_heads_q, seq_len_q, head_dim]; likewise ``dout``; ``key`` and ``value`` of
            [batch, num_heads_kv, seq_len_k, ...].
        shift: what ``_attention_bwd_rows_kernel`` wrote; likewise ``factor``, perhaps None, and ``delta``.
        dkey: View like ``key``, or one without data; with ``base_plane`` from 0 on of [1, planes, seq_len_k, head_dim],
            in the dtype of accumulators, whose first plane is that one; likewise ``dvalue``.
        of_keys: [batch, num_heads_q, seq_len_k] in the dtype of accumulators, for the gradient of a bias that all
            queries share, or None.
        dbias: View of [batch, num_heads_q, seq_len_q, seq_len_k] that is 0 already, for what no query sees: gradient of
            a bias that every query has for itself; or one without data.
        room: Slabs of the share.
        flags: int32 [batch * num_heads_q, ceil(seq_len_k / FLAGGED)], for ``tile.set_flags``; or None.
        problem: Problem.
        query_box: descriptor of ``query`` (``boxes.box``), or None; likewise the others.
        scale: softmax_scale.
        first_plane: what ``slabs.Share`` says, as ``num_planes``, ``first_slab`` and ``num_slabs``.
        first_tile: of the share's tiles; after ``num_tiles`` of them it goes on with ``other_tile``.
        PAIRED: whether a slab holds two tiles.
    """
    plane = first_plane + tl.program_id(0) % num_planes
    turn = tl.program_id(0) // num_planes
    tile = tl.where(turn < num_tiles, first_tile + turn, other_tile + turn - num_tiles)
    batch, head = plane // problem.num_heads_q, plane % problem.num_heads_q
    longest = problem.seq_len_k
    problem, batch = packing.own(problem, batch, packing.numbers(problem, batch))
    column_begin = tile * KEYS
    if packing.past_last_key(problem, column_begin):
        return
    query = packing.at(problem, query, packing.queries(problem, query))
    key = packing.at(problem, key, packing.keys(problem, key))
    value = packing.at(problem, value, packing.keys(problem, value))
    dout = packing.at(problem, dout, packing.queries(problem, dout))
    head_kv = head // problem.group_size
    statistics, first_row = (shift, factor, delta), packing.first_row(problem, batch, head)
    dtype: tl.constexpr = accumulator(query.data.dtype.element_ty)
    limit = masking.key_end(problem.mask, batch, problem.seq_len_k)
    where = slabs.place(problem, plane, tile, first_plane, first_slab, num_slabs, PAIRED, KEYS)
    k = load_rows(key, batch, head_kv, column_begin, limit, head_dim, KEYS, DIM, True, key_box)
    v = load_rows(value, batch, head_kv, column_begin, limit, head_dim_v, KEYS, DIM_V, True, value_box)
    begin, free_begin, free_end, end = masking.query_parts(
        problem.mask, column_begin, column_begin + KEYS, limit, problem.seq_len_q, ROWS
    )
    state = (empty_sum(KEYS, DIM, dtype), empty_sum(KEYS, DIM_V, dtype, 1), tl.zeros([KEYS], dtype))
    state = _add_queries(
        state, query, query_box, k, v, dout, dout_box, statistics, first_row, dkey, dvalue, of_keys, dbias, room,
        room_box, where, problem, batch, head, column_begin, free_begin, free_end, free_end, 0, limit, head_dim,
        head_dim_v, PRECISION, False, ROWS, KEYS, DIM, DIM_V,
    )  # fmt: skip
    state = _add_queries(
        state, query, query_box, k, v, dout, dout_box, statistics, first_row, dkey, dvalue, of_keys, dbias, room,
        room_box, where, problem, batch, head, column_begin, begin, end, free_begin, free_end - free_begin, limit,
        head_dim, head_dim_v, PRECISION, True, ROWS, KEYS, DIM, DIM_V,
    )  # fmt: skip
    dk, dv, db = state
    if of_keys is not None:
        columns = column_begin + tl.arange(0, KEYS)
        at = of_keys + plane.to(tl.int64) * problem.seq_len_k + columns
        tl.store(at, db, mask=columns < problem.seq_len_k)
    if flags is not None:
        set_flags(flags, plane, column_begin, longest, tl.sum(dk, axis=1) + tl.sum(dv, axis=1), KEYS)
    store_of_keys(
        dkey, dvalue, dk * scale, dv, problem, batch, head, plane, base_plane, column_begin, head_dim, head_dim_v, KEYS,
        DIM, DIM_V,
    )  # fmt: skip


@triton.jit
def store_of_keys(
    dkey, dvalue, dk, dv, problem, batch, head, plane, base_plane, column_begin, head_dim, head_dim_v,
    KEYS: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr,
):  # fmt: skip
    """Stores the gradients of a tile of keys and values, [KEYS, DIM] and [KEYS, DIM_V], from ``column_begin`` on.

    The arguments are those of :func:`attention_bwd_keys_kernel`; problem and batch entry are the sequence's own.
    """
    to_batch = tl.where(base_plane < 0, batch, 0)
    to_head = tl.where(base_plane < 0, head, packing.plane_of(problem, plane, head) - base_plane)
    if dkey.data is not None:
        to = packing.at(problem, dkey, packing.keys(problem, dkey))
        store_rows(to, to_batch, to_head, column_begin, problem.seq_len_k, head_dim, dk, KEYS, DIM)
    if dvalue.data is not None:
        to = packing.at(problem, dvalue, packing.keys(problem, dvalue))
        store_rows(to, to_batch, to_head, column_begin, problem.seq_len_k, head_dim_v, dv, KEYS, DIM_V)


@triton.jit
def _add_keys(
    dq, key, key_box, room, room_box, problem, batch, head, plane, row_begin, begin, end, gap_begin, gap, limit,
    head_dim, first_plane, first_slab, num_slabs, PRECISION: tl.constexpr, PAIRED: tl.constexpr, MASKED: tl.constexpr,
    TILE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Adds the share of the keys in [begin, end) to dq, but for ``gap`` from ``gap_begin`` on; all but ``end`` are
    multiples of KEYS."""
    for at in range(begin, end - gap, KEYS):
        start = tl.multiple_of(tl.where(at < gap_begin, at, at + gap), KEYS)
        k = load_rows(key, batch, head // problem.group_size, start, limit, head_dim, KEYS, DIM, MASKED, key_box)
        where = slabs.place(problem, plane, start // TILE, first_plane, first_slab, num_slabs, PAIRED, TILE)
        dx = slabs.load(room, room_box, where, start, row_begin, TILE, KEYS, ROWS)
        if MASKED:
            # Nobody has written what nobody sees.
            rows = (row_begin + tl.arange(0, ROWS))[None, :]
            columns = (start + tl.arange(0, KEYS))[:, None]
            seen = masking.visible(
                problem.mask, batch, head, rows, columns, limit, problem.seq_len_q, problem.seq_len_k
            )
            dx = tl.where(seen, dx, 0.0)
        dq = tl.dot(tl.trans(dx), k, dq, input_precision=PRECISION, out_dtype=dq.dtype)
    return dq


@triton.jit(do_not_specialize=["first_plane", "first_slab", "num_slabs", "first_tile", "last_tile", "goes_on"])
def attention_bwd_queries_kernel(
    key,
    dquery,
    so_far,
    room,
    flags,
    problem,
    key_box,
    room_box,
    scale,
    head_dim,
    first_plane,
    first_slab,
    num_slabs,
    first_tile,
    last_tile,
    goes_on,
    PRECISION: tl.constexpr,
    PAIRED: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    DIM: tl.constexpr,
):
    """Writes the gradients of a block of queries, of the slabs of a share: a plain product.

    Grid: blocks of queries times the share's planes.

    Args:
        key: View of [batch, num_heads_kv, seq_len_k, head_dim].
        dquery: View of [batch, num_heads_q, seq_len_q, head_dim].
        so_far: View of [1, 1, seq_len_q, head_dim] in the dtype of accumulators, for the sums of a plane whose keys are
            several shares; or one without data.
        room: Slabs of the share.
        flags: int32 [batch * num_heads_q, ceil(seq_len_q / FLAGGED)], for ``tile.set_flags``; or None.
        problem: Problem.
        key_box: descriptor of ``key`` (``boxes.box``), or None; likewise ``room_box``, of boxes [KEYS, ROWS].
        scale: softmax_scale.
        first_plane: what ``slabs.Share`` says, as ``first_slab`` and ``num_slabs``.
        first_tile: keys of the share, in tiles; likewise ``last_tile``, their end.
        goes_on: whether ``so_far`` holds anything yet.
        TILE: keys of a tile of the keys' kernel, a multiple of KEYS.
    """
    block, plane = block_and_plane(problem.seq_len_q, ROWS)
    plane += first_plane
    batch, head = plane // problem.num_heads_q, plane % problem.num_heads_q
    longest = problem.seq_len_q
    problem, batch = packing.own(problem, batch, packing.numbers(problem, batch))
    row_begin = block * ROWS
    if packing.past_end(problem, row_begin):
        return
    key = packing.at(problem, key, packing.keys(problem, key))
    dquery = packing.at(problem, dquery, packing.queries(problem, dquery))
    row_end = tl.minimum(row_begin + ROWS, problem.seq_len_q)
    dtype: tl.constexpr = accumulator(key.data.dtype.element_ty)
    limit = masking.key_end(problem.mask, batch, problem.seq_len_k)
    begin, free_begin, free_end, end = masking.key_parts(problem.mask, row_begin, row_end, limit, KEYS)
    # From one end to the other as far as the share has it. An empty range of keys may begin behind its end.
    end = tl.where(begin < end, tl.minimum(end, last_tile * TILE), begin)
    begin, free_begin = tl.maximum(begin, first_tile * TILE), tl.maximum(free_begin, first_tile * TILE)
    free_end = tl.maximum(tl.minimum(free_end, last_tile * TILE), free_begin)
    # Keys of padding may be NaN, which a box would fetch.
    PADDED: tl.constexpr = problem.mask.key_lengths is not None
    dq = empty_sum(ROWS, DIM, dtype)
    if so_far.data is not None:
        if goes_on != 0:
            dq += load_rows(so_far, batch * 0, head * 0, row_begin, problem.seq_len_q, head_dim, ROWS, DIM)
    dq = _add_keys(
        dq, key, key_box, room, room_box, problem, batch, head, plane, row_begin, free_begin, free_end, free_end, 0,
        limit, head_dim, first_plane, first_slab, num_slabs, PRECISION, PAIRED, False, TILE, ROWS, KEYS, DIM,
    )  # fmt: skip
    dq = _add_keys(
        dq, key, None if PADDED else key_box, room, room_box, problem, batch, head, plane, row_begin, begin, end,
        free_begin, free_end - free_begin, limit, head_dim, first_plane, first_slab, num_slabs, PRECISION, PAIRED, True,
        TILE, ROWS, KEYS, DIM,
    )  # fmt: skip
    if so_far.data is not None:
        store_rows(so_far, batch * 0, head * 0, row_begin, problem.seq_len_q, head_dim, dq, ROWS, DIM)
    if flags is not None:
        # There are no queries behind the last one, but there is something in their place.
        known = tl.where((row_begin + tl.arange(0, ROWS) < row_end)[:, None], dq, 0.0)
        set_flags(flags, plane, row_begin, longest, known, ROWS)
    store_rows(dquery, batch, head, row_begin, problem.seq_len_q, head_dim, dq * scale, ROWS, DIM)
