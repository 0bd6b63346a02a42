"""Attention over sequences of different lengths, packed one after another without padding."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.biases import RelativeBias
from fastattn.masks import Mask
from fastattn.ops import _dispatch
from fastattn.ops.attention import attend
from fastattn.spec.attention import lse_dtype
from fastattn.spec.varlen_attention import varlen_call


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    mask: Mask | None = None,
    bias: RelativeBias | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    generator: torch.Generator | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention within each of several packed sequences.

    Sequence s is the rows ``cu_seqlens_q[s] : cu_seqlens_q[s + 1]`` of query and ``cu_seqlens_k[s] : cu_seqlens_k[s
    + 1]`` of key and value; its result is that of :func:`fastattn.attention` on those rows alone.

    Args:
        query: [tokens_q, num_heads_q, head_dim].
        key: [tokens_k, num_heads_kv, head_dim].
        value: [tokens_k, num_heads_kv, head_dim_v].
        cu_seqlens_q: int32 or int64 [num_sequences + 1]; starts with 0, never falls, ends with tokens_q.
        cu_seqlens_k: the same for key and value.
        mask: ``Causal`` or ``Window``, laid over each sequence by itself.
        bias: ``Alibi`` or ``RelativePosition``, laid over each sequence by itself.
        dropout_p: probability of dropping a weight, in [0, 1).  Sequence s uses the drawn offset plus s.
        softmax_scale: by default ``1 / sqrt(head_dim)``.
        softcap: as in :func:`fastattn.attention`.
        sinks: float [num_heads_q].
        return_lse: True also returns the log of the softmax's denominator.
        generator: source of the dropout's seed.
        backend: as in :func:`fastattn.attention`.

    Returns:
        ``out`` [tokens_q, num_heads_q, head_dim_v]; with ``return_lse`` also ``lse`` [num_heads_q, tokens_q].

    Raises:
        ValueError: shapes or sequence bounds do not fit.
        TypeError: dtypes or devices do not fit, or the mask or bias is not one of those named.
        UnsupportedError: the backend asked for cannot serve the call.

    Differs from packing with ``Segments``: only the tiles of a sequence are computed, and "bottom_right" is that of
    each sequence.  It reads the bounds on the host, once, which waits for a GPU that they lie on and not for one that
    they are copied to; then the Triton backend launches once for all sequences.
    """
    call = varlen_call(
        query,
        key,
        value,
        cu_seqlens_q,
        cu_seqlens_k,
        mask=mask,
        bias=bias,
        dropout_p=dropout_p,
        softmax_scale=softmax_scale,
        softcap=softcap,
        sinks=sinks,
        generator=generator,
        backend=_dispatch.resolve(backend),
    )
    out, lse = attend(call)
    packed = out[0].transpose(0, 1)
    return (packed, lse[0].to(lse_dtype(query.dtype))) if return_lse else packed
