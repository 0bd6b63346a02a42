"""Time and peak memory of a call."""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

_SELF = Path("/proc/self")


class Timing(NamedTuple):
    """Durations of repeated calls, in microseconds."""

    median: float
    p20: float
    p80: float
    repeats: int


def time_in_turns(
    calls: Sequence[Callable[[], Any]], *, budget: float = 1.0, min_repeats: int = 5, max_repeats: int = 200
) -> list[Timing]:
    """Times ``calls`` one after the other, round after round, so that whatever disturbs the machine disturbs all of
    them.

    Args:
        calls: what to time; each runs once before, untimed.
        budget: about how long all of it may take, in seconds; ``min_repeats`` rounds are run whatever it says.
        min_repeats: fewest rounds.
        max_repeats: most rounds.

    Returns:
        For each call the median, and the 20th and 80th percentile, of its rounds.
    """
    for call in calls:
        call()
    found: list[list[float]] = [[] for _ in calls]
    end = time.perf_counter() + budget
    while len(found[0]) < min_repeats or (len(found[0]) < max_repeats and time.perf_counter() < end):
        for k, call in enumerate(calls):
            start = time.perf_counter_ns()
            call()
            found[k].append((time.perf_counter_ns() - start) / 1e3)
    return [summary(durations) for durations in found]


def summary(durations: Sequence[float]) -> Timing:
    ordered = sorted(durations)
    last = len(ordered) - 1
    return Timing(statistics.median(ordered), ordered[round(0.2 * last)], ordered[round(0.8 * last)], len(ordered))


def peak_memory(call: Callable[[], Any]) -> int | None:
    """Returns by how many bytes the resident memory of this process rose, at its highest, while ``call`` ran.

    Every allocation counts, PyTorch's as well as a kernel's own scratch: the kernel's high-water mark (VmHWM) is reset
    before the call, and memory that was freed earlier is handed back to the system first, so that using it again counts
    anew.  What a library keeps for good from its first call on counts only if this is that call.  None where the system
    has no such mark (Linux has).
    """
    gc.collect()
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
