"""Feed-forward rows of the benchmark."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastattn.ops.feed_forward import feed_forward
from fastattn.tools import eager
from fastattn.tools.bench.case import Case, Draw, relative, timed
from fastattn.tools.bench.workload import FeedForwardWorkload


def cases(name: str, row: Sequence[Any], dtype: torch.dtype) -> Iterator[Case]:
    """Yields forward, and forward + backward, of one row."""
    draw = Draw(dtype)
    tokens, model_dim, ff_dim, activation = row
    gated = activation == "swiglu"
    forward = FeedForwardWorkload(
        draw(tokens, model_dim),
        draw(ff_dim, model_dim, scale=model_dim**-0.5),
        draw(ff_dim),
        draw(model_dim, ff_dim, scale=ff_dim**-0.5),
        draw(model_dim),
        weight_gate=draw(ff_dim, model_dim, scale=model_dim**-0.5) if gated else None,
        activation="silu" if gated else activation,
        dout=draw(tokens, model_dim),
    )
    flops = 2.0 * tokens * model_dim * ff_dim * (3 if gated else 2)
    for direction, factor in (("forward", 1.0), ("forward + backward", 3.0)):
        work = replace(forward, backward=direction != "forward")
        call = timed(partial(_ours, work), work.tensors, work.dout, backward=work.backward)
        yield Case(name, direction, work, call, factor * flops, "GFLOP/s", partial(_error, work))


def _ours(work: FeedForwardWorkload, *tensors: Tensor) -> Tensor:
    x, weight_in, bias_in, weight_out, bias_out, *gate = tensors
    return feed_forward(
        x,
        weight_in,
        bias_in,
        weight_out,
        bias_out,
        activation=work.activation,
        weight_gate=gate[0] if gate else None,
    )


def _error(work: FeedForwardWorkload) -> float:
    leaves = [t.detach().requires_grad_(work.backward) for t in work.tensors]
    wide = [t.detach().double().requires_grad_(work.backward) for t in work.tensors]
    gate = {"weight_gate": wide[5]} if len(wide) > 5 else {}
    out, wanted = _ours(work, *leaves), eager.feed_forward(*wide[:5], activation=work.activation, **gate)
    if not work.backward:
        return relative(out, wanted)
    grads = torch.autograd.grad(out, leaves, work.dout), torch.autograd.grad(wanted, wide, work.dout.double())
    return max(relative(g, w) for g, w in zip(*grads, strict=True))
