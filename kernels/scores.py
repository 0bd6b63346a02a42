"""The gradients of a tile of scores, which every sum of attention's backward adds up."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastattn.kernels import philox
from fastattn.kernels.tile import accumulator, finish_scores
from fastattn.spec.attention import AttentionCall, lse_dtype


def empty_statistics(call: AttentionCall, lse: Tensor) -> list[Tensor]:
    """Returns room for shift, factor and delta of every query, like ``lse`` [batch, num_heads_q, seq_len_q]."""
    return [lse.new_empty(lse.shape, dtype=lse_dtype(call.query.dtype)) for _ in range(3)]


@triton.jit
def load_statistics(statistics, begin, seq_len_q, ROWS: tl.constexpr):
    """Returns shift, factor and delta of queries [begin, begin + ROWS); given are pointers to those of query 0."""
    shift, factor, delta = statistics
    rows = begin + tl.arange(0, ROWS)
    inside = rows < seq_len_q
    return (
        tl.load(shift + rows, mask=inside, other=0.0),
        tl.load(factor + rows, mask=inside, other=0.0),
        tl.load(delta + rows, mask=inside, other=0.0),
    )


@triton.jit
def score_gradients(
    problem, q, k, v, do, shift, factor, delta, batch, head, row_begin, column_begin, limit,
    PRECISION: tl.constexpr, MASKED: tl.constexpr, TURNED: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Returns of a tile [ROWS, KEYS], or [KEYS, ROWS] where TURNED, its probabilities, the same as dropout leaves them,
    the gradients of its scores and those before the softcap.

    Args:
        q: queries [ROWS, DIM]; likewise ``k``, ``v`` and ``do``.
        shift: a probability is ``exp2(score - shift) * factor``; [ROWS], likewise ``factor``.
        delta: what is subtracted from the gradients of probabilities; [ROWS].
        limit: what ``masking.key_end`` returned.
        MASKED: whether anything may be invisible.
        TURNED: whether keys are the rows of the result, so that it multiplies queries from the left as it is.
    """
    rows = row_begin + tl.arange(0, ROWS)
    columns = column_begin + tl.arange(0, KEYS)
    dtype: tl.constexpr = accumulator(q.dtype)
    if TURNED:
        rows, columns = rows[None, :], columns[:, None]
        shift, factor, delta = shift[None, :], factor[None, :], delta[None, :]
        product = tl.dot(k, tl.trans(q), input_precision=PRECISION, out_dtype=dtype)
        dp = tl.dot(v, tl.trans(do), input_precision=PRECISION, out_dtype=dtype)
    else:
        rows, columns = rows[:, None], columns[None, :]
        shift, factor, delta = shift[:, None], factor[:, None], delta[:, None]
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
