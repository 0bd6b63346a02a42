"""Module rows of the benchmark: ``nn.MultiheadAttention`` as called by default, with its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

import fastattn.nn
from fastattn.tools.bench.case import Case, Draw, relative
from fastattn.tools.bench.workload import ModuleWorkload


def cases(name: str, row: Sequence[int], dtype: torch.dtype) -> Iterator[Case]:
    """Yields evaluation and a training step of one row."""
    draw = Draw(dtype)
    batch, seq_len, embed_dim, heads = row
    ours = fastattn.nn.MultiheadAttention(embed_dim, heads, batch_first=True, dtype=dtype)
    with torch.no_grad():
        for p in ours.parameters():
            p.copy_(draw(*p.shape, scale=embed_dim**-0.5))
    x = draw(batch, seq_len, embed_dim)
    # Four projections, and the two products of the attention itself.
    flops = batch * (8.0 * seq_len * embed_dim**2 + 4.0 * seq_len**2 * embed_dim)
    for direction, factor in (("eval", 1.0), ("train step", 3.0)):
        work = ModuleWorkload(dict(ours.state_dict()), heads, x, backward=direction == "train step")
        yield Case(name, direction, work, call(ours, work), factor * flops, "GFLOP/s", partial(_error, ours, work))


def call(module: nn.Module, work: ModuleWorkload) -> Callable[[], Any]:
    """Returns the call of a module with ``nn.MultiheadAttention``'s interface that is timed."""
    x, parameters = work.input, list(module.parameters())

    def run() -> Any:
        return module.train(work.training)(x, x, x, need_weights=work.need_weights)

    def step() -> Any:
        out, _ = module.train()(x, x, x, need_weights=work.need_weights)
        return torch.autograd.grad(out, parameters, x)

    return step if work.backward else torch.no_grad()(run)


def stock(work: ModuleWorkload, dtype: torch.dtype) -> nn.MultiheadAttention:
    """Returns PyTorch's module with the workload's weights."""
    module = nn.MultiheadAttention(work.input.shape[-1], work.num_heads, batch_first=True, dtype=dtype)
    module.load_state_dict(work.state)
    return module


def _error(ours: nn.Module, work: ModuleWorkload) -> float:
    x = work.input
    with torch.no_grad():
        found, wanted = ours.eval()(x, x, x), stock(work, torch.float64).train()(x.double(), x.double(), x.double())
    return max(relative(f, w) for f, w in zip(found, wanted, strict=True))
