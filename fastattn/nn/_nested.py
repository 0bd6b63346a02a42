"""Nested tensors, which ``torch.nn.TransformerEncoder`` hands its layers in evaluation, as padded ones with lengths."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.masks import KeyLengths


def pad(nested: Tensor) -> tuple[Tensor, list[int]]:
    """Returns the sequences of ``nested`` [batch, seq_len, features], padded with zeros, and their lengths."""
    lengths = [len(sequence) for sequence in nested.unbind()]
    return torch.nested.to_padded_tensor(nested, 0.0), lengths


def nest(padded: Tensor, lengths: list[int], like: Tensor) -> Tensor:
    """Returns the sequences of ``padded`` as a nested tensor of the layout of ``like``."""
    rows = [row[:length] for row, length in zip(padded, lengths, strict=True)]
    return torch.nested.as_nested_tensor(rows, layout=like.layout)


def key_lengths(lengths: list[int], device: torch.device) -> KeyLengths:
    """Returns the mask that hides what :func:`pad` added."""
    return KeyLengths(torch.tensor(lengths, device=device))


def require_no_masks(**masks: object) -> None:
    """Raises ValueError if a mask is given: the sequences of a nested tensor have no common shape to lay one over."""
    given = [name for name, mask in masks.items() if mask is not None]
    if given:
        raise ValueError(f"nested tensors carry their own padding: expected no {' and no '.join(given)}")
