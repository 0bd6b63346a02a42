"""Sums over rows without atomics: partial sums of blocks of rows, then the sum of those, each in one order."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn.kernels.launch import Configuration, Launch, run
from fastattn.kernels.rows import power_of_two
from fastattn.kernels.tile import accumulator
from fastattn.spec.attention import lse_dtype

# Most blocks of rows, each of which has partial sums: enough to fill a GPU together with the tiles of columns.
MOST_BLOCKS = 256
_COLUMNS = 128
_ROWS = 16


@triton.jit
def sum_rows_kernel(x, out, rows, columns, stride, share, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Writes the sum of a block of rows for a tile of columns.

    Grid: tiles of columns; blocks of ``share`` rows.

    Args:
        x: [rows, columns], ``stride`` elements from row to row.
        out: [blocks, columns], contiguous.
    """
    column = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    begin = tl.program_id(1).to(tl.int64) * share
    end = tl.minimum(begin + share, rows)
    # The sum of a gradient over tokens is often far smaller than what it is made of.
    total = tl.zeros([ROWS, COLUMNS], tl.float64)
    for start in range(begin, end, ROWS):
        row = start + tl.arange(0, ROWS).to(tl.int64)
        inside = (row < end)[:, None] & (column < columns)[None, :]
        total += tl.load(x + row[:, None] * stride + column[None, :], mask=inside, other=0.0).to(total.dtype)
    to = out + tl.program_id(1).to(tl.int64) * columns + column
    found = tl.sum(total, axis=0).to(accumulator(x.dtype.element_ty))
    tl.store(to, found.to(out.dtype.element_ty), mask=column < columns)


def sum_rows(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the sum over rows of ``matrix`` [rows, columns], whose columns are adjacent: [columns] in ``dtype``."""
    blocks = min(MOST_BLOCKS, -(-len(matrix) // (4 * _ROWS)))
    if blocks > 1:
        partial = matrix.new_empty(blocks, matrix.shape[1], dtype=lse_dtype(matrix.dtype))
        _launch(matrix, partial)
        matrix = partial
    out = matrix.new_empty(1, matrix.shape[1], dtype=dtype)
    _launch(matrix, out)
    return out[0]


def _launch(matrix: Tensor, out: Tensor) -> None:
    if matrix.shape[1] == 0:
        return
    run(_sums(matrix, out))


def _sums(matrix: Tensor, out: Tensor) -> Launch:
    """Returns what writes the sums of equal shares of the rows to ``out`` [blocks, columns]."""
    rows, columns = matrix.shape
    share = -(-rows // len(out))
    tile = min(_COLUMNS, power_of_two(columns))
    arguments = (matrix, out, rows, columns, matrix.stride(0), share)
    options = {"ROWS": _ROWS, "COLUMNS": tile, "num_warps": 4}
    return sum_rows_kernel, (-(-columns // tile), len(out)), arguments, options


def configurations(architecture: int) -> Iterator[Configuration]:
    """Yields the kernel for every size of element."""
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        x = torch.empty(8192, 1024, dtype=dtype, device="meta")
        kernel, _, arguments, options = _sums(x, x.new_empty(256, 1024, dtype=lse_dtype(dtype)))
        yield Configuration(f"sum over rows {dtype}".replace("torch.", ""), kernel, arguments, options)
