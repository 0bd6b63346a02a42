"""C++ kernels for CPUs (``csrc/cpu``): AVX-512, AVX2 or portable, chosen at run time."""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType

from fastattn.backends.base import Backend


class CpuBackend(Backend):
    name = "cpu"
    device_types = ("cpu",)

    def unavailable(self) -> str | None:
        return _load()[1]


@cache
def _load() -> tuple[ModuleType | None, str | None]:
    """Returns the extension module, or why it is missing."""
    # torch is imported before this file: its libgomp must be in the process first, so that both share one thread pool.
    try:
        return importlib.import_module("fastattn._cpu"), None
    except ImportError as error:
        return None, f"the extension fastattn._cpu is not built ({error}); install g++ and run: pip install -e ."
