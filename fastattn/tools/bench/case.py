"""One figure of the benchmark, and what its families share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastattn.tools.bench.workload import Workload

SEED = 11


@dataclass(frozen=True, eq=False)
class Case:
    """One figure of the benchmark.

    Attributes:
        name: of the row.
        direction: "forward", "forward + backward", or how a module or model is called.
        workload: what is computed; peers run it too.
        ours: runs it on fastattn.
        work: floating point operations, or bytes, of one run.
        unit: "GFLOP/s" or "GB/s", what ``work`` over time is shown in.
        error: returns the largest error of ours against float64, over the largest element.
        tolerance: how many times the error of a single op is allowed.
    """

    name: str
    direction: str
    workload: Workload
    ours: Callable[[], Any]
    work: float
    unit: str
    error: Callable[[], float]
    tolerance: float = 1.0

    @property
    def family(self) -> str:
        return self.workload.family


def relative(value: Tensor, reference: Tensor) -> float:
    """Returns the largest difference over the largest element of ``reference``; infinite where there is a NaN."""
    distance = (value.detach().double() - reference.detach()).abs().max().item()
    return distance / max(reference.abs().max().item(), 1e-30) if distance == distance else float("inf")


class Draw:
    """Normal random tensors of a dtype from a stream of their own."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._generator = torch.Generator().manual_seed(SEED)
        self._dtype = dtype

    def __call__(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=self._generator) * scale).to(self._dtype)


def timed(
    function: Callable[..., Any], tensors: Sequence[Tensor], dout: Tensor | None = None, *, backward: bool = False
) -> Callable[[], Any]:
    """Returns the call that is timed: ``function(*tensors)`` without gradients, or the gradients of ``tensors``."""
    if not backward:
        return torch.no_grad()(lambda: function(*tensors))
    leaves = [t.detach().requires_grad_() for t in tensors]
    return lambda: torch.autograd.grad(function(*leaves), leaves, dout)
