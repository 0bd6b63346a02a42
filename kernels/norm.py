"""Layer norm and rms norm of rows of any length, with a residual, forward and backward.

A row that fits is read once; a longer one in chunks, whose means and squared deviations are joined exactly, and once
more to be written.  Gradients of parameters are sums over rows: a program adds up a block of rows, and ``sums.py`` adds
up the blocks.

Source: Ba, Kiros and Hinton, "Layer Normalization", 2016; Zhang and Sennrich, "Root Mean Square Layer Normalization",
2019; Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances", 1979.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn.kernels.launch import Configuration, Launch, run
from fastattn.kernels.numbers import inverse, number, root
from fastattn.kernels.replay import replayed
from fastattn.kernels.rows import LONGEST, matrix, power_of_two, row_tile, warps
from fastattn.kernels.sums import MOST_BLOCKS, sum_rows
from fastattn.kernels.tile import accumulator
from fastattn.spec.attention import lse_dtype
from fastattn.spec.checks import empty_contiguous
from fastattn.spec.norm import NormBackwardCall, NormCall, empty_outputs

# Longest row whose parameters' gradients a program keeps in registers beside the row, for 4 and for 8 bytes.
_LONGEST_OWN = {4: 8192, 8: 4096}


@triton.jit
def _load(x, stride, row, column, inside, DTYPE: tl.constexpr):
    return tl.load(x + row[:, None] * stride + column[None, :], mask=inside, other=0.0).to(DTYPE)


@triton.jit
def _total(x, residual, x_stride, residual_stride, row, column, inside, DTYPE: tl.constexpr):
    """Returns what is normalised, [rows, columns], 0 outside."""
    values = _load(x, x_stride, row, column, inside, DTYPE)
    if residual is not None:
        values += _load(residual, residual_stride, row, column, inside, DTYPE)
    return values


@triton.jit
def _affine(values, weight, bias, column, columns):
    """Returns ``values * weight + bias``."""
    if weight is not None:
        values *= tl.load(weight + column, mask=column < columns, other=0.0).to(values.dtype)[None, :]
    if bias is not None:
        values += tl.load(bias + column, mask=column < columns, other=0.0).to(values.dtype)[None, :]
    return values


@triton.jit
def _moments(values, inside, count, RMS: tl.constexpr):
    """Returns mean (0 for rms) and sum of squares around it of ``count`` values a row."""
    if RMS:
        mean = tl.zeros([values.shape[0]], values.dtype)
        return mean, tl.sum(values * values, axis=1)
    mean = tl.sum(values, axis=1) / count
    away = tl.where(inside, values - mean[:, None], 0.0)
    return mean, tl.sum(away * away, axis=1)


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
    x_stride,
    residual_stride,
    rows,
    columns,
    eps: tl.float64,
    RMS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    LONG: tl.constexpr,
):
    """Writes ROWS normalised rows, their sum with the residual, and their statistics.

    Grid: tiles of rows.

    Args:
        x: [rows, columns], adjacent columns; likewise ``residual`` or None.
        weight: [columns], or None; likewise ``bias``.
        out: [rows, columns], contiguous; likewise ``total``, written where there is a residual.
        mean: [rows], written for layer norm; likewise ``rstd``.
        LONG: whether a row has more than COLUMNS elements.
    """
    dtype: tl.constexpr = accumulator(x.dtype.element_ty)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS).to(tl.int64)
    all_columns = number(columns, dtype)
    if LONG:
        middle = tl.zeros([ROWS], dtype)
        squares = tl.zeros([ROWS], dtype)
        for start in range(0, columns, COLUMNS):
            inside = (row < rows)[:, None] & (start + column < columns)[None, :]
            values = _total(x, residual, x_stride, residual_stride, row, start + column, inside, dtype)
            size = number(tl.minimum(columns - start, COLUMNS), dtype)
            before = number(start, dtype)
            chunk_mean, chunk_squares = _moments(values, inside, size, RMS)
            step = chunk_mean - middle
            middle += step * (size / (before + size))
            squares += chunk_squares + step * step * (before * size / (before + size))
    else:
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        values = _total(x, residual, x_stride, residual_stride, row, column, inside, dtype)
        middle, squares = _moments(values, inside, all_columns, RMS)
    factor = inverse(root(squares / all_columns + number(eps, dtype)))
    if not RMS:
        tl.store(mean + row, middle, mask=row < rows)
    tl.store(rstd + row, factor, mask=row < rows)
    if LONG:
        chunks = tl.cdiv(columns, COLUMNS)
        for back in range(chunks):
            # From the end, which was read last and is still in the cache.
            at = (chunks - 1 - back) * COLUMNS + column
            inside = (row < rows)[:, None] & (at < columns)[None, :]
            values = _total(x, residual, x_stride, residual_stride, row, at, inside, dtype)
            result = _affine((values - middle[:, None]) * factor[:, None], weight, bias, at, columns)
            to = row[:, None] * columns + at[None, :]
            tl.store(out + to, result.to(out.dtype.element_ty), mask=inside)
            if residual is not None:
                tl.store(total + to, values.to(total.dtype.element_ty), mask=inside)
    else:
        result = _affine((values - middle[:, None]) * factor[:, None], weight, bias, column, columns)
        to = row[:, None] * columns + column[None, :]
        tl.store(out + to, result.to(out.dtype.element_ty), mask=inside)
        if residual is not None:
            tl.store(total + to, values.to(total.dtype.element_ty), mask=inside)


@triton.jit
def _normalised(x, x_stride, mean, rstd, row, rows, column, inside, DTYPE: tl.constexpr):
    """Returns the row before weight and bias, [rows, columns], and rstd."""
    values = _load(x, x_stride, row, column, inside, DTYPE)
    factor = tl.load(rstd + row, mask=row < rows, other=0.0)
    if mean is not None:
        values -= tl.load(mean + row, mask=row < rows, other=0.0)[:, None]
    return tl.where(inside, values * factor[:, None], 0.0), factor


@triton.jit
def _weighted(dout, dout_stride, weight, row, column, columns, inside, DTYPE: tl.constexpr):
    """Returns the gradient of the result, and of the normalised row."""
    grad = _load(dout, dout_stride, row, column, inside, DTYPE)
    if weight is not None:
        return grad, grad * tl.load(weight + column, mask=column < columns, other=0.0).to(DTYPE)[None, :]
    return grad, grad


@triton.jit
def _dinput(grad, normed, along, middle, factor, RMS: tl.constexpr):
    """Returns the gradient of what was normalised; ``along`` and ``middle`` are means of grad * normed and of grad."""
    found = grad - normed * along[:, None]
    if not RMS:
        found -= middle[:, None]
    return found * factor[:, None]


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
    x_stride,
    dout_stride,
    dtotal_stride,
    rows,
    columns,
    share,
    RMS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Writes the gradients of a block of rows, and its share of the gradients of weight and bias.

    Grid: blocks of ``share`` rows.

    Args:
        dinput: [rows, columns], contiguous, or None; ``dtotal`` is added to it.
        dweight: [blocks, columns], or None; likewise ``dbias``.

    The others are those of :func:`norm_forward`.
    """
    dtype: tl.constexpr = accumulator(x.dtype.element_ty)
    begin = tl.program_id(0).to(tl.int64) * share
    end = tl.minimum(begin + share, rows)
    column = tl.arange(0, COLUMNS).to(tl.int64)
    all_columns = number(columns, dtype)
    weight_sum = tl.zeros([ROWS, COLUMNS], dtype)
    bias_sum = tl.zeros([ROWS, COLUMNS], dtype)
    for start in range(begin, end, ROWS):
        row = start + tl.arange(0, ROWS).to(tl.int64)
        inside = (row < end)[:, None] & (column < columns)[None, :]
        normed, factor = _normalised(x, x_stride, mean, rstd, row, end, column, inside, dtype)
        grad, weighted = _weighted(dout, dout_stride, weight, row, column, columns, inside, dtype)
        if dweight is not None:
            weight_sum += grad * normed
        if dbias is not None:
            bias_sum += grad
        if dinput is not None:
            along = tl.sum(weighted * normed, axis=1) / all_columns
            middle = tl.sum(weighted, axis=1) / all_columns
            found = _dinput(weighted, normed, along, middle, factor, RMS)
            if dtotal is not None:
                found += _load(dtotal, dtotal_stride, row, column, inside, dtype)
            to = dinput + row[:, None] * columns + column[None, :]
            tl.store(to, found.to(dinput.dtype.element_ty), mask=inside)
    to = tl.program_id(0).to(tl.int64) * columns + column
    if dweight is not None:
        tl.store(dweight + to, tl.sum(weight_sum, axis=0), mask=column < columns)
    if dbias is not None:
        tl.store(dbias + to, tl.sum(bias_sum, axis=0), mask=column < columns)


@triton.jit
def norm_backward_long(
    x,
    weight,
    mean,
    rstd,
    dout,
    dtotal,
    dinput,
    x_stride,
    dout_stride,
    dtotal_stride,
    rows,
    columns,
    RMS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Writes the gradient of a row of any length, read in chunks, once for its sums and once more, backwards.

    Grid: rows.  Arguments: :func:`norm_backward`'s.
    """
    dtype: tl.constexpr = accumulator(x.dtype.element_ty)
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    column = tl.arange(0, COLUMNS).to(tl.int64)
    along = tl.zeros([1], dtype)
    middle = tl.zeros([1], dtype)
    factor = tl.load(rstd + row)
    for start in range(0, columns, COLUMNS):
        inside = (start + column < columns)[None, :]
        normed, _ = _normalised(x, x_stride, mean, rstd, row, rows, start + column, inside, dtype)
        _, weighted = _weighted(dout, dout_stride, weight, row, start + column, columns, inside, dtype)
        along += tl.sum(weighted * normed, axis=1)
        middle += tl.sum(weighted, axis=1)
    all_columns = number(columns, dtype)
    chunks = tl.cdiv(columns, COLUMNS)
    for back in range(chunks):
        at = (chunks - 1 - back) * COLUMNS + column
        inside = (at < columns)[None, :]
        normed, _ = _normalised(x, x_stride, mean, rstd, row, rows, at, inside, dtype)
        _, weighted = _weighted(dout, dout_stride, weight, row, at, columns, inside, dtype)
        found = _dinput(weighted, normed, along / all_columns, middle / all_columns, factor, RMS)
        if dtotal is not None:
            found += _load(dtotal, dtotal_stride, row, at, inside, dtype)
        tl.store(dinput + row[:, None] * columns + at[None, :], found.to(dinput.dtype.element_ty), mask=inside)


@triton.jit
def norm_backward_parameters(
    x,
    mean,
    rstd,
    dout,
    dweight,
    dbias,
    x_stride,
    dout_stride,
    rows,
    columns,
    share,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Writes the share of a block of rows in the gradients of a tile of weight and bias, for rows that are long.

    Grid: tiles of columns; blocks of ``share`` rows.  Arguments: :func:`norm_backward`'s.
    """
    dtype: tl.constexpr = accumulator(x.dtype.element_ty)
    column = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    begin = tl.program_id(1).to(tl.int64) * share
    end = tl.minimum(begin + share, rows)
    weight_sum = tl.zeros([ROWS, COLUMNS], dtype)
    bias_sum = tl.zeros([ROWS, COLUMNS], dtype)
    for start in range(begin, end, ROWS):
        row = start + tl.arange(0, ROWS).to(tl.int64)
        inside = (row < end)[:, None] & (column < columns)[None, :]
        grad = _load(dout, dout_stride, row, column, inside, dtype)
        if dweight is not None:
            normed, _ = _normalised(x, x_stride, mean, rstd, row, end, column, inside, dtype)
            weight_sum += grad * normed
        bias_sum += grad
    to = tl.program_id(1).to(tl.int64) * columns + column
    if dweight is not None:
        tl.store(dweight + to, tl.sum(weight_sum, axis=0), mask=column < columns)
    if dbias is not None:
        tl.store(dbias + to, tl.sum(bias_sum, axis=0), mask=column < columns)


@replayed
def norm_fwd(call: NormCall) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns ``(out, total, mean, rstd)`` of a canonical call."""
    outputs = empty_outputs(call)
    run(forward_launch(call, *outputs))
    return outputs


def forward_launch(call: NormCall, out: Tensor, total: Tensor, mean: Tensor, rstd: Tensor) -> Launch:
    columns = call.columns
    x = matrix(call.input, columns)
    residual = None if call.residual is None else matrix(call.residual, columns)
    weight, bias = (None if p is None else p.contiguous() for p in (call.weight, call.bias))
    tile_rows, tile_columns = row_tile(len(x), columns, rstd.element_size(), tensors=1 if residual is None else 2)
    arguments = (
        x, residual, weight, bias, out, total, mean, rstd, x.stride(0), 0 if residual is None else residual.stride(0),
        len(x), columns, call.eps,
    )  # fmt: skip
    options = {
        "RMS": call.rms,
        "ROWS": tile_rows,
        "COLUMNS": tile_columns,
        "LONG": tile_columns < columns,
        "num_warps": warps(tile_rows * tile_columns),
    }
    return norm_forward, (-(-len(x) // tile_rows),), arguments, options


@replayed
def norm_bwd(call: NormBackwardCall) -> list[Tensor | None]:
    """Returns the gradients of input, weight and bias that are needed."""
    tensors = (call.input, call.weight, call.bias)
    grads = [
        empty_contiguous(t) if t is not None and need else None for t, need in zip(tensors, call.needed, strict=True)
    ]
    wide = lse_dtype(call.input.dtype)
    columns = call.input.numel() // call.rstd.numel()
    blocks = min(MOST_BLOCKS, call.rstd.numel())
    partial = [None if g is None else call.input.new_empty(blocks, columns, dtype=wide) for g in grads[1:]]
    for launch in backward_launches(call, grads[0], *partial):
        run(launch)
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
    x, dout = matrix(call.input, columns), matrix(call.dout, columns)
    dtotal = None if call.dtotal is None else matrix(call.dtotal, columns)
    weight = None if call.weight is None else call.weight.contiguous()
    mean, rstd = None if call.rms else call.mean.contiguous(), call.rstd.contiguous()
    rows = len(x)
    blocks = next((len(t) for t in (dweight, dbias) if t is not None), min(MOST_BLOCKS, rows))
    share = -(-rows // blocks)
    strides = (x.stride(0), dout.stride(0), 0 if dtotal is None else dtotal.stride(0))
    if power_of_two(columns) <= _LONGEST_OWN[size]:
        tile_rows, tile_columns = row_tile(share, columns, size)
        arguments = (x, weight, mean, rstd, dout, dtotal, dinput, dweight, dbias, *strides, rows, columns, share)
        options = {"RMS": call.rms, "ROWS": tile_rows, "COLUMNS": tile_columns}
        return [(norm_backward, (blocks,), arguments, {**options, "num_warps": warps(2 * tile_rows * tile_columns)})]
    launches: list[Launch] = []
    if dinput is not None:
        tile_columns = LONGEST[size] // 8
        long = (x, weight, mean, rstd, dout, dtotal, dinput, *strides, rows, columns)
        options = {"RMS": call.rms, "COLUMNS": tile_columns, "num_warps": warps(2 * tile_columns)}
        launches.append((norm_backward_long, (rows,), long, options))
    if dweight is not None or dbias is not None:
        parameters = (x, mean, rstd, dout, dweight, dbias, *strides[:2], rows, columns, share)
        tile = {"ROWS": 8, "COLUMNS": 256, "num_warps": 4}
        launches.append((norm_backward_parameters, (-(-columns // 256), blocks), parameters, tile))
    return launches


def configurations(architecture: int) -> Iterator[Configuration]:
    """Yields the kernels for rows of every length, with residual, weight and bias."""
    for dtype, shape in (
        (torch.bfloat16, (8192, 1024)),
        (torch.bfloat16, (8192, 4096)),
        (torch.float32, (8192, 8192)),
        (torch.bfloat16, (512, 1 << 18)),
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
