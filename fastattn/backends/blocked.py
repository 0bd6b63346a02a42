"""Feed-forward and linear + cross entropy on PyTorch's matrix products, a block at a time.

Serves the CPU backend where it has no products of its own: the feed-forward in float64, and the loss.  Nothing here
holds [tokens, ff_dim] or [tokens, vocab_size].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.backends.extension import kernels
from fastattn.backends.products import blocks, part, wide_product
from fastattn.reference.feed_forward import ACTIVATION_FUNCTIONS
from fastattn.reference.linear_cross_entropy import reduce
from fastattn.spec.attention import lse_dtype
from fastattn.spec.feed_forward import FeedForwardCall
from fastattn.spec.linear_cross_entropy import LinearCrossEntropyCall, all_count

# Elements of a block of hidden activations.
_HIDDEN_BLOCK = 1 << 22

# Classes and elements of a block of logits.
_VOCAB_BLOCK = 4096
_LOGITS_BLOCK = 1 << 22

# From the gradient of the activation and what was activated to the latter's gradient.
_ACTIVATION_BACKWARD: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "relu": lambda grad, x: torch.ops.aten.threshold_backward(grad, x, 0),
    "gelu": lambda grad, x: torch.ops.aten.gelu_backward(grad, x),
    "gelu_tanh": lambda grad, x: torch.ops.aten.gelu_backward(grad, x, approximate="tanh"),
    "silu": lambda grad, x: torch.ops.aten.silu_backward(grad, x),
}


def feed_forward(call: FeedForwardCall) -> Tensor:
    """Returns the feed-forward's result [..., out_dim]."""
    x = call.input.reshape(call.num_tokens, -1)
    parts = [
        F.linear(_hidden(call, x[rows], rows)[0], call.weight_out, call.bias_out)
        for rows in blocks(call.num_tokens, _HIDDEN_BLOCK // call.ff_dim)
    ]
    out = parts[0] if len(parts) == 1 else torch.cat(parts)
    return out.view(*call.input.shape[:-1], out.shape[1])


def feed_forward_backward(call: FeedForwardCall, dout: Tensor, needed: Sequence[bool]) -> list[Tensor | None]:
    """Returns the gradients of ``DIFFERENTIABLE`` that are needed, recomputing the hidden activation."""
    need_x, need_in, need_bias_in, need_gate, need_bias_gate, need_out, need_bias_out = needed
    x, dout = call.input.reshape(call.num_tokens, -1), dout.reshape(call.num_tokens, -1)
    dx = torch.empty_like(x) if need_x else None
    dweight_in, dweight_gate, dweight_out = _Sum(), _Sum(), _Sum()
    dbias_in, dbias_gate, dbias_out = _Sum(), _Sum(), _Sum()
    for rows in blocks(call.num_tokens, _HIDDEN_BLOCK // call.ff_dim):
        hidden, before, gate, keep = _hidden(call, x[rows], rows)
        dhidden = wide_product(dout[rows], call.weight_out)
        if keep is not None:
            dhidden = (dhidden / (1.0 - call.dropout_p)).where(keep, 0.0)
        if need_out:
            dweight_out.add(wide_product(dout[rows], hidden, left_transposed=True))
        if need_bias_out:
            dbias_out.add(dout[rows].sum(0, dtype=lse_dtype(dout.dtype)))
        dbefore = _ACTIVATION_BACKWARD[call.activation](dhidden if gate is None else dhidden * gate, before)
        if need_in:
            dweight_in.add(wide_product(dbefore, x[rows], left_transposed=True))
        if need_bias_in:
            dbias_in.add(dbefore.sum(0, dtype=lse_dtype(dout.dtype)))
        if dx is not None:
            dx[rows] = wide_product(dbefore, call.weight_in)
        if gate is not None:
            assert call.weight_gate is not None
            dgate = dhidden * ACTIVATION_FUNCTIONS[call.activation](before)
            if need_gate:
                dweight_gate.add(wide_product(dgate, x[rows], left_transposed=True))
            if need_bias_gate:
                dbias_gate.add(dgate.sum(0, dtype=lse_dtype(dout.dtype)))
            if dx is not None:
                dx[rows] += wide_product(dgate, call.weight_gate)
    sums = (dweight_in, dbias_in, dweight_gate, dbias_gate, dweight_out, dbias_out)
    return [None if dx is None else dx.view(call.input.shape), *(s.rounded(x.dtype) for s in sums)]


def _hidden(call: FeedForwardCall, x: Tensor, rows: slice) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Returns, for a block of tokens, the hidden activation, what was activated, the gate and what dropout keeps."""
    before, gate, keep = F.linear(x, call.weight_in, call.bias_in), None, None
    hidden = ACTIVATION_FUNCTIONS[call.activation](before)
    if call.weight_gate is not None:
        gate = F.linear(x, call.weight_gate, call.bias_gate)
        hidden = hidden * gate
    if call.dropout_state is not None:
        keep = _keep(call, rows)
        hidden = (hidden / (1.0 - call.dropout_p)).where(keep, 0.0)
    return hidden, before, gate, keep


def _keep(call: FeedForwardCall, rows: slice) -> Tensor:
    """Returns what dropout keeps of a block of tokens: bool [rows, ff_dim]."""
    assert call.dropout_state is not None
    # The generator counts rows from the first.
    keep = torch.empty(1, min(rows.stop, call.num_tokens), call.ff_dim, dtype=torch.bool)
    kernels().dropout_mask(keep, call.dropout_state, call.dropout_p)
    return keep[0, rows]


def linear_cross_entropy(call: LinearCrossEntropyCall, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns ``(loss, lse)``.

    Args:
        call: the canonical call.
        dtype: of the products' inputs; float32 where half precision is faster widened.
    """
    tokens = _Counted(call, dtype)
    rows_of = _Statistics(tokens.target, lse_dtype(dtype), with_total=call.label_smoothing > 0.0)
    picked = torch.zeros_like(rows_of.largest)
    for classes in blocks(call.vocab_size, _VOCAB_BLOCK):
        weight = part(call.weight, classes).to(dtype)
        for rows in blocks(len(tokens.target), _LOGITS_BLOCK // len(weight)):
            logits = tokens.logits(rows, weight, classes)
            rows_of.add(rows, logits)
            at, here = tokens.position(rows, classes)
            found = logits.gather(1, at[:, None])[:, 0]
            part(picked, rows).add_(found if here is None else found.where(here, 0.0))
    lse = rows_of.lse()
    loss = lse - picked
    if rows_of.total is not None:
        mean = (rows_of.total / call.vocab_size).to(lse.dtype)
        loss = (1.0 - call.label_smoothing) * loss + call.label_smoothing * (lse - mean)
    return reduce(tokens.spread(loss), call, len(lse)), tokens.spread(lse)


def linear_cross_entropy_backward(
    call: LinearCrossEntropyCall, lse: Tensor, dloss: Tensor, needed: Sequence[bool], dtype: torch.dtype
) -> list[Tensor | None]:
    """Returns the gradients of ``DIFFERENTIABLE`` that are needed, recomputing the logits."""
    need_hidden, need_weight, need_bias = needed
    tokens = _Counted(call, dtype)
    lse = tokens.gather(lse)
    scale = tokens.gather(dloss) if call.reduction == "none" else dloss.expand_as(lse)
    if call.reduction == "mean":
        scale = scale / max(len(lse), 1)
    dhidden = torch.zeros_like(tokens.hidden, dtype=lse.dtype) if need_hidden else None
    dweight = torch.empty_like(call.weight, memory_format=torch.contiguous_format) if need_weight else None
    dbias = call.weight.new_empty(call.vocab_size) if need_bias else None
    less = call.label_smoothing / call.vocab_size
    for classes in blocks(call.vocab_size, _VOCAB_BLOCK):
        weight = part(call.weight, classes).to(dtype)
        dweight_here, dbias_here = _Sum(), _Sum()
        for rows in blocks(len(tokens.target), _LOGITS_BLOCK // len(weight)):
            logits = tokens.logits(rows, weight, classes)
            at, here = tokens.position(rows, classes)
            lse_here, scale_here = part(lse, rows), part(scale, rows)
            # One at a time is computed as all are, then mended: the target's.
            picked = logits.gather(1, at[:, None])[:, 0].sub_(lse_here).exp_().sub_(less)
            if here is None:
                picked.add_(call.label_smoothing - 1.0)
            else:
                picked.add_(here.to(picked.dtype), alpha=call.label_smoothing - 1.0)
            picked.mul_(scale_here)
            # In float32 only where the bias' gradient is to come from unrounded ones.
            dlogits = _dlogits(logits, lse_here, scale_here, less, dtype if dbias is None else logits.dtype)
            dlogits.scatter_(1, at[:, None], picked.to(dlogits.dtype)[:, None])
            if dbias is not None:
                dbias_here.add(dlogits.sum(0))
            dlogits = dlogits.to(dtype)
            if dhidden is not None:
                part(dhidden, rows).add_(wide_product(dlogits, weight))
            if dweight is not None:
                dweight_here.add(wide_product(dlogits, part(tokens.hidden, rows), left_transposed=True))
        if dweight is not None:
            dweight[classes] = dweight_here.value_or_zero
        if dbias is not None:
            dbias[classes] = dbias_here.value_or_zero
    if dhidden is not None:
        dhidden = tokens.spread(dhidden.to(call.hidden.dtype)).view(call.hidden.shape)
    return [dhidden, dweight, dbias]


class _Counted:
    """The tokens that are not ignored, one after another, so that what is ignored costs nothing and reaches nothing."""

    def __init__(self, call: LinearCrossEntropyCall, dtype: torch.dtype) -> None:
        self.call = call
        hidden, target = call.hidden.reshape(call.num_tokens, -1), call.target.reshape(-1)
        counted = None if all_count(call) else target != call.ignore_index
        self.index = None if counted is None or bool(counted.all()) else counted.nonzero()[:, 0]
        self.hidden, self.target = self.gather(hidden).to(dtype), self.gather(target)

    def gather(self, tensor: Tensor) -> Tensor:
        """Picks the tokens that count from [num_tokens, ...] or [...]."""
        if tensor.shape == self.call.target.shape:
            tensor = tensor.reshape(-1)
        return tensor if self.index is None else tensor[self.index]

    def spread(self, tensor: Tensor) -> Tensor:
        """Puts what was computed for the tokens that count back among all: [..., *tensor.shape[1:]], 0 elsewhere."""
        if self.index is not None:
            everywhere = tensor.new_zeros((self.call.num_tokens, *tensor.shape[1:]))
            tensor = everywhere.index_copy_(0, self.index, tensor)
        return tensor.view(*self.call.target.shape, *tensor.shape[1:])

    def logits(self, rows: slice, weight: Tensor, classes: slice) -> Tensor:
        """Returns a block of logits in the accumulator's dtype."""
        logits = wide_product(part(self.hidden, rows), weight, right_transposed=True)
        return logits if self.call.bias is None else logits.add_(part(self.call.bias, classes))

    def position(self, rows: slice, classes: slice) -> tuple[Tensor, Tensor | None]:
        """Returns where in a block of classes the targets are (0 elsewhere), and which are there, None for all."""
        target = part(self.target, rows)
        if classes.stop - classes.start == self.call.vocab_size:
            return target, None
        at = target - classes.start
        here = (at >= 0) & (at < classes.stop - classes.start)
        return at.where(here, 0), here


class _Statistics:
    """What is known of each row of logits: the largest, the sum of exponentials below it, and if wanted the sum."""

    def __init__(self, target: Tensor, dtype: torch.dtype, with_total: bool) -> None:
        self.largest = torch.full(target.shape, float("-inf"), dtype=dtype)
        self.sum = torch.zeros(target.shape, dtype=torch.float64)
        self.total = torch.zeros_like(self.sum) if with_total else None

    def add(self, rows: slice, logits: Tensor) -> None:
        """Adds a block of classes, [rows, classes]."""
        largest, sums = part(self.largest, rows), part(self.sum, rows)
        total = None if self.total is None else part(self.total, rows)
        if logits.dtype == torch.float32:
            kernels().logits_statistics(logits, largest, sums, total)
            return
        before = largest.clone()
        largest.copy_(torch.maximum(before, logits.amax(dim=1)))
        shift = largest.where(largest > float("-inf"), 0.0)
        sums.mul_((before - shift).exp()).add_((logits - shift[:, None]).exp().sum(dim=1))
        if total is not None:
            total.add_(logits.sum(dim=1))

    def lse(self) -> Tensor:
        return (self.largest.double() + self.sum.log()).to(self.largest.dtype)


def _dlogits(logits: Tensor, lse: Tensor, scale: Tensor, less: float, dtype: torch.dtype) -> Tensor:
    """Returns ``(exp(logits - lse) - less) * scale`` in ``dtype``, where the logits stand if that is theirs."""
    if logits.dtype != torch.float32:
        return logits.sub_(lse[:, None]).exp_().sub_(less).mul_(scale[:, None])
    out = logits if dtype == logits.dtype else torch.empty_like(logits, dtype=dtype)
    kernels().logits_gradient(logits, lse.contiguous(), scale.contiguous(), less, out)
    return out


class _Sum:
    """A sum of tensors in the accumulator's dtype; a single one is kept as it is."""

    def __init__(self) -> None:
        self.value: Tensor | None = None

    def add(self, tensor: Tensor) -> None:
        if self.value is None:
            self.value = tensor
        else:
            self.value = self.value.to(lse_dtype(tensor.dtype)).add_(tensor)

    @property
    def value_or_zero(self) -> Tensor | float:
        return 0.0 if self.value is None else self.value

    def rounded(self, dtype: torch.dtype) -> Tensor | None:
        return None if self.value is None else self.value.to(dtype)
