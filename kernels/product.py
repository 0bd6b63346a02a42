"""Matrix products with a bias: linear layers, and the products of the feed-forward and of the loss.

A program computes a tile of the result; programs that share tiles of either matrix run one after another, so that these
stay in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn.kernels import philox
from fastattn.kernels.arguments import NO_DROPOUT, Dropout
from fastattn.kernels.launch import Configuration, Launch, architecture, cdiv, launch, precision, start
from fastattn.kernels.numbers import number
from fastattn.kernels.replay import replayed
from fastattn.kernels.rows import matrix
from fastattn.kernels.sums import sum_rows
from fastattn.kernels.tile import accumulator
from fastattn.spec import linear as linear_spec
from fastattn.spec.linear import LinearCall

# Tiles of rows whose programs share tiles of columns.
GROUP = 8


class Matrix(NamedTuple):
    """A matrix as a kernel is handed it; strides in elements.

    Attributes:
        data: tensor, or None.
        row: stride of the first dimension.
        column: stride of the second.
    """

    data: Any
    row: int
    column: int


class Epilogue(NamedTuple):
    """What is done to a product before it is written.

    Attributes:
        bias: [columns], contiguous, or None.
        more: two matrices of the product's shapes, whose product is added, or None.
        residual: [rows, columns], any strides, or None; added last.
        dropout: of what is added to the residual.
        first_token: the number that dropout gives the first row.
        add: whether to add to what is there.
    """

    bias: Tensor | None = None
    more: tuple[Tensor, Tensor] | None = None
    residual: Tensor | None = None
    dropout: Dropout = NO_DROPOUT
    first_token: int = 0
    add: bool = False


PLAIN = Epilogue()


class ProductTile(NamedTuple):
    """The tile of a product.

    Attributes:
        rows: of the result.
        columns: of the result.
        depth: terms of its sums that are loaded at a time.
        num_warps: a program.
        num_stages: loads on their way.
    """

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, int]:
        names = ("ROWS", "COLUMNS", "DEPTH", "num_warps", "num_stages")
        return dict(zip(names, self, strict=True))


# By architecture (0 for others, and the interpreter), bytes of an element, and numbers that a program holds for an
# element of its tile (1 for a plain product); for few rows, and for many.
TILES: dict[int, dict[tuple[int, int], tuple[ProductTile, ProductTile]]] = {
    0: {
        (2, 1): (ProductTile(16, 64, 32, 4, 2), ProductTile(64, 64, 32, 4, 2)),
        (2, 2): (ProductTile(16, 64, 32, 4, 2), ProductTile(64, 64, 32, 4, 2)),
        (2, 3): (ProductTile(16, 64, 32, 4, 2), ProductTile(64, 32, 32, 4, 2)),
        (4, 1): (ProductTile(16, 64, 32, 4, 2), ProductTile(64, 64, 16, 4, 2)),
        (4, 2): (ProductTile(16, 64, 32, 4, 2), ProductTile(64, 32, 16, 4, 2)),
        (4, 3): (ProductTile(16, 64, 32, 4, 2), ProductTile(32, 32, 16, 4, 2)),
        (8, 1): (ProductTile(16, 32, 16, 4, 1), ProductTile(32, 32, 16, 4, 1)),
        (8, 2): (ProductTile(16, 32, 16, 4, 1), ProductTile(32, 32, 16, 4, 1)),
        (8, 3): (ProductTile(16, 32, 16, 4, 1), ProductTile(32, 16, 16, 4, 1)),
    },
    80: {
        (2, 1): (ProductTile(16, 128, 64, 4, 4), ProductTile(128, 128, 32, 8, 4)),
        (2, 2): (ProductTile(16, 128, 64, 4, 3), ProductTile(128, 64, 32, 8, 4)),
        (2, 3): (ProductTile(16, 64, 64, 4, 3), ProductTile(64, 64, 32, 4, 4)),
    },
    90: {
        (2, 1): (ProductTile(16, 128, 128, 4, 4), ProductTile(128, 256, 64, 8, 3)),
        (2, 2): (ProductTile(16, 128, 64, 4, 4), ProductTile(128, 128, 64, 8, 3)),
        (2, 3): (ProductTile(16, 128, 64, 4, 3), ProductTile(128, 64, 64, 8, 3)),
    },
}
TILES[80] = {**TILES[0], **TILES[80]}
TILES[90] = {**TILES[0], **TILES[90]}
TILES[100] = TILES[90]


def product_tiles(
    device: torch.device, dtype: torch.dtype, rows: int, numbers: int = 1
) -> tuple[ProductTile, ProductTile]:
    """Returns the tile for a product of ``rows`` rows, and one that fits every GPU.

    Args:
        device: that multiplies.
        dtype: of the matrices.
        rows: of the result.
        numbers: that a program holds for an element of its tile.
    """
    known = TILES[max(a for a in TILES if a <= architecture(device))]
    few, many = known[dtype.itemsize, numbers]
    return few if rows <= few.rows else many, TILES[0][dtype.itemsize, numbers][0]


def configuration_tiles(architecture: int, dtype: torch.dtype, numbers: int) -> tuple[ProductTile, ...]:
    """Returns the tiles of the table for an architecture."""
    return TILES[architecture][dtype.itemsize, numbers]


@triton.jit
def place(rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr):
    """Returns a program's first row and column, int32: GROUP tiles of rows go over all columns before the next do."""
    row_tiles, column_tiles = tl.cdiv(rows, ROWS), tl.cdiv(columns, COLUMNS)
    group = tl.program_id(0) // (GROUP * column_tiles)
    size = tl.minimum(row_tiles - group * GROUP, GROUP)
    within = tl.program_id(0) % (GROUP * column_tiles)
    return (group * GROUP + within % size) * ROWS, within // size * COLUMNS


@triton.jit
def load(m, first_row, first_column, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Returns a tile of a matrix, 0 outside of ``rows`` and ``columns``."""
    row = first_row + tl.arange(0, ROWS)
    column = first_column + tl.arange(0, COLUMNS)
    at = m.data + row.to(tl.int64)[:, None] * m.row + column.to(tl.int64)[None, :] * m.column
    return tl.load(at, mask=(row < rows)[:, None] & (column < columns)[None, :], other=0.0)


@triton.jit
def store(m, first_row, first_column, rows, columns, values, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rounds a tile to the matrix' dtype and stores it."""
    row = first_row + tl.arange(0, ROWS)
    column = first_column + tl.arange(0, COLUMNS)
    at = m.data + row.to(tl.int64)[:, None] * m.row + column.to(tl.int64)[None, :] * m.column
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    tl.store(at, values.to(m.data.dtype.element_ty), mask=inside)


@triton.jit
def add_product(
    total, a, b, first_row, first_column, rows, columns, depth, PRECISION: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Returns ``total`` plus a tile of ``a @ b`` for a [rows, depth] and b [depth, columns]."""
    for at in range(0, depth, DEPTH):
        left = load(a, first_row, at, rows, depth, ROWS, DEPTH)
        right = load(b, at, first_column, depth, columns, DEPTH, COLUMNS)
        total = tl.dot(left, right, total, input_precision=PRECISION, out_dtype=total.dtype)
    return total


@triton.jit
def add_bias(values, bias, first_column, columns, COLUMNS: tl.constexpr):
    """Returns values [rows, COLUMNS] plus a bias [columns], or plus nothing where it is None."""
    if bias is not None:
        column = first_column + tl.arange(0, COLUMNS)
        values += tl.load(bias + column, mask=column < columns, other=0.0).to(values.dtype)[None, :]
    return values


@triton.jit
def drop(values, dropout, rescale, first_token, first_column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Returns values [ROWS, COLUMNS] rescaled where they survive and 0 elsewhere."""
    if dropout.state is not None:
        keep = philox.keep(dropout, 0 * first_column, first_token, first_column, ROWS, COLUMNS)
        values = tl.where(keep, values * number(rescale, values.dtype)[:, None], 0.0)
    return values


@triton.jit
def product_kernel(
    a,
    b,
    more_a,
    more_b,
    bias,
    residual,
    out,
    dropout,
    rescale: tl.float64,
    first_token,
    rows,
    columns,
    depth,
    ADD: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Writes a tile of ``dropout(a @ b + more_a @ more_b + bias) + residual``.

    Grid: all tiles.

    Args:
        a: Matrix [rows, depth]; likewise ``more_a``, or one without data.
        b: Matrix [depth, columns]; likewise ``more_b``.
        bias: [columns], or None.
        residual: Matrix [rows, columns], or one without data.
        out: Matrix [rows, columns].
        dropout: Dropout, whose rows are counted from ``first_token``.
        rescale: of what survives it.
        ADD: whether the result is added to what ``out`` holds.
    """
    first_row, first_column = place(rows, columns, ROWS, COLUMNS, GROUP)
    dtype: tl.constexpr = accumulator(a.data.dtype.element_ty)
    total = tl.zeros([ROWS, COLUMNS], dtype)
    total = add_product(total, a, b, first_row, first_column, rows, columns, depth, PRECISION, ROWS, COLUMNS, DEPTH)
    if more_a.data is not None:
        total = add_product(
            total, more_a, more_b, first_row, first_column, rows, columns, depth, PRECISION, ROWS, COLUMNS, DEPTH
        )
    total = add_bias(total, bias, first_column, columns, COLUMNS)
    total = drop(total, dropout, rescale, first_token + first_row, first_column, ROWS, COLUMNS)
    if residual.data is not None:
        total += load(residual, first_row, first_column, rows, columns, ROWS, COLUMNS).to(dtype)
    if ADD:
        total += load(out, first_row, first_column, rows, columns, ROWS, COLUMNS).to(dtype)
    store(out, first_row, first_column, rows, columns, total, ROWS, COLUMNS)


def strided(tensor: Tensor | None) -> Matrix:
    """Returns a matrix as kernels take it, one without data for None."""
    return Matrix(None, 0, 0) if tensor is None else Matrix(tensor, *tensor.stride())


def product(a: Tensor, b: Tensor, out: Tensor, epilogue: Epilogue = PLAIN) -> None:
    """Writes ``out = dropout(a @ b + bias) + residual``, plus the product of two ``more``, plus ``out`` with ``add``.

    Args:
        a: [rows, depth], any strides.
        b: [depth, columns], likewise.
        out: [rows, columns], likewise.
        epilogue: what is done to the product before it is written.
    """
    tiles = product_tiles(a.device, a.dtype, len(out))
    launch("product", tiles, lambda tile: start(product_launch(tile, a, b, out, epilogue)))


def product_launch(tile: ProductTile, a: Tensor, b: Tensor, out: Tensor, epilogue: Epilogue = PLAIN) -> Launch:
    """Returns what :func:`product` launches."""
    (rows, columns), depth = out.shape, a.shape[1]
    more_a, more_b = epilogue.more or (None, None)
    arguments = (
        strided(a), strided(b), strided(more_a), strided(more_b), epilogue.bias, strided(epilogue.residual),
        strided(out), epilogue.dropout, epilogue.dropout.rescale, epilogue.first_token, rows, columns, depth,
    )  # fmt: skip
    options = {"ADD": epilogue.add, "PRECISION": precision(), "GROUP": GROUP, **tile.options}
    return product_kernel, (cdiv(rows, tile.rows) * cdiv(columns, tile.columns),), arguments, options


@replayed
def linear_fwd(call: LinearCall) -> list[Tensor]:
    """Returns the parts of ``input @ weight^T + bias``."""
    outs = linear_spec.empty_outputs(call)
    x = matrix(call.input, call.input.shape[-1])
    biases = [None] * call.parts if call.bias is None else call.bias.contiguous().chunk(call.parts)
    for weight, bias, out in zip(call.weight.chunk(call.parts), biases, outs, strict=True):
        product(x, weight.t(), out.view(call.num_tokens, call.part_dim), Epilogue(bias))
    return outs


def linear_bwd(call: LinearCall, douts: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor | None]:
    """Returns the gradients of input, weight and bias that are needed."""
    need_input, need_weight, need_bias = needed
    x = matrix(call.input, call.input.shape[-1])
    rows = [matrix(dout, call.part_dim) for dout in douts]
    dinput = dweight = dbias = None
    if need_input:
        dinput = call.input.new_empty(call.input.shape)
        whole = rows[0] if len(rows) == 1 else torch.cat(rows, dim=1)
        product(whole, call.weight, dinput.view(call.num_tokens, -1))
    if need_weight:
        dweight = call.weight.new_empty(call.weight.shape)
        for dout, part in zip(rows, dweight.chunk(call.parts), strict=True):
            product(dout.t(), x, part)
    if need_bias and call.bias is not None:
        dbias = torch.cat([sum_rows(dout, call.bias.dtype) for dout in rows])
    return [dinput, dweight, dbias]


def configurations(architecture: int) -> Iterator[Configuration]:
    """Yields the kernel with every tile of the table, for a linear layer and for the gradient of its weights."""
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        x = torch.empty(4096, 4096, dtype=dtype, device="meta")
        for tile in configuration_tiles(architecture, dtype, 1):
            for name, a, b, bias in (("forward", x, x.t(), x[0]), ("weights' gradient", x.t(), x, None)):
                kernel, _, arguments, options = product_launch(tile, a, b, x, Epilogue(bias))
                yield Configuration(f"linear {name} {dtype}".replace("torch.", ""), kernel, arguments, options)
            dropout = Dropout(torch.empty(2, dtype=torch.int64, device="meta"), 1 << 29, 1.0)
            epilogue = Epilogue(x[0], residual=x, dropout=dropout, first_token=128)
            kernel, _, arguments, options = product_launch(tile, x, x.t(), x, epilogue)
            name = f"linear with residual and dropout {dtype}".replace("torch.", "")
            yield Configuration(name, kernel, arguments, options)
