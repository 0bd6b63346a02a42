"""Changes the classes of modules between torch.nn's and fastattn's, which is all that a swap does."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

import fastattn.nn
from fastattn.backends import ALL
from fastattn.spec.checks import FLOATS

# Each class of torch.nn and ours, which is a subclass of it that adds no state: an object may change from one to the
# other.
OURS: dict[type[nn.Module], type[nn.Module]] = {
    getattr(nn, name): getattr(fastattn.nn, name)
    for name in fastattn.nn.__all__
    if hasattr(nn, name) and issubclass(getattr(fastattn.nn, name), getattr(nn, name))
}
THEIRS: dict[type[nn.Module], type[nn.Module]] = {ours: theirs for theirs, ours in OURS.items()}


class Swapped(NamedTuple):
    """A module that changed its class."""

    name: str
    module: nn.Module
    before: type[nn.Module]
    after: type[nn.Module]


class LeftAlone(NamedTuple):
    """A module of one of torch.nn's attention, norm or softmax types that kept its own code, and why."""

    name: str
    type_name: str
    reason: str


class Exchange(NamedTuple):
    """What :func:`exchange` did: modules that changed, those that might have and why they did not, and how many were
    fastattn's before."""

    swapped: tuple[Swapped, ...]
    left_alone: tuple[LeftAlone, ...]
    already: int


def exchange(model: nn.Module) -> Exchange:
    """Makes every torch.nn module of ``model`` that has kernels the fastattn one that is a subclass of it, in place."""
    swapped, left_alone, already = [], [], 0
    home = next((t.device for t in model.parameters()), torch.device("cpu"))
    for name, module in model.named_modules():
        kind = type(module)
        if isinstance(module, tuple(THEIRS)):
            already += 1
        elif (reason := _reason_against(module, home)) is not None:
            left_alone.append(LeftAlone(name or "(the model)", kind.__name__, reason))
        elif kind in OURS:
            swapped.append(Swapped(name or "(the model)", module, kind, OURS[kind]))
    for change in swapped:
        change.module.__class__ = change.after
    return Exchange(tuple(swapped), tuple(left_alone), already)


def unswap(model: nn.Module) -> None:
    """Makes every fastattn module of ``model`` the torch.nn one that it is a subclass of, in place."""
    for module in model.modules():
        theirs = THEIRS.get(type(module))
        if theirs is not None:
            module.__class__ = theirs


def _reason_against(module: nn.Module, home: torch.device) -> str | None:
    """Returns why a module that might be swapped is not; None if it is, or if there is nothing to swap.

    ``home`` is where a module without parameters is taken to run.
    """
    kind = type(module)
    base = next((theirs for theirs in OURS if isinstance(module, theirs)), None)
    if base is None:
        return None
    if kind not in OURS:
        return f"a subclass of nn.{base.__name__} with code of its own; derive it from fastattn.nn.{base.__name__}"
    if "forward" in vars(module):
        return "its forward was replaced on this very object"
    tensors = [t for t in module.parameters() if t.is_floating_point() or t.is_complex()]
    for tensor in tensors:
        if tensor.dtype not in FLOATS:
            return f"no kernel for {tensor.dtype}"
    for device in {t.device for t in tensors} or {home}:
        if not _has_kernels(device):
            return f"no kernel for {device.type}"
    return None


def _has_kernels(device: torch.device) -> bool:
    """Whether a backend is made for ``device``.  The reference, made for all, is no reason to swap."""
    made_for = {kind for backend in ALL if backend.name != "reference" for kind in backend.device_types}
    return device.type in made_for or device.type == "meta"
