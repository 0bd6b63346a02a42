"""Dropout, drawn again by the backward: it is linear, so the backward is the same kernel over the gradient."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn.kernels import philox
from fastattn.kernels.arguments import Dropout
from fastattn.kernels.launch import Configuration, Launch, run
from fastattn.kernels.numbers import number
from fastattn.kernels.replay import replayed
from fastattn.kernels.rows import power_of_two, warps
from fastattn.kernels.tile import accumulator
from fastattn.spec.dropout import DropoutCall


@triton.jit
def _dropout_kernel(x, out, dropout, rows, columns, rescale: tl.float64, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Writes a tile of ``x / (1 - p)`` where it survives and 0 elsewhere.

    Grid: all tiles of rows and columns, those of a row one after another.

    Args:
        x: [rows, columns], contiguous; likewise ``out``.
        dropout: Dropout.
        rescale: ``1 / (1 - p)``.
    """
    tiles = tl.cdiv(columns, COLUMNS)
    first_row = (tl.program_id(0) // tiles).to(tl.int64) * ROWS
    first_column = tl.program_id(0) % tiles * COLUMNS
    row = first_row + tl.arange(0, ROWS)
    column = first_column + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    at = row[:, None] * columns + column[None, :]
    dtype: tl.constexpr = accumulator(x.dtype.element_ty)
    values = tl.load(x + at, mask=inside, other=0.0).to(dtype)
    keep = philox.keep(dropout, 0 * first_row, first_row, first_column, ROWS, COLUMNS)
    result = tl.where(keep, values * number(rescale, dtype)[:, None], 0.0)
    tl.store(out + at, result.to(out.dtype.element_ty), mask=inside)


@replayed
def dropout_fwd(call: DropoutCall) -> Tensor:
    """Returns the result of a canonical call, contiguous."""
    out = torch.empty_like(call.input, memory_format=torch.contiguous_format)
    run(_launch(call, out))
    return out


def dropout_argument(state: Tensor | None, dropout_p: float) -> Dropout:
    """Returns what kernels are told of a dropout; ``state`` None for none."""
    return Dropout(state, int(dropout_p * 2.0**32), 1.0 / (1.0 - dropout_p))


def _launch(call: DropoutCall, out: Tensor) -> Launch:
    columns = call.input.shape[-1]
    rows = call.input.numel() // columns
    tile_columns = max(4, min(power_of_two(columns), 1024))
    tile_rows = min(power_of_two(rows), 2048 // tile_columns)
    grid = (-(-rows // tile_rows) * -(-columns // tile_columns),)
    dropout = dropout_argument(call.dropout_state, call.dropout_p)
    arguments = (call.input.contiguous(), out, dropout, rows, columns, dropout.rescale)
    options = {"ROWS": tile_rows, "COLUMNS": tile_columns, "num_warps": warps(tile_rows * tile_columns)}
    return _dropout_kernel, grid, arguments, options


def configurations(architecture: int) -> Iterator[Configuration]:
    """Yields the kernel for every size of element."""
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        x = torch.empty(8192, 1024, dtype=dtype, device="meta")
        call = DropoutCall(x, torch.empty(2, dtype=torch.int64, device="meta"), 0.1, "triton")
        kernel, _, arguments, options = _launch(call, x)
        yield Configuration(f"dropout {dtype}".replace("torch.", ""), kernel, arguments, options)
