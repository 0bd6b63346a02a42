"""Decode rows of the benchmark: one query against a cache, judged by how fast keys and values are read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastattn.ops.attention import attention
from fastattn.tools import eager
from fastattn.tools.bench.case import Case, Draw, relative, timed
from fastattn.tools.bench.workload import DecodeWorkload


def cases(name: str, row: Mapping[str, Any], dtype: torch.dtype) -> Iterator[Case]:
    """Yields the case of one row."""
    draw = Draw(dtype)
    (heads, heads_kv), cache, dim = row["heads"], row["cache"], row["head_dim"]
    query = draw(row["batch"], heads, 1, dim)
    key, value = (draw(row["batch"], heads_kv, cache, dim) for _ in range(2))
    work = DecodeWorkload(query, key, value)
    read = float(2 * key.numel() * key.element_size())
    yield Case(name, "forward", work, timed(attention, work.tensors), read, "GB/s", partial(_error, work))


def _error(work: DecodeWorkload) -> float:
    reference = eager.attention(*(t.double() for t in work.tensors))[0]
    out = attention(*work.tensors)
    assert isinstance(out, Tensor)
    return relative(out, reference)
