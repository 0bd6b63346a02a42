"""Says which kernel serves each call that a model makes, and why not another."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from fastattn.backends import ALL
from fastattn.backends.base import Backend
from fastattn.errors import FallbackWarning
from fastattn.ops._dispatch import observe
from fastattn.tools import activate
from fastattn.tools.table import collapse, heading, table
from fastattn.tools.watch import watching

PYTORCH = "PyTorch"
_FIRST = "comes first"

# What PyTorch itself computes attention with: its name here, and what brings it to fastattn.
_STOCK: Mapping[Any, tuple[str, str]] = {
    F.scaled_dot_product_attention: ("F.scaled_dot_product_attention", "fastattn.activate() routes it"),
    F.multi_head_attention_forward: ("F.multi_head_attention_forward", "fastattn.swap(model) replaces the module"),
}


class Explained(NamedTuple):
    """One call.

    Attributes:
        layer: name of the innermost module that makes it.
        op: as in ``fastattn.attention``; an op of PyTorch's with its full name.
        shapes: of its first tensors.
        served_by: the backend, and where it has several, the instruction set; "PyTorch" for what is not on fastattn.
        reasons: for each other backend why it does not serve the call; for PyTorch what would bring the call to
            fastattn.
    """

    layer: str
    op: str
    shapes: str
    served_by: str
    reasons: Mapping[str, str]


class Explanation(NamedTuple):
    """What :func:`explain` found, in the order of the calls."""

    model_name: str
    calls: tuple[Explained, ...]

    def __str__(self) -> str:
        head = heading(f"{self.model_name}: {len(self.calls)} call{'s' if len(self.calls) != 1 else ''}")
        groups: dict[tuple[Any, ...], list[str]] = {}
        for call in self.calls:
            pattern = "".join("#" if c.isdigit() else c for c in call.layer)
            key = (pattern, call.op, call.shapes, call.served_by, tuple(call.reasons.items()))
            groups.setdefault(key, []).append(call.layer)
        rows = []
        for (_, op, shapes, served_by, reasons), layers in groups.items():
            why = "; ".join(f"{name}: {reason}" for name, reason in reasons if not reason.endswith(_FIRST))
            rows.append([collapse(layers) or "(the model)", op, shapes, served_by, str(len(layers)), why])
        headers = ("layer", "op", "shapes", "served by", "calls", "why not another")
        return f"{head}\n\n{table(headers, rows, left=(0, 1, 2, 3, 5))}"


def explain(model: nn.Module, *inputs: Any, **kwargs: Any) -> Explanation:
    """Runs ``model`` once and says, for each op of fastattn in it, which backend serves the call and why others refuse.

    Attention that PyTorch itself computes is listed too, with what would bring it to fastattn; its fused inference path
    is off meanwhile. The model runs on a
    copy, in the mode it is in; with gradients enabled also backward, where its output allows it.

    Args:
        model: any module.
        *inputs: what it is called with.
        **kwargs: keywords that it is called with.

    Returns:
        ``print(explanation)`` shows a table; ``explanation.calls`` are its rows.
    """
    copied = copy.deepcopy(model)
    calls: list[Explained] = []

    def on_call(layer: str, op: str, call: Any, backend: Backend) -> None:
        calls.append(Explained(layer, op, _shapes(call), _served_by(backend), _reasons(op, call, backend)))

    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # What the warning says once, the explanation says for each call.
        warnings.simplefilter("ignore", FallbackWarning)
        with watching(copied, on_call) as layer, _StockCalls(calls, layer):
            output = copied(*inputs, **kwargs)
        floats = [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad]
        if floats and torch.is_grad_enabled():
            with observe(lambda op, call, backend: on_call("(backward)", op, call, backend)):
                torch.autograd.backward([t.float().sum() for t in floats])
    return Explanation(type(model).__name__, tuple(calls))


class _StockCalls(TorchFunctionMode):
    """Notes each attention that PyTorch computes itself."""

    def __init__(self, calls: list[Explained], layer: Any) -> None:
        self._calls = calls
        self._layer = layer

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        routed = func is F.scaled_dot_product_attention and activate.is_active()
        if func in _STOCK and not routed:
            name, hint = _STOCK[func]
            tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)][:3]
            self._calls.append(Explained(self._layer(), name, _listed(tensors), PYTORCH, {"fastattn": hint}))
        return func(*args, **kwargs)


def _reasons(op: str, call: Any, chosen: Backend) -> dict[str, str]:
    """Returns why each other backend did not serve the call."""
    reasons = {}
    for backend in ALL:
        if backend is chosen:
            continue
        why = backend.refuses(op, call)
        named = f"{chosen.name} was asked for" if call.backend else f"{chosen.name} {_FIRST}"
        reasons[backend.name] = ", ".join(why) or named
    return reasons


def _served_by(backend: Backend) -> str:
    if backend.name != "cpu":
        return backend.name
    from fastattn.backends.extension import kernels

    return f"cpu ({kernels().isa()})"


def _shapes(call: Any) -> str:
    return _listed([t for t in call if isinstance(t, Tensor)][:3])


def _listed(tensors: list[Tensor]) -> str:
    """Returns the shapes of tensors and the dtype of the first, in few characters."""
    if not tensors:
        return ""
    shapes = " ".join("x".join(map(str, t.shape)) or "scalar" for t in tensors)
    return f"{shapes} {str(tensors[0].dtype).removeprefix('torch.')}"
