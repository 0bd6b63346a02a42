"""Runs a Gluon kernel for Hopper on tensors, as badly as a GPU may.

Each partition of warps is a thread, of which one runs at a time; who goes on is drawn anew at every operation. A copy
destroys what it writes to at once, and arrives whenever chance wants; a product of the tensor cores reads its operands
at any time until it is waited for. So a wait that is missing, a wrong phase, a buffer that is filled too early or a
deadlock makes NaN or raises :class:`Fault`, by some seed.

What is not emulated: layouts, and the warps of one partition, whose barriers the compiler sets.
"""

from __future__ import annotations

import ast
import random
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch


class Fault(AssertionError):
    """The kernel did what a GPU does not forgive."""


class _Stopped(Exception):
    """Ends the threads of a machine that has failed."""


class Pointer:
    """A pointer into a flat tensor, or a tensor of such."""

    def __init__(self, data: torch.Tensor, at: Any = 0) -> None:
        self.data, self.at = data.view(-1), at

    def __add__(self, more: Any) -> Pointer:
        return Pointer(self.data, self.at + more)


class Box:
    """A descriptor of a 4-D tensor: what lies beyond its end is read as 0 and not written."""

    def __init__(self, tensor: torch.Tensor, rows: int, columns: int) -> None:
        self.tensor, self.rows, self.columns, self.dtype = tensor, rows, columns, tensor.dtype
        self.block_type = SimpleNamespace(nbytes=rows * columns * tensor.element_size())

    def part(self, at: list[Any]) -> torch.Tensor:
        batch, head, row, column = map(int, at)
        return self.tensor[batch, head, max(row, 0) : max(row + self.rows, 0), column : column + self.columns]

    def read(self, at: list[Any]) -> torch.Tensor:
        found, part = torch.zeros(self.rows, self.columns, dtype=self.dtype), self.part(at)
        found[: part.shape[0], : part.shape[1]] = part
        return found

    def write(self, at: list[Any], values: torch.Tensor) -> None:
        part = self.part(at)
        part.copy_(values[: part.shape[0], : part.shape[1]])


class Barrier:
    """An mbarrier: a phase ends when all have arrived and all bytes that are expected have come."""

    def __init__(self) -> None:
        self.count, self.missing, self.bytes, self.phase = 0, 0, 0, 0

    def change(self, arrivals: int, size: int) -> None:
        self.missing, self.bytes = self.missing - arrivals, self.bytes + size
        if self.missing < 0 or self.bytes < 0:
            raise Fault("a barrier that nobody has made, or arrived at too often")
        if self.missing == 0 and self.bytes == 0:
            self.phase, self.missing = self.phase + 1, self.count


class Shared:
    """A buffer in shared memory: the machine's, and a view of its data."""

    def __init__(self, machine: Machine, data: torch.Tensor) -> None:
        self.machine, self.data, self.dtype = machine, data, data.dtype

    def index(self, at: Any) -> Shared:
        return Shared(self.machine, self.data[int(at)])

    def permute(self, order: tuple[int, ...]) -> Shared:
        return Shared(self.machine, self.data.permute(order))

    def store(self, values: torch.Tensor) -> None:
        self.machine.pause()
        self.data.copy_(values)
        self.machine.me().unfenced.append(self.data.data_ptr())


class Product:
    """A product of the tensor cores that is under way."""

    def __init__(self, a: Any, b: Shared, to: Any) -> None:
        self.a, self.b, self.to, self.value = a, b, to, None

    def happen(self) -> None:
        a = self.a.data if isinstance(self.a, Shared) else self.a
        to = self.to.value if isinstance(self.to, Product) else self.to
        self.value = to + a.float() @ self.b.data.float()


class Partition:
    """Warps with a course of their own."""

    def __init__(self, body: Callable[[], None]) -> None:
        self.body, self.go = body, threading.Semaphore(0)
        self.until: Callable[[], bool] = lambda: True
        self.products: list[Product] = []
        self.stores: list[Callable[[], None]] = []
        self.unfenced: list[int] = []
        self.done = False


class Machine:
    """A multiprocessor that runs one program of a grid."""

    def __init__(self, seed: int, program: int, programs: int) -> None:
        self.random = random.Random(seed)
        # How much sooner than the others each sort of event comes to be.
        self.haste = [self.random.choice((0.02, 0.3, 1.0)) for _ in range(3)]
        self.program, self.programs = program, programs
        self.copies: list[Callable[[], None]] = []
        self.partitions: list[Partition] = []
        self.turn = threading.Semaphore(0)
        self.here = threading.local()
        self.failure: BaseException | None = None

    def me(self) -> Partition:
        return self.here.partition

    def pause(self, until: Callable[[], bool] = lambda: True) -> None:
        """Lets others go on, at least until something is so."""
        if not self.partitions:
            return
        me = self.me()
        me.until = until
        self.turn.release()
        me.go.acquire()
        if self.failure is not None:
            raise _Stopped

    def run(self, bodies: list[Callable[[], None]]) -> None:
        self.partitions = [Partition(body) for body in bodies]
        threads = [threading.Thread(target=self._thread, args=(p,), daemon=True) for p in self.partitions]
        for thread in threads:
            thread.start()
        while self.failure is None and not all(p.done for p in self.partitions):
            self._step()
        if self.failure is None and self.copies:
            self.failure = Fault("the program ends while copies are under way")
        for partition in self.partitions:
            partition.go.release()
        for thread in threads:
            thread.join()
        if self.failure is not None:
            raise self.failure

    def _thread(self, partition: Partition) -> None:
        self.here.partition = partition
        partition.go.acquire()
        try:
            if self.failure is None:
                partition.body()
                if partition.products or partition.stores:
                    raise Fault("a partition ends without waiting for what it began")
        except _Stopped:
            return
        except BaseException as failure:
            self.failure = self.failure or failure
        partition.done = True
        self.turn.release()

    def _step(self) -> None:
        """Lets something happen that can: a partition go on, a copy arrive, a product be computed, a result leave."""
        ready = [p for p in self.partitions if not p.done and p.until()]
        queues: list[list[Any]] = [p.products[:1] for p in self.partitions] + [p.stores for p in self.partitions]
        what = self.random.choices(("go", "copy", "queue"), self.haste)[0]
        if self.copies and (what == "copy" or not ready):
            self.copies.pop(self.random.randrange(len(self.copies)))()
        elif any(queues) and (what == "queue" or not ready):
            number = self.random.choice([n for n, queue in enumerate(queues) if queue])
            partition = self.partitions[number % len(self.partitions)]
            if number < len(self.partitions):
                partition.products.pop(0).happen()
            else:
                partition.stores.pop(0)()
        elif ready:
            self.random.choice(ready).go.release()
            self.turn.acquire()
        elif not self.copies:
            self.failure = Fault("a deadlock: everybody waits, and nothing is under way")

    # What kernels call.

    def allocate(self, dtype: Any, shape: list[int], layout: Any) -> Any:
        if dtype == torch.int64:
            made = [Barrier() for _ in range(shape[0])]
            return SimpleNamespace(index=lambda at: made[int(at)])
        return Shared(self, torch.full(shape, float("nan"), dtype=dtype))

    def init(self, barrier: Barrier, count: int) -> None:
        barrier.count = barrier.missing = count

    def wait(self, barrier: Barrier, phase: Any, pred: bool = True, deps: Any = ()) -> None:
        self.pause(lambda: not pred or barrier.phase % 2 != int(phase))

    def arrive(self, barrier: Barrier, *, count: int = 1, pred: bool = True) -> None:
        self.pause()
        barrier.change(count, 0)

    def expect(self, barrier: Barrier, size: int, pred: bool = True) -> None:
        self.pause()
        barrier.change(1, size)

    def fetch(self, box: Box, at: list[Any], barrier: Barrier, to: Shared) -> None:
        self.pause()
        to.data.fill_(float("nan"))

        def arrive() -> None:
            to.data.copy_(box.read(at))
            barrier.change(0, -box.block_type.nbytes)

        self.copies.append(arrive)

    def send(self, box: Box, at: list[Any], source: Shared) -> None:
        self.pause()
        if source.data.data_ptr() in self.me().unfenced:
            raise Fault("the copy engine may not see yet what was written")
        self.me().stores.append(lambda: box.write(at, source.data))

    def sent(self, pending: int) -> None:
        self.pause()
        while len(self.me().stores) > pending:
            self.me().stores.pop(0)()

    def fence(self) -> None:
        self.me().unfenced.clear()

    def multiply(self, a: Any, b: Shared, to: Any, *, use_acc: bool = True, is_async: bool = False) -> Any:
        self.pause()
        product = Product(a, b, to if use_acc else 0.0)
        self.me().products.append(product)
        return product if is_async else self.multiplied(0, [product])

    def multiplied(self, pending: int, deps: list[Any]) -> Any:
        self.pause()
        while len(self.me().products) > pending:
            self.me().products.pop(0).happen()
        found = [dep.value if isinstance(dep, Product) else dep for dep in deps]
        if any(value is None for value in found):
            raise Fault("a product that is not waited for long enough")
        return found[0] if len(found) == 1 else tuple(found)

    def specialise(self, functions: list[tuple[Any, tuple[Any, ...]]], warps: Any, registers: Any) -> None:
        self.run([lambda f=f, a=a: f(*a) for f, a in functions])

    def names(self) -> dict[str, Any]:
        """Returns what a kernel's source knows by name."""
        language = SimpleNamespace(
            program_id=lambda axis: self.program, num_programs=lambda axis: self.programs, static_range=range,
            cdiv=lambda a, b: -(-a // b), cast=lambda x, dtype: x.to(dtype) if isinstance(x, torch.Tensor) else x,
            zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
            full=lambda shape, value, dtype, layout: torch.full(shape, value, dtype=dtype),
            arange=lambda begin, end, layout: torch.arange(begin, end), convert_layout=lambda x, layout: x,
            where=_where, maximum=_of_two(torch.maximum), minimum=_of_two(torch.minimum), exp2=torch.exp2,
            log2=torch.log2, div_rn=lambda a, b: a / b, sum=lambda x, axis: x.sum(axis), load=_load, store=_store,
            max=lambda x, axis=None: x.max() if axis is None else x.amax(axis), SliceLayout=lambda *_: None,
            DotOperandLayout=lambda *_: None, NVMMADistributedLayout=lambda *_: None,
            NVMMASharedLayout=SimpleNamespace(get_default_for=lambda *_: None),
            allocate_shared_memory=self.allocate, warp_specialize=self.specialise, int32=torch.int32,
            int64=torch.int64, float32=torch.float32, float64=torch.float64,
        )  # fmt: skip
        barriers = SimpleNamespace(
            init=self.init, wait=self.wait, arrive=self.arrive, expect=self.expect, MBarrierLayout=lambda: None
        )
        engine = SimpleNamespace(
            async_copy_global_to_shared=self.fetch, async_copy_shared_to_global=self.send, store_wait=self.sent
        )
        return {
            "gl": language, "tl": language, "mbarrier": barriers, "tma": engine, "fence_async_shared": self.fence,
            "warpgroup_mma": self.multiply, "warpgroup_mma_wait": self.multiplied,
        }  # fmt: skip


def _where(condition: Any, a: Any, b: Any) -> Any:
    return torch.where(condition, a, b) if isinstance(condition, torch.Tensor) else (a if condition else b)


def _of_two(function: Callable[..., torch.Tensor]) -> Callable[[Any, Any], Any]:
    def call(a: Any, b: Any) -> Any:
        whole = not isinstance(a, torch.Tensor) and not isinstance(b, torch.Tensor)
        found = function(torch.as_tensor(a), torch.as_tensor(b))
        return found.item() if whole else found

    return call


def _load(pointer: Pointer) -> Any:
    return pointer.data[pointer.at].item()


def _store(pointer: Pointer, values: torch.Tensor, mask: torch.Tensor | None = None) -> None:
    if mask is None:
        pointer.data[pointer.at] = values
    else:
        pointer.data[pointer.at[mask]] = values[mask].to(pointer.data.dtype)


def functions(source: str, names: dict[str, Any]) -> dict[str, Any]:
    """Returns the functions of a kernel file, without their decorators, to which ``names`` mean what they mean here."""
    tree = ast.parse(source)
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    for node in tree.body:
        node.decorator_list = []
    scope = dict(names)
    exec(compile(tree, "<kernel>", "exec", annotations.compiler_flag), scope)
    return scope


def kernels() -> Path:
    """Returns the folder of the kernels' sources."""
    return Path(__file__).parent.parent / "kernels"
