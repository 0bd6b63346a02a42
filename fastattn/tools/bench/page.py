"""A benchmark run as one self-contained page, and its plots as PNG files.

Everything comes from the lines of a results file, so that a page can be drawn again from a committed run.
"""

from __future__ import annotations

import base64
import html
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastattn.tools.bench import plots, report
from fastattn.tools.bench.limits import Limits
from fastattn.tools.table import megabytes, seconds

_CSS = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 66rem; padding: 0 1rem; color: #1d2433; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2.4rem; } h3 { font-size: 1rem; margin: 1.4rem 0 .3rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px; }
th, td { padding: .2rem .6rem; text-align: right; border-bottom: 1px solid #e1e5ec; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } td.best { font-weight: 600; }
td.behind { color: #a61b1b; } td.ahead { color: #1b6e34; } td.wrong { color: #a61b1b; font-weight: 600; }
img { width: 100%; height: auto; } dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; }
dt, p.small { color: #5a6475; } dd { margin: 0; } .scroll { overflow-x: auto; }
"""
_MISSING = 'no plots: matplotlib is not installed; pip install "fastattn[demo]" brings it'


def read(path: Path) -> list[dict[str, Any]]:
    """Returns the lines of a results file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def missing() -> str | None:
    """Returns why a page has no plots, if it has none."""
    try:
        return None if importlib.util.find_spec("matplotlib") is not None else _MISSING
    except ValueError:  # a name in sys.modules without a specification
        return _MISSING


def write(lines: Sequence[dict[str, Any]], folder: Path) -> list[Path]:
    """Writes ``report.html`` and a PNG of each plot into ``folder``; returns their paths."""
    drawn = [] if missing() else plots.draw(report.latest(lines), limits(lines))
    page = folder / "report.html"
    page.write_text(_page(lines, drawn), encoding="utf-8")
    written = [page]
    for plot in drawn:
        written.append(folder / f"{plot.name}.png")
        written[-1].write_bytes(plot.png)
    return written


def limits(lines: Sequence[dict[str, Any]]) -> Limits | None:
    """Returns the limits that were measured last."""
    found = [line["limits"] for line in lines if line.get("limits")]
    return Limits(**found[-1]) if found else None


def _page(lines: Sequence[dict[str, Any]], drawn: Sequence[plots.Plot]) -> str:
    first: dict[str, Any] = next((line for line in reversed(lines) if "environment" in line), {"environment": {}})
    measured = limits(lines)
    environment = {**first["environment"], "time": first.get("time", "")}
    others = [line["other_cores"] for line in lines if line.get("other_cores") is not None]
    if others:
        environment["cores kept busy by other processes"] = others[-1]
    parts = ["<h1>fastattn benchmark</h1>", _definitions(environment)]
    if measured is not None:
        parts += ["<h2>Limits of the machine, measured in the same run</h2>", _definitions(measured.described())]
    if first.get("not_here"):
        parts += ["<h2>Peers that could not run here</h2>", _definitions(first["not_here"])]
    parts.append("<h2>Summary</h2>" + _summary(lines))
    if missing():
        parts.append(f"<p>{html.escape(_MISSING)}</p>")
    for plot in drawn:
        picture = base64.b64encode(plot.svg).decode()
        parts.append(
            f"<h2>{html.escape(plot.title)}</h2>"
            f'<img alt="{html.escape(plot.title)}" src="data:image/svg+xml;base64,{picture}">'
            f'<p class="small">{html.escape(plot.caption)}</p>'
        )
    parts.append("<h2>All rows</h2>" + _REMARK)
    timed = report.latest(lines)
    wrong = [line for line in lines if line.get("note") == "WRONG"]
    for (family, dtype, direction, backend), own in report.grouped([*timed, *wrong]).items():
        title = ", ".join([family, dtype, direction, *([] if backend == "auto" else [f"backend {backend}"])])
        parts.append(f"<h3>{html.escape(title)}</h3>{_table(own)}")
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>fastattn benchmark</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_CSS}</style>{"".join(parts)}</html>\n'
    )


_REMARK = (
    '<p class="small">Medians; behind them the 20th and 80th percentile, in per cent of the median. All calls of a row '
    "were timed in turns in one process, after fastattn's answer had been checked against float64 (error: over the "
    "largest element), and the peers' too. Of limit: of the bandwidth, of bfloat16 products, or of float32 "
    "multiply-adds, which products of bfloat16 pieces on AMX can exceed. Memory: the peak beyond the inputs, outputs "
    "included. An empty cell: that peer does not offer the call, or its answer was wrong.</p>"
)


def _definitions(pairs: dict[str, Any]) -> str:
    items = (f"<dt>{html.escape(str(k))}</dt><dd>{html.escape(str(v))}</dd>" for k, v in pairs.items())
    return f"<dl>{''.join(items)}</dl>"


def _summary(lines: Sequence[dict[str, Any]]) -> str:
    body = [
        [s.family, s.dtype, s.direction, s.backend, f"{s.rows}", f"{s.mean:.2f}", f"{s.lowest:.2f}", s.lowest_row]
        for s in report.summaries(lines)
    ]
    head = ("family", "dtype", "direction", "backend", "rows", "geometric mean of ratios", "lowest", "in row")
    return _html_table(head, [[(cell, "") for cell in row] for row in body])


def _table(lines: Sequence[dict[str, Any]]) -> str:
    """All that was measured of a group: ours, and every peer."""
    others = list(dict.fromkeys(n for line in lines for n in line.get("times_us", {}) if n != "fastattn"))
    unit = next((line["unit"] for line in lines if "unit" in line), "")
    head = ["row", "fastattn", "beyond best" if unit == "us" else unit, "of limit", "ratio", "error", "memory", *others]
    return _html_table(head, [_cells(line, others) for line in lines])


def _cells(line: dict[str, Any], others: Sequence[str]) -> list[tuple[str, str]]:
    error = "" if line["error"] is None else f"{line['error']:.0e}"
    if "times_us" not in line:
        return [(line["row"], ""), ("wrong: not timed", "wrong"), *([("", "")] * 3), (error, "wrong"), ("", "")]
    times, share, ratio = line["times_us"], line.get("share"), line.get("ratio")
    memory = line.get("memory_bytes", {})
    found = [
        (line["row"], ""),
        (f"{seconds(times['fastattn']['median'])} {report.spread(times['fastattn'])}", ""),
        (f"{line['rate']:+.1f} us" if line["unit"] == "us" else f"{line['rate']:.4g}", ""),
        ("" if share is None else f"{share:.0%}", ""),
        ("" if ratio is None else f"{ratio:.2f}", "" if ratio is None else "ahead" if ratio >= 1 else "behind"),
        (error, ""),
        (megabytes(memory["fastattn"]) if memory else "", ""),
    ]
    for name in others:
        cell = f"{seconds(times[name]['median'])} {report.spread(times[name])}" if name in times else ""
        if cell and memory.get(name) is not None:
            cell += f", {megabytes(memory[name])}"
        found.append((cell, "best" if name == line.get("best_peer") else ""))
    return found


def _html_table(head: Sequence[str], body: Sequence[Sequence[tuple[str, str]]]) -> str:
    rows = "".join(
        "<tr>"
        + "".join(
            f'<td class="{kind}">{html.escape(t)}</td>' if kind else f"<td>{html.escape(t)}</td>" for t, kind in row
        )
        + "</tr>"
        for row in body
    )
    titles = "".join(f"<th>{html.escape(h)}</th>" for h in head)
    return f'<div class="scroll"><table><tr>{titles}</tr>{rows}</table></div>'
