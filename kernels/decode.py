"""Attention of a few queries: keys are split among programs, and query heads that share them packed into one block.

The queries of a group of heads are the rows of one tile, so that each key and value is read once. Each program writes
what its share of the keys adds up to, and a second kernel adds up the shares of a query, in their order.

Source: Dao, Haziza, Massa and Sizov, "Flash-Decoding for long-context inference", 2023.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn.kernels import masking, tiles
from fastattn.kernels.arguments import Dropout, problem, view
from fastattn.kernels.launch import Configuration, Tile, architecture, cdiv, launch, padded, precision
from fastattn.kernels.running import finish, folds, over_keys
from fastattn.kernels.tile import LN_2
from fastattn.spec.attention import AttentionCall, empty_output, lse_dtype

# Rows of queries, packed, up to which reading the keys takes longer than multiplying them.
MOST_ROWS = 64
# Shares of one row that the second kernel holds at once.
MOST_SPLITS = 64
# Keys that are worth a program of their own.
LEAST_KEYS = 128


@triton.jit
def _decode_kernel(
    query,
    key,
    value,
    out,
    top,
    total,
    problem,
    head_dim,
    head_dim_v,
    splits,
    keys_a_split,
    PRECISION: tl.constexpr,
    FOLDED: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_V: tl.constexpr,
):
    """Writes what a share of the keys gives for all queries of a group of heads.

    Grid: splits times batch * num_heads_kv.

    Args:
        query: View of [batch, num_heads_q, seq_len_q, head_dim]; ``key`` and ``value`` of
            [batch, num_heads_kv, seq_len_k, ...].
        out: [batch, num_heads_q, seq_len_q, splits, head_dim_v], contiguous, in the dtype of accumulators: sums before
            their division; ``top`` and ``total`` without the last dimension: maximum and sum of the softmax.
        problem: Problem.
        keys_a_split: keys of a share, a multiple of KEYS.
        ROWS: power of two that holds group_size * seq_len_q.
    """
    split, plane = tl.program_id(0) % splits, tl.program_id(0) // splits
    num_heads_kv = problem.num_heads_q // problem.group_size
    batch, head_kv = plane // num_heads_kv, plane % num_heads_kv
    packed, columns = tl.arange(0, ROWS), tl.arange(0, DIM)
    inside = packed < problem.group_size * problem.seq_len_q
    heads = head_kv * problem.group_size + tl.where(inside, packed // problem.seq_len_q, 0)
    rows = tl.where(inside, packed % problem.seq_len_q, problem.seq_len_q)
    start = query.data + batch.to(tl.int64) * query.batch
    start += heads.to(tl.int64)[:, None] * query.head + rows.to(tl.int64)[:, None] * query.row
    q = tl.load(start + columns[None, :], mask=inside[:, None] & (columns < head_dim)[None, :], other=0.0)

    limit = masking.key_end(problem.mask, batch, problem.seq_len_k)
    parts = masking.key_parts(problem.mask, 0, problem.seq_len_q, limit, KEYS)
    first, last = split * keys_a_split, (split + 1) * keys_a_split
    begin, end = tl.maximum(parts[0], first), tl.minimum(parts[3], last)
    free_begin = tl.maximum(parts[1], begin)
    free_end = tl.maximum(tl.minimum(parts[2], last), free_begin)
    result, most, sum_of_all = over_keys(
        q, key, value, None, None, problem, batch, head_kv, heads[:, None], rows[:, None],
        (begin, free_begin, free_end, end), limit, head_dim, head_dim_v, PRECISION, FOLDED, ROWS, KEYS, DIM, DIM_V,
    )  # fmt: skip
    to = ((batch * problem.num_heads_q + heads).to(tl.int64) * problem.seq_len_q + rows) * splits + split
    dims = tl.arange(0, DIM_V)
    there = inside[:, None] & (dims < head_dim_v)[None, :]
    tl.store(out + to[:, None] * head_dim_v + dims[None, :], result, mask=there)
    tl.store(top + to, most, mask=inside)
    tl.store(total + to, sum_of_all, mask=inside)


@triton.jit
def _add_splits_kernel(
    split_out,
    split_top,
    split_total,
    out,
    lse,
    sinks,
    dropout,
    seq_len_q,
    num_heads_q,
    head_dim_v,
    splits,
    SPLITS: tl.constexpr,
    DIM_V: tl.constexpr,
):
    """Writes out and lse of a query, from its shares.

    Grid: batch * num_heads_q * seq_len_q.

    Args:
        split_out: what :func:`_decode_kernel` wrote; likewise ``split_top`` and ``split_total``.
        out: View of [batch, num_heads_q, seq_len_q, head_dim_v].
        lse: float64 [batch, num_heads_q, seq_len_q].
        sinks: [num_heads_q], or None.
        dropout: Dropout.
        SPLITS: power of two that holds splits.
    """
    at = tl.program_id(0).to(tl.int64)
    row, head, batch = at % seq_len_q, at // seq_len_q % num_heads_q, at // seq_len_q // num_heads_q
    shares, dims = tl.arange(0, SPLITS), tl.arange(0, DIM_V)
    here = shares < splits
    tops = tl.load(split_top + at * splits + shares, mask=here, other=float("-inf"))
    totals = tl.load(split_total + at * splits + shares, mask=here, other=0.0)
    there = here[:, None] & (dims < head_dim_v)[None, :]
    outs = tl.load(split_out + (at * splits + shares)[:, None] * head_dim_v + dims[None, :], mask=there, other=0.0)
    top = tl.max(tops, axis=0)
    weights = tl.exp2(tops - tl.where(top == float("-inf"), 0.0, top))
    one = tl.zeros([1], tops.dtype)
    state = (tl.sum(outs * weights[:, None], axis=0)[None, :], one + top, one + tl.sum(totals * weights, axis=0))
    result, log_total = finish(state, sinks, head, dropout)
    to = out.data + batch * out.batch + head * out.head + row * out.row + dims
    tl.store(to[None, :], result.to(out.data.dtype.element_ty), mask=(dims < head_dim_v)[None, :])
    tl.store(lse + at + tl.arange(0, 1), log_total * LN_2)


def num_splits(call: AttentionCall) -> int:
    """Returns among how many programs to share out the keys of a head; 0 where a block of queries fills a program."""
    batch, _, seq_len_q, seq_len_k = call.shape
    rows = call.group_size * seq_len_q
    if rows > MOST_ROWS or seq_len_q > 16 or seq_len_k < 2 * LEAST_KEYS:
        return 0
    device = call.query.device
    programs = 2 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 16
    return max(1, min(programs // (batch * call.key.shape[1]), seq_len_k // LEAST_KEYS, MOST_SPLITS))


def _sizes(call: AttentionCall, tile: Tile, splits: int) -> tuple[int, int]:
    """Returns the number of splits without empty ones, and how many keys each has."""
    keys = cdiv(cdiv(call.shape.seq_len_k, splits), tile.columns) * tile.columns
    return cdiv(call.shape.seq_len_k, keys), keys


def _launches(
    call: AttentionCall, out: Tensor, lse: Tensor, splits: int, tile: Tile
) -> list[tuple[Any, int, tuple[Any, ...], dict[str, Any]]]:
    """Returns ``(kernel, grid, arguments, options)`` of both kernels."""
    batch, num_heads_q, seq_len_q, _ = call.shape
    head_dim, head_dim_v = call.query.shape[3], call.value.shape[3]
    splits, keys = _sizes(call, tile, splits)
    wide = lse_dtype(call.query.dtype)
    share_out = lse.new_empty((batch, num_heads_q, seq_len_q, splits, head_dim_v), dtype=wide)
    top, total = (lse.new_empty(share_out.shape[:-1], dtype=wide) for _ in range(2))
    given = problem(call)
    inputs = (view(call.query), view(call.key), view(call.value))
    dims = {"DIM": padded(head_dim), "DIM_V": padded(head_dim_v)}
    sizes = {"ROWS": padded(call.group_size * seq_len_q), "KEYS": tile.columns}
    shares = (share_out, top, total)
    dropout: Dropout = given.dropout
    return [
        (
            *(_decode_kernel, splits * batch * call.key.shape[1]),
            (*inputs, *shares, given, head_dim, head_dim_v, splits, keys),
            {"PRECISION": precision(), "FOLDED": folds(call), **sizes, **dims, **tile.options},
        ),
        (
            *(_add_splits_kernel, batch * num_heads_q * seq_len_q),
            (*shares, view(out), lse, call.sinks, dropout, seq_len_q, num_heads_q, head_dim_v, splits),
            {"SPLITS": 1 << (splits - 1).bit_length(), "DIM_V": dims["DIM_V"], "num_warps": 4},
        ),
    ]


def decode_fwd(call: AttentionCall, out: Tensor, lse: Tensor, splits: int) -> None:
    """Writes out and lse of a call of a few queries, its keys shared out among ``splits`` programs or fewer."""

    def start(tile: Tile) -> None:
        for kernel, programs, arguments, options in _launches(call, out, lse, splits, tile):
            kernel[(programs,)](*arguments, **options)

    launch("attention, a few queries", tiles.choose(tiles.DECODE, call, architecture(call.query.device)), start)


def configurations(architecture: int) -> Iterator[Configuration]:
    """Yields both kernels with every tile of their table for an architecture."""
    for name, call, tile in tiles.calls(tiles.DECODE, architecture):
        few = call._replace(query=call.query[:, :, :1])
        few = few._replace(bias=None if call.bias is None else call.bias[:, :, :1])
        out, lse = empty_output(few)
        for kernel, _, arguments, options in _launches(few, out, lse, 8, tile):
            yield Configuration(f"{kernel.__name__.strip('_')} {name}", kernel, arguments, options)
