"""Philox-4x32-10: which elements dropout drops.

Source: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011, section 3.3 and table 2.  Its twins are
``fastattn/reference/philox.py`` and ``csrc/cpu/philox.h``.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.random import philox_impl


@triton.jit
def keep(dropout, plane, row_begin, column_begin, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Returns which elements of a tile survive: bool [ROWS, COLUMNS].

    Args:
        plane: ``batch * num_heads_q + head``, or 0 for the feed-forward.
        column_begin: a multiple of 4.
    """
    return keep_of(dropout, plane, (row_begin + tl.arange(0, ROWS))[:, None], column_begin, ROWS, COLUMNS)


@triton.jit
def keep_of(dropout, planes, rows, column_begin, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The same of any rows: int32 [ROWS, 1], as ``planes``, which may be one for all."""
    seed, offset = tl.load(dropout.state), tl.load(dropout.state + 1)
    if dropout.sequence is not None:
        offset += dropout.sequence
    quads = (column_begin // 4 + tl.arange(0, COLUMNS // 4)).to(tl.uint32)[None, :]
    zero = tl.zeros([ROWS, COLUMNS // 4], tl.uint32)
    a, b, c, d = philox_impl(
        zero + quads,
        zero + rows.to(tl.uint32),
        zero + planes.to(tl.uint32),
        zero + (offset & 0xFFFFFFFF).to(tl.uint32),
        (seed & 0xFFFFFFFF).to(tl.uint32),
        ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32),
        10,
    )
    # Element 4 q + r of a row is number r of its quad: joined last, r counts fastest.
    numbers = tl.join(tl.join(a, c), tl.join(b, d))
    return tl.reshape(numbers, [ROWS, COLUMNS]) >= tl.full([1, 1], dropout.threshold, tl.uint32)
