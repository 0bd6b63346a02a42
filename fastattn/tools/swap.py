"""Puts fastattn's modules in the place of torch.nn's, in a model that exists."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from fastattn.backends import ALL
from fastattn.tools.exchange import Exchange, LeftAlone, exchange
from fastattn.tools.table import collapse, heading, table
from fastattn.tools.verify import Certificate, certify


class SwapReport:
    """What :func:`swap` did; ``print(report)`` shows it, ``report.undo()`` takes it back.

    Attributes:
        model_name: the model's class.
        device_type: where its parameters are.
        swapped: the modules that run on fastattn now.
        left_alone: those that might have and do not, with reasons.
        already: how many ran on fastattn before.
        certificate: errors, speed and memory before and after, if ``swap`` was given inputs.
    """

    def __init__(self, model: nn.Module, done: Exchange, certificate: Certificate | None) -> None:
        self.model_name = type(model).__name__
        self.device_type = next((t.device.type for t in model.parameters()), "cpu")
        self.swapped, self.left_alone, self.already = done
        self.certificate = certificate

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
        here = (b.name for b in ALL if b.unavailable() is None and self.device_type in b.device_types)
        served_by = next(here, f"none for {self.device_type}")
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
        args, kwargs = call_arguments(inputs)
        certificate = certify(model, args, kwargs)
    report = SwapReport(model, exchange(model), certificate)
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


def _grouped(items: Sequence[Any]) -> dict[tuple[str, Any], list[str]]:
    """Puts items that differ only in the numbers in their names together: {("layers.0-5.norm1", first item): names}."""
    groups: dict[tuple[str, ...], list[Any]] = {}
    for item in items:
        kind = item.reason if isinstance(item, LeftAlone) else item.before
        groups.setdefault((re.sub(r"\d+", "#", item.name), kind), []).append(item)
    return {(collapse([i.name for i in found]), found[0]): [i.name for i in found] for found in groups.values()}
