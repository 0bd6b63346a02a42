"""Attention forward: a block of queries against tiles of keys with a running softmax.

Source: Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018; Dao, "FlashAttention-2", 2023.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn.kernels import decode, hopper, masking, packing, tiles
from fastattn.kernels.arguments import problem, view
from fastattn.kernels.boxes import box
from fastattn.kernels.launch import (
    Configuration,
    Tile,
    architecture,
    cdiv,
    launch,
    multiprocessors,
    padded,
    precision,
    start,
)
from fastattn.kernels.replay import replayed
from fastattn.kernels.running import FEW, finish, folds, is_poisoned, over_seen_keys, over_tiles
from fastattn.kernels.tile import LN_2, block_and_plane, load_rows, store_rows
from fastattn.spec.attention import AttentionCall, empty_output


@triton.jit
def _turn(number, length, planes, together, SIZE: tl.constexpr):
    """Returns ``(block, plane)``: what comes at place ``number`` of all blocks of ``length`` rows of all planes.

    The last rows come first, because under a causal mask they see most; ``together`` planes take turns, and share the
    cache.
    """
    blocks = tl.cdiv(length, SIZE)
    group = number // (blocks * together)
    size = tl.minimum(planes - group * together, together)
    within = number % (blocks * together)
    return blocks - 1 - within // size, group * together + within % size


@triton.jit
def _attend(
    block, head, batch, query, key, value, out, lse, sinks, problem, query_box, key_box, value_box, out_box, head_dim,
    head_dim_v, PRECISION: tl.constexpr, FOLDED: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    DIM: tl.constexpr, DIM_V: tl.constexpr,
):  # fmt: skip
    """Writes out and lse of a block of queries of a head; other arguments: :func:`_attention_fwd_kernel`'s, but that
    ``problem`` is that of one sequence."""
    query = packing.at(problem, query, packing.queries(problem, query))
    key = packing.at(problem, key, packing.keys(problem, key))
    value = packing.at(problem, value, packing.keys(problem, value))
    out = packing.at(problem, out, packing.queries(problem, out))
    row_begin = block * ROWS
    row_end = tl.minimum(row_begin + ROWS, problem.seq_len_q)
    head_kv = head // problem.group_size
    q = load_rows(query, batch, head, row_begin, problem.seq_len_q, head_dim, ROWS, DIM, True, query_box)
    limit = masking.key_end(problem.mask, batch, problem.seq_len_k)
    rows = row_begin + tl.arange(0, ROWS)
    state = over_tiles(
        q, key, value, key_box, value_box, None, problem, batch, head_kv, head, rows[:, None],
        masking.key_parts(problem.mask, row_begin, row_end, limit, KEYS), limit, head_dim, head_dim_v, PRECISION,
        FOLDED, 0, ROWS, KEYS, DIM, DIM_V,
    )  # fmt: skip
    result, log_total = finish(state, sinks, head, problem.dropout, q.dtype)
    to = lse + packing.first_row(problem, batch, head) + rows
    tl.store(to, log_total * LN_2, mask=rows < problem.seq_len_q)
    if is_poisoned(problem, result):
        # A few rows at a time, and with nothing else held, because these registers are the whole kernel's.
        for within in tl.range(0, row_end - row_begin, FEW, num_stages=1):
            begin = row_begin + within
            few = begin + tl.arange(0, FEW)
            q_few = load_rows(query, batch, head, begin, problem.seq_len_q, head_dim, FEW, DIM)
            first, _, _, end = masking.key_parts(problem.mask, begin, tl.minimum(begin + FEW, row_end), limit, FEW)
            state_few = over_seen_keys(
                q_few, key, value, None, problem, batch, head_kv, head, few[:, None], first, end, limit, head_dim,
                head_dim_v, PRECISION, FOLDED, 0, FEW, DIM, DIM_V,
            )  # fmt: skip
            repaired, _ = finish(state_few, sinks, head, problem.dropout, q.dtype)
            store_rows(out, batch, head, begin, problem.seq_len_q, head_dim_v, repaired, FEW, DIM_V)
    else:
        store_rows(out, batch, head, row_begin, problem.seq_len_q, head_dim_v, result, ROWS, DIM_V, out_box)


@triton.jit
def _attention_block(
    block, plane, query, key, value, out, lse, sinks, problem, query_box, key_box, value_box, out_box, head_dim,
    head_dim_v, PRECISION: tl.constexpr, FOLDED: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    DIM: tl.constexpr, DIM_V: tl.constexpr,
):  # fmt: skip
    """Does what :func:`_attend` does for a block of a plane, if it is there: of packed sequences the longest has it."""
    head = plane % problem.num_heads_q
    batch = plane // problem.num_heads_q
    problem, batch = packing.own(problem, batch, packing.numbers(problem, batch))
    if not packing.past_end(problem, block * ROWS):
        _attend(
            block, head, batch, query, key, value, out, lse, sinks, problem, query_box, key_box, value_box, out_box,
            head_dim, head_dim_v, PRECISION, FOLDED, ROWS, KEYS, DIM, DIM_V,
        )  # fmt: skip


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
    planes,
    together,
    PERSISTENT: tl.constexpr,
    PRECISION: tl.constexpr,
    FOLDED: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_V: tl.constexpr,
):
    """Writes out and lse of a block of queries of one head.

    Grid: blocks of queries times batch * num_heads_q, as ``tile.block_and_plane`` takes it apart, or with PERSISTENT
    fewer programs, each of which takes block after block.

    Args:
        query: View of [batch, num_heads_q, seq_len_q, head_dim]; likewise ``key``, ``value`` and ``out``.
        lse: float64 [batch, num_heads_q, seq_len_q].
        sinks: [num_heads_q], or None.
        problem: Problem.
        query_box: descriptor of ``query`` (``boxes.box``), or None; likewise the others. Of packed sequences only
            ``key`` and ``value`` have one: what they are the whole tensor of is cut off by nothing.
        planes: batch * num_heads_q, of which ``together`` take turns; with PERSISTENT, otherwise None.
        PRECISION: how float32 is multiplied.
        FOLDED: what ``running.folds`` returned.
        ROWS: queries a block.
        KEYS: keys a tile.
        DIM: power of two that holds head_dim; DIM_V likewise.
    """
    if PERSISTENT:
        count = tl.cdiv(problem.seq_len_q, ROWS) * planes
        step = tl.num_programs(0)
        for first in tl.range(0, count, step, num_stages=1):
            # Back and forth: who has the longest block of one round has the shortest of the next.
            back = first // step % 2 != 0
            number = first + tl.where(back, step - 1 - tl.program_id(0), tl.program_id(0))
            if number < count:
                block, plane = _turn(number, problem.seq_len_q, planes, together, ROWS)
                _attention_block(
                    block, plane, query, key, value, out, lse, sinks, problem, query_box, key_box, value_box, out_box,
                    head_dim, head_dim_v, PRECISION, FOLDED, ROWS, KEYS, DIM, DIM_V,
                )  # fmt: skip
    else:
        block, plane = block_and_plane(problem.seq_len_q, ROWS)
        _attention_block(
            block, plane, query, key, value, out, lse, sinks, problem, query_box, key_box, value_box, out_box, head_dim,
            head_dim_v, PRECISION, FOLDED, ROWS, KEYS, DIM, DIM_V,
        )  # fmt: skip


def _arguments(call: AttentionCall, out: Tensor, lse: Tensor, tile: Tile, architecture: int) -> tuple[Any, ...]:
    # Nothing would keep what comes or goes by a box from reaching out of a packed sequence into the next: whole tiles
    # of keys may come so, blocks of queries not.
    packed = call.starts_q is not None
    boxed = ((call.query, tile.rows), (call.key, tile.columns), (call.value, tile.columns), (out, tile.rows))
    may = (not packed, True, True, not packed)
    given = problem(call)
    return (
        view(call.query),
        view(call.key),
        view(call.value),
        view(out),
        lse,
        call.sinks,
        given,
        *(box(*one, architecture) if tile.boxes and ok else None for one, ok in zip(boxed, may, strict=True)),
        call.query.shape[3],
        call.value.shape[3],
        *(_turns(call, given.mask.diag_lo is not None) if tile.persistent else (None, None)),
    )


def _turns(call: AttentionCall, banded: bool) -> tuple[int, int]:
    """Returns ``planes`` and ``together`` of a call, as the kernel takes them."""
    batch, num_heads_q, _, seq_len_k = call.shape
    planes = batch * num_heads_q
    if not banded:
        # All blocks are equally long, and those of one head share its keys.
        return planes, 1
    # Half of the cache for their keys and values.
    row = call.key.element_size() * (call.query.shape[3] + call.value.shape[3])
    return planes, max(1, min(_cache(call.query.device) // (2 * row * seq_len_k) * call.group_size, planes))


@cache
def _cache(device: torch.device) -> int:
    """Returns the bytes of a GPU's second cache; in the interpreter some that tests find heads for."""
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 1 << 13


def _programs(tile: Tile, device: torch.device) -> int:
    """Returns how many programs of a tile run at once; in the interpreter a few, each of which has several blocks."""
    # Programs of 8 warps have a multiprocessor's registers to themselves.
    return (multiprocessors(device) or 3) * max(1, 8 // tile.num_warps)


def _options(call: AttentionCall, tile: Tile) -> dict[str, Any]:
    dims = {"DIM": padded(call.query.shape[3]), "DIM_V": padded(call.value.shape[3])}
    sizes = {"PERSISTENT": tile.persistent, "ROWS": tile.rows, "KEYS": tile.columns, **dims}
    return {"PRECISION": precision(), "FOLDED": folds(call), **sizes, **tile.options}


def _table(call: AttentionCall) -> tiles.Table:
    return tiles.FORWARD if folds(call) and call.dropout_state is None else tiles.FORWARD_RICH


def _takes(table: tiles.Table, call: AttentionCall) -> bool:
    return _table(call) is table


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
        if hopper.serves(call, tile, known):
            hopper.attention_fwd_hopper(call, out, lse, tile)
            return
        tile = hopper.plain(tile)
        blocks = cdiv(seq_len_q, tile.rows) * batch * num_heads_q
        grid = (min(blocks, _programs(tile, call.query.device)) if tile.persistent else blocks,)
        start((_attention_fwd_kernel, grid, _arguments(call, out, lse, tile, known), _options(call, tile)))

    launch("attention", tiles.choose(_table(call), call, known), begin)
    return out, lse


def configurations(architecture: int) -> Iterator[Configuration]:
    """Yields the kernel with every tile of its table for an architecture, and a few as persistent grids."""
    for table, packed in itertools.product((tiles.FORWARD, tiles.FORWARD_RICH), (False, True)):
        for name, call, tile in tiles.calls(table, architecture, packed, partial(_takes, table)):
            wide = call.query.element_size() > 2
            out, lse = empty_output(call)
            grids = [(name, tile)]
            if ("64 plain" if wide else "128 causal") in name and architecture >= 90:
                choices = tiles.choose(table, call, architecture)
                if tile == choices[0]:
                    # Of wide types the smallest: what a walk over blocks takes of the registers comes on top.
                    own = choices[-1 if wide else 0]._replace(persistent=True)
                    grids.append((f"{name.split(' (')[0]} {own}", own))
            for grid, chosen in grids:
                yield Configuration(
                    f"attention forward {grid}",
                    _attention_fwd_kernel,
                    _arguments(call, out, lse, chosen, architecture),
                    _options(call, chosen),
                )
