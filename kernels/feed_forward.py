"""The feed-forward: its first product applies bias, activation, gate and dropout, its second the other bias, dropout
and residual.

A block of tokens at a time, so that the hidden activation in between stays under ``HIDDEN_BYTES``.  The backward
computes the hidden activation again: one kernel does two or three products tile by tile and writes what the products
of the gradients need.

Source: Vaswani et al., "Attention Is All You Need", 2017, equation 2; Shazeer, "GLU Variants Improve Transformer",
2020.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn.kernels.activation import activate, slope
from fastattn.kernels.dropout import dropout_argument, dropout_fwd
from fastattn.kernels.launch import Configuration, Launch, architecture, cdiv, launch, precision, start
from fastattn.kernels.product import (
    GROUP,
    Epilogue,
    ProductTile,
    add_bias,
    add_product,
    box,
    configuration_tiles,
    drop,
    fetch,
    place,
    product,
    product_tiles,
    store,
    strided,
)
from fastattn.kernels.replay import replayed
from fastattn.kernels.rows import matrix
from fastattn.kernels.sums import sum_rows
from fastattn.kernels.tile import accumulator
from fastattn.spec.attention import lse_dtype
from fastattn.spec.checks import empty_contiguous
from fastattn.spec.dropout import DropoutCall
from fastattn.spec.feed_forward import DIFFERENTIABLE, FeedForwardCall, empty_output

# Of hidden activations, or of one of their gradients, at a time: large enough to fill a GPU with work.
HIDDEN_BYTES = 1 << 26


@triton.jit
def _before(
    x, x_box, weight, weight_box, bias, weight_gate, gate_box, bias_gate, first_row, first_column, tokens, ff_dim,
    model_dim, PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Returns a tile of what is activated and of the gate, [ROWS, COLUMNS] each; without a gate both are the former."""
    dtype: tl.constexpr = accumulator(x.data.dtype.element_ty)
    before = tl.zeros([ROWS, COLUMNS], dtype)
    gate = tl.zeros([ROWS, COLUMNS], dtype)
    for begin in range(0, model_dim, DEPTH):
        left = fetch(x, x_box, False, first_row, begin, tokens, model_dim, ROWS, DEPTH)
        right = fetch(weight, weight_box, True, begin, first_column, model_dim, ff_dim, DEPTH, COLUMNS)
        before = tl.dot(left, right, before, input_precision=PRECISION, out_dtype=before.dtype)
        if weight_gate.data is not None:
            right = fetch(weight_gate, gate_box, True, begin, first_column, model_dim, ff_dim, DEPTH, COLUMNS)
            gate = tl.dot(left, right, gate, input_precision=PRECISION, out_dtype=gate.dtype)
    before = add_bias(before, bias, first_column, ff_dim, COLUMNS)
    return before, add_bias(gate, bias_gate, first_column, ff_dim, COLUMNS)


@triton.jit
def feed_forward_hidden(
    x,
    x_box,
    weight,
    weight_box,
    bias,
    weight_gate,
    gate_box,
    bias_gate,
    hidden,
    dropout,
    rescale: tl.float64,
    first_token,
    tokens,
    ff_dim,
    model_dim,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Writes a tile of ``dropout(activation(x @ weight + bias) * (x @ weight_gate + bias_gate))``.

    Grid: all tiles.

    Args:
        x: Matrix [tokens, model_dim].
        x_box: its descriptor, or None; ``weight_box`` and ``gate_box`` are of the transposes.
        weight: Matrix [model_dim, ff_dim]; likewise ``weight_gate``, or one without data.
        bias: [ff_dim], or None; likewise ``bias_gate``.
        hidden: Matrix [tokens, ff_dim].
        dropout: Dropout, whose rows are counted from ``first_token``.
        rescale: of what survives it.
    """
    first_row, first_column = place(tl.program_id(0), tokens, ff_dim, ROWS, COLUMNS, GROUP)
    before, gate = _before(
        x, x_box, weight, weight_box, bias, weight_gate, gate_box, bias_gate, first_row, first_column, tokens, ff_dim,
        model_dim, PRECISION, ROWS, COLUMNS, DEPTH,
    )  # fmt: skip
    result = activate(before, ACTIVATION)
    if weight_gate.data is not None:
        result *= gate
    result = drop(result, dropout, rescale, first_token + first_row, first_column, ROWS, COLUMNS)
    store(hidden, first_row, first_column, tokens, ff_dim, result, ROWS, COLUMNS)


@triton.jit
def _store_sums(sums, values, first_row, first_column, tokens, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Writes a tile's sums over its tokens to [tiles of tokens, columns]."""
    row = first_row + tl.arange(0, ROWS)
    column = first_column + tl.arange(0, COLUMNS)
    total = tl.sum(tl.where((row < tokens)[:, None], values, 0.0), axis=0)
    tl.store(sums + (first_row // ROWS).to(tl.int64) * columns + column, total, mask=column < columns)


@triton.jit
def feed_forward_gradients(
    x,
    x_box,
    weight,
    weight_box,
    bias,
    weight_gate,
    gate_box,
    bias_gate,
    dout,
    dout_box,
    weight_out,
    weight_out_box,
    hidden,
    dbefore,
    dgate,
    bias_sums,
    bias_gate_sums,
    dropout,
    rescale: tl.float64,
    first_token,
    tokens,
    ff_dim,
    model_dim,
    out_dim,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Writes a tile of the hidden activation, and of the gradients of what is activated and of the gate.

    Grid: all tiles.

    Args:
        dout: Matrix [tokens, out_dim].
        weight_out: Matrix [out_dim, ff_dim].
        hidden: Matrix [tokens, ff_dim]; likewise ``dbefore``, and ``dgate`` where there is a gate.
        bias_sums: [tiles of tokens, ff_dim], the sums of ``dbefore``, or None; likewise ``bias_gate_sums``.

    The others are those of :func:`feed_forward_hidden`.
    """
    first_row, first_column = place(tl.program_id(0), tokens, ff_dim, ROWS, COLUMNS, GROUP)
    before, gate = _before(
        x, x_box, weight, weight_box, bias, weight_gate, gate_box, bias_gate, first_row, first_column, tokens, ff_dim,
        model_dim, PRECISION, ROWS, COLUMNS, DEPTH,
    )  # fmt: skip
    grad = add_product(
        tl.zeros([ROWS, COLUMNS], before.dtype), dout, dout_box, weight_out, weight_out_box, first_row, first_column,
        tokens, ff_dim, 0, out_dim, False, False, PRECISION, ROWS, COLUMNS, DEPTH,
    )  # fmt: skip
    grad = drop(grad, dropout, rescale, first_token + first_row, first_column, ROWS, COLUMNS)
    result = activate(before, ACTIVATION)
    if weight_gate.data is not None:
        gate_grad = grad * result
        store(dgate, first_row, first_column, tokens, ff_dim, gate_grad, ROWS, COLUMNS)
        if bias_gate_sums is not None:
            _store_sums(bias_gate_sums, gate_grad, first_row, first_column, tokens, ff_dim, ROWS, COLUMNS)
        result *= gate
        grad *= gate
    grad *= slope(before, ACTIVATION)
    store(dbefore, first_row, first_column, tokens, ff_dim, grad, ROWS, COLUMNS)
    if bias_sums is not None:
        _store_sums(bias_sums, grad, first_row, first_column, tokens, ff_dim, ROWS, COLUMNS)
    result = drop(result, dropout, rescale, first_token + first_row, first_column, ROWS, COLUMNS)
    store(hidden, first_row, first_column, tokens, ff_dim, result, ROWS, COLUMNS)


@replayed
def feed_forward_fwd(call: FeedForwardCall) -> Tensor:
    """Returns the result of a canonical call."""
    out = empty_output(call)
    x, to = matrix(call.input, call.input.shape[-1]), out.view(call.num_tokens, -1)
    bias = None if call.bias_out is None else call.bias_out.contiguous()
    residual = None if call.residual is None else matrix(call.residual, to.shape[1])
    dropout = dropout_argument(call.output_dropout_state, call.output_dropout_p)
    for rows in token_blocks(call):
        hidden, added = _hidden(call, x[rows], rows.start), None if residual is None else residual[rows]
        epilogue = Epilogue(bias, residual=added, dropout=dropout, first_token=rows.start)
        product(hidden, call.weight_out.t(), to[rows], epilogue)
    return out


def feed_forward_bwd(call: FeedForwardCall, dout: Tensor, needed: Sequence[bool]) -> list[Tensor | None]:
    """Returns the gradients of ``DIFFERENTIABLE`` that are needed."""
    grads = {
        field: empty_contiguous(tensor) if need and tensor is not None else None
        for field, tensor, need in zip(DIFFERENTIABLE, (getattr(call, f) for f in DIFFERENTIABLE), needed, strict=True)
    }
    if call.output_dropout_state is not None:
        dout = dropout_fwd(DropoutCall(dout, call.output_dropout_state, call.output_dropout_p, call.backend))
    x, dout = matrix(call.input, call.input.shape[-1]), matrix(dout, dout.shape[-1])
    dx = None if grads["input"] is None else grads["input"].view(x.shape)
    blocks = list(token_blocks(call))
    sums = {name: _Sum(grads[name], len(blocks)) for name in DIFFERENTIABLE if name != "input"}
    for rows in blocks:
        hidden, dbefore, dgate, bias_sums, bias_gate_sums = _hidden_gradients(
            call, x[rows], dout[rows], rows.start, sums["bias_in"].wanted, sums["bias_gate"].wanted
        )
        sums["weight_out"].add_product(dout[rows].t(), hidden)
        sums["weight_in"].add_product(dbefore.t(), x[rows])
        sums["bias_in"].add_rows(bias_sums)
        sums["bias_out"].add_rows(dout[rows])
        more = None
        if dgate is not None and call.weight_gate is not None:
            sums["weight_gate"].add_product(dgate.t(), x[rows])
            sums["bias_gate"].add_rows(bias_gate_sums)
            more = dgate, call.weight_gate
        if dx is not None:
            product(dbefore, call.weight_in, dx[rows], Epilogue(more=more))
    for total in sums.values():
        total.finish()
    return [grads[field] for field in DIFFERENTIABLE]


def token_blocks(call: FeedForwardCall) -> Iterator[slice]:
    """Cuts the tokens so that a block's hidden activation has at most ``HIDDEN_BYTES``; in multiples of 128."""
    most = HIDDEN_BYTES // (call.ff_dim * call.input.element_size())
    step = max(most // 128 * 128, 128)
    return (slice(start, min(start + step, call.num_tokens)) for start in range(0, call.num_tokens, step))


class _Sum:
    """A gradient that is a sum over blocks of tokens: in the accumulator's dtype where there are several."""

    def __init__(self, grad: Tensor | None, blocks: int) -> None:
        self.grad, self.wanted = grad, grad is not None
        whole = blocks == 1 or grad is None or grad.dtype == lse_dtype(grad.dtype)
        self.total = grad if whole or grad is None else torch.empty_like(grad, dtype=lse_dtype(grad.dtype))
        self.begun = False

    def add_product(self, a: Tensor, b: Tensor) -> None:
        if self.total is not None:
            product(a, b, self.total, Epilogue(add=self.begun))
            self.begun = True

    def add_rows(self, rows: Tensor | None) -> None:
        if self.total is not None and rows is not None:
            found = sum_rows(rows, self.total.dtype)
            self.total.copy_(self.total + found if self.begun else found)
            self.begun = True

    def finish(self) -> None:
        if self.grad is not None and self.total is not None and self.total is not self.grad:
            self.grad.copy_(self.total)


def _hidden(call: FeedForwardCall, x: Tensor, first_token: int) -> Tensor:
    """Returns the hidden activation of a block of tokens."""
    hidden = x.new_empty(len(x), call.ff_dim)
    tiles = product_tiles(x.device, x.dtype, len(x), 2)
    launch("feed_forward", tiles, lambda tile: start(_hidden_launch(tile, call, x, first_token, hidden)))
    return hidden


def _hidden_gradients(
    call: FeedForwardCall, x: Tensor, dout: Tensor, first_token: int, *wanted: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Returns the hidden activation of a block of tokens, the gradients of what is activated and of the gate, and sums
    of these two over tiles of tokens where they are wanted."""
    hidden, dbefore = x.new_empty(len(x), call.ff_dim), x.new_empty(len(x), call.ff_dim)
    dgate = None if call.weight_gate is None else x.new_empty(len(x), call.ff_dim)
    sums: list[Tensor | None] = []

    def begin(tile: ProductTile) -> None:
        shape = cdiv(len(x), tile.rows), call.ff_dim
        sums[:] = [x.new_empty(shape, dtype=lse_dtype(x.dtype)) if want else None for want in wanted]
        start(_gradients_launch(tile, call, x, dout, first_token, hidden, dbefore, dgate, sums[0], sums[1]))

    launch("feed_forward_backward", product_tiles(x.device, x.dtype, len(x), 3), begin)
    return hidden, dbefore, dgate, sums[0], sums[1]


def _hidden_launch(
    tile: ProductTile, call: FeedForwardCall, x: Tensor, first_token: int, hidden: Tensor, known: int | None = None
) -> Launch:
    dropout = dropout_argument(call.dropout_state, call.dropout_p)
    arguments = (
        *_inputs(tile, call, x, known), strided(hidden), dropout, dropout.rescale, first_token, len(x), call.ff_dim,
        x.shape[1],
    )  # fmt: skip
    return feed_forward_hidden, _grid(len(x), call.ff_dim, tile), arguments, _options(call, tile)


def _gradients_launch(
    tile: ProductTile,
    call: FeedForwardCall,
    x: Tensor,
    dout: Tensor,
    first_token: int,
    hidden: Tensor,
    dbefore: Tensor,
    dgate: Tensor | None,
    bias_sums: Tensor | None,
    bias_gate_sums: Tensor | None,
    known: int | None = None,
) -> Launch:
    chip = architecture(x.device) if known is None else known
    dout_box = box(dout, tile.rows, tile.depth, tile, chip)
    weight_out_box = box(call.weight_out, tile.depth, tile.columns, tile, chip)
    dropout = dropout_argument(call.dropout_state, call.dropout_p)
    arguments = (
        *_inputs(tile, call, x, known), strided(dout), dout_box, strided(call.weight_out), weight_out_box,
        strided(hidden), strided(dbefore), strided(dgate), bias_sums, bias_gate_sums, dropout, dropout.rescale,
        first_token, len(x), call.ff_dim, x.shape[1], dout.shape[1],
    )  # fmt: skip
    return feed_forward_gradients, _grid(len(x), call.ff_dim, tile), arguments, _options(call, tile)


def _inputs(tile: ProductTile, call: FeedForwardCall, x: Tensor, known: int | None) -> tuple[Any, ...]:
    chip = architecture(x.device) if known is None else known
    gate = None if call.weight_gate is None else call.weight_gate.t()
    bias, bias_gate = (None if b is None else b.contiguous() for b in (call.bias_in, call.bias_gate))
    x_box = box(x, tile.rows, tile.depth, tile, chip)
    weight_box, gate_box = (box(w, tile.columns, tile.depth, tile, chip) for w in (call.weight_in, call.weight_gate))
    return strided(x), x_box, strided(call.weight_in.t()), weight_box, bias, strided(gate), gate_box, bias_gate


def _grid(rows: int, columns: int, tile: ProductTile) -> tuple[int]:
    return (cdiv(rows, tile.rows) * cdiv(columns, tile.columns),)


def _options(call: FeedForwardCall, tile: ProductTile) -> dict[str, Any]:
    return {"ACTIVATION": call.activation, "PRECISION": precision(), "GROUP": GROUP, **tile.options}


def configurations(architecture: int) -> Iterator[Configuration]:
    """Yields the kernels with every tile of the table: "gelu" with dropout, and "silu" gated."""
    for dtype, gated in itertools.product((torch.bfloat16, torch.float32, torch.float64), (False, True)):
        x = torch.empty(4096, 1024, dtype=dtype, device="meta")
        hidden = torch.empty(4096, 4096, dtype=dtype, device="meta")
        weight, bias = hidden[:, :1024].contiguous(), hidden[0]
        state = None if gated else torch.empty(2, dtype=torch.int64, device="meta")
        gate, gate_bias = (weight, bias) if gated else (None, None)
        activation, dropout_p = ("silu", 0.0) if gated else ("gelu", 0.1)
        call = FeedForwardCall(
            x,
            weight,
            bias,
            gate,
            gate_bias,
            weight.t(),
            None,
            x,
            state,
            state,
            activation,
            dropout_p,
            dropout_p,
            "triton",
        )
        name = f"{dtype} {call.activation}".replace("torch.", "") + (" gated" if gated else " dropout")
        for tile in configuration_tiles(architecture, dtype, 2):
            kernel, _, arguments, options = _hidden_launch(tile, call, x, 0, hidden, architecture)
            yield Configuration(f"feed-forward hidden {name}", kernel, arguments, options)
        for tile in configuration_tiles(architecture, dtype, 3):
            sums = x.new_empty(cdiv(4096, tile.rows), 4096, dtype=lse_dtype(dtype))
            kernel, _, arguments, options = _gradients_launch(
                tile,
                call,
                x,
                x,
                0,
                hidden,
                hidden,
                hidden if gated else None,
                sums,
                sums if gated else None,
                architecture,
            )
            yield Configuration(f"feed-forward gradients {name}", kernel, arguments, options)
