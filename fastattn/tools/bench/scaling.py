"""Time and memory against seq_len, for every sort of mask, bias, dropout and weight reduction, with one head."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastattn.biases import RelativePosition
from fastattn.masks import Causal
from fastattn.ops.attention_weights import attention_weights
from fastattn.tools.bench import attention
from fastattn.tools.bench.case import Case, Draw, relative, size, timed

_BUCKETS = 32
# Dropout's reference is seq x seq, so longer calls are checked by a shorter one of their kind.
_CHECKED_LENGTH = 2048
_CHECKED_QUERIES = 48


def cases(name: str, row: Mapping[str, Any], dtype: torch.dtype, device: str) -> Iterator[Case]:
    """Yields a case a length; PyTorch runs where it holds no seq x seq matrix, and below ``dense_up_to``."""
    for seq_len in row["seq_lens"]:
        shape = {"batch": 1, "heads": [1, 1], **row, "seq_len": [seq_len, seq_len]}
        make = {"relative-bias": _relative_bias, "weights-entropy": _entropy}.get(name, _masked)
        yield replace(make(shape, dtype, device), family="scaling", name=f"{name} {seq_len}")


def _masked(row: Mapping[str, Any], dtype: torch.dtype, device: str) -> Case:
    _, case = attention.cases("", row, dtype, device)
    dense = row["seq_len"][0] > row.get("dense_up_to", row["seq_len"][0])
    if row.get("dropout"):
        shorter = [min(_CHECKED_LENGTH, *row["seq_len"])] * 2
        _, checked = attention.cases("", {**row, "seq_len": shorter}, dtype, device)
        case = replace(case, error=checked.error)
    return replace(case, peers=() if dense else ("torch SDPA",))


def _relative_bias(row: Mapping[str, Any], dtype: torch.dtype, device: str) -> Case:
    """A learned bias a distance, of which PyTorch knows only the dense form."""
    _, case = attention.cases("", row, dtype, device)
    draw = Draw(dtype, device)
    shape = 1, 1, row["seq_len"][0], row["head_dim"]
    tensors, dout = [*(draw(*shape) for _ in range(3)), draw(_BUCKETS, 1)], draw(*shape)

    def arguments(table: Tensor) -> dict[str, Any]:
        return {"mask": Causal(), "bias": RelativePosition(table)}

    call = timed(partial(attention.run, arguments), tensors, dout, backward=True)
    error = partial(attention.error, arguments, tensors, dout, True)
    return replace(case, ours=call, error=error, workload=None)


def _entropy(row: Mapping[str, Any], dtype: torch.dtype, device: str) -> Case:
    """A number a query that needs all its weights; PyTorch would have to hold them."""
    draw = Draw(dtype, device)
    seq_len, dim = row["seq_len"][0], row["head_dim"]
    tensors = [draw(1, 1, seq_len, dim) for _ in range(2)]

    def ours(query: Tensor, key: Tensor) -> Tensor:
        out = attention_weights(query, key, mask=Causal(), reduce="entropy")
        assert isinstance(out, Tensor)
        return out

    def error() -> float:
        rows = torch.linspace(0, seq_len - 1, min(seq_len, _CHECKED_QUERIES), device=device).long()
        query, key = (t[0, 0].double() for t in tensors)
        scores = query[rows] @ key.T * dim**-0.5
        hidden = torch.arange(seq_len, device=device) > rows[:, None]
        logs = scores.masked_fill(hidden, float("-inf")).log_softmax(-1)
        return relative(ours(*tensors)[0, 0, rows], -(logs.exp() * logs.masked_fill(hidden, 0.0)).sum(-1))

    return Case(
        family="scaling",
        name="",
        direction="forward",
        shape=row,
        ours=timed(ours, tensors),
        error=error,
        # The scores are computed once for lse and once for the entropy.
        flops=4.0 * seq_len**2 / 2 * dim,
        moved=size(tensors),
    )
