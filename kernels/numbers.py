"""Numbers inside kernels: scalars in the accumulator's dtype, division and root rounded once, sums of nothing."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.target_info import cuda_capability_geq

from fastattn.kernels.interpreter import is_interpreting

_INTERPRETING = tl.constexpr(is_interpreting())


@triton.jit
def empty_sum(ROWS: tl.constexpr, COLUMNS: tl.constexpr, dtype: tl.constexpr, WHICH: tl.constexpr = 0):
    """Returns zeros [ROWS, COLUMNS] that products are to be added to.

    On sm_90 they come out of an instruction that the compiler knows nothing of. It would write zeros before a loop and
    once more where the loop is skipped, and the assembler, which takes that for a write amid the loop's products, would
    make each of them wait for the one before (its message C7515).

    Args:
        WHICH: another number for each of a kernel's sums, lest the compiler make them of the same zeros.
    """
    if not _INTERPRETING and cuda_capability_geq(9) and not cuda_capability_geq(10) and dtype == tl.float32:
        at = (WHICH * ROWS + tl.arange(0, ROWS)[:, None]) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        zeros = tl.inline_asm_elementwise("and.b32 $0, $1, 0;", "=r,r", [at], dtype=tl.float32, is_pure=True, pack=1)
    else:
        zeros = tl.zeros([ROWS, COLUMNS], dtype)
    return zeros


@triton.jit
def number(value, DTYPE: tl.constexpr):
    """Returns a launcher's float, which arrives as float64 lest a float64 kernel computes with a rounded one."""
    return tl.full([1], value, DTYPE)


@triton.jit
def inverse(x):
    """Returns ``1 / x``, rounded once; Triton's own division of float32 may be off by 2 ulp."""
    if x.dtype == tl.float32:
        return tl.div_rn(tl.full(x.shape, 1.0, tl.float32), x)
    return 1.0 / x


@triton.jit
def root(x):
    """Returns the square root of x, rounded once."""
    if x.dtype == tl.float32:
        return tl.sqrt_rn(x)
    return tl.sqrt(x)
