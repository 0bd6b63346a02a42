"""The numerics rule: a result may be off by no more than eager PyTorch's of the same dtype."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fastattn.tools.numerics import MAX_FACTOR, MAX_ULPS, MEAN_FACTOR

try:
    from fastattn import _cpu
except ImportError:  # the extension is not built
    _cpu = None


# Of fewer numbers eager's largest error is luck: of one number, two equally good answers break "2 x" 3 times in 10.
FEW_ELEMENTS = 32
FEW_ULPS = 8.0
# In float64 nothing more exact stands beside it: allow what another order of summation brings.
FLOAT64_ULPS = 64.0


def assert_as_exact_as_eager(
    found: Mapping[str, Tensor], exact: Mapping[str, Tensor], eager: Mapping[str, Tensor]
) -> None:
    """Asserts the numerics rule of each result.

    Args:
        found: results by name.
        exact: the same in float64.
        eager: the same by stock PyTorch, in the dtype of the inputs that ``found`` comes from.
    """
    for name, expected in exact.items():
        assert found[name].shape == expected.shape, name
        if expected.numel() == 0:
            continue
        error = (found[name].double() - expected).abs()
        of_eager = (eager[name].double() - expected).abs()
        assert_within_rule(name, error, of_eager, float(expected.abs().max()), found[name].dtype)


def assert_within_rule(name: str, error: Tensor, of_eager: Tensor, largest: float, dtype: torch.dtype) -> None:
    """Asserts max error <= 2 x eager's + 2 ulp of the largest value, and mean error <= 1.5 x eager's.

    On tensors as small as these a mean is allowed 1 ulp more, and a maximum of fewer than ``FEW_ELEMENTS`` 6;
    ``fastattn verify`` judges means of many elements without.
    """
    few = error.numel() < FEW_ELEMENTS
    slack = FLOAT64_ULPS if dtype == torch.float64 else FEW_ULPS if few else MAX_ULPS
    ulp = torch.finfo(dtype).eps * largest
    machine = of_this_machine()
    assert float(error.max()) <= MAX_FACTOR * machine * float(of_eager.max()) + slack * ulp, name
    assert float(error.mean()) <= MEAN_FACTOR * machine * float(of_eager.mean()) + slack / 2.0 * ulp, name


def of_this_machine() -> float:
    """Returns what eager PyTorch's errors are to be multiplied by to be those of the machine that is played.

    The portable kernels stand for a processor without fused multiply-add, where PyTorch too rounds every product before
    it adds it: twice as many roundings, sqrt(2) of the error.
    """
    return math.sqrt(2.0) if _cpu is not None and _cpu.isa() == "portable" else 1.0
