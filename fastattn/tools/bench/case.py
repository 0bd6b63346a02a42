"""One figure of the benchmark, and what its families share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastattn.tools.bench.workload import Workload

SEED = 11


@dataclass(frozen=True, eq=False, kw_only=True)
class Case:
    """One figure of the benchmark.

    Attributes:
        family: of rows.
        name: of the row.
        direction: "forward", "forward + backward", or how a module or model is called.
        shape: the row as the grid has it.
        ours: runs it on fastattn.
        workload: what is computed, for peers to run it too; None where none does.
        peers: of them, the only ones that matter here; None for all.
        others: further calls by name, to be compared with like peers.
        before: what runs untimed before a call of that name ("fastattn" is ours).
        error: returns the largest error of ours against float64, over the largest element.
        tolerance: how many times the error of a single op is allowed.
        flops: floating point operations of one run.
        moved: bytes of its inputs and outputs.
        unit: "GFLOP/s" or "GB/s", what the rate is shown in; "us" for the time beyond the best peer's.
        bandwidth: "read" or "copy": which of the measured limits GB/s are held against.
        only_backend: the backend that the call is bound to; None where it obeys ``use_backend``.
    """

    family: str
    name: str
    direction: str
    shape: Any = None
    ours: Callable[[], Any]
    workload: Workload | None = None
    peers: tuple[str, ...] | None = None
    others: Mapping[str, Callable[[], Any]] = field(default_factory=dict)
    before: Mapping[str, Callable[[], Any]] = field(default_factory=dict)
    error: Callable[[], float]
    tolerance: float = 1.0
    flops: float = 0.0
    moved: float = 0.0
    unit: str = "GFLOP/s"
    bandwidth: str = "read"
    only_backend: str | None = None

    @property
    def work(self) -> float:
        """What the rate counts of one run."""
        return self.moved if self.unit == "GB/s" else self.flops


def relative(value: Tensor, reference: Tensor) -> float:
    """Returns the largest difference over the largest element of ``reference``; infinite where there is a NaN."""
    distance = (value.detach().double() - reference.detach()).abs().max().item()
    return distance / max(reference.abs().max().item(), 1e-30) if distance == distance else float("inf")


def size(tensors: Sequence[Tensor]) -> float:
    """Returns how many bytes the tensors hold."""
    return float(sum(t.numel() * t.element_size() for t in tensors))


class Draw:
    """Normal random tensors of a dtype from a stream of their own, drawn on their device."""

    def __init__(self, dtype: torch.dtype, device: str = "cpu") -> None:
        self._generator = torch.Generator(device).manual_seed(SEED)
        self._dtype = dtype
        self._device = device

    def __call__(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=self._generator, device=self._device) * scale).to(self._dtype)


def timed(
    function: Callable[..., Any],
    tensors: Sequence[Tensor],
    dout: Tensor | Sequence[Tensor] | None = None,
    *,
    backward: bool = False,
    alone: bool = False,
) -> Callable[[], Any]:
    """Returns the call that is timed: ``function(*tensors)`` without gradients, or the gradients of ``tensors``.

    With ``alone`` the first call runs the function, and every call computes the gradients from that run.
    """
    if not backward:
        return torch.no_grad()(lambda: function(*tensors))
    leaves = [t.detach().requires_grad_() for t in tensors]
    if not alone:
        return lambda: torch.autograd.grad(function(*leaves), leaves, dout)
    recorded: list[Tensor] = []

    def gradients() -> Any:
        if not recorded:
            recorded.append(function(*leaves))
        return torch.autograd.grad(recorded[0], leaves, dout, retain_graph=True)

    return gradients


def largest_error(
    ours: Callable[..., Tensor],
    exact: Callable[..., Tensor],
    tensors: Sequence[Tensor],
    dout: Tensor,
    backward: bool,
) -> float:
    """Returns the largest error of ``ours``, or of any of its gradients, against ``exact`` in float64."""
    leaves = [t.detach().requires_grad_(backward) for t in tensors]
    wide = [t.detach().double().requires_grad_(backward) for t in tensors]
    found, wanted = ours(*leaves), exact(*wide)
    if not backward:
        return relative(found, wanted)
    grads = torch.autograd.grad(found, leaves, dout), torch.autograd.grad(wanted, wide, dout.double())
    return max(relative(g, w) for g, w in zip(*grads, strict=True))
