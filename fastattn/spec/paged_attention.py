"""The canonical call of attention over a paged cache."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastattn.masks import OPEN_HI, OPEN_LO, Window
from fastattn.spec.checks import check_finite, check_last_dim_contiguous, check_like, check_tensor


class PagedCall(NamedTuple):
    """The arguments of ``fastattn::paged_attention``, in order.

    Shapes: ``query`` [batch, num_heads_q, seq_len_q, head_dim]; ``key_cache`` [num_pages, page_size, num_heads_kv,
    head_dim]; ``value_cache`` [num_pages, page_size, num_heads_kv, head_dim_v]; ``block_table`` int32 [batch,
    max_pages]; ``cache_lengths`` int32 [batch]; ``sinks`` [num_heads_q].  Query i of batch entry b has position
    ``p = cache_lengths[b] - seq_len_q + i`` and sees key j iff ``j < cache_lengths[b]`` and ``diag_lo <= j - p <=
    diag_hi``.  ``softcap`` is 0 for none, ``backend`` "" for the automatic choice.
    """

    query: Tensor
    key_cache: Tensor
    value_cache: Tensor
    block_table: Tensor
    cache_lengths: Tensor
    sinks: Tensor | None
    diag_lo: int
    diag_hi: int
    softmax_scale: float
    softcap: float
    backend: str

    @property
    def capacity(self) -> int:
        """Keys that a batch entry has pages for."""
        return self.block_table.shape[1] * self.key_cache.shape[1]

    @property
    def is_empty(self) -> bool:
        """Nothing to add up: an empty batch, no head, no query, no page or no value column."""
        return self.query.numel() == 0 or self.value_cache.numel() == 0 or self.block_table.numel() == 0


def paged_call(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    cache_lengths: Tensor,
    *,
    mask: Window | None,
    softmax_scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
    backend: str,
) -> PagedCall:
    """Validates what the user passed to ``paged_attention`` and returns its canonical form.

    Raises:
        ValueError: shapes, strides or numbers do not fit.
        TypeError: dtypes or devices do not fit, or the mask is another one.
    """
    check_tensor("query", query)
    check_like("key_cache", key_cache, "query", query)
    check_like("value_cache", value_cache, "query", query)
    for name, tensor, dims in (
        ("query", query, "[batch, num_heads_q, seq_len_q, head_dim]"),
        ("key_cache", key_cache, "[num_pages, page_size, num_heads_kv, head_dim]"),
        ("value_cache", value_cache, "[num_pages, page_size, num_heads_kv, head_dim_v]"),
    ):
        if tensor.dim() != 4:
            raise ValueError(f"{name} must be 4-D {dims}, got {list(tensor.shape)}")
        check_last_dim_contiguous(name, tensor)
    batch, num_heads_q, _, head_dim = query.shape
    num_pages, page_size, num_heads_kv, _ = key_cache.shape
    if head_dim == 0 or page_size == 0:
        raise ValueError(
            f"head_dim and page_size must be >= 1, got query {list(query.shape)} and key_cache {list(key_cache.shape)}"
        )
    if key_cache.shape[3] != head_dim:
        raise ValueError(f"key_cache must have query's head_dim {head_dim}, got {list(key_cache.shape)}")
    if tuple(value_cache.shape[:3]) != (num_pages, page_size, num_heads_kv):
        raise ValueError(
            f"value_cache must be [num_pages={num_pages}, page_size={page_size}, num_heads_kv={num_heads_kv}, "
            f"head_dim_v] like key_cache, got {list(value_cache.shape)}"
        )
    if num_heads_q != num_heads_kv and (num_heads_kv == 0 or num_heads_q % num_heads_kv != 0):
        raise ValueError(f"num_heads_q must be a multiple of num_heads_kv, got {num_heads_q} and {num_heads_kv}")
    block_table = _integers("block_table", block_table, query)
    cache_lengths = _integers("cache_lengths", cache_lengths, query)
    if block_table.dim() != 2 or block_table.shape[0] != batch:
        raise ValueError(f"block_table must be [batch={batch}, max_pages], got {list(block_table.shape)}")
    if tuple(cache_lengths.shape) != (batch,):
        raise ValueError(f"cache_lengths must have shape [batch] = [{batch}], got {list(cache_lengths.shape)}")
    if sinks is not None:
        check_tensor("sinks", sinks)
        if sinks.device != query.device:
            raise TypeError(f"sinks must be on query's device {query.device}, got {sinks.device}")
        if tuple(sinks.shape) != (num_heads_q,):
            raise ValueError(f"sinks must have shape [num_heads_q] = [{num_heads_q}], got {list(sinks.shape)}")
    if mask is not None and not isinstance(mask, Window):
        raise TypeError(f"mask must be Causal, Window or None over a paged cache, got {mask!r}")
    if mask is not None and mask.align != "bottom_right":
        raise ValueError(f"queries are the last positions of a paged cache: align must be 'bottom_right', got {mask!r}")
    cap = 0.0 if softcap is None else check_finite("softcap", softcap)
    if cap < 0.0 or (softcap is not None and cap == 0.0):
        raise ValueError(f"softcap must be > 0 (None for none), got {softcap}")
    return PagedCall(
        query,
        key_cache,
        value_cache,
        block_table,
        cache_lengths,
        sinks,
        OPEN_LO if mask is None or mask.left is None else -mask.left,
        OPEN_HI if mask is None or mask.right is None else mask.right,
        1.0 / math.sqrt(head_dim) if softmax_scale is None else check_finite("softmax_scale", softmax_scale),
        cap,
        backend,
    )


def _integers(name: str, value: Tensor, query: Tensor) -> Tensor:
    """Returns ``value`` in int32, clamped to it first: a page of 2^32 must not become page 0."""
    if not isinstance(value, Tensor) or value.dtype not in (torch.int32, torch.int64):
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name} must be an int32 or int64 tensor, got {got}")
    if value.device != query.device:
        raise TypeError(f"{name} must be on query's device {query.device}, got {value.device}")
    if value.dtype == torch.int32:
        return value
    bounds = torch.iinfo(torch.int32)
    return value.clamp(bounds.min, bounds.max).to(torch.int32)
