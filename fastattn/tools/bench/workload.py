"""What one call of the benchmark computes, said so that fastattn and every peer can compute it.

A call that is timed returns what the workload asks for: the output where ``backward`` is False, else a tuple of the
gradients of :attr:`tensors`, in that order, for the gradient ``dout`` of the output. The file is longer than others
because it is a list of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fastattn.models import Seq2Seq


class _QueriesAndKeys:
    """What workloads of queries, keys and values, whose dimension 1 is the heads, have in common."""

    query: Tensor
    key: Tensor
    value: Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.query.dtype

    @property
    def tensors(self) -> list[Tensor]:
        return [self.query, self.key, self.value]

    @property
    def grouped(self) -> bool:
        """Whether several query heads share one of key and value."""
        return self.query.shape[1] != self.key.shape[1]


@dataclass(frozen=True, eq=False)
class AttentionWorkload(_QueriesAndKeys):
    """``softmax(query @ key^T / sqrt(head_dim)) @ value``.

    Attributes:
        query: [batch, num_heads_q, seq_len_q, head_dim].
        key: [batch, num_heads_kv, seq_len_k, head_dim].
        value: like ``key``.
        dout: gradient of the output, like ``query``.
        backward: whether gradients of ``tensors`` are wanted, or the output without any.
        causal: query i sees keys 0 to i; the two lengths are equal.
        window: query i sees keys i - window + 1 to i; None for all.
        key_lengths: int64 [batch], keys of each sequence that exist; None for all.
        bias: [1, num_heads_q, seq_len_q, seq_len_k], added to the scaled scores; gets a gradient too.
        dropout_p: probability of a weight to be dropped, in the forward as in the backward.
        alone: with ``backward``, that the gradients alone are computed, again and again from one forward.
    """

    family: ClassVar[str] = "attention"
    query: Tensor
    key: Tensor
    value: Tensor
    dout: Tensor
    backward: bool = False
    causal: bool = False
    window: int | None = None
    key_lengths: Tensor | None = None
    bias: Tensor | None = None
    dropout_p: float = 0.0
    alone: bool = False

    @property
    def tensors(self) -> list[Tensor]:
        """What gets a gradient: query, key, value and, where there is one, the bias."""
        return [self.query, self.key, self.value, *([] if self.bias is None else [self.bias])]

    @property
    def only_causal(self) -> bool:
        """Whether the mask is exactly what ``is_causal=True`` says."""
        return self.causal and self.window is None and self.key_lengths is None

    def visible(self) -> Tensor | None:
        """Returns who may attend as bool [1 or batch, 1, 1 or seq_len_q, seq_len_k]; None where everybody may."""
        seq_q, seq_k = self.query.shape[2], self.key.shape[2]
        device = self.query.device
        found: list[Tensor] = []
        if self.causal or self.window is not None:
            distance = torch.arange(seq_q, device=device)[:, None] - torch.arange(seq_k, device=device)
            seen = distance >= 0
            found.append((seen if self.window is None else seen & (distance < self.window))[None, None])
        if self.key_lengths is not None:
            found.append((torch.arange(seq_k, device=device) < self.key_lengths[:, None])[:, None, None, :])
        return None if not found else found[0] if len(found) == 1 else found[0] & found[1]

    def visible_pairs(self) -> float:
        """Returns how many pairs of a query and a key one head computes, over the batch; a causal square is half."""
        batch, _, seq_q, _ = self.query.shape
        seq_k = self.key.shape[2]
        if self.key_lengths is not None:
            return float(seq_q * self.key_lengths.sum().item())
        if self.window is not None:
            return float(batch * sum(min(i + 1, self.window) for i in range(seq_q)))
        return batch * seq_q * seq_k * (0.5 if self.causal else 1.0)


@dataclass(frozen=True, eq=False)
class DecodeWorkload(_QueriesAndKeys):
    """One query a sequence against a cache of keys and values, all of which it sees; without gradients.

    Attributes:
        query: [batch, num_heads_q, 1, head_dim].
        key: [batch, num_heads_kv, cache, head_dim].
        value: like ``key``.
    """

    family: ClassVar[str] = "decode"
    query: Tensor
    key: Tensor
    value: Tensor


@dataclass(frozen=True, eq=False)
class PackedWorkload(_QueriesAndKeys):
    """Attention within each of several sequences that are packed one after another.

    Attributes:
        query: [tokens_q, num_heads_q, head_dim].
        key: [tokens_k, num_heads_kv, head_dim].
        value: like ``key``.
        dout: gradient of the output, like ``query``.
        lengths: queries and keys of each sequence.
        causal: the last query of a sequence sees all of its keys, the one before one less, and so on.
        backward: whether gradients of ``tensors`` are wanted, or the output without any.
        alone: with ``backward``, that the gradients alone are computed, again and again from one forward.
    """

    family: ClassVar[str] = "packed"
    query: Tensor
    key: Tensor
    value: Tensor
    dout: Tensor
    lengths: tuple[tuple[int, int], ...]
    causal: bool = False
    backward: bool = False
    alone: bool = False

    @property
    def square(self) -> bool:
        """Whether each sequence has as many queries as keys."""
        return all(q == k for q, k in self.lengths)

    @property
    def longest(self) -> tuple[int, int]:
        """The most queries, and the most keys, of a sequence."""
        return max(q for q, _ in self.lengths), max(k for _, k in self.lengths)

    def bounds(self, dtype: torch.dtype = torch.int32) -> tuple[Tensor, Tensor]:
        """Returns where the sequences' queries, and their keys, begin and end: [num_sequences + 1] each."""
        found = (torch.tensor([(0, 0), *self.lengths], device=self.query.device)).cumsum(0).to(dtype)
        return found[:, 0].contiguous(), found[:, 1].contiguous()

    def asking(self, direction: str) -> PackedWorkload:
        """Returns the same for a direction."""
        return replace(self, backward=direction != "forward", alone=direction == "backward")


@dataclass(frozen=True, eq=False)
class PagedWorkload:
    """One query a sequence against a cache that lies in pages; without gradients.

    Attributes:
        query: [batch, num_heads_q, 1, head_dim].
        key_cache: [num_pages, page_size, num_heads_kv, head_dim].
        value_cache: like ``key_cache``.
        table: int32 [batch, max_pages], the pages of each sequence.
        lengths: int32 [batch], keys of each.
    """

    family: ClassVar[str] = "paged"
    query: Tensor
    key_cache: Tensor
    value_cache: Tensor
    table: Tensor
    lengths: Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.query.dtype

    @property
    def tensors(self) -> list[Tensor]:
        return [self.query, self.key_cache, self.value_cache]

    @property
    def grouped(self) -> bool:
        return self.query.shape[1] != self.key_cache.shape[2]


@dataclass(frozen=True, eq=False)
class SoftmaxWorkload:
    """An op over the last dimension of a matrix.

    Attributes:
        op: "softmax", "log_softmax", "layer_norm" or "rms_norm"; the norms with an eps of 1e-5.
        input: [rows, columns].
        dout: gradient of the output, like ``input``.
        backward: whether gradients of ``tensors`` are wanted, or the output without any.
        weight: [columns], of the norms.
        bias: [columns], of the layer norm.
        out: existing buffer that the output is written into; None for a new one.
    """

    family: ClassVar[str] = "softmax"
    op: str
    input: Tensor
    dout: Tensor
    backward: bool = False
    weight: Tensor | None = None
    bias: Tensor | None = None
    out: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        return self.input.dtype

    @property
    def tensors(self) -> list[Tensor]:
        return [t for t in (self.input, self.weight, self.bias) if t is not None]


@dataclass(frozen=True, eq=False)
class FeedForwardWorkload:
    """``linear(activation(linear(input)))``; the activation times ``input @ weight_gate^T`` where there is a gate.

    Attributes:
        input: [tokens, model_dim].
        weight_in: [ff_dim, model_dim].
        bias_in: [ff_dim].
        weight_out: [model_dim, ff_dim].
        bias_out: [model_dim].
        dout: gradient of the output, like ``input``.
        weight_gate: [ff_dim, model_dim], or None.
        activation: "relu", "gelu" (with erf) or "silu".
        backward: whether gradients of ``tensors`` are wanted, or the output without any.
    """

    family: ClassVar[str] = "feed_forward"
    input: Tensor
    weight_in: Tensor
    bias_in: Tensor
    weight_out: Tensor
    bias_out: Tensor
    dout: Tensor
    activation: str
    weight_gate: Tensor | None = None
    backward: bool = False

    @property
    def dtype(self) -> torch.dtype:
        return self.input.dtype

    @property
    def tensors(self) -> list[Tensor]:
        """Everything that gets a gradient, the gate last."""
        found = [self.input, self.weight_in, self.bias_in, self.weight_out, self.bias_out]
        return found if self.weight_gate is None else [*found, self.weight_gate]


@dataclass(frozen=True, eq=False)
class LossWorkload:
    """The mean cross entropy of a linear layer's logits.

    Attributes:
        hidden: [tokens, model_dim].
        weight: [vocabulary, model_dim].
        target: int64 [tokens].
        backward: whether gradients of ``tensors`` are wanted, or the loss.
    """

    family: ClassVar[str] = "linear_cross_entropy"
    hidden: Tensor
    weight: Tensor
    target: Tensor
    backward: bool = False

    @property
    def dtype(self) -> torch.dtype:
        return self.hidden.dtype

    @property
    def tensors(self) -> list[Tensor]:
        return [self.hidden, self.weight]


@dataclass(frozen=True, eq=False)
class RotaryWorkload:
    """The rotary embedding of queries and keys at positions 0, 1, ..., with a base of 10000, halves for pairs.

    Attributes:
        query: [batch, num_heads_q, seq_len, head_dim].
        key: [batch, num_heads_kv, seq_len, head_dim].
        douts: gradients of the two results.
        backward: whether gradients of ``tensors`` are wanted, or the results.
    """

    family: ClassVar[str] = "rotary"
    query: Tensor
    key: Tensor
    douts: tuple[Tensor, Tensor]
    backward: bool = False

    @property
    def dtype(self) -> torch.dtype:
        return self.query.dtype

    @property
    def tensors(self) -> list[Tensor]:
        return [self.query, self.key]


@dataclass(frozen=True, eq=False)
class EmbeddingWorkload:
    """Rows of an embedding plus those of their positions: ``sqrt(model_dim) * weight[ids] + table``.

    Attributes:
        ids: int64 [batch, seq_len].
        weight: [vocabulary, model_dim].
        table: [seq_len, model_dim].
        dout: gradient of the result.
        backward: whether gradients of ``tensors`` are wanted, or the result.
    """

    family: ClassVar[str] = "embedding"
    ids: Tensor
    weight: Tensor
    table: Tensor
    dout: Tensor
    backward: bool = False

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    @property
    def tensors(self) -> list[Tensor]:
        return [self.weight, self.table]

    @property
    def scale(self) -> float:
        return self.weight.shape[1] ** 0.5


@dataclass(frozen=True, eq=False)
class ModuleWorkload:
    """Self-attention by an ``nn.MultiheadAttention(embed_dim, num_heads, batch_first=True)``, weights wanted.

    The call returns output and mean weights; as a training step, the gradients of all parameters for ``dout`` = input,
    in the order of ``nn.MultiheadAttention.parameters()``. There is no dropout.

    Attributes:
        state: the module's state_dict.
        num_heads: of the module.
        input: [batch, seq_len, embed_dim], query, key and value in one.
        backward: a whole training step, or the forward alone.
        training: train mode, the graph for a backward recorded; else eval mode without gradients.
        need_weights: what the module is called with.
    """

    family: ClassVar[str] = "module"
    state: dict[str, Tensor]
    num_heads: int
    input: Tensor
    backward: bool = False
    training: bool = False
    need_weights: bool = True

    @property
    def dtype(self) -> torch.dtype:
        return self.input.dtype


@dataclass(frozen=True, eq=False)
class ModelWorkload:
    """A whole encoder-decoder that generates, or takes a training step.

    Attributes:
        stock: the model with a ``torch.nn.Transformer`` inside, its ``config`` and its ``state_dict()``; not to be
            changed.
        source: int64 [batch, source length], no padding.
        target: int64 [batch, target length + 1] that begins with ``config.bos_id``, of a training step; None for
            generation.
        new_tokens: of generation: greedy, as many for every sequence; none ends early.
    """

    family: ClassVar[str] = "model"
    stock: Seq2Seq
    source: Tensor
    target: Tensor | None = None
    new_tokens: int = 0

    @property
    def dtype(self) -> torch.dtype:
        return next(self.stock.parameters()).dtype


Workload = (
    AttentionWorkload
    | DecodeWorkload
    | PackedWorkload
    | PagedWorkload
    | SoftmaxWorkload
    | FeedForwardWorkload
    | LossWorkload
    | RotaryWorkload
    | EmbeddingWorkload
    | ModuleWorkload
    | ModelWorkload
)
