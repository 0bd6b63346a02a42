"""Matrix products with a bias: linear layers, and the products of the feed-forward and of the loss.

A program computes a tile of the result; programs that share tiles of either matrix run one after another, so that these
stay in the cache.  Where the GPU has a copy engine (TMA) and a matrix is aligned, it fetches the tiles; otherwise they
come by pointers.  A deep product with few tiles is cut in depth, and the parts are added in order.

Longer than 400 lines because one tile of a product has many forms of fetching and of finishing, which all share it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastattn.kernels import philox
from fastattn.kernels.arguments import NO_DROPOUT, Dropout
from fastattn.kernels.interpreter import is_interpreting
from fastattn.kernels.launch import Configuration, Launch, architecture, cdiv, launch, multiprocessors, precision, start
from fastattn.kernels.numbers import empty_sum, number
from fastattn.kernels.replay import replayed
from fastattn.kernels.rows import matrix
from fastattn.kernels.sums import sum_rows
from fastattn.kernels.tile import accumulator
from fastattn.spec import linear as linear_spec
from fastattn.spec.attention import lse_dtype
from fastattn.spec.linear import LinearCall

# Tiles of rows whose programs share tiles of columns.
GROUP = 8
# The copy engine's bounds: the first architecture that has one, 16 bytes of alignment, sizes of 32 and strides of 40
# bits, 256 elements a side of a box.
_HOPPER, _ALIGNMENT, _LARGEST_SIZE, _LARGEST_STRIDE, _LARGEST_SIDE = 90, 16, 1 << 31, 1 << 40, 256
# Of a product that is cut in depth: most parts, least depth of one, and rows of a tile below which memory, which parts
# would only need more of, is what the time goes to.
_MOST_PARTS, _LEAST_CUT_DEPTH, _LEAST_CUT_ROWS = 4, 4096, 64
# Columns of a tile from which on its sums leave no room for what else a program adds to them.
_HALVED_COLUMNS = 256


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
        low: uint8 [rows, columns], contiguous: where the product is bfloat16, the next 8 bits of what is there, so that
            a sum of many products is not rounded to bfloat16 each time; or None.
        last: whether ``low`` need not be written, and the sum is rounded.
    """

    bias: Tensor | None = None
    more: tuple[Tensor, Tensor] | None = None
    residual: Tensor | None = None
    dropout: Dropout = NO_DROPOUT
    first_token: int = 0
    add: bool = False
    low: Tensor | None = None
    last: bool = True


PLAIN = Epilogue()


class ProductTile(NamedTuple):
    """The tile of a product.

    Attributes:
        rows: of the result.
        columns: of the result.
        depth: terms of its sums that are loaded at a time.
        num_warps: a program.
        num_stages: loads on their way.
        boxes: whether the GPU's copy engine fetches tiles where it can.
        persistent: whether a plain product has as many programs as run at once, each of which takes tile after tile.
    """

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int
    boxes: bool = True
    persistent: bool = False

    @property
    def options(self) -> dict[str, int]:
        names = ("ROWS", "COLUMNS", "DEPTH", "num_warps", "num_stages")
        return dict(zip(names, self[:5], strict=True))


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
        (2, 1): (ProductTile(16, 128, 128, 4, 4), ProductTile(128, 256, 64, 8, 4)),
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
def place(program, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr):
    """Returns a program's first row and column, int32: GROUP tiles of rows go over all columns before the next do."""
    row_tiles, column_tiles = tl.cdiv(rows, ROWS), tl.cdiv(columns, COLUMNS)
    group = program // (GROUP * column_tiles)
    size = tl.minimum(row_tiles - group * GROUP, GROUP)
    within = program % (GROUP * column_tiles)
    return (group * GROUP + within % size) * ROWS, within // size * COLUMNS


@triton.jit
def fetch(
    m, box, TURNED: tl.constexpr, first_row, first_column, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Returns a tile of a matrix, 0 outside of ``rows`` and ``columns``.

    Args:
        box: what :func:`box` returned of the matrix' tensor, or with TURNED of its transpose; with one, the tile is 0
            only from the matrix' own end on.
    """
    if box is None:
        return load(m, first_row, first_column, rows, columns, ROWS, COLUMNS)
    elif TURNED:
        return tl.trans(box.load([first_column, first_row]))
    else:
        return box.load([first_row, first_column])


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
    total, a, a_box, b, b_box, first_row, first_column, rows, columns, begin, end, A_TURNED: tl.constexpr,
    B_TURNED: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Returns ``total`` plus a tile of ``a @ b`` for a [rows, depth] and b [depth, columns], from ``begin`` to ``end``
    of the depth, which is its end or a multiple of DEPTH."""
    for at in range(begin, end, DEPTH):
        left = fetch(a, a_box, A_TURNED, first_row, at, rows, end, ROWS, DEPTH)
        right = fetch(b, b_box, B_TURNED, at, first_column, end, columns, DEPTH, COLUMNS)
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
def widened(high, low):
    """Returns the float32 whose first 16 bits are those of the bfloat16 ``high`` and whose next 8 are ``low``."""
    bits = (high.to(tl.uint16, bitcast=True).to(tl.uint32) << 16) | (low.to(tl.uint32) << 8)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def narrowed(values):
    """Returns float32 values rounded to 24 bits, as the bfloat16 of the first 16 and the uint8 of the rest."""
    bits = values.to(tl.uint32, bitcast=True)
    # Half of the last bit that is kept; a NaN's bits may be all 1, and must not overflow.
    bits = tl.where(values == values, bits + 0x80, bits)
    return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True), ((bits >> 8) & 0xFF).to(tl.uint8)


@triton.jit
def _finish(
    total, bias, residual, out, low, dropout, rescale, first_token, rows, columns, first_row, first_column,
    ADD: tl.constexpr, LAST: tl.constexpr, CUT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Does to sums [ROWS, COLUMNS] what comes after a product, and writes them; see :func:`product_kernel`."""
    total = add_bias(total, bias, first_column, columns, COLUMNS)
    total = drop(total, dropout, rescale, first_token + first_row, first_column, ROWS, COLUMNS)
    if residual.data is not None:
        total += load(residual, first_row, first_column, rows, columns, ROWS, COLUMNS).to(total.dtype)
    if ADD:
        before = load(out, first_row, first_column, rows, columns, ROWS, COLUMNS)
        if low.data is not None:
            total += widened(before, load(low, first_row, first_column, rows, columns, ROWS, COLUMNS))
        else:
            total += before.to(total.dtype)
    if low.data is not None and not LAST:
        high, rest = narrowed(total)
        store(out, first_row, first_column, rows, columns, high, ROWS, COLUMNS)
        store(low, first_row, first_column, rows, columns, rest, ROWS, COLUMNS)
    elif CUT:
        part = tl.program_id(1).to(tl.int64) * rows
        store(out, part + first_row, first_column, part + rows, columns, total, ROWS, COLUMNS)
    else:
        store(out, first_row, first_column, rows, columns, total, ROWS, COLUMNS)


@triton.jit
def _product_tile(
    program, a, a_box, b, b_box, more_a, more_a_box, more_b, more_b_box, bias, residual, out, low, dropout, rescale,
    first_token, rows, columns, depth, share, A_TURNED: tl.constexpr, B_TURNED: tl.constexpr, ADD: tl.constexpr,
    LAST: tl.constexpr, CUT: tl.constexpr, HALVED: tl.constexpr, PRECISION: tl.constexpr, GROUP: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Writes tile number ``program``; arguments: :func:`product_kernel`'s."""
    first_row, first_column = place(program, rows, columns, ROWS, COLUMNS, GROUP)
    dtype: tl.constexpr = accumulator(a.data.dtype.element_ty)
    begin, end = 0, depth
    if CUT:
        begin = tl.program_id(1) * share
        end = tl.minimum(begin + share, depth)
    total = add_product(
        empty_sum(ROWS, COLUMNS, dtype), a, a_box, b, b_box, first_row, first_column, rows, columns, begin, end,
        A_TURNED, B_TURNED, PRECISION, ROWS, COLUMNS, DEPTH,
    )  # fmt: skip
    if more_a.data is not None:
        total = add_product(
            total, more_a, more_a_box, more_b, more_b_box, first_row, first_column, rows, columns, begin, end, A_TURNED,
            B_TURNED, PRECISION, ROWS, COLUMNS, DEPTH,
        )  # fmt: skip
    if HALVED:
        # A half at a time, for which there are registers.
        left, right = tl.split(tl.permute(tl.reshape(total, [ROWS, 2, COLUMNS // 2]), [0, 2, 1]))
        _finish(
            left, bias, residual, out, low, dropout, rescale, first_token, rows, columns, first_row, first_column, ADD,
            LAST, CUT, ROWS, COLUMNS // 2,
        )  # fmt: skip
        _finish(
            right, bias, residual, out, low, dropout, rescale, first_token, rows, columns, first_row,
            first_column + COLUMNS // 2, ADD, LAST, CUT, ROWS, COLUMNS // 2,
        )  # fmt: skip
    else:
        _finish(
            total, bias, residual, out, low, dropout, rescale, first_token, rows, columns, first_row, first_column, ADD,
            LAST, CUT, ROWS, COLUMNS,
        )  # fmt: skip


@triton.jit
def product_kernel(
    a,
    a_box,
    b,
    b_box,
    more_a,
    more_a_box,
    more_b,
    more_b_box,
    bias,
    residual,
    out,
    low,
    dropout,
    rescale: tl.float64,
    first_token,
    rows,
    columns,
    depth,
    share,
    A_TURNED: tl.constexpr,
    B_TURNED: tl.constexpr,
    ADD: tl.constexpr,
    LAST: tl.constexpr,
    CUT: tl.constexpr,
    HALVED: tl.constexpr,
    PERSISTENT: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Writes a tile of ``dropout(a @ b + more_a @ more_b + bias) + residual``.

    Grid: all tiles, or with PERSISTENT fewer programs, each of which takes tile after tile; with CUT, parts of the
    depth.

    Args:
        a: Matrix [rows, depth]; likewise ``more_a``, or one without data.
        a_box: its descriptor, or None; likewise the others.
        b: Matrix [depth, columns]; likewise ``more_b``.
        bias: [columns], or None.
        residual: Matrix [rows, columns], or one without data.
        out: Matrix [rows, columns]; with CUT [parts * rows, columns].
        low: Matrix [rows, columns] of the bits that bfloat16 ``out`` has no room for, or one without data.
        dropout: Dropout, whose rows are counted from ``first_token``.
        rescale: of what survives it.
        share: with CUT, the depth of a part, a multiple of DEPTH.
        A_TURNED: whether ``a_box`` is of the transpose, and ``more_a_box`` too; likewise B_TURNED.
        ADD: whether the result is added to what ``out``, with ``low``, holds.
        LAST: whether ``low`` is not written any more.
        HALVED: whether what comes after the product is done to one half of a tile after the other.
    """
    if PERSISTENT:
        tiles = tl.cdiv(rows, ROWS) * tl.cdiv(columns, COLUMNS)
        for program in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
            _product_tile(
                program, a, a_box, b, b_box, more_a, more_a_box, more_b, more_b_box, bias, residual, out, low, dropout,
                rescale, first_token, rows, columns, depth, share, A_TURNED, B_TURNED, ADD, LAST, CUT, HALVED,
                PRECISION, GROUP, ROWS, COLUMNS, DEPTH,
            )  # fmt: skip
    else:
        _product_tile(
            tl.program_id(0), a, a_box, b, b_box, more_a, more_a_box, more_b, more_b_box, bias, residual, out, low,
            dropout, rescale, first_token, rows, columns, depth, share, A_TURNED, B_TURNED, ADD, LAST, CUT, HALVED,
            PRECISION, GROUP, ROWS, COLUMNS, DEPTH,
        )  # fmt: skip


def strided(tensor: Tensor | None) -> Matrix:
    """Returns a matrix as kernels take it, one without data for None."""
    return Matrix(None, 0, 0) if tensor is None else Matrix(tensor, *tensor.stride())


def box(tensor: Tensor | None, rows: int, columns: int, tile: ProductTile, known: int) -> Any:
    """Returns a descriptor of a matrix whose boxes are [rows, columns]; None where the GPU or the tensor allows none.

    Args:
        tensor: two-dimensional, or None.
        rows: a power of two; likewise ``columns``.
        tile: what the product is made in.
        known: the architecture that ``launch.architecture`` returned; the interpreter has descriptors whatever it is.
    """
    if tensor is None or not tile.boxes or (known < _HOPPER and not is_interpreting()):
        return None
    width, stride = tensor.element_size(), tensor.stride(0) if len(tensor) > 1 else max(tensor.shape[1], columns)
    if (
        width != 2
        or tensor.stride(1) != 1
        or tensor.data_ptr() % _ALIGNMENT
        or stride * width % _ALIGNMENT
        or not 0 < stride * width < _LARGEST_STRIDE
        or min(tensor.shape) == 0
        or max(tensor.shape) >= _LARGEST_SIZE
        or max(rows, columns) > _LARGEST_SIDE
    ):
        return None
    return TensorDescriptor(tensor, list(tensor.shape), [stride, 1], [rows, columns])


def _boxes(tensors: Sequence[Tensor | None], rows: int, columns: int, tile: ProductTile, known: int) -> tuple[Any, ...]:
    """Returns descriptors of matrices [rows, columns], and whether they are of their transposes."""
    turned = tensors[0] is not None and tensors[0].stride(1) != 1
    if turned:
        found = [box(None if t is None else t.t(), columns, rows, tile, known) for t in tensors]
    else:
        found = [box(t, rows, columns, tile, known) for t in tensors]
    return *found, turned


def product(a: Tensor, b: Tensor, out: Tensor, epilogue: Epilogue = PLAIN) -> None:
    """Writes ``out = dropout(a @ b + bias) + residual``, plus the product of two ``more``, plus ``out`` with ``add``.

    Args:
        a: [rows, depth], any strides.
        b: [depth, columns], likewise.
        out: [rows, columns], likewise.
        epilogue: what is done to the product before it is written.
    """
    tiles = product_tiles(a.device, a.dtype, len(out))

    def begin(tile: ProductTile) -> None:
        rows, columns = out.shape
        count = parts(tile, rows, columns, a.shape[1], multiprocessors(a.device)) if epilogue == PLAIN else 1
        if count == 1:
            start(product_launch(tile, a, b, out, epilogue))
            return
        whole = torch.empty(count * len(out), out.shape[1], dtype=lse_dtype(out.dtype), device=out.device)
        start(product_launch(tile, a, b, whole, count=count))
        out.copy_(whole.view(count, *out.shape).sum(0))

    launch("product", tiles, begin)


def parts(tile: ProductTile, rows: int, columns: int, depth: int, programs: int) -> int:
    """Returns into how many parts the depth of a product is cut, so that its tiles keep a GPU busy to the end.

    Args:
        tile: of the product.
        rows: of the result; likewise ``columns``.
        depth: terms of a sum.
        programs: that run at once; 0 where that is not known.
    """
    if programs == 0 or tile.rows < _LEAST_CUT_ROWS:
        return 1
    tiles = cdiv(rows, tile.rows) * cdiv(columns, tile.columns)
    most = max(1, min(_MOST_PARTS, depth // _LEAST_CUT_DEPTH))
    # Rounds that the GPU takes, each as long as a part is deep; a part more must save a tenth to be worth its sums.
    return min(range(1, most + 1), key=lambda count: cdiv(tiles * count, programs) / count * (0.9 + 0.1 * count))


def product_launch(
    tile: ProductTile,
    a: Tensor,
    b: Tensor,
    out: Tensor,
    epilogue: Epilogue = PLAIN,
    *,
    count: int = 1,
    known: int | None = None,
) -> Launch:
    """Returns what :func:`product` launches.

    Args:
        count: parts of the depth; with more than one, ``out`` is [count * rows, columns].
        known: the GPU's architecture; by default that of ``a``.
    """
    known = architecture(a.device) if known is None else known
    rows, columns, depth = len(out) // count, out.shape[1], a.shape[1]
    more_a, more_b = epilogue.more or (None, None)
    a_box, more_a_box, a_turned = _boxes((a, more_a), tile.rows, tile.depth, tile, known)
    b_box, more_b_box, b_turned = _boxes((b, more_b), tile.depth, tile.columns, tile, known)
    arguments = (
        strided(a), a_box, strided(b), b_box, strided(more_a), more_a_box, strided(more_b), more_b_box, epilogue.bias,
        strided(epilogue.residual), strided(out), strided(epilogue.low), epilogue.dropout, epilogue.dropout.rescale,
        epilogue.first_token, rows, columns, depth, cdiv(cdiv(depth, count), tile.depth) * tile.depth,
    )  # fmt: skip
    options = {
        "A_TURNED": a_turned,
        "B_TURNED": b_turned,
        "ADD": epilogue.add,
        "LAST": epilogue.last,
        "CUT": count > 1,
        "HALVED": tile.columns >= _HALVED_COLUMNS and (count > 1 or epilogue._replace(bias=None) != PLAIN),
        "PERSISTENT": tile.persistent and count == 1,
        "PRECISION": precision(),
        "GROUP": GROUP,
        **tile.options,
    }
    tiles = cdiv(rows, tile.rows) * cdiv(columns, tile.columns)
    if options["PERSISTENT"]:
        tiles = min(tiles, multiprocessors(a.device) or tiles)
    return product_kernel, (tiles,) if count == 1 else (tiles, count), arguments, options


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
    """Yields the kernel with every tile of the table: a linear layer, the same with a residual and dropout, the
    gradient of its input where the depth is cut, and of its weights, also as a sum of such that keeps 24 bits."""
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        x = torch.empty(4096, 4096, dtype=dtype, device="meta")
        many = torch.empty(8192, 4096, dtype=lse_dtype(dtype), device="meta")
        low = torch.empty(4096, 4096, dtype=torch.uint8, device="meta")
        dropout = Dropout(torch.empty(2, dtype=torch.int64, device="meta"), 1 << 29, 1.0)
        cases = [
            ("forward", x, x.t(), x, Epilogue(x[0]), 1),
            ("with residual and dropout", x, x.t(), x, Epilogue(x[0], residual=x, dropout=dropout, first_token=128), 1),
            ("input's gradient, cut", x, x, many, PLAIN, 2),
            ("weights' gradient", x.t(), x, x, PLAIN, 1),
        ]
        if dtype == torch.bfloat16:
            cases.append(("weights' gradient, 24 bits", x.t(), x, x, Epilogue(add=True, low=low, last=False), 1))
        for tile in configuration_tiles(architecture, dtype, 1):
            for name, a, b, out, epilogue, count in cases:
                kernel, _, arguments, options = product_launch(
                    tile, a, b, out, epilogue, count=count, known=architecture
                )
                yield Configuration(f"linear {name} {dtype}".replace("torch.", ""), kernel, arguments, options)
