"""Biases that depend only on how far a key is from a query; gradients flow to the tensors that they are made of.

A bias is added to the scaled score.  These two hold O(seq_len) numbers: one for each diagonal ``j - i``.  Any other
bias is a plain tensor that broadcasts to [batch, num_heads_q, seq_len_q, seq_len_k].
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


class RelativeBias:
    """Base: a bias that is a function of the head and of ``j - i``."""

    def diagonals(self, num_heads_q: int, seq_len_q: int, seq_len_k: int) -> Tensor:
        """Returns float [num_heads_q or 1, seq_len_q + seq_len_k - 1]; ``j - i + seq_len_q - 1`` is query i, key j."""
        raise TypeError(f"{type(self).__name__} is not a concrete bias: use Alibi or RelativePosition")


class Alibi(RelativeBias):
    """Linear distance penalty: ``bias[h, i, j] = -slopes[h] * |i + seq_len_k - seq_len_q - j|``.

    The last query is aligned with the last key, so that a cache may grow.

    Args:
        slopes: float [num_heads_q].  :meth:`geometric` gives the published ones.

    Source: Press, Smith and Lewis, "Train Short, Test Long: Attention with Linear Biases", 2021, section 3.
    """

    def __init__(self, slopes: Tensor) -> None:
        if slopes.dim() != 1 or not slopes.is_floating_point():
            raise ValueError(f"slopes must be a float tensor [num_heads_q], got {slopes.dtype} {list(slopes.shape)}")
        self.slopes = slopes

    @classmethod
    def geometric(cls, num_heads: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Alibi:
        """Returns the paper's slopes: ``2^(-8 h / n)`` for n a power of two, else with some of the next power's."""
        if num_heads < 1:
            raise ValueError(f"num_heads must be >= 1, got {num_heads}")
        power = 1 << (num_heads.bit_length() - 1)
        slopes = [2.0 ** (-8.0 * (h + 1) / power) for h in range(power)]
        slopes += [2.0 ** (-8.0 * (2 * h + 1) / (2 * power)) for h in range(num_heads - power)]
        return cls(torch.tensor(slopes, dtype=dtype, device=device))

    def diagonals(self, num_heads_q: int, seq_len_q: int, seq_len_k: int) -> Tensor:
        if self.slopes.shape[0] != num_heads_q:
            raise ValueError(f"Alibi needs one slope a query head: expected {num_heads_q}, got {self.slopes.shape[0]}")
        # bfloat16 cannot even hold the distance 257: half-precision slopes give float32 biases.
        dtype = torch.promote_types(self.slopes.dtype, torch.float32)
        distance = _distance(seq_len_q, seq_len_k, self.slopes.device).abs()
        return -self.slopes[:, None].to(dtype) * distance.to(dtype)


class RelativePosition(RelativeBias):
    """Learned bias over buckets of the distance: exact for near keys, logarithmic beyond, constant at last.

    Args:
        table: float [num_buckets, num_heads_q], learnable.
        bidirectional: half of the buckets are for keys after the query; otherwise those share the bucket of distance 0.
        max_distance: in tokens; from here on all distances share the last bucket.

    Source: Raffel et al., "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer",
    2020, section 2.1.
    """

    def __init__(self, table: Tensor, bidirectional: bool = True, max_distance: int = 128) -> None:
        if table.dim() != 2 or not table.is_floating_point():
            raise ValueError(
                f"table must be a float tensor [num_buckets, num_heads_q], got {table.dtype} {list(table.shape)}"
            )
        side = table.shape[0] // (2 if bidirectional else 1)
        if side < 2:
            raise ValueError(f"table needs at least {4 if bidirectional else 2} buckets, got {table.shape[0]}")
        if max_distance <= side // 2:
            raise ValueError(f"max_distance must be above {side // 2}, the number of exact buckets, got {max_distance}")
        self.table = table
        self.bidirectional = bidirectional
        self.max_distance = max_distance

    def diagonals(self, num_heads_q: int, seq_len_q: int, seq_len_k: int) -> Tensor:
        if self.table.shape[1] != num_heads_q:
            raise ValueError(
                f"RelativePosition needs one column a query head: expected {num_heads_q}, got {self.table.shape[1]}"
            )
        distance = _distance(seq_len_q, seq_len_k, self.table.device)
        return self.table[self._bucket(distance)].t()

    def _bucket(self, distance: Tensor) -> Tensor:
        side = self.table.shape[0]
        bucket = torch.zeros_like(distance)
        if self.bidirectional:
            side //= 2
            bucket = bucket + side * (distance > 0)
            distance = distance.abs()
        else:
            distance = (-distance).clamp_min(0)
        exact = side // 2
        # float64: a bucket's edge must not depend on a rounding.
        scaled = (distance.clamp_min(1).double() / exact).log() / math.log(self.max_distance / exact) * (side - exact)
        coarse = (exact + scaled.long()).clamp_max(side - 1)
        return bucket + torch.where(distance < exact, distance, coarse)


def _distance(seq_len_q: int, seq_len_k: int, device: torch.device) -> Tensor:
    """Returns ``j - (i + seq_len_k - seq_len_q)`` along the diagonals, int64 [seq_len_q + seq_len_k - 1]."""
    diagonal = torch.arange(max(seq_len_q + seq_len_k - 1, 0), device=device) - (seq_len_q - 1)
    return diagonal - (seq_len_k - seq_len_q)
