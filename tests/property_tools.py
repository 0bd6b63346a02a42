"""What the property tests share: how often and from what seed they draw, how tensors lie in memory, guarded outputs.

FASTATTN_PROPERTY_EXAMPLES sets how many examples each test draws, FASTATTN_PROPERTY_SEED which ones: the same seed
draws the same examples. Beyond what a test compares, two things fail it: a byte written outside of an output, and a
read from where no memory is, which ends the process (layouts "before a hole" and "behind a hole").
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from conftest import _cpu
from hypothesis import HealthCheck, seed, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.overrides import TorchFunctionMode

_SETTINGS = settings(
    max_examples=int(os.environ.get("FASTATTN_PROPERTY_EXAMPLES", "40")),
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
_SEED = int(os.environ.get("FASTATTN_PROPERTY_SEED", "0"))


def examples(test: Callable[..., None]) -> Callable[..., None]:
    """Decorates a test made by ``given``."""
    return seed(_SEED)(_SETTINGS(test))


GUARD = 256  # bytes on either side of an output
PATTERN = 0xA5


class GuardedOutputs(TorchFunctionMode):
    """Lays every tensor that is allocated uninitialised between guard bytes, one element off the usual alignment."""

    def __init__(self) -> None:
        super().__init__()
        self.bases: list[tuple[Tensor, int, int]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") not in ("new_empty", "empty_like", "empty") or result.numel() == 0:
            return result
        start = GUARD + result.element_size()
        size = result.numel() * result.element_size()
        base = torch.full((start + size + GUARD,), PATTERN, dtype=torch.uint8)
        self.bases.append((base, start, size))
        return base[start : start + size].view(result.dtype).as_strided(result.shape, result.stride())

    def check(self) -> None:
        assert self.bases, "no output was guarded"
        for base, start, size in self.bases:
            assert bool((base[:start] == PATTERN).all()), "written before an output"
            assert bool((base[start + size :] == PATTERN).all()), "written behind an output"


@contextmanager
def guarded(isa: str, outputs: bool = True) -> Iterator[None]:
    """Runs the block on an instruction set, with guarded outputs."""
    before = _cpu.isa()
    _cpu.set_isa(isa)
    mode = GuardedOutputs()
    try:
        with mode if outputs else nullcontext():
            yield
    finally:
        _cpu.set_isa(before)
    if outputs:
        mode.check()


DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Lengths at the edges of register tiles, vectors, words of mask bits and tiles of keys, and anything between.
lengths = st.one_of(
    st.sampled_from([1, 15, 16, 17, 63, 64, 65, 95, 96, 97, 191, 192, 193, 255, 256, 257]), st.integers(1, 300)
)
dims = st.one_of(st.sampled_from([1, 7, 8, 16, 32, 33, 64, 128]), st.integers(1, 80))


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """Returns ``tensor``, 4-D, with the same values in another place."""
    if layout == "transposed":
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "inside":  # a part of something larger, at an odd offset
        around = tensor.new_full([n + 3 for n in tensor.shape], float("nan") if tensor.is_floating_point() else 1)
        around[1:-2, 1:-2, 1:-2, 1:-2] = tensor
        return around[1:-2, 1:-2, 1:-2, 1:-2]
    if layout == "shared":  # one batch entry for all
        return tensor[:1].expand_as(tensor)
    if layout.endswith("hole"):
        return beside_a_hole(tensor, layout)
    assert layout == "contiguous"
    return tensor


layouts = st.sampled_from(["contiguous", "transposed", "inside", "shared", "before a hole", "behind a hole"])


def beside_a_hole(tensor: Tensor, layout: str) -> Tensor:
    """Returns ``tensor``, contiguous, where what lies just before or just behind it must not even be read."""
    size = tensor.numel() * tensor.element_size()
    if size == 0:
        return tensor.contiguous()
    pages = -(-size // mmap.PAGESIZE)
    memory = mmap.mmap(-1, (pages + 2) * mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for page in (0, pages + 1):
        if _libc.mprotect(ctypes.c_void_p(address + page * mmap.PAGESIZE), ctypes.c_size_t(mmap.PAGESIZE), 0) != 0:
            raise OSError(ctypes.get_errno(), "mprotect")
    offset = mmap.PAGESIZE if layout == "behind a hole" else (pages + 1) * mmap.PAGESIZE - size
    place = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=offset)
    return place.view(tensor.shape).copy_(tensor)


_libc = ctypes.CDLL(None, use_errno=True)


def assert_close(found: Tensor, expected: Tensor, scale: float, dtype: torch.dtype, what: str) -> None:
    """Asserts that ``found`` is within 64 eps of ``expected`` for results of which ``scale`` bounds every term."""
    info, wide = torch.finfo(dtype), torch.finfo(torch.promote_types(dtype, torch.float32))
    assert found.shape == expected.shape, what
    assert bool(found.isfinite().all()), f"{what} is not finite"
    error = float((found.double() - expected.double()).abs().max()) if found.numel() else 0.0
    # What is too small for eps is rounded to a multiple of the smallest number, as are its terms in the accumulator;
    # AMX takes numbers below the smallest normal one for 0.
    tiny = 2 * info.smallest_normal * info.eps
    tiny += wide.smallest_normal * (8.0 if _cpu.isa() == "amx" else 1024 * wide.eps)
    assert error <= 64 * info.eps * scale + tiny, f"{what}: off by {error}, scale {scale}"
