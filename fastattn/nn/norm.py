"""LayerNorm and RMSNorm, drop-ins for ``torch.nn``'s."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastattn.ops.norm import layer_norm, rms_norm


class LayerNorm(torch.nn.LayerNorm):
    """``(x - mean) / sqrt(variance + eps) * weight + bias`` over the last dimensions.

    Constructor, state_dict and initialisation are those of ``torch.nn.LayerNorm``, of which this is a subclass.

    Source: Ba, Kiros and Hinton, "Layer Normalization", 2016, equation 3.
    """

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Any:
        """Normalises ``input``, or its sum with ``residual``.

        Args:
            input: [..., *normalized_shape]; float32, bfloat16, float16 or float64.
            residual: like input, or None.

        Returns:
            Like input; with ``residual`` the pair of that and ``input + residual``.

        Raises:
            ValueError: the shape does not end with ``normalized_shape``.
            TypeError: dtypes or devices do not fit.
        """
        _check_shape(self, input)
        if self.weight is None and len(self.normalized_shape) > 1:
            return _flattened(layer_norm, self.normalized_shape, input, None, None, residual=residual, eps=self.eps)
        return layer_norm(input, self.weight, self.bias, residual=residual, eps=self.eps)


class RMSNorm(torch.nn.RMSNorm):
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimensions.

    Constructor, state_dict and initialisation are those of ``torch.nn.RMSNorm``, of which this is a subclass.

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019, equation 4.
    """

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Any:
        """Normalises ``input``, or its sum with ``residual``; arguments and results as :class:`LayerNorm`'s."""
        _check_shape(self, input)
        if self.weight is None and len(self.normalized_shape) > 1:
            return _flattened(rms_norm, self.normalized_shape, input, None, residual=residual, eps=self.eps)
        return rms_norm(input, self.weight, residual=residual, eps=self.eps)


def _check_shape(module: torch.nn.LayerNorm | torch.nn.RMSNorm, input: Tensor) -> None:
    shape = module.normalized_shape
    if tuple(input.shape[max(input.dim() - len(shape), 0) :]) != tuple(shape):
        raise ValueError(f"input must end with normalized_shape {list(shape)}, got {list(input.shape)}")


def _flattened(
    norm: Callable[..., Any],
    shape: tuple[int, ...],
    input: Tensor,
    *parameters: None,
    residual: Tensor | None,
    eps: Any,
) -> Any:
    """Without a weight the op cannot know how many dimensions to normalise over: they become one."""
    first = input.dim() - len(shape)
    if residual is None:
        return norm(input.flatten(first), *parameters, eps=eps).unflatten(-1, shape)
    pair = norm(input.flatten(first), *parameters, residual=residual.flatten(first), eps=eps)
    return tuple(t.unflatten(-1, shape) for t in pair)
