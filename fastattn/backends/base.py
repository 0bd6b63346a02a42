"""What a backend is."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch


class Backend:
    """A set of kernels.

    An op ``x`` is served by the method ``x(call)`` (and ``x_backward(call, ...)``), which allocates outputs and
    launches; the call comes validated from ``fastattn.spec``.  A backend without the method does not have the op.
    """

    name: ClassVar[str]
    device_types: ClassVar[tuple[str, ...]]

    def unavailable(self) -> str | None:
        """Returns why this backend cannot run here and how to get it, or None if it can."""
        return None

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
