"""Layer norm and rms norm of rows of any length, with a residual, forward and backward.

A row that fits is read once; a longer one in chunks, and once more to be written.  Gradients of parameters are sums
over rows: a program adds up a block of rows, and ``sums.py`` adds up the blocks.

Longer than 400 lines because rows that fit and longer ones, forward and backward, share every step.

Source: Ba, Kiros and Hinton, "Layer Normalization", 2016; Zhang and Sennrich, "Root Mean Square Layer Normalization",
2019; Chan, Golub and LeVeque, "Algorithms for Computing the Sample Variance", 1983, for shifted sums.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn.kernels.arguments import View
from fastattn.kernels.launch import Configuration, Launch, cdiv
from fastattn.kernels.numbers import inverse, number, root
from fastattn.kernels.replay import replayed
from fastattn.kernels.rows import (
    ANYWHERE,
    aligned,
    chunk_columns,
    long_options,
    matrix,
    numbers,
    power_of_two,
    row_tile,
    run_rows,
    spots,
    unit,
    warps,
)
from fastattn.kernels.sums import MOST_BLOCKS, sum_rows
from fastattn.kernels.tile import accumulator
from fastattn.spec.attention import lse_dtype
from fastattn.spec.checks import empty_contiguous
from fastattn.spec.norm import NormBackwardCall, NormCall, empty_outputs

# Longest row whose parameters' gradients a program keeps in registers beside the row, for 4 and for 8 bytes.
_LONGEST_OWN = {4: 8192, 8: 4096}
# Rows that begin anywhere come alone, because the weights of each lie differently; shorter ones, of which a tile has
# more than these, move fewer bytes at a time instead.
_FEW_ROWS = 2


@triton.jit
def _load(x, row, at, rows, columns, UNIT: tl.constexpr, DTYPE: tl.constexpr, EDGE: tl.constexpr, LAST: tl.constexpr):
    """Returns elements of rows, 0 outside, and which exist."""
    to, inside = spots(x, _place(row), at, rows, columns, UNIT, EDGE)
    return tl.load(to, mask=inside, other=0.0, eviction_policy="evict_first" if LAST else "").to(DTYPE), inside


@triton.jit
def _place(row):
    """Returns where rows of a matrix are, as ``rows.spots`` wants it."""
    none = tl.zeros([1], tl.int64)
    return none, none, row


@triton.jit
def _store(x, row, at, rows, columns, values, UNIT: tl.constexpr, EDGE: tl.constexpr, LAST: tl.constexpr = False):
    to, inside = spots(x, _place(row), at, rows, columns, UNIT, EDGE)
    policy: tl.constexpr = "evict_first" if LAST else ""
    tl.store(to, values.to(x.data.dtype.element_ty), mask=inside, eviction_policy=policy)


@triton.jit
def _total(
    x, residual, row, at, rows, columns, UNIT: tl.constexpr, DTYPE: tl.constexpr, EDGE: tl.constexpr = False,
    LAST: tl.constexpr = False,
):  # fmt: skip
    """Returns what is normalised, [rows, columns], 0 outside, and which elements exist."""
    values, inside = _load(x, row, at, rows, columns, UNIT, DTYPE, EDGE, LAST)
    if residual.data is not None:
        more, _ = _load(residual, row, at, rows, columns, UNIT, DTYPE, EDGE, LAST)
        values += more
    return values, inside


@triton.jit
def _parameter(parameter, x, row, at, columns, UNIT: tl.constexpr, DTYPE: tl.constexpr, EDGE: tl.constexpr):
    """Returns a row's weights or biases, [1 or rows, columns]."""
    if UNIT == ANYWHERE:
        column, inside = numbers(x, _place(row), at, columns, UNIT, EDGE)
        return tl.load(parameter + column, mask=inside, other=0.0).to(DTYPE)
    else:
        return tl.load(parameter + at, mask=at < aligned(columns, UNIT), other=0.0).to(DTYPE)[None, :]


@triton.jit
def _finish(
    values, x, weight, bias, out, total, row, at, rows, columns, middle, factor, UNIT: tl.constexpr,
    EDGE: tl.constexpr = False, LAST: tl.constexpr = False,
):  # fmt: skip
    """Writes normalised elements times weight plus bias, and what was normalised where there is a residual."""
    result = (values - middle[:, None]) * factor[:, None]
    if weight is not None:
        result *= _parameter(weight, x, row, at, columns, UNIT, values.dtype, EDGE)
    if bias is not None:
        result += _parameter(bias, x, row, at, columns, UNIT, values.dtype, EDGE)
    _store(out, row, at, rows, columns, result, UNIT, EDGE, LAST)
    if total.data is not None:
        _store(total, row, at, rows, columns, values, UNIT, EDGE, LAST)


@triton.jit
def norm_forward(
    x,
    residual,
    weight,
    bias,
    out,
    total,
    mean,
    rstd,
    rows,
    columns,
    eps: tl.float64,
    RMS: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Writes ROWS normalised rows of at most COLUMNS elements, their sum with the residual, and their statistics.

    Grid: tiles of rows.

    Args:
        x: View of [rows, columns]; likewise ``residual``, of no data where there is none.
        weight: [columns], or None; likewise ``bias``.
        out: View; likewise ``total``, of data where there is a residual.
        mean: [rows], written for layer norm; likewise ``rstd``.
        UNIT: what ``rows.unit`` returned.
    """
    dtype: tl.constexpr = accumulator(x.data.dtype.element_ty)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = tl.arange(0, COLUMNS).to(tl.int64)
    count = number(columns, dtype)
    if UNIT == ANYWHERE:
        # First, lest the edges are waited for once more after the middle.
        edge, edge_inside = _total(x, residual, row, at, rows, columns, UNIT, dtype, True)
    values, inside = _total(x, residual, row, at, rows, columns, UNIT, dtype)
    middle = tl.zeros([ROWS], dtype)
    if not RMS:
        sums = tl.sum(values, axis=1)
        if UNIT == ANYWHERE:
            sums += tl.sum(edge, axis=1)
        middle = sums / count
    away = values if RMS else tl.where(inside, values - middle[:, None], 0.0)
    squares = tl.sum(away * away, axis=1)
    if UNIT == ANYWHERE:
        away = edge if RMS else tl.where(edge_inside, edge - middle[:, None], 0.0)
        squares += tl.sum(away * away, axis=1)
    factor = inverse(root(squares / count + number(eps, dtype)))
    if not RMS:
        tl.store(mean + row, middle, mask=row < rows)
    tl.store(rstd + row, factor, mask=row < rows)
    _finish(values, x, weight, bias, out, total, row, at, rows, columns, middle, factor, UNIT)
    if UNIT == ANYWHERE:
        _finish(edge, x, weight, bias, out, total, row, at, rows, columns, middle, factor, UNIT, True)


@triton.jit
def norm_forward_long(
    x,
    residual,
    weight,
    bias,
    out,
    total,
    mean,
    rstd,
    rows,
    columns,
    eps: tl.float64,
    RMS: tl.constexpr,
    UNIT: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Writes a normalised row of any length, read in chunks, and a second time backwards.

    Squares are summed around the mean of the first chunk, c.  The sum around the mean is smaller by columns * (mean -
    c)^2, which is at most as often as large as there are chunks, so that little cancels.

    Grid: rows.  STAGES: chunks on their way.  The other arguments :func:`norm_forward`'s.
    """
    dtype: tl.constexpr = accumulator(x.data.dtype.element_ty)
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    column = tl.arange(0, COLUMNS).to(tl.int64)
    count = number(columns, dtype)
    near = tl.zeros([1], dtype)
    if not RMS:
        values, inside = _total(x, residual, row, column, rows, columns, UNIT, dtype)
        near = tl.sum(values, axis=1) / tl.sum(inside.to(dtype), axis=1)
    # Of each column of a chunk: no thread waits for another before the last.
    sums = tl.zeros([1, COLUMNS], dtype)
    squares = tl.zeros([1, COLUMNS], dtype)
    chunks = tl.cdiv(columns, COLUMNS)
    for chunk in tl.range(chunks, num_stages=STAGES):
        values, inside = _total(x, residual, row, chunk * COLUMNS + column, rows, columns, UNIT, dtype)
        away = values if RMS else tl.where(inside, values - near[:, None], 0.0)
        squares += away * away
        if not RMS:
            sums += away
    square = tl.sum(squares, axis=1)
    step = tl.sum(sums, axis=1)
    if UNIT == ANYWHERE:
        edge, edge_inside = _total(x, residual, row, column, rows, columns, UNIT, dtype, True)
        edge_away = edge if RMS else tl.where(edge_inside, edge - near[:, None], 0.0)
        square += tl.sum(edge_away * edge_away, axis=1)
        step += tl.sum(edge_away, axis=1)
    middle = near
    if not RMS:
        step /= count
        middle += step
        square = tl.maximum(square - step * step * count, 0.0, propagate_nan=tl.PropagateNan.ALL)
    factor = inverse(root(square / count + number(eps, dtype)))
    if not RMS:
        tl.store(mean + row, middle)
    tl.store(rstd + row, factor)
    for back in tl.range(chunks, num_stages=STAGES):
        # From the end, which was read last and is still in the cache.
        at = (chunks - 1 - back) * COLUMNS + column
        values = _total(x, residual, row, at, rows, columns, UNIT, dtype, False, True)[0]
        _finish(values, x, weight, bias, out, total, row, at, rows, columns, middle, factor, UNIT, False, True)
    if UNIT == ANYWHERE:
        _finish(edge, x, weight, bias, out, total, row, column, rows, columns, middle, factor, UNIT, True)


@triton.jit
def _normalised(
    x, middle, factor, row, at, rows, columns, UNIT: tl.constexpr, DTYPE: tl.constexpr, EDGE: tl.constexpr = False,
    LAST: tl.constexpr = False,
):  # fmt: skip
    """Returns rows before weight and bias, [rows, columns]."""
    values, inside = _load(x, row, at, rows, columns, UNIT, DTYPE, EDGE, LAST)
    return tl.where(inside, (values - middle[:, None]) * factor[:, None], 0.0)


@triton.jit
def _statistics(mean, rstd, row, rows):
    """Returns mean, 0 for rms, and rstd of rows."""
    factor = tl.load(rstd + row, mask=row < rows, other=0.0)
    if mean is not None:
        return tl.load(mean + row, mask=row < rows, other=0.0), factor
    else:
        return tl.zeros_like(factor), factor


@triton.jit
def _weighted(
    dout, weight, row, at, rows, columns, UNIT: tl.constexpr, DTYPE: tl.constexpr, EDGE: tl.constexpr = False,
    LAST: tl.constexpr = False,
):  # fmt: skip
    """Returns the gradient of the result, and of the normalised row."""
    grad, _ = _load(dout, row, at, rows, columns, UNIT, DTYPE, EDGE, LAST)
    if weight is not None:
        return grad, grad * _parameter(weight, dout, row, at, columns, UNIT, DTYPE, EDGE)
    return grad, grad


@triton.jit
def _dinput(
    dinput, dtotal, row, at, rows, columns, grad, normed, along, middle, factor, RMS: tl.constexpr, UNIT: tl.constexpr,
    EDGE: tl.constexpr = False, LAST: tl.constexpr = False,
):  # fmt: skip
    """Writes the gradient of what was normalised; ``along`` and ``middle`` are means of grad * normed and of grad."""
    found = grad - normed * along[:, None]
    if not RMS:
        found -= middle[:, None]
    found *= factor[:, None]
    if dtotal.data is not None:
        more, _ = _load(dtotal, row, at, rows, columns, UNIT, found.dtype, EDGE, LAST)
        found += more
    _store(dinput, row, at, rows, columns, found, UNIT, EDGE, LAST)


@triton.jit
def _block(block, rows, share, STEP: tl.constexpr):
    """Returns the first row of a block of ``share`` rows that are STEP apart, and the row that it ends before."""
    begin = block.to(tl.int64) // STEP * STEP * share + block % STEP
    return begin, tl.minimum(begin + share * STEP, rows)


@triton.jit
def norm_backward(
    x,
    weight,
    mean,
    rstd,
    dout,
    dtotal,
    dinput,
    dweight,
    dbias,
    rows,
    columns,
    share,
    RMS: tl.constexpr,
    UNIT: tl.constexpr,
    STEP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Writes the gradients of a block of rows, and its share of the gradients of weight and bias.

    Grid: blocks of ``share`` rows, in multiples of STEP.

    Args:
        dinput: View, or of no data; ``dtotal`` is added to it.
        dweight: [blocks, columns], or None; likewise ``dbias``.
        STEP: from one row of a block to the next, such that all begin as far from 16 bytes.
        STAGES: tiles of rows on their way.

    The others are those of :func:`norm_forward`.
    """
    dtype: tl.constexpr = accumulator(x.data.dtype.element_ty)
    begin, end = _block(tl.program_id(0), rows, share, STEP)
    at = tl.arange(0, COLUMNS).to(tl.int64)
    count = number(columns, dtype)
    weight_sum = tl.zeros([ROWS, COLUMNS], dtype)
    bias_sum = tl.zeros([ROWS, COLUMNS], dtype)
    if UNIT == ANYWHERE:
        edge_weight_sum = tl.zeros([ROWS, max(16, COLUMNS // 8)], dtype)
        edge_bias_sum = tl.zeros([ROWS, max(16, COLUMNS // 8)], dtype)
    # The same for all rows, which begin alike.
    held, edge_held = None, None
    if weight is not None:
        held = _parameter(weight, x, begin + tl.zeros([1], tl.int64), at, columns, UNIT, dtype, False)
        if UNIT == ANYWHERE:
            edge_held = _parameter(weight, x, begin + tl.zeros([1], tl.int64), at, columns, UNIT, dtype, True)
    for start in tl.range(begin, end, ROWS * STEP, num_stages=STAGES):
        row = start + STEP * tl.arange(0, ROWS).to(tl.int64)
        mean_here, factor = _statistics(mean, rstd, row, end)
        if UNIT == ANYWHERE:
            edge = _normalised(x, mean_here, factor, row, at, end, columns, UNIT, dtype, True)
            edge_grad, _ = _load(dout, row, at, end, columns, UNIT, dtype, True, False)
            edge_weighted = edge_grad if edge_held is None else edge_grad * edge_held
            edge_weight_sum += edge_grad * edge
            edge_bias_sum += edge_grad
        normed = _normalised(x, mean_here, factor, row, at, end, columns, UNIT, dtype)
        grad = _load(dout, row, at, end, columns, UNIT, dtype, False, False)[0]
        weighted = grad if held is None else grad * held
        if dweight is not None:
            weight_sum += grad * normed
        if dbias is not None:
            bias_sum += grad
        if dinput.data is not None:
            along = tl.sum(weighted * normed, axis=1)
            middle = tl.sum(weighted, axis=1)
            if UNIT == ANYWHERE:
                along = (along + tl.sum(edge_weighted * edge, axis=1)) / count
                middle = (middle + tl.sum(edge_weighted, axis=1)) / count
                _dinput(
                    dinput, dtotal, row, at, end, columns, edge_weighted, edge, along, middle, factor, RMS, UNIT, True
                )  # fmt: skip
            else:
                along, middle = along / count, middle / count
            _dinput(dinput, dtotal, row, at, end, columns, weighted, normed, along, middle, factor, RMS, UNIT)
    _store_sums(dweight, dbias, tl.program_id(0), x, begin, at, columns, weight_sum, bias_sum, UNIT, False)
    if UNIT == ANYWHERE:
        _store_sums(dweight, dbias, tl.program_id(0), x, begin, at, columns, edge_weight_sum, edge_bias_sum, UNIT, True)


@triton.jit
def _store_sums(
    dweight, dbias, block, x, first, at, columns, weight_sum, bias_sum, UNIT: tl.constexpr, EDGE: tl.constexpr
):
    """Writes a block's sums over rows, of which ``first`` is one, to its row of ``dweight`` and of ``dbias``."""
    to = block.to(tl.int64) * columns
    if UNIT == ANYWHERE:
        column, inside = numbers(x, _place(first + tl.zeros([1], tl.int64)), at, columns, UNIT, EDGE)
        if dweight is not None:
            tl.store(dweight + to + column, tl.sum(weight_sum, axis=0)[None, :], mask=inside)
        if dbias is not None:
            tl.store(dbias + to + column, tl.sum(bias_sum, axis=0)[None, :], mask=inside)
    else:
        to = block.to(tl.int64) * aligned(columns, UNIT)
        inside = at < aligned(columns, UNIT)
        if dweight is not None:
            tl.store(dweight + to + at, tl.sum(weight_sum, axis=0), mask=inside)
        if dbias is not None:
            tl.store(dbias + to + at, tl.sum(bias_sum, axis=0), mask=inside)


@triton.jit
def norm_backward_long(
    x,
    weight,
    mean,
    rstd,
    dout,
    dtotal,
    dinput,
    rows,
    columns,
    RMS: tl.constexpr,
    UNIT: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Writes the gradient of a row of any length, read in chunks, once for its sums and once more, backwards.

    Grid: rows.  STAGES: chunks on their way.  The other arguments :func:`norm_backward`'s.
    """
    dtype: tl.constexpr = accumulator(x.data.dtype.element_ty)
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    column = tl.arange(0, COLUMNS).to(tl.int64)
    # Sums of each column of a chunk: no thread waits for another before the last.
    along_now = tl.zeros([1, COLUMNS], dtype)
    middle_now = tl.zeros([1, COLUMNS], dtype)
    mean_here, factor = _statistics(mean, rstd, row, rows)
    chunks = tl.cdiv(columns, COLUMNS)
    for chunk in tl.range(chunks, num_stages=STAGES):
        at = chunk * COLUMNS + column
        normed = _normalised(x, mean_here, factor, row, at, rows, columns, UNIT, dtype)
        weighted = _weighted(dout, weight, row, at, rows, columns, UNIT, dtype)[1]
        along_now += weighted * normed
        middle_now += weighted
    along = tl.sum(along_now, axis=1)
    middle = tl.sum(middle_now, axis=1)
    if UNIT == ANYWHERE:
        edge = _normalised(x, mean_here, factor, row, column, rows, columns, UNIT, dtype, True)
        _, edge_grad = _weighted(dout, weight, row, column, rows, columns, UNIT, dtype, True)
        along += tl.sum(edge_grad * edge, axis=1)
        middle += tl.sum(edge_grad, axis=1)
    count = number(columns, dtype)
    along /= count
    middle /= count
    for back in tl.range(chunks, num_stages=STAGES):
        at = (chunks - 1 - back) * COLUMNS + column
        normed = _normalised(x, mean_here, factor, row, at, rows, columns, UNIT, dtype, False, True)
        weighted = _weighted(dout, weight, row, at, rows, columns, UNIT, dtype, False, True)[1]
        _dinput(
            dinput, dtotal, row, at, rows, columns, weighted, normed, along, middle, factor, RMS, UNIT, False, True
        )  # fmt: skip
    if UNIT == ANYWHERE:
        _dinput(dinput, dtotal, row, column, rows, columns, edge_grad, edge, along, middle, factor, RMS, UNIT, True)


@triton.jit
def norm_backward_parameters(
    x,
    mean,
    rstd,
    dout,
    dweight,
    dbias,
    rows,
    columns,
    share,
    UNIT: tl.constexpr,
    STEP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Writes the share of a block of rows in the gradients of a tile of weight and bias, for rows that are long.

    Grid: tiles of columns; blocks of ``share`` rows.  Arguments: :func:`norm_backward`'s.
    """
    begin, end = _block(tl.program_id(1), rows, share, STEP)
    at = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    _add_parameters(x, mean, rstd, dout, dweight, dbias, begin, end, at, columns, UNIT, STEP, ROWS, COLUMNS, False)
    if UNIT == ANYWHERE:
        if tl.program_id(0) == 0:
            wide: tl.constexpr = max(16, COLUMNS // 8)
            _add_parameters(x, mean, rstd, dout, dweight, dbias, begin, end, at, columns, UNIT, STEP, ROWS, wide, True)


@triton.jit
def _add_parameters(
    x, mean, rstd, dout, dweight, dbias, begin, end, at, columns, UNIT: tl.constexpr, STEP: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Writes the sums of rows [begin, end) for columns ``at``, or for the edges."""
    dtype: tl.constexpr = accumulator(x.data.dtype.element_ty)
    weight_sum = tl.zeros([ROWS, COLUMNS], dtype)
    bias_sum = tl.zeros([ROWS, COLUMNS], dtype)
    for start in range(begin, end, ROWS * STEP):
        row = start + STEP * tl.arange(0, ROWS).to(tl.int64)
        grad, _ = _load(dout, row, at, end, columns, UNIT, dtype, EDGE, False)
        if dweight is not None:
            mean_here, factor = _statistics(mean, rstd, row, end)
            normed = _normalised(x, mean_here, factor, row, at, end, columns, UNIT, dtype, EDGE)
            weight_sum += grad * normed
        bias_sum += grad
    _store_sums(dweight, dbias, tl.program_id(1), x, begin, at, columns, weight_sum, bias_sum, UNIT, EDGE)


@replayed
def norm_fwd(call: NormCall) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns ``(out, total, mean, rstd)`` of a canonical call."""
    outputs = empty_outputs(call)
    run_rows(forward_launch(call, *outputs))
    return outputs


def forward_launch(call: NormCall, out: Tensor, total: Tensor, mean: Tensor, rstd: Tensor) -> Launch:
    columns = call.columns
    x = _view(call.input, columns)
    residual = _view(call.residual, columns)
    to = _view(out, columns), _view(None if call.residual is None else total, columns)
    weight, bias = (None if p is None else p.contiguous() for p in (call.weight, call.bias))
    rows, tensors = rstd.numel(), 1 if call.residual is None else 2
    read = sum(t.element_size() for t in (x.data, residual.data, weight, bias) if t is not None)
    tile_rows, tile_columns = row_tile(rows, columns, rstd.element_size(), tensors=tensors, moved=read)
    arguments = (x, residual, weight, bias, *to, mean, rstd, rows, columns, call.eps)
    divisor = unit((x, residual, *to), columns, tile_rows <= _FEW_ROWS)
    options: dict[str, Any] = {"RMS": call.rms, "UNIT": divisor}
    if tile_columns < columns:
        return norm_forward_long, (rows,), arguments, {**options, **long_options(columns, tile_columns, read)}
    tile_rows = 1 if divisor == ANYWHERE.value else tile_rows
    options |= {"ROWS": tile_rows, "COLUMNS": tile_columns, "num_warps": warps(tile_rows * tile_columns)}
    return norm_forward, (-(-rows // tile_rows),), arguments, options


def _view(tensor: Tensor | None, columns: int) -> View:
    """Returns a view of rows."""
    if tensor is None:
        return View(None, 0, 0, 0, 0)
    found = matrix(tensor, columns)
    return View(found, 0, 0, found.stride(0), 1)


@replayed
def norm_bwd(call: NormBackwardCall) -> list[Tensor | None]:
    """Returns the gradients of input, weight and bias that are needed."""
    tensors = (call.input, call.weight, call.bias)
    grads = [
        empty_contiguous(t) if t is not None and need else None for t, need in zip(tensors, call.needed, strict=True)
    ]
    wide = lse_dtype(call.input.dtype)
    columns = call.input.numel() // call.rstd.numel()
    blocks = _blocks(call.rstd.numel())
    partial = [None if g is None else call.input.new_empty(blocks, columns, dtype=wide) for g in grads[1:]]
    for launch in backward_launches(call, grads[0], *partial):
        run_rows(launch)
    for at, sums in enumerate(partial, 1):
        grad = grads[at]
        if grad is not None and sums is not None:
            grads[at] = sum_rows(sums, grad.dtype).view(grad.shape)
    return grads


def backward_launches(
    call: NormBackwardCall, dinput: Tensor | None, dweight: Tensor | None, dbias: Tensor | None
) -> list[Launch]:
    """Returns what writes the gradients; those of the parameters as ``dweight`` and ``dbias`` [blocks, columns]."""
    size = lse_dtype(call.input.dtype).itemsize
    columns = call.input.numel() // call.rstd.numel()
    x, dout, dtotal, to = (_view(t, columns) for t in (call.input, call.dout, call.dtotal, dinput))
    weight = None if call.weight is None else call.weight.contiguous()
    mean, rstd = None if call.rms else call.mean.contiguous(), call.rstd.contiguous()
    rows = rstd.numel()
    blocks = next((len(t) for t in (dweight, dbias) if t is not None), _blocks(rows))
    own = power_of_two(columns) <= _LONGEST_OWN[size]
    tile_rows, tile_columns = row_tile(-(-rows // blocks), columns, size) if own else (1, 0)
    divisor = unit((x, dout, dtotal, to), columns, tile_rows <= _FEW_ROWS)
    options = {"RMS": call.rms, "UNIT": divisor}
    if own:
        tile_rows = 1 if divisor == ANYWHERE.value else tile_rows
        apart, share = _apart(divisor, rows, blocks)
        arguments = (x, weight, mean, rstd, dout, dtotal, to, dweight, dbias, rows, columns, share)
        read = sum(t.element_size() for t in (x.data, dout.data, dtotal.data) if t is not None)
        # One or two programs a multiprocessor: 48 KB on their way to each, or a tile.
        stages = max(2, min(5, 1 + (48 << 10) // (tile_rows * tile_columns * read)))
        options |= {**apart, "ROWS": tile_rows, "COLUMNS": tile_columns, "STAGES": stages}
        elements = tile_rows * tile_columns * (1 if options["UNIT"] == ANYWHERE.value else 2)
        return [(norm_backward, (blocks,), arguments, {**options, "num_warps": warps(elements)})]
    launches: list[Launch] = []
    if dinput is not None:
        read = sum(t.element_size() for t in (x.data, dout.data, dtotal.data, weight) if t is not None)
        long = (x, weight, mean, rstd, dout, dtotal, to, rows, columns)
        long_rows = long_options(columns, chunk_columns(size, 2, read), read)
        launches.append((norm_backward_long, (rows,), long, {**options, **long_rows}))
    if dweight is not None or dbias is not None:
        apart, share = _apart(divisor, rows, blocks)
        parameters = (x, mean, rstd, dout, dweight, dbias, rows, columns, share)
        tile = {"ROWS": 8, "COLUMNS": 256, "num_warps": 4}
        launches.append((norm_backward_parameters, (-(-columns // 256), blocks), parameters, {**apart, **tile}))
    return launches


def _blocks(rows: int) -> int:
    """Returns in how many blocks rows are, a multiple of 8."""
    return min(MOST_BLOCKS, -(-rows // 8) * 8)


def _apart(divisor: int, rows: int, blocks: int) -> tuple[dict[str, int], int]:
    """Returns how far apart the rows of a block are, with the unit of such rows, and how many it has."""
    if divisor != ANYWHERE.value:
        return {"UNIT": divisor, "STEP": 1}, -(-rows // blocks)
    # Rows that are 8 apart begin as far from 16 bytes, whatever their length, so that a tile's columns are the same.
    return {"UNIT": divisor, "STEP": 8}, cdiv(cdiv(rows, 8), blocks // 8)


def configurations(architecture: int) -> Iterator[Configuration]:
    """Yields the kernels for rows of every length, with residual, weight and bias."""
    for dtype, shape in (
        (torch.bfloat16, (8192, 1024)),
        (torch.bfloat16, (8192, 4096)),
        (torch.float32, (8192, 8192)),
        (torch.bfloat16, (512, 1 << 18)),
        (torch.bfloat16, (8192, 1000)),
        (torch.bfloat16, (8192, 1001)),
        (torch.bfloat16, (512, 50257)),
        (torch.float64, (8192, 1024)),
    ):
        x = torch.empty(shape, dtype=dtype, device="meta")
        name = f"{dtype} {list(shape)}".replace("torch.", "")
        forward = NormCall(x, x, x[0], x[0], 1, 1e-5, False, "triton")
        out, total, mean, rstd = empty_outputs(forward)
        kernel, _, arguments, options = forward_launch(forward, out, total, mean, rstd)
        yield Configuration(f"norm forward {name}", kernel, arguments, options)
        backward = NormBackwardCall(x, x[0], x[0], mean, rstd, x, x, 1, 1e-5, False, [True] * 3, "triton")
        partial = rstd.new_empty(MOST_BLOCKS, shape[1])
        for kernel, _, arguments, options in backward_launches(backward, x, partial, partial):
            yield Configuration(f"norm backward {name}", kernel, arguments, options)
