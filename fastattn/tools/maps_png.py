"""Attention maps as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fastattn.tools.maps_html import Layer

_MOST_LABELS = 60
_INK = "#1d2433"
_SOFT = "#667085"


def save(path: Path, layers: Sequence[Layer], title: str | None = None) -> None:
    """Writes a picture with a row for each layer: the mean over the heads, large enough to read, and each head beside
    it.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    most_heads = max(layer.weights.shape[0] for layer in layers)
    panels = most_heads + 1 if most_heads > 1 else 1
    sizes = [_panel_size(layer) for layer in layers]
    width = max(w for w, _ in sizes)
    picture = figure(min(40.0, width * panels + 1.0), min(120.0, sum(h for _, h in sizes) + 0.6))
    axes = picture.subplots(len(layers), panels, squeeze=False)
    for row, layer in zip(axes, layers, strict=True):
        planes: list[tuple[str, Tensor]] = [(f"head {h}", w) for h, w in enumerate(layer.weights)]
        if len(planes) > 1:
            planes.insert(0, ("mean of the heads", layer.weights.mean(dim=0)))
        for k, axis in enumerate(row):
            if k < len(planes):
                draw(axis, planes[k][1], layer.rows, layer.columns, planes[k][0], show_rows=k == 0)
            else:
                axis.set_axis_off()
        row[0].set_ylabel(layer.name.removeprefix("transformer."), fontsize=8, color=_SOFT)
    if title:
        picture.suptitle(title, color=_INK)
    picture.savefig(path, dpi=120)


def draw(
    axis: Any,
    weights: Tensor,
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    *,
    show_rows: bool = True,
    numbers: bool = False,
) -> None:
    """Draws one map [rows, columns] into a matplotlib axis; ``numbers`` writes the larger weights into their cells."""
    axis.imshow(weights.float().numpy(), cmap="Blues", vmin=0.0, vmax=1.0, aspect="auto", interpolation="nearest")
    axis.set_title(title, fontsize=9, color=_INK)
    for side, labels, shown in ((axis.xaxis, columns, True), (axis.yaxis, rows, show_rows)):
        at = range(len(labels)) if len(labels) <= _MOST_LABELS else range(0, len(labels), -(-len(labels) // 20))
        side.set_ticks(list(at), [labels[i] for i in at] if shown else [])
        side.set_tick_params(length=0, labelsize=8, labelcolor=_INK)
    if any(len(label) > 3 for label in columns):
        axis.tick_params(axis="x", rotation=90)
    for spine in axis.spines.values():
        spine.set_color("#d0d5dd")
    if numbers:
        for i in range(len(rows)):
            for j in range(len(columns)):
                value = float(weights[i, j])
                if value >= 0.1:
                    colour = "white" if value > 0.4 else _SOFT
                    axis.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour)


def figure(width: float, height: float) -> Any:
    """Returns an empty figure of a size in inches, which belongs to no window and to no notebook.

    Raises:
        ModuleNotFoundError: matplotlib is not installed; the message names the extra that brings it.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as missing:
        raise ModuleNotFoundError(
            'pictures need matplotlib, which is not installed: pip install "fastattn[demo]" (save_html needs nothing)'
        ) from missing
    return Figure(figsize=(width, height), layout="constrained")


def _panel_size(layer: Layer) -> tuple[float, float]:
    """Returns width and height of a panel in inches: room for each label, within what fits a page."""
    _, rows, columns = layer.weights.shape
    return min(6.0, max(1.6, 0.17 * columns)), min(6.0, max(1.6, 0.17 * rows)) + 0.5
