"""The canonical attention call."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastattn import masks
from fastattn.biases import RelativeBias
from fastattn.masks import CanonicalMask, Mask, Shape
from fastattn.spec.checks import (
    check_dropout,
    check_finite,
    check_last_dim_contiguous,
    check_like,
    check_tensor,
    draw_dropout_state,
)


class AttentionCall(NamedTuple):
    """The arguments of ``fastattn::attention``, in order.  ``docs/architecture.md`` gives the meaning of each.

    Shapes: ``query`` [batch, num_heads_q, seq_len_q, head_dim]; ``key`` [batch, num_heads_kv, seq_len_k, head_dim];
    ``value`` [batch, num_heads_kv, seq_len_k, head_dim_v]; ``bias`` and ``dense_mask`` 4-D, each dimension full or 1;
    ``relative_bias`` [num_heads_q or 1, seq_len_q + seq_len_k - 1]; ``sinks`` [num_heads_q]; ``key_lengths`` int32
    [batch]; ``segments_q`` and ``segments_k`` int32 [batch, seq_len]; ``dropout_state`` int64 [2].  ``softcap`` is 0
    for none, ``backend`` "" for the automatic choice.  The fields from ``starts_q`` on are those of packed sequences
    (``spec/varlen_attention.py``), whose starts are int64 [num_sequences + 1], or None.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor | None
    relative_bias: Tensor | None
    sinks: Tensor | None
    dense_mask: Tensor | None
    key_lengths: Tensor | None
    segments_q: Tensor | None
    segments_k: Tensor | None
    dropout_state: Tensor | None
    diag_lo: int
    diag_hi: int
    softmax_scale: float
    softcap: float
    dropout_p: float
    backend: str
    starts_q: Tensor | None = None
    starts_k: Tensor | None = None
    longest_q: int = 0
    longest_k: int = 0
    from_end: bool = False

    @property
    def shape(self) -> Shape:
        """The sizes that mask and bias are laid over; of packed sequences, their number and the longest."""
        if self.starts_q is not None:
            return Shape(self.starts_q.shape[0] - 1, self.query.shape[1], self.longest_q, self.longest_k)
        return Shape(self.query.shape[0], self.query.shape[1], self.query.shape[2], self.key.shape[2])

    @property
    def group_size(self) -> int:
        """How many query heads share one key-value head."""
        return self.query.shape[1] // max(self.key.shape[1], 1)

    @property
    def mask(self) -> CanonicalMask:
        return CanonicalMask(
            self.diag_lo, self.diag_hi, self.key_lengths, self.segments_q, self.segments_k, self.dense_mask
        )

    @property
    def is_empty(self) -> bool:
        """Nothing to add up: an empty batch, no head, no query, no key or no value column."""
        return self.query.numel() == 0 or self.value.numel() == 0


# The fields of AttentionCall that gradients flow to, in the order in which attention_backward returns them.
DIFFERENTIABLE = ("query", "key", "value", "bias", "relative_bias", "sinks")


def attention_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Mask | Tensor | None = None,
    bias: Tensor | RelativeBias | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    generator: torch.Generator | None = None,
    backend: str,
) -> AttentionCall:
    """Validates what the user passed to ``attention`` and returns its canonical form.

    Raises:
        ValueError: shapes, strides or numbers do not fit.
        TypeError: dtypes or devices do not fit.
    """
    _check_qkv(query, key, value)
    batch, num_heads_q, seq_len_q, head_dim = query.shape
    seq_len_k = key.shape[2]
    shape = Shape(batch, num_heads_q, seq_len_q, seq_len_k)

    canonical = CanonicalMask()
    if mask is not None:
        if isinstance(mask, Tensor):
            mask = masks.Dense(mask)
        elif not isinstance(mask, Mask):
            raise TypeError(f"mask must be a fastattn.masks.Mask or a bool tensor, got {type(mask).__name__}")
        canonical = mask.canonical(shape, query.device)

    dense_bias, relative_bias = _canonical_bias(bias, shape, query)
    if sinks is not None:
        check_tensor("sinks", sinks)
        if sinks.device != query.device:
            raise TypeError(f"sinks must be on query's device {query.device}, got {sinks.device}")
        if sinks.dim() != 1 or sinks.shape[0] != num_heads_q:
            raise ValueError(f"sinks must have shape [num_heads_q] = [{num_heads_q}], got {list(sinks.shape)}")

    p = check_dropout(dropout_p)
    scale = 1.0 / math.sqrt(head_dim) if softmax_scale is None else check_finite("softmax_scale", softmax_scale)
    cap = 0.0 if softcap is None else check_finite("softcap", softcap)
    if cap < 0.0 or (softcap is not None and cap == 0.0):
        raise ValueError(f"softcap must be > 0 (None for none), got {softcap}")
    return AttentionCall(
        query,
        key,
        value,
        dense_bias,
        relative_bias,
        sinks,
        canonical.dense,
        canonical.key_lengths,
        canonical.segments_q,
        canonical.segments_k,
        draw_dropout_state(p, generator, query.device),
        canonical.diag_lo,
        canonical.diag_hi,
        scale,
        cap,
        p,
        backend,
    )


def empty_output(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Returns uninitialised ``(out, lse)`` of a call.

    ``out`` [batch, num_heads_q, seq_len_q, head_dim_v] has query's dtype and follows query's memory order, so that a
    projection's [batch, seq_len, heads * head_dim] output needs no copy.  ``lse`` [batch, num_heads_q, seq_len_q] is
    of :func:`kept_lse_dtype`.
    """
    query = call.query
    batch, num_heads_q, seq_len_q, _ = query.shape
    head_dim_v = call.value.shape[3]
    lse = query.new_empty((batch, num_heads_q, seq_len_q), dtype=kept_lse_dtype(query.device))
    if query.stride(1) < query.stride(2):
        if query.stride(0) < query.stride(2):
            return query.new_empty((seq_len_q, batch, num_heads_q, head_dim_v)).permute(1, 2, 0, 3), lse
        return query.new_empty((batch, seq_len_q, num_heads_q, head_dim_v)).transpose(1, 2), lse
    return query.new_empty((batch, num_heads_q, seq_len_q, head_dim_v)), lse


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of accumulators, and of the lse that a user gets, for inputs of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def kept_lse_dtype(device: torch.device) -> torch.dtype:
    """Returns the dtype of the lse that the op itself returns and keeps for its backward: float64 where there is one.

    A float32 lse's own rounding would be an error of ``eps * |lse| / 2`` in every probability made from it.
    """
    return torch.float32 if device.type == "mps" else torch.float64


def _check_qkv(query: Tensor, key: Tensor, value: Tensor) -> None:
    check_tensor("query", query)
    check_like("key", key, "query", query)
    check_like("value", value, "query", query)
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != 4:
            raise ValueError(f"{name} must be 4-D [batch, heads, seq_len, head_dim], got {list(tensor.shape)}")
    batch, num_heads_q, _, head_dim = query.shape
    num_heads_kv = key.shape[1]
    if head_dim == 0:
        raise ValueError(f"head_dim must be >= 1, got query {list(query.shape)}")
    if key.shape[0] != batch or key.shape[3] != head_dim:
        raise ValueError(
            f"key must be [batch={batch}, num_heads_kv, seq_len_k, head_dim={head_dim}] like query "
            f"{list(query.shape)}, got {list(key.shape)}"
        )
    if value.shape[0] != batch or value.shape[1] != num_heads_kv or value.shape[2] != key.shape[2]:
        raise ValueError(
            f"value must be [batch={batch}, num_heads_kv={num_heads_kv}, seq_len_k={key.shape[2]}, head_dim_v], "
            f"got {list(value.shape)}"
        )
    if num_heads_q != num_heads_kv and (num_heads_kv == 0 or num_heads_q % num_heads_kv != 0):
        raise ValueError(f"num_heads_q must be a multiple of num_heads_kv, got {num_heads_q} and {num_heads_kv}")
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_last_dim_contiguous(name, tensor)


def _canonical_bias(
    bias: Tensor | RelativeBias | None, shape: Shape, query: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    if bias is None:
        return None, None
    if isinstance(bias, RelativeBias):
        diagonals = bias.diagonals(shape.num_heads_q, shape.seq_len_q, shape.seq_len_k)
        if diagonals.device != query.device:
            raise TypeError(f"bias must be on query's device {query.device}, got {diagonals.device}")
        return None, diagonals.contiguous()
    if not isinstance(bias, Tensor):
        raise TypeError(f"bias must be a tensor, Alibi or RelativePosition, got {type(bias).__name__}")
    check_tensor("bias", bias)
    return masks.broadcastable_4d("bias", bias, shape, query.device), None
