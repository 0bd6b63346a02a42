"""The cases of ``fastattn verify ops`` for attention over a paged cache."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastattn.masks import Causal, Window
from fastattn.ops.paged_attention import paged_attention
from fastattn.tools import eager
from fastattn.tools.op_case import SEED, Draw, OpCase, Tensors

_BATCH, _HEADS, _HEADS_KV, _DIM = 3, 8, 2, 64
_PAGES, _PAGE_SIZE, _MAX_PAGES = 40, 16, 12
# No multiple of a page, a whole number of pages, and nothing at all.
_LENGTHS = torch.tensor([187, 64, 0])


def paged_attention_cases() -> Iterator[OpCase]:
    """Yields one query and several, under each mask, and every other feature once."""
    masks = {"none": None, "causal": Causal(), "window": Window(30, 0)}
    for name, mask in masks.items():
        for queries in (1, 5):
            yield _case(name, mask, f"{queries} queries", queries, {})
    yield _case("causal", Causal(), "softcap, scale", 5, {"softcap": 1.5, "softmax_scale": 0.31})
    yield _case("causal", Causal(), "sinks", 5, {})


def _case(name: str, mask: Window | None, variant: str, queries: int, options: dict[str, Any]) -> OpCase:
    def tensors(seed: int) -> Tensors:
        draw = Draw(seed)
        found = {
            "query": draw(_BATCH, _HEADS, queries, _DIM),
            "key_cache": draw(_PAGES, _PAGE_SIZE, _HEADS_KV, _DIM),
            "value_cache": draw(_PAGES, _PAGE_SIZE, _HEADS_KV, _DIM),
        }
        return {**found, "sinks": draw(_HEADS)} if variant == "sinks" else found

    ours, theirs = partial(_ours, mask, options), partial(_eager, mask, options)
    return OpCase("paged_attention", name, variant, tensors, ours, theirs, draws=4, has_gradients=False)


def _block_table() -> Tensor:
    order = torch.randperm(_PAGES, generator=torch.Generator().manual_seed(SEED))
    return order[: _BATCH * _MAX_PAGES].view(_BATCH, _MAX_PAGES).int()


def _ours(mask: Window | None, options: dict[str, Any], tensors: Tensors, backend: str | None) -> Tensors:
    device = tensors["query"].device
    out, lse = paged_attention(
        tensors["query"],
        tensors["key_cache"],
        tensors["value_cache"],
        _block_table().to(device),
        _LENGTHS.to(device),
        mask=mask,
        sinks=tensors.get("sinks"),
        return_lse=True,
        backend=backend,
        **options,
    )
    return {"out": out, "lse": lse}


def _eager(mask: Window | None, options: dict[str, Any], tensors: Tensors) -> Tensors:
    device = tensors["query"].device
    table, lengths = _block_table().long().to(device), _LENGTHS.to(device)[:, None, None, None]
    key, value = (tensors[name][table].flatten(1, 2).transpose(1, 2) for name in ("key_cache", "value_cache"))
    queries = tensors["query"].shape[2]
    keys = torch.arange(key.shape[2], device=device)
    apart = keys - (lengths - queries + torch.arange(queries, device=device)[:, None])
    visible = (keys < lengths).expand(_BATCH, 1, queries, -1)
    if mask is not None and mask.left is not None:
        visible = visible & (apart >= -mask.left)
    if mask is not None and mask.right is not None:
        visible = visible & (apart <= mask.right)
    out, lse = eager.attention(tensors["query"], key, value, visible=visible, sinks=tensors.get("sinks"), **options)
    return {"out": out, "lse": lse}
