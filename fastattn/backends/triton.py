"""Triton kernels for GPUs (``kernels/``); on CPU tensors in Triton's interpreter, where TRITON_INTERPRET=1 is set.

Nothing of Triton is imported before the first call that it serves.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from fastattn.backends.base import Backend
from fastattn.backends.triton_rows import RowOps
from fastattn.spec.attention import AttentionCall
from fastattn.spec.attention_weights import WeightsCall
from fastattn.spec.linear_cross_entropy import LinearCrossEntropyCall
from fastattn.spec.paged_attention import PagedCall

# The first whose kernels may take tuples with names and fields that are None.
LEAST_TRITON = (3, 6)
# The first generation that multiplies bfloat16, and the oldest for which Triton generates code.
LEAST_CAPABILITY = (8, 0)
# Beyond it no tile of queries and keys fits the registers.
MAX_HEAD_DIM = 256
# Beyond it a sum of two positions does not fit in 32 bits.
MAX_LENGTH = 1 << 30


def interpreted() -> bool:
    """Returns whether kernels run in Triton's interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def missing() -> str | None:
    """Returns what is wrong with the Triton that is installed, or None."""
    found = importlib.util.find_spec("triton")
    # Without an origin it is nothing but a folder of that name.
    if found is None or found.origin is None:
        return "triton is not installed: pip install 'triton>=3.6'"
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:  # a build under another name
        try:
            import triton
        except Exception as error:
            return _does_not_work(error)
        version = triton.__version__
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is not None and (int(numbers[1]), int(numbers[2])) < LEAST_TRITON:
        return f"triton {version} is too old: pip install 'triton>=3.6'"
    return None


@cache
def broken() -> str | None:
    """Returns why the Triton that is installed does not work here, or None; this imports it."""
    try:
        import triton

        # Its first use builds what talks to the GPU's driver, which takes a C compiler and Python's headers.
        if not interpreted():
            triton.runtime.driver.active.get_current_target()
    except Exception as error:
        return _does_not_work(error)
    return None


def _does_not_work(error: Exception) -> str:
    return f"triton is installed, but does not work here: {type(error).__name__}: {error}"


def other_mode() -> str | None:
    """Returns whether Triton was imported in another mode than TRITON_INTERPRET asks for now; imports it."""
    from triton.language import cdiv
    from triton.runtime.jit import JITFunction

    if isinstance(cdiv, JITFunction) != interpreted():
        return None
    return "TRITON_INTERPRET has changed since triton was imported: set it before"


@cache
def too_old(device: int) -> str | None:
    """Returns why there is no code for this GPU, or None."""
    if torch.version.hip is not None:
        return None
    capability = torch.cuda.get_device_capability(device)
    if capability >= LEAST_CAPABILITY:
        return None
    found, needed = (".".join(map(str, c)) for c in (capability, LEAST_CAPABILITY))
    return f"{torch.cuda.get_device_name(device)} has compute capability {found}, kernels need {needed}"


def _too_large(call: NamedTuple) -> list[str]:
    """Returns which sizes of a call are beyond its kernels."""
    attention = call.attention if isinstance(call, WeightsCall) else call
    reasons = []
    if isinstance(attention, AttentionCall):
        if max(attention.query.shape[3], attention.value.shape[3]) > MAX_HEAD_DIM:
            reasons.append(f"takes a head_dim of at most {MAX_HEAD_DIM}")
        if max(attention.shape[2:]) > MAX_LENGTH:
            reasons.append(f"takes at most {MAX_LENGTH} queries and keys of a batch entry")
    if isinstance(call, PagedCall):
        if max(call.query.shape[3], call.value_cache.shape[3]) > MAX_HEAD_DIM:
            reasons.append(f"takes a head_dim of at most {MAX_HEAD_DIM}")
        if max(call.query.shape[2], call.capacity) > MAX_LENGTH:
            reasons.append(f"takes at most {MAX_LENGTH} queries and keys of a batch entry")
    if isinstance(call, LinearCrossEntropyCall) and call.num_tokens > MAX_LENGTH:
        reasons.append(f"takes at most {MAX_LENGTH} tokens")
    return reasons


class TritonBackend(RowOps, Backend):
    name = "triton"

    @property
    def device_types(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("cpu",) if interpreted() else ("cuda",)

    def unavailable(self) -> str | None:
        why = missing()
        if why is not None or interpreted():
            return why
        if not torch.cuda.is_available():
            return "there is no GPU (with TRITON_INTERPRET=1 kernels run on the CPU, slowly, for tests)"
        reasons = [too_old(device) for device in range(torch.cuda.device_count())]
        if None not in reasons:
            return "; ".join(filter(None, reasons))
        # Known once a call has asked: to find out, Triton must be imported.
        return broken() if broken.cache_info().currsize else None

    def on_device_of(self, call: NamedTuple) -> AbstractContextManager[object]:
        device: torch.device = call[0].device
        # Triton launches on the current GPU, whatever its arguments lie on.
        if device.type != "cuda" or device.index == torch.cuda.current_device():
            return super().on_device_of(call)
        return torch.cuda.device(device)

    def refuses(self, op: str, call: NamedTuple) -> list[str]:
        reasons = super().refuses(op, call)
        device: torch.device = call[0].device
        if interpreted() and not call.backend:  # type: ignore[attr-defined]
            reasons.append("its interpreter is for tests, and serves none but those who ask for backend='triton'")
        if not reasons and device.type == "cuda":
            why = too_old(torch.cuda.current_device() if device.index is None else device.index)
            reasons += [] if why is None else [why]
        reasons += _too_large(call)
        if not reasons:
            why = broken() or other_mode()
            reasons += [] if why is None else [why]
        return reasons

    def attention(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        from fastattn.kernels.attention_forward import attention_fwd

        return attention_fwd(call)

    def attention_backward(
        self, call: AttentionCall, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None, needed: Sequence[bool]
    ) -> list[Tensor | None]:
        from fastattn.kernels.attention_backward import attention_bwd

        return attention_bwd(call, out, lse, dout, dlse, needed)

    def paged_attention(self, call: PagedCall) -> tuple[Tensor, Tensor]:
        from fastattn.kernels.decode import paged_fwd

        return paged_fwd(call)

    def attention_weights(self, call: WeightsCall) -> tuple[Tensor, Tensor]:
        from fastattn.kernels.attention_weights import attention_weights_fwd

        return attention_weights_fwd(call)
