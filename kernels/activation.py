"""Activations of the feed-forward, and their derivatives."""

from __future__ import annotations

import triton
import triton.language as tl

_ROOT_HALF = tl.constexpr(0.7071067811865476)
_ROOT_INVERSE_TWO_PI = tl.constexpr(0.3989422804014327)
_ROOT_TWO_BY_PI = tl.constexpr(0.7978845608028654)
_CUBIC = tl.constexpr(0.044715)


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """Returns ``activation(x)``, ACTIVATION being one of ``spec.feed_forward.ACTIVATIONS``."""
    if ACTIVATION == "relu":
        # Not maximum(x, 0), which loses a NaN.
        return tl.where(x < 0.0, 0.0, x)
    elif ACTIVATION == "gelu":
        return x * (0.5 * (1.0 + tl.erf(x * _ROOT_HALF)))
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh(u)) / 2 is sigmoid(2 u).
        return x * _sigmoid(2.0 * _ROOT_TWO_BY_PI * (x + _CUBIC * x * x * x))
    else:
        return x * _sigmoid(x)


@triton.jit
def slope(x, ACTIVATION: tl.constexpr):
    """Returns the derivative of :func:`activate` at x."""
    if ACTIVATION == "relu":
        return tl.where(x > 0.0, 1.0, 0.0).to(x.dtype)
    elif ACTIVATION == "gelu":
        return 0.5 * (1.0 + tl.erf(x * _ROOT_HALF)) + x * (tl.exp(-0.5 * x * x) * _ROOT_INVERSE_TWO_PI)
    elif ACTIVATION == "gelu_tanh":
        s = _sigmoid(2.0 * _ROOT_TWO_BY_PI * (x + _CUBIC * x * x * x))
        return s + x * s * (1.0 - s) * (2.0 * _ROOT_TWO_BY_PI * (1.0 + 3.0 * _CUBIC * x * x))
    else:
        s = _sigmoid(x)
        return s * (1.0 + x * (1.0 - s))
