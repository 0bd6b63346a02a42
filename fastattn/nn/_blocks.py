"""What encoder and decoder layers share, fused where that changes nothing but the speed."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn.ops.feed_forward import feed_forward as fused_feed_forward

_FUNCTIONS = {F.relu: "relu", torch.relu: "relu", F.gelu: "gelu", F.silu: "silu"}


def is_plain(module: object, *types: type[nn.Module]) -> bool:
    """Whether calling ``module`` means exactly what its type means, so that a kernel may read its parameters instead.

    False for other types (subclasses, parametrised or quantised modules), for hooks, and for a forward replaced on the
    instance.
    """
    return (
        isinstance(module, nn.Module)
        and type(module) in types
        and "forward" not in module.__dict__
        and not (module._forward_hooks or module._forward_pre_hooks)
        and not (module._backward_hooks or module._backward_pre_hooks)
        and not nn.modules.module._has_any_global_hook()
    )


def add_norm(norm: nn.Module, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """Returns ``(norm(residual + x), residual + x)``."""
    total = residual + x
    return norm(total), total


def feed_forward(
    linear1: nn.Module, activation: Callable[[Tensor], Tensor], dropout: nn.Module, linear2: nn.Module, x: Tensor
) -> Tensor:
    """Returns ``linear2(dropout(activation(linear1(x))))``."""
    name = _activation_name(activation)
    if (
        name is None
        or not (is_plain(linear1, nn.Linear) and is_plain(linear2, nn.Linear) and is_plain(dropout, nn.Dropout))
        or dropout.p >= 1.0
    ):
        return linear2(dropout(activation(linear1(x))))
    return fused_feed_forward(
        x,
        linear1.weight,
        linear1.bias,
        linear2.weight,
        linear2.bias,
        activation=name,
        dropout_p=dropout.p if dropout.training else 0.0,
    )


def _activation_name(activation: Callable[[Tensor], Tensor]) -> str | None:
    """Returns the kernels' name of ``activation``, or None for one that they do not have."""
    if is_plain(activation, nn.ReLU):
        return "relu"
    if is_plain(activation, nn.SiLU):
        return "silu"
    if is_plain(activation, nn.GELU):
        return "gelu" if activation.approximate == "none" else "gelu_tanh"
    return None if isinstance(activation, nn.Module) else _FUNCTIONS.get(activation)
