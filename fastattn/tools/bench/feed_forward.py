"""Feed-forward rows of the benchmark."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastattn.ops.feed_forward import feed_forward
from fastattn.tools import eager
from fastattn.tools.bench.case import Case, Draw, largest_error, size, timed
from fastattn.tools.bench.workload import FeedForwardWorkload


def cases(name: str, row: Sequence[Any], dtype: torch.dtype, device: str) -> Iterator[Case]:
    """Yields forward, and forward + backward, of one row."""
    draw = Draw(dtype, device)
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
    moved = size(forward.tensors) + size([forward.dout])
    for direction, factor, gradients in (("forward", 1.0, 0.0), ("forward + backward", 3.0, size(forward.tensors))):
        work = replace(forward, backward=direction != "forward")
        ours, exact = (partial(_apply, function, work.activation) for function in (feed_forward, eager.feed_forward))
        yield Case(
            family="feed_forward",
            name=name,
            direction=direction,
            shape=row,
            ours=timed(ours, work.tensors, work.dout, backward=work.backward),
            workload=work,
            error=partial(largest_error, ours, exact, work.tensors, work.dout, work.backward),
            flops=factor * flops,
            moved=moved + gradients,
        )


def _apply(function: Callable[..., Tensor], activation: str, *tensors: Tensor) -> Tensor:
    """Calls a feed-forward with a workload's tensors, the gate last."""
    ungated, gate = tensors[:5], tensors[5:]
    return function(*ungated, activation=activation, weight_gate=gate[0] if gate else None)
