"""Exceptions and warnings that fastattn raises."""

from __future__ import annotations

from collections.abc import Mapping


class UnsupportedError(RuntimeError):
    """A request that the chosen backend, or every backend, cannot serve.

    Args:
        op: name of the op that was asked for.
        reasons: for each backend that was asked, why it refuses.
    """

    def __init__(self, op: str, reasons: Mapping[str, list[str]]) -> None:
        self.op = op
        self.reasons = dict(reasons)
        lines = [f"{name}: {reason}" for name, why in self.reasons.items() for reason in why]
        super().__init__(f"no requested backend supports this call of fastattn.{op}:\n  " + "\n  ".join(lines))


class FallbackWarning(UserWarning):
    """Issued once a reason when a call is served by the reference backend because no faster one supports it."""
