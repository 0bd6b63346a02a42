"""KVCache: the keys and values that a decoder has already computed, so that each new token costs one row."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

_FIRST_CAPACITY = 16  # positions; doubling from here copies each position less than twice on average


class KVCache:
    """Keys and values of every attention module of a decoder, for generation step by step.

    One cache serves one decoder and one batch. Each attention module finds its own entry by its identity:

    * self-attention calls ``append`` with the keys and values of the new positions and attends to all that it returns;
    * cross-attention calls ``fixed``, which projects the encoder's output on the first step and never again.

    A query block that follows cached keys sees the earlier ones under the bottom-right alignment of
    ``fastattn.masks.Causal``; a single new position needs no mask at all.

    Args:
        max_len: positions to allocate for at once: nothing is ever copied, and going past it is an error. None starts
            small and doubles when full, so that a position is copied a constant number of times on average.

    Raises:
        ValueError: ``max_len`` is not positive, tensors do not fit the entry, or ``max_len`` positions are exceeded.
        RuntimeError: gradients are being recorded; writing in place would make them wrong.

    Source: Shazeer 2019, section 2.4 (incremental decoding). PyTorch has no twin.
    """

    def __init__(self, max_len: int | None = None) -> None:
        if max_len is not None and max_len <= 0:
            raise ValueError(f"max_len must be positive or None, got {max_len}")
        self.max_len = max_len
        self._grown: dict[nn.Module, _Growing] = {}
        self._fixed: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    @property
    def length(self) -> int:
        """Positions held for self-attention: the position of the next token."""
        return max((entry.length for entry in self._grown.values()), default=0)

    def append(self, module: nn.Module, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add new positions of one module's self-attention.

        Args:
            module: the attention module that asks; its entry is its own.
            key: ``[batch, num_heads, new_len, head_dim]``.
            value: ``[batch, num_heads, new_len, head_dim_v]``.

        Returns:
            Keys and values of all positions so far, views of the cache: valid until the next call for this module.
        """
        _refuse_gradients(key, value)
        entry = self._grown.get(module)
        if entry is None:
            entry = self._grown[module] = _Growing(self.max_len)
        return entry.append(key, value)

    def fixed(self, module: nn.Module, project: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Keys and values of one module's cross-attention: those of the first call, ever after.

        Args:
            module: the attention module that asks.
            project: computes keys and values ``[batch, num_heads, source_len, head_dim]``; called once.
        """
        entry = self._fixed.get(module)
        if entry is None:
            key, value = project()
            _refuse_gradients(key, value)
            entry = self._fixed[module] = (key, value)
        return entry

    def reorder(self, rows: Tensor, *, fixed: bool = True) -> None:
        """Let row ``i`` of the batch continue what row ``rows[i]`` was; rows may repeat, vanish or grow in number.

        Args:
            rows: int64 ``[new_batch]``.
            fixed: also reorder cross-attention. False is right, and cheaper, when every row keeps its source, as the
                beams of one sentence do.

        Raises:
            ValueError: not one-dimensional, or ``fixed=False`` with another number of rows.
        """
        if rows.dim() != 1:
            raise ValueError(f"rows must be one-dimensional, got shape {tuple(rows.shape)}")
        if not fixed and any(len(key) != len(rows) for key, _ in self._fixed.values()):
            raise ValueError(f"fixed=False keeps the batch, got {len(rows)} rows for another number of sources")
        for entry in self._grown.values():
            entry.reorder(rows)
        if fixed:
            for module, (key, value) in self._fixed.items():
                self._fixed[module] = (key.index_select(0, rows), value.index_select(0, rows))

    def memory(self) -> int:
        """Bytes held, room not yet used included."""
        tensors = [t for entry in self._grown.values() for t in entry.buffers()]
        tensors += [t for pair in self._fixed.values() for t in pair]
        return sum(t.numel() * t.element_size() for t in tensors)

    def __repr__(self) -> str:
        return f"KVCache(length={self.length}, max_len={self.max_len}, modules={len(self._grown) + len(self._fixed)})"


class _Growing:
    """Keys and values of one module, in buffers with room for more."""

    def __init__(self, max_len: int | None) -> None:
        self.max_len = max_len
        self.length = 0
        self._key: Tensor | None = None  # [batch, num_heads, capacity, head_dim]
        self._value: Tensor | None = None

    def buffers(self) -> list[Tensor]:
        return [t for t in (self._key, self._value) if t is not None]

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if key.dim() != 4 or value.dim() != 4 or key.shape[:3] != value.shape[:3]:
            raise ValueError(
                "key and value must be [batch, num_heads, new_len, head_dim] and agree in all but head_dim, "
                f"got {tuple(key.shape)} and {tuple(value.shape)}"
            )
        end = self.length + key.shape[2]
        if self.max_len is not None and end > self.max_len:
            raise ValueError(f"{end} positions asked of a KVCache with max_len={self.max_len}")
        self._key = self._stored(self._key, "key", key, end)
        self._value = self._stored(self._value, "value", value, end)
        self.length = end
        return self._key[:, :, :end], self._value[:, :, :end]

    def _stored(self, buffer: Tensor | None, name: str, new: Tensor, end: int) -> Tensor:
        """The buffer with ``new`` written up to position ``end``, replaced by one twice as long where it is full."""
        batch, heads, _, features = new.shape
        if buffer is not None and (
            buffer.shape[:2] != (batch, heads) or buffer.shape[3] != features or buffer.dtype != new.dtype
        ):
            raise ValueError(
                f"this cache holds {name}s of batch {buffer.shape[0]}, {buffer.shape[1]} heads, {buffer.shape[3]} "
                f"features, {buffer.dtype}; got {tuple(new.shape)}, {new.dtype}"
            )
        if buffer is None or end > buffer.shape[2]:
            capacity = self.max_len or max(_FIRST_CAPACITY, end, 0 if buffer is None else 2 * buffer.shape[2])
            larger = new.new_empty(batch, heads, capacity, features)
            if buffer is not None:
                larger[:, :, : self.length] = buffer[:, :, : self.length]
            buffer = larger
        buffer[:, :, self.length : end] = new
        return buffer

    def reorder(self, rows: Tensor) -> None:
        for name in ("_key", "_value"):
            buffer = getattr(self, name)
            if buffer is None:
                continue
            moved = buffer.new_empty(len(rows), *buffer.shape[1:])
            # Only what is filled moves: the room behind it is uninitialised.
            moved[:, :, : self.length] = buffer[:, :, : self.length].index_select(0, rows)
            setattr(self, name, moved)


def _refuse_gradients(key: Tensor, value: Tensor) -> None:
    if torch.is_grad_enabled() and (key.requires_grad or value.requires_grad):
        raise RuntimeError("KVCache is for generation: call the model under torch.no_grad()")
