"""The cross entropy of a linear layer's logits, of which no more than a block of classes exists at a time.

Forward, a program takes a tile of tokens over a share of the classes, with a running maximum and sum; the shares are
joined in order.  Backward, the gradient of a block of logits is computed from lse and multiplied twice; the gradient of
the weights is written once, that of the tokens added up over blocks in the accumulator's dtype.  Where the gradient of
the loss need not be known (``linear_cross_entropy_one_pass.py``), the logits are not computed twice.

Longer than 400 lines because the ways forward and backward are of the same tiles of logits.

Source: Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models", 2024, section 4.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn.kernels.launch import Configuration, Launch, architecture, cdiv, launch, precision, run, start
from fastattn.kernels.numbers import number
from fastattn.kernels.product import (
    GROUP,
    Epilogue,
    ProductTile,
    add_bias,
    add_product,
    box,
    configuration_tiles,
    place,
    product,
    product_tiles,
    store,
    strided,
)
from fastattn.kernels.rows import matrix
from fastattn.kernels.sums import sum_rows
from fastattn.kernels.tile import accumulator
from fastattn.spec.attention import lse_dtype
from fastattn.spec.checks import empty_contiguous
from fastattn.spec.linear_cross_entropy import DIFFERENTIABLE, LinearCrossEntropyCall, empty_output

# Of gradients of logits at a time.
LOGITS_BYTES = 1 << 27
# Programs of the forward below which a GPU is not full, and classes are shared out.
_FEW_PROGRAMS = 264


class Statistics(NamedTuple):
    """What the loss is joined from, each [shares, tokens] in the accumulator's dtype.

    Attributes:
        tops: the largest logit of a share of the classes.
        totals: sums of exponentials below it.
        sums: of logits, or None where nothing is smoothed.
        picked: the target's logit, or 0 in a share that does not have it.
    """

    tops: Any
    totals: Any
    sums: Any
    picked: Any


def empty_statistics(call: LinearCrossEntropyCall, like: Tensor, shares: int, tokens: int) -> Statistics:
    """Returns statistics to be written, in the dtype of ``like``."""
    tops, totals, sums, picked = (like.new_empty(shares, tokens) for _ in range(4))
    return Statistics(tops, totals, sums if call.label_smoothing > 0.0 else None, picked)


def roomy_columns(classes: int) -> int:
    """Returns the columns of a matrix of logits whose rows begin at 16 bytes, whatever the number of classes."""
    return cdiv(classes, 16) * 16


@triton.jit
def roomy(classes):
    """Returns :func:`roomy_columns`, of which the compiler knows that 16 divides it: rows that end elsewhere are moved
    one element at a time."""
    return tl.cdiv(classes, 16) * 16


@triton.jit
def tile_of_logits(
    hidden, hidden_box, weight, weight_box, bias, first_row, first_class, tokens, classes, depth,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Returns a tile of logits [ROWS, COLUMNS], -inf beyond the last class."""
    zero = tl.zeros([ROWS, COLUMNS], accumulator(hidden.data.dtype.element_ty))
    found = add_product(
        zero, hidden, hidden_box, weight, weight_box, first_row, first_class, tokens, classes, 0, depth, False, True,
        PRECISION, ROWS, COLUMNS, DEPTH,
    )  # fmt: skip
    found = add_bias(found, bias, first_class, classes, COLUMNS)
    column = first_class + tl.arange(0, COLUMNS)
    return tl.where((column < classes)[None, :], found, float("-inf"))


@triton.jit
def cross_entropy_shares(
    hidden,
    hidden_box,
    weight,
    weight_box,
    bias,
    target,
    statistics,
    tokens,
    classes,
    depth,
    share,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Writes what a share of the classes contributes to the loss of a tile of tokens.

    Grid: tiles of tokens; shares.

    Args:
        hidden: Matrix [tokens, depth].
        hidden_box: its descriptor, or None; ``weight_box`` is of the transpose.
        weight: Matrix [depth, classes].
        bias: [classes], or None.
        target: int64 [tokens].
        statistics: :class:`Statistics`.
        share: classes of a share, in multiples of COLUMNS.
    """
    first_row = tl.program_id(0) * ROWS
    begin = tl.program_id(1) * share
    end = tl.minimum(begin + share, classes)
    dtype: tl.constexpr = accumulator(hidden.data.dtype.element_ty)
    row = first_row + tl.arange(0, ROWS)
    own = tl.load(target + row, mask=row < tokens, other=-1)
    top = tl.full([ROWS], float("-inf"), dtype)
    total = tl.zeros([ROWS], dtype)
    plain = tl.zeros([ROWS], dtype)
    found = tl.zeros([ROWS], dtype)
    for first_class in range(begin, end, COLUMNS):
        logits = tile_of_logits(
            hidden, hidden_box, weight, weight_box, bias, first_row, first_class, tokens, classes, depth, PRECISION,
            ROWS, COLUMNS, DEPTH,
        )  # fmt: skip
        column = first_class + tl.arange(0, COLUMNS)
        now = tl.maximum(top, tl.max(logits, axis=1))
        shift = tl.where(now == float("-inf"), 0.0, now)
        total = total * tl.exp(top - shift) + tl.sum(tl.exp(logits - shift[:, None]), axis=1)
        top = now
        found += tl.sum(tl.where(column[None, :] == own[:, None], logits, 0.0), axis=1)
        if statistics.sums is not None:
            plain += tl.sum(tl.where((column < classes)[None, :], logits, 0.0), axis=1)
    at = tl.program_id(1).to(tl.int64) * tokens + row
    tl.store(statistics.tops + at, top, mask=row < tokens)
    tl.store(statistics.totals + at, total, mask=row < tokens)
    tl.store(statistics.picked + at, found, mask=row < tokens)
    if statistics.sums is not None:
        tl.store(statistics.sums + at, plain, mask=row < tokens)


@triton.jit
def cross_entropy_join(
    target,
    statistics,
    loss,
    lse,
    tokens,
    classes,
    shares,
    ignore_index,
    smoothing: tl.float64,
    ROWS: tl.constexpr,
    SHARES: tl.constexpr,
):
    """Writes the loss and the lse of ROWS tokens, 0 where they are ignored, from SHARES shares at a time.

    Grid: tiles of tokens.  Arguments: :func:`cross_entropy_shares`'s.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < tokens
    dtype: tl.constexpr = lse.dtype.element_ty
    top = tl.full([ROWS], float("-inf"), dtype)
    total = tl.zeros([ROWS], dtype)
    plain = tl.zeros([ROWS], dtype)
    own = tl.zeros([ROWS], dtype)
    for first in range(0, shares, SHARES):
        share = first + tl.arange(0, SHARES)
        here = (share < shares)[:, None] & inside[None, :]
        at = share.to(tl.int64)[:, None] * tokens + row[None, :]
        share_tops = tl.load(statistics.tops + at, mask=here, other=float("-inf"))
        now = tl.maximum(top, tl.max(share_tops, axis=0))
        shift = tl.where(now == float("-inf"), 0.0, now)
        share_totals = tl.load(statistics.totals + at, mask=here, other=0.0) * tl.exp(share_tops - shift[None, :])
        total = total * tl.exp(top - shift) + tl.sum(share_totals, axis=0)
        top = now
        own += tl.sum(tl.load(statistics.picked + at, mask=here, other=0.0), axis=0)
        if statistics.sums is not None:
            plain += tl.sum(tl.load(statistics.sums + at, mask=here, other=0.0), axis=0)
    whole = tl.where(top == float("-inf"), 0.0, top) + tl.log(total)
    found = whole - own
    if statistics.sums is not None:
        s = number(smoothing, dtype)
        found = (1.0 - s) * found + s * (whole - plain / number(classes, dtype))
    counted = tl.load(target + row, mask=inside, other=0) != ignore_index
    tl.store(loss + row, tl.where(counted, found, 0.0), mask=inside)
    tl.store(lse + row, tl.where(counted, whole, 0.0), mask=inside)


@triton.jit
def cross_entropy_gradients(
    hidden,
    hidden_box,
    weight,
    weight_box,
    bias,
    target,
    lse,
    scale,
    dlogits,
    bias_sums,
    tokens,
    first_class,
    classes,
    depth,
    ignore_index,
    smoothing: tl.float64,
    less: tl.float64,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Writes a tile of ``(exp(logits - lse) - less - (1 - smoothing) * (class is target)) * scale``.

    Grid: all tiles.

    Args:
        weight: Matrix [depth, classes] of a block of ``classes``, of which the first is number ``first_class``.
        lse: [tokens]; likewise ``scale``, the gradients of single losses.
        dlogits: Matrix [tokens, roomy(classes)].
        bias_sums: [tiles of tokens, classes], sums of ``dlogits`` before they are rounded, or None.
        less: ``smoothing`` over the number of all classes.

    The others are those of :func:`cross_entropy_shares`.
    """
    first_row, first_column = place(tl.program_id(0), tokens, classes, ROWS, COLUMNS, GROUP)
    logits = tile_of_logits(
        hidden, hidden_box, weight, weight_box, bias, first_row, first_column, tokens, classes, depth, PRECISION, ROWS,
        COLUMNS, DEPTH,
    )  # fmt: skip
    row = first_row + tl.arange(0, ROWS)
    column = first_column + tl.arange(0, COLUMNS)
    own = tl.load(target + row, mask=row < tokens, other=ignore_index)
    grad = tl.exp(logits - tl.load(lse + row, mask=row < tokens, other=0.0)[:, None])
    grad -= number(less, grad.dtype)[:, None]
    picked = (column + tl.full([1], first_class, tl.int64))[None, :] == own[:, None]
    grad = tl.where(picked, grad - (1.0 - number(smoothing, grad.dtype))[:, None], grad)
    grad *= tl.load(scale + row, mask=row < tokens, other=0.0)[:, None]
    # What is ignored may be NaN.
    grad = tl.where((own != ignore_index)[:, None] & (column < classes)[None, :], grad, 0.0)
    if bias_sums is not None:
        to = bias_sums + (first_row // ROWS).to(tl.int64) * classes + column
        tl.store(to, tl.sum(grad, axis=0), mask=column < classes)
    store(dlogits, first_row, first_column, tokens, roomy(classes), grad, ROWS, COLUMNS)


def linear_cross_entropy_fwd(call: LinearCrossEntropyCall) -> tuple[Tensor, Tensor]:
    """Returns ``(loss, lse)`` of a canonical call."""
    loss, lse = empty_output(call)
    tokens = call.num_tokens
    each = torch.empty_like(lse)
    if tokens:
        hidden, target = matrix(call.hidden, call.hidden.shape[-1]), call.target.reshape(-1).contiguous()
        found: list[Statistics] = []

        def begin(tile: ProductTile) -> None:
            statistics = empty_statistics(call, lse, _shares(tile, tokens, call.vocab_size)[1], tokens)
            found[:] = [statistics]
            start(_shares_launch(tile, call, hidden, target, statistics))

        launch("linear_cross_entropy", product_tiles(hidden.device, hidden.dtype, tokens, 2), begin)
        run(join_launch(call, target, found[0], each, lse))
    if call.reduction == "none":
        return each, lse
    total = sum_rows(each.view(-1, 1), each.dtype)[0] if tokens else each.sum()
    return loss.copy_(total / counted(call) if call.reduction == "mean" else total), lse


def linear_cross_entropy_bwd(
    call: LinearCrossEntropyCall, lse: Tensor, dloss: Tensor, needed: Sequence[bool]
) -> list[Tensor | None]:
    """Returns the gradients of ``DIFFERENTIABLE`` that are needed."""
    tensors = (getattr(call, field) for field in DIFFERENTIABLE)
    dhidden, dweight, dbias = grads = [
        empty_contiguous(t) if need and t is not None else None for t, need in zip(tensors, needed, strict=True)
    ]
    tokens, wide = call.num_tokens, lse_dtype(call.hidden.dtype)
    if tokens == 0:
        return [None if g is None else g.zero_() for g in grads]
    target = call.target.reshape(-1).contiguous()
    ignored = (target == call.ignore_index)[:, None]
    # What is ignored does not exist: NaN there would reach weight's gradient as 0 * NaN.
    hidden = matrix(call.hidden, call.hidden.shape[-1]).masked_fill(ignored, 0.0)
    scale = dloss.to(wide).expand(call.target.shape).reshape(-1)
    scale = (scale / counted(call) if call.reduction == "mean" else scale).contiguous()
    blocks = list(class_blocks(call))
    total = None
    if dhidden is not None:
        total = dhidden.view(hidden.shape) if len(blocks) == 1 else torch.empty_like(hidden, dtype=wide)
    lse = lse.reshape(-1).contiguous()
    for classes in blocks:
        weight = call.weight[classes]
        dlogits, sums = _dlogits(call, hidden, target, lse, scale, classes, dbias is not None)
        if total is not None:
            product(dlogits, weight, total, Epilogue(add=classes.start > 0))
        if dweight is not None:
            product(dlogits.t(), hidden, dweight[classes])
        if dbias is not None and sums is not None:
            dbias[classes] = sum_rows(sums, dbias.dtype)
    if dhidden is not None and total is not None and len(blocks) > 1:
        dhidden.view(hidden.shape).copy_(total)
    return grads


def counted(call: LinearCrossEntropyCall) -> Tensor:
    """Returns how many tokens count, at least 1: a tensor, lest somebody waits for the GPU."""
    return (call.target != call.ignore_index).sum().clamp(min=1)


def class_blocks(call: LinearCrossEntropyCall) -> Iterator[slice]:
    """Cuts the classes so that a block of logits has at most ``LOGITS_BYTES``; in multiples of 256."""
    most = LOGITS_BYTES // (call.num_tokens * call.hidden.element_size())
    step = max(most // 256 * 256, 256)
    return (slice(start, min(start + step, call.vocab_size)) for start in range(0, call.vocab_size, step))


def operands(tile: ProductTile, hidden: Tensor, weight: Tensor, known: int) -> tuple[Any, ...]:
    """Returns what :func:`tile_of_logits` multiplies: hidden states, the transpose of ``weight``, and descriptors."""
    hidden_box = box(hidden, tile.rows, tile.depth, tile, known)
    return strided(hidden), hidden_box, strided(weight.t()), box(weight, tile.columns, tile.depth, tile, known)


def _shares(tile: ProductTile, tokens: int, classes: int) -> tuple[int, int]:
    """Returns the classes of a share, in whole tiles, and how many shares there are."""
    shares = max(1, _FEW_PROGRAMS // cdiv(tokens, tile.rows))
    share = cdiv(cdiv(classes, shares), tile.columns) * tile.columns
    return share, cdiv(classes, share)


def _shares_launch(
    tile: ProductTile,
    call: LinearCrossEntropyCall,
    hidden: Tensor,
    target: Tensor,
    statistics: Statistics,
    known: int | None = None,
) -> Launch:
    tokens, classes = len(hidden), call.vocab_size
    known = architecture(hidden.device) if known is None else known
    share, shares = _shares(tile, tokens, classes)
    bias = None if call.bias is None else call.bias.contiguous()
    arguments = (
        *operands(tile, hidden, call.weight, known), bias, target, statistics, tokens, classes, hidden.shape[1], share,
    )  # fmt: skip
    grid = cdiv(tokens, tile.rows), shares
    return cross_entropy_shares, grid, arguments, {"PRECISION": precision(), **tile.options}


def join_launch(
    call: LinearCrossEntropyCall, target: Tensor, statistics: Statistics, loss: Tensor, lse: Tensor
) -> Launch:
    tokens = len(target)
    arguments = (
        target, statistics, loss, lse, tokens, call.vocab_size, len(statistics.tops), call.ignore_index,
        call.label_smoothing,
    )  # fmt: skip
    return cross_entropy_join, (cdiv(tokens, 16),), arguments, {"ROWS": 16, "SHARES": 32, "num_warps": 4}


def _dlogits(
    call: LinearCrossEntropyCall,
    hidden: Tensor,
    target: Tensor,
    lse: Tensor,
    scale: Tensor,
    classes: slice,
    summed: bool,
) -> tuple[Tensor, Tensor | None]:
    """Returns the gradient of a block of logits, and where ``summed`` its sums over tiles of tokens."""
    tokens, count = len(hidden), classes.stop - classes.start
    dlogits = hidden.new_empty(tokens, roomy_columns(count))
    sums: list[Tensor | None] = [None]

    def begin(tile: ProductTile) -> None:
        if summed:
            sums[0] = hidden.new_empty(cdiv(tokens, tile.rows), count, dtype=lse.dtype)
        start(_gradients_launch(tile, call, hidden, target, lse, scale, classes, dlogits, sums[0]))

    launch("linear_cross_entropy_backward", product_tiles(hidden.device, hidden.dtype, tokens), begin)
    return dlogits[:, :count], sums[0]


def _gradients_launch(
    tile: ProductTile,
    call: LinearCrossEntropyCall,
    hidden: Tensor,
    target: Tensor,
    lse: Tensor,
    scale: Tensor,
    classes: slice,
    dlogits: Tensor,
    bias_sums: Tensor | None,
    known: int | None = None,
) -> Launch:
    tokens, count = len(dlogits), classes.stop - classes.start
    known = architecture(hidden.device) if known is None else known
    bias = None if call.bias is None else call.bias[classes].contiguous()
    arguments = (
        *operands(tile, hidden, call.weight[classes], known), bias, target, lse, scale, strided(dlogits), bias_sums,
        tokens, classes.start, count, hidden.shape[1], call.ignore_index, call.label_smoothing,
        call.label_smoothing / call.vocab_size,
    )  # fmt: skip
    options = {"PRECISION": precision(), "GROUP": GROUP, **tile.options}
    grid = (cdiv(tokens, tile.rows) * cdiv(count, tile.columns),)
    return cross_entropy_gradients, grid, arguments, options


def configurations(architecture: int) -> Iterator[Configuration]:
    """Yields the kernels with every tile of the table, with bias and smoothing."""
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        hidden = torch.empty(4096, 1024, dtype=dtype, device="meta")
        weight = torch.empty(8192, 1024, dtype=dtype, device="meta")
        target = torch.empty(4096, dtype=torch.int64, device="meta")
        lse = torch.empty(4096, dtype=lse_dtype(dtype), device="meta")
        call = LinearCrossEntropyCall(hidden, weight, target, weight[:, 0].contiguous(), -100, 0.1, "mean", "triton")
        dlogits = torch.empty(4096, 8192, dtype=dtype, device="meta")
        name = f"{dtype}".removeprefix("torch.")
        for tile in configuration_tiles(architecture, dtype, 2):
            statistics = empty_statistics(call, lse, 4, 4096)
            kernel, _, arguments, options = _shares_launch(tile, call, hidden, target, statistics, architecture)
            yield Configuration(f"cross entropy forward {name}", kernel, arguments, options)
        for tile in configuration_tiles(architecture, dtype, 1):
            sums = lse.new_empty(cdiv(4096, tile.rows), 8192)
            kernel, _, arguments, options = _gradients_launch(
                tile, call, hidden, target, lse, lse, slice(0, 8192), dlogits, sums, architecture
            )
            yield Configuration(f"cross entropy gradients {name}", kernel, arguments, options)
        kernel, _, arguments, options = join_launch(call, target, statistics, lse, lse)
        yield Configuration(f"cross entropy join {name}", kernel, arguments, options)
