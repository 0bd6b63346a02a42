"""Rotary position embedding of queries and keys."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastattn.backends.extension import plain
from fastattn.ops import _dispatch
from fastattn.ops._registry import define, plain_apply
from fastattn.reference import rotary_embedding as formula
from fastattn.spec.rotary_embedding import RotaryEmbeddingCall, empty_outputs, rotary_embedding_call

_CPU = torch.device("cpu")


def rotary_embedding(
    query: Tensor,
    key: Tensor | None = None,
    positions: Tensor | None = None,
    *,
    base: float = 10000.0,
    inv_freq: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    offset: int = 0,
    rotary_dim: int | None = None,
    interleaved: bool = False,
    scale: float = 1.0,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Rotates pairs of features of queries and keys by an angle proportional to their position.

    ``(x1, x2) -> scale * (x1 cos a - x2 sin a, x2 cos a + x1 sin a)`` with ``a = position * inv_freq[i]`` for pair
    ``i``, so that a product of query and key depends on the distance of their positions alone.

    Args:
        query: [batch, num_heads_q, seq_len, head_dim], any strides with a contiguous last dimension; float32, bfloat16,
            float16 or float64.
        key: [batch, num_heads_kv, seq_len, head_dim], any number of heads; None for none.
        positions: int64 or int32 [seq_len] or [batch, seq_len], any size and sign; floating ones are allowed.  None for
            ``offset, offset + 1, ...``.
        base: the longest wavelength is 2 pi times this; ``inv_freq[i] = base^(-2i / rotary_dim)``.
        inv_freq: [rotary_dim / 2], radians a position, instead of ``base``: the frequencies of a scaled variant.
        cos: [seq_len, width] or [batch, seq_len, width] with the cosine of each angle, instead of positions and
            frequencies.  ``width`` is rotary_dim / 2, or rotary_dim where each cosine stands there twice, as in Hugging
            Face's models: only the first of the two is read.
        sin: likewise.
        offset: position of the first row; >= 0.
        rotary_dim: features to rotate, the first of head_dim, even; by default all.
        interleaved: pairs are neighbours (2i, 2i + 1), as in the paper, not (i, i + rotary_dim / 2), as in Llama.
        scale: multiplies cosines and sines (YaRN's attention factor).
        backend: "reference" | "cpu" | "triton"; by default the first that supports the call.

    Returns:
        Like ``query``, in its layout; with ``key`` a pair.

    Raises:
        ValueError: shapes or values do not fit.
        TypeError: dtypes or devices do not fit.
        UnsupportedError: the backend asked for cannot serve the call.

    Angles are as exact as float64's at any position: kernels count them in 2^-64 of a turn, so that whole turns drop
    out exactly.  Differs from Hugging Face's ``apply_rotary_pos_emb``, which computes them in float32 and is off by
    4e-3 radians at position 10^5.  The gradient is the rotation by the negative angle; ``inv_freq``, ``cos`` and
    ``sin`` get theirs through the reference.

    Source: Su et al., "RoFormer", 2021, equation 34.
    """
    if inv_freq is None and _dispatch.may_be_plain(backend):
        found = _plain(query, key, positions, cos, sin, base, offset, rotary_dim, interleaved, scale)
        if found is not None:
            return found
    call = rotary_embedding_call(
        query,
        key,
        positions,
        base=base,
        inv_freq=inv_freq,
        cos=cos,
        sin=sin,
        offset=offset,
        rotary_dim=rotary_dim,
        interleaved=interleaved,
        scale=scale,
        backend=_dispatch.resolve(backend),
    )
    if _dispatch.needs_reference_derivatives(*call[:6]):
        _dispatch.warn_reference("rotary_embedding", "forward-mode derivatives and torch.func have no kernel")
        query_out, key_out = formula.rotary_embedding(call)
    elif torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in call[2:6]):
        _dispatch.warn_reference("rotary_embedding", "gradients of positions, inv_freq, cos and sin have no kernel")
        query_out, key_out = formula.rotary_embedding(call)
    else:
        query_out, key_out = _rotary_embedding(*call)
    return query_out if key is None else (query_out, key_out)


def _plain(
    query: Tensor,
    key: Tensor | None,
    positions: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    base: float,
    offset: int,
    rotary_dim: int | None,
    interleaved: bool,
    scale: float,
) -> Tensor | tuple[Tensor, Tensor] | None:
    """Returns what a plain call does, or None where this is none."""
    if not isinstance(query, Tensor) or query.dim() != 4 or type(base) not in (int, float):
        return None
    dim = query.shape[-1] if rotary_dim is None else rotary_dim
    if type(dim) is not int or dim <= 0 or not 0 < base < math.inf:
        return None
    turns = None
    if cos is None and sin is None:
        turns = formula.turns_of_base(base, dim, _CPU)
        if positions is not None and offset != 0:
            return None
    elif positions is not None or offset != 0:
        return None
    angles = (turns, positions, cos, sin)
    numbers = (offset, dim, interleaved, scale)
    found = plain.rotary_embedding(query, key, *angles, *numbers, False)
    if type(found) is not list:
        return found
    outs = _apply_plain(query, key, *angles, found, numbers, base)
    return outs[0] if key is None else outs


def _kernel(*args: Any) -> tuple[Tensor, Tensor]:
    call = RotaryEmbeddingCall(*args)
    if call.query.numel() == 0 and (call.key is None or call.key.numel() == 0):
        return empty_outputs(call)
    return _dispatch.serve("rotary_embedding", call, lambda backend: backend.rotary_embedding(call))


def _fake(*args: Any) -> tuple[Tensor, Tensor]:
    return empty_outputs(RotaryEmbeddingCall(*args))


class _RotaryEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        call = RotaryEmbeddingCall(*args)
        ctx.save_for_backward(call.positions, call.inv_freq, call.cos, call.sin)
        ctx.rest = args[6:]
        ctx.set_materialize_grads(False)
        query, key = _rotary_embedding(*args)
        if call.key is None:
            ctx.mark_non_differentiable(key)
        return query, key

    @staticmethod
    def backward(ctx: Any, dquery: Tensor | None, dkey: Tensor | None) -> tuple[Tensor | None, ...]:
        *numbers, inverse, backend = ctx.rest
        # A rotation is linear: its gradient is the rotation back, and so is the gradient's.
        douts = [
            _rows(d) for d, need in zip((dquery, dkey), ctx.needs_input_grad, strict=False) if need and d is not None
        ]
        found: list[Tensor] = []
        if douts:
            first, second = douts[0], douts[1] if len(douts) == 2 else None
            found = list(_rotary_embedding(first, second, *ctx.saved_tensors, *numbers, not inverse, backend))
        grads = [
            found.pop(0) if need and d is not None else None
            for d, need in zip((dquery, dkey), ctx.needs_input_grad, strict=False)
        ]
        return (*grads, *(None,) * (len(RotaryEmbeddingCall._fields) - 2))


class _PlainRotaryEmbedding(torch.autograd.Function):
    """A plain call's node: its results are there, and its gradient is a plain call where nobody sees it."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor | None, *args: Any) -> tuple[Tensor | None, ...]:
        *angles, found, ctx.numbers, ctx.base = args
        ctx.save_for_backward(*angles)
        ctx.set_materialize_grads(False)
        return tuple(found)

    @staticmethod
    def backward(ctx: Any, dquery: Tensor | None, dkey: Tensor | None) -> tuple[Tensor | None, ...]:
        first, second = (dkey, None) if dquery is None else (dquery, dkey)
        grads: tuple[Tensor | None, ...] = (None, None)
        if first is not None:
            angles, numbers = ctx.saved_tensors, ctx.numbers
            found = (
                plain.rotary_embedding(first, second, *angles, *numbers, True) if _dispatch.may_be_plain(None) else None
            )
            if found is None or type(found) is list:  # the latter for whoever differentiates it again
                found = _back(first, second, *angles, *numbers, ctx.base)
            outs = found if isinstance(found, tuple) else (found, None)
            grads = (None, outs[0]) if dquery is None else (outs[0], None if dkey is None else outs[1])
        return (*grads, *(None,) * 7)


def _back(
    first: Tensor, second: Tensor | None, turns: Any, positions: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor]:
    """Returns the rotation back, the long way."""
    cos, sin, offset, rotary_dim, interleaved, scale, base = rest
    call = rotary_embedding_call(
        _rows(first),
        None if second is None else _rows(second),
        positions,
        base=base,
        inv_freq=None,
        cos=cos,
        sin=sin,
        offset=offset,
        rotary_dim=rotary_dim,
        interleaved=interleaved,
        scale=scale,
        backend="",
    )
    return _rotary_embedding(*call._replace(inverse=True))


_apply_plain = plain_apply(_PlainRotaryEmbedding)


def _rows(tensor: Tensor) -> Tensor:
    """Returns ``tensor`` with a contiguous last dimension."""
    return tensor if tensor.shape[-1] <= 1 or tensor.stride(-1) == 1 else tensor.contiguous()


_rotary_embedding = define(
    "rotary_embedding",
    "(Tensor query, Tensor? key, Tensor? positions, Tensor? inv_freq, Tensor? cos, Tensor? sin, float base, int offset,"
    " int rotary_dim, bool interleaved, float scale, bool inverse, str backend) -> (Tensor, Tensor)",
    kernel=_kernel,
    fake=_fake,
    function=_RotaryEmbedding,
)
