"""The extension ``fastattn._cpu``, loaded once, or why it is missing."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

# torch is imported first: its libgomp must be in the process before the extension's, so that both share a thread pool.
import torch  # noqa: F401


@cache
def cpu_flags() -> frozenset[str]:
    """Returns the processor's features beyond the instruction set in use, such as "amx_bf16"."""
    module = load()[0]
    return frozenset() if module is None else frozenset(module.cpu_flags())


def kernels() -> ModuleType:
    """Returns the extension module, whose presence ``unavailable`` has checked."""
    module = load()[0]
    assert module is not None
    return module


@cache
def load() -> tuple[ModuleType | None, str | None]:
    """Returns the extension module, or why it is missing."""
    try:
        return importlib.import_module("fastattn._cpu"), None
    except ImportError as error:
        return None, f"the extension fastattn._cpu is not built ({error}); install g++ and run: pip install -e ."


class _PlainCalls:
    """The extension's plain calls, an attribute an op: ``csrc/cpu/plain_calls.cpp`` says what they are.

    Each returns the op's result; or None, where the call is not plain and must go the long way; or a list where an
    argument wants a gradient: the results, then what else the gradient's call is to be given.
    """

    def __getattr__(self, op: str) -> Callable[..., Any]:
        # Looked up at an op's first call, so that importing the package loads nothing.
        module = load()[0]
        call = _decline if module is None else getattr(module, f"plain_{op}")
        setattr(self, op, call)
        return call


def _decline(*args: Any) -> None:
    return None


plain = _PlainCalls()
