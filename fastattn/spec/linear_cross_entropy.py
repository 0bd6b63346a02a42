"""The canonical call of a linear layer and the cross entropy of its result."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastattn.spec.attention import lse_dtype
from fastattn.spec.checks import check_finite, check_like, check_shape, check_tensor

REDUCTIONS = ("none", "sum", "mean")


class LinearCrossEntropyCall(NamedTuple):
    """The arguments of ``fastattn::linear_cross_entropy``, in order.

    Shapes: ``hidden`` [..., model_dim]; ``weight`` [vocab_size, model_dim]; ``target`` int64 [...]; ``bias``
    [vocab_size].  ``backend`` is "" for the automatic choice.
    """

    hidden: Tensor
    weight: Tensor
    target: Tensor
    bias: Tensor | None
    ignore_index: int
    label_smoothing: float
    reduction: str
    backend: str

    @property
    def num_tokens(self) -> int:
        return math.prod(self.target.shape)

    @property
    def vocab_size(self) -> int:
        return self.weight.shape[0]


# The fields of LinearCrossEntropyCall that gradients flow to, in the order of linear_cross_entropy_backward's results.
DIFFERENTIABLE = ("hidden", "weight", "bias")


def linear_cross_entropy_call(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    backend: str,
) -> LinearCrossEntropyCall:
    """Validates what the user passed to ``linear_cross_entropy`` and returns its canonical form.

    Raises:
        ValueError: shapes or numbers do not fit.
        TypeError: dtypes or devices do not fit.
    """
    check_tensor("hidden", hidden)
    if hidden.dim() < 1 or hidden.shape[-1] == 0:
        raise ValueError(f"hidden must be [..., model_dim] with model_dim >= 1, got {list(hidden.shape)}")
    check_like("weight", weight, "hidden", hidden)
    if weight.dim() != 2 or weight.shape[0] == 0 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(f"weight must be [vocab_size >= 1, model_dim={hidden.shape[-1]}], got {list(weight.shape)}")
    if not isinstance(target, Tensor) or target.dtype != torch.int64:
        got = target.dtype if isinstance(target, Tensor) else type(target).__name__
        raise TypeError(f"target must be an int64 tensor of class indices, got {got}")
    if target.device != hidden.device:
        raise TypeError(f"target must be on hidden's device {hidden.device}, got {target.device}")
    check_shape("target", target, hidden.shape[:-1])
    if bias is not None:
        check_like("bias", bias, "hidden", hidden)
        check_shape("bias", bias, (weight.shape[0],))
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index must be an int, got {type(ignore_index).__name__}")
    smoothing = check_finite("label_smoothing", label_smoothing)
    if not 0.0 <= smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(map(repr, REDUCTIONS))}, got {reduction!r}")
    return LinearCrossEntropyCall(hidden, weight, target, bias, ignore_index, smoothing, reduction, backend)


def check_targets(call: LinearCrossEntropyCall) -> None:
    """Raises ValueError if a target is no class; where reading the targets would wait for a device, does nothing."""
    if call.target.device.type != "cpu" or call.num_tokens == 0 or all_count(call):
        return
    wrong = (call.target != call.ignore_index) & ((call.target < 0) | (call.target >= call.vocab_size))
    if wrong.any():
        raise ValueError(
            f"target must hold class indices in [0, vocab_size={call.vocab_size}) or ignore_index={call.ignore_index}, "
            f"got {call.target[wrong][0].item()}"
        )


def all_count(call: LinearCrossEntropyCall) -> bool:
    """Whether every target is a class and none is to be ignored; there is at least one."""
    low, high = (end.item() for end in call.target.aminmax())
    return low >= 0 and high < call.vocab_size and not low <= call.ignore_index <= high


def empty_output(call: LinearCrossEntropyCall) -> tuple[Tensor, Tensor]:
    """Returns uninitialised ``(loss, lse)``: loss [...] or [], lse [...]; float32, or float64 for float64."""
    dtype = lse_dtype(call.hidden.dtype)
    shape = tuple(call.target.shape)
    loss = call.hidden.new_empty(shape if call.reduction == "none" else (), dtype=dtype)
    return loss, call.hidden.new_empty(shape, dtype=dtype)
