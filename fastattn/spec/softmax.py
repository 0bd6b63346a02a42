"""The canonical softmax call; log-softmax is the same call with ``log`` set."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastattn.spec.checks import FLOATS, check_finite

_HALVES = (torch.bfloat16, torch.float16)


class SoftmaxCall(NamedTuple):
    """The arguments of ``fastattn::softmax``, in order.

    ``input`` has at least one dimension; ``mask`` is bool of ``input``'s shape (a view where the user's broadcasts),
    True is visible; ``dim`` is not negative; ``dtype`` is the result's, None for ``input``'s own: float32 for a half.
    """

    input: Tensor
    mask: Tensor | None
    dim: int
    scale: float
    dtype: torch.dtype | None
    log: bool
    backend: str

    @property
    def out_dtype(self) -> torch.dtype:
        return self.input.dtype if self.dtype is None else self.dtype


class SoftmaxBackwardCall(NamedTuple):
    """The arguments of ``fastattn::softmax_backward``, in order: ``out`` and the rest as in :class:`SoftmaxCall`.

    ``dout`` [like ``out``] is the gradient of ``out``; ``dtype`` is that of the gradient to return.
    """

    out: Tensor
    dout: Tensor
    mask: Tensor | None
    dim: int
    scale: float
    dtype: torch.dtype
    log: bool
    backend: str


def softmax_call(
    input: Tensor,
    dim: int,
    *,
    mask: Tensor | None,
    scale: float,
    dtype: torch.dtype | None,
    log: bool,
    backend: str,
) -> SoftmaxCall:
    """Validates what the user passed to ``softmax`` or ``log_softmax`` and returns its canonical form.

    Raises:
        ValueError: ``dim`` is out of range, ``mask`` does not broadcast, or ``scale`` is not finite.
        TypeError: dtypes or devices do not fit.
    """
    if not isinstance(input, Tensor):
        raise TypeError(f"input must be a tensor, got {type(input).__name__}")
    if input.layout != torch.strided:
        raise TypeError(f"input must be a dense (strided) tensor, got layout {input.layout}")
    if dtype is not None and dtype not in FLOATS:
        raise TypeError(f"dtype must be float32, bfloat16, float16 or float64, got {dtype}")
    if input.dtype not in FLOATS and (dtype is None or input.dtype.is_complex):
        raise TypeError(
            f"input must be float32, bfloat16, float16 or float64 unless dtype= is given, got {input.dtype}"
        )
    if dtype == input.dtype:
        dtype = None
    elif dtype is not None and not (input.dtype in _HALVES and dtype == torch.float32):
        # Only half to float32 loses nothing by being cast inside.
        input, dtype = input.to(dtype), None
    if not isinstance(dim, int) or isinstance(dim, bool):
        raise TypeError(f"dim must be an integer, got {type(dim).__name__}")
    if not -input.dim() <= dim < input.dim():
        raise ValueError(f"dim must be in [{-input.dim()}, {input.dim() - 1}] for input {list(input.shape)}, got {dim}")
    if mask is not None:
        mask = _canonical_mask(mask, input)
    return SoftmaxCall(input, mask, dim % input.dim(), check_finite("scale", scale), dtype, log, backend)


def _canonical_mask(mask: Tensor, input: Tensor) -> Tensor:
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a bool tensor, got {type(mask).__name__}")
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool (True may attend), got {mask.dtype}")
    if mask.device != input.device:
        raise TypeError(f"mask must be on input's device {input.device}, got {mask.device}")
    lead = input.dim() - mask.dim()
    if lead < 0 or any(m not in (1, n) for m, n in zip(mask.shape, input.shape[lead:], strict=True)):
        raise ValueError(f"mask must broadcast to input's shape {list(input.shape)}, got {list(mask.shape)}")
    return mask.expand(input.shape)
