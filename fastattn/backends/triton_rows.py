"""The Triton backend's ops besides attention: what each launches."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastattn.spec.dropout import DropoutCall
from fastattn.spec.linear import LinearCall
from fastattn.spec.norm import NormBackwardCall, NormCall
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

    def linear(self, call: LinearCall) -> list[Tensor]:
        from fastattn.kernels.product import linear_fwd

        return linear_fwd(call)

    def linear_backward(self, call: LinearCall, douts: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor | None]:
        from fastattn.kernels.product import linear_bwd

        return linear_bwd(call, douts, needed)
