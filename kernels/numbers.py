"""Numbers inside kernels: scalars in the accumulator's dtype, division and root rounded once."""

from __future__ import annotations

import triton
import triton.language as tl


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
