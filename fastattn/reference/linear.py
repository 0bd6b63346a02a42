"""A linear layer, from the formula."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fastattn.spec.linear import LinearCall


def linear(call: LinearCall) -> tuple[Tensor, ...]:
    """Returns the parts of ``input @ weight^T + bias``, each [..., part_dim]."""
    return F.linear(call.input, call.weight, call.bias).split(call.part_dim, dim=-1)
