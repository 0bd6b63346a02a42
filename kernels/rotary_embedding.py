"""Rotary embedding of queries and keys in one launch.

An angle is counted in 2^-64 of a turn: the turn of one position times the position, in 64-bit integers, whose overflow
takes whole turns off exactly.  What is left of a quarter of a turn is below pi / 4, where float32 series are exact to
half an ulp at any position.  A program computes the cosines and sines of its positions once for several heads.

Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021, equation 34.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn.kernels.arguments import View, view
from fastattn.kernels.launch import Configuration, Launch, run
from fastattn.kernels.numbers import number
from fastattn.kernels.replay import replayed
from fastattn.kernels.rows import power_of_two
from fastattn.kernels.tile import accumulator
from fastattn.reference import rotary_embedding as formula
from fastattn.spec.rotary_embedding import RotaryEmbeddingCall, empty_outputs

# Pairs of a tile: 8 a thread, so that two rows of 8 halves are loaded at 16 bytes.
_PAIRS = 1024
# Heads that share cosines and sines, which cost about as much as rotating two.
_HEADS = 8
# Programs that fill a GPU: with fewer, a program takes fewer heads.
_PROGRAMS = 1024

# 2 pi in two parts: the float32, and the rest.
_TWO_PI = tl.constexpr(6.2831854820251465)
_TWO_PI_REST = tl.constexpr(-1.7484556025237907e-07)
# Taylor series of sin(2 pi t) / t after its first term, and of cos(2 pi t), in powers of t^2.
_SINE = tl.constexpr((-41.341702240399755, 81.60524927607504, -76.70585975306136, 42.058693944897634))
_COSINE = tl.constexpr(
    (-19.739208802178716, 64.93939402266829, -85.45681720669371, 60.24464137187664, -26.426256783374388)
)


@triton.jit
def _cos_sin(phase):
    """Returns cosine and sine in float32 of an int64 angle in 2^-64 of a turn."""
    quarter = (phase + (1 << 61)) >> 62
    rest = phase - (quarter << 62)
    high = rest.to(tl.float32)
    low = (rest - high.to(tl.int64)).to(tl.float32) * 5.421010862427522e-20  # 2^-64
    t = high * 5.421010862427522e-20
    y = t * t
    sine = t * _TWO_PI_REST + t * y * (_SINE[0] + y * (_SINE[1] + y * (_SINE[2] + y * _SINE[3])))
    sine = tl.fma(t, tl.full(t.shape, _TWO_PI, tl.float32), sine)
    cosine = 1.0 + y * (_COSINE[0] + y * (_COSINE[1] + y * (_COSINE[2] + y * (_COSINE[3] + y * _COSINE[4]))))
    # What float32 left of the angle turns both a little further.
    more = low * _TWO_PI
    sine, cosine = sine + more * cosine, cosine - more * sine
    odd = (quarter & 1) != 0
    found_cosine = tl.where(odd, sine, cosine)
    found_sine = tl.where(odd, cosine, sine)
    found_cosine = tl.where(((quarter + 1) & 2) != 0, -found_cosine, found_cosine)
    return found_cosine, tl.where((quarter & 2) != 0, -found_sine, found_sine)


@triton.jit
def _rotate(
    source,
    target,
    batch,
    head,
    row,
    rows,
    cosine,
    sine,
    rotary_dim,
    head_dim,
    INTERLEAVED: tl.constexpr,
    PAIRS: tl.constexpr,
    REST: tl.constexpr,
):
    """Rotates a tile of rows of one head, and copies what is not rotated."""
    there = source.data + batch * source.batch + head * source.head + row[:, None] * source.row
    to = target.data + batch * target.batch + head * target.head + row[:, None] * target.row
    dtype: tl.constexpr = target.data.dtype.element_ty
    inside = (row < rows)[:, None]
    half = rotary_dim // 2
    if INTERLEAVED:
        column = tl.arange(0, 2 * PAIRS)[None, :]
        within = inside & (column < rotary_dim)
        x = tl.load(there + column, mask=within, other=0.0).to(cosine.dtype)
        first, second = tl.split(tl.reshape(x, [x.shape[0], PAIRS, 2]))
        turned = tl.join(first * cosine - second * sine, second * cosine + first * sine)
        tl.store(to + column, tl.reshape(turned, [x.shape[0], 2 * PAIRS]).to(dtype), mask=within)
    else:
        pair = tl.arange(0, PAIRS)[None, :]
        within = inside & (pair < half)
        first = tl.load(there + pair, mask=within, other=0.0).to(cosine.dtype)
        second = tl.load(there + half + pair, mask=within, other=0.0).to(cosine.dtype)
        tl.store(to + pair, (first * cosine - second * sine).to(dtype), mask=within)
        tl.store(to + half + pair, (second * cosine + first * sine).to(dtype), mask=within)
    if REST > 0:
        column = rotary_dim + tl.arange(0, REST)[None, :]
        within = inside & (column < head_dim)
        tl.store(to + column, tl.load(there + column, mask=within), mask=within)


@triton.jit(do_not_specialize=["offset"])
def rotary_embedding_kernel(
    query,
    key,
    query_out,
    key_out,
    positions,
    turns,
    cos,
    sin,
    seq_len,
    offset,
    heads_q,
    heads_k,
    head_dim,
    rotary_dim,
    scale: tl.float64,
    INVERSE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ROWS: tl.constexpr,
    PAIRS: tl.constexpr,
    REST: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Writes a block of positions of up to HEADS heads, those of the queries and then those of the keys.

    Grid: batch entries x blocks x groups of heads, groups fastest.

    Args:
        query: View [batch, heads_q, seq_len, head_dim]; likewise ``key``, heads_k or no data, and results.
        positions: View [batch, 1, seq_len, 1] of int64, or without data for ``offset, offset + 1, ...``.
        turns: int64 [rotary_dim / 2], the turn of a position in 2^-64; None where there are tables.
        cos: View [batch, 1, seq_len, rotary_dim / 2], or without data; likewise ``sin``.
        PAIRS: the power of two that holds rotary_dim / 2.
        REST: that which holds what is not rotated; 0 for nothing.
    """
    dtype: tl.constexpr = accumulator(query.data.dtype.element_ty)
    heads = heads_q + heads_k
    groups = tl.cdiv(heads, HEADS)
    blocks = tl.cdiv(seq_len, ROWS)
    begin = tl.program_id(0) % groups * HEADS
    batch = (tl.program_id(0) // groups // blocks).to(tl.int64)
    row = (tl.program_id(0) // groups % blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    pair = tl.arange(0, PAIRS)
    if turns is not None:
        if positions.data is not None:
            position = tl.load(
                positions.data + batch * positions.batch + row * positions.row, mask=row < seq_len, other=0
            )
        else:
            position = row + offset
        phase = position[:, None] * tl.load(turns + pair, mask=pair < rotary_dim // 2, other=0)[None, :]
        cosine, sine = _cos_sin(phase)
    else:
        inside = (row < seq_len)[:, None] & (pair < rotary_dim // 2)[None, :]
        at = cos.data + batch * cos.batch + row[:, None] * cos.row + pair[None, :]
        cosine = tl.load(at, mask=inside, other=0.0).to(dtype)
        at = sin.data + batch * sin.batch + row[:, None] * sin.row + pair[None, :]
        sine = tl.load(at, mask=inside, other=0.0).to(dtype)
    cosine *= number(scale, dtype)[:, None]
    sine *= number(-scale if INVERSE else scale, dtype)[:, None]
    for head in range(begin, tl.minimum(begin + HEADS, heads_q)):
        at_head = head + 0 * batch  # in 64 bits
        _rotate(
            query, query_out, batch, at_head, row, seq_len, cosine, sine, rotary_dim, head_dim, INTERLEAVED, PAIRS, REST
        )
    if key.data is not None:
        for head in range(tl.maximum(begin, heads_q), tl.minimum(begin + HEADS, heads)):
            at_head = head - heads_q + 0 * batch
            _rotate(
                key, key_out, batch, at_head, row, seq_len, cosine, sine, rotary_dim, head_dim, INTERLEAVED, PAIRS, REST
            )


@replayed
def rotary_embedding_fwd(call: RotaryEmbeddingCall) -> tuple[Tensor, Tensor]:
    """Returns query and key of a canonical call rotated; the second is empty without a key."""
    call = formula.with_tables(call)
    outs = empty_outputs(call)
    run(_launch(call, *outs, formula.turns(call) if call.cos is None else None))
    return outs


def _launch(call: RotaryEmbeddingCall, query_out: Tensor, key_out: Tensor, turns: Tensor | None) -> Launch:
    batch, heads_q, seq_len, head_dim = call.query.shape
    heads_k = 0 if call.key is None else call.key.shape[1]
    pairs = power_of_two(call.rotary_dim // 2)
    rest = head_dim - call.rotary_dim
    rows = max(1, min(power_of_two(seq_len), _PAIRS // pairs))
    blocks = batch * -(-seq_len // rows)
    heads = _HEADS
    while heads > 1 and blocks * -(-(heads_q + heads_k) // heads) < _PROGRAMS:
        heads //= 2
    none = View(None, 0, 0, 0, 0)
    arguments = (
        view(call.query),
        none if call.key is None else view(call.key),
        view(query_out),
        none if call.key is None else view(key_out),
        _shared(call.positions),
        turns,
        _shared(call.cos),
        _shared(call.sin),
        seq_len,
        call.offset,
        heads_q,
        heads_k,
        head_dim,
        call.rotary_dim,
        call.scale,
    )
    options = {
        "INVERSE": call.inverse,
        "INTERLEAVED": call.interleaved,
        "ROWS": rows,
        "PAIRS": pairs,
        "REST": power_of_two(rest) if rest else 0,
        "HEADS": heads,
        "num_warps": 4,
    }
    return rotary_embedding_kernel, (blocks * -(-(heads_q + heads_k) // heads),), arguments, options


def _shared(tensor: Tensor | None) -> View:
    """Returns a view of [batch or 1, seq_len, ...], the one entry for the whole batch where there is one."""
    if tensor is None:
        return View(None, 0, 0, 0, 0)
    return View(tensor, 0 if tensor.shape[0] == 1 else tensor.stride(0), 0, tensor.stride(1), 1)


def configurations(architecture: int) -> Iterator[Configuration]:
    """Yields the kernel for both layouts, both kinds of angles and every size of element."""
    for dtype, interleaved, head_dim, rotary_dim, tables in (
        (torch.bfloat16, False, 128, 128, False),
        (torch.bfloat16, True, 128, 128, False),
        (torch.bfloat16, False, 64, 64, True),
        (torch.bfloat16, False, 80, 32, False),
        (torch.float32, False, 256, 256, False),
        (torch.float32, True, 64, 64, True),
        (torch.float64, False, 128, 128, True),
    ):
        query = torch.empty(1, 32, 2048, head_dim, dtype=dtype, device="meta")
        key = torch.empty(1, 8, 2048, head_dim, dtype=dtype, device="meta")
        table = torch.empty(1, 2048, rotary_dim // 2, dtype=dtype, device="meta") if tables else None
        positions = None if tables else torch.empty(1, 2048, dtype=torch.int64, device="meta")
        call = RotaryEmbeddingCall(
            query, key, positions, None, table, table, 1e4, 0, rotary_dim, interleaved, 1.0, False, "triton"
        )
        turns = None if tables else torch.empty(rotary_dim // 2, dtype=torch.int64, device="meta")
        kernel, _, arguments, options = _launch(call, query, key, turns)
        kind = f"{'neighbours' if interleaved else 'halves'} {'tables' if tables else 'positions'}"
        yield Configuration(
            f"rotary {dtype} {kind} {rotary_dim} of {head_dim}".replace("torch.", ""), kernel, arguments, options
        )
