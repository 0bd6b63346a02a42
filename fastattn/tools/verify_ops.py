"""Checks the numerics rule on every op: every mask x bias x dtype x direction."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastattn.errors import FallbackWarning, UnsupportedError
from fastattn.tools.numerics import Figure, figure
from fastattn.tools.op_case import OpCase, Tensors
from fastattn.tools.op_cases import cases
from fastattn.tools.table import error, table, verdict

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Direction = str  # "forward" | "backward"


class OpResult(NamedTuple):
    """One row of the table: a call in a dtype and a direction, with the figures of each output or gradient."""

    op: str
    mask: str
    variant: str
    dtype: torch.dtype
    direction: Direction
    figures: tuple[Figure, ...]
    refused: str | None = None

    @property
    def ok(self) -> bool:
        return all(f.ok for f in self.figures)

    @property
    def worst(self) -> Figure:
        return max(self.figures, key=lambda f: (not f.ok, f.strain))


class OpReport(NamedTuple):
    """What :func:`verify_ops` found."""

    results: tuple[OpResult, ...]

    @property
    def ok(self) -> bool:
        return all(r.ok for r in self.results)

    def __str__(self) -> str:
        return f"{self.table()}\n\n{self.summary()}"

    def table(self, only_failures: bool = False) -> str:
        """Returns a row a result; of its outputs or gradients the one nearest to a bound is shown.

        ``only_failures`` keeps the rows that fail.
        """
        return table(
            HEADERS,
            [row(r) for r in self.results if not (only_failures and r.ok)],
            left=(0, 1, 2, 3, 4, 5),
        )

    def summary(self) -> str:
        checked = [r for r in self.results if r.refused is None]
        failed = [r for r in checked if not r.ok]
        figures = [f for r in checked for f in r.figures]
        lines = [f"{len(checked)} rows, {len(figures)} tensors compared with float64: {len(failed)} rows fail."]
        if len(checked) < len(self.results):
            lines.append(f"{len(self.results) - len(checked)} rows were refused by the backend and not checked.")
        if figures:
            worst = max(checked, key=lambda r: r.worst.strain)
            call = f"{worst.op} ({', '.join(_labels(worst))})"
            lines.append(f"Nearest to its bound: {worst.worst.name} of {call} at {worst.worst.strain:.2f} of it.")
            better = sum(f.ours.max <= f.eager.max for f in figures)
            lines.append(f"At most eager PyTorch's own largest error: {better} of {len(figures)} tensors.")
        return "\n".join(lines)


HEADERS = (
    "op",
    "mask",
    "variant",
    "dtype",
    "direction",
    "worst",
    "max err",
    "eager's",
    "bound",
    "mean err",
    "eager's",
    "bound",
    "",
)


def row(result: OpResult) -> list[str]:
    start = [result.op, result.mask, result.variant, _short(result.dtype), result.direction]
    if result.refused is not None:
        return [*start, "refused", *([""] * 6), "-"]
    f = result.worst
    numbers = (f.ours.max, f.eager.max, f.max_bound, f.ours.mean, f.eager.mean, f.mean_bound)
    return [*start, f.name, *map(error, numbers), verdict(result.ok)]


def verify_ops(
    *,
    ops: Iterable[str] | None = None,
    dtypes: Sequence[torch.dtype] = DTYPES,
    backend: str | None = None,
    device: str = "cpu",
    on_result: Callable[[OpResult], None] | None = None,
) -> OpReport:
    """Compares every op with the float64 reference, beside eager PyTorch in the same dtype.

    ``max|x - ref| <= 2 max|eager - ref| + 2 ulp`` and ``mean|x - ref| <= 1.5 mean|eager - ref|`` for every output and
    every gradient.

    Args:
        ops: names of the ops; by default all.
        dtypes: of the inputs.
        backend: which to check; by default each call's automatic choice.
        device: of the inputs.
        on_result: called with each row as it is found.

    Returns:
        A report; ``report.ok`` is False if any row fails, ``print(report)`` shows the table.

    Raises:
        ValueError: an op or a backend has an unknown name.
    """
    results = []
    for case in cases(ops):
        for dtype in dtypes:
            for result in check(case, dtype, backend, device):
                results.append(result)
                if on_result is not None:
                    on_result(result)
    return OpReport(tuple(results))


def check(case: OpCase, dtype: torch.dtype, backend: str | None, device: str = "cpu") -> Iterator[OpResult]:
    """Yields the forward and, where it has gradients, the backward row of a call; one row if the backend refuses it."""
    head = (case.op, case.mask, case.variant, dtype)
    ours, eager, reference = [], [], []
    for seed in range(case.draws):
        tensors = {name: t.to(device, dtype) for name, t in case.tensors(seed).items()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FallbackWarning)
            try:
                ours.append(_run(lambda t: case.ours(t, backend), tensors, case.has_gradients))
            except UnsupportedError as refusal:
                yield OpResult(*head, "forward", (), str(refusal))
                return
        eager.append(_run(case.eager, tensors, case.has_gradients))
        wide = {name: t.double() for name, t in tensors.items()}
        reference.append(_run(lambda t: case.ours(t, "reference"), wide, case.has_gradients))
    for k, direction in enumerate(("forward", "backward")[: 1 + case.has_gradients]):
        figures = []
        for name in ours[0][k]:
            mine, theirs, exact = (
                torch.cat([run[k][name].flatten() for run in runs]) for runs in (ours, eager, reference)
            )
            figures.append(figure(name, mine, theirs.to(mine.dtype), exact))
        yield OpResult(*head, direction, tuple(figures))


def _run(
    function: Callable[[Tensors], Tensors], tensors: Tensors, has_gradients: bool = True
) -> tuple[Tensors, Tensors]:
    """Returns the outputs of ``function`` and the gradients of a fixed random combination of them, if it has any."""
    if not has_gradients:
        return function(tensors), {}
    leaves = {name: t.detach().clone().requires_grad_() for name, t in tensors.items()}
    outputs = function(leaves)
    generator = torch.Generator().manual_seed(1)
    total: Tensor | float = 0.0
    for out in outputs.values():
        # bfloat16 numbers, so that every dtype multiplies by the same ones.
        weight = torch.randn(out.shape, generator=generator, dtype=torch.float64).bfloat16().to(out.device, out.dtype)
        # An empty row's lse is -inf, and would make the sum and not the gradient infinite.
        total = total + torch.where(out.isfinite(), out * weight, 0.0).sum().double()
    assert isinstance(total, Tensor)
    grads = torch.autograd.grad(total, list(leaves.values()))
    return outputs, {f"d{name}": g for name, g in zip(leaves, grads, strict=True)}


def _labels(result: OpResult) -> list[str]:
    return [label for label in (result.mask, result.variant, _short(result.dtype), result.direction) if label]


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
