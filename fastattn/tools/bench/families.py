"""The grid: which rows there are, and the cases that each family makes of them."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import resources
from typing import Any

import torch

from fastattn.tools.bench import (
    attention,
    decode,
    feed_forward,
    linear_cross_entropy,
    model,
    module,
    overhead,
    packed,
    positions,
    scaling,
    softmax,
    threads,
)
from fastattn.tools.bench.case import Case

FAMILIES: dict[str, Callable[[str, Any, torch.dtype, str], Iterator[Case]]] = {
    "attention": attention.cases,
    "decode": decode.cases,
    "packed": packed.packed_cases,
    "paged": packed.paged_cases,
    "softmax": softmax.cases,
    "feed_forward": feed_forward.cases,
    "linear_cross_entropy": linear_cross_entropy.cases,
    "rotary": positions.rotary_cases,
    "embedding": positions.embedding_cases,
    "module": module.cases,
    "model": model.cases,
    "overhead": overhead.cases,
    "threads": threads.cases,
    "scaling": scaling.cases,
}


def grid() -> dict[str, Any]:
    """Returns the shapes on which speed is judged."""
    return tomllib.loads(resources.files("fastattn.tools.bench").joinpath("grid.toml").read_text(encoding="utf-8"))


def cases(family: str, dtype: torch.dtype, names: Sequence[str] | None, device: str = "cpu") -> Iterator[Case]:
    """Yields the cases of a family in a dtype, built one at a time, so that one row's tensors are held at a time.

    Raises:
        ValueError: there is no such family.
    """
    for name, row in rows(family, names, device):
        yield from FAMILIES[family](name, row, dtype, device)


def rows(family: str, names: Sequence[str] | None = None, device: str = "cpu") -> list[tuple[str, Any]]:
    """Returns the rows of a family that are meant for a device, and their names.

    Raises:
        ValueError: there is no such family.
    """
    if family not in FAMILIES:
        raise ValueError(f"family must be one of {', '.join(map(repr, FAMILIES))}, got {family!r}")
    table = grid()[family]
    on_gpu = device != "cpu"
    # A table "gpu" stands for the CPU's rows, which are too small there; a row "gpu" is too large for a CPU.
    found = _named(table["gpu"] if on_gpu and "gpu" in table else table)
    return [(n, row) for n, row in found if (on_gpu or n != "gpu") and (names is None or n in names)]


def _named(table: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yields each row of a table and its name; rows that stand under a task's name instead of "rows" hold it, too."""
    for task, found in table.items():
        for row in () if isinstance(found, Mapping) else found:
            if task != "rows":
                yield "-".join((task, "x".join(map(str, row.values())))), {**row, "task": task}
            else:
                yield (row["name"] if isinstance(row, Mapping) else "x".join(map(str, row))), row
