"""Triton's interpreter, to the same bits in less time.

For tests, which wait for little else. Its time goes into describing values: each operation makes types and shapes
anew and looks dtypes up in a dictionary built for that, the overflow of each sum is computed and reported to nobody,
and each call of a function within a kernel hands all of the language over once more. Here descriptions are remembered
and the language is handed over once. All of it is known of Triton 3.6; any other version is left as it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import triton
import triton.language as tl

_KNOWN = triton.__version__.split(".")[:2] == ["3", "6"]
_dtypes: dict[str, np.dtype[Any]] = {}
_blocks: dict[tuple[Any, ...], dict[str, Any]] = {}
_language: list[tuple[Any, str, Any]] = []


@contextmanager
def quick() -> Iterator[None]:
    """Lets kernels that are launched inside be interpreted quickly."""
    if not _KNOWN:
        yield
        return
    from triton.language.semantic import TritonSemantic
    from triton.runtime import interpreter

    scope = _hand_over()
    find_dtype, describe_block = interpreter._get_np_dtype, tl.block_type.__init__
    reduce, broadcast = interpreter.ReduceOps.apply_impl, TritonSemantic.broadcast_impl_value

    def known_dtype(dtype: Any) -> np.dtype[Any]:
        found = _dtypes.get(dtype.name)
        if found is None:
            found = _dtypes[dtype.name] = find_dtype(dtype)
        return found

    def known_block(self: Any, element_ty: Any, shape: Any) -> None:
        key = (element_ty.name, *[n.value if isinstance(n, tl.constexpr) else n for n in shape])
        found = _blocks.get(key)
        if found is None:
            describe_block(self, element_ty, shape)
            found = _blocks[key] = dict(vars(self))
        vars(self).update(found)

    def known_tensor(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = _shape(tuple(type.shape.values) if type.is_block() else ())

    def broadcast_unlike(self: Any, left: Any, right: Any) -> tuple[Any, Any]:
        shapes = [t.type.shape.values if t.type.is_block() else None for t in (left, right)]
        return (left, right) if shapes[0] == shapes[1] else broadcast(self, left, right)

    def reduce_whole(self: Any, input: Any) -> Any:
        # Of what ``tl.topk`` is made. Only sums and extrema do not go element by element there.
        if self.combine_fn == tl.standard._xor_combine:
            return self.min_max(input[0], val_reduce_op=np.bitwise_xor.reduce)
        return reduce(self, input)

    try:
        scope.set_attr(interpreter, "_patch_lang", lambda function: interpreter._LangPatchScope())
        scope.set_attr(interpreter, "_get_np_dtype", known_dtype)
        scope.set_attr(interpreter.ReduceOps, "apply_impl", reduce_whole)
        unchecked = interpreter.InterpreterOptions(sanitize_overflow=False)
        scope.set_attr(interpreter.interpreter_builder, "options", unchecked)
        scope.set_attr(TritonSemantic, "broadcast_impl_value", broadcast_unlike)
        scope.set_attr(tl.block_type, "__init__", known_block)
        scope.set_attr(tl.tensor, "__init__", known_tensor)
        yield
    finally:
        scope.restore()


def _hand_over() -> Any:
    """Hands all of the language over to the interpreter, for a kernel and the functions that it calls; returns what
    takes it back."""
    from triton.runtime import interpreter

    if not _language:
        scope = interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
        _language.extend((owner, name, getattr(owner, name)) for owner, name, _ in scope._changes)
        return scope
    scope = interpreter._LangPatchScope()
    for change in _language:
        scope.set_attr(*change)
    return scope


@cache
def _shape(shape: tuple[int, ...]) -> tuple[Any, Any]:
    """Returns a tensor's shape and number of elements, as constants of the language."""
    return tl.tuple([tl.constexpr(n) for n in shape]), tl.constexpr(math.prod(shape))
