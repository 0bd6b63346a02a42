"""One case checked, then timed: a line of the results."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from fastattn.errors import UnsupportedError
from fastattn.ops._dispatch import observe, use_backend
from fastattn.tools.bench import peers
from fastattn.tools.bench.case import Case
from fastattn.tools.bench.limits import Limits
from fastattn.tools.measure import Timing, peak_memory, time_in_turns

OURS = "fastattn"
AUTOMATIC = "auto"

# Of the largest element.  A wrong kernel is off by far more; how exact a right one is, `fastattn verify` says.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
# A peer that takes so many times as long is timed in a few rounds only: the others get the time.
_PATIENCE = 4.0
_ROUNDS = 2000

Line = dict[str, Any]


class Settings:
    """What holds for every case of a run.

    Args:
        backends: ours to time; AUTOMATIC for each call's own choice.
        chosen: peers that can run here.
        device: "cpu" or a CUDA device.
        budget: seconds for each of those that are timed.
        limits: of the machine, if they were measured.
    """

    def __init__(
        self,
        backends: Sequence[str] = (AUTOMATIC,),
        chosen: Sequence[peers.Peer] = (),
        device: str = "cpu",
        budget: float = 1.5,
        limits: Limits | None = None,
    ) -> None:
        self.backends = list(backends)
        self.peers = list(chosen)
        self.device = device
        self.budget = budget
        self.limits = limits


def measure(case: Case, dtype: torch.dtype, settings: Settings) -> list[Line]:
    """Checks and times a case; returns a line for each of our backends, all timed in the same turns."""
    lines: list[Line] = []
    calls: dict[str, Callable[[], Any]] = {}
    with warnings.catch_warnings():
        # PyTorch's and the peers' own remarks; what a FallbackWarning would say is in the line ("served_by").
        warnings.simplefilter("ignore")
        for backend in settings.backends:
            line, call = checked(case, dtype, backend)
            lines.append(line)
            if call is not None:
                calls[_label(backend)] = call
        if not calls:
            return lines
        others, left_out, errors = dict(case.others), {}, {}
        if case.workload is not None:
            asked = [peer for peer in settings.peers if case.peers is None or peer.name in case.peers]
            found = peers.ready(case.workload, asked)
            others |= found.calls
            left_out, errors = found.failed, found.errors
        memory = {n: peak_memory(c, settings.device) for n, c in {**calls, **others}.items()}
        everybody = {**calls, **others}
        timings = time_in_turns(
            list(everybody.values()),
            budget=settings.budget * len(everybody),
            max_repeats=_ROUNDS,
            patience=_PATIENCE,
            before=[case.before.get(OURS if name in calls else name) for name in everybody],
            device=settings.device,
        )
    times = dict(zip(everybody, timings, strict=True))
    for line in lines:
        label = _label(line["backend"])
        if label in times:
            renamed = {OURS: times[label], **{name: times[name] for name in others}}
            line.update(_figures(case, dtype, renamed, settings.limits))
            line["memory_bytes"] = {OURS: memory[label], **{name: memory[name] for name in others}}
            if left_out:
                line["left_out"] = left_out
            if errors:
                line["peer_errors"] = errors
    return lines


def _label(backend: str) -> str:
    return OURS if backend == AUTOMATIC else f"{OURS} {backend}"


def checked(case: Case, dtype: torch.dtype, backend: str) -> tuple[Line, Callable[[], Any] | None]:
    """Returns the beginning of a line, and what is to be timed if the answer is right."""
    line: Line = {
        "family": case.family,
        "row": case.name,
        "direction": case.direction,
        "dtype": str(dtype).removeprefix("torch."),
        "backend": backend,
        "shape": case.shape,
        "error": None,
    }
    if case.only_backend not in (None, backend) and backend != AUTOMATIC:
        return {**line, "note": "refused"}, None

    def context() -> AbstractContextManager[None]:
        return nullcontext() if backend == AUTOMATIC else use_backend(backend)

    served: set[str] = {case.only_backend} if case.only_backend else set()
    try:
        with context(), observe(lambda op, call, chosen: served.add(chosen.name)):
            error = case.error()
    except UnsupportedError:
        return {**line, "note": "refused"}, None
    line |= {"error": error, "served_by": sorted(served)}
    if not error <= TOLERANCE[dtype] * case.tolerance:
        # JSON has no infinity.
        return {**line, "error": error if abs(error) < float("inf") else None, "note": "WRONG"}, None
    if backend == AUTOMATIC:
        return line, case.ours

    def within() -> Any:
        with context():
            return case.ours()

    return line, within


def _figures(case: Case, dtype: torch.dtype, times: dict[str, Timing], limits: Limits | None) -> Line:
    ours = times[OURS].median
    line: Line = {"times_us": {name: timing._asdict() for name, timing in times.items()}, "unit": case.unit}
    others = [name for name in times if name != OURS]
    if others:
        best = min(others, key=lambda name: times[name].median)
        line |= {"best_peer": best, "ratio": times[best].median / ours}
    if case.unit == "us":
        line["rate"] = ours - times[line["best_peer"]].median if others else ours
    else:
        line["rate"] = case.work / ours / 1e3
        line["share"] = None if limits is None else line["rate"] / limits.of(case.unit, dtype, case.bandwidth)
    if case.flops and case.moved:
        line |= {"gflops": case.flops / ours / 1e3, "intensity": case.flops / case.moved}
    return line
