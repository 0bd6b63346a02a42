"""C++ kernels for CPUs (``csrc/cpu``): AVX-512, AVX2 or portable, chosen at run time."""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType

from torch import Tensor

from fastattn.backends.base import Backend
from fastattn.spec.attention import AttentionCall, empty_output


class CpuBackend(Backend):
    name = "cpu"
    device_types = ("cpu",)

    def unavailable(self) -> str | None:
        return _load()[1]

    def attention(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        out, lse = empty_output(call)
        kernels().attention_forward(call, out, lse)
        return out, lse


def kernels() -> ModuleType:
    """Returns the extension module, whose presence ``unavailable`` has checked."""
    module = _load()[0]
    assert module is not None
    return module


@cache
def _load() -> tuple[ModuleType | None, str | None]:
    """Returns the extension module, or why it is missing."""
    # torch is imported before this file: its libgomp must be in the process first, so that both share one thread pool.
    try:
        return importlib.import_module("fastattn._cpu"), None
    except ImportError as error:
        return None, f"the extension fastattn._cpu is not built ({error}); install g++ and run: pip install -e ."
