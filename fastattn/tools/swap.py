"""Puts fastattn's modules in the place of torch.nn's, in a model that exists."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

import fastattn.nn
from fastattn.backends import ALL
from fastattn.ops._dispatch import backends
from fastattn.spec.checks import FLOATS
from fastattn.tools.table import heading, table

if TYPE_CHECKING:
    from fastattn.tools.verify import Certificate

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


class SwapReport:
    """What :func:`swap` did; ``print(report)`` shows it, ``report.undo()`` takes it back.

    Attributes:
        swapped: the modules that run on fastattn now.
        left_alone: those that might have and do not, with reasons.
        already: how many ran on fastattn before.
        certificate: errors, speed and memory before and after, if ``swap`` was given inputs.
    """

    def __init__(
        self, model: nn.Module, swapped: Sequence[Swapped], left_alone: Sequence[LeftAlone], already: int
    ) -> None:
        self.model_name = type(model).__name__
        self.swapped = tuple(swapped)
        self.left_alone = tuple(left_alone)
        self.already = already
        self.certificate: Certificate | None = None

    def undo(self) -> None:
        """Gives every swapped module its own class back.  Parameters trained meanwhile stay as they are."""
        for change in self.swapped:
            # Whoever changed the class after us knows why.
            if type(change.module) is change.after:
                change.module.__class__ = change.before

    def __str__(self) -> str:
        parts = [heading(self._headline())]
        if self.swapped:
            rows = [
                [name, first.before.__name__, str(len(names))]
                for (name, first), names in _grouped(self.swapped).items()
            ]
            parts.append(table(("swapped", "type", "modules"), rows, left=(0, 1)))
        if self.left_alone:
            rows = [[name, first.type_name, first.reason] for (name, first), _ in _grouped(self.left_alone).items()]
            parts.append(table(("left alone", "type", "why"), rows, left=(0, 1, 2)))
        if self.certificate is not None:
            parts.append(str(self.certificate))
        return "\n\n".join(parts)

    def _headline(self) -> str:
        served_by = next(name for name, status in backends().items() if status.available)
        text = f"{self.model_name}: {len(self.swapped)} modules now run on fastattn (backend: {served_by})"
        return text + (f", {self.already} did before" if self.already else "")


def swap(
    model: nn.Module, inputs: Tensor | Sequence[Any] | Mapping[str, Any] | None = None, *, verbose: bool = True
) -> SwapReport:
    """Makes the torch.nn modules inside ``model`` run on fastattn, in place.

    Every ``nn.MultiheadAttention``, ``nn.Transformer*``, norm and softmax keeps its identity: it is the same object
    with the same parameters, buffers, hooks, mode and device, and gets the forward of ``fastattn.nn``.  Optimizers,
    checkpoints and references to it go on working.  Other models are not touched, and :meth:`SwapReport.undo` takes it
    back.  Swapping twice changes nothing more.

    A subclass keeps its own code: it may rely on what it overrides.  Attention that a model calls as
    ``F.scaled_dot_product_attention`` is not a module: :func:`fastattn.activate` reaches that.

    Args:
        model: to change; it may itself be one of these modules.
        inputs: what ``model`` is called with: one tensor, a sequence of arguments or a mapping of keywords.  With them
            the report has a certificate (see :func:`fastattn.verify`): errors against a float64 copy, speed and memory,
            before and after.  They are measured on copies, so that needs room for three more models.
        verbose: prints the report if there is a certificate.

    Returns:
        What was swapped, what was left alone and why.

    Raises:
        TypeError: ``model`` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    certificate = None
    if inputs is not None:
        from fastattn.tools.verify import certify

        args, kwargs = call_arguments(inputs)
        certificate = certify(model, args, kwargs)
    report = _swap(model)
    report.certificate = certificate
    if verbose and certificate is not None:
        print(report)
    return report


def call_arguments(inputs: Tensor | Sequence[Any] | Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns the positional and the keyword arguments that ``inputs`` stands for."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, Sequence) and not isinstance(inputs, str):
        return tuple(inputs), {}
    return (inputs,), {}


def unswap(model: nn.Module) -> None:
    """Makes every fastattn module of ``model`` the torch.nn one that it is a subclass of, in place."""
    for module in model.modules():
        theirs = THEIRS.get(type(module))
        if theirs is not None:
            module.__class__ = theirs


def _swap(model: nn.Module) -> SwapReport:
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
    return SwapReport(model, swapped, left_alone, already)


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


def _grouped(items: Sequence[Any]) -> dict[tuple[str, Any], list[str]]:
    """Puts items that differ only in the numbers in their names together: {("layers.0-5.norm1", first item): names}."""
    groups: dict[tuple[str, ...], list[Any]] = {}
    for item in items:
        kind = item.reason if isinstance(item, LeftAlone) else item.before
        groups.setdefault((re.sub(r"\d+", "#", item.name), kind), []).append(item)
    return {(collapse([i.name for i in found]), found[0]): [i.name for i in found] for found in groups.values()}


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
