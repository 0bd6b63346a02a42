"""The numerics rule: how far an answer may lie from float64, measured by how far eager PyTorch's lies.

``max|x - ref| <= 2 max|eager - ref| + 2 ulp`` and ``mean|x - ref| <= 1.5 mean|eager - ref|``, the ulp being that of the
largest element; the mean is judged where there are enough elements for one.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

MAX_FACTOR = 2.0
MAX_ULPS = 2.0
MEAN_FACTOR = 1.5
# The mean of fewer errors tells luck from skill no more: two draws of 32 normal errors already differ by 1.5 x once in
# 20 times.
MEAN_ELEMENTS = 1000


class Errors(NamedTuple):
    """Largest and mean distance from the float64 reference; infinite where the answer is NaN and the reference is
    not."""

    max: float
    mean: float


class Figure(NamedTuple):
    """What one tensor (an output or a gradient) shows under the rule."""

    name: str
    ours: Errors
    eager: Errors
    max_bound: float
    mean_bound: float
    largest: float = 0.0  # element of the reference

    @property
    def ok(self) -> bool:
        return self.ours.max <= self.max_bound and self.ours.mean <= self.mean_bound

    @property
    def strain(self) -> float:
        """The larger of (error / bound), for the maximum and the mean; 1 is the limit."""
        return max(_ratio(self.ours.max, self.max_bound), _ratio(self.ours.mean, self.mean_bound))


def figure(name: str, ours: Tensor, eager: Tensor, reference: Tensor) -> Figure:
    """Returns the figures of ``ours`` beside those of ``eager``, which has the same dtype, against the float64
    ``reference``.

    Raises:
        ValueError: the shapes differ.
        TypeError: the dtypes differ.
    """
    if ours.shape != reference.shape or eager.shape != reference.shape:
        shapes = f"{list(ours.shape)}, {list(eager.shape)} and {list(reference.shape)}"
        raise ValueError(f"{name}: ours, eager and the reference must have one shape, got {shapes}")
    if ours.dtype != eager.dtype:
        raise TypeError(f"{name}: ours must have eager's dtype {eager.dtype}, got {ours.dtype}")
    our_errors, eager_errors = errors(ours, reference), errors(eager, reference)
    slack = MAX_ULPS * ulp(reference, ours.dtype)
    mean_bound = MEAN_FACTOR * eager_errors.mean if ours.numel() >= MEAN_ELEMENTS else math.inf
    max_bound = MAX_FACTOR * eager_errors.max + slack
    return Figure(name, our_errors, eager_errors, max_bound, mean_bound, largest_finite(reference))


def with_typical_errors(figures: Sequence[Figure]) -> list[Figure]:
    """Returns figures of one kind with bounds from eager's error on each tensor or its typical one, whichever is
    larger.

    Of a hundred tensors eager is lucky on some; what is typical is the median of its mean error over the largest
    element.  A largest error is luck by itself, and ours are as many draws as eager's: typical is what eager exceeds on
    one tensor in ten.
    """
    known = [f for f in figures if f.largest > 0.0 and math.isfinite(f.eager.max)]
    if not known:
        return list(figures)
    maxima = sorted(f.eager.max / f.largest for f in known)
    typical_max = maxima[int(0.9 * (len(maxima) - 1))]
    typical_mean = statistics.median(f.eager.mean / f.largest for f in known)
    return [
        f._replace(
            max_bound=max(f.max_bound, f.max_bound + MAX_FACTOR * (typical_max * f.largest - f.eager.max)),
            mean_bound=max(f.mean_bound, MEAN_FACTOR * typical_mean * f.largest),
        )
        if math.isfinite(f.eager.max)
        else f
        for f in figures
    ]


def errors(value: Tensor, reference: Tensor) -> Errors:
    """Returns the errors of ``value``; elements where the reference itself is NaN have none."""
    value, reference = value.detach().double(), reference.detach().double()
    # Equal infinities (an empty row's lse) are no error, and their difference would be NaN.
    same = (value == reference) | reference.isnan()
    distance = torch.where(same, 0.0, (value - reference).abs()).nan_to_num(nan=math.inf, posinf=math.inf)
    return Errors(distance.max().item(), distance.mean().item()) if distance.numel() else Errors(0.0, 0.0)


def ulp(reference: Tensor, dtype: torch.dtype) -> float:
    """Returns the distance of neighbouring numbers of ``dtype`` at the largest finite element of ``reference``."""
    largest = largest_finite(reference)
    if largest == 0.0:
        return 0.0
    exponent = math.floor(math.log2(largest))
    return max(torch.finfo(dtype).eps * 2.0**exponent, torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps)


def largest_finite(reference: Tensor) -> float:
    """Returns the largest absolute value of the finite elements; 0 if there is none."""
    finite = reference.detach()[reference.isfinite()]
    return finite.abs().max().item() if finite.numel() else 0.0


def _ratio(a: float, b: float) -> float:
    if a == 0.0:
        return 0.0
    return a / b if b > 0.0 else math.inf
