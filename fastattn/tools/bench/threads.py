"""What more threads bring: the same call of ours with one, and with all that PyTorch uses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from fastattn.tools.bench import attention, feed_forward
from fastattn.tools.bench.case import Case


def cases(name: str, row: Mapping[str, Any], dtype: torch.dtype, device: str) -> Iterator[Case]:
    """Yields the cases of a row of attention, or of the feed-forward where the shape is a list; none on one thread."""
    count = torch.get_num_threads()
    if count == 1 or device != "cpu":
        return
    make = feed_forward.cases if isinstance(row["shape"], list) else attention.cases
    for case in make(name, row["shape"], dtype, device):
        # The first call with another number wakes or ends threads: it is not timed.
        yield replace(
            case,
            family="threads",
            workload=None,
            others={"fastattn, 1 thread": case.ours},
            before={"fastattn": partial(_use, count, case.ours), "fastattn, 1 thread": partial(_use, 1, case.ours)},
        )
        torch.set_num_threads(count)


def _use(count: int, call: Callable[[], Any]) -> None:
    torch.set_num_threads(count)
    call()
