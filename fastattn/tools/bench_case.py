"""One figure of the benchmark."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Case:
    """One figure of the benchmark.

    Attributes:
        family: table of the grid.
        name: of the row.
        direction: "forward", "forward + backward", or how a module or model is called.
        ours: runs it on fastattn.
        peers: the same by others.
        work: floating point operations, or bytes, of one run.
        unit: "GFLOP/s" or "GB/s", what ``work`` over time is shown in.
        error: returns the largest error of ours against float64, over the largest element.
        tolerance: how many times the error of a single op is allowed.
    """

    family: str
    name: str
    direction: str
    ours: Callable[[], Any]
    peers: Mapping[str, Callable[[], Any]]
    work: float
    unit: str
    error: Callable[[], float]
    tolerance: float = 1.0


def relative(value: Tensor, reference: Tensor) -> float:
    """Returns the largest difference over the largest element of ``reference``; infinite where there is a NaN."""
    distance = (value.detach().double() - reference.detach()).abs().max().item()
    return distance / max(reference.abs().max().item(), 1e-30) if distance == distance else float("inf")
