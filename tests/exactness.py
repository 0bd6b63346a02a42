"""The numerics rule: a result may be off by no more than eager PyTorch's of the same dtype."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

try:
    from fastattn import _cpu
except ImportError:  # the extension is not built
    _cpu = None


def assert_as_exact_as_eager(
    found: Mapping[str, Tensor], exact: Mapping[str, Tensor], eager: Mapping[str, Tensor]
) -> None:
    """Asserts max error <= 2 x eager's and mean error <= 1.5 x eager's, each plus 2 ulp of the largest value.

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
        of_eager = (eager[name].double() - expected).abs() * of_this_machine()
        # In float64 nothing more exact stands beside it: allow what another order of summation brings.
        slack = 64.0 if found[name].dtype == torch.float64 else 2.0
        ulp = torch.finfo(found[name].dtype).eps * float(expected.abs().max())
        assert float(error.max()) <= 2.0 * float(of_eager.max()) + slack * ulp, name
        assert float(error.mean()) <= 1.5 * float(of_eager.mean()) + slack / 2.0 * ulp, name


def of_this_machine() -> float:
    """Returns what eager PyTorch's errors are to be multiplied by to be those of the machine that is played.

    The portable kernels stand for a processor without fused multiply-add, where PyTorch too rounds every product before
    it adds it: twice as many roundings, sqrt(2) of the error.
    """
    return math.sqrt(2.0) if _cpu is not None and _cpu.isa() == "portable" else 1.0
