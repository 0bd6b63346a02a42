"""The reference as a backend: any device that PyTorch has, any op; it holds what the formula holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn.backends.base import Backend
from fastattn.reference import attention as attention_formula
from fastattn.reference import attention_weights as attention_weights_formula
from fastattn.reference import dropout as dropout_formula
from fastattn.reference import embedding as embedding_formula
from fastattn.reference import feed_forward as feed_forward_formula
from fastattn.reference import linear as linear_formula
from fastattn.reference import linear_cross_entropy as linear_cross_entropy_formula
from fastattn.reference import norm as norm_formula
from fastattn.reference import paged_attention as paged_formula
from fastattn.reference import rotary_embedding as rotary_embedding_formula
from fastattn.reference import softmax as softmax_formula
from fastattn.spec import feed_forward as feed_forward_spec
from fastattn.spec import linear as linear_spec
from fastattn.spec import linear_cross_entropy as linear_cross_entropy_spec
from fastattn.spec import norm as norm_spec
from fastattn.spec import rotary_embedding as rotary_embedding_spec
from fastattn.spec.attention import DIFFERENTIABLE, AttentionCall, empty_output
from fastattn.spec.attention_weights import WeightsCall
from fastattn.spec.dropout import DropoutCall
from fastattn.spec.embedding import EmbeddingBackwardCall, EmbeddingCall
from fastattn.spec.paged_attention import PagedCall
from fastattn.spec.rotary_embedding import RotaryEmbeddingCall
from fastattn.spec.softmax import SoftmaxBackwardCall, SoftmaxCall


class ReferenceBackend(Backend):
    # Results are copied to the strides that the fake kernels promise: compiled programs rely on them.
    name = "reference"
    device_types = ("cpu", "cuda", "mps", "xpu", "meta")

    def attention(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        out, lse = attention_formula.attention(call)
        return empty_output(call)[0].copy_(out), lse

    def attention_backward(
        self, call: AttentionCall, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None, needed: Sequence[bool]
    ) -> list[Tensor | None]:
        grads = [dout] if dlse is None else [dout, dlse]
        found = gradients(lambda c: attention_formula.attention(c)[: len(grads)], call, DIFFERENTIABLE, needed, grads)
        return [
            None if grad is None else torch.empty_like(getattr(call, field)).copy_(grad)
            for field, grad in zip(DIFFERENTIABLE, found, strict=True)
        ]

    def paged_attention(self, call: PagedCall) -> tuple[Tensor, Tensor]:
        return paged_formula.paged_attention(call, self.attention)

    def attention_weights(self, call: WeightsCall) -> tuple[Tensor, Tensor]:
        return attention_weights_formula.reduced_in_blocks(call)

    def feed_forward(self, call: feed_forward_spec.FeedForwardCall) -> Tensor:
        return feed_forward_formula.feed_forward(call).contiguous()

    def feed_forward_backward(
        self, call: feed_forward_spec.FeedForwardCall, dout: Tensor, needed: Sequence[bool]
    ) -> list[Tensor | None]:
        def formula(c: feed_forward_spec.FeedForwardCall) -> tuple[Tensor]:
            return (feed_forward_formula.feed_forward(c),)

        return contiguous(gradients(formula, call, feed_forward_spec.DIFFERENTIABLE, needed, [dout]))

    def dropout(self, call: DropoutCall) -> Tensor:
        return dropout_formula.dropout(call)

    def embedding(self, call: EmbeddingCall) -> Tensor:
        return embedding_formula.embedding(call)

    def embedding_backward(self, call: EmbeddingBackwardCall) -> list[Tensor | None]:
        return contiguous([None if g is None else g.detach() for g in embedding_formula.differentiable(call)])

    def linear(self, call: linear_spec.LinearCall) -> list[Tensor]:
        return [part.contiguous() for part in linear_formula.linear(call)]

    def linear_backward(
        self, call: linear_spec.LinearCall, douts: Sequence[Tensor], needed: Sequence[bool]
    ) -> list[Tensor | None]:
        return contiguous(gradients(linear_formula.linear, call, linear_spec.DIFFERENTIABLE, needed, douts))

    def linear_cross_entropy(self, call: linear_cross_entropy_spec.LinearCrossEntropyCall) -> tuple[Tensor, Tensor]:
        return linear_cross_entropy_formula.linear_cross_entropy(call)

    def linear_cross_entropy_one_pass(
        self, call: linear_cross_entropy_spec.LinearCrossEntropyCall, needed: Sequence[bool]
    ) -> list[Tensor | None]:
        loss, lse = self.linear_cross_entropy(call)
        return [loss, lse, *self.linear_cross_entropy_backward(call, lse, torch.ones_like(loss), needed)]

    def linear_cross_entropy_backward(
        self,
        call: linear_cross_entropy_spec.LinearCrossEntropyCall,
        lse: Tensor,
        dloss: Tensor,
        needed: Sequence[bool],
    ) -> list[Tensor | None]:
        def formula(c: linear_cross_entropy_spec.LinearCrossEntropyCall) -> tuple[Tensor]:
            return (linear_cross_entropy_formula.linear_cross_entropy(c)[0],)

        return contiguous(gradients(formula, call, linear_cross_entropy_spec.DIFFERENTIABLE, needed, [dloss]))

    def norm(self, call: norm_spec.NormCall) -> tuple[Tensor, ...]:
        return tuple(out.contiguous() for out in norm_formula.norm(call))

    def norm_backward(self, call: norm_spec.NormBackwardCall) -> list[Tensor | None]:
        forward = norm_spec.NormCall(
            call.input, None, call.weight, call.bias, call.num_dims, call.eps, call.rms, call.backend
        )
        found = gradients(
            lambda c: norm_formula.norm(c)[:1], forward, norm_spec.DIFFERENTIABLE, call.needed, [call.dout]
        )
        if found[0] is not None and call.dtotal is not None:
            found[0] = found[0] + call.dtotal
        return contiguous(found)

    def rotary_embedding(self, call: RotaryEmbeddingCall) -> tuple[Tensor, ...]:
        empty = rotary_embedding_spec.empty_outputs(call)
        found = rotary_embedding_formula.rotary_embedding(call)
        return tuple(to.copy_(value) for to, value in zip(empty, found, strict=True))

    def softmax(self, call: SoftmaxCall) -> Tensor:
        return softmax_formula.softmax(call)

    def softmax_backward(self, call: SoftmaxBackwardCall) -> Tensor:
        return softmax_formula.softmax_backward(call)


def contiguous(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Returns each tensor in row-major order, as the ops' fakes promise their gradients."""
    return [None if t is None else t.contiguous() for t in tensors]


def gradients(
    formula: Callable[[Any], Sequence[Tensor]],
    call: NamedTuple,
    fields: Sequence[str],
    needed: Sequence[bool],
    grad_outputs: Sequence[Tensor],
    create_graph: bool = False,
) -> list[Tensor | None]:
    """Returns d(formula)/d(field) for each of ``fields`` of ``call`` that is needed, by recomputing the formula.

    Args:
        formula: maps a call to its outputs.
        call: the canonical call.
        fields: names of the tensors in it.
        needed: for each field, whether its gradient is wanted.
        grad_outputs: one a output of ``formula``.
        create_graph: True keeps the graph to the call's own tensors, for derivatives of a higher order.
    """
    wanted = [f for f, need in zip(fields, needed, strict=True) if need and getattr(call, f) is not None]
    with torch.enable_grad():
        if not create_graph:
            call = call._replace(**{f: getattr(call, f).detach().requires_grad_() for f in wanted})
        inputs = [getattr(call, f) for f in wanted]
        outputs = formula(call)
        kept = [(o, g) for o, g in zip(outputs, grad_outputs, strict=True) if o.requires_grad]
        found = (
            torch.autograd.grad(
                [o for o, _ in kept], inputs, [g for _, g in kept], create_graph=create_graph, materialize_grads=True
            )
            if kept and inputs
            else [torch.zeros_like(i) for i in inputs]
        )
    by_name = dict(zip(wanted, found, strict=True))
    return [by_name.get(f) for f in fields]
