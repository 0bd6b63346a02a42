"""Module rows of the benchmark: ``nn.MultiheadAttention`` as called by default, with its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

import fastattn.nn
from fastattn.tools.bench.case import Case, Draw, relative, size
from fastattn.tools.bench.workload import ModuleWorkload


def cases(name: str, row: Sequence[int], dtype: torch.dtype, device: str) -> Iterator[Case]:
    """Yields evaluation, the forward of training and a training step of one row."""
    draw = Draw(dtype, device)
    batch, seq_len, embed_dim, heads = row
    ours = fastattn.nn.MultiheadAttention(embed_dim, heads, batch_first=True, dtype=dtype, device=device)
    with torch.no_grad():
        for p in ours.parameters():
            p.copy_(draw(*p.shape, scale=embed_dim**-0.5))
    x = draw(batch, seq_len, embed_dim)
    # Four projections, and the two products of the attention itself.
    flops = batch * (8.0 * seq_len * embed_dim**2 + 4.0 * seq_len**2 * embed_dim)
    # Input, output, parameters, and the mean weights.
    moved = 2 * size([x]) + size(list(ours.parameters())) + batch * seq_len**2 * x.element_size()
    for direction, factor in (("eval", 1.0), ("train", 1.0), ("train step", 3.0)):
        work = ModuleWorkload(
            dict(ours.state_dict()), heads, x, backward=direction == "train step", training=direction != "eval"
        )
        yield Case(
            family="module",
            name=name,
            direction=direction,
            shape=row,
            ours=call(ours, work),
            workload=work,
            error=partial(_error, ours, work),
            flops=factor * flops,
            moved=moved,
        )


def call(module: nn.Module, work: ModuleWorkload) -> Callable[[], Any]:
    """Returns the call of a module with ``nn.MultiheadAttention``'s interface that is timed."""
    x, parameters = work.input, list(module.parameters())

    def run() -> Any:
        # Only evaluation goes without a graph.
        with torch.set_grad_enabled(work.training):
            return module.train(work.training)(x, x, x, need_weights=work.need_weights)

    return (lambda: torch.autograd.grad(run()[0], parameters, x)) if work.backward else run


def stock(work: ModuleWorkload, dtype: torch.dtype) -> nn.MultiheadAttention:
    """Returns PyTorch's module with the workload's weights."""
    x = work.input
    module = nn.MultiheadAttention(x.shape[-1], work.num_heads, batch_first=True, dtype=dtype, device=x.device)
    module.load_state_dict(work.state)
    return module


def _error(ours: nn.Module, work: ModuleWorkload) -> float:
    """Returns the largest error of output and weights, or of a parameter's gradient over the largest of them all: that
    of the keys' bias cancels to nothing."""
    exact = ModuleWorkload(
        work.state, work.num_heads, work.input.double(), work.backward, training=True, need_weights=work.need_weights
    )
    found, wanted = call(ours, work)(), call(stock(work, torch.float64), exact)()
    if work.backward:
        found, wanted = ([torch.cat([g.flatten() for g in grads])] for grads in (found, wanted))
    return max(relative(f, w) for f, w in zip(found, wanted, strict=True))
