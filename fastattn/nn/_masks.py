"""PyTorch's mask arguments as ``fastattn.masks`` and biases, without writing out a [seq_len_q, seq_len_k] mask that
nobody gave.

In ``torch.nn`` a True in a mask means *ignore* and a float is *added*; in ``fastattn.masks`` True means *may attend*.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn import masks
from fastattn.masks import CanonicalMask, Mask, Shape


class Padding(Mask):
    """Keys to ignore, from a bool ``key_padding_mask`` [batch, seq_len_k] where True means ignore.

    Its primitive forms are the end of the last real key, so that kernels skip the padding behind it, and a segment id a
    key, so that holes and padding in front are hidden too.  Both are O(seq_len), and no value is read, so that it
    compiles and exports.
    """

    def __init__(self, ignored: Tensor) -> None:
        self.ignored = ignored
        position = torch.arange(1, ignored.shape[1] + 1, dtype=torch.int32, device=ignored.device)
        end = torch.where(ignored, 0, position)
        self._key_lengths = end.amax(dim=1) if ignored.shape[1] else end.new_zeros(ignored.shape[0])
        self._segments_k = ignored.to(torch.int32)

    def canonical(self, shape: Shape, device: torch.device) -> CanonicalMask:
        segments_q = torch.zeros(shape.batch, shape.seq_len_q, dtype=torch.int32, device=device)
        return CanonicalMask(key_lengths=self._key_lengths, segments_q=segments_q, segments_k=self._segments_k)

    def __repr__(self) -> str:
        return f"Padding({tuple(self.ignored.shape)})"


class Restriction(NamedTuple):
    """Who may attend to whom, and what is added to the scores: the arguments of ``fastattn.attention``."""

    mask: Mask | None
    bias: Tensor | None


def restriction(
    attn_mask: Tensor | Mask | None,
    key_padding_mask: Tensor | Mask | None,
    is_causal: bool,
    shape: Shape,
    seq_len_new: int,
    num_appended: int,
    device: torch.device,
) -> Restriction:
    """Returns the meaning of both masks together over all keys: ``[cached, new, appended]``.

    A mask of ``shape.seq_len_k`` columns covers the cached and the new keys, one of ``seq_len_new`` columns the new
    ones alone; keys that a mask does not cover are visible.

    Args:
        attn_mask: as in :func:`attn_restriction`.
        key_padding_mask: as in :func:`padding_restriction`.
        is_causal: as in :func:`attn_restriction`.
        shape: of the scores; ``seq_len_k`` counts cached and new keys.
        seq_len_new: new keys.
        num_appended: keys of ``add_bias_kv`` and ``add_zero_attn``.
        device: of the scores.

    Raises:
        ValueError: a shape does not fit.
        TypeError: neither bool nor float.
    """
    if attn_mask is None and key_padding_mask is None:
        return Restriction(None, None)
    covered = _covered(attn_mask, shape, seq_len_new)
    attn = attn_restriction(attn_mask, is_causal, covered)
    attn = _widen(attn, covered, shape.seq_len_k - covered.seq_len_k, num_appended, device)
    covered = _covered(key_padding_mask, shape, seq_len_new)
    padding = padding_restriction(key_padding_mask, covered.batch, covered.seq_len_k)
    padding = _widen(padding, covered, shape.seq_len_k - covered.seq_len_k, num_appended, device)
    return Restriction(_both(operator.and_, attn.mask, padding.mask), _both(operator.add, attn.bias, padding.bias))


def attn_restriction(attn_mask: Tensor | Mask | None, is_causal: bool | None, shape: Shape) -> Restriction:
    """Returns the meaning of ``attn_mask``.

    ``is_causal`` only says whether it is worth looking whether the mask *is* causal: True and None look, False does
    not.

    Args:
        attn_mask: bool (True ignores) or float (added) of shape [seq_len_q, seq_len_k] or [batch * num_heads,
            seq_len_q, seq_len_k], or a ``fastattn.masks`` mask.
        is_causal: the hint of ``torch.nn``.
        shape: of the scores; ``seq_len_k`` counts the keys that ``attn_mask`` covers.

    Raises:
        ValueError: the shape does not fit.
        TypeError: neither bool nor float.
    """
    if attn_mask is None or isinstance(attn_mask, Mask):
        return Restriction(attn_mask, None)
    _check_type("attn_mask", attn_mask)
    full = (shape.batch * shape.num_heads_q, shape.seq_len_q, shape.seq_len_k)
    if tuple(attn_mask.shape) not in (full, full[1:]):
        raise ValueError(
            f"attn_mask must have shape [seq_len_q, seq_len_k] = {list(full[1:])} or "
            f"[batch * num_heads, seq_len_q, seq_len_k] = {list(full)}, got {list(attn_mask.shape)}"
        )
    if is_causal is not False and is_square_causal(attn_mask):
        return Restriction(masks.Causal(), None)
    if attn_mask.dim() == 3:
        attn_mask = attn_mask.view(shape)
    if attn_mask.dtype == torch.bool:
        return Restriction(masks.Dense(~attn_mask), None)
    return Restriction(None, attn_mask)


def padding_restriction(key_padding_mask: Tensor | Mask | None, batch: int, seq_len_k: int) -> Restriction:
    """Returns the meaning of ``key_padding_mask``: bool (True ignores) or float (added) [batch, seq_len_k], or a mask.

    Raises:
        ValueError: the shape does not fit.
        TypeError: neither bool nor float.
    """
    if key_padding_mask is None or isinstance(key_padding_mask, Mask):
        return Restriction(key_padding_mask, None)
    _check_type("key_padding_mask", key_padding_mask)
    if tuple(key_padding_mask.shape) != (batch, seq_len_k):
        raise ValueError(
            f"key_padding_mask must have shape [batch, seq_len_k] = {[batch, seq_len_k]}, "
            f"got {list(key_padding_mask.shape)}"
        )
    if key_padding_mask.dtype == torch.bool:
        return Restriction(Padding(key_padding_mask), None)
    return Restriction(None, key_padding_mask[:, None, None, :])


def is_square_causal(mask: Tensor) -> bool:
    """Whether ``mask`` is what ``generate_square_subsequent_mask`` makes; False where looking is impossible or would
    cost a stall.

    Reads the mask only in eager mode and on the CPU: a compiled or exported program must not branch on data, and an
    accelerator would make the host wait.  A mask that is not recognised is used as it stands, which is as right and
    only slower.
    """
    if mask.dim() != 2 or mask.shape[0] != mask.shape[1] or mask.shape[0] < 2:
        return False
    if torch.compiler.is_compiling() or mask.requires_grad or mask.device.type != "cpu":
        return False
    if torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack() > 0:
        return False
    hidden = True if mask.dtype == torch.bool else float("-inf")
    return torch.equal(mask, torch.full_like(mask, hidden).triu_(1))


def _covered(mask: Tensor | Mask | None, shape: Shape, seq_len_new: int) -> Shape:
    """Returns the part of the scores that ``mask`` covers: all keys, or only the new ones."""
    if not isinstance(mask, Tensor) or mask.shape[-1] != seq_len_new:
        return shape
    return shape._replace(seq_len_k=seq_len_new)


def _widen(part: Restriction, shape: Shape, before: int, after: int, device: torch.device) -> Restriction:
    """Returns ``part``, made for ``shape``, with ``before`` and ``after`` more keys that every query may see."""
    mask, bias = part
    # A causal band aligned at the bottom right shows what is before it as it stands.
    if mask is not None and (after or (before and not _is_bottom_right(mask))):
        allowed = masks.visible(mask.canonical(shape, device), shape, device)
        allowed = allowed.expand(*allowed.shape[:3], shape.seq_len_k)
        mask = masks.Dense(F.pad(allowed, (before, after), value=True))
    if bias is not None and (before or after):
        bias = F.pad(bias, (before, after))
    return Restriction(mask, bias)


def _is_bottom_right(mask: Mask) -> bool:
    return isinstance(mask, masks.Causal) and mask.align == "bottom_right"


def _both(op: Callable[[Any, Any], Any], a: Any | None, b: Any | None) -> Any | None:
    return b if a is None else a if b is None else op(a, b)


def _check_type(name: str, mask: object) -> None:
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name} must be a tensor or a fastattn.masks.Mask, got {type(mask).__name__}")
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"{name} must be bool (True is ignored) or float (added to the scores), got {mask.dtype}")
