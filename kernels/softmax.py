"""Softmax and log-softmax of rows of any length, forward and backward.

Shapes: every tensor is a View of [batch, heads, rows, columns], of which ``columns`` is the dimension that the softmax
runs over.  A row that fits is read once; a longer one is read in chunks, a second time backwards, so that what was read
last is still in the cache, and where there are too few rows for a GPU several programs share each.

Longer than 400 lines because rows that fit and longer ones, forward and backward, share every step.

Source: Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018, algorithm 3.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn.kernels.arguments import View
from fastattn.kernels.launch import Configuration, Launch
from fastattn.kernels.numbers import inverse, number
from fastattn.kernels.replay import replayed
from fastattn.kernels.rows import ANYWHERE, long_options, row_tile, row_views, run_rows, spots, unit, warps
from fastattn.kernels.tile import accumulator
from fastattn.spec.attention import lse_dtype
from fastattn.spec.softmax import SoftmaxBackwardCall, SoftmaxCall, softmax_call

# Programs below which a GPU is not full, and long rows are shared among several.
_FEW_PROGRAMS = 256


@triton.jit
def _place(heads, rows, ROWS: tl.constexpr):
    """Returns a program's batch, head and rows, int64 [ROWS]; the grid is all tiles of rows, one after another."""
    tiles = tl.cdiv(rows, ROWS)
    plane = tl.program_id(0) // tiles
    first = tl.program_id(0) % tiles * ROWS
    return (plane // heads).to(tl.int64), (plane % heads).to(tl.int64), first + tl.arange(0, ROWS).to(tl.int64)


@triton.jit
def _scores(
    x, mask, place, at, rows, columns, scale, UNIT: tl.constexpr, DTYPE: tl.constexpr, EDGE: tl.constexpr = False,
    LAST: tl.constexpr = False,
):  # fmt: skip
    """Returns scaled elements, -inf where nothing is visible, and what is visible."""
    to, inside = spots(x, place, at, rows, columns, UNIT, EDGE)
    seen = inside
    if mask.data is not None:
        to_mask, _ = spots(mask, place, at, rows, columns, UNIT, EDGE)
        seen &= tl.load(to_mask, mask=inside, other=0, eviction_policy="evict_first" if LAST else "") != 0
    values = tl.load(to, mask=inside, other=0.0, eviction_policy="evict_first" if LAST else "").to(DTYPE)
    return tl.where(seen, values * number(scale, DTYPE)[:, None], float("-inf")), seen


@triton.jit
def _finish(s, seen, shift, total, HAS_MASK: tl.constexpr, LOG: tl.constexpr):
    """Returns the (log-)softmax of scores."""
    if LOG:
        result = s - shift[:, None] - tl.log(total)[:, None]
        hidden = float("-inf")
    else:
        result = tl.exp(s - shift[:, None]) * inverse(total)[:, None]
        hidden = 0.0
    if HAS_MASK:
        result = tl.where(seen, result, hidden)
    return result


@triton.jit
def _store(
    view, place, at, rows, columns, values, UNIT: tl.constexpr, EDGE: tl.constexpr = False, LAST: tl.constexpr = False
):
    to, inside = spots(view, place, at, rows, columns, UNIT, EDGE)
    tl.store(to, values.to(view.data.dtype.element_ty), mask=inside, eviction_policy="evict_first" if LAST else "")


@triton.jit
def softmax_forward(
    x,
    out,
    mask,
    heads,
    rows,
    columns,
    scale: tl.float64,
    LOG: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Writes the (log-)softmax of ROWS rows, each of at most COLUMNS elements.

    Grid: batch * heads * tiles of rows.

    Args:
        x: View; likewise ``out``, and ``mask`` of 0 and 1 or of no data.
        scale: what elements are multiplied by.
        UNIT: what ``rows.unit`` returned.
    """
    dtype: tl.constexpr = accumulator(x.data.dtype.element_ty)
    place = _place(heads, rows, ROWS)
    at = tl.arange(0, COLUMNS).to(tl.int64)
    if UNIT == ANYWHERE:
        # First, lest the edges are waited for once more after the middle.
        edge, edge_seen = _scores(x, mask, place, at, rows, columns, scale, UNIT, dtype, True)
    s, seen = _scores(x, mask, place, at, rows, columns, scale, UNIT, dtype)
    top = tl.max(s, axis=1)
    if UNIT == ANYWHERE:
        top = tl.maximum(top, tl.max(edge, axis=1))
    shift = _finite(top)
    total = tl.sum(tl.exp(s - shift[:, None]), axis=1)
    if UNIT == ANYWHERE:
        total += tl.sum(tl.exp(edge - shift[:, None]), axis=1)
        edge = _finish(edge, edge_seen, shift, total, mask.data is not None, LOG)
        _store(out, place, at, rows, columns, edge, UNIT, True)
    _store(out, place, at, rows, columns, _finish(s, seen, shift, total, mask.data is not None, LOG), UNIT)


@triton.jit
def _finite(top):
    """Returns what is subtracted of scores: -inf minus -inf is NaN, so a row of nothing but -inf subtracts 0."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def _joined(top, total, other_top, other_total):
    """Returns the maximum of two, and what of either is a sum of exponentials below its maximum."""
    now = tl.maximum(top, other_top)
    shift = _finite(now)
    return now, total * tl.exp(top - shift) + other_total * tl.exp(other_top - shift)


@triton.jit
def _share(columns, COLUMNS: tl.constexpr):
    """Returns the first and the last chunk of a program's share of a row."""
    chunks = tl.cdiv(columns, COLUMNS)
    share = tl.cdiv(chunks, tl.num_programs(1))
    first = tl.program_id(1) * share
    return first, tl.minimum(first + share, chunks)


@triton.jit
def _edge_rows(rows):
    """Returns how many rows there are for edges, of which the first share of columns takes care."""
    return tl.where(tl.program_id(1) == 0, rows, 0)


@triton.jit
def _statistics_at(statistics, row, rows, split):
    """Returns pointers to a number a row of one share of columns; ``statistics`` is [splits, all rows]."""
    all_rows = tl.num_programs(0).to(tl.int64)
    plane = tl.program_id(0) // tl.cdiv(rows, row.shape[0])
    return statistics + (split * (all_rows // tl.cdiv(rows, row.shape[0])) + plane) * rows + row


@triton.jit
def softmax_forward_long(
    x,
    out,
    mask,
    tops,
    totals,
    heads,
    rows,
    columns,
    scale: tl.float64,
    LOG: tl.constexpr,
    UNIT: tl.constexpr,
    SPLITS: tl.constexpr,
    COUNT: tl.constexpr,
    WRITE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RUN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Writes the (log-)softmax of ROWS rows of any length, of which a program may have a share.

    Grid: batch * heads * tiles of rows; shares.

    Args:
        tops: [shares, batch * heads * rows], running maxima; likewise ``totals``, sums of exponentials below them.
        SPLITS: shares of a row.
        COUNT: whether to find a share's maximum and sum; with more than one share, they are written.
        WRITE: whether to write results; with more than one share, from what all shares have written.
        RUN: neighbours that have a running maximum of their own; as few as a thread has, no thread waits for another.
        STAGES: chunks on their way.

    The others are those of :func:`softmax_forward`.
    """
    dtype: tl.constexpr = accumulator(x.data.dtype.element_ty)
    place = _place(heads, rows, ROWS)
    row = place[2]
    column = tl.arange(0, COLUMNS).to(tl.int64)
    first, last = _share(columns, COLUMNS)
    top = tl.full([ROWS], float("-inf"), dtype)
    total = tl.zeros([ROWS], dtype)
    if COUNT:
        tops_now = tl.full([ROWS, COLUMNS // RUN], float("-inf"), dtype)
        totals_now = tl.zeros([ROWS, COLUMNS // RUN], dtype)
        for chunk in tl.range(first, last, num_stages=STAGES):
            s, _ = _scores(x, mask, place, chunk * COLUMNS + column, rows, columns, scale, UNIT, dtype)
            runs = tl.reshape(s, [ROWS, COLUMNS // RUN, RUN])
            now = tl.maximum(tops_now, tl.max(runs, axis=2))
            shift = _finite(now)
            totals_now = totals_now * tl.exp(tops_now - shift) + tl.sum(tl.exp(runs - shift[:, :, None]), axis=2)
            tops_now = now
        top = tl.max(tops_now, axis=1)
        total = tl.sum(totals_now * tl.exp(tops_now - _finite(top)[:, None]), axis=1)
        if UNIT == ANYWHERE:
            edge, _ = _scores(x, mask, place, column, _edge_rows(rows), columns, scale, UNIT, dtype, True)
            edge_top = tl.max(edge, axis=1)
            edge_total = tl.sum(tl.exp(edge - _finite(edge_top)[:, None]), axis=1)
            top, total = _joined(top, total, edge_top, edge_total)
        if SPLITS > 1:
            tl.store(_statistics_at(tops, row, rows, tl.program_id(1)), top, mask=row < rows)
            tl.store(_statistics_at(totals, row, rows, tl.program_id(1)), total, mask=row < rows)
    if WRITE:
        if SPLITS > 1:
            for split in range(SPLITS):
                share_top = tl.load(_statistics_at(tops, row, rows, split), mask=row < rows, other=0.0)
                share_total = tl.load(_statistics_at(totals, row, rows, split), mask=row < rows, other=1.0)
                top, total = _joined(top, total, share_top, share_total)
        shift = _finite(top)
        for back in tl.range(first, last, num_stages=STAGES):
            at = (last - 1 - (back - first)) * COLUMNS + column
            s, seen = _scores(x, mask, place, at, rows, columns, scale, UNIT, dtype, False, True)
            result = _finish(s, seen, shift, total, mask.data is not None, LOG)
            _store(out, place, at, rows, columns, result, UNIT, False, True)
        if UNIT == ANYWHERE:
            here = _edge_rows(rows)
            edge, edge_seen = _scores(x, mask, place, column, here, columns, scale, UNIT, dtype, True)
            edge = _finish(edge, edge_seen, shift, total, mask.data is not None, LOG)
            _store(out, place, column, here, columns, edge, UNIT, True)


@triton.jit
def _gradients(
    out, dout, mask, place, at, rows, columns, UNIT: tl.constexpr, DTYPE: tl.constexpr, EDGE: tl.constexpr = False,
    LAST: tl.constexpr = False,
):  # fmt: skip
    """Returns results, their gradients (0 where nothing is visible), and what is visible."""
    to, inside = spots(out, place, at, rows, columns, UNIT, EDGE)
    result = tl.load(to, mask=inside, other=0.0, eviction_policy="evict_first" if LAST else "").to(DTYPE)
    to, seen = spots(dout, place, at, rows, columns, UNIT, EDGE)
    grad = tl.load(to, mask=seen, other=0.0, eviction_policy="evict_first" if LAST else "").to(DTYPE)
    if mask.data is not None:
        to, _ = spots(mask, place, at, rows, columns, UNIT, EDGE)
        seen &= tl.load(to, mask=seen, other=0, eviction_policy="evict_first" if LAST else "") != 0
        grad = tl.where(seen, grad, 0.0)
    return result, grad, seen


@triton.jit
def _finish_gradient(result, grad, seen, total, scale, HAS_MASK: tl.constexpr, LOG: tl.constexpr):
    """Returns the gradient of the input."""
    found = grad - tl.exp(result) * total[:, None] if LOG else result * (grad - total[:, None])
    if HAS_MASK:
        found = tl.where(seen, found, 0.0)
    return found * number(scale, found.dtype)[:, None]


@triton.jit
def softmax_backward(
    out,
    dout,
    dinput,
    mask,
    heads,
    rows,
    columns,
    scale: tl.float64,
    LOG: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Writes the gradient of ROWS rows, each of at most COLUMNS elements, from results alone.

    ``scale * p * (dout - sum(p * dout))`` for the softmax p; ``scale * (dout - exp(out) * sum(dout))`` for its
    logarithm.  Grid and arguments: :func:`softmax_forward`'s.
    """
    dtype: tl.constexpr = accumulator(out.data.dtype.element_ty)
    place = _place(heads, rows, ROWS)
    at = tl.arange(0, COLUMNS).to(tl.int64)
    if UNIT == ANYWHERE:
        edge, edge_grad, edge_seen = _gradients(out, dout, mask, place, at, rows, columns, UNIT, dtype, True)
    result, grad, seen = _gradients(out, dout, mask, place, at, rows, columns, UNIT, dtype)
    total = tl.sum(grad if LOG else result * grad, axis=1)
    if UNIT == ANYWHERE:
        total += tl.sum(edge_grad if LOG else edge * edge_grad, axis=1)
        found = _finish_gradient(edge, edge_grad, edge_seen, total, scale, mask.data is not None, LOG)
        _store(dinput, place, at, rows, columns, found, UNIT, True)
    found = _finish_gradient(result, grad, seen, total, scale, mask.data is not None, LOG)
    _store(dinput, place, at, rows, columns, found, UNIT)


@triton.jit
def softmax_backward_long(
    out,
    dout,
    dinput,
    mask,
    totals,
    heads,
    rows,
    columns,
    scale: tl.float64,
    LOG: tl.constexpr,
    UNIT: tl.constexpr,
    SPLITS: tl.constexpr,
    COUNT: tl.constexpr,
    WRITE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Writes the gradient of ROWS rows of any length, as :func:`softmax_forward_long` writes their results."""
    dtype: tl.constexpr = accumulator(out.data.dtype.element_ty)
    place = _place(heads, rows, ROWS)
    row = place[2]
    column = tl.arange(0, COLUMNS).to(tl.int64)
    first, last = _share(columns, COLUMNS)
    total = tl.zeros([ROWS], dtype)
    if COUNT:
        # Of each column of a chunk: no thread waits for another before the last.
        totals_now = tl.zeros([ROWS, COLUMNS], dtype)
        for chunk in tl.range(first, last, num_stages=STAGES):
            result, grad, _ = _gradients(out, dout, mask, place, chunk * COLUMNS + column, rows, columns, UNIT, dtype)
            totals_now += grad if LOG else result * grad
        total = tl.sum(totals_now, axis=1)
        if UNIT == ANYWHERE:
            here = _edge_rows(rows)
            edge, edge_grad, _ = _gradients(out, dout, mask, place, column, here, columns, UNIT, dtype, True)
            total += tl.sum(edge_grad if LOG else edge * edge_grad, axis=1)
        if SPLITS > 1:
            tl.store(_statistics_at(totals, row, rows, tl.program_id(1)), total, mask=row < rows)
    if WRITE:
        if SPLITS > 1:
            for split in range(SPLITS):
                total += tl.load(_statistics_at(totals, row, rows, split), mask=row < rows, other=0.0)
        for back in tl.range(first, last, num_stages=STAGES):
            at = (last - 1 - (back - first)) * COLUMNS + column
            result, grad, seen = _gradients(out, dout, mask, place, at, rows, columns, UNIT, dtype, False, True)
            found = _finish_gradient(result, grad, seen, total, scale, mask.data is not None, LOG)
            _store(dinput, place, at, rows, columns, found, UNIT, False, True)
        if UNIT == ANYWHERE:
            here = _edge_rows(rows)
            edge, edge_grad, edge_seen = _gradients(out, dout, mask, place, column, here, columns, UNIT, dtype, True)
            edge = _finish_gradient(edge, edge_grad, edge_seen, total, scale, mask.data is not None, LOG)
            _store(dinput, place, column, here, columns, edge, UNIT, True)


@replayed
def softmax_fwd(call: SoftmaxCall) -> Tensor:
    """Returns the (log-)softmax of a canonical call, contiguous."""
    out = call.input.new_empty(call.input.shape, dtype=call.out_dtype)
    views, sizes = row_views(call.dim, call.input, out, call.mask)
    for launch in launches(call, views, sizes, out.dtype, backward=False):
        run_rows(launch)
    return out


@replayed
def softmax_bwd(call: SoftmaxBackwardCall) -> Tensor:
    """Returns the gradient of the input, contiguous."""
    dinput = call.out.new_empty(call.out.shape, dtype=call.dtype)
    views, sizes = row_views(call.dim, call.out, call.dout, dinput, call.mask)
    for launch in launches(call, views, sizes, call.out.dtype, backward=True):
        run_rows(launch)
    return dinput


def launches(
    call: SoftmaxCall | SoftmaxBackwardCall,
    views: Sequence[View],
    sizes: tuple[int, int, int, int],
    dtype: torch.dtype,
    *,
    backward: bool,
) -> list[Launch]:
    """Returns what to launch, as kernel, grid, arguments and options: one kernel; two where rows have shares."""
    batch, heads, rows, columns = sizes
    if batch * heads * rows * columns == 0:
        return []
    wide = lse_dtype(dtype)
    read = (*views[: 2 if backward else 1], views[-1])
    moved = sum(v.data.element_size() for v in read if v.data is not None)
    tile_rows, tile_columns = row_tile(rows, columns, wide.itemsize, views[0].column, 2 if backward else 1, moved)
    programs = batch * heads * -(-rows // tile_rows)
    options = {
        "LOG": call.log,
        "UNIT": unit(views, columns),
        "ROWS": tile_rows,
        "COLUMNS": tile_columns,
        "num_warps": warps(tile_rows * tile_columns),
    }
    numbers = (heads, rows, columns, call.scale)
    if tile_columns >= columns:
        kernel = softmax_backward if backward else softmax_forward
        return [(kernel, (programs,), (*views, *numbers), options)]
    kernel = softmax_backward_long if backward else softmax_forward_long
    splits = max(1, _FEW_PROGRAMS // programs)
    if views[0].column == 1:
        options |= long_options(columns, tile_columns, moved, splits)
    else:
        options["STAGES"] = 1
    if not backward:
        # What a thread loads at once, so that no thread waits for another; where that is not known, all.
        options["RUN"] = 8 if views[0].column == 1 else tile_columns
    splits = min(splits, -(-columns // options["COLUMNS"]))
    shape = (splits, batch * heads * rows) if splits > 1 else (0,)
    statistics = [views[0].data.new_empty(shape, dtype=wide) for _ in range(1 if backward else 2)]
    return [
        (
            kernel,
            (programs, splits),
            (*views, *statistics, *numbers),
            {**options, "SPLITS": splits, "COUNT": count, "WRITE": write},
        )
        for count, write in ([(True, True)] if splits == 1 else [(True, False), (False, True)])
    ]


def configurations(architecture: int) -> Iterator[Configuration]:
    """Yields the kernels for rows of every length, in shares too, and for a dimension that is not the last."""
    for dtype, shape, dim in (
        (torch.bfloat16, (8192, 1024), 1),
        (torch.float32, (8192, 32768), 1),
        (torch.bfloat16, (1024, 1 << 18), 1),
        (torch.bfloat16, (4, 1 << 18), 1),
        (torch.bfloat16, (64, 512, 512), 1),
        (torch.float64, (8192, 1024), 1),
        (torch.bfloat16, (8192, 1000), 1),
        (torch.bfloat16, (8192, 1001), 1),
        (torch.bfloat16, (8192, 50257), 1),
    ):
        x = torch.empty(shape, dtype=dtype, device="meta")
        mask = torch.empty(shape, dtype=torch.bool, device="meta") if dtype != torch.bfloat16 else None
        forward = softmax_call(x, dim, mask=mask, scale=1.0, dtype=None, log=mask is not None, backend="triton")
        backward = SoftmaxBackwardCall(x, x, mask, dim, 1.0, dtype, forward.log, "triton")
        name = f"{dtype} {list(shape)}" + ("" if mask is None else ", masked, log")
        for call, tensors, way in ((forward, (x, x), "forward"), (backward, (x, x, x), "backward")):
            views, sizes = row_views(dim, *tensors, mask)
            for kernel, _, arguments, options in launches(call, views, sizes, dtype, backward=way == "backward"):
                yield Configuration(f"softmax {way} {name}".replace("torch.", ""), kernel, arguments, options)
