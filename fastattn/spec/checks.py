"""Checks that several ops share.  Messages say what was got and what was expected."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# 2^63 - 1 is the largest int64, so that a seed is never negative.
_SEED_BOUND = (1 << 63) - 1


def check_tensor(name: str, value: object) -> None:
    """Raises TypeError unless ``value`` is a dense tensor of a supported floating dtype."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.dtype not in FLOATS:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {value.dtype}")
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense (strided) tensor, got layout {value.layout}")


def check_like(name: str, value: object, reference_name: str, reference: Tensor) -> None:
    """Raises TypeError unless ``value`` is a tensor with the dtype and device of ``reference``."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.dtype != reference.dtype and computed_dtype(value) != computed_dtype(reference):
        raise TypeError(f"{name} must have {reference_name}'s dtype {reference.dtype}, got {value.dtype}")
    if value.device != reference.device:
        raise TypeError(f"{name} must be on {reference_name}'s device {reference.device}, got {value.device}")


def computed_dtype(tensor: Tensor) -> torch.dtype:
    """Returns the dtype in which an op sees ``tensor``: where autocast is on, the one it casts to."""
    device_type = tensor.device.type
    if device_type not in ("cpu", "cuda") or tensor.dtype == torch.float64:
        return tensor.dtype
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else tensor.dtype


def check_shape(name: str, value: Tensor, shape: Sequence[int]) -> None:
    """Raises ValueError unless ``value`` has exactly ``shape``."""
    if tuple(value.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(value.shape)}")


def check_last_dim_contiguous(name: str, value: Tensor) -> None:
    """Raises ValueError if the elements of a row are not adjacent in memory."""
    if value.shape[-1] > 1 and value.stride(-1) != 1:
        raise ValueError(
            f"{name} must be contiguous in its last dimension (stride 1), got strides {value.stride()}; "
            "call .contiguous()"
        )


def check_finite(name: str, value: float) -> float:
    """Returns ``value`` as a float; raises TypeError if it is no number and ValueError if it is NaN or infinite."""
    if not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if isinstance(value, (int, float)) and not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    return float(value)


def check_dropout(dropout_p: float, name: str = "dropout_p") -> float:
    """Returns ``dropout_p`` as a float; raises ValueError outside [0, 1)."""
    p = check_finite(name, dropout_p)
    if not 0.0 <= p < 1.0:
        raise ValueError(f"{name} must be in [0, 1), got {dropout_p}")
    return p


def empty_contiguous(like: Tensor) -> Tensor:
    """Returns uninitialised contiguous memory of the shape and dtype of ``like``, in half the time of ``new_empty``."""
    return torch.empty_like(like, memory_format=torch.contiguous_format)


def draw_dropout_state(dropout_p: float, generator: torch.Generator | None, device: torch.device) -> Tensor | None:
    """Returns int64 [2], the Philox (seed, offset) of one call, drawn from ``generator``; None without dropout."""
    if dropout_p == 0.0:
        return None
    where = device if generator is None else generator.device
    state = torch.randint(_SEED_BOUND, (2,), generator=generator, device=where)
    return state.to(device)
