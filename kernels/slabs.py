"""Where the gradients of scores wait for the product that makes queries' gradients of them.

A slab is what a program of the keys' kernel leaves: the gradients of a tile of keys against the queries that may see
it, as far as the band says so, [KEYS, width]. There are about as many slabs as programs run at once, whatever the
length of the sequence: attention's backward goes over its heads and keys in shares, and a share's slabs are read before
those of the next are written. Under a causal mask, where half of each would be empty, a slab holds two tiles of keys:
the first and the last, the second and the last but one, and so on.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from fastattn.kernels import boxes
from fastattn.kernels.launch import cdiv

# Slabs begin and end at multiples of it, as every block of queries does.
ALIGN = tl.constexpr(256)
# Of all slabs together, where that is more than a GPU's programs write at once.
LEAST_BYTES = 128 << 20


class Slabs(NamedTuple):
    """The slabs of a share as a kernel is handed them.

    Attributes:
        data: [planes, slabs, KEYS, width], contiguous; None where nobody reads it.
        width: multiple of ALIGN.
    """

    data: Any
    width: int
    last: None = None


class Share(NamedTuple):
    """What is done at a time: some slabs of some planes (pairs of batch entry and query head)."""

    first_plane: int
    num_planes: int
    first_slab: int
    num_slabs: int


class Plan(NamedTuple):
    """How a call is shared out.

    Attributes:
        width: of a slab.
        paired: whether a slab holds two tiles of keys.
        slabs: of a plane.
        num_planes: of a share; 1 where a share has some slabs of a plane.
        num_slabs: of a plane in a share.
    """

    width: int
    paired: bool
    slabs: int
    num_planes: int
    num_slabs: int

    @property
    def splits_planes(self) -> bool:
        return self.num_slabs < self.slabs

    def shares(self, first_plane: int, last_plane: int) -> Iterator[Share]:
        """Yields shares that make up the planes [first_plane, last_plane), in order."""
        for plane in range(first_plane, last_plane, self.num_planes):
            for slab in range(0, self.slabs, self.num_slabs):
                planes = min(self.num_planes, last_plane - plane)
                yield Share(plane, planes, slab, min(self.num_slabs, self.slabs - slab))

    def tile_ranges(self, share: Share, tiles: int) -> list[tuple[int, int]]:
        """Returns the ranges of tiles of keys that a share has."""
        if not self.splits_planes:
            return [(0, tiles)]
        first, last = share.first_slab, share.first_slab + share.num_slabs
        mirrored = (max(tiles - last, self.slabs), tiles - first)
        return [(first, last), mirrored] if self.paired and mirrored[0] < mirrored[1] else [(first, last)]


def queries_of(tile: int, keys: int, band: tuple[int, int] | None, seq_len_q: int) -> int:
    """Returns how many queries a slab has room for at a tile of keys; :func:`_queries_of` is its twin."""
    align = ALIGN.value
    if band is None:
        return cdiv(seq_len_q, align) * align
    begin = max(tile * keys - band[1], 0) // align * align
    return cdiv(max(min(tile * keys + keys - band[0], seq_len_q), begin), align) * align - begin


@cache
def plan(
    band: tuple[int, int] | None, seq_len_q: int, seq_len_k: int, planes: int, keys: int, itemsize: int, at_once: int
) -> Plan:
    """Returns how to share a call out.

    Args:
        band: least and largest ``key - query`` that is visible, or None.
        seq_len_q: queries.
        seq_len_k: keys.
        planes: batch entries times query heads.
        keys: of a tile.
        itemsize: bytes of an element of a slab.
        at_once: programs that a GPU runs at once.
    """
    tiles = cdiv(seq_len_k, keys)
    lengths = [queries_of(tile, keys, band, seq_len_q) for tile in range(tiles)]
    pairs = [lengths[i] + (lengths[-1 - i] if i < tiles - 1 - i else 0) for i in range(cdiv(tiles, 2))]
    paired = max(lengths) * tiles > 1.5 * sum(lengths)
    slabs, width = (len(pairs), max(pairs)) if paired else (tiles, max(lengths))
    most = max(LEAST_BYTES // (keys * width * itemsize), at_once, 1)
    if slabs > most:
        # Equal shares, so that the last one is not the rest.
        return Plan(width, paired, slabs, 1, cdiv(slabs, cdiv(slabs, most)))

    # As few rounds of programs as possible, then as few shares.
    def rounds(count: int) -> tuple[int, int]:
        whole, rest = divmod(planes, count)
        return whole * cdiv(count * slabs, at_once) + cdiv(rest * slabs, at_once), -count

    return Plan(width, paired, slabs, min(range(1, min(planes, most // slabs) + 1), key=rounds), slabs)


@triton.jit
def _queries_of(problem, tile, KEYS: tl.constexpr):
    """Returns the first query and the end of those that a slab has room for at a tile of keys."""
    begin = tile * 0
    end = begin + tl.cdiv(problem.seq_len_q, ALIGN) * ALIGN
    # The band of a packed sequence is not known before the kernel runs.
    if problem.mask.diag_lo is not None and problem.packing.starts_q is None:
        begin = tl.maximum(tile * KEYS - problem.mask.diag_hi, 0) // ALIGN * ALIGN
        end = tl.minimum(tile * KEYS + KEYS - problem.mask.diag_lo, problem.seq_len_q)
        end = tl.cdiv(tl.maximum(end, begin), ALIGN) * ALIGN
    return begin, end


@triton.jit
def place(
    problem, plane, tile, first_plane, first_slab, num_slabs, PAIRED: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Returns where the gradients of a tile's scores are in the slabs of a share: ``(slab, ahead)``, such that query 0
    would be in the slab's column ``ahead``."""
    begin, _ = _queries_of(problem, tile, KEYS)
    slab, ahead = tile, 0
    if PAIRED:
        mirrored = tl.cdiv(problem.seq_len_k, KEYS) - 1 - tile
        other_begin, other_end = _queries_of(problem, mirrored, KEYS)
        slab = tl.minimum(tile, mirrored)
        ahead = tl.where(tile > mirrored, other_end - other_begin, 0)
    return (plane - first_plane) * num_slabs + (slab - first_slab), ahead - begin


@triton.jit
def store(slabs, box, where, row_begin, values, KEYS: tl.constexpr, ROWS: tl.constexpr):
    """Stores values [KEYS, ROWS] of queries from ``row_begin`` on.

    Args:
        box: descriptor of the slabs (:func:`box`), or None.
        where: what :func:`place` returned.
    """
    slab, ahead = where
    if box is not None:
        box.store([slab * KEYS, ahead + row_begin], values)
    else:
        to = slabs.data + slab.to(tl.int64) * KEYS * slabs.width + (ahead + row_begin)
        at = tl.arange(0, KEYS).to(tl.int64)[:, None] * slabs.width + tl.arange(0, ROWS)[None, :]
        tl.store(to + at, values)


@triton.jit
def load(
    slabs, box, where, column_begin, row_begin, TILE: tl.constexpr, KEYS: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """Returns the values [KEYS, ROWS] of keys from ``column_begin`` on, within a tile of TILE, and of queries from
    ``row_begin`` on; see :func:`store`."""
    slab, ahead = where
    row, column = slab * TILE + column_begin % TILE, ahead + row_begin
    if box is not None:
        return box.load([row, column])
    at = tl.arange(0, KEYS).to(tl.int64)[:, None] * slabs.width + tl.arange(0, ROWS)[None, :]
    return tl.load(slabs.data + row.to(tl.int64) * slabs.width + column + at)


def box(slabs: Slabs, keys: int, rows: int, architecture: int) -> Any:
    """Returns a descriptor of slabs whose boxes are [keys, rows], or None; see ``boxes.box``."""
    if slabs.data is None:
        return None
    return boxes.matrix_box(slabs.data.view(-1, slabs.width), keys, rows, architecture)


def programs_at_once(device: torch.device) -> int:
    """Returns how many of the backward's programs, of which each fills a multiprocessor, a GPU runs at once."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
