"""The benchmark's plots: ratio bars, the roofline, and time and memory against seq_len."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

from fastattn.tools.bench.limits import Limits

INK, SOFT = "#1d2433", "#8a93a3"
# Distinguishable without colours too: each dtype has its hatching and its marker.
_DTYPES = {
    "float32": ("#2f6db3", "", "o"),
    "bfloat16": ("#c65d21", "///", "s"),
    "float16": ("#3d8f4e", "...", "^"),
}
KINDS = ("#2f6db3", "#c65d21", "#3d8f4e", "#7a5195", "#b0851a", "#3aa0a0", "#a61b52", "#5a6475")
_GUIDES = {1: (0, (1, 1)), 2: (0, (4, 3))}
_WIDTH = 9.0  # inches
_DPI = 110
_BARS = ("attention", "feed_forward", "linear_cross_entropy", "softmax", "module", "decode", "packed", "paged", "model")
_TICKS = (0.25, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10, 20, 50)

Line = dict[str, Any]


class Plot(NamedTuple):
    """A drawing in both forms; ``name`` is that of its file."""

    name: str
    title: str
    caption: str
    svg: bytes
    png: bytes


def draw(rows: Sequence[Line], limits: Limits | None) -> list[Plot]:
    """Returns the plots that the timed rows of a results file have data for.

    Raises:
        ImportError: matplotlib is not installed.
    """
    return [
        Plot(name, title, caption, render(picture, "svg", name), render(picture, "png", name))
        for name, title, caption, picture in _pictures(rows, limits)
    ]


def _pictures(rows: Sequence[Line], limits: Limits | None) -> Iterator[tuple[str, str, str, Callable[[Any], None]]]:
    rows = [r for r in rows if r.get("backend", "auto") == "auto"]
    for family in _BARS:
        own = [r for r in rows if r["family"] == family and "ratio" in r]
        if own:
            title = f"{family.replace('_', '-')}: best peer's time over fastattn's"
            caption = (
                "Bars to the right of 1: fastattn is faster. The best peer is the fastest of all that ran the row."
            )
            yield f"ratio-{family}", title, caption, partial(_ratio_bars, rows=own)
    intense = [
        r for r in rows if r.get("intensity") and r["family"] in ("attention", "feed_forward", "decode", "module")
    ]
    if limits is not None and intense:
        caption = (
            "Lines: the limits measured in the same run. A call whose inputs are in cache may lie above the slope, and "
            "a float32 feed-forward, which multiplies bfloat16 pieces on AMX tiles, above float32's own roof. Hollow: "
            "with backward."
        )
        yield "roofline", "Roofline", caption, partial(_roofline, rows=intense, limits=limits)
    lengths = [r for r in rows if r["family"] == "scaling"]
    for what, title in (("time", "Time against seq_len"), ("memory", "Peak memory against seq_len")):
        if lengths:
            caption = (
                f"{lengths[0]['dtype']}, one head, head_dim 64; forward and backward, of the entropy the forward "
                "alone. Dashed: torch SDPA, as far as it was run. Grey: growth with seq_len, and with its square."
            )
            yield f"scaling-{what}", title, caption, partial(_scaling, rows=lengths, what=what)


def render(picture: Callable[[Any], None], kind: str, name: str) -> bytes:
    """Returns what ``picture`` draws on a figure as "svg" or "png"."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Real text, and without the date and random names: the same results give the same bytes.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "hatch.linewidth": 0.6, "font.size": 9}):
        figure = Figure(figsize=(_WIDTH, 4.4), layout="constrained")
        FigureCanvasAgg(figure)
        picture(figure)
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, dpi=_DPI, metadata={"Date": None} if kind == "svg" else {"Software": None})
    return buffer.getvalue()


def _ratio_bars(figure: Any, rows: Sequence[Line]) -> None:
    """A panel a direction, a group of bars a row, a bar a dtype."""
    names = list(dict.fromkeys(row["row"] for row in rows))
    directions = list(dict.fromkeys(row["direction"] for row in rows))
    dtypes = [d for d in _DTYPES if any(row["dtype"] == d for row in rows)]
    height = 0.8 / len(dtypes)
    low = min(0.8, 0.85 * min(row["ratio"] for row in rows))
    high = 1.6 * max(1.0, *(row["ratio"] for row in rows))
    figure.set_figheight(1.4 + len(names) * max(0.24, 0.05 + 0.17 * len(dtypes)))
    panels = figure.subplots(1, len(directions), sharex=True, sharey=True, squeeze=False)[0]
    for axes, direction in zip(panels, directions, strict=True):
        for k, dtype in enumerate(dtypes):
            found = {r["row"]: r["ratio"] for r in rows if (r["dtype"], r["direction"]) == (dtype, direction)}
            colour, hatch, _ = _DTYPES[dtype]
            places = [i + (k - (len(dtypes) - 1) / 2) * height for i, name in enumerate(names) if name in found]
            ratios = [found[name] for name in names if name in found]
            # From 1 to the left or right: longer is further from a draw.
            axes.barh(
                places,
                [x - 1 for x in ratios],
                height,
                left=1,
                label=dtype,
                color=colour,
                hatch=hatch,
                edgecolor="white",
                linewidth=0.4,
            )
            for place, ratio in zip(places, ratios, strict=True):
                axes.text(max(ratio, 1) * 1.03, place, f"{ratio:.2f}", va="center", fontsize=7, color=INK)
        axes.axvline(1.0, color=INK, linewidth=1)
        axes.set_xscale("log")
        axes.set_xlim(low, high)
        ticks = [t for t in _TICKS if low <= t <= high]
        ticks = [t for t in ticks if t in (0.5, 1, 2, 5, 10, 20, 50)] if high / low > 4 else ticks
        axes.set_xticks(ticks, [f"{t:g}x" for t in ticks])
        axes.minorticks_off()
        axes.set_title(direction, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].invert_yaxis()
    figure.suptitle("best peer's time over fastattn's, log scale", fontsize=9, color=INK)
    if len(dtypes) > 1:
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(dtypes), frameon=False)


def _roofline(figure: Any, rows: Sequence[Line], limits: Limits) -> None:
    axes = figure.add_subplot()
    low, high = 0.5 * min(row["intensity"] for row in rows), 2 * max(row["intensity"] for row in rows)
    roofs = {"float32": limits.float32, "bfloat16": limits.bfloat16}
    top = max(roofs.values())
    axes.plot([low, top / limits.read], [low * limits.read, top], color=SOFT, linewidth=1)
    axes.annotate(f"read {limits.read:.0f} GB/s", (low, low * limits.read), xytext=(12, 0), textcoords="offset points")
    for name, peak in roofs.items():
        # Where both are the same machine, one line says so.
        if name == "bfloat16" and peak == roofs["float32"]:
            continue
        axes.plot([peak / limits.read, high], [peak, peak], color=_DTYPES[name][0], linewidth=1)
        label = f"{name} {peak:,.0f} GFLOP/s"
        axes.annotate(
            label, (high, peak), xytext=(0, 4), textcoords="offset points", ha="right", color=_DTYPES[name][0]
        )
    for dtype, (colour, _, marker) in _DTYPES.items():
        for backward in (False, True):
            own = [r for r in rows if r["dtype"] == dtype and (r["direction"] not in _FORWARD) == backward]
            axes.scatter(
                [row["intensity"] for row in own],
                [row["gflops"] for row in own],
                label=dtype if own and not backward else None,
                facecolors="none" if backward else colour,
                edgecolors=colour,
                marker=marker,
                s=20,
                linewidths=0.9,
            )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylim(top=2 * top)
    axes.set_xlabel("floating point operations per byte of inputs and outputs")
    axes.set_ylabel("GFLOP/s")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper left")


_FORWARD = ("forward", "eval", "train")


def _scaling(figure: Any, rows: Sequence[Line], what: str) -> None:
    axes = figure.add_subplot()
    scale, unit = (1e3, "ms") if what == "time" else (2**20, "MiB beyond the inputs")
    kinds = list(dict.fromkeys(row["row"].split(" ")[0] for row in rows))
    reference: list[float] = []
    for kind, colour in zip(kinds, KINDS, strict=False):
        for who, style, label in (("fastattn", "o-", kind), ("torch SDPA", "x--", None)):
            points = {}
            for row in rows:
                if row["row"].split(" ")[0] == kind and row["dtype"] == rows[0]["dtype"] and who in row["times_us"]:
                    memory = row["memory_bytes"].get(who)
                    value = row["times_us"][who]["median"] if what == "time" else memory
                    if value:
                        points[row["shape"]["seq_len"][0]] = value / scale
            axes.plot(
                list(points), list(points.values()), style, color=colour, label=label, markersize=4, linewidth=1.2
            )
            if not reference:
                reference = list(points.values())
    lengths = sorted({row["shape"]["seq_len"][0] for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_ylim(axes.get_ylim())  # the guides do not stretch it
    if len(lengths) > 1 and reference:
        grown = lengths[-1] / lengths[0]
        for power, name in ((1, "~ seq_len"), (2, "~ seq_len\u00b2")):
            # Below the first curve's end, so that they hide nothing and the slopes can be compared.
            ends = [0.6 * reference[-1] / grown**power, 0.6 * reference[-1]]
            axes.plot([lengths[0], lengths[-1]], ends, color=SOFT, linewidth=0.8, linestyle=_GUIDES[power], label=name)
    axes.set_xticks(lengths, [f"{x:,}" for x in lengths])
    axes.set_xlabel("seq_len")
    axes.set_ylabel(unit)
    axes.spines[["top", "right"]].set_visible(False)
    if any("torch SDPA" in row["times_us"] for row in rows):
        axes.plot([], [], "x--", color=SOFT, markersize=4, linewidth=1.2, label="torch SDPA")
    figure.legend(frameon=False, loc="outside right upper")
