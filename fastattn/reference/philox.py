"""Philox-4x32-10 in int64 tensor arithmetic: which elements dropout drops.

Source: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011, section 3.3 and table 2.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MULTIPLIER_0 = 0xD2511F53
_MULTIPLIER_1 = 0xCD9E8D57
_WEYL_0 = 0x9E3779B9
_WEYL_1 = 0xBB67AE85
_MASK = 0xFFFFFFFF
ROUNDS = 10


def philox_4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Returns four 32-bit random numbers a counter, as int64 tensors in [0, 2^32).

    Args:
        counter: four int64 tensors in [0, 2^32) that broadcast together.
        key: two int64 tensors in [0, 2^32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        hi0, lo0 = _multiply(c0, _MULTIPLIER_0)
        hi1, lo1 = _multiply(c2, _MULTIPLIER_1)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + _WEYL_0) & _MASK, (k1 + _WEYL_1) & _MASK
    return c0, c1, c2, c3


def keep_mask(state: Tensor, dropout_p: float, planes: int, rows: int, columns: int) -> Tensor:
    """Returns which elements survive: bool [planes, rows, columns].

    Element (plane, i, j) is dropped iff its random number is below ``floor(dropout_p * 2^32)``;
    ``docs/architecture.md`` gives the counter.

    Args:
        state: int64 [2], seed and offset.
        dropout_p: probability of dropping an element, in [0, 1).
        planes: ``batch * num_heads_q`` for attention, plane ``b * num_heads_q + h``; 1 for the feed-forward.
        rows: queries, or tokens.
        columns: keys, or hidden units.
    """
    device = state.device
    seed, offset = state[0], state[1]
    quads = torch.arange((columns + 3) // 4, device=device)[None, None, :]
    row = torch.arange(rows, device=device)[None, :, None]
    plane = torch.arange(planes, device=device)[:, None, None]
    numbers = philox_4x32((quads, row, plane, (offset & _MASK)[None, None, None]), (seed & _MASK, seed >> 32))
    random = torch.stack(torch.broadcast_tensors(*numbers), dim=-1).flatten(-2)[..., :columns]
    return random >= int(dropout_p * 2.0**32)


def _multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """Returns the high and the low 32 bits of the 64-bit product of two 32-bit numbers, without leaving int64."""
    low, high = a & 0xFFFF, a >> 16
    # a * b = high * b * 2^16 + low * b; each partial product is below 2^48.
    partial = high * b + ((low * b) >> 16)
    return partial >> 16, ((partial & 0xFFFF) << 16) | ((low * b) & 0xFFFF)
