"""What ``torch.compile`` makes of the ops as one writes them, and of ``flex_attention``.

Compiling is not timed: a call is compiled when it is checked.  Inductor replaces attention that it recognises by
``F.scaled_dot_product_attention``; the formula is written so that it does.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastattn.tools import eager
from fastattn.tools.bench import module
from fastattn.tools.bench.case import timed
from fastattn.tools.bench.peers.peer import Call, Peer
from fastattn.tools.bench.positions import rotary_tables, rotated
from fastattn.tools.bench.workload import (
    AttentionWorkload,
    DecodeWorkload,
    EmbeddingWorkload,
    FeedForwardWorkload,
    LossWorkload,
    ModuleWorkload,
    PackedWorkload,
    RotaryWorkload,
    SoftmaxWorkload,
)

# Compiled attention that inductor does not recognise holds all scores, several times over.
_SCORES = 1 << 26


def forget() -> None:
    """Lets go of everything compiled so far: earlier rows' shapes would count towards dynamo's limit for a function."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


def compile(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the function compiled for the shapes it is called with."""
    from torch._functorch import config

    # Or a backward could run once only, and not be timed by itself.
    config.donated_buffer = False
    return torch.compile(function, dynamic=False, fullgraph=True)


def no_compiler() -> str | None:
    """Returns why inductor cannot compile for a CPU here; None if it can."""
    compiler = os.environ.get("CXX", "g++")
    return None if shutil.which(compiler) else f"no C++ compiler: {compiler} is not found"


class TorchCompile(Peer):
    """``torch.compile`` of attention, the row-wise ops, the feed-forward and ``nn.MultiheadAttention``."""

    name = "torch.compile"
    slow_to_build = True
    devices = ("cpu", "cuda")

    def unavailable(self) -> str | None:
        return no_compiler()

    def attention(self, work: AttentionWorkload) -> Call | None:
        batch, heads, seq_q, head_dim = work.query.shape
        if batch * heads * seq_q * work.key.shape[2] > _SCORES:
            return None
        visible, dropout_p, group = work.visible(), work.dropout_p, heads // work.key.shape[1]
        mask = None
        if visible is not None:
            mask = torch.zeros_like(visible, dtype=work.dtype).masked_fill(~visible, float("-inf"))

        def plain(*tensors: Tensor) -> Tensor:
            query, key, value, *bias = tensors
            if group > 1:
                key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
            scores = query @ key.transpose(-2, -1) / head_dim**0.5
            if mask is not None:
                scores = scores + mask
            if bias:
                scores = scores + bias[0]
            weights = scores.softmax(dim=-1)
            if dropout_p:
                weights = F.dropout(weights, dropout_p)
            return weights @ value

        return timed(compile(plain), work.tensors, work.dout, backward=work.backward, alone=work.alone)

    def decode(self, work: DecodeWorkload) -> Call | None:
        return self.attention(AttentionWorkload(work.query, work.key, work.value, work.query))

    def softmax(self, work: SoftmaxWorkload) -> Call | None:
        columns = (work.input.shape[-1],)
        if work.out is not None:
            return None
        ops: dict[str, Callable[..., Tensor]] = {
            "softmax": lambda x: x.softmax(-1),
            "log_softmax": lambda x: x.log_softmax(-1),
            "layer_norm": lambda x, weight, bias: F.layer_norm(x, columns, weight, bias),
            "rms_norm": lambda x, weight: F.rms_norm(x, columns, weight, 1e-5),
        }
        return timed(compile(ops[work.op]), work.tensors, work.dout, backward=work.backward)

    def feed_forward(self, work: FeedForwardWorkload) -> Call | None:
        activation = work.activation

        def plain(
            x: Tensor, weight_in: Tensor, bias_in: Tensor, weight_out: Tensor, bias_out: Tensor, *gate: Tensor
        ) -> Tensor:
            weight_gate = gate[0] if gate else None
            return eager.feed_forward(
                x, weight_in, bias_in, weight_out, bias_out, activation=activation, weight_gate=weight_gate
            )

        return timed(compile(plain), work.tensors, work.dout, backward=work.backward)

    def linear_cross_entropy(self, work: LossWorkload) -> Call | None:
        target = work.target

        def plain(hidden: Tensor, weight: Tensor) -> Tensor:
            return F.cross_entropy(F.linear(hidden, weight), target)

        return timed(compile(plain), work.tensors, backward=work.backward)

    def rotary(self, work: RotaryWorkload) -> Call | None:
        tables = rotary_tables(work, work.dtype)

        def plain(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
            return rotated(query, *tables), rotated(key, *tables)

        return timed(compile(plain), work.tensors, work.douts, backward=work.backward)

    def embedding(self, work: EmbeddingWorkload) -> Call | None:
        ids, scale = work.ids, work.scale

        def plain(weight: Tensor, table: Tensor) -> Tensor:
            return F.embedding(ids, weight) * scale + table

        return timed(compile(plain), work.tensors, work.dout, backward=work.backward)

    def module(self, work: ModuleWorkload) -> Call | None:
        stock = module.stock(work, work.dtype).train(work.training)
        compiled = compile(stock)
        x, parameters = work.input, list(stock.parameters())

        def run() -> Any:
            with torch.set_grad_enabled(work.training):
                return compiled(x, x, x, need_weights=work.need_weights)

        return (lambda: torch.autograd.grad(run()[0], parameters, x)) if work.backward else run


class FlexAttention(Peer):
    """``torch.nn.attention.flex_attention``, compiled; on a CPU it has no backward, and no dropout anywhere."""

    name = "flex attention"
    slow_to_build = True
    devices = ("cpu", "cuda")

    def unavailable(self) -> str | None:
        return no_compiler()

    def attention(self, work: AttentionWorkload) -> Call | None:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        if work.dropout_p or (work.backward and work.query.device.type == "cpu"):
            return None
        window, lengths, bias = work.window, work.key_lengths, work.bias
        batch, _, seq_q, _ = work.query.shape
        seen: list[Callable[..., Tensor]] = []
        if work.causal or window is not None:
            seen.append(lambda b, h, i, j: i >= j)
        if window is not None:
            seen.append(lambda b, h, i, j: i - j < window)
        if lengths is not None:
            seen.append(lambda b, h, i, j: j < lengths[b])

        def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            found = seen[0](b, h, i, j)
            for more in seen[1:]:
                found = found & more(b, h, i, j)
            return found

        def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            assert bias is not None
            return score + bias[0, h, i, j]

        mask = None
        if seen:
            batches = None if lengths is None else batch
            mask = create_block_mask(mask_mod, batches, None, seq_q, work.key.shape[2], device=work.query.device.type)
        score = None if bias is None else score_mod
        grouped = work.grouped
        call = compile(lambda q, k, v: flex_attention(q, k, v, score, mask, enable_gqa=grouped))
        if work.backward and bias is not None:
            return None  # its gradient would have to be asked for in another way
        inputs = [work.query, work.key, work.value]
        return timed(call, inputs, work.dout, backward=work.backward, alone=work.alone)

    def decode(self, work: DecodeWorkload) -> Call | None:
        return self.attention(AttentionWorkload(work.query, work.key, work.value, work.query))

    def packed(self, work: PackedWorkload) -> Call | None:
        """All tokens as one sequence, of which each sees those of its own alone."""
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        if work.backward and work.query.device.type == "cpu":
            return None
        device, causal = work.query.device, work.causal
        counts = [torch.tensor(found, device=device) for found in zip(*work.lengths, strict=True)]
        own_q, own_k = (torch.arange(len(n), device=device).repeat_interleave(n) for n in counts)
        # How far from its sequence's end a query, or a key, is.
        left_q, left_k = (n.cumsum(0).repeat_interleave(n) - torch.arange(int(n.sum()), device=device) for n in counts)

        def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            same = own_q[i] == own_k[j]
            return same & (left_q[i] <= left_k[j]) if causal else same

        mask = create_block_mask(mask_mod, None, None, len(own_q), len(own_k), device=device.type)
        grouped = work.grouped
        attend = compile(lambda q, k, v: flex_attention(q, k, v, None, mask, enable_gqa=grouped))

        def laid_out(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return attend(*(t.transpose(0, 1)[None] for t in (query, key, value)))[0].transpose(0, 1)

        return timed(laid_out, work.tensors, work.dout, backward=work.backward, alone=work.alone)


COMPILED_PEERS: tuple[Peer, ...] = (TorchCompile(), FlexAttention())
