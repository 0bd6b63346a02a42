"""The gradients of a tile of scores, which every sum of attention's backward adds up."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastattn.kernels import philox
from fastattn.kernels.tile import accumulator, finish_scores
from fastattn.spec.attention import AttentionCall, lse_dtype

Statistics = tuple[Tensor, Tensor | None, Tensor]


def empty_statistics(call: AttentionCall, lse: Tensor) -> Statistics:
    """Returns room for shift, factor and delta of every query, like ``lse`` [batch, num_heads_q, seq_len_q].

    In half precision there is no factor: float32 holds an lse a thousand times as exactly as anything else is held.
    """
    shift, factor, delta = (lse.new_empty(lse.shape, dtype=lse_dtype(call.query.dtype)) for _ in range(3))
    return shift, factor if call.query.element_size() > 2 else None, delta


@triton.jit
def load_statistics(
    statistics, first_row, begin, limit, ROWS: tl.constexpr, TURNED: tl.constexpr, CHECKED: tl.constexpr
):
    """Returns shift, factor and delta of queries [begin, begin + ROWS), [1, ROWS] where TURNED, otherwise [ROWS, 1].

    Where TURNED, delta is a pointer yet: a thread has as many of them as of columns, and needs them last.

    Args:
        statistics: pointers, the second perhaps None.
        first_row: what ``packing.first_row`` returned.
        limit: where CHECKED, queries from it on have none.
    """
    shift, factor, delta = statistics
    rows = begin + tl.arange(0, ROWS)
    rows = rows[None, :] if TURNED else rows[:, None]
    inside = rows < limit if CHECKED else None
    share = 1.0
    if factor is not None:
        share = tl.load(factor + first_row + rows, mask=inside)
    delta += first_row
    if not TURNED:
        delta = tl.load(delta + rows, mask=inside)
    return tl.load(shift + first_row + rows, mask=inside), share, delta


@triton.jit
def score_gradients(
    problem, q, k, v, do, statistics, batch, head, row_begin, column_begin, limit, PRECISION: tl.constexpr,
    MASKED: tl.constexpr, TURNED: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Returns of a tile [ROWS, KEYS], or [KEYS, ROWS] where TURNED, its probabilities, the same as dropout leaves them,
    the gradients of its scores and those before the softcap.

    Args:
        q: queries [ROWS, DIM]; likewise ``k``, ``v`` and ``do``.
        statistics: what :func:`load_statistics` returned: ``(shift, factor, delta)``. A probability is
            ``exp2(score - shift) * factor``; delta is subtracted from the gradients of probabilities.
        limit: what ``masking.key_end`` returned.
        MASKED: whether anything may be invisible.
        TURNED: whether keys are the rows of the result, so that it multiplies queries from the left as it is.
    """
    shift, factor, delta = statistics
    rows = row_begin + tl.arange(0, ROWS)
    columns = column_begin + tl.arange(0, KEYS)
    dtype: tl.constexpr = accumulator(q.dtype)
    if TURNED:
        rows, columns = rows[None, :], columns[:, None]
        product = tl.dot(k, tl.trans(q), input_precision=PRECISION, out_dtype=dtype)
        dp = tl.dot(v, tl.trans(do), input_precision=PRECISION, out_dtype=dtype)
    else:
        rows, columns = rows[:, None], columns[None, :]
        product = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=dtype)
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION, out_dtype=dtype)
    s, slope = finish_scores(problem, product, batch, head, rows, columns, limit, MASKED)
    p = tl.exp2(s - shift) * factor
    dropped = p
    if problem.dropout.state is not None:
        plane = batch * problem.num_heads_q + head
        keep = philox.keep(problem.dropout, plane, row_begin, column_begin, ROWS, KEYS)
        if TURNED:
            keep = tl.trans(keep)
        dropped = tl.where(keep, p * problem.dropout.rescale, 0.0)
        dp = tl.where(keep, dp * problem.dropout.rescale, 0.0)
    if TURNED:
        delta = tl.load(delta + rows, mask=(rows < problem.seq_len_q) if MASKED else None)
    ds = p * (dp - delta)
    if MASKED:
        # What is invisible may be NaN, and so may what it is multiplied by.
        hidden = s == float("-inf")
        p = tl.where(hidden, 0.0, p)
        dropped = tl.where(hidden, 0.0, dropped)
        ds = tl.where(hidden, 0.0, ds)
    dx = ds
    if problem.softcap is not None:
        dx = tl.where(ds == 0, 0.0, ds * slope)
    return p, dropped, ds, dx
