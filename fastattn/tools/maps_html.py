"""One self-contained page of attention maps."""

from __future__ import annotations

import base64
import html
import importlib.resources
import json
import string
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Layer(NamedTuple):
    """What to show of one layer: ``weights`` [num_heads, rows, columns] in [0, 1], and the labels of rows and
    columns."""

    name: str
    weights: Tensor
    rows: Sequence[str]
    columns: Sequence[str]


def page(title: str, layers: Sequence[Layer]) -> str:
    """Returns the page; all that it needs is inside it."""
    data = {"title": title, "layers": [_as_json(layer) for layer in layers]}
    # A "</script>" in a label would end the element that holds the data.
    text = json.dumps(data, ensure_ascii=True).replace("<", "\\u003c")
    template = importlib.resources.files("fastattn.tools").joinpath("maps_page.html").read_text(encoding="utf-8")
    return string.Template(template).substitute(title=html.escape(title), data=text)


def _as_json(layer: Layer) -> dict[str, object]:
    # 16-bit fractions: to 1e-5 what the model computed, in half the bytes of a float.
    fractions = (layer.weights.detach().float().clamp(0, 1) * 65535).round().to(torch.int32).numpy().astype("<u2")
    return {
        "name": layer.name,
        "heads": layer.weights.shape[0],
        "rows": list(layer.rows),
        "columns": list(layer.columns),
        "weights": base64.b64encode(fractions.tobytes()).decode("ascii"),
    }
