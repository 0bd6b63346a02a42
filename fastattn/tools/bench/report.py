"""Lines of results as tables for a terminal of 120 columns."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from fastattn.tools.table import heading, megabytes, seconds, table

WIDTH = 120
_LONGEST_PEER = 20


class Summary(NamedTuple):
    """How the rows of one family, dtype, direction and backend compare with their best peers."""

    family: str
    dtype: str
    direction: str
    backend: str
    rows: int
    mean: float  # geometric, of the ratios
    lowest: float
    lowest_row: str


def latest(lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the rows that were timed; of one that was timed more than once, the last."""
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for line in lines:
        if "times_us" in line:
            key = line["family"], line["row"], line["direction"], line["dtype"], line.get("backend", "auto")
            found.pop(key, None)
            found[key] = line
    return list(found.values())


def grouped(lines: Iterable[dict[str, Any]]) -> dict[tuple[str, str, str, str], list[dict[str, Any]]]:
    """Returns the lines of each (family, dtype, direction, backend), in the order in which these come."""
    groups: dict[tuple[str, str, str, str], list[dict[str, Any]]] = {}
    for line in lines:
        key = line["family"], line["dtype"], line["direction"], line.get("backend", "auto")
        groups.setdefault(key, []).append(line)
    return groups


def summaries(lines: Iterable[dict[str, Any]]) -> list[Summary]:
    """Returns the summary of every group of the latest rows that has peers."""
    found = []
    for key, own in grouped(latest(lines)).items():
        ratios = {line["row"]: line["ratio"] for line in own if "ratio" in line}
        if ratios:
            lowest = min(ratios, key=ratios.__getitem__)
            mean = math.exp(sum(map(math.log, ratios.values())) / len(ratios))
            family, dtype, direction, backend = key
            found.append(Summary(family, dtype, direction, backend, len(ratios), mean, ratios[lowest], lowest))
    return found


def sentence(summary: Summary) -> str:
    name = "speed-up" if summary.family == "threads" else "ratio to the best peer"
    what = "row" if summary.rows == 1 else "rows"
    return (
        f"{name}: geometric mean {summary.mean:.2f} over {summary.rows} {what}, "
        f"lowest {summary.lowest:.2f} ({summary.lowest_row})"
    )


def text(lines: Sequence[dict[str, Any]]) -> str:
    """Returns a table for each dtype, direction and backend of one family's lines."""
    told = {s[:4]: sentence(s) for s in summaries(lines)}
    parts = []
    for key, own in grouped(lines).items():
        family, dtype, direction, backend = key
        title = ", ".join([family, dtype, direction, *([] if backend == "auto" else [f"backend {backend}"])])
        parts.append(f"{heading(title)}\n{table(headers(own), [cells(line) for line in own], left=(0, 5))}")
        if key in told:
            parts[-1] += f"\n  {told[key]}"
    return "\n\n".join(parts)


def headers(lines: Sequence[dict[str, Any]]) -> list[str]:
    unit = next((line["unit"] for line in lines if "unit" in line), "")
    return [
        "row",
        "fastattn",
        "p20-p80",
        "beyond" if unit == "us" else unit,
        "limit",
        "best peer",
        "its time",
        "ratio",
        "error",
        "memory",
    ]


def cells(line: dict[str, Any]) -> list[str]:
    """Returns the row of a table that a line makes."""
    error = "" if line["error"] is None else f"{line['error']:.0e}"
    if "times_us" not in line:
        return [line["row"], line["note"], *([""] * 6), error, ""]
    ours = line["times_us"]["fastattn"]
    peer = line.get("best_peer", "")
    share = line.get("share")
    return [
        line["row"],
        seconds(ours["median"]),
        spread(ours),
        f"{line['rate']:+.1f} us" if line["unit"] == "us" else f"{line['rate']:.4g}",
        "" if share is None else f"{share:.0%}",
        peer if len(peer) <= _LONGEST_PEER else peer[: _LONGEST_PEER - 3] + "...",
        seconds(line["times_us"][peer]["median"]) if peer else "",
        f"{line['ratio']:.2f}" if peer else "",
        error,
        megabytes(line["memory_bytes"]["fastattn"]) if line.get("memory_bytes") else "",
    ]


def spread(timing: dict[str, Any]) -> str:
    """Returns the 20th and 80th percentile, less and more than the median, in per cent of it."""
    low, high = (100 * (timing[name] / max(timing["median"], 1e-9) - 1) for name in ("p20", "p80"))
    return f"{low:+.0f}/{high:+.0f}%"
