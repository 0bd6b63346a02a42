"""How kernels that go over rows are launched: tensors as views of rows, and tiles of rows and columns."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastattn.kernels.arguments import View

# Most elements of a row that a program holds, by bytes of an accumulator: 32 words a thread, of one tensor, leave room
# for addresses and results; of two tensors they do not, and the compiler spills.
LONGEST = {4: 32768, 8: 16384}
# Elements of a tile of short rows; enough for 16-byte loads of 128 threads.
_TILE = 2048


def row_tile(rows: int, columns: int, itemsize: int, column_stride: int = 1, tensors: int = 1) -> tuple[int, int]:
    """Returns rows and columns of a tile; fewer columns than a row has mean that it is read in chunks.

    Args:
        rows: neighbours, of which a tile may have several.
        columns: of a row.
        itemsize: bytes of an accumulator.
        column_stride: between neighbours of a row; where it is not 1, neighbouring rows are read together.
        tensors: that are held at a time.
    """
    longest = LONGEST[itemsize] // tensors
    if column_stride != 1 and rows > 1:
        tile_rows = min(32, power_of_two(rows))
        return tile_rows, min(power_of_two(columns), longest // 2 // tile_rows)
    tile_columns = min(power_of_two(columns), longest)
    if tile_columns < columns:
        # In chunks, of which a program holds more than one at a time while the next is on its way.
        return 1, longest // 4
    return max(1, min(_TILE // tile_columns, power_of_two(rows))), tile_columns


def warps(elements: int) -> int:
    """Returns the warps of a program over a tile of ``elements``: 16 to 32 numbers a thread."""
    return min(32, max(4, elements // 512 if elements <= 8192 else elements // 1024))


def power_of_two(size: int) -> int:
    """Returns the least power of two that is at least ``size``."""
    return 1 << max(size - 1, 0).bit_length()


def unit(views: Sequence[View], columns: int) -> int:
    """Returns the largest power of two up to 8 that divides the rows' length and all their strides; 1 where columns
    are no neighbours, and where 16 does, of which the compiler finds out by itself."""
    numbers = [columns]
    for view in views:
        if view.data is not None:
            numbers += (view.batch, view.head, view.row)
    found = math.gcd(*numbers, 16)
    return 1 if found == 16 or any(v.data is not None and v.column != 1 for v in views) else found


def row_views(dim: int, *tensors: Tensor | None) -> tuple[list[View], tuple[int, int, int, int]]:
    """Returns tensors of one shape as views [batch, heads, rows, columns], of which ``dim`` is the columns.

    Dimensions are merged as far as all strides allow; tensors are copied only where more than three are left.

    Returns:
        The views, one without data for None; and the four sizes.
    """
    whole = [None if t is None else t.movedim(dim, -1) for t in tensors]
    sizes, strides = _merged(whole)
    if len(sizes) > 3:
        whole = [None if t is None else t.contiguous().movedim(dim, -1) for t in tensors]
        sizes, strides = _merged(whole)
    padding = 3 - len(sizes)
    views = []
    for tensor, steps in zip(whole, strides, strict=True):
        if tensor is None:
            views.append(View(None, 0, 0, 0, 0))
        else:
            data = tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor
            batch, head, row = [0] * padding + steps
            views.append(View(data, batch, head, row, tensor.stride(-1)))
    columns = next(t for t in whole if t is not None).shape[-1]
    batch, heads, rows = [1] * padding + sizes
    return views, (batch, heads, rows, columns)


def _merged(tensors: Sequence[Tensor | None]) -> tuple[list[int], list[list[int]]]:
    """Returns the sizes of all dimensions but the last, merged where every tensor allows it, and each one's strides."""
    present = [t for t in tensors if t is not None]
    sizes: list[int] = []
    steps: list[list[int]] = [[] for _ in present]
    for dim, size in enumerate(present[0].shape[:-1]):
        if size == 1:
            continue
        own = [t.stride(dim) for t in present]
        if sizes and all(s[-1] == step * size for s, step in zip(steps, own, strict=True)):
            sizes[-1] *= size
            for s, step in zip(steps, own, strict=True):
                s[-1] = step
        else:
            sizes.append(size)
            for s, step in zip(steps, own, strict=True):
                s.append(step)
    found = iter(steps)
    return sizes, [[] if t is None else next(found) for t in tensors]


def matrix(tensor: Tensor, columns: int) -> Tensor:
    """Returns ``tensor`` as [rows, columns] with adjacent columns, copied only where no view is possible."""
    found = tensor.reshape(-1, columns)
    return found if columns == 1 or found.stride(1) == 1 else found.contiguous()
