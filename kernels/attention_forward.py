"""Attention forward: a block of queries against tiles of keys with a running softmax.

Source: Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018; Dao, "FlashAttention-2", 2023.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fastattn.kernels import decode, masking, packing, tiles
from fastattn.kernels.arguments import problem, view
from fastattn.kernels.boxes import box
from fastattn.kernels.launch import Configuration, Tile, architecture, cdiv, launch, padded, precision, start
from fastattn.kernels.replay import replayed
from fastattn.kernels.running import finish, folds, over_keys
from fastattn.kernels.tile import LN_2, block_and_plane, load_rows, store_rows
from fastattn.spec.attention import AttentionCall, empty_output


@triton.jit
def _attention_fwd_kernel(
    query,
    key,
    value,
    out,
    lse,
    sinks,
    problem,
    query_box,
    key_box,
    value_box,
    out_box,
    head_dim,
    head_dim_v,
    PRECISION: tl.constexpr,
    FOLDED: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_V: tl.constexpr,
):
    """Writes out and lse of a block of queries of one head.

    Grid: blocks of queries times batch * num_heads_q, as ``tile.block_and_plane`` takes it apart.

    Args:
        query: View of [batch, num_heads_q, seq_len_q, head_dim]; likewise ``key``, ``value`` and ``out``.
        lse: float64 [batch, num_heads_q, seq_len_q].
        sinks: [num_heads_q], or None.
        problem: Problem.
        query_box: descriptor of ``query`` (``boxes.box``), or None; likewise the others.
        PRECISION: how float32 is multiplied.
        FOLDED: what ``running.folds`` returned.
        ROWS: queries a block.
        KEYS: keys a tile.
        DIM: power of two that holds head_dim; DIM_V likewise.
    """
    block, plane = block_and_plane(problem.seq_len_q, ROWS)
    head = plane % problem.num_heads_q
    batch = plane // problem.num_heads_q
    problem, batch = packing.own(problem, batch, packing.numbers(problem, batch))
    row_begin = block * ROWS
    if packing.past_end(problem, row_begin):
        return
    query = packing.at(problem, query, packing.queries(problem, query))
    key = packing.at(problem, key, packing.keys(problem, key))
    value = packing.at(problem, value, packing.keys(problem, value))
    out = packing.at(problem, out, packing.queries(problem, out))
    row_end = tl.minimum(row_begin + ROWS, problem.seq_len_q)
    q = load_rows(query, batch, head, row_begin, problem.seq_len_q, head_dim, ROWS, DIM, True, query_box)
    limit = masking.key_end(problem.mask, batch, problem.seq_len_k)
    rows = row_begin + tl.arange(0, ROWS)
    state = over_keys(
        q, key, value, key_box, value_box, None, problem, batch, head // problem.group_size, head, rows[:, None],
        masking.key_parts(problem.mask, row_begin, row_end, limit, KEYS), limit, head_dim, head_dim_v, PRECISION,
        FOLDED, 0, ROWS, KEYS, DIM, DIM_V,
    )  # fmt: skip
    result, log_total = finish(state, sinks, head, problem.dropout, q.dtype)
    store_rows(out, batch, head, row_begin, problem.seq_len_q, head_dim_v, result, ROWS, DIM_V, out_box)
    to = lse + packing.first_row(problem, batch, head) + rows
    tl.store(to, log_total * LN_2, mask=rows < problem.seq_len_q)


def _arguments(call: AttentionCall, out: Tensor, lse: Tensor, tile: Tile, architecture: int) -> tuple[Any, ...]:
    # A box would reach from one packed sequence into the next.
    boxes = tile.boxes and call.starts_q is None
    boxed = ((call.query, tile.rows), (call.key, tile.columns), (call.value, tile.columns), (out, tile.rows))
    return (
        view(call.query),
        view(call.key),
        view(call.value),
        view(out),
        lse,
        call.sinks,
        problem(call),
        *(box(tensor, rows, architecture) if boxes else None for tensor, rows in boxed),
        call.query.shape[3],
        call.value.shape[3],
    )


def _options(call: AttentionCall, tile: Tile) -> dict[str, Any]:
    dims = {"DIM": padded(call.query.shape[3]), "DIM_V": padded(call.value.shape[3])}
    sizes = {"ROWS": tile.rows, "KEYS": tile.columns, **dims}
    return {"PRECISION": precision(), "FOLDED": folds(call), **sizes, **tile.options}


def _table(call: AttentionCall) -> tiles.Table:
    lean = folds(call) and call.dropout_state is None and call.starts_q is None
    return tiles.FORWARD if lean else tiles.FORWARD_RICH


@replayed
def attention_fwd(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Returns ``(out, lse)`` of a call that is not empty."""
    out, lse = empty_output(call)
    splits = decode.num_splits(call)
    if splits:
        decode.decode_fwd(call, out, lse, splits)
        return out, lse
    batch, num_heads_q, seq_len_q, _ = call.shape
    known = architecture(call.query.device)

    def begin(tile: Tile) -> None:
        grid = (cdiv(seq_len_q, tile.rows) * batch * num_heads_q,)
        start((_attention_fwd_kernel, grid, _arguments(call, out, lse, tile, known), _options(call, tile)))

    launch("attention", tiles.choose(_table(call), call, known), begin)
    return out, lse


def configurations(architecture: int) -> Iterator[Configuration]:
    """Yields the kernel with every tile of its table for an architecture."""
    for table in (tiles.FORWARD, tiles.FORWARD_RICH):
        both = (tiles.calls(table, architecture, packed) for packed in (False, True))
        for name, call, tile in itertools.chain(*both):
            # The causal loops of wide types are those of "everything".
            if _table(call) is not table or ("causal" in name and call.query.element_size() > 2):
                continue
            out, lse = empty_output(call)
            yield Configuration(
                f"attention forward {name}",
                _attention_fwd_kernel,
                _arguments(call, out, lse, tile, architecture),
                _options(call, tile),
            )
