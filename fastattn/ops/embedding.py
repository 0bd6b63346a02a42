"""Embedding of token ids, scaled, with positions and dropout in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.backends.extension import plain
from fastattn.ops import _dispatch
from fastattn.ops._registry import define, plain_apply
from fastattn.reference import embedding as formula
from fastattn.spec.attention import lse_dtype
from fastattn.spec.checks import check_tensor
from fastattn.spec.embedding import (
    NO_PADDING,
    EmbeddingBackwardCall,
    EmbeddingCall,
    embedding_call,
    empty_gradients,
    empty_output,
)


def embedding(
    ids: Tensor,
    weight: Tensor,
    *,
    position_table: Tensor | str | None = None,
    positions: Tensor | None = None,
    offset: int = 0,
    scale: float | None = None,
    padding_idx: int | None = None,
    dropout_p: float = 0.0,
    generator: torch.Generator | None = None,
    backend: str | None = None,
) -> Tensor:
    """Rows of an embedding, scaled, plus those of their positions, with dropout: one pass over the result.

    ``out[t] = dropout(scale * weight[ids[t]] + position_table[position of t])``.

    Args:
        ids: int64 or int32 [..., seq_len], each in [0, num_embeddings).
        weight: [num_embeddings, model_dim], float32, bfloat16, float16 or float64.
        position_table: [num_positions, model_dim], learned or not, of any of these dtypes, added unrounded;
            "sinusoidal" for sines and cosines of wavelengths up to 2 pi times 10000; None adds nothing.
        positions: int64 or int32 [seq_len], or broadcastable to ``ids``: rows of the table.  None for ``offset,
            offset + 1, ...`` in every sequence.
        offset: position of the first id; >= 0.
        scale: multiplies the rows of ``weight``, such as sqrt(model_dim); None for 1.
        padding_idx: this row of ``weight`` gets no gradient; negative ones count from the end.
        dropout_p: probability of dropping an element of the sum, in [0, 1).
        generator: draws the dropout's seed.
        backend: "reference" | "cpu" | "triton"; by default the first that supports the call.

    Returns:
        [..., seq_len, model_dim] in weight's dtype.

    Raises:
        ValueError: shapes or values do not fit, or the table has too few positions.
        TypeError: dtypes or devices do not fit.
        IndexError: an id or a position that is no row, on CPU.  On a GPU, where looking would wait for it, such a
            token's row is NaN and has no gradient; nothing is read out of bounds.
        UnsupportedError: the backend asked for cannot serve the call.

    Differs from ``torch.nn.functional.embedding``, of which it is one pass with scale, sum and dropout, in the order
    of the gradient's sums: tokens of a row are added in their order, in float32 or wider, at any thread count.

    Source: Vaswani et al. 2017, sections 3.4 and 3.5.
    """
    if isinstance(position_table, str):
        position_table, positions, offset = _sinusoidal(position_table, ids, weight, positions, offset)
    if positions is None and dropout_p == 0.0 and _dispatch.may_be_plain(backend):
        found = _plain(ids, weight, position_table, offset, scale, padding_idx)
        if found is not None:
            return found
    call = embedding_call(
        ids,
        weight,
        position_table=position_table,
        positions=positions,
        offset=offset,
        scale=scale,
        padding_idx=padding_idx,
        dropout_p=dropout_p,
        generator=generator,
        backend=_dispatch.resolve(backend),
    )
    if _dispatch.needs_reference_derivatives(call.weight, call.position_table):
        _dispatch.warn_reference("embedding", "forward-mode derivatives and torch.func transforms have no kernel")
        return formula.embedding(call)
    return _embedding(*call)


def _plain(
    ids: Tensor, weight: Tensor, table: Tensor | None, offset: int, scale: float | None, padding_idx: int | None
) -> Tensor | None:
    """Returns what a plain call does, or None where this is none."""
    if table is None and offset != 0:
        return None
    if padding_idx is not None and not (isinstance(weight, Tensor) and 0 <= padding_idx < len(weight)):
        return None
    factor = 1.0 if scale is None else scale
    found = plain.embedding(weight, ids, table, offset, factor)
    if type(found) is not list:
        return found
    padding = NO_PADDING if padding_idx is None else padding_idx
    return _apply_plain(weight, ids, table, found, (offset, float(factor), padding))


def _sinusoidal(
    name: str, ids: Tensor, weight: Tensor, positions: Tensor | None, offset: int
) -> tuple[Tensor, Tensor | None, int]:
    """Returns a table of sinusoids, with the positions and the offset that go with it."""
    if name != "sinusoidal":
        raise ValueError(f"position_table must be a tensor or 'sinusoidal', got {name!r}")
    check_tensor("weight", weight)
    if weight.dim() != 2 or not isinstance(ids, Tensor) or ids.dim() == 0 or offset < 0:
        return weight, positions, offset  # of which the checks will complain
    dtype = lse_dtype(weight.dtype)
    if positions is None:
        table = formula.sinusoidal_table(offset + ids.shape[-1], weight.shape[1], dtype, weight.device)
        return table, None, offset
    # How far they go is not known without reading them: the rows of these very positions.
    table = formula.sinusoids(positions.reshape(-1), weight.shape[1]).to(dtype)
    return table, torch.arange(len(table), device=weight.device).view(positions.shape), offset


def _kernel(*args: Any) -> Tensor:
    call = EmbeddingCall(*args)
    if call.ids.numel() == 0 or call.weight.shape[1] == 0:
        return empty_output(call)
    return _dispatch.serve("embedding", call, lambda backend: backend.embedding(call))


def _fake(*args: Any) -> Tensor:
    return empty_output(EmbeddingCall(*args))


def _backward_kernel(*args: Any) -> list[Tensor | None]:
    call = EmbeddingBackwardCall(*args)
    if call.dout.numel() == 0:
        return [None if grad is None else grad.zero_() for grad in empty_gradients(call)]
    return _dispatch.serve("embedding_backward", call, lambda backend: backend.embedding_backward(call))


def _backward_fake(*args: Any) -> list[Tensor]:
    call = EmbeddingBackwardCall(*args)
    return [call.dout.new_empty(0) if grad is None else grad for grad in empty_gradients(call)]


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        call = EmbeddingCall(*args)
        ctx.save_for_backward(call.ids, call.positions, call.dropout_state)
        table = call.position_table
        ctx.sizes = (len(call.weight), 0, call.weight.dtype)
        if table is not None:
            ctx.sizes = (len(call.weight), len(table), table.dtype)
        ctx.rest = args[5:9]
        ctx.backend = call.backend
        return _embedding(*args)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        needed = [ctx.needs_input_grad[0], ctx.needs_input_grad[2]]
        call = EmbeddingBackwardCall._make((dout, *ctx.saved_tensors, *ctx.sizes, *ctx.rest, needed, ctx.backend))
        dweight, dtable = formula.differentiable(call) if torch.is_grad_enabled() else _embedding_backward(*call)
        return (
            dweight if needed[0] else None,
            None,
            dtable if needed[1] else None,
            *(None,) * (len(EmbeddingCall._fields) - 3),
        )


class _PlainEmbedding(torch.autograd.Function):
    """A plain call's node: its result is there."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        ids: Tensor,
        table: Tensor | None,
        found: list[Tensor],
        numbers: tuple[int, float, int],
    ) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.sizes = (len(weight), 0, weight.dtype) if table is None else (len(weight), len(table), table.dtype)
        ctx.numbers = numbers
        return found[0]

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        (ids,), numbers = ctx.saved_tensors, ctx.numbers
        num_embeddings, num_positions, table_dtype = ctx.sizes
        needed = (ctx.needs_input_grad[0], ctx.needs_input_grad[2])
        if _dispatch.may_be_plain(None) and (not needed[1] or table_dtype == dout.dtype):
            found = plain.embedding_backward(dout, ids, num_embeddings, num_positions, *numbers, needed)
            if found is not None:
                return found[0], None, found[1], None, None
        call = EmbeddingBackwardCall._make((dout, ids, None, None, *ctx.sizes, *numbers, 0.0, list(needed), ""))
        dweight, dtable = formula.differentiable(call) if torch.is_grad_enabled() else _embedding_backward(*call)
        return dweight if needed[0] else None, None, dtable if needed[1] else None, None, None


_apply_plain = plain_apply(_PlainEmbedding)

_embedding = define(
    "embedding",
    "(Tensor weight, Tensor ids, Tensor? position_table, Tensor? positions, Tensor? dropout_state, int offset,"
    " float scale, int padding_idx, float dropout_p, str backend) -> Tensor",
    kernel=_kernel,
    fake=_fake,
    function=_Embedding,
)
_embedding_backward = define(
    "embedding_backward",
    "(Tensor dout, Tensor ids, Tensor? positions, Tensor? dropout_state, int num_embeddings, int num_positions,"
    " ScalarType table_dtype, int offset, float scale, int padding_idx, float dropout_p, bool[] needed, str backend)"
    " -> Tensor[]",
    kernel=_backward_kernel,
    fake=_backward_fake,
)
