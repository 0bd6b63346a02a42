"""Which backend serves a call."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from fastattn import backends as _backends
from fastattn.backends.base import Backend
from fastattn.errors import FallbackWarning, UnsupportedError


class _Requested(threading.local):
    name = ""


class _Observers(threading.local):
    callbacks: tuple[Callable[[str, Any, Backend], None], ...] = ()


# threading.local and not a ContextVar, which torch.compile cannot trace.
_requested = _Requested()
_observers = _Observers()

_Result = TypeVar("_Result")

_warned: set[tuple[str, str]] = set()
# For each backend, the ops that it found it cannot serve here as it launched them, and why.
_failed: dict[str, dict[str, str]] = {}


class BackendStatus(NamedTuple):
    """Whether a backend can run here, and if not, why and how to get it.

    Of one that can, ``reason`` is None, or names the calls that it turned out not to serve here, such as those for
    which the GPU has too little shared memory.
    """

    available: bool
    reason: str | None


def backends() -> dict[str, BackendStatus]:
    """Returns the status of every backend, in the order in which the automatic choice asks them."""
    found = {}
    for backend in _backends.ALL:
        why = backend.unavailable()
        failed = (f"{op}: {reason}" for op, reason in _failed.get(backend.name, {}).items())
        found[backend.name] = BackendStatus(why is None, why or "; ".join(failed) or None)
    return found


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Makes every op inside the block use backend ``name``, unless it is given ``backend=`` itself.

    Raises:
        ValueError: there is no backend of that name.
    """
    before = _requested.name
    _requested.name = check_name(name)
    try:
        yield
    finally:
        _requested.name = before


def resolve(backend: str | None) -> str:
    """Returns the backend that a call asks for: its own ``backend=``, else :func:`use_backend`'s, else ""."""
    return _requested.name if backend is None else check_name(backend)


def may_be_plain(backend: str | None) -> bool:
    """Whether a call may be tried as a plain one: no backend is asked for, and nobody observes or compiles it."""
    return backend is None and not (_requested.name or _observers.callbacks or torch.compiler.is_compiling())


def check_name(name: str) -> str:
    if name not in _backends.BY_NAME:
        raise ValueError(f"backend must be one of {', '.join(map(repr, _backends.BY_NAME))}, got {name!r}")
    return name


@contextmanager
def observe(callback: Callable[[str, Any, Backend], None] | None) -> Iterator[None]:
    """Calls ``callback(op, call, backend)`` before each op of this thread in the block; None mutes the others.

    ``call`` is the canonical one.  Ops that the callback itself runs are not observed.
    """
    before = _observers.callbacks
    _observers.callbacks = () if callback is None else (*before, callback)
    try:
        yield
    finally:
        _observers.callbacks = before


def serve(op: str, call: Any, compute: Callable[[Any], _Result]) -> _Result:
    """Returns ``compute(backend)`` of the backend for ``call``: the one it names, else the first that supports it.

    A backend may find only as it launches that it cannot serve a call; the automatic choice then asks the next one.

    Raises:
        UnsupportedError: with each backend's reasons.
    """
    failed: dict[str, list[str]] = {}
    while True:
        backend = choose(op, call, failed)
        try:
            with backend.on_device_of(call):
                return compute(backend)
        except UnsupportedError as error:
            why = error.reasons.get(backend.name)
            if why is None:
                raise
            _failed.setdefault(backend.name, {})[error.op] = ", ".join(why)
            if call.backend:
                raise
            failed[backend.name] = why


def choose(op: str, call: Any, failed: Mapping[str, list[str]] | None = None) -> Backend:
    """Returns the backend for ``call``: the one it names, else the first that supports it.

    Args:
        op: name of the op.
        call: canonical.
        failed: backends that have tried, and why they could not.

    Raises:
        UnsupportedError: with each backend's reasons.
    """
    backend = _choose(op, call, failed or {})
    for callback in _observers.callbacks:
        with observe(None):
            callback(op, call, backend)
    return backend


def first(op: str, call: Any) -> Backend:
    """Returns the backend that :func:`serve` would ask first, and tells no observer."""
    return _choose(op, call, {})


def _choose(op: str, call: Any, failed: Mapping[str, list[str]]) -> Backend:
    if call.backend:
        backend = _backends.BY_NAME[call.backend]
        why = backend.refuses(op, call)
        if why:
            raise UnsupportedError(op, {backend.name: why})
        return backend
    reasons: dict[str, list[str]] = {}
    for backend in _backends.ALL:
        why = failed.get(backend.name) or backend.refuses(op, call)
        if not why:
            if backend.name == "reference":
                warn_reference(op, "; ".join(f"{name}: {', '.join(r)}" for name, r in reasons.items()))
            return backend
        reasons[backend.name] = why
    raise UnsupportedError(op, reasons)


def warn_reference(op: str, why: str) -> None:
    """Warns, once a reason, that a call runs on the reference."""
    if (op, why) in _warned or torch.compiler.is_compiling():
        return
    _warned.add((op, why))
    warnings.warn(
        f"fastattn.{op} runs on the reference backend, which is slower and holds all that the formula holds, "
        f"because: {why}",
        FallbackWarning,
        stacklevel=4,
    )


def needs_reference_derivatives(*tensors: Tensor | None) -> bool:
    """Whether a derivative is asked for that kernels do not have: forward mode, or a ``torch.func`` transform."""
    if torch.compiler.is_compiling():
        return False
    if torch._C._are_functorch_transforms_active():
        return True
    if torch.autograd.forward_ad._current_level < 0:
        return False
    return any(t is not None and torch.autograd.forward_ad.unpack_dual(t).tangent is not None for t in tensors)
