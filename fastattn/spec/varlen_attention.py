"""Packed sequences: a canonical attention call whose tensors hold them one after another.

``query`` is [1, num_heads_q, tokens_q, head_dim], and ``starts_q`` says where each sequence begins. The band is laid
over each by itself: ``diag_lo`` and ``diag_hi`` count from the diagonal through its last query and key where
``from_end`` is set. ``relative_bias`` is that of the longest, and sequence s is dropped with the offset plus s.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from fastattn.biases import Alibi, RelativeBias, RelativePosition
from fastattn.masks import OPEN_HI, OPEN_LO, Mask, Window
from fastattn.spec.attention import AttentionCall, attention_call
from fastattn.spec.checks import check_tensor


def varlen_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    mask: Mask | None = None,
    bias: RelativeBias | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    generator: torch.Generator | None = None,
    backend: str,
) -> AttentionCall:
    """Validates what the user passed to ``varlen_attention`` and returns its canonical form.

    Raises:
        ValueError: shapes or sequence bounds do not fit.
        TypeError: dtypes or devices do not fit, or the mask or bias is none of those that sequences can have.
    """
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_tensor(name, tensor)
        if tensor.dim() != 3:
            raise ValueError(f"{name} must be 3-D [tokens, heads, head_dim], got {list(tensor.shape)}")
    if mask is not None and not isinstance(mask, Window):
        raise TypeError(f"mask must be Causal or Window over packed sequences, got {mask!r}")
    if bias is not None and not isinstance(bias, (Alibi, RelativePosition)):
        raise TypeError(f"bias must be Alibi or RelativePosition over packed sequences, got {type(bias).__name__}")
    bounds_q = _bounds("cu_seqlens_q", cu_seqlens_q, query.shape[0])
    bounds_k = _bounds("cu_seqlens_k", cu_seqlens_k, key.shape[0])
    if len(bounds_q) != len(bounds_k):
        raise ValueError(
            f"cu_seqlens_q and cu_seqlens_k must have one length, got {len(bounds_q)} and {len(bounds_k)} elements"
        )
    if value.shape[0] != key.shape[0]:
        raise ValueError(f"value must have key's {key.shape[0]} tokens, got {value.shape[0]}")
    call = attention_call(
        *(t.transpose(0, 1)[None] for t in (query, key, value)),
        dropout_p=dropout_p,
        softmax_scale=softmax_scale,
        softcap=softcap,
        sinks=sinks,
        generator=generator,
        backend=backend,
    )
    longest_q, longest_k = (max(end - start for start, end in pairwise(bounds)) for bounds in (bounds_q, bounds_k))
    relative_bias = None
    if bias is not None:
        relative_bias = bias.diagonals(query.shape[1], longest_q, longest_k).contiguous()
        if relative_bias.device != query.device:
            raise TypeError(f"bias must be on query's device {query.device}, got {relative_bias.device}")
    left, right, align = (None, None, "") if mask is None else (mask.left, mask.right, mask.align)
    return call._replace(
        relative_bias=relative_bias,
        diag_lo=OPEN_LO if left is None else -left,
        diag_hi=OPEN_HI if right is None else right,
        starts_q=_kept(cu_seqlens_q, query.device),
        starts_k=_kept(cu_seqlens_k, query.device),
        longest_q=longest_q,
        longest_k=longest_k,
        from_end=align == "bottom_right",
    )


def check_packed(call: AttentionCall) -> None:
    """Checks of a packed call what leads out of its tensors if it is wrong, without reading a bound.

    Whoever calls the op itself may hand over anything. Bounds may hold anything: kernels cut them off.

    Raises:
        ValueError: shapes do not fit.
        TypeError: dtypes or devices do not fit.
    """
    assert call.starts_q is not None
    for name, tensor in (("starts_q", call.starts_q), ("starts_k", call.starts_k)):
        if tensor is None or tensor.dtype != torch.int64 or tensor.device != call.query.device:
            got = "None" if tensor is None else f"{tensor.dtype} on {tensor.device}"
            raise TypeError(f"{name} must be int64 on query's device {call.query.device}, got {got}")
        if tensor.shape != call.starts_q.shape or tensor.dim() != 1 or len(tensor) < 2 or not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous [num_sequences + 1] like starts_q {list(call.starts_q.shape)}, "
                f"got {list(tensor.shape)}"
            )
    longest, tokens = (call.longest_q, call.longest_k), (call.query.shape[2], call.key.shape[2])
    if call.query.shape[0] != 1 or not all(0 <= n <= most for n, most in zip(longest, tokens, strict=True)):
        raise ValueError(
            f"query must be [1, num_heads_q, tokens_q, head_dim], and the longest sequences of 0 to {tokens} tokens, "
            f"got {list(call.query.shape)} and {longest}"
        )
    bias = call.relative_bias
    if bias is not None and bias.shape[-1] != max(sum(longest) - 1, 0):
        raise ValueError(f"relative_bias must have {max(sum(longest) - 1, 0)} diagonals, got {list(bias.shape)}")


def sequences(call: AttentionCall) -> Iterator[tuple[slice, slice, AttentionCall]]:
    """Yields the queries and the keys of each sequence of a packed call, and the call that it is by itself.

    Bounds that do not fit the tensors are cut off, and one that falls counts as the greatest before it: whatever the
    bounds are, no two sequences share a row.
    """
    assert call.starts_q is not None
    assert call.starts_k is not None
    bounds_q, bounds_k = (
        list(_spans(starts.tolist(), tensor.shape[2], longest))
        for starts, tensor, longest in (
            (call.starts_q, call.query, call.longest_q),
            (call.starts_k, call.key, call.longest_k),
        )
    )
    for s, (of_q, of_k) in enumerate(zip(bounds_q, bounds_k, strict=True)):
        len_q, len_k = of_q.stop - of_q.start, of_k.stop - of_k.start
        offset = len_k - len_q if call.from_end else 0
        yield (
            of_q,
            of_k,
            call._replace(
                query=call.query[:, :, of_q],
                key=call.key[:, :, of_k],
                value=call.value[:, :, of_k],
                relative_bias=None
                if call.relative_bias is None
                else call.relative_bias[:, diagonals(call, len_q, len_k)],
                dropout_state=None
                if call.dropout_state is None
                else call.dropout_state + call.dropout_state.new_tensor((0, s)),
                diag_lo=call.diag_lo + offset,
                diag_hi=call.diag_hi + offset,
                starts_q=None,
                starts_k=None,
                longest_q=0,
                longest_k=0,
                from_end=False,
            ),
        )


def diagonals(call: AttentionCall, len_q: int, len_k: int) -> slice:
    """Returns which diagonals of the longest sequence's ``relative_bias`` a sequence has: both end at the last key."""
    first = call.longest_k - len_k
    return slice(first, first + max(len_q + len_k - 1, 0))


def _spans(starts: list[int], tokens: int, longest: int) -> Iterator[slice]:
    # Bounds that fall would have two sequences own the same rows.
    ends = list(accumulate((min(max(start, 0), tokens) for start in starts), max))
    for start, end in pairwise(ends):
        yield slice(start, start + min(end - start, longest))


def _kept(cu_seqlens: Tensor, device: torch.device) -> Tensor:
    """Returns a copy on the device, lest what was checked changes before the backward reads it."""
    found = cu_seqlens.detach().to(torch.int64, copy=True).contiguous()
    if found.device.type == "cpu" and device.type == "cuda":
        # From pinned memory, which nobody has to wait for.
        return found.pin_memory().to(device, non_blocking=True)
    return found.to(device)


def _bounds(name: str, cu_seqlens: Tensor, tokens: int) -> list[int]:
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        got = cu_seqlens.dtype if isinstance(cu_seqlens, Tensor) else type(cu_seqlens).__name__
        raise TypeError(f"{name} must be an int32 or int64 tensor, got {got}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(
            f"{name} must have shape [num_sequences + 1] with at least 2 elements, got {list(cu_seqlens.shape)}"
        )
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != tokens or any(end < start for start, end in pairwise(bounds)):
        raise ValueError(
            f"{name} must start with 0, never fall and end with the number of tokens {tokens}, got {bounds}"
        )
    return bounds
