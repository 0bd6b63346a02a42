"""Sequences that are packed one after another: a program works on one of them as if there were no other.

A kernel makes its Problem, its batch entry and its views that of a sequence before anything else, and the rest of it
knows nothing of packing; where nothing is packed, none of this is compiled. The bounds of a sequence are cut off at
those of the tensors, so that wrong ones cannot lead out of them.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

# Bounds that a program looks at together.
BOUNDS = tl.constexpr(1024)


@triton.jit
def _span(starts, sequence, tokens, longest):
    """Returns where a sequence begins, int64, and its length, int32.

    No sequence begins before an earlier one ends: bounds that fall would have two programs write the same rows.
    """
    begin = tl.full([], 0, tl.int64)
    for first in range(0, sequence + 1, BOUNDS):
        at = first + tl.arange(0, BOUNDS)
        begin = tl.maximum(begin, tl.max(tl.load(starts + at, mask=at <= sequence, other=0)))
    begin = tl.minimum(begin, tokens)
    end = tl.minimum(tl.maximum(tl.load(starts + sequence + 1), 0), tokens)
    return begin, tl.minimum(tl.maximum(end - begin, 0), longest).to(tl.int32)


@triton.jit
def numbers(problem, sequence):
    """Returns what :func:`own` puts into the Problem of a sequence, and 0 for what it has not."""
    begin_q, len_q, begin_k, len_k, diag_lo, diag_hi, relative = 0, 0, 0, 0, 0, 0, 0
    if problem.packing.starts_q is not None:
        begin_q, len_q = _span(problem.packing.starts_q, sequence, problem.packing.tokens_q, problem.seq_len_q)
        begin_k, len_k = _span(problem.packing.starts_k, sequence, problem.packing.tokens_k, problem.seq_len_k)
        if problem.mask.diag_lo is not None:
            diag_lo, diag_hi = problem.mask.diag_lo, problem.mask.diag_hi
            if problem.packing.from_end is not None:
                diag_lo, diag_hi = diag_lo + (len_k - len_q), diag_hi + (len_k - len_q)
        if problem.relative_bias.data is not None:
            # The diagonals of the longest sequence end at the last key, as this one's do.
            relative = problem.relative_bias.data + (problem.seq_len_k - len_k)
    return begin_q, len_q, begin_k, len_k, diag_lo, diag_hi, relative, 0 * sequence


def own(problem: Any, batch: Any, found: Any) -> Any:
    """Returns the Problem of sequence number ``batch``, and its batch entry; without packing both as they are.

    Args:
        problem: Problem of the call.
        batch: int32.
        found: what :func:`numbers` returned.
    """
    if _absent(problem.packing.starts_q):
        return problem, batch
    begin_q, len_q, begin_k, len_k, diag_lo, diag_hi, relative, entry = found
    parts = {"packing": _replaced(problem.packing, begin_q=begin_q, begin_k=begin_k)}
    if not _absent(problem.mask.diag_lo):
        parts["mask"] = _replaced(problem.mask, diag_lo=diag_lo, diag_hi=diag_hi)
    if not _absent(problem.relative_bias.data):
        parts["relative_bias"] = _replaced(problem.relative_bias, data=relative)
    if not _absent(problem.dropout.state):
        parts["dropout"] = _replaced(problem.dropout, sequence=batch)
    return _replaced(problem, seq_len_q=len_q, seq_len_k=len_k, **parts), entry


@triton.jit
def past_end(problem, row_begin):
    """Returns whether a block of queries lies beyond its sequence, which only packed ones do: the longest has it."""
    past = False
    if problem.packing.starts_q is not None:
        past = row_begin >= problem.seq_len_q
    return past


@triton.jit
def past_last_key(problem, column_begin):
    """Returns the same of a tile of keys."""
    past = False
    if problem.packing.starts_q is not None:
        past = column_begin >= problem.seq_len_k
    return past


@triton.jit
def plane_of(problem, plane, head):
    """Returns which of the planes that a tensor has is that of a head: packed sequences share those of the heads."""
    found = plane
    if problem.packing.starts_q is not None:
        found = head
    return found


@triton.jit
def queries(problem, view):
    """Returns where a View of [..., queries, ...] has those of the sequence, for :func:`at`."""
    data = 0
    if problem.packing.starts_q is not None and view.data is not None:
        data = view.data + problem.packing.begin_q * view.row
    return data


@triton.jit
def keys(problem, view):
    """Returns where a View of [..., keys, ...] has those of the sequence, for :func:`at`."""
    data = 0
    if problem.packing.starts_q is not None and view.data is not None:
        data = view.data + problem.packing.begin_k * view.row
    return data


@triton.jit
def key_row(problem, row):
    """Returns which row of the tensor is key number ``row`` of the sequence, int32: a descriptor is of the tensor."""
    found = row
    if problem.packing.starts_q is not None:
        found = row + problem.packing.begin_k.to(tl.int32)
    return found


def at(problem: Any, view: Any, data: Any) -> Any:
    """Returns a View that begins with the rows of the sequence, at ``data``; without packing as it is."""
    return view if _absent(problem.packing.starts_q) or _absent(view.data) else _replaced(view, data=data)


@triton.jit
def first_row(problem, batch, head):
    """Returns where the numbers of a head's queries begin, int64: [batch, num_heads_q, seq_len_q], or packed
    [num_heads_q, tokens_q]."""
    if problem.packing.starts_q is not None:
        first = head.to(tl.int64) * problem.packing.tokens_q + problem.packing.begin_q
    else:
        first = (batch * problem.num_heads_q + head).to(tl.int64) * problem.seq_len_q
    return first


def _absent(value: Any) -> bool:
    return value is None or (isinstance(value, tl.constexpr) and value.value is None)


def _replaced(values: Any, **changes: Any) -> Any:
    """Returns a named tuple with some of its fields replaced, in the interpreter's form or the compiler's."""
    if not isinstance(values, tl.tuple):
        return values._replace(**changes)
    names = values.type.fields
    found = [changes.get(name, value) for name, value in zip(names, values.values, strict=True)]
    return tl.tuple(found, tl.tuple_type([value.type for value in found], names))


# To the compiler they are functions of the language, which run while it compiles: what a @jit function returns may not
# hold a None.
own.__triton_builtin__ = at.__triton_builtin__ = True  # type: ignore[attr-defined]
