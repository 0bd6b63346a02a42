"""What encoder and decoder layers share, fused where that changes nothing but the speed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn.nn.norm import LayerNorm
from fastattn.ops import dropout as _dropout
from fastattn.ops.feed_forward import feed_forward as fused_feed_forward
from fastattn.ops.feed_forward import is_fastest
from fastattn.ops.linear import linear
from fastattn.ops.norm import layer_norm

# Where fusing starts to pay, measured on one AVX-512 core in float32.  Below 2^18 elements (1 MiB) the op's 30 us cost
# more than the pass over memory that it saves; at 2^20 it halves the time of sum and norm.
_LEAST_NORM = 1 << 18
# A hidden activation of 2^24 elements (64 MiB) falls out of every cache: there the fused block takes 0.85 of the time
# of two products and an activation, and 1.0 to 1.1 below.
_LEAST_FEED_FORWARD = 1 << 24

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


def apply_linear(module: Any, x: Tensor) -> Tensor:
    """Returns ``module(x)``, of a linear layer or whatever stands in its place."""
    if is_plain(module, nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return linear(x, module.weight, module.bias)[0]
    return module(x)


def apply_dropout(module: Any, x: Tensor) -> Tensor:
    """Returns ``module(x)``, of a dropout or whatever stands in its place."""
    if is_plain(module, nn.Dropout) and module.training and not module.inplace and _dropout.has_kernel(x, module.p):
        return _dropout.dropout(x, module.p)
    return module(x)


def add_norm(norm: Any, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """Returns ``(norm(residual + x), residual + x)``."""
    if _fuses_norm(norm, x, residual):
        normed, total = layer_norm(x, norm.weight, norm.bias, residual=residual, eps=norm.eps)
        return normed, total
    total = residual + x
    return norm(total), total


def feed_forward(linear1: Any, activation: Callable[[Tensor], Tensor], dropout: Any, linear2: Any, x: Tensor) -> Tensor:
    """Returns ``linear2(dropout(activation(linear1(x))))``."""
    name = _activation_name(activation) if is_plain(linear1, nn.Linear) else None
    if name is None or not _fuses_feed_forward(linear1, dropout, linear2, x):
        hidden = apply_linear(linear1, x)
        # Nobody else holds the product and no gradient needs it, so that its memory can be written again.
        hidden = torch.relu_(hidden) if name == "relu" else activation(hidden)
        return apply_linear(linear2, apply_dropout(dropout, hidden))
    return _fused(linear1, name, dropout, linear2, x)


def add_feed_forward(
    linear1: Any,
    activation: Callable[[Tensor], Tensor],
    dropout: Any,
    linear2: Any,
    last_dropout: Any,
    x: Tensor,
    residual: Tensor,
) -> Tensor:
    """Returns ``residual + last_dropout(linear2(dropout(activation(linear1(x)))))``."""
    name = _activation_name(activation) if is_plain(linear1, nn.Linear) else None
    if (
        name is None
        or not (is_plain(last_dropout, nn.Dropout) and last_dropout.p < 1.0)
        or residual.dtype != x.dtype
        # On a CPU there is nothing to gain but the pass over what is dropped.
        or (x.is_cpu and not (last_dropout.training and last_dropout.p > 0.0))
        or not _fuses_feed_forward(linear1, dropout, linear2, x)
    ):
        return residual + apply_dropout(last_dropout, feed_forward(linear1, activation, dropout, linear2, x))
    output_dropout_p = last_dropout.p if last_dropout.training else 0.0
    return _fused(linear1, name, dropout, linear2, x, residual=residual, output_dropout_p=output_dropout_p)


def _fused(linear1: Any, activation: str, dropout: Any, linear2: Any, x: Tensor, **options: Any) -> Tensor:
    return fused_feed_forward(
        x,
        linear1.weight,
        linear1.bias,
        linear2.weight,
        linear2.bias,
        activation=activation,
        dropout_p=dropout.p if dropout.training else 0.0,
        **options,
    )


def _fuses_norm(norm: Any, x: Tensor, residual: Tensor) -> bool:
    # A compiler fuses the modules itself.
    return (
        not torch.compiler.is_compiling()
        and x.numel() >= _LEAST_NORM
        and is_plain(norm, nn.LayerNorm, LayerNorm)
        and tuple(norm.normalized_shape) == (x.shape[-1],)
        # Under autocast PyTorch adds and normalises in float32, whatever x is.
        and x.dtype == residual.dtype
        and not torch.is_autocast_enabled(x.device.type)
    )


def _fuses_feed_forward(linear1: Any, dropout: Any, linear2: Any, x: Tensor) -> bool:
    if torch.compiler.is_compiling() or not is_plain(linear2, nn.Linear):
        return False
    if not is_plain(dropout, nn.Dropout) or dropout.p >= 1.0:
        return False
    if is_fastest(x) and x.dtype == linear1.weight.dtype and not torch.is_autocast_enabled(x.device.type):
        return True
    # For gradients the op computes the hidden activation again, which costs a quarter more time than keeping it.
    if torch.is_grad_enabled() and (x.requires_grad or linear1.weight.requires_grad or linear2.weight.requires_grad):
        return False
    return x.numel() // linear1.in_features * linear1.out_features >= _LEAST_FEED_FORWARD


def _activation_name(activation: Any) -> str | None:
    """Returns the kernels' name of ``activation``, or None for one that they do not have."""
    if is_plain(activation, nn.ReLU):
        return "relu"
    if is_plain(activation, nn.SiLU):
        return "silu"
    if is_plain(activation, nn.GELU):
        return "gelu" if activation.approximate == "none" else "gelu_tanh"
    return None if isinstance(activation, nn.Module) else _FUNCTIONS.get(activation)
