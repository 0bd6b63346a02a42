"""Rows of the benchmark for what knows positions: rotary embedding, and embedding; judged by bytes read and written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastattn.ops.embedding import embedding
from fastattn.ops.rotary_embedding import rotary_embedding
from fastattn.tools.bench.case import SEED, Case, Draw, relative, size, timed
from fastattn.tools.bench.workload import EmbeddingWorkload, RotaryWorkload


def rotary_cases(name: str, row: Sequence[int], dtype: torch.dtype, device: str) -> Iterator[Case]:
    """Yields forward, and forward + backward, of one row."""
    draw = Draw(dtype, device)
    batch, heads, heads_kv, seq_len, head_dim = row
    query, key = (draw(batch, n, seq_len, head_dim) for n in (heads, heads_kv))
    forward = RotaryWorkload(query, key, (draw(*query.shape), draw(*key.shape)))
    # The backward reads the results' gradients and writes the inputs'.
    for direction, passes in (("forward", 1), ("forward + backward", 2)):
        work = replace(forward, backward=direction != "forward")
        yield Case(
            family="rotary",
            name=name,
            direction=direction,
            shape=row,
            ours=timed(rotary_embedding, work.tensors, work.douts, backward=work.backward),
            workload=work,
            error=partial(_error, rotary_embedding, work, rotary_reference),
            moved=2.0 * passes * size(work.tensors),
            unit="GB/s",
            bandwidth="copy",
        )


def rotary_reference(work: RotaryWorkload) -> list[Tensor]:
    """Returns what a call of the workload should, in float64; a gradient is the rotation by the negative angle."""
    inputs = work.douts if work.backward else work.tensors
    sign = -1.0 if work.backward else 1.0
    cos, sin = (table * factor for table, factor in zip(rotary_tables(work, torch.float64), (1.0, sign), strict=True))
    return [rotated(t.double(), cos, sin) for t in inputs]


def rotary_tables(work: RotaryWorkload, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns cosines and sines [seq_len, head_dim], each twice, as Hugging Face's models keep them."""
    seq_len, head_dim = work.query.shape[2:]
    device = work.query.device
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64, device=device) / head_dim
    angles = torch.arange(seq_len, dtype=torch.float64, device=device)[:, None] * 10000.0**-exponents
    twice = torch.cat((angles, angles), dim=-1)
    return twice.cos().to(dtype), twice.sin().to(dtype)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Returns the rotation as Hugging Face's models write it."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def embedding_cases(name: str, row: Sequence[int], dtype: torch.dtype, device: str) -> Iterator[Case]:
    """Yields forward, and forward + backward, of one row."""
    draw = Draw(dtype, device)
    batch, seq_len, vocabulary, model_dim = row
    ids = torch.randint(vocabulary, (batch, seq_len), generator=torch.Generator().manual_seed(SEED)).to(device)
    forward = EmbeddingWorkload(ids, draw(vocabulary, model_dim), draw(seq_len, model_dim), draw(*ids.shape, model_dim))
    out, table = size([forward.dout]), size([forward.table])
    # The backward reads the result's gradient once and writes those of both tables.
    for direction, more in (("forward", 0.0), ("forward + backward", out + size(forward.tensors))):
        work = replace(forward, backward=direction != "forward")
        ours = partial(_embedding, work)
        yield Case(
            family="embedding",
            name=name,
            direction=direction,
            shape=row,
            ours=timed(ours, work.tensors, work.dout, backward=work.backward),
            workload=work,
            error=partial(_error, ours, work, embedding_reference),
            moved=2.0 * out + table + more,
            unit="GB/s",
            bandwidth="copy",
        )


def embedding_reference(work: EmbeddingWorkload) -> list[Tensor]:
    """Returns what a call of the workload should, in float64."""
    dout = work.dout.double()
    if not work.backward:
        return [work.scale * work.weight[work.ids].double() + work.table.double()]
    dweight = torch.zeros_like(work.weight, dtype=torch.float64)
    dweight.index_add_(0, work.ids.flatten(), dout.flatten(0, 1), alpha=work.scale)
    return [dweight, dout.sum(dim=0)]


def _embedding(work: EmbeddingWorkload, weight: Tensor, table: Tensor) -> Tensor:
    return embedding(work.ids, weight, position_table=table, scale=work.scale)


def _error(ours: Callable[..., Any], work: Any, reference: Callable[[Any], list[Tensor]]) -> float:
    douts = work.douts if isinstance(work, RotaryWorkload) else work.dout
    answer = timed(ours, work.tensors, douts, backward=work.backward)()
    found = [answer] if isinstance(answer, Tensor) else answer
    return max(relative(f, w) for f, w in zip(found, reference(work), strict=True))
