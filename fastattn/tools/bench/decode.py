"""Decode rows of the benchmark: one query against a cache, judged by how fast keys and values are read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch

from fastattn.ops.attention import attention
from fastattn.tools import eager
from fastattn.tools.bench.case import Case, Draw, relative, size, timed
from fastattn.tools.bench.workload import DecodeWorkload


def cases(name: str, row: Mapping[str, Any], dtype: torch.dtype, device: str) -> Iterator[Case]:
    """Yields the case of one row."""
    draw = Draw(dtype, device)
    (heads, heads_kv), cache, dim = row["heads"], row["cache"], row["head_dim"]
    query = draw(row["batch"], heads, 1, dim)
    key, value = (draw(row["batch"], heads_kv, cache, dim) for _ in range(2))
    work = DecodeWorkload(query, key, value)
    yield Case(
        family="decode",
        name=name,
        direction="forward",
        shape=row,
        ours=timed(attention, work.tensors),
        workload=work,
        error=partial(_error, work),
        flops=4.0 * query.numel() * cache,
        moved=size([key, value]),
        unit="GB/s",
    )


def _error(work: DecodeWorkload) -> float:
    out = attention(*work.tensors)
    assert isinstance(out, torch.Tensor)
    return relative(out, eager.attention(*(t.double() for t in work.tensors))[0])
