"""Softmax rows of the benchmark, judged by bytes read and written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch

from fastattn.ops.softmax import softmax
from fastattn.tools.bench.case import Case, Draw, relative, timed
from fastattn.tools.bench.workload import SoftmaxWorkload

_CHECKED_ROWS = slice(0, 64)


def cases(name: str, row: Sequence[int], dtype: torch.dtype) -> Iterator[Case]:
    """Yields forward, and forward + backward, of one row."""
    draw = Draw(dtype)
    tensors, dout = [draw(*row)], draw(*row)
    size = float(tensors[0].numel() * tensors[0].element_size())
    # The backward reads output and its gradient, and writes a third.
    for direction, moved in (("forward", 2.0), ("forward + backward", 5.0)):
        work = SoftmaxWorkload("softmax", tensors[0], dout, backward=direction != "forward")
        call = timed(softmax, tensors, dout, backward=work.backward)
        yield Case(name, direction, work, call, moved * size, "GB/s", partial(_error, work))


def _error(work: SoftmaxWorkload) -> float:
    x = work.input[_CHECKED_ROWS].detach().requires_grad_(work.backward)
    y = work.input[_CHECKED_ROWS].detach().double().requires_grad_(work.backward)
    found, wanted = softmax(x), y.softmax(-1)
    if not work.backward:
        return relative(found, wanted)
    dout = work.dout[_CHECKED_ROWS]
    (grad,), (exact,) = torch.autograd.grad(found, x, dout), torch.autograd.grad(wanted, y, dout.double())
    return relative(grad, exact)
