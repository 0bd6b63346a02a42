"""The feed-forward block as a module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastattn.ops.feed_forward import feed_forward
from fastattn.spec.feed_forward import ACTIVATIONS


class FeedForward(nn.Module):
    """Two linear layers with an activation, and optionally a gate, between them.

    ``linear2(dropout(act(linear1(x)) [* linear_gate(x)]))``.

    Args:
        model_dim: size of the input's and the output's last dimension.
        ff_dim: size of the hidden activation.
        activation: "relu" | "gelu" | "gelu_tanh" | "silu".
        gated: True multiplies the activation by ``linear_gate(x)``: with "silu" SwiGLU, with "gelu" GeGLU.
        dropout: probability of dropping an element of the hidden activation in training, in [0, 1).
        bias: False leaves all biases out.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: a size is below 1, there is no such activation, or dropout is outside [0, 1).

    Differs from the feed-forward of ``nn.TransformerEncoderLayer``: it stands alone.  Its ``linear1`` and ``linear2``
    hold the parameters under the same keys and start from the same distribution, but only
    :func:`fastattn.feed_forward` reads them: hooks on them do not run.

    Source: Vaswani et al., "Attention Is All You Need", 2017, equation 2; Shazeer, "GLU Variants Improve
    Transformer", 2020.
    """

    def __init__(
        self,
        model_dim: int,
        ff_dim: int,
        activation: str = "relu",
        *,
        gated: bool = False,
        dropout: float = 0.0,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("model_dim", model_dim), ("ff_dim", ff_dim)):
            if size < 1:
                raise ValueError(f"{name} must be >= 1, got {size}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(map(repr, ACTIVATIONS))}, got {activation!r}")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        self.linear1 = nn.Linear(model_dim, ff_dim, bias=bias, device=device, dtype=dtype)
        self.linear_gate = nn.Linear(model_dim, ff_dim, bias=bias, device=device, dtype=dtype) if gated else None
        self.linear2 = nn.Linear(ff_dim, model_dim, bias=bias, device=device, dtype=dtype)
        self.activation = activation
        self.dropout = dropout

    def forward(self, input: Tensor) -> Tensor:
        """Maps [..., model_dim] to [..., model_dim]; raises as :func:`fastattn.feed_forward` does."""
        gate = self.linear_gate
        return feed_forward(
            input,
            self.linear1.weight,
            self.linear1.bias,
            self.linear2.weight,
            self.linear2.bias,
            activation=self.activation,
            weight_gate=None if gate is None else gate.weight,
            bias_gate=None if gate is None else gate.bias,
            dropout_p=self.dropout if self.training else 0.0,
        )

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}, dropout={self.dropout}"
