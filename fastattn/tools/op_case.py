"""A call that ``fastattn verify ops`` checks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Tensors = Mapping[str, Tensor]

SEED = 20


@dataclass(frozen=True)
class OpCase:
    """One call of an op.

    ``tensors`` draws its differentiable inputs, in float64, from a seed; ``ours`` maps them, in any dtype, and a
    backend's name to named outputs, and ``eager`` does the same in plain PyTorch, in the dtype that it is given; what
    else they need, such as a mask, they bring to the tensors' device.  The rule is applied to ``draws`` draws together,
    and, where ``has_gradients``, to the gradients too.
    """

    op: str
    mask: str
    variant: str
    tensors: Callable[[int], Tensors]
    ours: Callable[[Tensors, str | None], Tensors]
    eager: Callable[[Tensors], Tensors]
    draws: int = 1
    has_gradients: bool = True


class Draw:
    """Normal random float64 tensors from a stream of its own."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(SEED + seed)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator, dtype=torch.float64)
