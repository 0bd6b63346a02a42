"""Tensor descriptors: with one, the GPU's copy engine (TMA, from Hopper on) fetches and writes tiles by itself.

No thread computes an address, and what lies beyond a tensor's end arrives as 0. A tensor that the engine does not take
(of a dtype wider than 2 bytes, not aligned to 16 bytes, or broadcast) has no descriptor: its tiles come by pointers.
"""

from __future__ import annotations

import importlib.util
from typing import Any

from torch import Tensor

from fastattn.kernels.interpreter import is_interpreting
from fastattn.kernels.launch import padded

# The engine's own bounds: 16 bytes of alignment, sizes of 32 and strides of 40 bits, 256 elements a side of a box.
_ALIGNMENT = 16
_LARGEST_SIZE = 1 << 31
_LARGEST_STRIDE = 1 << 40
_LARGEST_SIDE = 256
_HOPPER = 90


def box(tensor: Tensor, rows: int, architecture: int) -> Any:
    """Returns a descriptor of a tensor [batch, heads, seq_len, head_dim] whose boxes are ``rows`` of one head; None
    where the GPU or the tensor does not allow one.

    Args:
        tensor: contiguous in its last dimension.
        rows: a power of two.
        architecture: compute capability times 10; the interpreter has descriptors whatever it is.
    """
    columns = padded(tensor.shape[3])
    return _box(tensor, [1, 1, rows, columns], architecture)


def matrix_box(matrix: Tensor, rows: int, columns: int, architecture: int) -> Any:
    """The same of a matrix whose boxes are [rows, columns]."""
    return _box(matrix, [rows, columns], architecture)


def _box(tensor: Tensor, sides: list[int], architecture: int) -> Any:
    if architecture < _HOPPER and not is_interpreting():
        return None
    width = tensor.element_size()
    # A dimension of size 1 may have any stride, and is never walked along.
    strides = [s if n > 1 else sides[-1] for n, s in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True)]
    if (
        width != 2
        or max(sides) > _LARGEST_SIDE
        or tensor.data_ptr() % _ALIGNMENT
        or max(tensor.shape) >= _LARGEST_SIZE
        or min(tensor.shape) == 0
        or any(s <= 0 or s * width % _ALIGNMENT or s * width >= _LARGEST_STRIDE for s in strides)
        or importlib.util.find_spec("triton.tools.tensor_descriptor") is None
    ):
        return None
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(tensor, list(tensor.shape), [*strides, 1], sides)
