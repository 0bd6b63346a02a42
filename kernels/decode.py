"""Attention of a few queries: keys are split among programs, and query heads that share them packed into one block.

The queries of a group of heads are the rows of one tile, so that each key and value is read once. Each program writes
what its share of the keys adds up to, and a second kernel adds up the shares of a query, in their order. The keys may
lie in pages of a cache, which a table names for each batch entry; nothing else knows of pages than ``load_keys``.
Queries and keys may be packed sequences, of which a program works on one (``packing.py``). The file is longer than
others because all of these are calls of one kernel.

Source: Dao, Haziza, Massa and Sizov, "Flash-Decoding for long-context inference", 2023; Kwon et al., "Efficient Memory
Management for Large Language Model Serving with PagedAttention", 2023.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn.kernels import masking, packing, tiles
from fastattn.kernels.arguments import View, problem, view
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
from fastattn.kernels.running import finish, folds, over_keys
from fastattn.kernels.tile import LN_2
from fastattn.masks import OPEN_LO
from fastattn.spec.attention import AttentionCall, attention_call, empty_output, lse_dtype
from fastattn.spec.paged_attention import PagedCall

# Rows of queries, packed, up to which reading the keys takes longer than multiplying them.
MOST_ROWS = 64
# Of them a program takes as many where the matrix units multiply; plain cores have enough to do with a few.
_MOST_ROWS_WIDE = 16
# Shares of one row: enough for one head of keys to fill a GPU of 132 multiprocessors twice.
MOST_SPLITS = 256
# Keys that are worth a program of their own.
LEAST_KEYS = 128
# Shares that the second kernel adds at a time.
_SHARES = 16
# Programs that a multiprocessor needs to read as fast as it can (while one waits for its keys, the other multiplies),
# and those that it has registers and shared memory for, by the compiler's report.
_BUSY, _RESIDENT = 2, 3
# What a GPU reads in the 2 us that the second kernel takes to begin, bytes.
_LAUNCH = 8 << 20
# Beyond every position: what the queries of a cache, which are counted by position, are said to end with.
_FAR = 1 << 30


class Pages(NamedTuple):
    """Where the keys of a paged cache lie.

    Attributes:
        table: int32 [batch, max_pages], the page of each run of keys; None where keys are one tensor.
        stride: of the table's rows.
        number: pages there are; an entry of the table that is none of theirs means the nearest.
    """

    table: Any
    stride: int
    number: int


NO_PAGES = Pages(None, 0, 0)


@triton.jit
def _decode_kernel(
    query,
    key,
    value,
    out,
    lse,
    share_out,
    share_top,
    share_total,
    sinks,
    problem,
    pages,
    queries,
    head_dim,
    head_dim_v,
    splits,
    blocks,
    PRECISION: tl.constexpr,
    FOLDED: tl.constexpr,
    PAGE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_V: tl.constexpr,
):
    """Writes what a share of the keys gives for a block of the queries of a group of heads.

    Grid: splits times blocks times batch * num_heads_kv.

    Args:
        query: View of [batch, num_heads_q, queries, head_dim]; likewise ``out``. ``key`` and ``value`` are of
            [batch, num_heads_kv, seq_len_k, ...], or of [num_pages, num_heads_kv, page_size, ...]. Where sequences are
            packed, batch is 1, and queries, keys and pairs of a sequence and a head are those of all of them.
        lse: float64 [batch, num_heads_q, queries].
        share_out: [batch, num_heads_q, queries, splits, head_dim_v], contiguous, in the dtype of accumulators: sums
            before their division; ``share_top`` and ``share_total`` without the last dimension: maximum and sum of the
            softmax. None where all keys are one share, which is ``out`` and ``lse`` at once.
        sinks: [num_heads_q], or None.
        problem: Problem; in a cache a query is counted by its position, so that ``seq_len_q`` is beyond them all.
        pages: Pages.
        queries: of a batch entry; of the longest packed sequence.
        blocks: of ROWS packed queries.
        PAGE: keys a page, 0 for no pages.
    """
    split, block = tl.program_id(0) % splits, tl.program_id(0) // splits % blocks
    plane = tl.program_id(0) // splits // blocks
    num_heads_kv = problem.num_heads_q // problem.group_size
    batch, head_kv = plane // num_heads_kv, plane % num_heads_kv
    problem, batch = packing.own(problem, batch, packing.numbers(problem, batch))
    if packing.past_end(problem, block * ROWS // problem.group_size):
        return
    query = packing.at(problem, query, packing.queries(problem, query))
    key = packing.at(problem, key, packing.keys(problem, key))
    value = packing.at(problem, value, packing.keys(problem, value))
    out = packing.at(problem, out, packing.queries(problem, out))
    if problem.packing.starts_q is not None:
        queries = problem.seq_len_q
    packed, columns = block * ROWS + tl.arange(0, ROWS), tl.arange(0, DIM)
    inside = packed < problem.group_size * queries
    heads = head_kv * problem.group_size + tl.where(inside, packed // queries, 0)
    at = tl.where(inside, packed % queries, 0)
    start = query.data + batch.to(tl.int64) * query.batch
    start += heads.to(tl.int64)[:, None] * query.head + at.to(tl.int64)[:, None] * query.row
    q = tl.load(start + columns[None, :], mask=inside[:, None] & (columns < head_dim)[None, :], other=0.0)

    limit = masking.key_end(problem.mask, batch, problem.seq_len_k)
    # The queries of a cache are its last positions.
    first = limit - queries if PAGE > 0 else 0
    rows = tl.where(inside, first + at, problem.seq_len_q)
    begin, free_begin, free_end, end = masking.key_parts(problem.mask, first, first + queries, limit, KEYS)
    keys_a_split = tl.cdiv(tl.cdiv(tl.maximum(end - begin, 0), splits), KEYS) * KEYS
    begin += split * keys_a_split
    end = tl.minimum(end, begin + keys_a_split)
    free_begin = tl.maximum(free_begin, begin)
    free_end = tl.maximum(tl.minimum(free_end, begin + keys_a_split), free_begin)
    state = over_keys(
        q, key, value, None, None, pages, problem, batch, head_kv, heads[:, None], rows[:, None],
        (begin, free_begin, free_end, end), limit, head_dim, head_dim_v, PRECISION, FOLDED, PAGE, ROWS, KEYS, DIM,
        DIM_V,
    )  # fmt: skip
    if problem.packing.starts_q is not None:
        to = packing.first_row(problem, batch, heads) + at
    else:
        to = (batch * problem.num_heads_q + heads).to(tl.int64) * queries + at
    dims = tl.arange(0, DIM_V)
    there = inside[:, None] & (dims < head_dim_v)[None, :]
    if share_out is None:
        result, log_total = finish(state, sinks, heads, problem.dropout, q.dtype)
        start = out.data + batch.to(tl.int64) * out.batch
        start += heads.to(tl.int64)[:, None] * out.head + at.to(tl.int64)[:, None] * out.row
        tl.store(start + dims[None, :], result.to(out.data.dtype.element_ty), mask=there)
        tl.store(lse + to, log_total * LN_2, mask=inside)
    else:
        result, most, sum_of_all = state
        to = to * splits + split
        tl.store(share_out + to[:, None] * head_dim_v + dims[None, :], result, mask=there)
        tl.store(share_top + to, most, mask=inside)
        tl.store(share_total + to, sum_of_all, mask=inside)


@triton.jit
def _add_splits_kernel(
    share_out,
    share_top,
    share_total,
    out,
    lse,
    sinks,
    dropout,
    seq_len_q,
    num_heads_q,
    head_dim_v,
    splits,
    SPLITS: tl.constexpr,
    SHARES: tl.constexpr,
    DIM_V: tl.constexpr,
):
    """Writes out and lse of a query, from its shares.

    Grid: batch * num_heads_q * seq_len_q.

    Args:
        share_out: what :func:`_decode_kernel` wrote; likewise ``share_top`` and ``share_total``.
        out: View of [batch, num_heads_q, seq_len_q, head_dim_v].
        lse: float64 [batch, num_heads_q, seq_len_q].
        sinks: [num_heads_q], or None.
        dropout: Dropout.
        SPLITS: power of two that holds splits.
        SHARES: that are added at a time, each to a sum of its own.
    """
    at = tl.program_id(0).to(tl.int64)
    row, head, batch = at % seq_len_q, at // seq_len_q % num_heads_q, at // seq_len_q // num_heads_q
    every, few, dims = tl.arange(0, SPLITS), tl.arange(0, SHARES), tl.arange(0, DIM_V)
    tops = tl.load(share_top + at * splits + every, mask=every < splits, other=float("-inf"))
    totals = tl.load(share_total + at * splits + every, mask=every < splits, other=0.0)
    top = tl.max(tops, axis=0)
    shift = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(totals * tl.exp2(tops - shift), axis=0)
    sums = tl.zeros([SHARES, DIM_V], tops.dtype)
    for first in range(0, splits, SHARES):
        here = first + few < splits
        some = at * splits + first + few
        weights = tl.exp2(tl.load(share_top + some, mask=here, other=float("-inf")) - shift)
        there = here[:, None] & (dims < head_dim_v)[None, :]
        sums += (
            tl.load(share_out + some[:, None] * head_dim_v + dims[None, :], mask=there, other=0.0) * weights[:, None]
        )
    one = tl.zeros([1], tops.dtype)
    state = (tl.sum(sums, axis=0)[None, :], one + top, one + total)
    result, log_total = finish(state, sinks, head, dropout, out.data.dtype.element_ty)
    to = out.data + batch * out.batch + head * out.head + row * out.row + dims
    tl.store(to[None, :], result.to(out.data.dtype.element_ty), mask=(dims < head_dim_v)[None, :])
    tl.store(lse + at + tl.arange(0, 1), log_total * LN_2)


def num_splits(call: AttentionCall) -> int:
    """Returns among how many programs to share out the keys of a head; 0 where a block of queries fills a program."""
    _, _, seq_len_q, seq_len_k = call.shape
    if call.group_size * seq_len_q > MOST_ROWS or seq_len_q > 16 or seq_len_k < 2 * LEAST_KEYS:
        return 0
    return _splits(call)


def _splits(call: AttentionCall) -> int:
    batch, _, _, seq_len_k = call.shape
    if call.starts_q is not None:
        # As many sequences as there were if all had as many keys as the longest.
        batch = min(batch, cdiv(call.key.shape[2], seq_len_k))
    (rows, blocks), size = _blocks(call), call.key.element_size()
    processors = multiprocessors(call.query.device)
    # The interpreter has none to fill; as many as let a few keys be shared out.
    processors, launch = (processors, _LAUNCH) if processors else (8, 0)
    # Sums are written and read, in float32 or wider; keys and values are read.
    sums, width = 2 * rows * max(size, 4), 2 * size
    programs = batch * call.key.shape[1] * blocks
    return _cheapest(programs, seq_len_k, processors, sums / width, launch / (width * call.value.shape[3]))


def _blocks(call: AttentionCall) -> tuple[int, int]:
    """Returns how many packed queries a program takes, and how many programs take all of a group."""
    packed = call.group_size * call.shape.seq_len_q
    most = MOST_ROWS if call.query.element_size() == 2 else _MOST_ROWS_WIDE
    return min(packed, most), cdiv(packed, most)


@cache
def _cheapest(programs: int, keys: int, processors: int, sums: float, launch: float) -> int:
    """Returns among how many to share out the keys of each of ``programs``.

    What counts is the time that is lost, as a share of that in which a GPU reads all keys: while the last programs are
    too few to keep it busy, and by adding up shares.

    Args:
        programs: that there are without sharing.
        keys: of each.
        processors: multiprocessors.
        sums: keys as many as whose bytes are those of the sums of one share.
        launch: keys that are read, in all, while a kernel begins.
    """

    def lost(splits: int) -> float:
        count = programs * splits
        last = count % (_RESIDENT * processors)
        idle = max(0, _BUSY * processors - last) / count if last else 0.0
        return idle + (sums * splits / keys + launch / (programs * keys) if splits > 1 else 0.0)

    return min(range(1, max(2, min(keys // LEAST_KEYS, MOST_SPLITS) + 1)), key=lost)


def _launches(
    call: AttentionCall, out: Tensor, lse: Tensor, splits: int, tile: Tile, paged: PagedCall | None = None
) -> list[tuple[Any, int, tuple[Any, ...], dict[str, Any]]]:
    """Returns ``(kernel, grid, arguments, options)`` of both kernels, or of the first where it is enough."""
    entries, num_heads_q, seq_len_q, seq_len_k = call.shape
    batch, queries = call.query.shape[0], call.query.shape[2]
    head_dim, head_dim_v = call.query.shape[3], call.value.shape[3]
    splits = min(splits, cdiv(seq_len_k, tile.columns))
    wide = lse_dtype(call.query.dtype)
    shares: tuple[Tensor | None, ...] = (None, None, None)
    if splits > 1:
        size = (batch, num_heads_q, queries, splits)
        shares = tuple(lse.new_empty(s, dtype=wide) for s in ((*size, head_dim_v), size, size))
    given, pages, keys, page_size = problem(call), NO_PAGES, (view(call.key), view(call.value)), 0
    if paged is not None:
        lo, hi = _band(paged)
        given = given._replace(mask=given.mask._replace(diag_lo=lo, diag_hi=hi), seq_len_q=_FAR)
        table = paged.block_table.contiguous()
        pages, page_size = Pages(table, table.stride(0), paged.key_cache.shape[0]), paged.key_cache.shape[1]
        keys = _page_view(paged.key_cache), _page_view(paged.value_cache)
    rows, blocks = _blocks(call)
    dims = {"DIM": padded(head_dim), "DIM_V": padded(head_dim_v)}
    sizes = {"PAGE": page_size, "ROWS": padded(rows), "KEYS": tile.columns}
    launches: list[tuple[Any, int, tuple[Any, ...], dict[str, Any]]] = [
        (
            *(_decode_kernel, splits * blocks * entries * call.key.shape[1]),
            (
                *(view(call.query), *keys, view(out), lse, *shares, call.sinks, given, pages),
                *(seq_len_q, head_dim, head_dim_v, splits, blocks),
            ),
            {"PRECISION": precision(), "FOLDED": folds(call), **sizes, **dims, **tile.options},
        )
    ]
    if splits > 1:
        numbers = (queries, num_heads_q, head_dim_v, splits)
        launches.append(
            (
                *(_add_splits_kernel, batch * num_heads_q * queries),
                (*shares, view(out), lse, call.sinks, given.dropout, *numbers),
                {"SPLITS": 1 << (splits - 1).bit_length(), "SHARES": _SHARES, "DIM_V": dims["DIM_V"], "num_warps": 4},
            )
        )
    return launches


def decode_fwd(call: AttentionCall, out: Tensor, lse: Tensor, splits: int, paged: PagedCall | None = None) -> None:
    """Writes out and lse of a call of a few queries, its keys shared out among ``splits`` programs or fewer."""

    def begin(tile: Tile) -> None:
        for kernel, programs, arguments, options in _launches(call, out, lse, splits, tile, paged):
            start((kernel, (programs,), arguments, options))

    launch("attention, a few queries", tiles.choose(tiles.DECODE, call, architecture(call.query.device)), begin)


@replayed
def paged_fwd(paged: PagedCall) -> tuple[Tensor, Tensor]:
    """Returns ``(out, lse)`` of a call over a paged cache that is not empty, whatever its number of queries."""
    call = _as_attention(paged)
    out, lse = empty_output(call)
    decode_fwd(call, out, lse, _splits(call), paged)
    return out, lse


def _as_attention(paged: PagedCall) -> AttentionCall:
    """Returns the call without its pages: keys and values are views of the right sizes, and never read."""

    def capacity(cache: Tensor) -> Tensor:
        num_heads_kv, dim = cache.shape[2:]
        size = (paged.query.shape[0], num_heads_kv, paged.capacity, dim)
        return cache[:1, :1].transpose(1, 2).expand(size)

    call = attention_call(
        paged.query,
        capacity(paged.key_cache),
        capacity(paged.value_cache),
        softmax_scale=paged.softmax_scale,
        softcap=paged.softcap or None,
        sinks=paged.sinks,
        backend=paged.backend,
    )
    return call._replace(key_lengths=paged.cache_lengths)


def _band(paged: PagedCall) -> tuple[int | None, int | None]:
    """Returns the least and the largest ``key - position`` that may be seen, as ``arguments.Mask`` has it."""
    lo, hi = max(paged.diag_lo, -paged.capacity), min(paged.diag_hi, paged.capacity)
    # The last position sees nothing after it anyway.
    if lo == -paged.capacity and hi >= (0 if paged.query.shape[2] == 1 else paged.capacity):
        return None, None
    return lo, hi


def _page_view(cache: Tensor) -> View:
    page, row, head, column = cache.stride()
    return View(cache, page, head, row, column)


def configurations(architecture: int) -> Iterator[Configuration]:
    """Yields both kernels with every tile of their table for an architecture."""
    for name, call, tile in tiles.calls(tiles.DECODE, architecture):
        if "causal" in name:
            continue  # one query sees all keys
        few = call._replace(query=call.query[:, :, :1])
        few = few._replace(bias=None if call.bias is None else call.bias[:, :, :1])
        out, lse = empty_output(few)
        # The second kernel depends on dtype, head_dim and the number of splits alone.
        for kernel, _, arguments, options in _launches(few, out, lse, 8, tile)[: 1 + ("plain" in name)]:
            yield Configuration(f"{kernel.__name__.strip('_')} {name}", kernel, arguments, options)
    for name, call, tile in tiles.calls(tiles.DECODE, architecture, packed=True):
        few = call._replace(longest_q=1)
        if "causal" not in name:
            out, lse = empty_output(few)
            kernel, _, arguments, options = _launches(few, out, lse, 8, tile)[0]
            yield Configuration(f"decode_kernel {name}", kernel, arguments, options)
    for page_size in (16, 256):
        query = torch.empty(2, 8, 4, 128, dtype=torch.bfloat16)
        cache = torch.empty(64, page_size, 2, 128, dtype=torch.bfloat16)
        table, lengths = torch.empty(2, 16, dtype=torch.int32), torch.empty(2, dtype=torch.int32)
        paged = PagedCall(query, cache, cache, table, lengths, None, OPEN_LO, 0, 0.1, 0.0, "triton")
        call = _as_attention(paged)
        out, lse = empty_output(call)
        for splits in (1, 8):
            tile = tiles.choose(tiles.DECODE, call, architecture)[0]
            kernel, _, arguments, options = _launches(call, out, lse, splits, tile, paged)[0]
            yield Configuration(f"decode pages of {page_size}, {splits} splits {tile}", kernel, arguments, options)
