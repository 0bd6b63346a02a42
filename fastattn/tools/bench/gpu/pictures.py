"""The run's plots: attention's rate beside the peers', the roofline, and bandwidth over the length of a row."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from fastattn.tools.bench.gpu import targets
from fastattn.tools.bench.gpu.jobs import Record
from fastattn.tools.bench.measuring import OURS
from fastattn.tools.bench.plots import INK, KINDS, SOFT, render

_MARKERS = "osD^vP*X"


def draw(records: Sequence[Record], limits: Mapping[str, float], title: str, folder: Path) -> list[Path]:
    """Writes a PNG for each picture that there is data for; returns their paths.

    Raises:
        ImportError: matplotlib is not installed.
    """
    groups = targets.grouped(records)
    found: dict[str, Callable[[Any], None]] = {}
    attention = {key: group for key, group in groups.items() if key[0] == "attention" and key[3] == "bfloat16"}
    if attention:
        found["attention"] = partial(_attention, groups=attention, limits=limits, title=title)
    worked = [group[OURS] for group in groups.values() if OURS in group and group[OURS]["flops"]]
    if worked and limits.get("copy"):
        found["roofline"] = partial(_roofline, records=worked, limits=limits, title=title)
    rows = {key: group for key, group in groups.items() if key[0] == "softmax"}
    if rows:
        found["bandwidth"] = partial(_bandwidth, groups=rows, limits=limits, title=title)
    written = []
    for name, picture in found.items():
        written.append(folder / f"{name}.png")
        written[-1].write_bytes(render(picture, "png", name))
    return written


def _attention(
    figure: Any, groups: Mapping[targets.Key, Mapping[str, Record]], limits: Mapping[str, float], title: str
) -> None:
    """A panel a direction, a group of bars a row, a bar for each that ran it."""
    directions = [d for d in ("forward", "backward", "forward + backward") if any(key[2] == d for key in groups)]
    names = list(dict.fromkeys(key[1] for key in groups))
    who = list(dict.fromkeys([OURS, *(name for group in groups.values() for name in group)]))
    figure.set_figheight(1.2 + 2.4 * len(directions))
    panels = figure.subplots(len(directions), 1, sharex=True, squeeze=False)[:, 0]
    width = 0.85 / len(who)
    for axes, direction in zip(panels, directions, strict=True):
        for k, name in enumerate(who):
            bars = {
                key[1]: group[name]["figure"] for key, group in groups.items() if key[2] == direction and name in group
            }
            places = [i + (k - (len(who) - 1) / 2) * width for i, row in enumerate(names) if row in bars]
            colour = INK if name == OURS else KINDS[(k - 1) % len(KINDS)]
            axes.bar(places, [bars[row] for row in names if row in bars], width, color=colour, label=name)
        if limits.get("matmul") and limits["matmul"] > 5:
            axes.axhline(limits["matmul"], color=SOFT, linewidth=0.8, linestyle=":")
        axes.set_ylabel("TFLOP/s")
        axes.set_title(direction, fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xticks(range(len(names)), names, rotation=20, ha="right")
    handles: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False, fontsize=7)
    figure.suptitle(f"attention, bfloat16, {title}; dotted: a large matrix product", fontsize=9, color=INK)


def _roofline(figure: Any, records: Sequence[Record], limits: Mapping[str, float], title: str) -> None:
    axes = figure.add_subplot()
    intensity = [r["flops"] / r["moved"] for r in records]
    low, high, top = 0.5 * min(intensity), 2 * max(intensity), limits["matmul"]
    knee = 1e3 * top / limits["copy"]
    axes.plot([low, knee, max(high, knee)], [low * limits["copy"] / 1e3, top, top], color=SOFT, linewidth=1)
    axes.annotate(f"copy {limits['copy']:.0f} GB/s", (low, low * limits["copy"] / 1e3), fontsize=7, color=SOFT)
    axes.annotate(f"bf16 product {top:.0f} TFLOP/s", (knee, top), xytext=(0, 4), textcoords="offset points", fontsize=7)
    ops = list(dict.fromkeys(r["op"] for r in records))
    for k, op in enumerate(ops):
        for backward in (False, True):
            own = [r for r in records if r["op"] == op and (r["direction"] != "forward") == backward]
            axes.scatter(
                [r["flops"] / r["moved"] for r in own],
                [r["flops"] / r["median_us"] / 1e6 for r in own],
                marker=_MARKERS[k % len(_MARKERS)],
                facecolors="none" if backward else KINDS[k % len(KINDS)],
                edgecolors=KINDS[k % len(KINDS)],
                label=f"{op}{', with backward (open)' if backward else ''}" if own else None,
                s=22,
            )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("floating point operations per byte of inputs and outputs")
    axes.set_ylabel("TFLOP/s")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=7)
    axes.set_title(f"fastattn, {title}", fontsize=9)


def _bandwidth(
    figure: Any, groups: Mapping[targets.Key, Mapping[str, Record]], limits: Mapping[str, float], title: str
) -> None:
    """A panel an op, GB/s over columns; forward drawn through, with backward dashed."""
    ops = list(dict.fromkeys(key[1].split(" ")[0] for key in groups))
    figure.set_figheight(1.0 + 2.4 * ((len(ops) + 1) // 2))
    panels = figure.subplots((len(ops) + 1) // 2, 2, sharex=True, sharey=True, squeeze=False).flatten()
    who = list(dict.fromkeys([OURS, *(name for group in groups.values() for name in group)]))
    for axes, op in zip(panels, ops, strict=False):
        for k, name in enumerate(who):
            for direction, style in (("forward", "o-"), ("forward + backward", "s--")):
                points = sorted(
                    (int(key[1].split("x")[-1]), group[name]["figure"])
                    for key, group in groups.items()
                    if key[1].split(" ")[0] == op and key[2] == direction and name in group
                )
                look = {"color": INK if name == OURS else KINDS[(k - 1) % len(KINDS)], "markersize": 3, "linewidth": 1}
                label = name if direction == "forward" else None
                axes.plot([x for x, _ in points], [y for _, y in points], style, label=label, **look)
        if limits.get("copy"):
            axes.axhline(limits["copy"], color=SOFT, linewidth=0.8, linestyle=":")
        axes.set_xscale("log", base=2)
        axes.set_ylim(bottom=0)
        axes.set_title(op, fontsize=9)
        axes.set_xlabel("columns")
        axes.set_ylabel("GB/s")
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[len(ops) :]:
        axes.set_visible(False)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=7)
    figure.suptitle(f"row-wise ops, {title}; dashed: with backward; dotted: a copy", fontsize=9, color=INK)
