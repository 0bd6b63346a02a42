"""Triton's interpreter, made to compute what a GPU computes.

Triton 3.6 cuts float32 off where a GPU rounds it to bfloat16, and multiplies the bits of bfloat16 as integers. Here
PyTorch rounds, and products are of the numbers. And NumPy 2.4 makes no number of an array with one element any more,
which the interpreter wants of the bounds of a loop.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from fastattn.kernels.quick_interpreter import quick


def is_interpreting() -> bool:
    """Returns whether kernels run in the interpreter."""
    return bool(triton.knobs.runtime.interpret)


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Lets kernels that are launched inside round and multiply as on a GPU.

    NumPy's warnings of -inf and NaN, which are meant, are silent.
    """
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    cut_off, multiply, patch = interpreter._convert_float, builder.create_dot, interpreter._patch_lang_tensor

    def convert(values: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
        if (source, target) == (tl.float32, tl.bfloat16):
            return torch.from_numpy(np.ascontiguousarray(values)).bfloat16().view(torch.int16).numpy().view(np.uint16)
        if (source, target) == (tl.bfloat16, tl.float32):
            return values.astype(np.uint32) << np.uint32(16)
        return cut_off(values, source, target, rounding)

    def widen(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        wide = convert(handle.data, tl.bfloat16, tl.float32, None).view(np.float32)
        return interpreter.TensorHandle(wide, tl.float32)

    def dot(self: Any, a: Any, b: Any, *others: Any) -> Any:
        return multiply(self, widen(a), widen(b), *others)

    def patch_index(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._convert_float, builder.create_dot, interpreter._patch_lang_tensor = convert, dot, patch_index
    try:
        with np.errstate(all="ignore"), quick():
            yield
    finally:
        interpreter._convert_float, builder.create_dot, interpreter._patch_lang_tensor = cut_off, multiply, patch
