"""The running softmax of a block of queries, which attention's forward and decode kernels share.

Source: Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018; Dao, "FlashAttention-2", 2023.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastattn.kernels import masking, packing, philox
from fastattn.kernels.numbers import empty_sum, inverse
from fastattn.kernels.tile import LOG2_E, accumulator, all_finite, finish_scores, load_rows
from fastattn.spec.attention import AttentionCall

# The fewest keys that a product takes, and that every tile is a multiple of.
FEW = tl.constexpr(16)


def folds(call: AttentionCall) -> bool:
    """Returns whether scores are products times a positive number: then the greatest product is the greatest score,
    and scale and maximum are one multiply-add away from the exponential."""
    plain = not call.softcap and call.bias is None and call.relative_bias is None
    return plain and call.softmax_scale > 0.0


@triton.jit
def nothing_yet(dtype: tl.constexpr, ROWS: tl.constexpr, DIM_V: tl.constexpr):
    """Returns a state that has seen no key: ``(out, top, total)``, the output before its division [ROWS, DIM_V], the
    maximum of the scores in powers of two and the sum of their exponentials [ROWS]."""
    return empty_sum(ROWS, DIM_V, dtype), tl.full([ROWS], float("-inf"), dtype), tl.zeros([ROWS], dtype)


@triton.jit
def load_keys(
    view, box, pages, problem, batch, head, begin, limit, columns, PAGE: tl.constexpr, KEYS: tl.constexpr,
    DIM: tl.constexpr, CHECKED: tl.constexpr,
):  # fmt: skip
    """Returns keys, or values, [begin, begin + KEYS) of a batch entry, as ``tile.load_rows`` returns rows.

    Args:
        view: of [batch, num_heads_kv, seq_len_k, ...], or, where PAGE is not 0, of [pages, num_heads_kv, PAGE, ...].
        box: descriptor of the whole tensor, or None.
        pages: ``decode.Pages``; a number of its table that is no page's is the nearest that is.
        begin: multiple of KEYS.
    """
    if box is not None:
        tile = load_rows(view, batch, head, packing.key_row(problem, begin), limit, columns, KEYS, DIM, CHECKED, box)
    elif PAGE == 0:
        tile = load_rows(view, batch, head, begin, limit, columns, KEYS, DIM, CHECKED)
    elif PAGE % KEYS == 0:
        # The tile lies in one page.
        page = tl.load(pages.table + batch.to(tl.int64) * pages.stride + begin // PAGE)
        page = tl.minimum(tl.maximum(page, 0), pages.number - 1)
        within = begin % PAGE
        tile = load_rows(view, page, head, within, limit - begin + within, columns, KEYS, DIM, CHECKED)
    else:
        keys, at = begin + tl.arange(0, KEYS), tl.arange(0, DIM)
        there = keys < limit
        page = tl.load(pages.table + batch.to(tl.int64) * pages.stride + keys // PAGE, mask=there, other=0)
        page = tl.minimum(tl.maximum(page, 0), pages.number - 1)
        start = view.data + head.to(tl.int64) * view.head
        rows = page.to(tl.int64) * view.batch + (keys % PAGE).to(tl.int64) * view.row
        inside = (at < columns)[None, :]
        if CHECKED:
            inside &= there[:, None]
        tile = tl.load(start + rows[:, None] + at[None, :], mask=inside, other=0.0)
    return tile


@triton.jit
def add_tiles(
    state, q, key, value, key_box, value_box, pages, problem, batch, head_kv, heads, rows, begin, end, gap_begin, gap,
    limit, head_dim, head_dim_v, PRECISION: tl.constexpr, FOLDED: tl.constexpr, PAGE: tl.constexpr,
    MASKED: tl.constexpr, POISONED: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr,
    DIM_V: tl.constexpr,
):  # fmt: skip
    """Moves a state over the keys in [begin, end), but for ``gap`` of them from ``gap_begin`` on; all but ``end`` are
    multiples of KEYS.

    Args:
        q: queries [ROWS, DIM].
        key_box: descriptor of ``key`` (``boxes.box``), or None; likewise ``value_box``.
        pages: ``decode.Pages``, if PAGE, the number of keys a page, is not 0.
        heads: of each query, int32 [ROWS, 1], or one for all.
        rows: of each query, int32 [ROWS, 1]; beyond the last one it is none.
        FOLDED: what :func:`folds` returned.
        MASKED: whether anything may be invisible.
        POISONED: whether values may be NaN or infinite where they are invisible.
    """
    out, top, total = state
    # What is rare shall not take shared memory for tiles that are on their way.
    STAGES: tl.constexpr = 1 if POISONED else None
    for at in tl.range(begin, end - gap, KEYS, num_stages=STAGES):
        start = tl.multiple_of(tl.where(at < gap_begin, at, at + gap), KEYS)
        columns = (start + tl.arange(0, KEYS))[None, :]
        k = load_keys(key, key_box, pages, problem, batch, head_kv, start, limit, head_dim, PAGE, KEYS, DIM, MASKED)
        product = _products(q, k, PRECISION, out.dtype, ROWS, KEYS, DIM)
        # -inf minus -inf is NaN: a row that has seen nothing yet subtracts 0.
        if FOLDED:
            if MASKED:
                seen = masking.visible(
                    problem.mask, batch, heads, rows, columns, limit, problem.seq_len_q, problem.seq_len_k
                )
                product = tl.where(seen, product, float("-inf"))
            now = tl.maximum(top, tl.max(product, axis=1) * problem.scale)
            shift = tl.where(now == float("-inf"), 0.0, now)
            p = tl.exp2(product * problem.scale - shift[:, None])
        else:
            s, _ = finish_scores(problem, product, batch, heads, rows, columns, limit, MASKED)
            now = tl.maximum(top, tl.max(s, axis=1))
            shift = tl.where(now == float("-inf"), 0.0, now)
            p = tl.exp2(s - shift[:, None])
        alpha = tl.exp2(top - shift)
        total = total * alpha + tl.sum(p, axis=1)
        top = now
        if problem.dropout.state is not None:
            planes = batch * problem.num_heads_q + heads
            p = tl.where(philox.keep_of(problem.dropout, planes, rows, start, ROWS, KEYS), p, 0.0)
        v = load_keys(
            value, value_box, pages, problem, batch, head_kv, start, limit, head_dim_v, PAGE, KEYS, DIM_V, MASKED
        )
        out *= alpha[:, None]
        if POISONED:
            seen = masking.visible(
                problem.mask, batch, heads, rows, columns, limit, problem.seq_len_q, problem.seq_len_k
            )
            out = _add_each_seen(out, p, v, seen, KEYS)
        else:
            out = tl.dot(p.to(v.dtype), v, out, input_precision=PRECISION, out_dtype=out.dtype)
    return out, top, total


@triton.jit
def _products(
    q, k, PRECISION: tl.constexpr, DTYPE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr
):
    """Returns the products [ROWS, KEYS] of queries and keys.

    Plain cores multiply from registers, and a thread would hold all columns of its queries and keys. Of a few queries,
    which leave the threads little else to do, each warp takes some columns instead, and their sums are added up.
    """
    SLICE: tl.constexpr = 16 if q.dtype == tl.float64 else 32
    WIDE: tl.constexpr = q.dtype == tl.float64 or (q.dtype == tl.float32 and PRECISION == "ieee")
    if WIDE and ROWS == 16 and DIM > SLICE:
        PARTS: tl.constexpr = DIM // SLICE
        of_q = tl.permute(tl.reshape(q, [ROWS, PARTS, SLICE]), [1, 0, 2])
        of_k = tl.permute(tl.reshape(k, [KEYS, PARTS, SLICE]), [1, 2, 0])
        product = tl.sum(tl.dot(of_q, of_k, input_precision=PRECISION, out_dtype=DTYPE), axis=0)
    else:
        product = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=DTYPE)
    return product


@triton.jit
def _add_each_seen(to, weights, values, seen, KEYS: tl.constexpr):
    """Returns ``to + weights @ values`` over the pairs that ``seen`` allows: 0 * NaN is NaN, so what may not be seen
    must not be touched.  It does what ``tile.add_seen`` does key by key, slowly, in a few registers.

    Args:
        to: [rows, columns].
        weights: [rows, KEYS].
        values: [KEYS, columns], of which any element may be NaN or infinite.
        seen: bool [rows, KEYS].
    """
    each = tl.arange(0, KEYS)
    for k in range(KEYS):
        here = each == k
        weight = tl.sum(tl.where(here[None, :], weights, 0.0), axis=1)
        value = tl.sum(tl.where(here[:, None], values, 0.0).to(to.dtype), axis=0)
        may = tl.max((seen & here[None, :]).to(tl.int32), axis=1) > 0
        to += tl.where(may[:, None], weight[:, None] * value[None, :], 0.0)
    return to


@triton.jit
def over_tiles(
    q, key, value, key_box, value_box, pages, problem, batch, head_kv, heads, rows, parts, limit, head_dim, head_dim_v,
    PRECISION: tl.constexpr, FOLDED: tl.constexpr, PAGE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    DIM: tl.constexpr, DIM_V: tl.constexpr,
):  # fmt: skip
    """Returns the state over the keys of ``parts``, as ``masking.key_parts`` returns them; see :func:`add_tiles`. Where
    :func:`is_poisoned` says so its output is to be made again, by :func:`over_seen_keys`."""
    begin, free_begin, free_end, end = parts
    state = nothing_yet(accumulator(q.dtype), ROWS, DIM_V)
    state = add_tiles(
        state, q, key, value, key_box, value_box, pages, problem, batch, head_kv, heads, rows, free_begin, free_end,
        free_end, 0, limit, head_dim, head_dim_v, PRECISION, FOLDED, PAGE, False, False, ROWS, KEYS, DIM, DIM_V,
    )  # fmt: skip
    # A box would also fetch padding, and the next one of packed sequences, whose values may be NaN.
    CUT_OFF: tl.constexpr = problem.mask.key_lengths is not None or problem.packing.starts_q is not None
    return add_tiles(
        state, q, key, value, None if CUT_OFF else key_box, None if CUT_OFF else value_box, pages, problem, batch,
        head_kv, heads, rows, begin, end, free_begin, free_end - free_begin, limit, head_dim, head_dim_v, PRECISION,
        FOLDED, PAGE, True, False, ROWS, KEYS, DIM, DIM_V,
    )  # fmt: skip


@triton.jit
def is_poisoned(problem, out):
    """Returns whether an output is not finite, perhaps by a value that its row may not see: 0 * NaN is NaN."""
    poisoned = False
    if masking.hides(problem.mask.diag_lo, problem.mask.key_lengths, problem.mask.segments_q, problem.mask.dense.data):
        poisoned = not all_finite(out)
    return poisoned


@triton.jit
def over_seen_keys(
    q, key, value, pages, problem, batch, head_kv, heads, rows, begin, end, limit, head_dim, head_dim_v,
    PRECISION: tl.constexpr, FOLDED: tl.constexpr, PAGE: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr,
    DIM_V: tl.constexpr,
):  # fmt: skip
    """Returns the state over keys [begin, end), touching only what may be seen; a few keys a step, because the
    registers of this loop are the whole kernel's. ``begin`` is a multiple of FEW."""
    return add_tiles(
        nothing_yet(accumulator(q.dtype), ROWS, DIM_V), q, key, value, None, None, pages, problem, batch, head_kv,
        heads, rows, begin, end, end, 0, limit, head_dim, head_dim_v, PRECISION, FOLDED, PAGE, True, True, ROWS, FEW,
        DIM, DIM_V,
    )  # fmt: skip


@triton.jit
def over_keys(
    q, key, value, key_box, value_box, pages, problem, batch, head_kv, heads, rows, parts, limit, head_dim, head_dim_v,
    PRECISION: tl.constexpr, FOLDED: tl.constexpr, PAGE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    DIM: tl.constexpr, DIM_V: tl.constexpr,
):  # fmt: skip
    """Returns what :func:`over_tiles` does, made again where it is poisoned."""
    out, top, total = over_tiles(
        q, key, value, key_box, value_box, pages, problem, batch, head_kv, heads, rows, parts, limit, head_dim,
        head_dim_v, PRECISION, FOLDED, PAGE, ROWS, KEYS, DIM, DIM_V,
    )  # fmt: skip
    if is_poisoned(problem, out):
        begin, _, _, end = parts
        out, top, total = over_seen_keys(
            q, key, value, pages, problem, batch, head_kv, heads, rows, begin, end, limit, head_dim, head_dim_v,
            PRECISION, FOLDED, PAGE, ROWS, DIM, DIM_V,
        )  # fmt: skip
    return out, top, total


@triton.jit
def finish(state, sinks, heads, dropout, dtype: tl.constexpr):
    """Returns the output of a state and the log of its softmax's denominator in powers of two, float64 [ROWS].

    Args:
        sinks: [num_heads_q], or None; a sink is one more score, without a value.
        heads: of each query, int32 [ROWS], or one for all.
        dropout: Dropout.
        dtype: of the inputs. In half precision logarithms are float32's, off by 2^-22 of themselves: a float64's takes
            as long as a step over the keys.
    """
    narrow: tl.constexpr = tl.float32 if dtype.primitive_bitwidth == 16 else tl.float64
    out, top, total = state
    shift = tl.where(top == float("-inf"), 0.0, top)
    nothing = total == 0
    total = tl.where(nothing, 1.0, total)
    log_total = tl.where(nothing, float("-inf"), shift.to(tl.float64) + tl.log2(total.to(narrow)).to(tl.float64))
    log_total = tl.where(top == float("inf"), float("inf"), log_total)
    factor = tl.where(nothing, 0.0, inverse(total))
    if sinks is not None:
        sink = tl.load(sinks + heads).to(tl.float64) * LOG2_E
        greater = tl.maximum(log_total, sink)
        parts = tl.exp2((log_total - greater).to(narrow)) + tl.exp2((sink - greater).to(narrow))
        both = greater + tl.log2(parts).to(tl.float64)
        both = tl.where(greater == float("-inf"), greater, both)
        factor = tl.where(nothing, 0.0, tl.exp2((shift.to(tl.float64) - both).to(narrow))).to(out.dtype)
        log_total = both
    if dropout.state is not None:
        factor *= dropout.rescale
    return out * factor[:, None], log_total
