"""The canonical feed-forward call."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastattn.spec.checks import check_dropout, check_like, check_shape, check_tensor, draw_dropout_state

ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu")


class FeedForwardCall(NamedTuple):
    """The arguments of ``fastattn::feed_forward``, in order.

    Shapes: ``input`` [..., model_dim]; ``weight_in`` and ``weight_gate`` [ff_dim, model_dim]; ``bias_in`` and
    ``bias_gate`` [ff_dim]; ``weight_out`` [out_dim, ff_dim]; ``bias_out`` [out_dim]; ``residual`` [..., out_dim];
    ``dropout_state`` (of the hidden activation) and ``output_dropout_state`` int64 [2].  ``backend`` is "" for the
    automatic choice.
    """

    input: Tensor
    weight_in: Tensor
    bias_in: Tensor | None
    weight_gate: Tensor | None
    bias_gate: Tensor | None
    weight_out: Tensor
    bias_out: Tensor | None
    residual: Tensor | None
    dropout_state: Tensor | None
    output_dropout_state: Tensor | None
    activation: str
    dropout_p: float
    output_dropout_p: float
    backend: str

    @property
    def num_tokens(self) -> int:
        return math.prod(self.input.shape[:-1])

    @property
    def ff_dim(self) -> int:
        return self.weight_in.shape[0]


# The fields of FeedForwardCall that gradients flow to, in the order in which feed_forward_backward returns them.  The
# residual is not among them: its gradient is the output's.
DIFFERENTIABLE = ("input", "weight_in", "bias_in", "weight_gate", "bias_gate", "weight_out", "bias_out")


def feed_forward_call(
    input: Tensor,
    weight_in: Tensor,
    bias_in: Tensor | None,
    weight_out: Tensor,
    bias_out: Tensor | None,
    *,
    activation: str,
    weight_gate: Tensor | None,
    bias_gate: Tensor | None,
    residual: Tensor | None = None,
    dropout_p: float,
    output_dropout_p: float = 0.0,
    generator: torch.Generator | None,
    backend: str,
) -> FeedForwardCall:
    """Validates what the user passed to ``feed_forward`` and returns its canonical form.

    Raises:
        ValueError: shapes or numbers do not fit, or there is no such activation.
        TypeError: dtypes or devices do not fit.
    """
    check_tensor("input", input)
    if input.dim() < 1 or input.shape[-1] == 0:
        raise ValueError(f"input must be [..., model_dim] with model_dim >= 1, got {list(input.shape)}")
    model_dim = input.shape[-1]
    check_like("weight_in", weight_in, "input", input)
    if weight_in.dim() != 2 or weight_in.shape[0] == 0 or weight_in.shape[1] != model_dim:
        raise ValueError(f"weight_in must be [ff_dim >= 1, model_dim={model_dim}], got {list(weight_in.shape)}")
    ff_dim = weight_in.shape[0]
    check_like("weight_out", weight_out, "input", input)
    if weight_out.dim() != 2 or weight_out.shape[0] == 0 or weight_out.shape[1] != ff_dim:
        raise ValueError(f"weight_out must be [model_dim >= 1, ff_dim={ff_dim}], got {list(weight_out.shape)}")
    if bias_gate is not None and weight_gate is None:
        raise ValueError("bias_gate needs weight_gate: got a bias for a gate that is not there")
    for name, tensor, shape in (
        ("bias_in", bias_in, (ff_dim,)),
        ("weight_gate", weight_gate, (ff_dim, model_dim)),
        ("bias_gate", bias_gate, (ff_dim,)),
        ("bias_out", bias_out, (weight_out.shape[0],)),
    ):
        if tensor is not None:
            check_like(name, tensor, "input", input)
            check_shape(name, tensor, shape)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(map(repr, ACTIVATIONS))}, got {activation!r}")
    if residual is not None:
        check_like("residual", residual, "input", input)
        check_shape("residual", residual, (*input.shape[:-1], weight_out.shape[0]))
    p, output_p = check_dropout(dropout_p), check_dropout(output_dropout_p, "output_dropout_p")
    return FeedForwardCall(
        input,
        weight_in,
        bias_in,
        weight_gate,
        bias_gate,
        weight_out,
        bias_out,
        residual,
        # In the order of a layer's: first what is between the products, then what is after them.
        draw_dropout_state(p, generator, input.device),
        draw_dropout_state(output_p, generator, input.device),
        activation,
        p,
        output_p,
        backend,
    )


def empty_output(call: FeedForwardCall) -> Tensor:
    """Returns uninitialised memory for the output: contiguous [..., out_dim] in input's dtype."""
    return call.input.new_empty((*call.input.shape[:-1], call.weight_out.shape[0]))
