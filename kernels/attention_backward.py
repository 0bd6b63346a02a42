"""Attention backward, without atomics: every sum has one owner and one order.

    S = Q K^T, P = exp(S - lse), dP = dO V^T, dS = P (dP - delta);  dV = P^T dO, dK = dS^T Q, dQ = dS K

``_attention_bwd_rows_kernel`` prepares a few numbers a query. ``attention_bwd_keys_kernel`` owns a tile of keys and
values, goes over the queries that see it, and leaves dS in a slab (``slabs.py``); ``attention_bwd_queries_kernel`` owns
a block of queries and multiplies slabs by keys. Writing dS and reading it again, in 16 bits, takes less than the two
products that would make it anew, and less than adding up dQ in float32 outside of a program would. There are about as
many slabs as programs run at once, so that nothing grows with the square of the sequence.
``attention_backward_repair.py`` looks after infinities, ``attention_bias_backward.py`` has the gradients of biases that
queries and heads share.

Source: Dao, "FlashAttention-2", 2023, algorithm 2.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn.kernels import masking, packing, tiles
from fastattn.kernels.arguments import problem, view
from fastattn.kernels.attention_backward_launches import Grads, Sums
from fastattn.kernels.attention_bias_backward import bias_gradient, relative_bias_gradient
from fastattn.kernels.launch import Configuration, Launch, Tile, architecture, cdiv, launch, padded, precision, start
from fastattn.kernels.replay import replayed
from fastattn.kernels.scores import Statistics, empty_statistics, score_gradients
from fastattn.kernels.slabs import Share
from fastattn.kernels.tile import LOG2_E, accumulator, block_and_plane, load_rows, split_log_total
from fastattn.spec.attention import DIFFERENTIABLE, AttentionCall, empty_output


@triton.jit
def _attention_bwd_rows_kernel(
    query,
    key,
    value,
    out,
    dout,
    lse,
    dlse,
    sinks,
    shift,
    factor,
    delta,
    problem,
    head_dim,
    head_dim_v,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_V: tl.constexpr,
):
    """Writes what the other kernels need of each query: a probability is ``exp2(score - shift) * factor``, and
    ``delta = sum(dout * out) - dlse``.

    The whole powers of two of lse are in the shift and the rest in the factor, so that nothing of lse is rounded away;
    in half precision, which would not notice, all of it is in the shift.
    ``dP - delta`` cancels where few keys share the weight: a block of queries all of whose keys lie in one tile takes
    ``sum(P dP)`` of the very dP that the other kernels compute, so that what should cancel does.

    Grid: blocks of queries times batch * num_heads_q.

    Args:
        query: View of [batch, num_heads_q, seq_len_q, head_dim]; ``out`` and ``dout`` of [..., head_dim_v]; ``key`` and
            ``value`` of [batch, num_heads_kv, seq_len_k, ...].
        lse: float64 [batch, num_heads_q, seq_len_q]; likewise ``dlse``, or None.
        sinks: [num_heads_q], or None.
        shift: like lse, in the dtype of accumulators; likewise ``factor``, or None, and ``delta``.
        problem: Problem.
    """
    block, plane = block_and_plane(problem.seq_len_q, ROWS)
    batch, head = plane // problem.num_heads_q, plane % problem.num_heads_q
    problem, batch = packing.own(problem, batch, packing.numbers(problem, batch))
    dtype: tl.constexpr = accumulator(out.data.dtype.element_ty)
    begin = block * ROWS
    if packing.past_end(problem, begin):
        return
    query = packing.at(problem, query, packing.queries(problem, query))
    key = packing.at(problem, key, packing.keys(problem, key))
    value = packing.at(problem, value, packing.keys(problem, value))
    out = packing.at(problem, out, packing.queries(problem, out))
    dout = packing.at(problem, dout, packing.queries(problem, dout))
    do = load_rows(dout, batch, head, begin, problem.seq_len_q, head_dim_v, ROWS, DIM_V)
    rows = begin + tl.arange(0, ROWS)
    first_row = packing.first_row(problem, batch, head)
    inside = rows < problem.seq_len_q
    log_total = tl.load(lse + first_row + rows, mask=inside, other=float("-inf")) * LOG2_E
    empty = log_total == float("-inf")
    # An empty row has no probabilities, whatever its scores.
    if factor is None:
        whole = tl.where(empty, float("inf"), log_total).to(dtype)
        share = tl.full([ROWS], 1.0, dtype)
    else:
        whole, rest = split_log_total(log_total)
        share = tl.where(empty, 0.0, tl.exp2(rest)).to(dtype)
        whole = whole.to(dtype)

    limit = masking.key_end(problem.mask, batch, problem.seq_len_k)
    row_end = tl.minimum(begin + ROWS, problem.seq_len_q)
    parts = masking.key_parts(problem.mask, begin, row_end, limit, KEYS)
    column_begin, column_end = parts[0], parts[3]
    if column_end - column_begin <= KEYS:
        head_kv = head // problem.group_size
        q = load_rows(query, batch, head, begin, problem.seq_len_q, head_dim, ROWS, DIM)
        k = load_rows(key, batch, head_kv, column_begin, limit, head_dim, KEYS, DIM)
        v = load_rows(value, batch, head_kv, column_begin, limit, head_dim_v, KEYS, DIM_V)
        gradients = score_gradients(
            problem, q, k, v, do, (whole[:, None], share[:, None], 0.0), batch, head, begin, column_begin, limit,
            PRECISION, True, False, ROWS, KEYS,
        )  # fmt: skip
        d = tl.sum(gradients[2], axis=1)
        if sinks is None:
            # They add up to 1 but for rounding, which is as large as what should cancel.
            d /= tl.where(empty, 1.0, tl.sum(gradients[0], axis=1))
    else:
        o = load_rows(out, batch, head, begin, problem.seq_len_q, head_dim_v, ROWS, DIM_V)
        d = tl.sum(o.to(dtype) * do.to(dtype), axis=1)
    if dlse is not None:
        d -= tl.load(dlse + first_row + rows, mask=inside, other=0.0).to(dtype)
    tl.store(shift + first_row + rows, whole, mask=inside)
    if factor is not None:
        tl.store(factor + first_row + rows, share, mask=inside)
    tl.store(delta + first_row + rows, tl.where(empty, 0.0, d), mask=inside)


def _row_launch(
    call: AttentionCall, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None, statistics: Statistics, tile: Tile
) -> Launch:
    inputs = (view(call.query), view(call.key), view(call.value), view(out), view(dout), lse, dlse, call.sinks)
    arguments = (*inputs, *statistics, problem(call), call.query.shape[3], call.value.shape[3])
    batch, num_heads_q, seq_len_q, _ = call.shape
    dims = {"DIM": padded(call.query.shape[3]), "DIM_V": padded(call.value.shape[3])}
    options = {"PRECISION": precision(), "ROWS": tile.rows, "KEYS": tile.columns, **dims, **tile.options}
    return _attention_bwd_rows_kernel, (cdiv(seq_len_q, tile.rows) * batch * num_heads_q,), arguments, options


def keys_table(call: AttentionCall) -> tiles.Table:
    """Returns the table of the keys' kernel for a call."""
    return tiles.BACKWARD_KEYS_RICH if tiles.is_rich(call) else tiles.BACKWARD_KEYS


def _empty_grad(call: AttentionCall, field: str) -> Tensor:
    """Returns room for the gradient of a field, in its order in memory, but where heads share keys."""
    tensor = getattr(call, field)
    plain = call.group_size > 1 and field in ("key", "value")
    return torch.empty_like(tensor, memory_format=torch.contiguous_format if plain else torch.preserve_format)


@replayed
def attention_bwd(
    call: AttentionCall, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None, needed: Sequence[bool]
) -> list[Tensor | None]:
    """Returns the gradients of ``DIFFERENTIABLE`` that are needed, of a call that is not empty."""
    grads = [
        _empty_grad(call, field) if need and getattr(call, field) is not None else None
        for field, need in zip(DIFFERENTIABLE, needed, strict=True)
    ]
    dquery, dkey, dvalue, dbias, drelative_bias, dsinks = grads
    batch, num_heads_q, _, seq_len_k = call.shape
    dout = dout if dout.shape[-1] <= 1 or dout.stride(-1) == 1 else dout.contiguous()
    lse = lse.to(torch.float64).contiguous()
    dlse = None if dlse is None else dlse.to(torch.float64).contiguous()
    statistics = empty_statistics(call, lse)
    device = architecture(call.query.device)
    launch(
        "attention_backward, rows",
        tiles.choose(tiles.SQUARE, call, device),
        lambda tile: start(_row_launch(call, out, lse, dout, dlse, statistics, tile)),
    )

    # Where each query has a bias of its own, its gradient is a tile of the keys' kernel; where all share one, a sum.
    own = dbias is not None and dbias.shape == call.shape
    shared = dbias is not None and not own and dbias.shape[2] == 1 and dbias.shape[3] == seq_len_k > 1
    if dquery is not None or dkey is not None or dvalue is not None or own or shared:
        of_keys = statistics[0].new_empty((batch, num_heads_q, seq_len_k)) if shared else None
        bias = dbias.zero_() if own and dbias is not None else None
        sums = Grads(dquery, dkey, dvalue, bias, of_keys)
        launch(
            "attention_backward, keys",
            tiles.choose(keys_table(call), call, device),
            lambda tile: Sums(call, dout, statistics, sums, tile, device).run(),
        )
        if of_keys is not None and dbias is not None:
            dbias.copy_(of_keys[:, :, None].to(torch.float64).sum_to_size(dbias.shape))

    sink_weight = None
    if call.sinks is not None:
        sink_weight = torch.where(lse.isneginf(), 0.0, (call.sinks.to(lse.dtype)[:, None] - lse).exp())
    if dbias is not None and not own and not shared:
        if dbias.shape[3] == 1:
            # dS of a row adds up to dlse + delta * (the sink's weight): sum(P dP) is sum(dout * out).
            of_rows = torch.zeros_like(lse) if dlse is None else dlse
            if sink_weight is not None:
                of_rows = of_rows + statistics[2] * sink_weight
            of_rows = torch.where(lse.isneginf(), 0.0, of_rows)
            dbias.copy_(of_rows[..., None].sum_to_size(dbias.shape))
        else:
            bias_gradient(call, dout, statistics, dbias)
    if drelative_bias is not None:
        relative_bias_gradient(call, dout, statistics, drelative_bias)
    if dsinks is not None and sink_weight is not None:
        dsinks.copy_(-(sink_weight * statistics[2]).sum(dim=(0, 2)))
    return grads


def configurations(architecture: int) -> Iterator[Configuration]:
    """Yields each kernel with every tile of its table for an architecture."""
    for name, call, tile in _examples(tiles.SQUARE, architecture, _is_masked):
        out, lse = empty_output(call)
        kernel, _, arguments, options = _row_launch(call, out, lse, out, lse, empty_statistics(call, lse), tile)
        yield Configuration(f"attention backward, rows {name}", kernel, arguments, options)
    for table in (tiles.BACKWARD_KEYS, tiles.BACKWARD_KEYS_RICH):
        for name, call, tile in _examples(table, architecture, partial(_takes, table)):
            sums, share = _sums(call, tile, architecture)
            kernel, _, arguments, options = sums.keys_launch(share, 0)
            yield Configuration(f"attention backward, keys {name}", kernel, arguments, options)
            if table is tiles.BACKWARD_KEYS_RICH and tile == tiles.choose(table, call, architecture)[0]:
                kernel, _, arguments, options = sums.repair_launch(0, sums.planes)
                yield Configuration(f"attention backward, repair {name}", kernel, arguments, options)
    for name, call, tile in _examples(tiles.BACKWARD_QUERIES, architecture, _has_own_queries):
        sums, share = _sums(call, tiles.choose(keys_table(call), call, architecture)[0], architecture)
        kernel, _, arguments, options = sums.queries_launch(share, (0, 1), False, tile)
        yield Configuration(f"attention backward, queries {name}", kernel, arguments, options)


def _examples(
    table: tiles.Table, architecture: int, wanted: Callable[[AttentionCall], bool]
) -> Iterator[tuple[str, AttentionCall, Tile]]:
    both = (tiles.calls(table, architecture, packed, wanted) for packed in (False, True))
    return itertools.chain.from_iterable(both)


def _is_masked(call: AttentionCall) -> bool:
    return problem(call).mask.diag_lo is not None


def _takes(table: tiles.Table, call: AttentionCall) -> bool:
    return keys_table(call) is table


def _has_own_queries(call: AttentionCall) -> bool:
    """Returns whether the queries' kernel differs: it knows of masks, but nothing else of scores."""
    return call.starts_q is None or tiles.is_rich(call)


def _sums(call: AttentionCall, tile: Tile, architecture: int) -> tuple[Sums, Share]:
    """Returns the sums of an example of a call, and their first share."""
    out, lse = empty_output(call)
    statistics = empty_statistics(call, lse)
    grads = Grads(call.query, call.key, call.value, call.bias, None)
    sums = Sums(call, out, statistics, grads, tile, architecture)
    return sums, next(sums.plan.shares(0, sums.planes))
