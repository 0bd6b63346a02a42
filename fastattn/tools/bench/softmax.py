"""Softmax rows of the benchmark, for every op that goes over rows; judged by bytes read and written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from fastattn.backends.extension import load
from fastattn.ops.norm import layer_norm, rms_norm
from fastattn.ops.softmax import log_softmax, softmax
from fastattn.spec.softmax import softmax_call
from fastattn.tools.bench.case import Case, Draw, largest_error, relative, size, timed
from fastattn.tools.bench.workload import SoftmaxWorkload

_CHECKED_ROWS = slice(0, 64)
_OURS: dict[str, Callable[..., Tensor]] = {
    "softmax": softmax,
    "log_softmax": log_softmax,
    "layer_norm": layer_norm,  # type: ignore[dict-item]
    "rms_norm": partial(rms_norm, eps=1e-5),  # type: ignore[dict-item]
}
_EXACT: dict[str, Callable[..., Tensor]] = {
    "softmax": lambda x: x.softmax(-1),
    "log_softmax": lambda x: x.log_softmax(-1),
    "layer_norm": lambda x, weight, bias: F.layer_norm(x, weight.shape, weight, bias),
    "rms_norm": lambda x, weight: F.rms_norm(x, weight.shape, weight, 1e-5),
}
_INTO_A_BUFFER = ("softmax", "log_softmax")


def cases(name: str, row: Sequence[int], dtype: torch.dtype, device: str) -> Iterator[Case]:
    """Yields, for each op, forward and forward + backward into a new buffer, and forward into an existing one."""
    for op in _OURS:
        draw = Draw(dtype, device)
        x, dout = draw(*row), draw(*row)
        weight, bias = draw(row[1]), draw(row[1])
        work = SoftmaxWorkload(
            op, x, dout, weight=weight if "norm" in op else None, bias=bias if op == "layer_norm" else None
        )
        yield _case(name, row, "forward", work, 2.0)
        if op in _INTO_A_BUFFER and device == "cpu" and load()[0] is not None:
            into = SoftmaxWorkload(op, x, dout, out=torch.empty_like(x))
            yield _case(name, row, "forward, into a buffer", into, 2.0)
        # The backward reads input or output and the gradient, and writes a third.
        backward = SoftmaxWorkload(op, x, dout, True, work.weight, work.bias)
        yield _case(name, row, "forward + backward", backward, 5.0)


def _case(name: str, row: Sequence[int], direction: str, work: SoftmaxWorkload, moved: float) -> Case:
    into = work.out is not None
    call = _kernel(work) if into else timed(_OURS[work.op], work.tensors, work.dout, backward=work.backward)
    return Case(
        family="softmax",
        name=f"{work.op} {name}",
        direction=direction,
        shape=row,
        ours=call,
        workload=work,
        error=partial(_error, work, call if into else None),
        moved=moved * size([work.input]),
        unit="GB/s",
        bandwidth="copy",
        only_backend="cpu" if into else None,
    )


def _kernel(work: SoftmaxWorkload) -> Callable[[], Tensor]:
    """Returns the call of the kernel itself, which writes where it is told; the op always makes a new tensor."""
    module, out = load()[0], work.out
    assert module is not None
    assert out is not None
    call = softmax_call(work.input, -1, mask=None, scale=1.0, dtype=None, log=work.op == "log_softmax", backend="cpu")

    def run() -> Tensor:
        module.softmax(call, out)
        return out

    return run


def _error(work: SoftmaxWorkload, into: Callable[[], Tensor] | None) -> float:
    few = [work.input[_CHECKED_ROWS], *work.tensors[1:]]
    if into is not None:
        return relative(into()[_CHECKED_ROWS], _EXACT[work.op](few[0].double()))
    return largest_error(_OURS[work.op], _EXACT[work.op], few, work.dout[_CHECKED_ROWS], work.backward)
