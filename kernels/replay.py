"""Launches that are remembered: what a call launched is launched for the next call of its kind, without thinking.

To find tiles, grids, strides and the compiled kernel takes Python longer than many a kernel takes. All of it depends on
nothing but shapes, strides, alignments and numbers, so that one call of a kind is recorded: what it allocates, what it
launches, and which of its arguments is whose pointer. From then on only pointers are new.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any, NamedTuple, TypeVar

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastattn.kernels.interpreter import is_interpreting

_Function = TypeVar("_Function", bound=Callable[..., Any])
_ALLOCATIONS = {
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.new_empty_strided.default,
}
# What is asked of Triton here is no interface of its: the versions in which it was seen to be so.
_KNOWN = triton.__version__.split(".")[:2] == ["3", "6"]
_MOST = 1024
_TENSORS = frozenset((Tensor, torch.nn.Parameter))


# A kernel, its grid, its arguments and its options.
Launch = tuple[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]]


class _Launched(NamedTuple):
    """A kernel that was launched: what Triton compiled it to, its grid and all its arguments, constants included."""

    compiled: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]


class _Plan(NamedTuple):
    """What a call does, given its tensors: allocate, launch, return."""

    allocations: list[tuple[tuple[int, ...], tuple[int, ...], torch.dtype]]
    launches: list[tuple[Callable[..., None], tuple[int, int, int], int, Any, Callable[[list[int]], tuple[Any, ...]]]]
    result: Callable[[list[Tensor]], Any]


class _Box:
    """A tensor descriptor like another one, as far as Triton's launcher asks, of the tensor at a pointer."""

    def __init__(self, like: Any, pointer: int) -> None:
        self.shape, self.strides, self.padding = like.shape, like.strides, like.padding
        self.base = self
        self.pointer = pointer

    def data_ptr(self) -> int:
        return self.pointer


class _Recording(TorchDispatchMode):
    """Notes what a call allocates and launches, and whether it does anything besides."""

    def __init__(self) -> None:
        super().__init__()
        self.allocated: list[Tensor] = []
        self.launched: list[_Launched] = []
        self.complete = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _ALLOCATIONS:
            self.allocated.append(result)
        elif not func.is_view:
            self.complete = False
        return result


class _Current(threading.local):
    recording: _Recording | None = None


_current = _Current()
# For each kind of call how often it has been seen; once recorded, its plan, or None where it has none.
_seen: dict[Any, int] = {}
# What else decides over launches than the call: see :func:`under`.
_choice: Any = None
_plans: dict[Any, _Plan | None] = {}
# To record costs as much more as five replays save (150 to 340 us, 30 to 75), and many a call is not seen so often: one
# of a decoder whose cache grows is seen once a layer.
RECORDED = 5


def replayed(function: _Function) -> _Function:
    """Makes launches of ``function(call, ...)`` be remembered.

    It may allocate, take views, launch by ``launch.start`` and return tensors; a call that does anything else with
    tensors, such as filling or copying one, is done in full every time.
    """
    if not _KNOWN:
        return function

    @wraps(function)
    def call(*args: Any) -> Any:
        if is_interpreting() or _current.recording is not None or _hooks():
            return function(*args)
        kind, tensors = _kind(args)
        key = (function, torch.get_float32_matmul_precision(), _choice, kind)
        plan = _plans.get(key)
        if plan is not None:
            return _replay(plan, tensors)
        if key in _plans:
            return function(*args)
        if _seen.get(key, 0) + 1 == RECORDED:
            result, _plans[key] = _record(function, args, tensors)
            return result
        if len(_seen) >= _MOST:
            forget()
        _seen[key] = _seen.get(key, 0) + 1
        return function(*args)

    return call  # type: ignore[return-value]


def note(compiled: Any, launch: Launch) -> None:
    """Takes down a launch of a kernel that was compiled to ``compiled``, where one is being recorded."""
    if _current.recording is not None:
        kernel, grid, arguments, options = launch
        device = triton.runtime.driver.active.get_current_device()
        binder = kernel.device_caches[device][4]
        bound = binder(*arguments, **options)[0]
        _current.recording.launched.append(_Launched(compiled, grid, tuple(bound.values())))


def forget() -> None:
    """Forgets all plans, for who changes what they do not depend on, such as tiles."""
    _seen.clear()
    _plans.clear()


@contextmanager
def under(choice: Any) -> Iterator[None]:
    """Remembers launches apart from those under another choice, hashable: of tiles, say."""
    global _choice
    before, _choice = _choice, choice
    try:
        yield
    finally:
        _choice = before


def plans() -> list[bool]:
    """Returns of each kind of call that was recorded whether there is a plan for it."""
    return [plan is not None for plan in _plans.values()]


def _kind(args: tuple[Any, ...]) -> tuple[Any, list[Tensor]]:
    """Returns what decides over the launches of a call with these arguments, hashable, and their tensors."""
    values = _flat(args)
    # Types too, because 1 == 1.0 == True.
    types = tuple(map(type, values))
    tensors = [v for v, t in zip(values, types, strict=True) if t in _TENSORS]
    rest = tuple([v for v, t in zip(values, types, strict=True) if t not in _TENSORS])
    pointers = [t.data_ptr() for t in tensors]
    # The index, because a tensor that stands for two arguments here would stand for both of them ever after.
    shapes = tuple(
        [(t.dtype, t.shape, t.stride(), p & 15, pointers.index(p)) for t, p in zip(tensors, pointers, strict=True)]
    )
    return (types, rest, shapes, tensors[0].get_device()), tensors


def _flat(values: Sequence[Any]) -> list[Any]:
    """Returns what tuples and lists hold, and where they begin and how long they are."""
    found: list[Any] = []
    for value in values:
        if isinstance(value, (tuple, list)):
            found.append((len(value),))
            found += _flat(value)
        else:
            found.append(value)
    return found


def _hooks() -> list[Any]:
    """Returns what is to be called before each launch: profilers are."""
    return triton.knobs.runtime.launch_enter_hook.calls


def _record(function: Callable[..., Any], args: Any, tensors: list[Tensor]) -> tuple[Any, _Plan | None]:
    """Returns the result of ``function(*args)``, and its plan, or None where it did what no plan has."""
    recording = _Recording()
    launches: list[Any] = []
    _hooks().append(launches.append)
    _current.recording = recording
    try:
        with recording:
            result = function(*args)
    finally:
        _current.recording = None
        _hooks().remove(launches.append)
    # As many as were noted, or some came about by another way than ``launch.start``.
    complete = recording.complete and len(launches) == len(recording.launched)
    return result, _planned(recording, tensors, result) if complete else None


def _planned(recording: _Recording, tensors: list[Tensor], result: Any) -> _Plan | None:
    """Returns the plan of what was recorded, if it can have one."""
    allocated = recording.allocated
    every = (*tensors, *allocated)
    storages = [t.untyped_storage()._cdata for t in every]
    constants: list[Any] = []

    def owner(tensor: Tensor) -> int:
        """Returns which of all tensors this one is, or is a view of; -1 for none of them.

        Raises:
            KeyError: it is a view of more than one, and nobody knows of which.
        """
        storage = tensor.untyped_storage()._cdata
        mine = [at for at, other in enumerate(storages) if other == storage]
        here = [at for at in mine if every[at].data_ptr() == tensor.data_ptr()]
        if not here and len(mine) > 1:
            raise KeyError
        return (*here, *mine, -1)[0]

    def source(value: Any) -> str:
        """Returns Python that makes an argument of pointers ``p`` and constants ``c``.

        A tensor that is neither the caller's nor was allocated is a constant too: one that its function keeps.
        """
        at = owner(value) if isinstance(value, Tensor) else -1
        if at >= 0:
            return f"p[{at}] + {value.data_ptr() - every[at].data_ptr()}"
        if isinstance(value, tuple):
            return "(" + "".join(source(item) + ", " for item in value) + ")"
        if hasattr(value, "block_shape"):  # a descriptor, Gluon's or not
            constants.append(_Box(value, 0))
            return f"box(c[{len(constants) - 1}], {source(value.base)})"
        constants.append(value)
        return f"c[{len(constants) - 1}]"

    def result_source(value: Any) -> str:
        """The same for what is returned, of allocated tensors ``a``."""
        if isinstance(value, Tensor):
            at = storages.index(value.untyped_storage()._cdata) - len(tensors)
            if at < 0:
                raise ValueError
            same = allocated[at]
            if (value.shape, value.stride(), value.storage_offset()) == (same.shape, same.stride(), 0):
                return f"a[{at}]"
            return f"a[{at}].as_strided({tuple(value.shape)}, {value.stride()}, {value.storage_offset()})"
        if isinstance(value, (tuple, list)):
            items = "".join(result_source(item) + ", " for item in value)
            return f"[{items}]" if isinstance(value, list) else f"({items})"
        constants.append(value)
        return f"c[{len(constants) - 1}]"

    scope = {"c": constants, "box": _Box}
    launches = []
    try:
        for compiled, grid, arguments in recording.launched:
            make = eval(f"lambda p: {source(arguments)}", scope)
            x, y, z = (*grid, 1, 1)[:3]
            launches.append((compiled.run, (x, y, z), compiled.function, compiled.packed_metadata, make))
        returned = eval(f"lambda a: {result_source(result)}", scope)
    except (KeyError, ValueError):
        # An argument is a view of nobody knows which tensor, or what is returned was not allocated here.
        return None
    return _Plan([(tuple(t.shape), t.stride(), t.dtype) for t in allocated], launches, returned)


def _replay(plan: _Plan, tensors: list[Tensor]) -> Any:
    device = tensors[0].device
    allocated = [
        torch.empty_strided(shape, stride, dtype=dtype, device=device) for shape, stride, dtype in plan.allocations
    ]
    pointers = [t.data_ptr() for t in tensors]
    pointers += [t.data_ptr() for t in allocated]
    active = triton.runtime.driver.active
    stream = active.get_current_stream(active.get_current_device())
    for run, (x, y, z), function, metadata, arguments in plan.launches:
        run(x, y, z, stream, function, metadata, None, None, None, *arguments(pointers))
    return plan.result(allocated)
