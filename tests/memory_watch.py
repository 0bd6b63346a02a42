"""Watches every load and store of Triton kernels in the interpreter.

Programs run one after another there and nothing stops them from leaving their tensors, so that two faults go unseen: a
load or store outside of the tensors of the launch, and an address that one program writes and another one reads or
writes, which on a GPU happens in no order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from torch import Tensor
from triton.runtime import interpreter

# Of each place in a launch's tensors the program that has read or written it, counted from 1, or that several have.
# In 16 bits, because there are as many places as elements, untouched ones included: tests have tensors of 2^31.
_NUMBER = np.int16
_SEVERAL = -1


class _Watch:
    """What one launch may touch, and who has touched what."""

    def __init__(self, arguments: Iterable[Any]) -> None:
        tensors = [tensor for tensor in _tensors(arguments) if tensor.numel()]
        merged: list[list[int]] = []
        for begin, end in sorted(map(_extent, tensors)):
            if merged and begin <= merged[-1][1]:
                merged[-1][1] = max(end, merged[-1][1])
            else:
                merged.append([begin, end])
        self.unit = min((tensor.element_size() for tensor in tensors), default=1)
        firsts = np.cumsum([0, *((end - begin) // self.unit for begin, end in merged)])
        self.begins, self.ends = (np.array([extent[side] for extent in merged], dtype=np.uint64) for side in range(2))
        self.firsts = firsts.astype(np.uint64)
        # Zeros from the system, which takes no memory for what is not touched.
        self.readers, self.writers = (np.zeros(firsts[-1], dtype=_NUMBER) for _ in range(2))
        self.written_twice = self.read_and_written = 0

    def places(self, pointers: Any, mask: np.ndarray) -> np.ndarray:
        """Returns where addresses are among the elements of all tensors."""
        addresses = np.broadcast_to(pointers.data, mask.shape)[mask].reshape(-1)
        size = np.uint64(max(1, pointers.get_element_ty().primitive_bitwidth // 8))
        at = np.searchsorted(self.begins, addresses, side="right") - 1
        outside = (at < 0) | (addresses + size > self.ends[at])
        assert not outside.any(), f"{outside.sum()} of {addresses.size} addresses lie outside of the launch's tensors"
        return self.firsts[at] + (addresses - self.begins[at]) // np.uint64(self.unit)

    def read(self, pointers: Any, mask: np.ndarray) -> None:
        if not mask.any():
            return
        places, program = self.places(pointers, mask), _program()
        self.read_and_written += _others(self.writers[places], program).sum()
        self.readers[places] = np.where(_others(self.readers[places], program), _SEVERAL, program)

    def write(self, pointers: Any, mask: np.ndarray) -> None:
        if not mask.any():
            return
        places, program = self.places(pointers, mask), _program()
        others = _others(self.writers[places], program)
        self.written_twice += others.sum()
        self.read_and_written += _others(self.readers[places], program).sum()
        self.writers[places] = np.where(others, _SEVERAL, program)

    def check_races(self) -> None:
        assert not self.written_twice, f"{self.written_twice} addresses are written by more than one program"
        assert not self.read_and_written, (
            f"{self.read_and_written} addresses are read by one program and written by another"
        )


def _program() -> int:
    """Returns the number of the program that runs."""
    builder = interpreter.interpreter_builder
    (x, y, z), (width, height, _) = builder.grid_idx, builder.grid_dim
    number = 1 + x + width * (y + height * z)
    assert number <= np.iinfo(_NUMBER).max, "too many programs to be told apart"
    return number


def _others(programs: np.ndarray, program: int) -> np.ndarray:
    return (programs != 0) & (programs != program)


def _tensors(arguments: Iterable[Any]) -> Iterator[Tensor]:
    for value in arguments:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple):
            yield from _tensors(value)
        elif hasattr(value, "base"):
            yield from _tensors([value.base])


def _extent(tensor: Tensor) -> tuple[int, int]:
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


@contextmanager
def watching() -> Iterator[None]:
    """Fails what does so in launches inside."""
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store = builder.create_masked_load, builder.create_masked_store
    prepare, finish = executor._init_args_hst, executor._restore_args_dev
    watch: list[_Watch] = []

    def watched_load(self: Any, pointers: Any, mask: Any, *rest: Any, **more: Any) -> Any:
        watch[-1].read(pointers, np.asarray(mask.data))
        return load(self, pointers, mask, *rest, **more)

    def watched_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **more: Any) -> Any:
        watch[-1].write(pointers, np.asarray(mask.data))
        return store(self, pointers, value, mask, *rest, **more)

    def begin(self: Any, *arguments: Any) -> Any:
        found = prepare(self, *arguments)
        watch[:] = [_Watch((*found[0], *found[1].values()))]
        return found

    def end(self: Any, *arguments: Any) -> None:
        watch[-1].check_races()
        finish(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "create_masked_load", watched_load)
        patch.setattr(builder, "create_masked_store", watched_store)
        patch.setattr(executor, "_init_args_hst", begin)
        patch.setattr(executor, "_restore_args_dev", end)
        yield
