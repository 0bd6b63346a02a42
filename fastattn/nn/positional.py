"""Positional encodings: sinusoidal, learned and rotary."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastattn.nn._blocks import apply_dropout, is_plain
from fastattn.ops.embedding import embedding as fused_embedding
from fastattn.ops.rotary_embedding import rotary_embedding
from fastattn.reference.embedding import sinusoids


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
        self._table = sinusoids(torch.arange(max_len), model_dim, base).float()  # [positions, model_dim]

    def forward(self, input: Tensor, offset: int = 0) -> Tensor:
        """``input`` plus the encoding of positions ``offset, offset + 1, ...``."""
        end = _checked_end(input, self.model_dim, offset)
        table = self._rows(end, input)
        return apply_dropout(self.dropout, input + table[offset:end].to(input))

    def _rows(self, end: int, like: Tensor) -> Tensor:
        """At least ``end`` rows of the table, on the device of ``like``: float32, or float64 for float64."""
        if like.dtype == torch.float64:
            return sinusoids(torch.arange(end), self.model_dim, self.base).to(like.device)
        if end > len(self._table):
            positions = torch.arange(max(end, 2 * len(self._table)))
            self._table = sinusoids(positions, self.model_dim, self.base).float()
        if self._table.device != like.device:
            self._table = self._table.to(like.device)
        return self._table

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
        self.check_positions(end)
        return apply_dropout(self.dropout, input + self.weight[offset:end])

    def check_positions(self, end: int) -> None:
        """Raises ValueError where there are fewer than ``end`` positions."""
        if end > self.max_len:
            raise ValueError(f"positions up to {end - 1} asked for, but max_len={self.max_len}")

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
        _checked_end(input, self.head_dim, offset)
        if positions is None:
            x = input[(None,) * (4 - input.dim())] if input.dim() < 4 else input.flatten(0, -4)
            return self._rotated(x, None, offset).reshape(input.shape)
        if positions.shape[-1] not in (1, input.shape[-2]):
            raise ValueError(f"positions must end in seq_len={input.shape[-2]}, got shape {tuple(positions.shape)}")
        if input.dim() == 4 and positions.dim() == 3 and positions.shape[1] == 1:
            # [batch, 1, seq_len]: one for all heads.
            return self._rotated(input, positions[:, 0].expand(-1, input.shape[2]), 0)
        lead = torch.broadcast_shapes(input.shape[:-1], positions.shape)
        x = input.expand(*lead, self.head_dim).reshape(-1, 1, *input.shape[-2:])
        positions = positions.expand(lead if positions.dim() > 1 else lead[-1:]).reshape(-1, lead[-1])
        return self._rotated(x, positions, 0).reshape(*lead, self.head_dim)

    def _rotated(self, x: Tensor, positions: Tensor | None, offset: int) -> Tensor:
        x = x if x.stride(-1) == 1 else x.contiguous()
        out = rotary_embedding(x, None, positions, base=self.base, interleaved=self.interleaved, offset=offset)
        assert isinstance(out, Tensor)
        return out

    def extra_repr(self) -> str:
        return f"head_dim={self.head_dim}, base={self.base}, interleaved={self.interleaved}"


class NoPositions(nn.Dropout):
    """Only the dropout of a positional encoding, under its signature."""

    def forward(self, input: Tensor, offset: int = 0) -> Tensor:
        return super().forward(input)


def embed(embedding: Any, encoding: Any, ids: Tensor, *, scale: float, offset: int = 0) -> Tensor:
    """Returns ``encoding(scale * embedding(ids), offset)``, in one pass where that means the same.

    Raises:
        IndexError: an id without a row, on CPU.
        ValueError: more positions than ``encoding`` has.
    """
    if not _is_one_pass(embedding, encoding, ids):
        return encoding(embedding(ids) * scale, offset)
    dropout = encoding if isinstance(encoding, NoPositions) else encoding.dropout
    table: Tensor | None = None
    if isinstance(encoding, SinusoidalPositionalEncoding):
        table = encoding._rows(offset + ids.shape[-1], embedding.weight)
    elif isinstance(encoding, LearnedPositionalEncoding):
        encoding.check_positions(offset + ids.shape[-1])
        table = encoding.weight
    return fused_embedding(
        ids,
        embedding.weight,
        position_table=table,
        offset=0 if table is None else offset,
        scale=scale,
        padding_idx=embedding.padding_idx,
        dropout_p=dropout.p if dropout.training else 0.0,
    )


def _is_one_pass(embedding: Any, encoding: Any, ids: Tensor) -> bool:
    # A compiler fuses the modules itself.
    if torch.compiler.is_compiling() or not is_plain(embedding, nn.Embedding):
        return False
    if embedding.max_norm is not None or embedding.scale_grad_by_freq or embedding.sparse or ids.dim() == 0:
        return False
    if is_plain(encoding, NoPositions):
        return bool(encoding.p < 1.0)
    if not is_plain(encoding, SinusoidalPositionalEncoding, LearnedPositionalEncoding):
        return False
    fits = encoding.model_dim == embedding.embedding_dim
    if isinstance(encoding, LearnedPositionalEncoding):
        fits = fits and encoding.weight.dtype == embedding.weight.dtype
    return fits and is_plain(encoding.dropout, nn.Dropout) and bool(encoding.dropout.p < 1.0)


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
