"""Dropout of an activation: what modules call, and no part of the public API."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.ops import _dispatch
from fastattn.ops._registry import define
from fastattn.spec.dropout import DropoutCall, dropout_call

_CALL_SCHEMA = "Tensor input, Tensor dropout_state, float dropout_p, str backend"
# Below, drawing the seed costs as much as PyTorch's whole op.
_LEAST_ELEMENTS = 1 << 14


def has_kernel(input: Tensor, dropout_p: float) -> bool:
    """Whether the op is faster than PyTorch's dropout, and nobody needs what only the latter has."""
    return (
        not torch.compiler.is_compiling()
        and input.is_cpu
        and 0.0 < dropout_p < 1.0
        and input.numel() >= _LEAST_ELEMENTS
        and not _dispatch.needs_reference_derivatives(input)
    )


def dropout(input: Tensor, dropout_p: float) -> Tensor:
    """Drops elements of ``input``: ``input / (1 - p)`` where it survives and 0 elsewhere.

    Args:
        input: [..., columns], float32, bfloat16, float16 or float64.
        dropout_p: probability of dropping an element, in (0, 1).

    Returns:
        Like ``input``, contiguous.

    Differs from ``F.dropout``: its random numbers are Philox's, counted by position, so that they are drawn by all
    threads at once, and anew by the backward instead of being kept.
    """
    return _dropout(*dropout_call(input, dropout_p, backend=_dispatch.resolve(None)))


def _kernel(*args: Any) -> Tensor:
    call = DropoutCall(*args)
    if call.input.numel() == 0:
        return torch.empty_like(call.input, memory_format=torch.contiguous_format)
    return _dispatch.serve("dropout", call, lambda backend: backend.dropout(call))


def _fake(*args: Any) -> Tensor:
    return torch.empty_like(args[0], memory_format=torch.contiguous_format)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        ctx.save_for_backward(args[1])
        ctx.numbers = args[2:]
        return _dropout(*args)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        # Dropout is linear: its gradient is dropout again, of the same elements, and so is the gradient's.
        return _dropout(dout, *ctx.saved_tensors, *ctx.numbers), None, None, None


_dropout = define("dropout", f"({_CALL_SCHEMA}) -> Tensor", kernel=_kernel, fake=_fake, function=_Dropout)
