"""Rows of packed sequences, and of caches that lie in pages: what a server's calls look like.

Packed rows of one query a sequence, and paged rows, are judged by how fast keys and values are read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from fastattn import masks
from fastattn.ops.paged_attention import paged_attention
from fastattn.ops.varlen_attention import varlen_attention
from fastattn.tools import eager
from fastattn.tools.bench.case import Case, Draw, relative, size, timed
from fastattn.tools.bench.workload import PackedWorkload, PagedWorkload

# Sequences whose answers are compared with float64: the longest, which come first, and the last.
_CHECKED = 3


def packed_cases(name: str, row: Mapping[str, Any], dtype: torch.dtype, device: str) -> Iterator[Case]:
    """Yields forward, and forward + backward, of one row; on a GPU the backward alone, too; of rows of single queries
    the forward."""
    forward = packed_workload(row, dtype, device)
    single = row.get("queries") == 1
    directions = [("forward", 1.0)]
    if not single:
        directions += [("forward + backward", 3.5), *([("backward", 2.5)] if device != "cpu" else [])]
    pairs = sum(q * k * (0.5 if forward.causal and q > 1 else 1.0) for q, k in forward.lengths)
    for direction, factor in directions:
        work = forward.asking(direction)
        ours = partial(run, work, _host_bounds(work))
        call = timed(ours, work.tensors, work.dout, backward=work.backward, alone=work.alone)
        read, gradients = size(work.tensors), size([*work.tensors, work.dout]) if work.backward else 0.0
        yield Case(
            family="packed",
            name=name,
            direction=direction,
            shape=row,
            ours=call,
            workload=work,
            error=partial(_packed_error, work),
            flops=4.0 * factor * pairs * work.query.shape[1] * work.query.shape[2],
            moved=size([work.key, work.value]) if single else read + size([work.query]) + gradients,
            unit="GB/s" if single else "GFLOP/s",
        )


def packed_workload(row: Mapping[str, Any], dtype: torch.dtype, device: str) -> PackedWorkload:
    """Returns the forward of one row: ``lengths`` of its sequences, all of them ``times`` over, and ``queries`` of
    each, if these are not as many."""
    lengths_k = [*row["lengths"]] * row.get("times", 1)
    lengths_q = [min(row.get("queries", k), k) for k in lengths_k]
    (heads, heads_kv), dim = row["heads"], row["head_dim"]
    draw = Draw(dtype, device)
    query, dout = (draw(sum(lengths_q), heads, dim) for _ in range(2))
    key, value = (draw(sum(lengths_k), heads_kv, dim) for _ in range(2))
    return PackedWorkload(query, key, value, dout, tuple(zip(lengths_q, lengths_k, strict=True)), causal=row["causal"])


def _host_bounds(work: PackedWorkload) -> list[Tensor]:
    """Returns the bounds where a caller made them: to read them from a GPU would be to wait for it."""
    return [torch.tensor([0, *accumulate(lengths)]) for lengths in zip(*work.lengths, strict=True)]


def run(work: PackedWorkload, bounds: Sequence[Tensor], query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Returns fastattn's output."""
    out = varlen_attention(query, key, value, *bounds, mask=masks.Causal() if work.causal else None)
    assert isinstance(out, Tensor)
    return out


def _packed_error(work: PackedWorkload) -> float:
    leaves = [t.detach().requires_grad_(work.backward) for t in work.tensors]
    out = run(work, _host_bounds(work), *leaves)
    if not work.backward:
        return packed_distance(work, out)
    dout = torch.zeros_like(work.dout)
    for rows, _ in checked(work):
        dout[rows] = work.dout[rows]
    return packed_distance(work, torch.autograd.grad(out, leaves, dout))


def checked(work: PackedWorkload) -> list[tuple[slice, slice]]:
    """Returns the queries and the keys of the sequences that are compared with float64."""
    ends_q, ends_k = (list(accumulate(lengths)) for lengths in zip(*work.lengths, strict=True))
    every = [
        (slice(end_q - q, end_q), slice(end_k - k, end_k))
        for end_q, end_k, (q, k) in zip(ends_q, ends_k, work.lengths, strict=True)
    ]
    # A long sequence would hold all its scores.
    short = [(rows, keys) for rows, keys in every if 0 < (rows.stop - rows.start) * (keys.stop - keys.start) <= 1 << 20]
    return [*short[: _CHECKED - 1], *short[-1:]]


def packed_distance(work: PackedWorkload, answer: Tensor | Sequence[Tensor]) -> float:
    """Returns the largest error of an output, or of gradients of query, key and value, over the largest element, in the
    sequences that are compared."""
    found = [answer] if isinstance(answer, Tensor) else list(answer)
    worst = 0.0
    for rows, keys in checked(work):
        leaves = [
            t[at].double().transpose(0, 1)[None].requires_grad_(work.backward)
            for t, at in zip(work.tensors, (rows, keys, keys), strict=True)
        ]
        count_q, count_k = rows.stop - rows.start, keys.stop - keys.start
        visible = None
        if work.causal:
            seen = torch.ones(count_q, count_k, dtype=torch.bool, device=work.query.device)
            visible = seen.tril(count_k - count_q)
        out = eager.attention(*leaves, visible=visible)[0]
        if work.backward:
            wanted = torch.autograd.grad(out, leaves, work.dout[rows].double().transpose(0, 1)[None])
            pairs = [(f[at], w) for f, at, w in zip(found, (rows, keys, keys), wanted, strict=True)]
        else:
            pairs = [(found[0][rows], out)]
        worst = max(worst, *(relative(f.transpose(0, 1)[None], w) for f, w in pairs))
    return worst


def paged_cases(name: str, row: Mapping[str, Any], dtype: torch.dtype, device: str) -> Iterator[Case]:
    """Yields the case of one row."""
    work = paged_workload(row, dtype, device)
    width = 2.0 * work.key_cache.shape[2] * work.key_cache.shape[3] * work.key_cache.element_size()
    keys = float(sum(work.lengths.tolist()))
    yield Case(
        family="paged",
        name=name,
        direction="forward",
        shape=row,
        ours=timed(partial(run_paged, work), work.tensors),
        workload=work,
        error=lambda: paged_distance(work, run_paged(work, *work.tensors)),
        flops=4.0 * keys * work.query.shape[1] * work.query.shape[3],
        moved=keys * width,
        unit="GB/s",
    )


def paged_workload(row: Mapping[str, Any], dtype: torch.dtype, device: str) -> PagedWorkload:
    """Returns the forward of one row: sequences from half the cache to all of it, their pages in any order."""
    draw = Draw(dtype, device)
    (heads, heads_kv), cache, page, dim = row["heads"], row["cache"], row["page_size"], row["head_dim"]
    batch, pages = row["batch"], -(-cache // page)
    query = draw(batch, heads, 1, dim)
    key_cache, value_cache = (draw(batch * pages, page, heads_kv, dim) for _ in range(2))
    order = torch.randperm(batch * pages, generator=torch.Generator().manual_seed(batch))
    lengths = torch.linspace(cache // 2, cache, batch).int() if batch > 1 else torch.tensor([cache]).int()
    return PagedWorkload(query, key_cache, value_cache, order.view(batch, pages).int().to(device), lengths.to(device))


def run_paged(work: PagedWorkload, query: Tensor, key_cache: Tensor, value_cache: Tensor) -> Tensor:
    """Returns fastattn's output."""
    out = paged_attention(query, key_cache, value_cache, work.table, work.lengths)
    assert isinstance(out, Tensor)
    return out


def gathered(work: PagedWorkload, cache: Tensor, entries: slice = slice(None)) -> Tensor:
    """Returns what the pages of batch entries hold, side by side: [batch, num_heads_kv, capacity, head_dim]."""
    return cache[work.table[entries].long()].flatten(1, 2).transpose(1, 2)


def paged_distance(work: PagedWorkload, answer: Tensor) -> float:
    """Returns the largest error over the largest element, of the first entries and the last."""
    worst = 0.0
    batch = len(work.query)
    for entry in sorted({0, batch // 2, batch - 1}):
        at = slice(entry, entry + 1)
        length = int(work.lengths[entry])
        key, value = (gathered(work, t, at)[:, :, :length].double() for t in (work.key_cache, work.value_cache))
        worst = max(worst, relative(answer[at], eager.attention(work.query[at].double(), key, value)[0]))
    return worst
