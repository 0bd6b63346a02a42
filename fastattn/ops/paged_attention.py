"""Attention over a cache of keys and values that lies in pages."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.masks import Causal, Window
from fastattn.ops import _dispatch
from fastattn.ops._registry import define
from fastattn.reference.paged_attention import empty_output
from fastattn.spec.attention import lse_dtype
from fastattn.spec.paged_attention import PagedCall, paged_call

_CAUSAL = Causal()


def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    cache_lengths: Tensor,
    *,
    mask: Window | None = _CAUSAL,
    softmax_scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of the newest positions of each sequence over a cache whose pages lie anywhere.

    The keys of batch entry b are the first ``cache_lengths[b]`` rows of the pages ``block_table[b, 0], block_table[b,
    1], ...``, and its queries are the last ``seq_len_q`` of these positions, whose own keys and values are there
    already.  The result is that of :func:`fastattn.attention` on these rows.

    Args:
        query: [batch, num_heads_q, seq_len_q, head_dim]; float32, bfloat16, float16 or float64.
        key_cache: [num_pages, page_size, num_heads_kv, head_dim], any strides with a contiguous last dimension;
            ``num_heads_q`` a multiple of ``num_heads_kv``.
        value_cache: [num_pages, page_size, num_heads_kv, head_dim_v].
        block_table: int32 or int64 [batch, max_pages].  Only the pages that ``cache_lengths`` reaches are looked up; a
            number that is no page's counts as the nearest that is, and so never reads outside of the cache.
        cache_lengths: int32 or int64 [batch]; values are clamped to ``[0, max_pages * page_size]``.
        mask: ``Causal()``, ``Window`` (bottom-right: positions are those of the cache), or None to let every query see
            the whole of its sequence.
        softmax_scale: by default ``1 / sqrt(head_dim)``.
        softcap: as in :func:`fastattn.attention`.
        sinks: float [num_heads_q].
        return_lse: True also returns the log of the softmax's denominator.
        backend: as in :func:`fastattn.attention`.

    Returns:
        ``out`` [batch, num_heads_q, seq_len_q, head_dim_v]; with ``return_lse`` also ``lse`` [batch, num_heads_q,
        seq_len_q], natural logarithm, float32 (float64 for float64 inputs).  A query with no key to see gives 0 and
        -inf.

    Raises:
        ValueError: shapes, strides or numbers do not fit.
        TypeError: dtypes or devices do not fit, or the mask is not one of those named.
        RuntimeError: an input requires a gradient: a cache is written in place, so there is none.
        UnsupportedError: the backend asked for cannot serve the call.

    PyTorch has no twin.  On GPUs nothing is gathered: kernels look pages up as they go.

    Source: Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention", 2023.
    """
    call = paged_call(
        query,
        key_cache,
        value_cache,
        block_table,
        cache_lengths,
        mask=mask,
        softmax_scale=softmax_scale,
        softcap=softcap,
        sinks=sinks,
        backend=_dispatch.resolve(backend),
    )
    given = (query, key_cache, value_cache, sinks)
    wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given)
    if wanted or _dispatch.needs_reference_derivatives(*given):
        raise RuntimeError("paged_attention has no gradient: call it under torch.no_grad(), or attention() to train")
    out, lse = _paged_attention(*call)
    return (out, lse.to(lse_dtype(query.dtype))) if return_lse else out


def _kernel(*args: Any) -> tuple[Tensor, Tensor]:
    call = PagedCall(*args)
    if call.is_empty:
        out, lse = empty_output(call)
        lse.fill_(float("-inf"))
        if call.sinks is not None:
            lse.copy_(call.sinks[None, :, None].expand_as(lse))
        return out.zero_(), lse
    return _dispatch.serve("paged_attention", call, lambda backend: backend.paged_attention(call))


def _fake(*args: Any) -> tuple[Tensor, Tensor]:
    return empty_output(PagedCall(*args))


_paged_attention = define(
    "paged_attention",
    """(Tensor query, Tensor key_cache, Tensor value_cache, Tensor block_table, Tensor cache_lengths, Tensor? sinks,
    SymInt diag_lo, SymInt diag_hi, float softmax_scale, float softcap, str backend) -> (Tensor out, Tensor lse)""",
    kernel=_kernel,
    fake=_fake,
    autocast=True,
)
