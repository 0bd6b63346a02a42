"""Writes into README.md and docs/ the figures that they quote from benchmarks/results; with --check only compares.

A page says between two comments what it quotes, and this script writes what stands there:

    <!-- quote: ratio family=model row=train_step-* dtype=float32 -->1.05<!-- end -->

After the kind come conditions on a row's fields, with ``*`` and ``|`` (either) in their values.  Kinds:

    ratio, share, rate, error   of the rows that match: the figure, or the lowest and the highest of several
    mean, lowest                of their ratios: the geometric mean, or the smallest
    time peer=NAME              a call's median; ours without a peer
    peers                       who was the best peer, and in how many rows
    limit name=read             a measured limit of the machine
    table family=NAME           ratios, a column a row and a line a direction and dtype
    summary [family=NAME]       the mean and the lowest ratio of each family, direction and dtype
    file NAME                   a text file of benchmarks/results
    checkpoint KEY [KEY]        from the metadata of the shipped model

Every kind takes ``results=FILE``; the default is the only .jsonl file of benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from fastattn.tools.bench import families, report
from fastattn.tools.table import seconds

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
CHECKPOINT = ROOT / "fastattn" / "data" / "g2p" / "config.json"
PAGES = ("README.md", "docs/*.md", "benchmarks/README.md")

_QUOTE = re.compile(r"<!-- quote: (?P<asked>.*?) -->(?P<text>.*?)<!-- end -->", re.DOTALL)
# What a page may not say on its own: a time, a rate or a speed-up.
_FIGURE = re.compile(
    r"\d[\d.,]*\s?(?:[num\u00b5]s\b|GFLOP/s|GB/s|tokens?/s|(?:x|times) (?:as fast|faster|slower|torch))"
)
_SPEED_SECTION = re.compile(r"^## How fast$.*?(?=^## |\Z)", re.DOTALL | re.MULTILINE)
_ACTIVATIONS = {"relu": "ReLU", "gelu": "GELU", "swiglu": "SwiGLU"}
_DECIMAL = re.compile(r"(?<![\w.])\d+\.\d+(?![\w.])")

Line = Mapping[str, Any]


def pages(root: Path = ROOT) -> list[Path]:
    """Returns the pages that may quote figures."""
    return sorted(page for pattern in PAGES for page in root.glob(pattern))


def rewritten(text: str) -> str:
    """Returns a page with all that it quotes brought up to date.

    Raises:
        ValueError: a quotation matches nothing, or is not understood; the message holds it.
    """

    def fill(match: re.Match[str]) -> str:
        asked = match["asked"]
        try:
            found = quoted(asked)
        except (LookupError, ValueError, OSError) as error:
            raise ValueError(f"<!-- quote: {asked} -->: {error}") from error
        # Tables and files stand on lines of their own.
        found = f"\n{found}\n" if "\n" in found else found
        return f"<!-- quote: {asked} -->{found}<!-- end -->"

    return _QUOTE.sub(fill, text)


def unsupported(text: str) -> list[str]:
    """Returns figures of speed that a page gives without quoting them: a time or rate anywhere, and any decimal number
    where it speaks of nothing but speed."""
    own = _QUOTE.sub("", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))
    found = [match.group() for match in _FIGURE.finditer(own)]
    for section in _SPEED_SECTION.finditer(own):
        found += _DECIMAL.findall(section.group())
    return found


def quoted(asked: str) -> str:
    """Returns what a quotation stands for.

    Raises:
        LookupError: nothing matches.
        ValueError: the kind is unknown.
    """
    kind, *words = shlex.split(asked)
    conditions = dict(word.split("=", 1) for word in words if "=" in word)
    names = [word for word in words if "=" not in word]
    if kind == "file":
        (name,) = names
        return "```text\n" + (RESULTS / name).read_text(encoding="utf-8").rstrip("\n") + "\n```"
    if kind == "checkpoint":
        return _checkpoint(names)
    lines = read(conditions.pop("results", None))
    if kind == "limit":
        return _limit(lines, conditions["name"])
    if kind not in _KINDS:
        raise ValueError(f"kind must be one of {', '.join([*_KINDS, 'limit', 'file', 'checkpoint'])}, got {kind!r}")
    peer = conditions.pop("peer", None)
    found = [line for line in report.latest(lines) if _matches(line, conditions)]
    if kind in ("ratio", "mean", "lowest"):  # not of a row without a peer whose answer was right
        found = [line for line in found if "ratio" in line]
    if not found:
        raise LookupError("no row of the results matches")
    if kind == "time":
        return _range([line["times_us"][peer or "fastattn"]["median"] for line in found], seconds)
    return _KINDS[kind](found)


def read(name: str | None = None) -> list[dict[str, Any]]:
    """Returns the lines of a results file.

    Raises:
        LookupError: no name is given, and there is not exactly one file.
    """
    files = sorted(RESULTS.glob(name or "*.jsonl"))
    if len(files) != 1:
        raise LookupError(f"results={name or '*.jsonl'} names {len(files)} files, expected one")
    return [json.loads(line) for line in files[0].read_text(encoding="utf-8").splitlines() if line.strip()]


def _matches(line: Line, conditions: Mapping[str, str]) -> bool:
    backend = {"backend": "auto"}
    return all(
        any(fnmatchcase(str({**backend, **line}[field]), choice) for choice in value.split("|"))
        for field, value in {**backend, **conditions}.items()
    )


def _range(values: Iterable[float], written: Callable[[float], str]) -> str:
    low, high = (written(value) for value in _ends(values))
    return low if low == high else f"{low} to {high}"


def _ends(values: Iterable[float]) -> tuple[float, float]:
    found = list(values)
    return min(found), max(found)


def _ratio(value: float) -> str:
    return f"{value:.2f}"


def _mean(lines: Sequence[Line]) -> str:
    return _ratio(math.exp(sum(math.log(line["ratio"]) for line in lines) / len(lines)))


def _rate(lines: Sequence[Line]) -> str:
    (unit,) = {line["unit"] for line in lines}
    digits = 1 if unit == "us" else 0
    return _range((line["rate"] for line in lines), lambda value: f"{value:.{digits}f}") + f" {unit}"


def _peers(lines: Sequence[Line]) -> str:
    counted = Counter(line["best_peer"] for line in lines if "best_peer" in line)
    return ", ".join(f"{name} ({count})" for name, count in counted.most_common())


def _limit(lines: Sequence[Line], name: str) -> str:
    found = [line["limits"][name] for line in lines if line.get("limits")]
    if not found:
        raise LookupError("the results hold no measured limits")
    return f"{found[-1]:.0f} " + ("GB/s" if name in ("read", "copy") else "GFLOP/s")


def _table(lines: Sequence[Line]) -> str:
    """A line a direction and dtype, a column a row of the grid."""
    (family,) = {line["family"] for line in lines}
    rows = list(dict.fromkeys(line["row"] for line in lines))
    grid = [name for name, _ in families.rows(family)]
    rows.sort(key=lambda row: grid.index(row) if row in grid else len(grid))
    ratios = {(line["direction"], line["dtype"], line["row"]): line.get("ratio") for line in lines}
    titles = list(dict.fromkeys((line["direction"], line["dtype"]) for line in lines))
    # Forward before backward, however the runs came.
    titles.sort(key=lambda title: [line["direction"] for line in lines].index(title[0]))
    table = [[f"{family.replace('_', '-')} row", *map(_label, rows)], ["---"] * (len(rows) + 1)]
    for direction, dtype in titles:
        found = [ratios.get((direction, dtype, row)) for row in rows]
        table.append([f"{direction}, {dtype}", *("" if ratio is None else _ratio(ratio) for ratio in found)])
    return _markdown(table)


def _label(row: str) -> str:
    """2048x512x2048xrelu as 2048 x 512 x 2048, ReLU."""
    name, _, sizes = row.rpartition(" ")
    if not re.fullmatch(r"\d+(x\w+)+", sizes):
        return row
    numbers = [part for part in sizes.split("x") if part.isdigit()]
    words = [_ACTIVATIONS.get(word, word) for word in re.findall(r"x([a-z]\w*)$", sizes)]
    return ", ".join([" ".join(filter(None, [name, " x ".join(numbers)])), *words])


def _summary(lines: Sequence[Line]) -> str:
    table = [["what", "rows", "geometric mean", "lowest"], ["---"] * 4]
    for found in report.summaries(dict(line) for line in lines):
        what = f"{found.family.replace('_', '-')}, {found.direction}, {found.dtype}"
        table.append([what, str(found.rows), _ratio(found.mean), f"{_ratio(found.lowest)} ({found.lowest_row})"])
    return _markdown(table)


def _markdown(table: Sequence[Sequence[str]]) -> str:
    return (
        "\n".join("| " + " | ".join(cells) + " |" for cells in table).replace("| --- ", "|---").replace("--- |", "---|")
    )


def _checkpoint(keys: Sequence[str]) -> str:
    value = json.loads(CHECKPOINT.read_text(encoding="utf-8"))["metadata"]
    for key in keys:
        value = value[key]
    return f"{value:,}" if isinstance(value, int) else str(value)


_KINDS: dict[str, Callable[[Sequence[Line]], str]] = {
    "ratio": lambda lines: _range((line["ratio"] for line in lines), _ratio),
    "share": lambda lines: _range((line["share"] for line in lines), lambda value: f"{value:.0%}"),
    "error": lambda lines: _range((line["error"] for line in lines), lambda value: f"{value:.0e}"),
    "rate": _rate,
    "mean": _mean,
    "lowest": lambda lines: _ratio(min(line["ratio"] for line in lines)),
    "peers": _peers,
    "time": lambda lines: "",
    "table": _table,
    "summary": _summary,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Brings the pages up to date; returns 1 if one was not and was only to be checked, or says a figure on its own."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="changes nothing; exit status 1 if anything would change")
    check = parser.parse_args(arguments).check
    status = 0
    for page in pages():
        text = page.read_text(encoding="utf-8")
        name, new = page.relative_to(ROOT), rewritten(text)
        if new != text:
            print(f"{name}: {'differs from' if check else 'brought up to date with'} benchmarks/results")
            status |= check
            if not check:
                page.write_text(new, encoding="utf-8")
        for figure in unsupported(new):
            print(f"{name}: {figure!r} is quoted from no results file")
            status = 1
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
