"""A tile of queries against keys: what attention's kernels, forward and backward, share."""

from __future__ import annotations

import triton
import triton.language as tl

from fastattn.kernels import masking

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# Rows that share a flag: those of the smallest tile.
FLAGGED = tl.constexpr(16)


@triton.constexpr_function
def accumulator(dtype: tl.constexpr):
    """Returns the dtype in which sums of ``dtype`` are kept."""
    return tl.float64 if dtype == tl.float64 else tl.float32


@triton.jit
def block_and_plane(length, SIZE: tl.constexpr):
    """Returns which block of ``length`` rows, and of which batch entry and head, this program works on.

    One axis of the grid holds both, because the others end at 65,535. Programs of one head are neighbours, so that they
    find its keys and values in the cache; the last rows come first, because under a causal mask they see most.
    """
    blocks = tl.cdiv(length, SIZE)
    return blocks - 1 - tl.program_id(0) % blocks, tl.program_id(0) // blocks


@triton.jit
def load_rows(
    view, batch, head, begin, limit, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHECKED: tl.constexpr = True,
    box=None,
):  # fmt: skip
    """Returns rows [begin, begin + ROWS) of a view, 0 from column ``columns`` on, and, where CHECKED, from row
    ``limit`` on; otherwise all rows must be there.

    Args:
        box: descriptor of the same tensor (``boxes.box``), or None; with one, rows are 0 from the tensor's end on, and
            those between ``limit`` and there are what they are.
    """
    if box is not None:
        return tl.reshape(box.load([batch, head, begin, 0]), [ROWS, COLUMNS])
    rows, at = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    start = view.data + batch.to(tl.int64) * view.batch + head.to(tl.int64) * view.head + begin.to(tl.int64) * view.row
    inside = (at < columns)[None, :]
    if CHECKED:
        inside &= (begin + rows < limit)[:, None]
    return tl.load(start + rows.to(tl.int64)[:, None] * view.row + at[None, :], mask=inside, other=0.0)


@triton.jit
def store_rows(view, batch, head, begin, limit, columns, values, ROWS: tl.constexpr, COLUMNS: tl.constexpr, box=None):
    """Rounds values [ROWS, COLUMNS] to the view's dtype and stores them where :func:`load_rows` would load; with a box,
    up to the tensor's end, which then is ``limit``."""
    values = values.to(view.data.dtype.element_ty)
    if box is not None:
        box.store([batch, head, begin, 0], tl.reshape(values, [1, 1, ROWS, COLUMNS]))
    else:
        rows, at = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
        start = view.data + batch.to(tl.int64) * view.batch + head.to(tl.int64) * view.head
        start += begin.to(tl.int64) * view.row
        inside = (begin + rows < limit)[:, None] & (at < columns)[None, :]
        tl.store(start + rows.to(tl.int64)[:, None] * view.row + at[None, :], values, mask=inside)


@triton.jit
def store_tile(
    view, batch, head, row_begin, column_begin, limit_rows, limit, values, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Rounds values [ROWS, COLUMNS] to the view's dtype and stores them, any strides, before both limits."""
    rows, columns = row_begin + tl.arange(0, ROWS), column_begin + tl.arange(0, COLUMNS)
    to = view.data + batch.to(tl.int64) * view.batch + head.to(tl.int64) * view.head
    to += rows.to(tl.int64)[:, None] * view.row + columns.to(tl.int64)[None, :] * view.column
    inside = (rows < limit_rows)[:, None] & (columns < limit)[None, :]
    tl.store(to, values.to(view.data.dtype.element_ty), mask=inside)


@triton.jit
def _element(view, batch, head, rows, columns, inside):
    at = view.data + batch.to(tl.int64) * view.batch + head.to(tl.int64) * view.head
    at += rows.to(tl.int64) * view.row + columns.to(tl.int64) * view.column
    return tl.load(at, mask=inside, other=0.0)


@triton.jit
def finish_scores(problem, product, batch, head, rows, columns, limit, MASKED: tl.constexpr):
    """Returns the scores of a tile in powers of two, and the slope of the softcap at each of them.

    Args:
        product: what queries times keys is.
        rows: int32 queries; broadcast with ``columns`` they have the shape of ``product``, either way round.
        columns: int32 keys.
        limit: what ``masking.key_end`` returned.
        MASKED: whether anything in the tile may be invisible; what is has score -inf.

    Returns:
        ``(scores, slope)``; slope is 1.0 without a softcap.
    """
    inside = (rows < problem.seq_len_q) & (columns < problem.seq_len_k)
    slope = 1.0
    s = product * problem.scale
    if problem.softcap is not None:
        # tanh through a power of two that cannot overflow.
        folded = tl.exp2(tl.abs(s) * (-2.0 * LOG2_E / problem.softcap))
        bent = (1.0 - folded) / (1.0 + folded)
        # For small x the difference cancels; five terms of the series are exact in float64 up to 0.04.
        x = tl.abs(s) / problem.softcap
        x2 = x * x
        series = 0.05396825396825397 - x2 * 0.021869488536155203
        series = x * (1.0 - x2 * (0.3333333333333333 - x2 * (0.13333333333333333 - x2 * series)))
        bent = tl.where(x < 0.04, series, bent)
        slope = 1.0 - bent * bent
        s = tl.where(s < 0, -bent, bent) * problem.softcap
    if problem.bias.data is not None:
        s += _element(problem.bias, batch, head, rows, columns, inside).to(s.dtype)
    if problem.relative_bias.data is not None:
        diagonals = columns - rows + (problem.seq_len_q - 1)
        s += _element(problem.relative_bias, batch, head, 0 * diagonals, diagonals, inside).to(s.dtype)
    # Otherwise the scale holds log2(e).
    if problem.softcap is not None or problem.bias.data is not None or problem.relative_bias.data is not None:
        s *= LOG2_E
    if MASKED:
        seen = masking.visible(problem.mask, batch, head, rows, columns, limit, problem.seq_len_q, problem.seq_len_k)
        s = tl.where(seen, s, float("-inf"))
    return s, slope


@triton.jit
def all_finite(values):
    """Returns whether no element of a tile is NaN or infinite."""
    return tl.max((values - values != 0).to(tl.int32)) == 0


@triton.jit
def set_flags(flags, plane, begin, length, values, ROWS: tl.constexpr):
    """Says of rows [begin, begin + ROWS) whether any of their ``values`` is NaN or infinite.

    Args:
        flags: int32 [planes, ceil(length / FLAGGED)].
        begin: multiple of ROWS.
    """
    at = begin // FLAGGED + tl.arange(0, ROWS // FLAGGED)
    each = tl.cdiv(length, FLAGGED)
    bad = 1 - all_finite(values).to(tl.int32)
    tl.store(flags + plane.to(tl.int64) * each + at, bad, mask=at < each)


@triton.jit
def is_flagged(flags, plane, begin, length, ROWS: tl.constexpr):
    """Returns whether :func:`set_flags` said so of any row of [begin, begin + ROWS)."""
    at = begin // FLAGGED + tl.arange(0, ROWS // FLAGGED)
    each = tl.cdiv(length, FLAGGED)
    return tl.max(tl.load(flags + plane.to(tl.int64) * each + at, mask=at < each, other=0)) != 0


@triton.jit
def add_seen(to, weights, values, seen):
    """Returns ``to + weights @ values`` over the pairs that ``seen`` allows: 0 * NaN is NaN, so what may not be seen
    must not be touched.

    What is finite is multiplied as ever, the rest being 0. How often a sum meets NaN, infinity and minus infinity is
    counted by products of zeros and ones, and added as such: infinities of both signs make NaN by themselves.

    Args:
        to: [rows, columns].
        weights: [rows, count], 0 where ``seen`` is not.
        values: [count, columns], of which any element may be NaN or infinite.
        seen: bool [rows, count].
    """
    wide = values.to(to.dtype)
    clean = tl.where(wide - wide == 0, wide, 0.0).to(values.dtype)
    to = tl.dot(weights.to(values.dtype), clean, to, input_precision="ieee", out_dtype=to.dtype)
    if not all_finite(wide):
        up, down = (wide == float("inf")).to(tl.float16), (wide == float("-inf")).to(tl.float16)
        plus, minus = (seen & (weights > 0)).to(tl.float16), (seen & (weights < 0)).to(tl.float16)
        nothing = (seen & (weights == 0)).to(tl.float16)
        rises = tl.dot(plus, up, tl.dot(minus, down))
        falls = tl.dot(plus, down, tl.dot(minus, up))
        lost = tl.dot(seen.to(tl.float16), (wide != wide).to(tl.float16), tl.dot(nothing, up + down))
        to += tl.where(rises > 0, float("inf"), 0.0)
        to += tl.where(falls > 0, float("-inf"), 0.0)
        to += tl.where(lost > 0, float("nan"), 0.0)
    return to


@triton.jit
def split_log_total(log_total):
    """Returns ``(whole, rest)`` of the binary logarithms of rows' totals, such that a probability is
    ``exp2(score - whole) * exp2(rest)``: whole powers of two are subtracted exactly, and nothing of the rest is lost.

    ``whole`` is 0 for an empty row; nothing is left over of an infinite one.
    """
    whole = tl.where(log_total == float("-inf"), 0.0, tl.floor(log_total + 0.5))
    return whole, tl.where(tl.abs(log_total) == float("inf"), 0.0, whole - log_total)
