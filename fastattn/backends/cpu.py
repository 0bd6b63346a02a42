"""C++ kernels for CPUs (``csrc/cpu``): AVX-512, AVX2 or portable, chosen at run time."""

from __future__ import annotations

import importlib
from collections.abc import Collection, Sequence
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from fastattn.backends import blocked
from fastattn.backends.base import Backend
from fastattn.spec import feed_forward as feed_forward_spec
from fastattn.spec.attention import AttentionCall, empty_output
from fastattn.spec.feed_forward import FeedForwardCall
from fastattn.spec.linear_cross_entropy import LinearCrossEntropyCall


class CpuBackend(Backend):
    name = "cpu"
    device_types = ("cpu",)

    def unavailable(self) -> str | None:
        return _load()[1]

    def attention(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        out, lse = empty_output(call)
        kernels().attention_forward(call, out, lse)
        return out, lse

    def feed_forward(self, call: FeedForwardCall) -> Tensor:
        out = feed_forward_spec.empty_output(call)
        blocked.feed_forward(call, out)
        return out

    def feed_forward_backward(self, call: FeedForwardCall, dout: Tensor, needed: Sequence[bool]) -> list[Tensor | None]:
        return blocked.feed_forward_backward(call, dout, needed)

    def linear_cross_entropy(self, call: LinearCrossEntropyCall) -> tuple[Tensor, Tensor]:
        return blocked.linear_cross_entropy(call, product_dtype(cpu_flags(), call.hidden.dtype))

    def linear_cross_entropy_backward(
        self, call: LinearCrossEntropyCall, lse: Tensor, dloss: Tensor, needed: Sequence[bool]
    ) -> list[Tensor | None]:
        dtype = product_dtype(cpu_flags(), call.hidden.dtype)
        return blocked.linear_cross_entropy_backward(call, lse, dloss, needed, dtype)


def uses_torch_products(flags: Collection[str], dtype: torch.dtype) -> bool:
    """Whether matrix products of ``dtype`` go through PyTorch rather than this backend's kernels.

    AMX multiplies bfloat16 several times as fast as any AVX-512 instruction and only PyTorch's kernels use it; float64
    has no kernel of ours.

    Args:
        flags: the processor's, as :func:`cpu_flags` returns them.
        dtype: of the inputs.
    """
    return dtype == torch.float64 or (dtype == torch.bfloat16 and "amx_bf16" in flags)


def product_dtype(flags: Collection[str], dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype in which PyTorch multiplies inputs of ``dtype`` best: half precision is widened without AMX."""
    if dtype in (torch.float32, torch.float64) or uses_torch_products(flags, dtype):
        return dtype
    return torch.float32


@cache
def cpu_flags() -> frozenset[str]:
    """Returns the processor's features beyond the instruction set in use, such as "amx_bf16"."""
    module = _load()[0]
    return frozenset() if module is None else frozenset(module.cpu_flags())


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
