"""Aligned tables for a terminal."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence


def table(headers: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int] = (0,), indent: int = 2) -> str:
    """Returns ``rows`` under ``headers``, each column as wide as its widest cell.

    Args:
        headers: one a column.
        rows: cells, as many as there are headers.
        left: columns whose cells stand at the left; the others, numbers mostly, at the right.
        indent: spaces before every line.
    """
    widths = [max(len(row[c]) for row in (headers, *rows)) for c in range(len(headers))]

    def line(cells: Sequence[str]) -> str:
        placed = (
            cell.ljust(width) if c in left else cell.rjust(width)
            for c, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return (" " * indent + "  ".join(placed)).rstrip()

    rule = " " * indent + "-" * (sum(widths) + 2 * (len(widths) - 1))
    return "\n".join([line(headers), rule, *(line(row) for row in rows)])


def collapse(names: Sequence[str]) -> str:
    """Returns one name for several that differ only in their numbers: "layers.0.norm", "layers.5.norm" ->
    "layers.0-5.norm"."""
    numbers = [re.findall(r"\d+", name) for name in names]
    ranges = []
    for column in zip(*numbers, strict=True):
        found = sorted({int(n) for n in column})
        ranges.append(str(found[0]) if len(found) == 1 else f"{found[0]}-{found[-1]}")
    texts = iter(ranges)
    return re.sub(r"\d+", lambda _: next(texts), names[0])


def heading(text: str) -> str:
    """Returns ``text`` in bold where the terminal can."""
    return paint(text, "1")


def verdict(ok: bool) -> str:
    return "pass" if ok else "FAIL"


def paint(text: str, code: str) -> str:
    """Returns ``text`` in an ANSI style, or as it is where standard output is no terminal or NO_COLOR is set."""
    if not sys.stdout.isatty() or "NO_COLOR" in os.environ:
        return text
    return f"\x1b[{code}m{text}\x1b[0m"


def seconds(value: float | None) -> str:
    """Returns a duration, given in microseconds, in the unit that reads best."""
    if value is None:
        return "n/a"
    for limit, unit, scale in ((1e3, "us", 1.0), (1e6, "ms", 1e3)):
        if value < limit:
            return f"{value / scale:.{_decimals(value / scale)}f} {unit}"
    return f"{value / 1e6:.{_decimals(value / 1e6)}f} s"


def megabytes(value: float | None) -> str:
    """Returns an amount of memory, given in bytes."""
    return "n/a" if value is None else f"{value / 2**20:.1f} MB"


def error(value: float) -> str:
    return f"{value:.1e}"


def _decimals(value: float) -> int:
    return 2 if value < 10 else 1 if value < 100 else 0
