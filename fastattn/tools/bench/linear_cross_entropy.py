"""Rows of the benchmark for a linear layer with the cross entropy of its result."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from fastattn.ops.linear_cross_entropy import linear_cross_entropy
from fastattn.tools.bench.case import SEED, Case, Draw, relative, size, timed
from fastattn.tools.bench.workload import LossWorkload

# Logits that float64 holds at a time: 1 GB.
_BLOCK = 1 << 27


def cases(name: str, row: Sequence[int], dtype: torch.dtype, device: str) -> Iterator[Case]:
    """Yields forward, and forward + backward, of one row."""
    draw = Draw(dtype, device)
    tokens, model_dim, vocabulary = row
    target = torch.randint(vocabulary, (tokens,), generator=torch.Generator().manual_seed(SEED)).to(device)
    forward = LossWorkload(draw(tokens, model_dim), draw(vocabulary, model_dim, scale=model_dim**-0.5), target)
    flops, moved = 2.0 * tokens * model_dim * vocabulary, size(forward.tensors)
    for direction, factor, gradients in (("forward", 1.0, 0.0), ("forward + backward", 3.0, moved)):
        work = replace(forward, backward=direction != "forward")
        ours = partial(_loss, work.target)
        yield Case(
            family="linear_cross_entropy",
            name=name,
            direction=direction,
            shape=row,
            ours=timed(ours, work.tensors, backward=work.backward),
            workload=work,
            error=partial(_error, work),
            flops=factor * flops,
            moved=moved + gradients,
        )


def loss_reference(work: LossWorkload) -> list[Tensor]:
    """Returns what a call of the workload should, in float64, a block of tokens at a time."""
    hidden, weight = (t.detach().double().requires_grad_(work.backward) for t in work.tensors)
    total = hidden.new_zeros(())
    step = max(_BLOCK // len(weight), 1)
    for first in range(0, len(hidden), step):
        block = slice(first, first + step)
        loss = F.cross_entropy(F.linear(hidden[block], weight), work.target[block], reduction="sum") / len(hidden)
        if work.backward:
            loss.backward()
        total += loss.detach()
    if not work.backward:
        return [total]
    assert hidden.grad is not None
    assert weight.grad is not None
    return [hidden.grad, weight.grad]


def _loss(target: Tensor, hidden: Tensor, weight: Tensor) -> Tensor:
    return linear_cross_entropy(hidden, weight, target)


def _error(work: LossWorkload) -> float:
    answer = timed(partial(_loss, work.target), work.tensors, backward=work.backward)()
    found = [answer] if isinstance(answer, Tensor) else answer
    return max(relative(f, w) for f, w in zip(found, loss_reference(work), strict=True))
