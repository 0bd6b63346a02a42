"""Masks: who may attend to whom.  True always means "may attend".

Masks are values that compose with ``&``.  :meth:`Mask.canonical` reduces any of them to the few primitive forms that
kernels know (:class:`CanonicalMask`), and :func:`visible` is the one definition, in Python, of what those forms mean.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Align = Literal["bottom_right", "top_left"]

# Bounds of an open diagonal band.  Far outside every j - i, and sums of two of them still fit in int64.
OPEN_LO = -(1 << 61)
OPEN_HI = 1 << 61


class CanonicalMask(NamedTuple):
    """The primitive forms; the visible set is the intersection of all that are present.

    Key ``j`` is visible to query ``i`` of batch entry ``b`` and head ``h`` iff ``diag_lo <= j - i <= diag_hi``,
    ``j < key_lengths[b]``, ``segments_q[b, i] == segments_k[b, j]`` and ``dense[b, h, i, j]``.

    Shapes: ``key_lengths`` int32 [batch]; ``segments_q`` / ``segments_k`` int32 [batch, seq_len]; ``dense`` bool,
        4-D, each dimension full or 1.
    """

    diag_lo: int = OPEN_LO
    diag_hi: int = OPEN_HI
    key_lengths: Tensor | None = None
    segments_q: Tensor | None = None
    segments_k: Tensor | None = None
    dense: Tensor | None = None


class Shape(NamedTuple):
    """The sizes that a mask or a bias is laid over."""

    batch: int
    num_heads_q: int
    seq_len_q: int
    seq_len_k: int


class Mask:
    """Base of all masks; compose with ``&``."""

    def canonical(self, shape: Shape, device: torch.device) -> CanonicalMask:
        """Returns the primitive form over ``shape``.

        Raises:
            ValueError: a shape does not fit.
            TypeError: a dtype or a device does not fit.
        """
        raise TypeError(
            f"{type(self).__name__} is not a concrete mask: use Causal, Window, KeyLengths, Segments or Dense"
        )

    def to_dense(
        self, batch: int, num_heads_q: int, seq_len_q: int, seq_len_k: int, device: torch.device | str = "cpu"
    ) -> Tensor:
        """Returns the mask written out: bool [batch, num_heads_q, seq_len_q, seq_len_k], True may attend."""
        shape = Shape(batch, num_heads_q, seq_len_q, seq_len_k)
        return visible(self.canonical(shape, torch.device(device)), shape, torch.device(device)).expand(shape)

    def __and__(self, other: Mask) -> Mask:
        if not isinstance(other, Mask):
            return NotImplemented
        return And(self, other)


class And(Mask):
    """The intersection of two masks, written ``a & b``."""

    def __init__(self, first: Mask, second: Mask) -> None:
        self.first = first
        self.second = second

    def canonical(self, shape: Shape, device: torch.device) -> CanonicalMask:
        return intersect(self.first.canonical(shape, device), self.second.canonical(shape, device))

    def __repr__(self) -> str:
        return f"{self.first!r} & {self.second!r}"


class Window(Mask):
    """A sliding window along the diagonal: ``i + offset - left <= j <= i + offset + right``.

    Args:
        left: keys before the diagonal that may be seen; None for all.
        right: keys after the diagonal that may be seen; None for all.
        align: "bottom_right" puts the diagonal through the last query and the last key
            (``offset = seq_len_k - seq_len_q``); "top_left" puts it through the first of each (``offset = 0``).

    Raises:
        ValueError: ``left`` or ``right`` is negative, or ``align`` is neither of the two.
    """

    def __init__(self, left: int | None, right: int | None, align: Align = "bottom_right") -> None:
        for name, value in (("left", left), ("right", right)):
            if value is not None and value < 0:
                raise ValueError(f"{name} must be >= 0 or None, got {value}")
        if align not in ("bottom_right", "top_left"):
            raise ValueError(f"align must be 'bottom_right' or 'top_left', got {align!r}")
        self.left = left
        self.right = right
        self.align = align

    def canonical(self, shape: Shape, device: torch.device) -> CanonicalMask:
        offset = shape.seq_len_k - shape.seq_len_q if self.align == "bottom_right" else 0
        lo = OPEN_LO if self.left is None else offset - self.left
        hi = OPEN_HI if self.right is None else offset + self.right
        return CanonicalMask(diag_lo=lo, diag_hi=hi)

    def __repr__(self) -> str:
        return f"Window(left={self.left}, right={self.right}, align={self.align!r})"


class Causal(Window):
    """A query sees no key after its own position.

    Args:
        align: see :class:`Window`.  "bottom_right" suits queries that continue a cache; "top_left" is PyTorch's
            ``is_causal=True``.  They agree when the two lengths do.
    """

    def __init__(self, align: Align = "bottom_right") -> None:
        super().__init__(None, 0, align)

    def __repr__(self) -> str:
        return f"Causal(align={self.align!r})"


class KeyLengths(Mask):
    """Keys from ``lengths[b]`` on are padding.

    Args:
        lengths: int32 or int64 [batch]; values are clamped to ``[0, seq_len_k]``.
    """

    def __init__(self, lengths: Tensor) -> None:
        self.lengths = lengths

    def canonical(self, shape: Shape, device: torch.device) -> CanonicalMask:
        _check_tensor("KeyLengths.lengths", self.lengths, (shape.batch,), device)
        return CanonicalMask(key_lengths=_as_int32(self.lengths, shape.seq_len_k))

    def __repr__(self) -> str:
        return f"KeyLengths({tuple(self.lengths.shape)})"


class Segments(Mask):
    """A query sees only the keys of its own segment (packed sequences, documents).

    Args:
        ids_q: int32 or int64 [batch, seq_len_q].
        ids_k: int32 or int64 [batch, seq_len_k]; by default ``ids_q``.
    """

    def __init__(self, ids_q: Tensor, ids_k: Tensor | None = None) -> None:
        self.ids_q = ids_q
        self.ids_k = ids_q if ids_k is None else ids_k

    def canonical(self, shape: Shape, device: torch.device) -> CanonicalMask:
        _check_tensor("Segments.ids_q", self.ids_q, (shape.batch, shape.seq_len_q), device)
        _check_tensor("Segments.ids_k", self.ids_k, (shape.batch, shape.seq_len_k), device)
        if self.ids_q.dtype == torch.int32 and self.ids_k.dtype == torch.int32:
            return CanonicalMask(segments_q=self.ids_q.contiguous(), segments_k=self.ids_k.contiguous())
        ranked_q, ranked_k = _rank(self.ids_q.long(), self.ids_k.long())
        return CanonicalMask(segments_q=ranked_q, segments_k=ranked_k)

    def __repr__(self) -> str:
        return f"Segments({tuple(self.ids_q.shape)}, {tuple(self.ids_k.shape)})"


class Dense(Mask):
    """A mask written out.

    Args:
        allowed: bool, broadcastable to [batch, num_heads_q, seq_len_q, seq_len_k]; True may attend.
    """

    def __init__(self, allowed: Tensor) -> None:
        if allowed.dtype != torch.bool:
            raise TypeError(
                f"Dense mask must be bool (True may attend), got {allowed.dtype}; add a float mask as bias="
            )
        self.allowed = allowed

    def canonical(self, shape: Shape, device: torch.device) -> CanonicalMask:
        return CanonicalMask(dense=broadcastable_4d("Dense mask", self.allowed, shape, device))

    def __repr__(self) -> str:
        return f"Dense({tuple(self.allowed.shape)})"


def intersect(a: CanonicalMask, b: CanonicalMask) -> CanonicalMask:
    """Returns the canonical form of ``a & b``."""
    segments_q, segments_k = a.segments_q, a.segments_k
    if segments_q is None:
        segments_q, segments_k = b.segments_q, b.segments_k
    elif b.segments_q is not None and b.segments_k is not None and segments_k is not None:
        # Two pairs of ids become one: equal exactly where both are.  Ranks are below 2^31, so a pair fits in int64.
        first_q, first_k = _rank(segments_q.long(), segments_k.long())
        second_q, second_k = _rank(b.segments_q.long(), b.segments_k.long())
        base = first_q.shape[1] + first_k.shape[1]
        segments_q, segments_k = _rank(first_q.long() * base + second_q, first_k.long() * base + second_k)
    return CanonicalMask(
        diag_lo=max(a.diag_lo, b.diag_lo),
        diag_hi=min(a.diag_hi, b.diag_hi),
        key_lengths=_combine(torch.minimum, a.key_lengths, b.key_lengths),
        segments_q=segments_q,
        segments_k=segments_k,
        dense=_combine(torch.logical_and, a.dense, b.dense),
    )


def visible(mask: CanonicalMask, shape: Shape, device: torch.device) -> Tensor:
    """Returns who may attend to whom: bool, broadcastable to [batch, num_heads_q, seq_len_q, seq_len_k].

    This is the definition; the kernels have one twin of it a language.
    """
    i = torch.arange(shape.seq_len_q, device=device)[:, None]
    j = torch.arange(shape.seq_len_k, device=device)[None, :]
    allowed = ((j - i >= mask.diag_lo) & (j - i <= mask.diag_hi))[None, None]
    if mask.key_lengths is not None:
        allowed = allowed & (j < mask.key_lengths[:, None, None])[:, None]
    if mask.segments_q is not None and mask.segments_k is not None:
        allowed = allowed & (mask.segments_q[:, None, :, None] == mask.segments_k[:, None, None, :])
    if mask.dense is not None:
        allowed = allowed & mask.dense
    return allowed


def broadcastable_4d(name: str, tensor: Tensor, shape: Shape, device: torch.device) -> Tensor:
    """Returns ``tensor`` with leading dimensions of size 1 added up to 4-D.

    Raises:
        ValueError: it does not broadcast to ``shape``.
        TypeError: it is on another device.
    """
    _check_device(name, tensor, device)
    # Not `have not in (1, want)`: where sizes are symbolic, torch.compile takes that for true.
    if tensor.dim() > 4 or any(
        have != 1 and have != want for have, want in zip(reversed(tensor.shape), reversed(shape), strict=False)
    ):
        raise ValueError(
            f"{name} must broadcast to [batch, num_heads_q, seq_len_q, seq_len_k] = {list(shape)}, "
            f"got {list(tensor.shape)}"
        )
    return tensor.reshape((1,) * (4 - tensor.dim()) + tuple(tensor.shape))


def _combine(op, a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return op(a, b)


def _as_int32(lengths: Tensor, limit: int) -> Tensor:
    # Clamp before narrowing: a length of 2^32 must stay "all keys", not wrap to 0.
    return lengths.clamp(0, limit).to(torch.int32)


def _rank(ids_q: Tensor, ids_k: Tensor) -> tuple[Tensor, Tensor]:
    """Renames int64 ids [batch, n] to int32 ranks that are equal exactly where the ids are; every shape is static."""
    ids = torch.cat((ids_q, ids_k), dim=1)
    ordered, order = ids.sort(dim=1)
    step = torch.ones_like(ordered, dtype=torch.int32)
    step[:, 1:] = (ordered[:, 1:] != ordered[:, :-1]).to(torch.int32)
    ranks = torch.zeros_like(step).scatter(1, order, step.cumsum(1, dtype=torch.int32))
    return ranks[:, : ids_q.shape[1]].contiguous(), ranks[:, ids_q.shape[1] :].contiguous()


def _check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise TypeError(f"{name} must be on {device} like query, got {tensor.device}")


def _check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    _check_device(name, tensor, device)
    if tensor.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, got {tensor.dtype}")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(tensor.shape)}")
