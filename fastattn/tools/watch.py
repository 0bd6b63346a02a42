"""Which layer of a model runs which op."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from fastattn.backends.base import Backend
from fastattn.ops._dispatch import observe


@contextmanager
def watching(model: nn.Module, on_call: Callable[[str, str, Any, Backend], None]) -> Iterator[Callable[[], str]]:
    """Calls ``on_call(layer, op, call, backend)`` before each op of fastattn that this thread runs in the block.

    ``layer`` is the name of the innermost module that is running, "" for the model itself or none.  Modules without
    children are not looked into: whoever reads a Linear's weights instead of calling it does so only where nothing is
    hooked to it.

    Yields:
        A function that returns the name of the layer that is running.
    """
    running: list[str] = []

    def enter(name: str) -> Callable[..., None]:
        return lambda *_: running.append(name)

    def leave(*_: Any) -> None:
        running.pop()

    def layer() -> str:
        return running[-1] if running else ""

    handles = []
    try:
        for name, module in model.named_modules():
            if next(module.children(), None) is not None:
                handles.append(module.register_forward_pre_hook(enter(name)))
                handles.append(module.register_forward_hook(leave, always_call=True))
        with observe(lambda op, call, backend: on_call(layer(), op, call, backend)):
            yield layer
    finally:
        for handle in handles:
            handle.remove()
