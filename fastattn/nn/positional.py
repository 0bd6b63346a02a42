"""Positional encodings: sinusoidal, learned and rotary."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fastattn.nn._blocks import apply_dropout


class SinusoidalPositionalEncoding(nn.Module):
    """Add sines and cosines of geometrically spaced wavelengths to a sequence of embeddings.

    ``PE[pos, 2i] = sin(pos / base^(2i / model_dim))``, ``PE[pos, 2i + 1] = cos(pos / base^(2i / model_dim))``.

    Args:
        model_dim: features of the embeddings, even or odd.
        max_len: positions computed ahead; longer sequences extend the table.
        dropout: probability of dropping elements of the sum.
        base: the longest wavelength is 2 pi times this.

    Shape: ``[..., seq_len, model_dim]`` in and out, in the dtype of the input.

    Raises:
        ValueError: sizes that are not positive, or an input with another last dimension.

    Source: Vaswani et al. 2017, section 3.5. PyTorch has no twin. The table is computed, not learned: it stays out of
    the state_dict, and a model cast to float64 gets one that was never rounded to float32.
    """

    def __init__(self, model_dim: int, max_len: int = 512, dropout: float = 0.0, base: float = 10000.0) -> None:
        super().__init__()
        _require_positive(model_dim=model_dim, max_len=max_len)
        self.model_dim, self.base = model_dim, base
        self.dropout = nn.Dropout(dropout)
        self._table = _sinusoids(max_len, model_dim, base).float()  # [positions, model_dim]

    def forward(self, input: Tensor, offset: int = 0) -> Tensor:
        """``input`` plus the encoding of positions ``offset, offset + 1, ...``."""
        end = _checked_end(input, self.model_dim, offset)
        if input.dtype == torch.float64:
            table = _sinusoids(end, self.model_dim, self.base)
        else:
            if end > len(self._table):
                self._table = _sinusoids(max(end, 2 * len(self._table)), self.model_dim, self.base).float()
            if self._table.device != input.device:
                self._table = self._table.to(input.device)
            table = self._table
        return apply_dropout(self.dropout, input + table[offset:end].to(input))

    def extra_repr(self) -> str:
        return f"model_dim={self.model_dim}, base={self.base}"


class LearnedPositionalEncoding(nn.Module):
    """Add one learned vector a position to a sequence of embeddings.

    Args:
        model_dim: features of the embeddings.
        max_len: positions that have a vector; longer sequences are refused.
        dropout: probability of dropping elements of the sum.

    Shape: ``[..., seq_len, model_dim]`` in and out.

    Raises:
        ValueError: sizes that are not positive, a sequence past ``max_len``, or an input with another last dimension.

    Source: Gehring et al. 2017, section 3.1. PyTorch has no twin.
    """

    def __init__(self, model_dim: int, max_len: int = 512, dropout: float = 0.0) -> None:
        super().__init__()
        _require_positive(model_dim=model_dim, max_len=max_len)
        self.model_dim, self.max_len = model_dim, max_len
        self.dropout = nn.Dropout(dropout)
        self.weight = nn.Parameter(torch.empty(max_len, model_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal with standard deviation 0.02, small beside embeddings of unit scale."""
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, input: Tensor, offset: int = 0) -> Tensor:
        """``input`` plus the vectors of positions ``offset, offset + 1, ...``."""
        end = _checked_end(input, self.model_dim, offset)
        if end > self.max_len:
            raise ValueError(f"positions up to {end - 1} asked for, but max_len={self.max_len}")
        return apply_dropout(self.dropout, input + self.weight[offset:end])

    def extra_repr(self) -> str:
        return f"model_dim={self.model_dim}, max_len={self.max_len}"


class RotaryEmbedding(nn.Module):
    """Rotate pairs of features of queries and keys by an angle proportional to their position.

    ``(x1, x2) -> (x1 cos a - x2 sin a, x1 sin a + x2 cos a)`` with ``a = position * base^(-2i / head_dim)``, so that a
    dot product of a rotated query and key depends on the distance of their positions alone.

    Args:
        head_dim: features to rotate, even.
        base: the longest wavelength is 2 pi times this.
        interleaved: pairs are neighbours (2i, 2i + 1), as in the paper, instead of (i, i + head_dim / 2), as in Llama.

    Shape: ``[..., seq_len, head_dim]`` in and out, in the dtype of the input (rotated in float32 or wider).

    Raises:
        ValueError: an odd head_dim, an input with another last dimension, or positions of another length.

    Source: Su et al. 2021, equation 34. PyTorch has no twin.
    """

    def __init__(self, head_dim: int, base: float = 10000.0, interleaved: bool = False) -> None:
        super().__init__()
        _require_positive(head_dim=head_dim)
        if head_dim % 2:
            raise ValueError(f"head_dim must be even, got {head_dim}")
        self.head_dim, self.base, self.interleaved = head_dim, base, interleaved

    def forward(self, input: Tensor, offset: int = 0, positions: Tensor | None = None) -> Tensor:
        """``input`` rotated to positions ``offset, offset + 1, ...``, or to ``positions [..., seq_len]``."""
        end = _checked_end(input, self.head_dim, offset)
        if positions is None:
            positions = torch.arange(offset, end, device=input.device)
        elif positions.shape[-1] not in (1, input.shape[-2]):
            raise ValueError(f"positions must end in seq_len={input.shape[-2]}, got shape {tuple(positions.shape)}")
        compute = torch.promote_types(input.dtype, torch.float32)
        angle = _angles(positions, self.head_dim, self.base)
        cos, sin = angle.cos().to(compute), angle.sin().to(compute)  # [..., seq_len, head_dim / 2]
        x = input.to(compute)
        if self.interleaved:
            first, second = x[..., 0::2], x[..., 1::2]
            rotated = torch.stack((first * cos - second * sin, first * sin + second * cos), dim=-1).flatten(-2)
        else:
            first, second = x.chunk(2, dim=-1)
            rotated = torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)
        return rotated.to(input.dtype)

    def extra_repr(self) -> str:
        return f"head_dim={self.head_dim}, base={self.base}, interleaved={self.interleaved}"


def _angles(positions: Tensor, features: int, base: float) -> Tensor:
    """``positions * base^(-2i / features)`` as float64 ``[..., ceil(features / 2)]``."""
    # float64: a float32 angle at position 10^5 is already off by 4e-3 radians.
    even = torch.arange(0, features, 2, dtype=torch.float64, device=positions.device)
    return positions[..., None].to(torch.float64) * torch.exp(even * (-math.log(base) / features))


def _sinusoids(length: int, features: int, base: float) -> Tensor:
    """Sine and cosine of every angle, interleaved: float64 ``[length, features]``."""
    angle = _angles(torch.arange(length), features, base)
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(-2)[:, :features]


def _require_positive(**sizes: int) -> None:
    for name, size in sizes.items():
        if size <= 0:
            raise ValueError(f"{name} must be positive, got {size}")


def _checked_end(input: Tensor, features: int, offset: int) -> int:
    """One past the last position of an input that starts at ``offset``."""
    if input.dim() < 2 or input.shape[-1] != features:
        raise ValueError(f"input must be [..., seq_len, {features}], got shape {tuple(input.shape)}")
    if offset < 0:
        raise ValueError(f"offset must be non-negative, got {offset}")
    return offset + input.shape[-2]
