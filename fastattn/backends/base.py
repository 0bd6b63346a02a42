"""What a backend is."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

_ANYWHERE = nullcontext()


class Backend:
    """A set of kernels.

    An op ``x`` is served by the method ``x(call)`` (and ``x_backward(call, ...)``), which allocates outputs and
    launches; the call comes validated from ``fastattn.spec``.  A backend without the method does not have the op; a
    method that finds that it cannot serve the call here raises ``UnsupportedError`` with ``{name: [reason]}``.
    """

    name: ClassVar[str]
    device_types: ClassVar[tuple[str, ...]]

    def unavailable(self) -> str | None:
        """Returns why this backend cannot run here and how to get it, or None if it can."""
        return None

    def on_device_of(self, call: NamedTuple) -> AbstractContextManager[object]:
        """Returns a context in which the device of ``call`` is the current one, for backends that launch there."""
        return _ANYWHERE

    def has_one_pass_loss(self, dtype: torch.dtype) -> bool:
        """Returns whether ``linear_cross_entropy_one_pass`` is faster than forward and backward one after the other,
        and as exact, in ``dtype``."""
        return False

    def scale(self, tensors: Sequence[Tensor], factor: Tensor) -> None:
        """Multiplies tensors by ``factor`` [], which is as wide as their accumulator, where they stand."""
        for tensor in tensors:
            tensor.copy_(tensor * factor if tensor.dtype == factor.dtype else tensor.to(factor.dtype) * factor)

    def refuses(self, op: str, call: NamedTuple) -> list[str]:
        """Returns every reason against serving ``call``; an empty list means it is supported."""
        device: torch.device = call[0].device
        reasons = []
        why = self.unavailable()
        if why is not None:
            reasons.append(why)
        if not hasattr(self, op):
            reasons.append(f"has no kernel for {op}")
        if device.type not in self.device_types:
            reasons.append(f"runs on {' and '.join(self.device_types)}, got tensors on {device}")
        return reasons
