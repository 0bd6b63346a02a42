"""Attention rows of the benchmark."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastattn import masks
from fastattn.ops.attention import attention
from fastattn.reference import attention as formula
from fastattn.spec.attention import AttentionCall, attention_call
from fastattn.spec.attention_weights import select_rows
from fastattn.tools.bench.case import SEED, Case, Draw, relative, timed
from fastattn.tools.bench.workload import AttentionWorkload

# Queries that the float64 reference is computed for: all of a long row's would take minutes.
_CHECKED_QUERIES = 48


def cases(name: str, row: Mapping[str, Any], dtype: torch.dtype) -> Iterator[Case]:
    """Yields forward, and forward + backward, of one row."""
    forward = workload(row, dtype)
    # Two products; the backward has five, of which one is the forward's again.
    flops = 4.0 * forward.query.shape[1] * forward.visible_pairs() * forward.query.shape[3]
    for direction, factor in (("forward", 1.0), ("forward + backward", 3.5)):
        work = replace(forward, backward=direction != "forward")
        call = timed(partial(ours, work), work.tensors, work.dout, backward=work.backward)
        yield Case(name, direction, work, call, factor * flops, "GFLOP/s", partial(_error, work))


def workload(row: Mapping[str, Any], dtype: torch.dtype) -> AttentionWorkload:
    """Returns the forward of one row."""
    draw = Draw(dtype)
    batch, (heads, heads_kv), (seq_q, seq_k), dim = row["batch"], row["heads"], row["seq_len"], row["head_dim"]
    query = draw(batch, heads, seq_q, dim)
    key, value = (draw(batch, heads_kv, seq_k, dim) for _ in range(2))
    return AttentionWorkload(
        query,
        key,
        value,
        bias=draw(1, heads, seq_q, seq_k) if row.get("bias") == "learned" else None,
        dout=draw(batch, heads, seq_q, dim),
        causal=row["causal"],
        window=row.get("window"),
        key_lengths=torch.linspace(seq_k // 2, seq_k, batch).long() if row.get("key_lengths") else None,
        dropout_p=row.get("dropout", 0.0),
    )


def mask(work: AttentionWorkload) -> masks.Mask | None:
    """Returns the mask of a workload as fastattn writes it."""
    found: list[masks.Mask] = []
    if work.window is not None:
        found.append(masks.Window(work.window - 1, 0))
    elif work.causal:
        found.append(masks.Causal())
    if work.key_lengths is not None:
        found.append(masks.KeyLengths(work.key_lengths))
    return None if not found else found[0] if len(found) == 1 else found[0] & found[1]


def ours(work: AttentionWorkload, *tensors: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Returns fastattn's output for ``tensors``, which stand for those of the workload."""
    query, key, value, *bias = tensors
    out = attention(
        query,
        key,
        value,
        mask=mask(work),
        bias=bias[0] if bias else None,
        dropout_p=work.dropout_p,
        generator=generator,
    )
    assert isinstance(out, Tensor)
    return out


def _call(work: AttentionWorkload, *tensors: Tensor, generator: torch.Generator) -> AttentionCall:
    query, key, value, *bias = tensors
    return attention_call(
        query,
        key,
        value,
        mask=mask(work),
        bias=bias[0] if bias else None,
        dropout_p=work.dropout_p,
        softmax_scale=None,
        softcap=None,
        sinks=None,
        generator=generator,
        backend="",
    )


def _error(work: AttentionWorkload) -> float:
    """Returns the largest error of the output, or of any gradient, over its largest element.

    Some queries only are compared, and only they get a gradient: that of every key and value still comes from the whole
    call.
    """
    seq_q = work.query.shape[2]
    rows = torch.linspace(0, seq_q - 1, min(seq_q, _CHECKED_QUERIES)).long()
    leaves = [t.detach().requires_grad_(work.backward) for t in work.tensors]
    exact = [t.detach().double().requires_grad_(work.backward) for t in work.tensors]
    whole = _call(work, *exact, generator=torch.Generator().manual_seed(SEED))
    if whole.dropout_state is None:
        reference = formula.attention(select_rows(whole, rows))[0]
    else:
        # Dropout counts rows from the first, so all are needed; the grid's row with dropout is short.
        reference = formula.attention(whole)[0][:, :, rows]
    out = ours(work, *leaves, generator=torch.Generator().manual_seed(SEED))
    if not work.backward:
        return relative(out[:, :, rows], reference)
    sparse = torch.zeros_like(work.dout)
    sparse[:, :, rows] = work.dout[:, :, rows]
    grads = torch.autograd.grad(out, leaves, sparse)
    wanted = torch.autograd.grad(reference, exact, work.dout[:, :, rows].double())
    return max(relative(g, w) for g, w in zip(grads, wanted, strict=True))
