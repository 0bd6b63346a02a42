"""Whether a peer computes what the workload says: its answer beside float64's, before it is timed.

Loosely: how exact a peer is, is its own affair; one that computes something else is none.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastattn.tools import eager
from fastattn.tools.bench import model, module
from fastattn.tools.bench.case import relative
from fastattn.tools.bench.linear_cross_entropy import loss_reference
from fastattn.tools.bench.packed import packed_distance, paged_distance
from fastattn.tools.bench.positions import embedding_reference, rotary_reference
from fastattn.tools.bench.workload import (
    AttentionWorkload,
    DecodeWorkload,
    EmbeddingWorkload,
    FeedForwardWorkload,
    LossWorkload,
    ModelWorkload,
    ModuleWorkload,
    PackedWorkload,
    PagedWorkload,
    RotaryWorkload,
    SoftmaxWorkload,
    Workload,
)

#: Of the largest element: ten times what fastattn's own answers are allowed, and less than a smaller dtype's rounding.
TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 1e-1, torch.float16: 2e-2}
# Gradients of a whole model gather the roundings of all its layers.
_MODEL_FACTOR = 3.0
# Queries of every head that an output is compared at, and queries that gradients are summed over at a time.
_QUERIES, _BLOCK = 48, 512
# Of a head: what float64 takes a few seconds for.
_PAIRS = 1 << 26
_ROWS = 64
_SEQUENCES = 2


class _Shape(ValueError):
    """An answer of another shape."""


class Check:
    """Judges answers to one workload; the reference is computed once, for the first of them.

    Attributes:
        workload: what a peer is asked for the answer that is judged.  It is the given one, but for a training step:
            that is smaller and without dropout.
    """

    def __init__(self, workload: Workload) -> None:
        self.workload: Workload = workload
        if isinstance(workload, ModelWorkload) and workload.target is not None:
            self.workload = _without_dropout(workload)
        self._judge: Callable[[Any], float] | None = None

    def error(self, answer: Any) -> float:
        """Returns the largest error over the largest element, of the output or of any gradient; infinite for NaN.

        With dropout, whose draws differ, it is 0 if the answer is as far from the one without as dropout would be.

        Raises:
            ValueError: the answer has another number of tensors, or tensors of another shape.
        """
        if self._judge is None:
            self._judge = _JUDGES[self.workload.family](self.workload)
        return self._judge(answer)

    def wrong(self, answer: Any) -> str | None:
        """Returns what is wrong with an answer; None if nothing is."""
        return self.judged(answer)[1]

    def judged(self, answer: Any) -> tuple[float, str | None]:
        """Returns an answer's error, and what is wrong with it; None if nothing is."""
        factor = _MODEL_FACTOR if self.workload.family == "model" else 1.0
        limit = TOLERANCE[self.workload.dtype] * factor
        try:
            error = self.error(answer)
        except _Shape as shape:
            return float("inf"), f"wrong answer: {shape}"
        return error, None if error <= limit else f"wrong answer: off by {error:.0e} of the largest element"


def _compared(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    _require([tuple(t.shape) for t in found], [tuple(t.shape) for t in wanted])
    return max(relative(f, w) for f, w in zip(found, wanted, strict=True))


def _require(got: Any, expected: Any) -> None:
    if got != expected:
        raise _Shape(f"of shape {got}, expected {expected}")


def _tensors(answer: Any) -> list[Tensor]:
    return [answer] if isinstance(answer, Tensor) else list(answer)


def _attention(work: AttentionWorkload) -> Callable[[Any], float]:
    return _attention_gradients(work) if work.backward else _attention_output(work)


def _attention_output(work: AttentionWorkload) -> Callable[[Any], float]:
    rows = _some_rows(work)
    query, key, value, *bias = (t.double() for t in work.tensors)
    wanted = _block(work, [query[:, :, rows], key, value, *(t[:, :, rows] for t in bias)], rows)

    def judge(answer: Tensor) -> float:
        _require(tuple(answer.shape), tuple(work.query.shape))
        return _distance(work, [answer[:, :, rows]], [wanted])

    return judge


def _attention_gradients(work: AttentionWorkload) -> Callable[[Any], float]:
    """All gradients of the last sequence's last head of keys; a bias, which sequences share, gathers all of them.

    Of a call too large for that, the gradients of some queries alone: those of keys sum over all queries.
    """
    group = work.query.shape[1] // work.key.shape[1]
    batch = slice(None) if work.bias is not None else slice(-1, None)
    queries, keys = (batch, slice(-group, None)), (batch, slice(-1, None))
    parts = [queries, keys, keys, *[(slice(None), slice(-group, None))] * (len(work.tensors) - 3)]
    leaves = [t[part].double().requires_grad_() for t, part in zip(work.tensors, parts, strict=True)]
    lengths = None if work.key_lengths is None else work.key_lengths[batch]
    part = replace(work, query=work.query[queries], key=work.key[keys], value=work.value[keys], key_lengths=lengths)
    seq_q, seq_k = work.query.shape[2], work.key.shape[2]
    whole = seq_q * seq_k <= _PAIRS
    rows = torch.arange(seq_q) if whole else _some_rows(work)
    wanted = [torch.zeros_like(t) for t in leaves]
    for block in rows.split(_BLOCK):
        query, key, value, *bias = leaves
        out = _block(part, [query[:, :, block], key, value, *(t[:, :, block] for t in bias)], block)
        grads = torch.autograd.grad(out, leaves, work.dout[queries][:, :, block].double())
        for sum_, grad in zip(wanted, grads, strict=True):
            sum_ += grad
    # Keys and values have no rows of queries.
    compared = [(k, slice(None)) for k in (1, 2) if whole] + [(k, rows) for k in range(len(leaves)) if k not in (1, 2)]

    def judge(answer: Any) -> float:
        found = _tensors(answer)
        _require([tuple(t.shape) for t in found], [tuple(t.shape) for t in work.tensors])
        pairs = [(found[k][parts[k]][:, :, at], wanted[k][:, :, at]) for k, at in compared]
        return _distance(work, *zip(*pairs, strict=True))

    return judge


def _some_rows(work: AttentionWorkload) -> Tensor:
    seq_q = work.query.shape[2]
    return torch.linspace(0, seq_q - 1, min(seq_q, _QUERIES)).long()


def _block(work: AttentionWorkload, tensors: Sequence[Tensor], rows: Tensor) -> Tensor:
    """Returns float64's output for some queries; ``tensors`` hold these alone."""
    query, key, value, *bias = tensors
    keys = torch.arange(key.shape[2], device=key.device)
    distance = rows.to(key.device)[:, None] - keys
    visible = torch.ones_like(distance, dtype=torch.bool)
    if work.causal or work.window is not None:
        visible &= distance >= 0
    if work.window is not None:
        visible &= distance < work.window
    if work.key_lengths is not None:
        visible = visible & (keys < work.key_lengths[:, None, None, None])
    return eager.attention(query, key, value, visible=visible, bias=bias[0] if bias else None)[0]


def _distance(work: AttentionWorkload, found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    if not work.dropout_p:
        return _compared(found, wanted)
    # A weight becomes 0 or 1 / (1 - p) of itself, which has this standard deviation; so has a sum over many.
    expected = (work.dropout_p / (1.0 - work.dropout_p)) ** 0.5
    noise = [((f - w).square().mean() / w.square().mean()).sqrt().item() for f, w in zip(found, wanted, strict=True)]
    return 0.0 if all(0.5 * expected < n < 2.0 * expected for n in noise) else float("inf")


def _decode(work: DecodeWorkload) -> Callable[[Any], float]:
    return _attention_output(AttentionWorkload(work.query, work.key, work.value, work.query))


def _packed(work: PackedWorkload) -> Callable[[Any], float]:
    def judge(answer: Any) -> float:
        found = _tensors(answer)
        _require(
            [tuple(t.shape) for t in found], [tuple(t.shape) for t in (work.tensors if work.backward else [work.query])]
        )
        return packed_distance(work, answer)

    return judge


def _paged(work: PagedWorkload) -> Callable[[Any], float]:
    def judge(answer: Tensor) -> float:
        _require(tuple(answer.shape), tuple(work.query.shape))
        return paged_distance(work, answer)

    return judge


def _softmax(work: SoftmaxWorkload) -> Callable[[Any], float]:
    # Rows know nothing of each other, but all of them have a part in a weight's gradient.
    rows = slice(None) if work.backward and work.weight is not None else slice(0, _ROWS)
    columns = (work.input.shape[-1],)
    ops: dict[str, Callable[..., Tensor]] = {
        "softmax": lambda x: x.softmax(-1),
        "log_softmax": lambda x: x.log_softmax(-1),
        "layer_norm": lambda x, weight, bias: F.layer_norm(x, columns, weight, bias),
        "rms_norm": lambda x, weight: F.rms_norm(x, columns, weight, 1e-5),
    }
    wide = [work.input[rows].double(), *(t.double() for t in work.tensors[1:])]
    wanted = _answers(ops[work.op], wide, work.dout[rows], work.backward)

    def judge(answer: Any) -> float:
        found = _tensors(answer)
        _require(tuple(found[0].shape), tuple(work.input.shape))
        return _compared([found[0][rows], *found[1:]], wanted)

    return judge


def _feed_forward(work: FeedForwardWorkload) -> Callable[[Any], float]:
    def formula(*tensors: Tensor) -> Tensor:
        gate = tensors[5] if len(tensors) > 5 else None
        return eager.feed_forward(*tensors[:5], activation=work.activation, weight_gate=gate)

    wanted = _answers(formula, [t.double() for t in work.tensors], work.dout, work.backward)
    return lambda answer: _compared(_tensors(answer), wanted)


def _loss(work: LossWorkload) -> Callable[[Any], float]:
    wanted = loss_reference(work)
    return lambda answer: _compared(_tensors(answer), wanted)


def _rotary(work: RotaryWorkload) -> Callable[[Any], float]:
    wanted = rotary_reference(work)
    return lambda answer: _compared(_tensors(answer), wanted)


def _embedding(work: EmbeddingWorkload) -> Callable[[Any], float]:
    wanted = embedding_reference(work)
    return lambda answer: _compared(_tensors(answer), wanted)


def _answers(function: Callable[..., Tensor], wide: list[Tensor], dout: Tensor, backward: bool) -> list[Tensor]:
    if not backward:
        return [function(*wide)]
    leaves = [t.requires_grad_() for t in wide]
    return list(torch.autograd.grad(function(*leaves), leaves, dout.double()))


def _module(work: ModuleWorkload) -> Callable[[Any], float]:
    wide = replace(work, input=work.input.double(), training=True)
    # In training mode there is no fast path, and no dropout in this module.
    wanted = _outputs(module.call(module.stock(work, torch.float64), wide)(), work.backward)
    return lambda answer: _compared(_outputs(answer, work.backward), wanted)


def _outputs(answer: Any, backward: bool) -> list[Tensor]:
    """Output and weights, or all gradients in one: that of the keys' bias cancels to nothing."""
    found = [t.detach() for t in answer if t is not None]
    return [torch.cat([t.flatten() for t in found])] if backward else found


def _model(work: ModelWorkload) -> Callable[[Any], float]:
    wide = replace(work, stock=copy.deepcopy(work.stock).double())
    if work.target is not None:
        wanted = _outputs(model.stock_call(wide)(), backward=True)
        return lambda answer: _compared(_outputs(answer, backward=True), wanted)
    bos = work.source.new_full((work.source.shape[0], 1), work.stock.config.bos_id)

    @torch.no_grad()
    def judge(answer: Any) -> float:
        """By how much float64 likes the chosen tokens less than the best ones: close calls may go either way."""
        found = torch.as_tensor(answer)
        if found.shape[1] == work.new_tokens + 1:
            found = found[:, 1:]  # with <bos>
        _require(tuple(found.shape), (work.source.shape[0], work.new_tokens))
        logits = wide.stock.eval()(work.source, torch.cat((bos, found[:, :-1]), dim=1))
        return relative(logits.gather(-1, found[..., None])[..., 0], logits.amax(-1))

    return judge


def _without_dropout(work: ModelWorkload) -> ModelWorkload:
    stock = copy.deepcopy(work.stock)
    for part in stock.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        elif isinstance(part, nn.MultiheadAttention):
            part.dropout = 0.0
    assert work.target is not None
    return replace(work, stock=stock, source=work.source[:_SEQUENCES], target=work.target[:_SEQUENCES])


_JUDGES: dict[str, Callable[[Any], Callable[[Any], float]]] = {
    "attention": _attention,
    "decode": _decode,
    "packed": _packed,
    "paged": _paged,
    "softmax": _softmax,
    "feed_forward": _feed_forward,
    "linear_cross_entropy": _loss,
    "rotary": _rotary,
    "embedding": _embedding,
    "module": _module,
    "model": _model,
}
