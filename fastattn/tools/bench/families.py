"""The grid: which rows there are, and the cases that each family makes of them."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import resources
from typing import Any

import torch

from fastattn.tools.bench import attention, decode, feed_forward, model, module, softmax
from fastattn.tools.bench.case import Case

FAMILIES: dict[str, Callable[[str, Any, torch.dtype], Iterator[Case]]] = {
    "attention": attention.cases,
    "decode": decode.cases,
    "softmax": softmax.cases,
    "feed_forward": feed_forward.cases,
    "module": module.cases,
    "model": model.cases,
}


def grid() -> dict[str, Any]:
    """Returns the shapes on which speed is judged."""
    return tomllib.loads(resources.files("fastattn.tools.bench").joinpath("grid.toml").read_text(encoding="utf-8"))


def cases(family: str, dtype: torch.dtype, names: Sequence[str] | None) -> Iterator[Case]:
    """Yields the cases of a family in a dtype, built one at a time, so that one row's tensors are held at a time.

    Raises:
        ValueError: there is no such family.
    """
    if family not in FAMILIES:
        raise ValueError(f"family must be one of {', '.join(map(repr, FAMILIES))}, got {family!r}")
    for name, row in _rows(grid()[family]):
        if name != "gpu" and (names is None or name in names):
            yield from FAMILIES[family](name, row, dtype)


def _rows(table: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yields each row of a table and its name; rows that stand under a task's name instead of "rows" hold it, too."""
    for task, rows in table.items():
        # A table in the table is for GPUs.
        for row in () if isinstance(rows, Mapping) else rows:
            if task != "rows":
                yield "-".join((task, "x".join(map(str, row.values())))), {**row, "task": task}
            else:
                yield (row["name"] if isinstance(row, Mapping) else "x".join(map(str, row))), row
