"""What encoder and decoder layers share: the feed-forward and the normalised sum, fused where that changes nothing but
the speed."""

from __future__ import annotations

from torch import Tensor, nn


def is_plain(module: nn.Module, *types: type[nn.Module]) -> bool:
    """Whether calling ``module`` means exactly what its type means, so that a kernel may read its parameters instead.

    False for other types (subclasses, parametrised or quantised modules), for hooks, and for a forward replaced on the
    instance.
    """
    return (
        type(module) in types
        and "forward" not in module.__dict__
        and not (
            module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
        )
        and not nn.modules.module._has_any_global_hook()
    )


def add_norm(norm: nn.Module, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """Returns ``(norm(residual + x), residual + x)``."""
    total = residual + x
    return norm(total), total


def feed_forward(linear1: nn.Module, activation, dropout: nn.Module, linear2: nn.Module, x: Tensor) -> Tensor:
    """Returns ``linear2(dropout(activation(linear1(x))))``."""
    return linear2(dropout(activation(linear1(x))))
