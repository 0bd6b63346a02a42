"""Attention over sequences of different lengths, packed one after another without padding."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from fastattn.biases import RelativeBias
from fastattn.masks import Mask, Window
from fastattn.ops import _dispatch
from fastattn.ops.attention import attend
from fastattn.spec.attention import attention_call, lse_dtype
from fastattn.spec.checks import check_dropout, check_tensor, draw_dropout_state


def varlen_attention(
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
    return_lse: bool = False,
    generator: torch.Generator | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention within each of several packed sequences.

    Sequence s is the rows ``cu_seqlens_q[s] : cu_seqlens_q[s + 1]`` of query and ``cu_seqlens_k[s] : cu_seqlens_k[s
    + 1]`` of key and value; its result is that of :func:`fastattn.attention` on those rows alone.

    Args:
        query: [tokens_q, num_heads_q, head_dim].
        key: [tokens_k, num_heads_kv, head_dim].
        value: [tokens_k, num_heads_kv, head_dim_v].
        cu_seqlens_q: int32 or int64 [num_sequences + 1]; starts with 0, never falls, ends with tokens_q.
        cu_seqlens_k: the same for key and value.
        mask: ``Causal`` or ``Window``, laid over each sequence by itself.
        bias: ``Alibi`` or ``RelativePosition``, laid over each sequence by itself.
        dropout_p: probability of dropping a weight, in [0, 1).  Sequence s uses the drawn offset plus s.
        softmax_scale: by default ``1 / sqrt(head_dim)``.
        softcap: as in :func:`fastattn.attention`.
        sinks: float [num_heads_q].
        return_lse: True also returns the log of the softmax's denominator.
        generator: source of the dropout's seed.
        backend: as in :func:`fastattn.attention`.

    Returns:
        ``out`` [tokens_q, num_heads_q, head_dim_v]; with ``return_lse`` also ``lse`` [num_heads_q, tokens_q].

    Raises:
        ValueError: shapes or sequence bounds do not fit.
        TypeError: dtypes or devices do not fit, or the mask or bias is not one of those named.
        UnsupportedError: the backend asked for cannot serve the call.

    Differs from packing with ``Segments``: only the tiles of a sequence are computed, and "bottom_right" is that of
    each sequence.  It reads the bounds on the host.
    """
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_tensor(name, tensor)
        if tensor.dim() != 3:
            raise ValueError(f"{name} must be 3-D [tokens, heads, head_dim], got {list(tensor.shape)}")
    if mask is not None and not isinstance(mask, Window):
        raise TypeError(f"mask must be Causal or Window over packed sequences, got {mask!r}")
    if bias is not None and not isinstance(bias, RelativeBias):
        raise TypeError(f"bias must be Alibi or RelativePosition over packed sequences, got {type(bias).__name__}")
    bounds_q = _bounds("cu_seqlens_q", cu_seqlens_q, query.shape[0])
    bounds_k = _bounds("cu_seqlens_k", cu_seqlens_k, key.shape[0])
    if len(bounds_q) != len(bounds_k):
        raise ValueError(
            f"cu_seqlens_q and cu_seqlens_k must have one length, got {len(bounds_q)} and {len(bounds_k)} elements"
        )
    if value.shape[0] != key.shape[0]:
        raise ValueError(f"value must have key's {key.shape[0]} tokens, got {value.shape[0]}")
    state = draw_dropout_state(check_dropout(dropout_p), generator, query.device)

    # split() and not slices: its backward is one cat, where each slice's would fill a whole gradient.
    lengths_k = [end - start for start, end in pairwise(bounds_k)]
    sequences = zip(
        query.split([end - start for start, end in pairwise(bounds_q)]),
        key.split(lengths_k),
        value.split(lengths_k),
        strict=True,
    )
    outs, lses = [], []
    for s, (q, k, v) in enumerate(sequences):
        call = attention_call(
            *(t.transpose(0, 1)[None] for t in (q, k, v)),
            mask=mask,
            bias=bias,
            softmax_scale=softmax_scale,
            softcap=softcap,
            sinks=sinks,
            backend=_dispatch.resolve(backend),
        )
        if state is not None:
            call = call._replace(dropout_p=float(dropout_p), dropout_state=state + state.new_tensor((0, s)))
        out, lse = attend(call)
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0])
    packed = torch.cat(outs)
    return (packed, torch.cat(lses, dim=1).to(lse_dtype(query.dtype))) if return_lse else packed


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
