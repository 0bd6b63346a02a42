"""Who may see whom: the only definition of masking on a GPU.

Its twins are ``fastattn.masks.visible`` and ``csrc/cpu/mask.h``.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.constexpr_function
def hides(diag_lo, key_lengths, segments_q, dense):
    """Returns whether a mask of these fields may hide anything."""
    return diag_lo is not None or key_lengths is not None or segments_q is not None or dense is not None


@triton.jit
def key_end(mask, batch, seq_len_k):
    """Returns the first key that is padding."""
    limit = seq_len_k
    if mask.key_lengths is not None:
        limit = tl.minimum(tl.maximum(tl.load(mask.key_lengths + batch), 0), seq_len_k)
    return limit


@triton.jit
def key_range(mask, row_begin, row_end, limit):
    """Returns the keys outside of which no query of [row_begin, row_end) sees any."""
    begin, end = 0, limit
    if mask.diag_lo is not None:
        begin, end = tl.maximum(row_begin + mask.diag_lo, 0), tl.minimum(row_end + mask.diag_hi, limit)
    return begin, end


@triton.jit
def shared_key_range(mask, row_begin, row_end, limit):
    """Returns keys that every query of [row_begin, row_end) sees, as far as band and lengths say it."""
    begin, end = 0, limit
    if mask.segments_q is not None or mask.dense.data is not None:
        end = 0
    elif mask.diag_lo is not None:
        begin, end = tl.maximum(row_end - 1 + mask.diag_lo, 0), tl.minimum(row_begin + mask.diag_hi + 1, limit)
    return begin, end


@triton.jit
def query_range(mask, column_begin, column_end, limit, seq_len_q):
    """Returns the queries outside of which none sees a key of [column_begin, column_end)."""
    begin, end = 0, seq_len_q
    if mask.diag_lo is not None:
        begin = tl.maximum(column_begin - mask.diag_hi, 0)
        end = tl.minimum(tl.minimum(column_end, limit) - mask.diag_lo, seq_len_q)
    return begin, tl.where(column_begin < limit, end, 0)


@triton.jit
def shared_query_range(mask, column_begin, column_end, limit, seq_len_q):
    """Returns queries that see every key of [column_begin, column_end), as far as band and lengths say it."""
    begin, end = 0, seq_len_q
    if mask.segments_q is not None or mask.dense.data is not None:
        end = 0
    elif mask.diag_lo is not None:
        begin = tl.maximum(column_end - 1 - mask.diag_hi, 0)
        end = tl.minimum(column_begin - mask.diag_lo + 1, seq_len_q)
    return begin, tl.where(column_end <= limit, end, 0)


@triton.jit
def key_parts(mask, row_begin, row_end, limit, KEYS: tl.constexpr):
    """Returns ``(begin, free_begin, free_end, end)``: queries of [row_begin, row_end) may see keys of [begin, end), and
    all of them see those of [free_begin, free_end). All but ``end`` are multiples of KEYS."""
    begin, end = key_range(mask, row_begin, row_end, limit)
    free_begin, free_end = shared_key_range(mask, row_begin, row_end, limit)
    return _parts(begin, end, free_begin, free_end, KEYS)


@triton.jit
def query_parts(mask, column_begin, column_end, limit, seq_len_q, ROWS: tl.constexpr):
    """The same the other way round: the queries that may see a key of [column_begin, column_end), and all of them."""
    begin, end = query_range(mask, column_begin, column_end, limit, seq_len_q)
    free_begin, free_end = shared_query_range(mask, column_begin, column_end, limit, seq_len_q)
    return _parts(begin, end, free_begin, free_end, ROWS)


@triton.jit
def _parts(begin, end, free_begin, free_end, STEP: tl.constexpr):
    begin = begin // STEP * STEP
    free_begin = tl.maximum(tl.cdiv(free_begin, STEP) * STEP, begin)
    free_end = tl.maximum(tl.minimum(free_end, end) // STEP * STEP, free_begin)
    return begin, free_begin, free_end, end


@triton.jit
def visible(mask, batch, head, rows, columns, limit, seq_len_q, seq_len_k):
    """Returns whether each query sees each key.

    Args:
        rows: int32 queries, in a shape that broadcasts with that of ``columns``; beyond the last one none sees any.
        columns: int32 keys.
        limit: what :func:`key_end` returned.
    """
    # Two bounds a query, and so two comparisons a pair.
    end = limit
    if mask.diag_lo is not None:
        end = tl.minimum(rows + mask.diag_hi + 1, limit)
    allowed = columns < tl.where(rows < seq_len_q, end, 0)
    if mask.diag_lo is not None:
        allowed &= columns >= rows + mask.diag_lo
    if mask.segments_q is not None:
        own = tl.load(mask.segments_q + batch.to(tl.int64) * seq_len_q + rows, mask=rows < seq_len_q, other=0)
        others = tl.load(mask.segments_k + batch.to(tl.int64) * seq_len_k + columns, mask=columns < limit, other=0)
        allowed &= own == others
    if mask.dense.data is not None:
        at = mask.dense.data + batch.to(tl.int64) * mask.dense.batch + head.to(tl.int64) * mask.dense.head
        at += rows.to(tl.int64) * mask.dense.row + columns.to(tl.int64) * mask.dense.column
        allowed &= tl.load(at, mask=allowed, other=0) != 0
    return allowed
