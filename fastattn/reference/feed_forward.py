"""The feed-forward block, from the formula; it holds the whole [tokens, ff_dim] hidden activation."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from fastattn.reference.philox import keep_mask
from fastattn.spec.attention import lse_dtype
from fastattn.spec.feed_forward import FeedForwardCall

ACTIVATION_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}


def feed_forward(call: FeedForwardCall) -> Tensor:
    """Returns [..., out_dim] in input's dtype; computes in float32 (float64 for float64), rounds once at the end."""
    # Two dimensions whatever the input's, so that no gradient is dout itself.
    dtype = lse_dtype(call.input.dtype)

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight.to(dtype), None if bias is None else bias.to(dtype))

    x = call.input.to(dtype).reshape(call.num_tokens, -1)
    hidden = ACTIVATION_FUNCTIONS[call.activation](linear(x, call.weight_in, call.bias_in))
    if call.weight_gate is not None:
        hidden = hidden * linear(x, call.weight_gate, call.bias_gate)
    if call.dropout_state is not None:
        keep = keep_mask(call.dropout_state, call.dropout_p, 1, call.num_tokens, call.ff_dim)[0]
        hidden = (hidden / (1.0 - call.dropout_p)).where(keep, 0.0)
    out = linear(hidden, call.weight_out, call.bias_out)
    if call.output_dropout_state is not None:
        keep = keep_mask(call.output_dropout_state, call.output_dropout_p, 1, *out.shape)[0]
        out = (out / (1.0 - call.output_dropout_p)).where(keep, 0.0)
    if call.residual is not None:
        out = out + call.residual.to(dtype).reshape(out.shape)
    return out.to(call.input.dtype).view(*call.input.shape[:-1], -1)
