"""Attention forward on Hopper with its warps shared out, in Gluon, Triton's language of layouts and barriers.

One warp lets the copy engine fetch queries, keys and values; two or three groups of four warps multiply 64 queries
each. A group hands the tensor cores the scores of the next tile and the values of the last one, and computes
exponentials meanwhile.
Masks, and which keys a block sees, are ``masking.py``'s, which Gluon compiles as they are. ``hopper.py`` launches it.

Source: Shah et al., "FlashAttention-3", 2024, algorithms 1 and 2.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from fastattn.kernels import masking
from fastattn.kernels.running import finish, over_seen_keys
from fastattn.kernels.tile import LN_2, load_rows, store_rows

# Queries of a group: an instruction of the tensor cores takes 64 rows.
EACH = gl.constexpr(64)


@triton.jit
def _block(problem, number, KEYS: tl.constexpr, GROUPS: tl.constexpr):
    """Returns of a block of queries where it begins, its plane, batch entry and head, the end of its keys, and
    ``parts``: ``(begin, free_begin, free_end, bound, steps)`` of its tiles of keys, of which the first ``bound`` are
    those that not every query sees. There is at least one, which is masked."""
    rows: tl.constexpr = GROUPS * EACH
    blocks = tl.cdiv(problem.seq_len_q, rows)
    # The last ones first, because under a causal mask they see most.
    row_begin = (blocks - 1 - number % blocks) * rows
    plane = number // blocks
    head, batch = plane % problem.num_heads_q, plane // problem.num_heads_q
    limit = masking.key_end(problem.mask, batch, problem.seq_len_k)
    row_end = tl.minimum(row_begin + rows, problem.seq_len_q)
    begin, free_begin, free_end, end = masking.key_parts(problem.mask, row_begin, row_end, limit, KEYS)
    gap = free_end - free_begin
    bound = tl.maximum(tl.cdiv(end - begin - gap, KEYS), 0)
    parts = (begin, free_begin, free_end, bound, tl.maximum(bound + gap // KEYS, 1))
    return row_begin, plane, batch, head, limit, parts


@triton.jit
def _first_key(parts, step, KEYS: tl.constexpr):
    """Returns the first key of a step's tile."""
    begin, free_begin, free_end, bound, _ = parts
    at = begin + step * KEYS
    masked = tl.where(at < free_begin, at, at + (free_end - free_begin))
    # A block without any tile takes one that it sees nothing of.
    return tl.where((step < bound) | (free_end == free_begin), masked, free_begin + (step - bound) * KEYS)


@gluon.jit
def _fetch(box, coordinates, to, full, empty, phase):
    """Lets the copy engine fill a buffer once it is empty, for the ``phase``-th time."""
    # A barrier that nothing has passed yet looks as if an odd phase had.
    mbarrier.wait(empty, (phase & 1) ^ 1)
    mbarrier.expect(full, box.block_type.nbytes)
    tma.async_copy_global_to_shared(box, coordinates, full, to)


@gluon.jit
def _produce(boxes, buffers, barriers, problem, blocks, KEYS: gl.constexpr, STAGES: gl.constexpr, GROUPS: gl.constexpr):
    """Fetches what every block of this program reads: its queries, then keys and values in the order of their use."""
    query_box, key_box, value_box = boxes
    queries, keys, values = buffers
    q_full, q_empty, k_full, k_empty, v_full, v_empty = barriers
    fetched = 0
    for number in range(gl.program_id(0), blocks, gl.num_programs(0)):
        served = number // gl.num_programs(0)
        row_begin, _, batch, head, _, parts = _block(problem, number, KEYS, GROUPS)
        for group in gl.static_range(GROUPS):
            _fetch(
                query_box, [batch, head, row_begin + group * EACH, 0], queries.index(group), q_full.index(group),
                q_empty.index(group), served,
            )  # fmt: skip
        for step in range(parts[4]):
            stage, phase = (fetched + step) % STAGES, (fetched + step) // STAGES
            at = [batch, head // problem.group_size, _first_key(parts, step, KEYS), 0]
            _fetch(key_box, at, keys.index(stage), k_full.index(stage), k_empty.index(stage), phase)
            _fetch(value_box, at, values.index(stage), v_full.index(stage), v_empty.index(stage), phase)
        fetched += parts[4]


@gluon.jit
def _weigh(
    product, top, total, problem, batch, head, rows, start, limit, MASKED: gl.constexpr, KEYS: gl.constexpr,
    SCORES: gl.constexpr,
):  # fmt: skip
    """Returns the weights of a tile's products [EACH, KEYS], by what to multiply what came before, and the new maximum
    and sum of each row [EACH]; see ``running.add_tiles``."""
    if MASKED:
        columns = (start + gl.arange(0, KEYS, layout=gl.SliceLayout(0, SCORES)))[None, :]
        seen = masking.visible(
            problem.mask, batch, head, rows[:, None], columns, limit, problem.seq_len_q, problem.seq_len_k
        )
        product = gl.where(seen, product, float("-inf"))
    now = gl.maximum(top, gl.max(product, axis=1) * problem.scale)
    # -inf minus -inf is NaN: a row that has seen nothing yet subtracts 0.
    shift = gl.where(now == float("-inf"), 0.0, now)
    weights = gl.exp2(product * problem.scale - shift[:, None])
    alpha = gl.exp2(top - shift)
    return weights, alpha, now, total * alpha + gl.sum(weights, axis=1)


@gluon.jit
def _steps(
    state, q, buffers, barriers, fetched, first, last, problem, batch, head, rows, parts, limit, MASKED: gl.constexpr,
    KEYS: gl.constexpr, STAGES: gl.constexpr, SCORES: gl.constexpr, OUT: gl.constexpr,
):  # fmt: skip
    """Moves a state over steps [first, last): ``(out, top, total, weights)``, the last of which the values of the step
    before have yet to be multiplied with."""
    _, keys, values = buffers
    _, _, k_full, k_empty, v_full, v_empty = barriers
    out, top, total, weights = state
    for step in range(first, last):
        at, before = (fetched + step) % STAGES, (fetched + step - 1) % STAGES
        phase_before = (fetched + step - 1) // STAGES & 1
        mbarrier.wait(k_full.index(at), (fetched + step) // STAGES & 1)
        nothing = gl.zeros([EACH, KEYS], gl.float32, SCORES)
        scores = warpgroup_mma(q, keys.index(at).permute((1, 0)), nothing, use_acc=False, is_async=True)
        mbarrier.wait(v_full.index(before), phase_before)
        adding = warpgroup_mma(weights, values.index(before), out, is_async=True)
        product = warpgroup_mma_wait(1, deps=[scores])
        mbarrier.arrive(k_empty.index(at), count=1)
        start = _first_key(parts, step, KEYS)
        next_weights, alpha, top, total = _weigh(
            product, top, total, problem, batch, head, rows, start, limit, MASKED, KEYS, SCORES
        )
        next_weights = gl.convert_layout(next_weights.to(weights.dtype), gl.DotOperandLayout(0, OUT, 2))
        # What has come comes again at once; but the assembler moves no exponential past a loop, and past a wait for the
        # tensor cores it does.
        mbarrier.wait(v_full.index(before), phase_before)
        out = warpgroup_mma_wait(0, deps=[adding])
        mbarrier.arrive(v_empty.index(before), count=1)
        out = out * gl.convert_layout(alpha, gl.SliceLayout(1, OUT))[:, None]
        weights = next_weights
    return out, top, total, weights


@gluon.jit
def _consume(
    group: gl.constexpr, known, KEYS: gl.constexpr, DIM: gl.constexpr, STAGES: gl.constexpr, GROUPS: gl.constexpr
):
    """Writes out, lse and flags of one group's queries of every block of this program."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, SCORES)
    out_box, buffers, barriers, lse, flags, problem, blocks = known
    queries, keys, values = buffers
    q_full, q_empty, k_full, k_empty, v_full, v_empty = barriers
    q = queries.index(group)
    fetched = 0
    for number in range(gl.program_id(0), blocks, gl.num_programs(0)):
        row_begin, plane, batch, head, limit, parts = _block(problem, number, KEYS, GROUPS)
        bound, steps = parts[3], parts[4]
        row_begin += group * EACH
        rows = row_begin + gl.arange(0, EACH, layout=ROW)
        mbarrier.wait(q_full.index(group), number // gl.num_programs(0) & 1)
        at = fetched % STAGES
        mbarrier.wait(k_full.index(at), fetched // STAGES & 1)
        nothing = gl.zeros([EACH, KEYS], gl.float32, SCORES)
        scores = warpgroup_mma(q, keys.index(at).permute((1, 0)), nothing, use_acc=False, is_async=True)
        product = warpgroup_mma_wait(0, deps=[scores])
        mbarrier.arrive(k_empty.index(at), count=1)
        weights, _, top, total = _weigh(
            product, gl.full([EACH], float("-inf"), gl.float32, ROW), gl.full([EACH], 0.0, gl.float32, ROW), problem,
            batch, head, rows, _first_key(parts, 0, KEYS), limit, True, KEYS, SCORES,
        )  # fmt: skip
        weights = gl.convert_layout(weights.to(q.dtype), gl.DotOperandLayout(0, OUT, 2))
        state = (gl.zeros([EACH, DIM], gl.float32, OUT), top, total, weights)
        state = _steps(
            state, q, buffers, barriers, fetched, 1, bound, problem, batch, head, rows, parts, limit, True, KEYS,
            STAGES, SCORES, OUT,
        )  # fmt: skip
        state = _steps(
            state, q, buffers, barriers, fetched, gl.maximum(bound, 1), steps, problem, batch, head, rows, parts,
            limit, False, KEYS, STAGES, SCORES, OUT,
        )  # fmt: skip
        out, top, total, weights = state
        fetched += steps
        at = (fetched - 1) % STAGES
        mbarrier.wait(v_full.index(at), (fetched - 1) // STAGES & 1)
        adding = warpgroup_mma(weights, values.index(at), out, is_async=True)
        out = warpgroup_mma_wait(0, deps=[adding])
        mbarrier.arrive(v_empty.index(at), count=1)
        # As running.finish ends, which makes its tensors without a layout.
        empty = total == 0
        total = gl.where(empty, 1.0, total)
        shift = gl.where(top == float("-inf"), 0.0, top)
        log_total = gl.where(empty, float("-inf"), shift.to(gl.float64) + gl.log2(total).to(gl.float64))
        log_total = gl.where(top == float("inf"), float("inf"), log_total)
        factor = gl.where(empty, 0.0, gl.div_rn(1.0, total))
        place, inside = gl.cast(plane, gl.int64) * problem.seq_len_q + rows, rows < problem.seq_len_q
        gl.store(lse + place, log_total * LN_2, mask=inside)
        out = out * gl.convert_layout(factor, gl.SliceLayout(1, OUT))[:, None]
        if flags is not None:
            bad = gl.max((out - out != 0).to(gl.int32), axis=1)
            gl.store(flags + place, gl.convert_layout(bad, ROW), mask=inside)
        # Its queries have been read: their place takes the result, and the copy engine cuts off what is beyond the end.
        q.store(out.to(q.dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(out_box, [batch, head, row_begin, 0], q)
        tma.store_wait(0)
        mbarrier.arrive(q_empty.index(group), count=1)


@gluon.jit
def _barriers(count: gl.constexpr, arrivals: gl.constexpr):
    made = gl.allocate_shared_memory(gl.int64, [count, 1], mbarrier.MBarrierLayout())
    for at in gl.static_range(count):
        mbarrier.init(made.index(at), count=arrivals)
    return made


@gluon.jit
def attention_fwd_hopper_kernel(
    query_box, key_box, value_box, out_box, lse, flags, problem, blocks, KEYS: gl.constexpr, DIM: gl.constexpr,
    STAGES: gl.constexpr, GROUPS: gl.constexpr,
):  # fmt: skip
    """Writes out and lse of blocks of queries of one head, every ``num_programs``-th of them.

    Args:
        query_box: descriptor of [batch, num_heads_q, seq_len_q, head_dim] in boxes of EACH rows; likewise ``out_box``.
        key_box: descriptor of [batch, num_heads_kv, seq_len_k, head_dim] in boxes of KEYS rows; likewise ``value_box``.
        lse: float64 [batch, num_heads_q, seq_len_q].
        flags: int32 like ``lse``, nonzero where an output is not finite; None where no mask hides anything.
        problem: Problem.
        blocks: of queries, of all heads.
        KEYS: keys a tile.
        DIM: power of two that holds head_dim.
        STAGES: tiles of keys, and as many of values, that are in shared memory at once; 2 at least.
        GROUPS: of warps that multiply, 2 or 3, each EACH queries of a block.
    """
    dtype: gl.constexpr = query_box.dtype
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([EACH, DIM], dtype)
    queries = gl.allocate_shared_memory(dtype, [GROUPS, EACH, DIM], layout)
    keys = gl.allocate_shared_memory(dtype, [STAGES, KEYS, DIM], layout)
    values = gl.allocate_shared_memory(dtype, [STAGES, KEYS, DIM], layout)
    buffers = (queries, keys, values)
    # A tile of keys is empty once all groups have said so.
    barriers = (
        _barriers(GROUPS, 1), _barriers(GROUPS, 1), _barriers(STAGES, 1), _barriers(STAGES, GROUPS),
        _barriers(STAGES, 1), _barriers(STAGES, GROUPS),
    )  # fmt: skip
    boxes = (query_box, key_box, value_box)
    known = (out_box, buffers, barriers, lse, flags, problem, blocks)
    # A thread that fetches needs 24 registers; those that multiply share what is left of 65,536, the first group, which
    # is not listed, getting the rest.
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (_consume, (0, known, KEYS, DIM, STAGES, GROUPS)),
                (_consume, (1, known, KEYS, DIM, STAGES, GROUPS)),
                (_produce, (boxes, buffers, barriers, problem, blocks, KEYS, STAGES, GROUPS)),
            ],
            [4, 1],
            [240, 24],
        )
    else:
        gl.warp_specialize(
            [
                (_consume, (0, known, KEYS, DIM, STAGES, GROUPS)),
                (_consume, (1, known, KEYS, DIM, STAGES, GROUPS)),
                (_consume, (2, known, KEYS, DIM, STAGES, GROUPS)),
                (_produce, (boxes, buffers, barriers, problem, blocks, KEYS, STAGES, GROUPS)),
            ],
            [4, 4, 1],
            [160, 160, 24],
        )


@triton.jit
def attention_fwd_hopper_repair_kernel(
    query, key, value, out, lse, flags, problem, head_dim, head_dim_v, KEYS: tl.constexpr, DIM: tl.constexpr,
    DIM_V: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Computes the queries of a group again where any is flagged, touching only what may be seen, lest a hidden value
    that is not finite reach them; mostly none is.

    Grid: GROUPS times the kernel's blocks, with its arguments.
    """
    rows_each: tl.constexpr = EACH
    row_begin, plane, batch, head, limit, parts = _block(problem, tl.program_id(0) // GROUPS, KEYS, GROUPS)
    row_begin += tl.program_id(0) % GROUPS * rows_each
    rows = row_begin + tl.arange(0, rows_each)
    place, inside = plane.to(tl.int64) * problem.seq_len_q + rows, rows < problem.seq_len_q
    if tl.max(tl.load(flags + place, mask=inside, other=0)) == 0:
        return
    q = load_rows(query, batch, head, row_begin, problem.seq_len_q, head_dim, rows_each, DIM)
    end = parts[0] + (parts[3] * KEYS + parts[2] - parts[1])
    state = over_seen_keys(
        q, key, value, None, problem, batch, head // problem.group_size, head, rows[:, None], parts[0], end, limit,
        head_dim, head_dim_v, "ieee", True, 0, rows_each, DIM, DIM_V,
    )  # fmt: skip
    result, log_total = finish(state, None, head, problem.dropout, q.dtype)
    store_rows(out, batch, head, row_begin, problem.seq_len_q, head_dim_v, result, rows_each, DIM_V)
    tl.store(lse + place, log_total * LN_2, mask=inside)
