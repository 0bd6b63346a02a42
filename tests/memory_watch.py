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


class _Watch:
    """What one launch may touch, and what its programs have touched."""

    def __init__(self, arguments: Iterable[Any]) -> None:
        extents = sorted(_extents(arguments))
        merged: list[list[int]] = []
        for begin, end in extents:
            if merged and begin <= merged[-1][1]:
                merged[-1][1] = max(end, merged[-1][1])
            else:
                merged.append([begin, end])
        self.begins = np.array([begin for begin, _ in merged], dtype=np.uint64)
        self.ends = np.array([end for _, end in merged], dtype=np.uint64)
        self.read: dict[tuple[int, ...], list[np.ndarray]] = {}
        self.written: dict[tuple[int, ...], list[np.ndarray]] = {}

    def touch(self, pointers: Any, mask: np.ndarray, touched: dict[tuple[int, ...], list[np.ndarray]]) -> None:
        addresses = np.broadcast_to(pointers.data, mask.shape)[mask].reshape(-1)
        if not addresses.size:
            return
        size = np.uint64(max(1, pointers.get_element_ty().primitive_bitwidth // 8))
        at = np.searchsorted(self.begins, addresses, side="right") - 1
        outside = (at < 0) | (addresses + size > self.ends[at])
        assert not outside.any(), f"{outside.sum()} of {addresses.size} addresses lie outside of the launch's tensors"
        touched.setdefault(interpreter.interpreter_builder.grid_idx, []).append(addresses)

    def check_races(self) -> None:
        written = {program: np.unique(np.concatenate(found)) for program, found in self.written.items()}
        if not written:
            return
        owned = np.sort(np.concatenate(list(written.values())))
        twice = (owned[1:] == owned[:-1]).sum()
        assert not twice, f"{twice} addresses are written by more than one program"
        for program, found in self.read.items():
            others = np.unique(np.concatenate(found))
            mine = written.get(program, owned[:0])
            both = np.setdiff1d(np.intersect1d(others, owned, assume_unique=True), mine, assume_unique=True).size
            assert not both, f"{both} addresses are read by one program and written by another"


def _extents(arguments: Iterable[Any]) -> Iterator[tuple[int, int]]:
    for value in arguments:
        if isinstance(value, Tensor):
            if value.numel():
                last = sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True))
                yield value.data_ptr(), value.data_ptr() + (last + 1) * value.element_size()
        elif isinstance(value, tuple):
            yield from _extents(value)
        elif hasattr(value, "base"):
            yield from _extents([value.base])


@contextmanager
def watching() -> Iterator[None]:
    """Fails what does so in launches inside."""
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store = builder.create_masked_load, builder.create_masked_store
    prepare, finish = executor._init_args_hst, executor._restore_args_dev
    watch: list[_Watch] = []

    def watched_load(self: Any, pointers: Any, mask: Any, *rest: Any, **more: Any) -> Any:
        watch[-1].touch(pointers, mask.data, watch[-1].read)
        return load(self, pointers, mask, *rest, **more)

    def watched_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **more: Any) -> Any:
        watch[-1].touch(pointers, mask.data, watch[-1].written)
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
