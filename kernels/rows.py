"""How kernels go over rows: tensors as views of rows, tiles of rows and columns, and where a tile's elements lie.

A GPU moves 16 bytes at a time where the compiler knows that they lie at a multiple of 16.  It asks by itself whether 16
divides a stride; ``UNIT`` tells it of 8, 4 and 2.  Rows of odd lengths begin anywhere: of each, the aligned middle is
moved 16 bytes at a time, and the up to 7 elements before and behind it are a small tile of their own, the edges.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn.kernels.arguments import View
from fastattn.kernels.launch import Launch, launch, run, start

# Most elements of a row that a program holds, by bytes of an accumulator: 32 words a thread, of one tensor, leave room
# for addresses and results; of two tensors they do not, and the compiler spills.
LONGEST = {4: 32768, 8: 16384}
# Elements of a tile of short rows; enough for 16-byte loads of 128 threads.
_TILE = 2048
# Of rows that are read in chunks: bytes of a chunk, and of all chunks that are on their way: three times what 4.8 TB/s
# times 700 ns make of a multiprocessor's share. Together they leave room for no other program where there are 164 KB or
# 228, so that no more rows are begun than the cache holds until they are read a second time.
_CHUNK, _ON_THEIR_WAY = 32 << 10, 128 << 10
_MOST_STAGES = 9
# The unit of rows whose middles and edges are moved apart, and the shortest that are.
ANYWHERE = tl.constexpr(0)
_LEAST_MIDDLE = 64
# Elements that middles are made of groups of: 16 bytes of the narrowest.
_GROUP = tl.constexpr(8)


@triton.jit
def aligned(number, UNIT: tl.constexpr):
    """Returns a number, a multiple of UNIT, as one of which the compiler knows that it is."""
    if UNIT <= 1:
        return number
    else:
        return number // UNIT * UNIT


@triton.jit
def spots(view, place, at, rows, columns, UNIT: tl.constexpr, EDGE: tl.constexpr = False):
    """Returns pointers to elements of rows of a view, [rows, columns], and which of them exist.

    Args:
        place: batch, head and rows [rows], all int64.
        at: int64 [columns], counted from a row's begin; where UNIT is ANYWHERE, from its middle's.
        UNIT: what :func:`unit` returned for all views of the launch.
        EDGE: whether the elements are those before and behind the middle, whatever ``at`` is.
    """
    column, inside = numbers(view, place, at, columns, UNIT, EDGE)
    inside &= (place[2] < rows)[:, None]
    start = _start(view, place, UNIT)
    if UNIT == ANYWHERE and not EDGE:
        return view.data + (start + (_GROUP - 1)) // _GROUP * _GROUP + at[None, :], inside
    else:
        return view.data + start + column * view.column, inside


@triton.jit
def _start(view, place, UNIT: tl.constexpr):
    """Returns where rows of a view begin, in elements, [rows, 1]."""
    batch, head, row = place
    start = batch * aligned(view.batch, UNIT) + head * aligned(view.head, UNIT) + row * aligned(view.row, UNIT)
    return start[:, None]


@triton.jit
def numbers(view, place, at, columns, UNIT: tl.constexpr, EDGE: tl.constexpr):
    """Returns the columns that elements are of, [rows or 1, columns], and whether there are such columns; the arguments
    are those of :func:`spots`."""
    start = _start(view, place, UNIT)
    before = (start + (_GROUP - 1)) // _GROUP * _GROUP - start
    middle = (columns - before) // _GROUP * _GROUP
    if UNIT == ANYWHERE and EDGE:
        # As many as threads: fewer the compiler would load again and again rather than pass them on.
        edge = tl.arange(0, max(16, at.shape[0] // 8))[None, :].to(tl.int64)
        behind = edge >= _GROUP
        column = tl.where(behind, before + middle + edge - _GROUP, edge)
        return column, column < tl.where(behind, columns, before)
    elif UNIT == ANYWHERE:
        return before + at[None, :], at[None, :] < middle
    else:
        return at[None, :], (at < aligned(columns, UNIT))[None, :]


def row_tile(
    rows: int, columns: int, itemsize: int, column_stride: int = 1, tensors: int = 1, moved: int = 0
) -> tuple[int, int]:
    """Returns rows and columns of a tile; fewer columns than a row has mean that it is read in chunks.

    Args:
        rows: neighbours, of which a tile may have several.
        columns: of a row.
        itemsize: bytes of an accumulator.
        column_stride: between neighbours of a row; where it is not 1, neighbouring rows are read together.
        tensors: that are held at a time.
        moved: bytes that are read for an element.
    """
    longest = LONGEST[itemsize] // tensors
    if column_stride != 1 and rows > 1:
        tile_rows = min(32, power_of_two(rows))
        return tile_rows, min(power_of_two(columns), longest // 2 // tile_rows)
    tile_columns = min(power_of_two(columns), longest)
    if tile_columns < columns:
        return 1, chunk_columns(itemsize, tensors, moved)
    return max(1, min(_TILE // tile_columns, power_of_two(rows))), tile_columns


def chunk_columns(itemsize: int, tensors: int, moved: int) -> int:
    """Returns the columns of a chunk of a long row; the arguments are those of :func:`row_tile`."""
    return min(LONGEST[itemsize] // tensors // 2, power_of_two(_CHUNK // (moved or itemsize * tensors) + 1) // 2)


def warps(elements: int) -> int:
    """Returns the warps of a program over a tile of ``elements``: 16 to 32 numbers a thread."""
    return min(32, max(4, elements // 512 if elements <= 8192 else elements // 1024))


def long_options(columns: int, tile_columns: int, moved: int, shares: int = 1) -> dict[str, int]:
    """Returns the options of a kernel that goes over rows in chunks.

    Args:
        columns: of a row.
        tile_columns: of a chunk; fewer where not every one of ``shares`` would have one.
        moved: bytes that are read for an element.
    """
    while tile_columns > 2048 and tile_columns * shares > columns:
        tile_columns //= 2
    stages = min(_MOST_STAGES, 1 + _ON_THEIR_WAY // (tile_columns * moved))
    return {"COLUMNS": tile_columns, "STAGES": stages, "num_warps": min(32, max(4, tile_columns // 256))}


def run_rows(kernel_launch: Launch) -> None:
    """Launches a kernel, with as many chunks on their way as fit the GPU.

    Raises:
        UnsupportedError: it does not fit.
    """
    kernel, grid, arguments, options = kernel_launch
    stages = options.get("STAGES", 1)
    if stages == 1:
        run(kernel_launch)
    else:
        tiles = sorted({(stages,), (max(2, stages * 3 // 4),), (2,)}, reverse=True)
        name = kernel.fn.__name__
        launch(name, tiles, lambda tile: start((kernel, grid, arguments, {**options, "STAGES": tile[0]})))


def power_of_two(size: int) -> int:
    """Returns the least power of two that is at least ``size``."""
    return 1 << max(size - 1, 0).bit_length()


def unit(views: Sequence[View], columns: int, anywhere: bool = True) -> int:
    """Returns what kernels are told of where rows begin.

    That is the largest power of two up to 8 that divides the rows' length and all their strides; 1 where columns are no
    neighbours, and where 16 divides them, of which the compiler finds out by itself; and ANYWHERE, where the rows of
    all views are equally far from 16 bytes and what divides them would move fewer at a time, if ``anywhere`` allows.
    """
    present = [v for v in views if v.data is not None]
    found = math.gcd(columns, *(stride for v in present for stride in v[1:4]), 16)
    if found == 16 or any(v.column != 1 for v in present):
        return 1
    group = _GROUP.value
    first = present[0]
    alike = all(
        v.data.data_ptr() % 16 == 0 and not any((a - b) % group for a, b in zip(v[1:4], first[1:4], strict=True))
        for v in present
    )
    if anywhere and alike and columns >= _LEAST_MIDDLE and found * first.data.element_size() < 16:
        return ANYWHERE.value
    return found


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
