"""The call of ``attention_weights``, and the selections of rows and heads of any attention call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastattn import masks
from fastattn.masks import CanonicalMask
from fastattn.spec.attention import AttentionCall

REDUCTIONS = ("none", "head_mean", "key_sum", "entropy", "top_k", "pooled")
Selection = slice | Sequence[int] | Tensor | None


class WeightsCall(NamedTuple):
    """The arguments of ``fastattn::attention_weights``, in order, but that ``attention`` stands for its fields.

    ``attention.value`` and ``attention.sinks`` play no part: ``lse`` [batch, num_heads_q, seq_len_q] is the softmax's
    denominator.
    """

    attention: AttentionCall
    lse: Tensor
    reduce: str
    top_k: int
    pool_size: int


class WeightsBlock(NamedTuple):
    """Some queries of some heads and batch entries of a call.

    The sum of ``share`` times the block's result, at ``where`` in the whole, over all blocks is the call's result.
    """

    call: WeightsCall
    where: tuple[slice, ...]
    share: float


# The fields that gradients flow to, in the order in which attention_weights_backward returns them; lse follows.
DIFFERENTIABLE = ("query", "key", "bias", "relative_bias")


def weights_call(call: AttentionCall, lse: Tensor, reduce: str, top_k: int | None, pool_size: int) -> WeightsCall:
    """Validates what the user passed to ``attention_weights`` beyond an attention call.

    Raises:
        ValueError: ``reduce`` is unknown, or ``top_k`` or ``pool_size`` does not fit.
    """
    if reduce not in REDUCTIONS:
        raise ValueError(f"reduce must be one of {', '.join(map(repr, REDUCTIONS))}, got {reduce!r}")
    seq_len_k = call.shape.seq_len_k
    if (top_k is not None) != (reduce == "top_k"):
        raise ValueError(f"top_k goes with reduce='top_k' and only with it, got top_k={top_k} and reduce={reduce!r}")
    if top_k is not None and not 1 <= top_k <= seq_len_k:
        raise ValueError(f"top_k must be in [1, seq_len_k = {seq_len_k}], got {top_k}")
    if pool_size < 1:
        raise ValueError(f"pool_size must be >= 1, got {pool_size}")
    return WeightsCall(call, lse, reduce, top_k or 0, pool_size)


def result_shape(call: WeightsCall) -> tuple[int, ...]:
    """Returns the shape of the (first) result."""
    batch, heads, rows, columns = call.attention.shape
    size = call.pool_size
    return {
        "none": (batch, heads, rows, columns),
        "head_mean": (batch, rows, columns),
        "key_sum": (batch, heads, columns),
        "entropy": (batch, heads, rows),
        "top_k": (batch, heads, rows, call.top_k),
        "pooled": (batch, heads, -(-rows // size), -(-columns // size)),
    }[call.reduce]


def empty_result(call: WeightsCall) -> tuple[Tensor, Tensor]:
    """Returns uninitialised ``(result, indices)`` of a call, contiguous; ``indices`` is empty but for "top_k"."""
    shape = result_shape(call)
    indices = shape if call.reduce == "top_k" else (0,)
    return call.attention.query.new_empty(shape), call.lse.new_empty(indices, dtype=torch.int64)


def blocks(call: WeightsCall, elements: int, most_rows: int | None = None) -> Iterator[WeightsBlock]:
    """Yields the blocks of a call that is not empty; their tensors are views.

    Args:
        call: the call.
        elements: about how many weights a block may have.
        most_rows: how many queries it may have.
    """
    attention = call.attention
    batch, _, rows, columns = attention.shape
    if attention.dropout_state is not None:
        # Dropout counts by position, so that a block would draw other numbers.
        yield WeightsBlock(call, (), 1.0)
        return
    heads, group = attention.key.shape[1], attention.group_size
    # As many rows as possible before other heads: the keys are read again for each block of rows.
    num_rows = _clamp(elements // (group * columns), min(rows, most_rows or rows))
    num_heads = heads if call.reduce == "head_mean" else _clamp(elements // (group * num_rows * columns), heads)
    num_rows = _clamp(elements // (num_heads * group * columns), num_rows)
    num_batch = _clamp(elements // (num_heads * group * num_rows * columns), batch)
    # A block is whole cells, or a part of one row of cells.
    cell = min(call.pool_size, rows) if call.reduce == "pooled" else 1
    num_rows = max(num_rows // cell * cell, min(num_rows, cell))
    for b in _slices(batch, num_batch):
        for h in _slices(heads, num_heads):
            heads_q = slice(h.start * group, h.stop * group)
            part = _batch_and_heads(attention, b, h, heads_q)
            for band in _slices(rows, max(cell, num_rows)):
                for r in _slices(band.stop - band.start, num_rows):
                    start, stop = band.start + r.start, band.start + r.stop
                    yield WeightsBlock(
                        call._replace(attention=row_block(part, start, stop), lse=call.lse[b, heads_q, start:stop]),
                        _result_rows(call.reduce, b, heads_q, slice(start // cell, -(-stop // cell))),
                        (stop - start) / (band.stop - band.start) if num_rows < cell else 1.0,
                    )


def _result_rows(reduce: str, batch: slice, heads: slice, rows: slice) -> tuple[slice, ...]:
    if reduce == "key_sum":
        return batch, heads
    return (batch, rows) if reduce == "head_mean" else (batch, heads, rows)


def _clamp(count: int, most: int) -> int:
    return max(1, min(count, most))


def _slices(length: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


def _batch_and_heads(call: AttentionCall, batch: slice, heads_kv: slice, heads_q: slice) -> AttentionCall:
    def broadcast(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        return tensor[batch if tensor.shape[0] > 1 else slice(None), heads_q if tensor.shape[1] > 1 else slice(None)]

    relative = call.relative_bias
    return call._replace(
        query=call.query[batch, heads_q],
        key=call.key[batch, heads_kv],
        value=call.value[batch, heads_kv],
        bias=broadcast(call.bias),
        relative_bias=relative if relative is None or relative.shape[0] == 1 else relative[heads_q],
        sinks=None if call.sinks is None else call.sinks[heads_q],
        dense_mask=broadcast(call.dense_mask),
        key_lengths=None if call.key_lengths is None else call.key_lengths[batch],
        segments_q=None if call.segments_q is None else call.segments_q[batch],
        segments_k=None if call.segments_k is None else call.segments_k[batch],
    )


def row_block(call: AttentionCall, start: int, stop: int) -> AttentionCall:
    """Returns the call of the queries ``start:stop`` alone; every tensor is a view."""
    _, _, seq_len_q, seq_len_k = call.shape

    def rows(tensor: Tensor | None) -> Tensor | None:
        return tensor if tensor is None or tensor.shape[2] == 1 else tensor[:, :, start:stop]

    relative, segments = call.relative_bias, call.segments_q
    return call._replace(
        query=call.query[:, :, start:stop],
        bias=rows(call.bias),
        dense_mask=rows(call.dense_mask),
        # Entry j - i + seq_len_q - 1 belongs to (i, j), and row i is now row i - start of stop - start.
        relative_bias=None if relative is None else relative[:, seq_len_q - stop : seq_len_q - start + seq_len_k - 1],
        segments_q=None if segments is None else segments[:, start:stop],
        diag_lo=call.diag_lo + start,
        diag_hi=call.diag_hi + start,
    )


def select_rows(call: AttentionCall, rows: Selection) -> AttentionCall:
    """Returns the call of some queries alone, in the order given.

    Raises:
        ValueError: a row is out of range.
    """
    if rows is None:
        return call
    _, _, seq_len_q, seq_len_k = call.shape
    index = _indices("rows", rows, seq_len_q)
    if index == list(range(index[0], index[-1] + 1)):
        block = row_block(call, index[0], index[-1] + 1)
        # Kernels read these two without strides.
        return block._replace(
            relative_bias=None if block.relative_bias is None else block.relative_bias.contiguous(),
            segments_q=None if block.segments_q is None else block.segments_q.contiguous(),
        )
    # Scattered rows no longer lie along a diagonal: what depended on j - i is written out for them.
    device = call.query.device
    at = torch.tensor(index, device=device)
    mask = CanonicalMask(call.diag_lo, call.diag_hi)
    dense = _take(call.dense_mask, at)
    if mask != CanonicalMask():
        diagonal = torch.arange(seq_len_k, device=device) - at[:, None]
        band = ((diagonal >= mask.diag_lo) & (diagonal <= mask.diag_hi))[None, None]
        dense = band if dense is None else dense & band
    bias = _take(call.bias, at)
    if call.relative_bias is not None:
        diagonal = torch.arange(seq_len_k, device=device) - at[:, None] + seq_len_q - 1
        relative = call.relative_bias[:, diagonal][None]
        bias = relative if bias is None else bias + relative
    return call._replace(
        query=call.query.index_select(2, at),
        bias=bias,
        relative_bias=None,
        dense_mask=dense,
        segments_q=None if call.segments_q is None else call.segments_q.index_select(1, at),
        diag_lo=masks.OPEN_LO,
        diag_hi=masks.OPEN_HI,
    )


def select_heads(call: AttentionCall, heads: Selection) -> AttentionCall:
    """Returns the call of some query heads alone, in the order given, each with a key head of its own.

    Raises:
        ValueError: a head is out of range.
    """
    if heads is None:
        return call
    index = _indices("heads", heads, call.query.shape[1])
    device = call.query.device
    at = torch.tensor(index, device=device)
    at_kv = torch.tensor([h // call.group_size for h in index], device=device)

    def pick(tensor: Tensor | None, dim: int) -> Tensor | None:
        return tensor if tensor is None or tensor.shape[dim] == 1 else tensor.index_select(dim, at)

    return call._replace(
        query=call.query.index_select(1, at),
        key=call.key.index_select(1, at_kv),
        value=call.value.index_select(1, at_kv),
        bias=pick(call.bias, 1),
        relative_bias=pick(call.relative_bias, 0),
        dense_mask=pick(call.dense_mask, 1),
    )


def _take(tensor: Tensor | None, at: Tensor) -> Tensor | None:
    return tensor if tensor is None or tensor.shape[2] == 1 else tensor.index_select(2, at)


def _indices(name: str, selection: slice | Sequence[int] | Tensor, size: int) -> list[int]:
    if isinstance(selection, slice):
        index = list(range(size))[selection]
    else:
        given = selection.tolist() if isinstance(selection, Tensor) else selection
        index = [int(i) for i in given]
    for i in index:
        if not -size <= i < size:
            raise ValueError(f"{name} must be in [{-size}, {size}), got {i}")
    if not index:
        raise ValueError(f"{name} selects nothing of {size}: got {selection}")
    return [i % size for i in index]
