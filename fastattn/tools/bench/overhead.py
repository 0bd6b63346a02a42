"""What a call costs before any arithmetic: each op on tiny tensors, in microseconds beyond PyTorch's own op."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastattn.ops.attention import scaled_dot_product_attention
from fastattn.ops.linear_cross_entropy import linear_cross_entropy
from fastattn.tools.bench import attention, decode, feed_forward, module, softmax
from fastattn.tools.bench.case import Case, Draw, largest_error, timed

# What a user would call instead: no third party, nothing compiled.
_OWN = ("torch SDPA", "torch eager", "torch.nn")
_MAKERS: Mapping[str, Callable[[str, Any, torch.dtype, str], Iterator[Case]]] = {
    "attention": attention.cases,
    "decode": decode.cases,
    "softmax": softmax.cases,
    "feed_forward": feed_forward.cases,
    "module": module.cases,
}


def cases(name: str, row: Mapping[str, Any], dtype: torch.dtype, device: str) -> Iterator[Case]:
    """Yields the cases of one op: the shape is a row of its own family."""
    if name in _MAKERS:
        for case in _MAKERS[name](name, row["shape"], dtype, device):
            own = f"{name} {case.direction}" if name == "module" else case.name.split(" ")[0]
            if case.only_backend is None:
                yield replace(case, family="overhead", name=own, unit="us", peers=_OWN)
        return
    draw = Draw(dtype, device)
    if name == "sdpa":
        tensors = [draw(*row["shape"]) for _ in range(4)]
        op: Callable[..., Tensor] = scaled_dot_product_attention
        twin: Callable[..., Tensor] = F.scaled_dot_product_attention
    else:
        tokens, dim, classes = row["shape"]
        target = torch.arange(tokens, device=device) % classes
        tensors = [draw(tokens, dim), draw(classes, dim), torch.ones((), dtype=dtype, device=device)]
        op = partial(linear_cross_entropy, target=target)
        twin = partial(_linear_cross_entropy, target)
    *inputs, dout = tensors
    for direction in ("forward", "forward + backward"):
        backward = direction != "forward"
        ours, stock = (timed(call, inputs, dout, backward=backward) for call in (op, twin))
        yield Case(
            family="overhead",
            name=name,
            direction=direction,
            shape=row,
            ours=ours,
            others={"torch": stock},
            error=partial(largest_error, op, twin, inputs, dout, backward),
            unit="us",
        )


def _linear_cross_entropy(target: Tensor, hidden: Tensor, weight: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight), target)
