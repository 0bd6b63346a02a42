"""What kernels are handed: a few tensors with their strides, grouped by what they mean.

What a call does not have is None, a constant to the compiler, so that nothing of it is compiled. (None stands for a
tensor or a number: Triton cannot ask of a tuple whether it is None.)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from fastattn.spec.attention import AttentionCall

_LOG2_E = 1.4426950408889634


class View(NamedTuple):
    """A 4-D tensor; strides in elements.

    Attributes:
        data: tensor, or None.
        batch: stride of the first dimension.
        head: stride of the second.
        row: stride of the third.
        column: stride of the fourth, 1 in all but masks and biases.
    """

    data: Any
    batch: int
    head: int
    row: int
    column: int


class Mask(NamedTuple):
    """Who may see whom, as ``fastattn.masks.CanonicalMask`` says it, laid out as :class:`Problem` is.

    Attributes:
        dense: :class:`View` of 0 and 1.
        diag_lo: least ``key - query``, clamped so that sums with positions fit in 32 bits; None for an open band.
        diag_hi: largest; None with ``diag_lo``.
        key_lengths: int32 [batch], or None.
        segments_q: int32 or int64 [batch, seq_len_q], or None.
        segments_k: int32 or int64 [batch, seq_len_k], or None.
    """

    dense: View
    diag_lo: int | None
    diag_hi: int | None
    key_lengths: Any
    segments_q: Any
    segments_k: Any
    last: None = None


class Dropout(NamedTuple):
    """Which probabilities are dropped.

    Attributes:
        state: int64 [2], seed and offset; None for no dropout.
        threshold: a random number below it drops its element.
        rescale: what survivors are multiplied by.
        sequence: what is added to the offset; None for nothing.
    """

    state: Any
    threshold: int
    rescale: float
    sequence: Any = None


class Packing(NamedTuple):
    """Where sequences lie that are packed one after another; all None where there are none.

    Attributes:
        starts_q: int64 [num_sequences + 1], where the queries of each begin.
        starts_k: the same of keys.
        tokens_q: queries of all.
        tokens_k: keys of all.
        from_end: 1 where the mask's band counts from the diagonal through the last query and key, or None.
        begin_q: the first query of one sequence, once a kernel has chosen it (``packing.own``).
        begin_k: likewise its first key.
    """

    starts_q: Any = None
    starts_k: Any = None
    tokens_q: int | None = None
    tokens_k: int | None = None
    from_end: int | None = None
    begin_q: Any = None
    begin_k: Any = None


NO_DROPOUT = Dropout(None, 0, 1.0)


class Problem(NamedTuple):
    """Everything that the scores of a call depend on, besides queries and keys.

    The tuples come first, and ``last`` is always a constant: Triton 3.6 forgets the constants of an inner tuple unless
    one of the outer tuple follows it.

    Attributes:
        mask: :class:`Mask`.
        bias: :class:`View`.
        relative_bias: :class:`View` of [1, heads, 1, seq_len_q + seq_len_k - 1].
        dropout: :class:`Dropout`.
        packing: :class:`Packing`.
        seq_len_q: queries; of packed sequences, of the longest.
        seq_len_k: keys; likewise.
        num_heads_q: query heads.
        group_size: query heads that share a key-value head.
        scale: what a product of query and key is multiplied by; in powers of two where there is no softcap and no bias.
        softcap: None for none.
    """

    mask: Mask
    bias: View
    relative_bias: View
    dropout: Dropout
    packing: Packing
    seq_len_q: int
    seq_len_k: int
    num_heads_q: int
    group_size: int
    scale: Any
    softcap: Any
    last: None = None


def view(tensor: Tensor) -> View:
    return View(tensor, *tensor.stride())


def broadcast(tensor: Tensor | None) -> View:
    """Returns a view in which a dimension of size 1 is every index's."""
    if tensor is None:
        return View(None, 0, 0, 0, 0)
    return View(tensor, *(0 if n == 1 else s for n, s in zip(tensor.shape, tensor.stride(), strict=True)))


def number(value: float, dtype: torch.dtype) -> Any:
    """Returns a number as a kernel takes it: Triton rounds arguments to float32, and constants not at all."""
    return tl.constexpr(value) if dtype == torch.float64 else value


def problem(call: AttentionCall) -> Problem:
    """Returns what the scores of ``call`` depend on."""
    _, num_heads_q, seq_len_q, seq_len_k = call.shape
    dtype = call.query.dtype
    relative_bias = None if call.relative_bias is None else _wide(call.relative_bias, dtype)[None, :, None]
    plain = not call.softcap and call.bias is None and relative_bias is None
    return Problem(
        mask(call),
        broadcast(None if call.bias is None else _wide(call.bias, dtype)),
        broadcast(relative_bias),
        Dropout(call.dropout_state, int(call.dropout_p * 2.0**32), number(1.0 / (1.0 - call.dropout_p), dtype)),
        _packing(call),
        seq_len_q,
        seq_len_k,
        num_heads_q,
        call.group_size,
        number(call.softmax_scale * _LOG2_E if plain else call.softmax_scale, dtype),
        number(call.softcap, dtype) if call.softcap else None,
    )


def _packing(call: AttentionCall) -> Packing:
    if call.starts_q is None:
        return Packing()
    return Packing(call.starts_q, call.starts_k, call.query.shape[2], call.key.shape[2], 1 if call.from_end else None)


def mask(call: AttentionCall) -> Mask:
    """Returns the mask of ``call``."""
    _, _, seq_len_q, seq_len_k = call.shape
    lo: int | None = None
    hi: int | None = None
    # Counted from the end, the last query is on diagonal 0.
    below, above = (seq_len_k, seq_len_q) if call.from_end else (seq_len_q, seq_len_k)
    if call.diag_lo > -below or call.diag_hi < above:
        # Beyond these bounds the band covers everything or nothing.
        lo = min(max(call.diag_lo, -below), above + 1)
        hi = max(min(call.diag_hi, above), -below - 1)
    dense = None if call.dense_mask is None else call.dense_mask.view(torch.uint8)
    dense, segments_q, segments_k = (
        None if t is None else _wide(t, call.query.dtype) for t in (dense, call.segments_q, call.segments_k)
    )
    return Mask(broadcast(dense), lo, hi, call.key_lengths, segments_q, segments_k)


def _wide(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns ``tensor`` with elements of 64 bits where the call's dtype has them: the compiler of Triton 3.6 fails on
    a float64 product of which an operand depends on loads of narrower ones."""
    if dtype != torch.float64 or tensor.element_size() == 8:
        return tensor
    return tensor.double() if tensor.is_floating_point() else tensor.long()
