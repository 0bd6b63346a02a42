"""The Triton backend's ops besides attention: what each launches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastattn.spec.dropout import DropoutCall
from fastattn.spec.embedding import EmbeddingBackwardCall, EmbeddingCall
from fastattn.spec.feed_forward import FeedForwardCall
from fastattn.spec.linear import LinearCall
from fastattn.spec.linear_cross_entropy import LinearCrossEntropyCall
from fastattn.spec.norm import NormBackwardCall, NormCall
from fastattn.spec.rotary_embedding import RotaryEmbeddingCall
from fastattn.spec.softmax import SoftmaxBackwardCall, SoftmaxCall


class RowOps:
    """Methods of the Triton backend; Triton is imported by the first call."""

    def softmax(self, call: SoftmaxCall) -> Tensor:
        from fastattn.kernels.softmax import softmax_fwd

        return softmax_fwd(call)

    def softmax_backward(self, call: SoftmaxBackwardCall) -> Tensor:
        from fastattn.kernels.softmax import softmax_bwd

        return softmax_bwd(call)

    def norm(self, call: NormCall) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        from fastattn.kernels.norm import norm_fwd

        return norm_fwd(call)

    def norm_backward(self, call: NormBackwardCall) -> list[Tensor | None]:
        from fastattn.kernels.norm import norm_bwd

        return norm_bwd(call)

    def dropout(self, call: DropoutCall) -> Tensor:
        from fastattn.kernels.dropout import dropout_fwd

        return dropout_fwd(call)

    def embedding(self, call: EmbeddingCall) -> Tensor:
        from fastattn.kernels.embedding import embedding_fwd

        return embedding_fwd(call)

    def embedding_backward(self, call: EmbeddingBackwardCall) -> list[Tensor | None]:
        from fastattn.kernels.embedding import embedding_bwd

        return embedding_bwd(call)

    def rotary_embedding(self, call: RotaryEmbeddingCall) -> tuple[Tensor, Tensor]:
        from fastattn.kernels.rotary_embedding import rotary_embedding_fwd

        return rotary_embedding_fwd(call)

    def linear(self, call: LinearCall) -> list[Tensor]:
        from fastattn.kernels.product import linear_fwd

        return linear_fwd(call)

    def linear_backward(self, call: LinearCall, douts: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor | None]:
        from fastattn.kernels.product import linear_bwd

        return linear_bwd(call, douts, needed)

    def feed_forward(self, call: FeedForwardCall) -> Tensor:
        from fastattn.kernels.feed_forward import feed_forward_fwd

        return feed_forward_fwd(call)

    def feed_forward_backward(self, call: FeedForwardCall, dout: Tensor, needed: Sequence[bool]) -> list[Tensor | None]:
        from fastattn.kernels.feed_forward import feed_forward_bwd

        return feed_forward_bwd(call, dout, needed)

    def linear_cross_entropy(self, call: LinearCrossEntropyCall) -> tuple[Tensor, Tensor]:
        from fastattn.kernels.linear_cross_entropy import linear_cross_entropy_fwd

        return linear_cross_entropy_fwd(call)

    def linear_cross_entropy_one_pass(
        self, call: LinearCrossEntropyCall, needed: Sequence[bool]
    ) -> list[Tensor | None]:
        from fastattn.kernels.linear_cross_entropy_one_pass import linear_cross_entropy_one_pass

        return linear_cross_entropy_one_pass(call, needed)

    def has_one_pass_loss(self, dtype: torch.dtype) -> bool:
        # In float16 a gradient that is not multiplied by the loss' scale yet would underflow.
        return dtype != torch.float16

    def scale(self, tensors: Sequence[Tensor], factor: Tensor) -> None:
        from fastattn.kernels.linear_cross_entropy_one_pass import scale

        scale(tensors, factor)

    def linear_cross_entropy_backward(
        self, call: LinearCrossEntropyCall, lse: Tensor, dloss: Tensor, needed: Sequence[bool]
    ) -> list[Tensor | None]:
        from fastattn.kernels.linear_cross_entropy import linear_cross_entropy_bwd

        return linear_cross_entropy_bwd(call, lse, dloss, needed)
