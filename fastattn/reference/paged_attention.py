"""Attention over a paged cache: its pages are gathered, an entry of the batch at a time."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from fastattn.masks import Window
from fastattn.spec.attention import AttentionCall, attention_call, kept_lse_dtype
from fastattn.spec.paged_attention import PagedCall


def paged_attention(
    call: PagedCall, attention: Callable[[AttentionCall], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Returns ``(out, lse)`` of a canonical call that is not empty, by an ``attention`` over keys that lie together.

    It reads the lengths on the host.
    """
    outs, lses = empty_output(call)
    for entry, length in enumerate(call.cache_lengths.clamp(0, call.capacity).tolist()):
        out, lse = outs[entry : entry + 1], lses[entry : entry + 1]
        key, value = (_gathered(cache, call.block_table[entry], length) for cache in (call.key_cache, call.value_cache))
        if length == 0:
            out.zero_()
            lse.fill_(float("-inf"))
            if call.sinks is not None:
                lse.copy_(call.sinks[None, :, None].expand_as(lse))
            continue
        one = attention_call(
            call.query[entry : entry + 1],
            key,
            value,
            mask=Window(None, None),
            softmax_scale=call.softmax_scale,
            softcap=call.softcap or None,
            sinks=call.sinks,
            backend=call.backend,
        )
        past = length - call.query.shape[2]
        found = attention(one._replace(diag_lo=call.diag_lo + past, diag_hi=call.diag_hi + past))
        out.copy_(found[0])
        lse.copy_(found[1])
    return outs, lses


def empty_output(call: PagedCall) -> tuple[Tensor, Tensor]:
    """Returns uninitialised ``out`` [batch, num_heads_q, seq_len_q, head_dim_v] and ``lse`` without its last."""
    query = call.query
    size = query.shape[:3]
    return (
        query.new_empty((*size, call.value_cache.shape[3])),
        query.new_empty(size, dtype=kept_lse_dtype(query.device)),
    )


def _gathered(cache: Tensor, pages: Tensor, length: int) -> Tensor:
    """Returns the first ``length`` rows [1, num_heads_kv, length, dim] of the pages, the nearest there are."""
    count = -(-length // cache.shape[1])
    rows = cache[pages[:count].clamp(0, cache.shape[0] - 1).long()].flatten(0, 1)[:length]
    return rows.transpose(0, 1)[None]
