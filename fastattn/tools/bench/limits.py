"""What the machine does at best, measured, so that a figure can be held against it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from fastattn.backends.cpu import CpuBackend
from fastattn.backends.extension import kernels

# Seconds for each limit: something else may have the machine for a while.
_BUDGET, _REPEATS = 0.25, 5
# In float32 elements: 256 MB, and 16 MB a thread on large machines, more than their caches hold.
_STREAMED, _STREAMED_PER_THREAD = 1 << 26, 1 << 22
_ALIGNMENT = 64


class Limits(NamedTuple):
    """The best of many short runs on all threads together, which nothing on this machine can exceed for long.

    Attributes:
        float32: multiply-adds in registers, GFLOP/s.
        bfloat16: products of bfloat16, GFLOP/s: on AMX tiles where there are any, else float32's, into which they are
            widened.
        read: reading memory out of cache, GB/s.
        copy: copying it past the caches, GB/s: bytes read plus bytes written.
    """

    float32: float
    bfloat16: float
    read: float
    copy: float

    def described(self) -> dict[str, str]:
        """Returns each limit by name, with its unit."""
        return {
            "float32 multiply-adds": f"{self.float32:.0f} GFLOP/s",
            "bfloat16 products": f"{self.bfloat16:.0f} GFLOP/s",
            "reading memory": f"{self.read:.1f} GB/s",
            "copying memory": f"{self.copy:.1f} GB/s, read and written together",
        }

    def of(self, unit: str, dtype: torch.dtype, bandwidth: str) -> float:
        """Returns what a rate in ``unit``, "GFLOP/s" or "GB/s", is held against; ``bandwidth`` is "read" or "copy"."""
        if unit == "GB/s":
            return self.copy if bandwidth == "copy" else self.read
        return self.bfloat16 if dtype == torch.bfloat16 else self.float32


def measure() -> Limits | None:
    """Returns the limits with PyTorch's present number of threads, in two seconds; None without the C++ kernels."""
    if CpuBackend().unavailable():
        return None
    run = kernels()
    count = max(_STREAMED, torch.get_num_threads() * _STREAMED_PER_THREAD)
    source, target = (_aligned(count) for _ in range(2))
    moved = 4.0 * count

    def read() -> float:
        run.read_memory(source)
        return moved

    def copy() -> float:
        run.copy_memory(source, target)
        return 2 * moved

    float32 = _rate(lambda: run.multiply_add_peak(200_000))
    tiles = _rate(lambda: run.tile_peak(50_000))
    return Limits(float32, tiles or float32, _rate(read), _rate(copy))


def _aligned(count: int) -> torch.Tensor:
    """Returns ``count`` float32 zeros that begin at a cache line, each page touched."""
    memory = torch.empty(count + _ALIGNMENT // 4)
    start = -memory.data_ptr() % _ALIGNMENT // 4
    return memory[start : start + count].zero_()


def _rate(work: Callable[[], float]) -> float:
    """Returns the best rate of ``work``, which says how much it did, in 1e9 a second."""
    work()
    best, repeats, end = 0.0, 0, time.perf_counter() + _BUDGET
    while repeats < _REPEATS or time.perf_counter() < end:
        start = time.perf_counter()
        done = work()
        best = max(best, done / (time.perf_counter() - start) / 1e9)
        repeats += 1
    return best
