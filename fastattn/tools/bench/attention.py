"""Attention rows of the benchmark."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastattn import masks
from fastattn.ops.attention import attention
from fastattn.reference import attention as formula
from fastattn.spec.attention import attention_call
from fastattn.spec.attention_weights import select_rows
from fastattn.tools.bench.case import SEED, Case, Draw, relative, size, timed
from fastattn.tools.bench.workload import AttentionWorkload

# Queries that the float64 reference is computed for: all of a long row's would take minutes.
_CHECKED_QUERIES = 48

# Makes the keyword arguments of `fastattn.attention` from the tensors beyond query, key and value.
Arguments = Callable[..., dict[str, Any]]


def cases(name: str, row: Mapping[str, Any], dtype: torch.dtype, device: str) -> Iterator[Case]:
    """Yields forward, and forward + backward, of one row; on a GPU the backward alone, too."""
    forward = workload(row, dtype, device)
    # Two products; the backward has five, of which one is the forward's again.
    flops = 4.0 * forward.query.shape[1] * forward.visible_pairs() * forward.query.shape[3]
    outputs, gradients = size([forward.query]), size([*forward.tensors, forward.dout])
    directions = [("forward", 1.0, 0.0), ("forward + backward", 3.5, gradients)]
    if device != "cpu":
        directions.append(("backward", 2.5, gradients))
    for direction, factor, more in directions:
        work = replace(forward, backward=direction != "forward", alone=direction == "backward")
        arguments = partial(arguments_of, work)
        yield Case(
            family="attention",
            name=name,
            direction=direction,
            shape=row,
            ours=timed(partial(run, arguments), work.tensors, work.dout, backward=work.backward, alone=work.alone),
            workload=work,
            error=partial(error, arguments, work.tensors, work.dout, work.backward),
            flops=factor * flops,
            moved=size(work.tensors) + outputs + more,
        )


def workload(row: Mapping[str, Any], dtype: torch.dtype, device: str) -> AttentionWorkload:
    """Returns the forward of one row."""
    draw = Draw(dtype, device)
    batch, (heads, heads_kv), (seq_q, seq_k), dim = row["batch"], row["heads"], row["seq_len"], row["head_dim"]
    query = draw(batch, heads, seq_q, dim)
    key, value = (draw(batch, heads_kv, seq_k, dim) for _ in range(2))
    lengths = torch.linspace(seq_k // 2, seq_k, batch, device=device).long() if row.get("key_lengths") else None
    return AttentionWorkload(
        query,
        key,
        value,
        bias=draw(1, heads, seq_q, seq_k) if row.get("bias") == "learned" else None,
        dout=draw(batch, heads, seq_q, dim),
        causal=row["causal"],
        window=row.get("window"),
        key_lengths=lengths,
        dropout_p=row.get("dropout", 0.0),
    )


def arguments_of(work: AttentionWorkload, *bias: Tensor) -> dict[str, Any]:
    """Returns the keyword arguments of ``fastattn.attention`` for a workload."""
    mask: masks.Mask | None = None
    if work.window is not None:
        mask = masks.Window(work.window - 1, 0)
    elif work.causal:
        mask = masks.Causal()
    if work.key_lengths is not None:
        lengths = masks.KeyLengths(work.key_lengths)
        mask = lengths if mask is None else mask & lengths
    return {"mask": mask, "bias": bias[0] if bias else None, "dropout_p": work.dropout_p}


def run(arguments: Arguments, *tensors: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Returns fastattn's output for query, key, value and what ``arguments`` makes of the other tensors."""
    out = attention(*tensors[:3], **arguments(*tensors[3:]), generator=generator)
    assert isinstance(out, Tensor)
    return out


def error(arguments: Arguments, tensors: Sequence[Tensor], dout: Tensor, backward: bool) -> float:
    """Returns the largest error of the output, or of any gradient, over its largest element.

    Some queries only are compared, and only they get a gradient: that of every key and value still comes from the whole
    call.
    """
    seq_q = dout.shape[2]
    rows = torch.linspace(0, seq_q - 1, min(seq_q, _CHECKED_QUERIES), device=dout.device).long()
    leaves = [t.detach().requires_grad_(backward) for t in tensors]
    exact = [t.detach().double().requires_grad_(backward) for t in tensors]
    options = {"dropout_p": 0.0, "softmax_scale": None, "softcap": None, "sinks": None, "backend": ""}
    whole = attention_call(*exact[:3], **{**options, **arguments(*exact[3:])}, generator=_generator(dout))
    if whole.dropout_state is None:
        reference = formula.attention(select_rows(whole, rows))[0]
    else:
        # Dropout counts rows from the first, so all are needed; the grid's row with dropout is short.
        reference = formula.attention(whole)[0][:, :, rows]
    out = run(arguments, *leaves, generator=_generator(dout))
    if not backward:
        return relative(out[:, :, rows], reference)
    sparse = torch.zeros_like(dout)
    sparse[:, :, rows] = dout[:, :, rows]
    grads = torch.autograd.grad(out, leaves, sparse)
    wanted = torch.autograd.grad(reference, exact, dout[:, :, rows].double())
    return max(relative(g, w) for g, w in zip(grads, wanted, strict=True))


def _generator(tensor: Tensor) -> torch.Generator:
    return torch.Generator(tensor.device).manual_seed(SEED)
