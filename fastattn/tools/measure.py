"""Time and peak memory of a call."""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

_SELF = Path("/proc/self")
# Bytes that are written between two calls on a GPU, and cycles that it sleeps: half a ms, in which some launches fit.
_SWEPT, _AHEAD = 1 << 28, 900_000


class Timing(NamedTuple):
    """Durations of repeated calls, in microseconds."""

    median: float
    p20: float
    p80: float
    repeats: int


def time_in_turns(
    calls: Sequence[Callable[[], Any]],
    *,
    budget: float = 1.0,
    min_repeats: int = 5,
    max_repeats: int = 200,
    patience: float = float("inf"),
    before: Sequence[Callable[[], Any] | None] | None = None,
    device: str = "cpu",
) -> list[Timing]:
    """Times ``calls`` one after the other, round after round, so that whatever disturbs the machine disturbs all of
    them; each round begins with another one.

    Args:
        calls: what to time; each runs once before, untimed.
        budget: about how long all of it may take, in seconds; ``min_repeats`` rounds are run whatever it says.
        min_repeats: fewest rounds.
        max_repeats: most rounds.
        patience: a call that takes this many times as long as the fastest one stays out after ``min_repeats`` rounds.
        before: what runs, untimed, before each call.
        device: "cpu", or a CUDA device, whose events tell the time.

    Returns:
        For each call the median, and the 20th and 80th percentile, of its rounds.
    """
    clock = _clock(device)
    first = before or [None] * len(calls)
    for call, prepare in zip(calls, first, strict=True):
        if prepare is not None:
            prepare()
        call()
    found: list[list[float]] = [[] for _ in calls]
    taking_part = list(range(len(calls)))
    end = time.perf_counter() + budget
    rounds = 0
    while rounds < min_repeats or (rounds < max_repeats and time.perf_counter() < end):
        turn = rounds % len(taking_part)
        for k in taking_part[turn:] + taking_part[:turn]:
            prepare = first[k]
            if prepare is not None:
                prepare()
            found[k].append(clock(calls[k]))
        rounds += 1
        if rounds == min_repeats:
            medians = [statistics.median(durations) for durations in found]
            taking_part = [k for k in taking_part if medians[k] <= patience * min(medians)]
    return [summary(durations) for durations in found]


def _clock(device: str) -> Callable[[Callable[[], Any]], float]:
    """Returns what runs a call and tells how long it took, in microseconds."""
    if not device.startswith("cuda"):

        def on_host(call: Callable[[], Any]) -> float:
            start = time.perf_counter_ns()
            call()
            return (time.perf_counter_ns() - start) / 1e3

        return on_host
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    scratch = torch.empty(max(2 * cache, _SWEPT), dtype=torch.int8, device=device)

    def on_device(call: Callable[[], Any]) -> float:
        # Nothing of the call before is in the cache, and the GPU is kept busy until the call is launched: what Python
        # takes for that is no time of a kernel.
        scratch.zero_()
        torch.cuda._sleep(_AHEAD)
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e3

    return on_device


def summary(durations: Sequence[float]) -> Timing:
    ordered = sorted(durations)
    last = len(ordered) - 1
    return Timing(statistics.median(ordered), ordered[round(0.2 * last)], ordered[round(0.8 * last)], len(ordered))


def peak_memory(call: Callable[[], Any], device: str = "cpu") -> int | None:
    """Returns by how many bytes the resident memory of this process rose, at its highest, while ``call`` ran; on a CUDA
    device, what PyTorch allocated there.

    Every allocation counts, PyTorch's as well as a kernel's own scratch: the kernel's high-water mark (VmHWM) is reset
    before the call, and memory that was freed earlier is handed back to the system first, so that using it again counts
    anew.  What a library keeps for good from its first call on counts only if this is that call.  None where the system
    has no such mark (Linux has).
    """
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        already = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - already
    if not _trim() or not _reset_high_water_mark():
        return None
    before = _status("VmRSS")
    result = call()
    peak = _status("VmHWM")
    del result
    return max(peak - before, 0)


def _trim() -> bool:
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        return False
    return True


def _reset_high_water_mark() -> bool:
    try:
        (_SELF / "clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status(field: str) -> int:
    for line in (_SELF / "status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(f"/proc/self/status has no {field}")
