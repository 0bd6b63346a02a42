"""C++ kernels for CPUs (``csrc/cpu``): AVX-512, AVX2 or portable, chosen at run time."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from fastattn.backends import blocked, packed
from fastattn.backends.base import Backend
from fastattn.backends.extension import cpu_flags, kernels, load
from fastattn.backends.products import product
from fastattn.reference import linear as linear_formula
from fastattn.reference import paged_attention as paged_formula
from fastattn.reference import rotary_embedding as rotary_embedding_formula
from fastattn.spec import attention_weights as attention_weights_spec
from fastattn.spec import embedding as embedding_spec
from fastattn.spec import feed_forward as feed_forward_spec
from fastattn.spec import linear as linear_spec
from fastattn.spec import rotary_embedding as rotary_embedding_spec
from fastattn.spec.attention import DIFFERENTIABLE, AttentionCall, empty_output, kept_lse_dtype, lse_dtype
from fastattn.spec.attention_weights import WeightsCall
from fastattn.spec.checks import empty_contiguous
from fastattn.spec.dropout import DropoutCall
from fastattn.spec.embedding import EmbeddingBackwardCall, EmbeddingCall
from fastattn.spec.feed_forward import FeedForwardCall
from fastattn.spec.linear import LinearCall
from fastattn.spec.linear_cross_entropy import LinearCrossEntropyCall
from fastattn.spec.norm import NormBackwardCall, NormCall, empty_outputs
from fastattn.spec.paged_attention import PagedCall
from fastattn.spec.rotary_embedding import RotaryEmbeddingCall
from fastattn.spec.softmax import SoftmaxBackwardCall, SoftmaxCall


class CpuBackend(Backend):
    name = "cpu"
    device_types = ("cpu",)

    def unavailable(self) -> str | None:
        return load()[1]

    def attention(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        if call.starts_q is not None:
            return packed.attention(call, self.attention)
        out, lse = empty_output(call)
        kernels().attention_forward(call, out, lse)
        return out, lse

    def attention_with_weights(self, call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
        out, lse = empty_output(call)
        weights, _ = attention_weights_spec.empty_result(WeightsCall(call, lse, "head_mean", 0, 1))
        kernels().attention_forward(call, out, lse, weights)
        return out, lse, weights

    def attention_backward(
        self, call: AttentionCall, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None, needed: Sequence[bool]
    ) -> list[Tensor | None]:
        if call.starts_q is not None:
            return packed.attention_backward(call, out, lse, dout, dlse, needed, self.attention_backward)
        grads = [
            torch.empty_like(tensor) if need and tensor is not None else None
            for tensor, need in zip((getattr(call, f) for f in DIFFERENTIABLE), needed, strict=True)
        ]
        written = [
            _row_buffer(grad, _written_dtype(call, field, grad)) if grad is not None else None
            for field, grad in zip(DIFFERENTIABLE, grads, strict=True)
        ]
        dlse = dlse if dlse is None else _kept(dlse)
        kernels().attention_backward(call, _rows(out), _kept(lse), _rows(dout), dlse, *written)
        for grad, values in zip(grads, written, strict=True):
            if grad is not None and values is not None and values is not grad:
                grad.copy_(values)
        return grads

    def paged_attention(self, call: PagedCall) -> tuple[Tensor, Tensor]:
        return paged_formula.paged_attention(call, self.attention)

    def attention_weights(self, call: WeightsCall) -> tuple[Tensor, Tensor]:
        call = call._replace(lse=_kept(call.lse))
        result, indices = attention_weights_spec.empty_result(call)
        if call.reduce in ("none", "head_mean"):
            kernels().attention_weights(call.attention, call.lse, result, call.reduce == "head_mean")
        else:
            kernels().attention_weights_reduced(*call, result, indices)
        return result, indices

    def feed_forward(self, call: FeedForwardCall) -> Tensor:
        if call.input.dtype == torch.float64:
            out = blocked.feed_forward(call)
        else:
            out = feed_forward_spec.empty_output(call)
            kernels().feed_forward(_rows_contiguous(call), out.view(call.num_tokens, -1))
        return _drop_and_add(call, out)

    def feed_forward_backward(self, call: FeedForwardCall, dout: Tensor, needed: Sequence[bool]) -> list[Tensor | None]:
        if call.output_dropout_state is not None:
            dout = self.dropout(DropoutCall(dout, call.output_dropout_state, call.output_dropout_p, self.name))
        if call.input.dtype == torch.float64:
            return blocked.feed_forward_backward(call, dout, needed)
        grads = [
            empty_contiguous(t) if need and t is not None else None
            for t, need in zip((getattr(call, f) for f in feed_forward_spec.DIFFERENTIABLE), needed, strict=True)
        ]
        dinput = None if grads[0] is None else grads[0].view(call.num_tokens, -1)
        kernels().feed_forward_backward(_rows_contiguous(call), _matrix(dout, dout.shape[-1]), dinput, *grads[1:])
        return grads

    def dropout(self, call: DropoutCall) -> Tensor:
        columns = call.input.shape[-1]
        out = torch.empty_like(call.input, memory_format=torch.contiguous_format)
        kernels().dropout(
            call.input.contiguous().view(-1, columns), call.dropout_state, call.dropout_p, out.view(-1, columns)
        )
        return out

    def embedding(self, call: EmbeddingCall) -> Tensor:
        out = embedding_spec.empty_output(call)
        table = None if call.position_table is None else _rows(call.position_table)
        kernels().embedding(
            _rows(call.weight),
            call.ids.reshape(-1).contiguous(),
            table,
            None if call.positions is None else call.positions.contiguous(),
            call.dropout_state,
            call.ids.shape[-1] if call.positions is None else call.positions.numel(),
            call.offset,
            call.scale,
            call.dropout_p,
            out,
        )
        return out

    def embedding_backward(self, call: EmbeddingBackwardCall) -> list[Tensor | None]:
        grads = embedding_spec.empty_gradients(call)
        kernels().embedding_backward(
            _matrix(call.dout, call.dout.shape[-1]),
            call.ids.reshape(-1).contiguous(),
            None if call.positions is None else call.positions.contiguous(),
            call.dropout_state,
            call.num_embeddings,
            call.num_positions,
            call.ids.shape[-1] if call.positions is None else call.positions.numel(),
            call.offset,
            call.scale,
            call.padding_idx,
            call.dropout_p,
            *grads,
        )
        return grads

    def linear(self, call: LinearCall) -> list[Tensor]:
        outs = linear_spec.empty_outputs(call)
        if call.input.dtype == torch.float64:
            return list(linear_formula.linear(call))
        matrices = [out.view(call.num_tokens, -1) for out in outs]
        product(
            [_matrix(call.input, call.input.shape[-1])], call.weight, matrices, bias=call.bias, right_transposed=True
        )
        return outs

    def linear_backward(self, call: LinearCall, douts: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor | None]:
        need_input, need_weight, need_bias = needed
        rows = [_matrix(dout, call.part_dim) for dout in douts]
        dinput = dweight = dbias = None
        if need_input:
            dinput = call.input.new_empty(call.input.shape)
            product(rows, call.weight, [dinput.view(call.num_tokens, -1)])
        if need_weight:
            dweight = call.weight.new_empty(call.weight.shape)
            product(rows, _matrix(call.input, call.input.shape[-1]), [dweight], left_transposed=True)
        if need_bias and call.bias is not None:
            dbias = torch.cat([dout.sum(0) for dout in rows])
        return [dinput, dweight, dbias]

    def linear_cross_entropy(self, call: LinearCrossEntropyCall) -> tuple[Tensor, Tensor]:
        return blocked.linear_cross_entropy(call, product_dtype(cpu_flags(), call.hidden.dtype))

    def linear_cross_entropy_one_pass(
        self, call: LinearCrossEntropyCall, needed: Sequence[bool]
    ) -> list[Tensor | None]:
        loss, lse = self.linear_cross_entropy(call)
        return [loss, lse, *self.linear_cross_entropy_backward(call, lse, torch.ones_like(loss), needed)]

    def linear_cross_entropy_backward(
        self, call: LinearCrossEntropyCall, lse: Tensor, dloss: Tensor, needed: Sequence[bool]
    ) -> list[Tensor | None]:
        dtype = product_dtype(cpu_flags(), call.hidden.dtype)
        return blocked.linear_cross_entropy_backward(call, lse, dloss, needed, dtype)

    def norm(self, call: NormCall) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        outputs = empty_outputs(call)
        residual = None if call.residual is None else _matrix(call.residual, call.columns)
        input = _matrix(call.input, call.columns)
        weight, bias = (None if p is None else p.contiguous() for p in (call.weight, call.bias))
        kernels().norm(input, residual, weight, bias, call.eps, call.rms, *outputs)
        return outputs

    def norm_backward(self, call: NormBackwardCall) -> list[Tensor | None]:
        columns = call.input.numel() // call.rstd.numel()
        tensors = (call.input, call.weight, call.bias)
        grads = [
            empty_contiguous(t) if t is not None and need else None
            for t, need in zip(tensors, call.needed, strict=True)
        ]
        dinput, dweight, dbias = grads
        kernels().norm_backward(
            _matrix(call.input, columns),
            None if call.weight is None else call.weight.contiguous(),
            call.mean,
            call.rstd,
            _matrix(call.dout, columns),
            None if call.dtotal is None else _matrix(call.dtotal, columns),
            call.rms,
            dinput,
            None if dweight is None else dweight.view(-1),
            None if dbias is None else dbias.view(-1),
        )
        return grads

    def rotary_embedding(self, call: RotaryEmbeddingCall) -> tuple[Tensor, Tensor]:
        call = rotary_embedding_formula.with_tables(call)
        query, key = rotary_embedding_spec.empty_outputs(call)
        positions = None if call.positions is None else call.positions.contiguous()
        turns = rotary_embedding_formula.turns(call) if call.cos is None else None
        kernels().rotary_embedding(call._replace(positions=positions), turns, query, key)
        return query, key

    def softmax(self, call: SoftmaxCall) -> Tensor:
        call = call._replace(input=_with_rows(call.input), mask=_mask_with_rows(call.mask))
        out = call.input.new_empty(call.input.shape, dtype=call.out_dtype)
        kernels().softmax(call, out)
        return out

    def softmax_backward(self, call: SoftmaxBackwardCall) -> Tensor:
        call = call._replace(out=call.out.contiguous(), dout=call.dout.contiguous(), mask=_mask_with_rows(call.mask))
        dinput = call.out.new_empty(call.out.shape, dtype=call.dtype)
        kernels().softmax_backward(call, dinput)
        return dinput


def _matrix(tensor: Tensor, columns: int) -> Tensor:
    """Returns ``tensor`` as [rows, columns] with adjacent columns, copied only where no view is possible."""
    matrix = tensor.reshape(-1, columns)
    return matrix if columns == 1 or matrix.stride(1) == 1 else matrix.contiguous()


def _drop_and_add(call: FeedForwardCall, out: Tensor) -> Tensor:
    """Applies the last dropout to ``out`` [..., out_dim] of a feed-forward where it stands, and adds the residual."""
    if call.output_dropout_state is None:
        return out if call.residual is None else out.add_(call.residual)
    rows = out.view(call.num_tokens, -1)
    residual = None if call.residual is None else call.residual.contiguous().view(rows.shape)
    kernels().dropout(rows, call.output_dropout_state, call.output_dropout_p, rows, residual)
    return out


def _rows_contiguous(call: FeedForwardCall) -> FeedForwardCall:
    """Returns ``call`` with input [tokens, model_dim] and all last dimensions contiguous, copied where needed."""
    call = call._replace(input=call.input.reshape(call.num_tokens, -1))
    copied = {}
    for field in feed_forward_spec.DIFFERENTIABLE:
        tensor = getattr(call, field)
        if tensor is not None and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            copied[field] = tensor.contiguous()
    return call._replace(**copied) if copied else call


def product_dtype(flags: Collection[str], dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype in which PyTorch multiplies inputs of ``dtype`` best: half precision is widened without AMX.

    Args:
        flags: the processor's, as :func:`cpu_flags` returns them.
        dtype: of the inputs.
    """
    if dtype in (torch.float32, torch.float64) or (dtype == torch.bfloat16 and "amx_bf16" in flags):
        return dtype
    return torch.float32


def _kept(lse: Tensor) -> Tensor:
    """Returns lse, or its gradient, as the kernels take it; a user of the op may hand in a float32 one."""
    dtype = kept_lse_dtype(lse.device)
    return lse if lse.dtype == dtype and lse.is_contiguous() else lse.to(dtype).contiguous()


def _rows(tensor: Tensor) -> Tensor:
    """Returns ``tensor`` with a contiguous last dimension."""
    return tensor if tensor.shape[-1] <= 1 or tensor.stride(-1) == 1 else tensor.contiguous()


def _written_dtype(call: AttentionCall, field: str, grad: Tensor) -> torch.dtype:
    """Returns the dtype in which the kernel writes a gradient: its own, unless it adds to what it has written."""
    wide = lse_dtype(call.query.dtype)
    batch, num_heads_q, seq_len_q, _ = call.query.shape
    shared = (
        field == "bias" and grad.shape[2:] == (seq_len_q, call.key.shape[2]) and grad.shape[:2] != (batch, num_heads_q)
    )
    return wide if shared or field == "sinks" or lse_dtype(grad.dtype) != wide else grad.dtype


def _row_buffer(grad: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns uninitialised memory of ``grad``'s shape in ``dtype`` with rows: ``grad`` if it is that."""
    if grad.dtype == dtype and (grad.shape[-1] <= 1 or grad.stride(-1) == 1):
        return grad
    return grad.new_empty(grad.shape, dtype=dtype)


def _with_rows(tensor: Tensor) -> Tensor:
    """Returns ``tensor``, or a copy where neighbours in its last dimension are not neighbours in memory."""
    if tensor.is_contiguous() or (tensor.stride(-1) == 1 and tensor.shape[-1] > 1):
        return tensor
    return tensor.contiguous()


def _mask_with_rows(mask: Tensor | None) -> Tensor | None:
    """Returns ``mask``, or a copy where its last dimension is neither contiguous nor broadcast."""
    if mask is None or (mask.stride(-1) in (0, 1) and mask.shape[-1] > 1):
        return mask
    return mask.contiguous()
