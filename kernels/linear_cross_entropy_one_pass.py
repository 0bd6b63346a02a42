"""Linear + cross entropy and its gradients in one pass: a block of tokens at a time against all classes.

A program writes a tile of exponentials below each row's maximum in the tile, with maxima and sums in the accumulator's
dtype; when all tiles of the block are there and joined, the exponentials are made gradients of logits where they stand,
and multiplied twice.  So nothing is computed twice: three products in all.  The gradient of half-precision weights is
added up over blocks in 24 bits (``product.Epilogue.low``).

What is returned is for a gradient of 1 of the loss; :func:`scale` multiplies by another one.

Source: Hsu et al., "Liger Kernel: Efficient Triton Kernels for LLM Training", 2024, section 3.2, for the one pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn.kernels.launch import Configuration, Launch, architecture, cdiv, launch, precision, run, start
from fastattn.kernels.linear_cross_entropy import (
    Statistics,
    counted,
    empty_statistics,
    join_launch,
    operands,
    roomy,
    roomy_columns,
    tile_of_logits,
)
from fastattn.kernels.numbers import number
from fastattn.kernels.product import (
    GROUP,
    Epilogue,
    ProductTile,
    configuration_tiles,
    place,
    product,
    product_tiles,
    store,
    strided,
)
from fastattn.kernels.rows import matrix
from fastattn.kernels.sums import sum_rows
from fastattn.spec.attention import lse_dtype
from fastattn.spec.checks import empty_contiguous
from fastattn.spec.linear_cross_entropy import DIFFERENTIABLE, LinearCrossEntropyCall, empty_output

# Of logits at a time: 1,536 tokens of 131,072 classes in bfloat16.
LOGITS_BYTES = 3 << 27
# A block of tokens is a multiple of it, and at least as much.
LEAST_TOKENS = 128
# Tokens of a program that makes gradients of exponentials, and of a step of it.
_TOKENS, _STEP = 128, 16
# Elements of a program that scales gradients.
_SCALED = 8192


@triton.jit
def cross_entropy_exponentials(
    hidden,
    hidden_box,
    weight,
    weight_box,
    bias,
    target,
    exponentials,
    statistics,
    tokens,
    classes,
    depth,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Writes a tile of ``exp(logits - the row's largest in the tile)``.

    Grid: all tiles.

    Args:
        hidden: Matrix [tokens, depth].
        hidden_box: its descriptor, or None; ``weight_box`` is of the transpose.
        weight: Matrix [depth, classes].
        bias: [classes], or None.
        target: int64 [tokens].
        exponentials: Matrix [tokens, roomy(classes)].
        statistics: Statistics, of which each tile of classes is a share.
    """
    first_row, first_column = place(tl.program_id(0), tokens, classes, ROWS, COLUMNS, GROUP)
    logits = tile_of_logits(
        hidden, hidden_box, weight, weight_box, bias, first_row, first_column, tokens, classes, depth, PRECISION, ROWS,
        COLUMNS, DEPTH,
    )  # fmt: skip
    row, column = first_row + tl.arange(0, ROWS), first_column + tl.arange(0, COLUMNS)
    inside = row < tokens
    at = (first_column // COLUMNS).to(tl.int64) * tokens + row
    # As 32 bits: one that is ignored may be found by mistake, and counts as little as ever.
    own = (tl.load(target + row, mask=inside, other=-1) - first_column).to(tl.int32)
    here = tl.arange(0, COLUMNS)[None, :] == own[:, None]
    tl.store(statistics.picked + at, tl.sum(tl.where(here, logits, 0.0), axis=1), mask=inside)
    if statistics.sums is not None:
        tl.store(statistics.sums + at, tl.sum(tl.where((column < classes)[None, :], logits, 0.0), axis=1), mask=inside)
    top = tl.max(logits, axis=1)
    found = tl.exp(logits - tl.where(top == float("-inf"), 0.0, top)[:, None])
    tl.store(statistics.tops + at, top, mask=inside)
    tl.store(statistics.totals + at, tl.sum(found, axis=1), mask=inside)
    store(exponentials, first_row, first_column, tokens, roomy(classes), found, ROWS, COLUMNS)


@triton.jit
def cross_entropy_dlogits(
    logits,
    target,
    lse,
    statistics,
    scale,
    bias_sums,
    tokens,
    classes,
    ignore_index,
    smoothing: tl.float64,
    less: tl.float64,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Makes exponentials ``(probability - less - (1 - smoothing) * (class is target)) * scale``, where they stand.

    Grid: tiles of classes, of all tokens' blocks one after another.

    Args:
        logits: Matrix [tokens, roomy(classes)] that :func:`cross_entropy_exponentials` wrote in tiles of COLUMNS.
        lse: [tokens].
        scale: [1], the gradient of a single loss.
        bias_sums: [blocks of TOKENS tokens, classes], sums of what is written before it is rounded, or None.
        less: ``smoothing`` over the number of all classes.

    The others are those of :func:`cross_entropy_exponentials`.
    """
    tiles = tl.cdiv(classes, COLUMNS)
    block, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    column = tile * COLUMNS + tl.arange(0, COLUMNS)
    dtype: tl.constexpr = lse.dtype.element_ty
    factor = tl.load(scale)
    total = tl.zeros([ROWS, COLUMNS], dtype)
    for step in range(0, TOKENS, ROWS):
        row = block * TOKENS + step + tl.arange(0, ROWS)
        inside = row < tokens
        own = tl.load(target + row, mask=inside, other=ignore_index)
        whole = tl.load(lse + row, mask=inside, other=0.0)
        at = tile.to(tl.int64) * tokens + row
        below = tl.exp(tl.load(statistics.tops + at, mask=inside, other=0.0) - whole)
        to = logits.data + row.to(tl.int64)[:, None] * logits.row + column[None, :]
        # Past the last class there are zeros, and room for them.
        mask = inside[:, None] & (column < roomy(classes))[None, :]
        grad = tl.load(to, mask=mask, other=0.0).to(dtype) * below[:, None]
        # The target's is made of its logit, whatever the exponentials are rounded to: it may cancel.
        chosen = tl.exp(tl.load(statistics.picked + at, mask=inside, other=0.0) - whole) - (
            1.0 - number(smoothing, dtype)
        )
        grad = tl.where(column[None, :] == own[:, None], chosen[:, None], grad) - number(less, dtype)[:, None]
        # What is ignored may be NaN.
        grad = tl.where((own != ignore_index)[:, None] & (column < classes)[None, :], grad * factor, 0.0)
        tl.store(to, grad.to(logits.data.dtype.element_ty), mask=mask)
        if bias_sums is not None:
            total += grad
    if bias_sums is not None:
        to = bias_sums + block.to(tl.int64) * classes + column
        tl.store(to, tl.sum(total, axis=0), mask=column < classes)


@triton.jit
def cross_entropy_scale(grad, factor, count, SIZE: tl.constexpr):
    """Multiplies SIZE elements of a gradient where they stand; where ``factor`` [1] is 1, does nothing.

    Grid: blocks of SIZE elements.
    """
    by = tl.load(factor)
    if by != 1.0:
        at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
        found = tl.load(grad + at, mask=at < count, other=0.0).to(by.dtype) * by
        tl.store(grad + at, found.to(grad.dtype.element_ty), mask=at < count)


def linear_cross_entropy_one_pass(call: LinearCrossEntropyCall, needed: Sequence[bool]) -> list[Tensor | None]:
    """Returns loss and lse of a canonical call whose reduction is "mean" or "sum", and the gradients of
    ``DIFFERENTIABLE`` that are needed, for a gradient of 1 of the loss."""
    loss, lse = empty_output(call)
    tensors = (getattr(call, field) for field in DIFFERENTIABLE)
    dhidden, dweight, dbias = grads = [
        empty_contiguous(t) if need and t is not None else None for t, need in zip(tensors, needed, strict=True)
    ]
    wide, classes = lse.dtype, call.vocab_size
    whole_hidden, whole_target = matrix(call.hidden, call.hidden.shape[-1]), call.target.reshape(-1).contiguous()
    each, lses = torch.empty_like(whole_target, dtype=wide), lse.view(-1)
    scale = torch.ones(1, dtype=wide, device=lse.device)
    if call.reduction == "mean":
        scale /= counted(call)
    blocks = list(token_blocks(call))
    space = call.hidden.new_empty(blocks[0].stop, roomy_columns(classes))
    total, low = dbias, None
    if len(blocks) > 1 and dweight is not None and dweight.dtype == torch.bfloat16:
        low = torch.empty_like(dweight, dtype=torch.uint8)
    if len(blocks) > 1 and dbias is not None:
        total = torch.zeros_like(dbias, dtype=wide)
    for rows in blocks:
        target = whole_target[rows]
        # What is ignored does not exist: NaN there would reach weight's gradient as 0 * NaN.
        hidden = whole_hidden[rows].masked_fill((target == call.ignore_index)[:, None], 0.0)
        roomy_dlogits = space[: len(hidden)]
        sums = _dlogits(call, hidden, target, roomy_dlogits, each[rows], lses[rows], scale, dbias is not None)
        dlogits = roomy_dlogits[:, :classes]
        if dhidden is not None:
            product(dlogits, call.weight, dhidden.view(whole_hidden.shape)[rows])
        if dweight is not None:
            last = rows.stop == len(whole_target)
            product(dlogits.t(), hidden, dweight, Epilogue(add=rows.start > 0, low=low, last=last))
        if total is not None and sums is not None:
            found = sum_rows(sums, total.dtype)
            total.copy_(found if len(blocks) == 1 else total + found)
    if dbias is not None and total is not None and total is not dbias:
        dbias.copy_(total)
    loss.copy_(sum_rows(each.view(-1, 1), wide)[0] * scale[0])
    return [loss, lse, *grads]


def token_blocks(call: LinearCrossEntropyCall) -> Iterator[slice]:
    """Cuts the tokens into equal blocks whose logits have ``LOGITS_BYTES`` at most; multiples of ``LEAST_TOKENS``."""
    tokens, bytes_each = call.num_tokens, roomy_columns(call.vocab_size) * call.hidden.element_size()
    most = max(LOGITS_BYTES // bytes_each // LEAST_TOKENS, 1) * LEAST_TOKENS
    step = cdiv(cdiv(tokens, cdiv(tokens, most)), LEAST_TOKENS) * LEAST_TOKENS
    return (slice(start, min(start + step, tokens)) for start in range(0, tokens, step))


def scale(grads: Sequence[Tensor], factor: Tensor) -> None:
    """Multiplies gradients, contiguous, by ``factor`` [], where they stand."""
    for grad in grads:
        if grad.numel():
            run(_scale_launch(grad, factor.to(lse_dtype(grad.dtype)).reshape(1)))


def _dlogits(
    call: LinearCrossEntropyCall,
    hidden: Tensor,
    target: Tensor,
    dlogits: Tensor,
    loss: Tensor,
    lse: Tensor,
    scale: Tensor,
    summed: bool,
) -> Tensor | None:
    """Writes loss, lse and the gradient of the logits of a block of tokens; returns its sums over some tokens each."""
    tokens, classes = len(dlogits), call.vocab_size
    found: list[tuple[Statistics, int]] = []

    def begin(tile: ProductTile) -> None:
        statistics = empty_statistics(call, lse, cdiv(classes, tile.columns), tokens)
        found[:] = [(statistics, tile.columns)]
        start(_exponentials_launch(tile, call, hidden, target, dlogits, statistics))

    launch("linear_cross_entropy", product_tiles(hidden.device, hidden.dtype, tokens), begin)
    statistics, columns = found[0]
    run(join_launch(call, target, statistics, loss, lse))
    sums = lse.new_empty(cdiv(tokens, _TOKENS), classes) if summed else None
    run(_dlogits_launch(call, target, dlogits, lse, statistics, scale, sums, columns))
    return sums


def _exponentials_launch(
    tile: ProductTile,
    call: LinearCrossEntropyCall,
    hidden: Tensor,
    target: Tensor,
    exponentials: Tensor,
    statistics: Statistics,
    known: int | None = None,
) -> Launch:
    tokens, classes = len(exponentials), call.vocab_size
    known = architecture(hidden.device) if known is None else known
    bias = None if call.bias is None else call.bias.contiguous()
    arguments = (
        *operands(tile, hidden, call.weight, known), bias, target, strided(exponentials), statistics, tokens, classes,
        hidden.shape[1],
    )  # fmt: skip
    options = {"PRECISION": precision(), "GROUP": GROUP, **tile.options}
    return cross_entropy_exponentials, (cdiv(tokens, tile.rows) * cdiv(classes, tile.columns),), arguments, options


def _dlogits_launch(
    call: LinearCrossEntropyCall,
    target: Tensor,
    dlogits: Tensor,
    lse: Tensor,
    statistics: Statistics,
    scale: Tensor,
    sums: Tensor | None,
    columns: int,
) -> Launch:
    tokens, classes = len(dlogits), call.vocab_size
    smoothing = call.label_smoothing
    arguments = (
        strided(dlogits), target, lse, statistics, scale, sums, tokens, classes, call.ignore_index, smoothing,
        smoothing / call.vocab_size,
    )  # fmt: skip
    options = {"TOKENS": _TOKENS, "ROWS": _STEP, "COLUMNS": columns, "num_warps": 4}
    return cross_entropy_dlogits, (cdiv(tokens, _TOKENS) * cdiv(classes, columns),), arguments, options


def _scale_launch(grad: Tensor, factor: Tensor) -> Launch:
    count = grad.numel()
    return cross_entropy_scale, (cdiv(count, _SCALED),), (grad, factor, count), {"SIZE": _SCALED, "num_warps": 8}


def configurations(architecture: int) -> Iterator[Configuration]:
    """Yields the kernels with every tile of the table, with bias and smoothing."""
    half, single, double = torch.bfloat16, torch.float32, torch.float64
    for dtype, classes in ((half, 131072), (half, 50257), (single, 131072), (double, 131072)):
        hidden = torch.empty(1408, 4096, dtype=dtype, device="meta")
        weight = torch.empty(classes, 4096, dtype=dtype, device="meta")
        target = torch.empty(1408, dtype=torch.int64, device="meta")
        lse = torch.empty(1408, dtype=lse_dtype(dtype), device="meta")
        call = LinearCrossEntropyCall(hidden, weight, target, weight[:, 0].contiguous(), -100, 0.1, "mean", "triton")
        logits = torch.empty(1408, roomy_columns(classes), dtype=dtype, device="meta")
        name = f"{dtype}".removeprefix("torch.") + ("" if classes == 131072 else f", {classes} classes")
        for tile in configuration_tiles(architecture, dtype, 1):
            statistics = empty_statistics(call, lse, cdiv(classes, tile.columns), 1408)
            kernel, _, arguments, options = _exponentials_launch(
                tile, call, hidden, target, logits, statistics, architecture
            )
            yield Configuration(f"cross entropy exponentials {name}", kernel, arguments, options)
            kernel, _, arguments, options = _dlogits_launch(
                call, target, logits, lse, statistics, lse[:1], lse.new_empty(11, classes), tile.columns
            )
            yield Configuration(f"cross entropy gradients in place {name}", kernel, arguments, options)
        kernel, _, arguments, options = _scale_launch(weight, lse[:1])
        yield Configuration(f"cross entropy scale {name}", kernel, arguments, options)
