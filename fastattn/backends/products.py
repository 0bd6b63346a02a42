"""Matrix products of linear layers: our kernel's on AMX tiles, or PyTorch's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastattn.backends.extension import kernels
from fastattn.spec.attention import lse_dtype

# Fewest rows of a product for which packing what is multiplied pays.
_LEAST_ROWS = {torch.float32: 128, torch.float16: 128}
# Fewest columns and depth: a tile is 16 columns wide and 32 deep.
_LEAST_SIZE = 64
# The same where PyTorch would need several products for the same bits at any thread count.
_LEAST_WIDE_ROWS = {torch.float32: 32, torch.float16: 32, torch.bfloat16: 16}
# What the feed-forward has tiles for, and the fewest tokens for which its backward is fast.
_FUSED = (torch.float32, torch.bfloat16, torch.float16)
_LEAST_FUSED_TOKENS = 256
# Most terms of a sum that one product of PyTorch's takes: it shares a longer one out among the threads (seen on 1 to
# 8).
_INNER_BLOCK = {torch.float32: 512, torch.float64: 512, torch.bfloat16: 256, torch.float16: 256}


def multiplies_on_tiles(isa: str, dtype: torch.dtype, rows: int, columns: int, depth: int) -> bool:
    """Whether our kernel multiplies [rows, depth] by [depth, columns] faster than PyTorch.

    On AMX it computes a float32 from three bfloat16 pieces, and a float16 from two.  Without AMX, and in bfloat16, for
    which PyTorch uses AMX itself, PyTorch's product is as fast.

    Args:
        isa: the instruction set in use, as ``fastattn._cpu.isa()`` names it.
        dtype: of what is multiplied.
        rows: of the left operand: tokens.
        columns: of the right operand.
        depth: what the two have in common.
    """
    least_rows = _LEAST_ROWS.get(dtype)
    return isa == "amx" and least_rows is not None and rows >= least_rows and min(columns, depth) >= _LEAST_SIZE


def fuses_on_tiles(isa: str, dtype: torch.dtype, tokens: int) -> bool:
    """Whether the feed-forward as one op is faster than as two linear layers whose hidden activation is kept.

    On AMX it is (``benchmarks/results``), with gradients too, for which it computes the activation again.

    Args:
        isa: the instruction set in use, as ``fastattn._cpu.isa()`` names it.
        dtype: of the input.
        tokens: of the input.
    """
    return isa == "amx" and dtype in _FUSED and tokens >= _LEAST_FUSED_TOKENS


def product(
    left: Sequence[Tensor],
    right: Tensor,
    out: Sequence[Tensor],
    *,
    bias: Tensor | None = None,
    left_transposed: bool = False,
    right_transposed: bool = False,
) -> None:
    """Writes ``out = left @ right + bias``, on tiles where they can multiply these numbers exactly.

    Args:
        left: matrices side by side, [rows, depth / n] each; with ``left_transposed`` [depth, rows / n].
        right: [depth, columns]; with ``right_transposed`` [columns, depth].
        out: matrices side by side, [rows, columns / n] each, with contiguous rows.
        bias: [columns] or None.
        left_transposed: whether ``left`` is given transposed.
        right_transposed: whether ``right`` is given transposed.
    """
    whole_parts = all(len(parts) == 1 or parts[0].shape[1] % 32 == 0 for parts in (left, out))
    if whole_parts and kernels().linear(
        [_rows(t) for t in left],
        left_transposed,
        _rows(right),
        right_transposed,
        None if bias is None else bias.contiguous(),
        list(out),
    ):
        return
    a = left[0] if len(left) == 1 else torch.cat(list(left), dim=1)
    a, b = a.t() if left_transposed else a, right.t() if right_transposed else right
    a = _whole_rows(a)
    whole = a @ b if bias is None else torch.addmm(bias, a, b)
    for part, values in zip(out, whole.split(out[0].shape[1], dim=1), strict=True):
        part.copy_(values)


def wide_product(
    left: Tensor, right: Tensor, *, left_transposed: bool = False, right_transposed: bool = False
) -> Tensor:
    """Returns ``left @ right`` in the accumulator's dtype, with the same bits at any thread count.

    Args:
        left: [rows, depth]; with ``left_transposed`` [depth, rows].
        right: [depth, columns]; with ``right_transposed`` [columns, depth].
        left_transposed: whether ``left`` is given transposed.
        right_transposed: whether ``right`` is given transposed.
    """
    a, b = left.t() if left_transposed else left, right.t() if right_transposed else right
    wide = lse_dtype(left.dtype)
    if kernels().isa() == "amx" and left.dtype in _LEAST_WIDE_ROWS and len(a) >= _LEAST_WIDE_ROWS[left.dtype]:
        out = a.new_empty(a.shape[0], b.shape[1], dtype=wide)
        if kernels().linear([_rows(left)], left_transposed, _rows(right), right_transposed, None, [out]):
            return out
    if a.shape[1] <= _INNER_BLOCK[a.dtype]:
        return (_whole_rows(a) @ b).to(wide)
    first, *rest = blocks(a.shape[1], _INNER_BLOCK[a.dtype])
    out = (_whole_rows(a[:, first]) @ b[first]).to(wide)
    for inner in rest:
        if out.dtype == a.dtype:
            out.addmm_(a[:, inner], b[inner])
        else:
            out += _whole_rows(a[:, inner]) @ b[inner]
    return out


def blocks(size: int, step: int) -> Iterator[slice]:
    """Cuts ``range(size)`` into slices of at least one and at most ``step``."""
    step = max(step, 1)
    return (slice(start, min(start + step, size)) for start in range(0, size, step))


def part(tensor: Tensor, rows: slice) -> Tensor:
    """Returns ``tensor[rows]``, one of ``blocks``; a slice costs a microsecond, so the whole is not sliced."""
    return tensor if rows.stop - rows.start == len(tensor) else tensor[rows]


def _rows(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(1) == 1 or matrix.shape[1] == 1 else matrix.contiguous()


def _whole_rows(a: Tensor) -> Tensor:
    """Returns ``a``, or a copy where PyTorch's product would also read what lies between its rows.

    On AMX a row is read in whole steps (seen on 2.13): what follows it in memory is multiplied by 0, which gives NaN
    where that is NaN or Inf.
    """
    return a.contiguous() if a.dtype == torch.bfloat16 and a.stride(1) == 1 else a
