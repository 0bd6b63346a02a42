"""``fastattn bench``: every answer is checked against float64, then timed beside its peers, in turns, in one
process."""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastattn.errors import FallbackWarning, UnsupportedError
from fastattn.tools import info
from fastattn.tools.bench import peers
from fastattn.tools.bench.case import Case
from fastattn.tools.bench.families import FAMILIES, cases
from fastattn.tools.measure import Timing, time_in_turns
from fastattn.tools.table import heading, seconds, table

# Of the largest element.  A wrong kernel is off by far more; how exact a right one is, `fastattn verify` says.
_TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
# In operations: what a quick run still takes a second for.
_QUICK_WORK = 2e10


class Result(NamedTuple):
    """A row of the table; ``timings`` is empty where the answer was wrong or nobody serves the call."""

    case: Case
    dtype: torch.dtype
    error: float
    timings: dict[str, Timing]
    note: str = ""

    @property
    def ok(self) -> bool:
        return self.note in ("", "refused")

    @property
    def best_peer(self) -> str:
        return min((name for name in self.timings if name != "fastattn"), key=lambda name: self.timings[name].median)

    @property
    def ratio(self) -> float:
        """The best peer's time over ours."""
        return self.timings[self.best_peer].median / self.timings["fastattn"].median

    @property
    def rate(self) -> float:
        """What ``case.unit`` says."""
        return self.case.work / self.timings["fastattn"].median / 1e3


def run(
    families: Sequence[str], names: Sequence[str] | None, dtypes: Sequence[torch.dtype], quick: bool, out: Path | None
) -> int:
    """Prints a table a family, each row when it is done; returns 0, or 1 if an answer was wrong.

    Args:
        families: tables of the grid; all if empty.
        names: rows; all if None.
        dtypes: of the inputs.
        quick: leaves out what takes long and times the rest more briefly.
        out: appends the environment and each row as a JSON line to this file.

    Raises:
        ValueError: a family or row is unknown.
    """
    families = list(families) or list(FAMILIES)
    for family in families:
        next(cases(family, torch.float32, ()), None)  # an unknown name is refused before anything is timed
    environment = info.environment()
    print(", ".join(f"{name} {value}" for name, value in environment.items() if name not in ("system", "python")))
    lines = [{"environment": environment, "time": time.strftime("%Y-%m-%dT%H:%M:%S")}]
    results = []
    for family in families:
        print("\n" + heading(family))
        found = []
        for dtype in dtypes:
            for case in cases(family, dtype, names):
                if quick and case.work > _QUICK_WORK:
                    continue
                result = measure(case, dtype, 0.3 if quick else 1.5)
                found.append(result)
                lines.append(as_json(result))
                _progress(f"  {case.name}, {case.direction}, {_short(dtype)}: {result.note or 'done'}")
        if found:
            _progress("")
            print(table(HEADERS, [row(r) for r in found], left=(0, 1, 2)), flush=True)
        results += found
    if names is not None and not results:
        raise ValueError(f"no row of {', '.join(families)} has a name in {list(names)}")
    if out is not None:
        with out.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
        print(f"\n{len(lines) - 1} rows appended to {out}")
    return 0 if all(r.ok for r in results) else 1


def _progress(text: str) -> None:
    """Writes over the present line of a terminal; a file gets the tables alone."""
    if sys.stdout.isatty():
        print(f"\r{text:<78}\r", end="", flush=True)


def measure(case: Case, dtype: torch.dtype, budget: float) -> Result:
    """Checks a case and, if its answer is right, times it; ``budget`` is in seconds for each of those that are
    timed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        try:
            error = case.error()
        except UnsupportedError:
            return Result(case, dtype, float("nan"), {}, "refused")
        if not error <= _TOLERANCE[dtype] * case.tolerance:
            return Result(case, dtype, error, {}, "WRONG")
        calls = {"fastattn": case.ours, **peers.calls(case.workload)}
        timings = time_in_turns(list(calls.values()), budget=budget * len(calls))
    return Result(case, dtype, error, dict(zip(calls, timings, strict=True)))


HEADERS = ("row", "direction", "dtype", "fastattn", "p20 - p80", "rate", "best peer", "its time", "ratio", "error")


def row(result: Result) -> list[str]:
    case = result.case
    start = [case.name, case.direction, _short(result.dtype)]
    if not result.timings:
        return [*start, result.note, *([""] * 5), f"{result.error:.0e}"]
    ours, peer = result.timings["fastattn"], result.timings[result.best_peer]
    return [
        *start,
        seconds(ours.median),
        f"{seconds(ours.p20)} - {seconds(ours.p80)}",
        f"{result.rate:.1f} {case.unit}",
        result.best_peer,
        seconds(peer.median),
        f"{result.ratio:.2f} x",
        f"{result.error:.0e}",
    ]


def as_json(result: Result) -> dict[str, Any]:
    """Returns a row of a results file; times are in microseconds."""
    case = result.case
    line: dict[str, Any] = {
        "family": case.family,
        "row": case.name,
        "direction": case.direction,
        "dtype": _short(result.dtype),
        "error": result.error,
    }
    if not result.timings:
        return {**line, "note": result.note}
    times = {name: t._asdict() for name, t in result.timings.items()}
    return {
        **line,
        "times_us": times,
        "best_peer": result.best_peer,
        "ratio": result.ratio,
        "rate": result.rate,
        "unit": case.unit,
    }


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
