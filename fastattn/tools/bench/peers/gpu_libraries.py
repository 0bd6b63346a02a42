"""Libraries of GPU kernels that may be installed: flash-attn 2 and 3, xformers, Liger and quack.

Each is called as its documentation says; tensors are handed over in the layout that it likes, [batch, seq_len, heads,
head_dim] where that is another one, and converting them is not timed.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastattn.tools.bench.case import timed
from fastattn.tools.bench.peers.peer import Call, Peer
from fastattn.tools.bench.workload import (
    AttentionWorkload,
    DecodeWorkload,
    FeedForwardWorkload,
    LossWorkload,
    PackedWorkload,
    PagedWorkload,
    SoftmaxWorkload,
)

_EPS = 1e-5


class Library(Peer):
    """A package that runs on CUDA devices alone.

    Attributes:
        package: what is imported.
    """

    devices = ("cuda",)
    package: str

    def unavailable(self) -> str | None:
        try:
            if importlib.util.find_spec(self.package.split(".")[0]) is None:
                return "not installed"
            importlib.import_module(self.package)
        except Exception as error:  # built for another torch, or for other libraries
            return f"cannot be imported: {type(error).__name__}: {error}".splitlines()[0][:200]
        return None if torch.cuda.is_available() else "runs on CUDA devices alone"


def _sequence_first(tensor: Tensor) -> Tensor:
    """[batch, heads, seq_len, head_dim] -> contiguous [batch, seq_len, heads, head_dim]."""
    return tensor.transpose(1, 2).contiguous()


def _swapped(
    work: AttentionWorkload, function: Callable[..., Tensor], layout: Callable[[Tensor], Tensor] = _sequence_first
) -> Call:
    """Returns a call of what takes and returns another layout, whose answer is in the workload's.

    The answer is a view: transposing it back moves nothing.
    """
    call = timed(
        function, [layout(t) for t in work.tensors], layout(work.dout), backward=work.backward, alone=work.alone
    )

    def run() -> Any:
        answer = call()
        return answer.transpose(1, 2) if isinstance(answer, Tensor) else tuple(t.transpose(1, 2) for t in answer)

    return run


class FlashAttention(Library):
    """flash-attn: ``flash_attn_func``, and ``flash_attn_with_kvcache`` for a single query.

    Args:
        name: of the peer.
        package: that has these functions.
        everything: a side of a window that is none.
    """

    def __init__(self, name: str, package: str, *, everything: int | None = -1) -> None:
        self.name = name
        self.package = package
        self._everything = everything

    def attention(self, work: AttentionWorkload) -> Call | None:
        if work.bias is not None or work.key_lengths is not None or work.dropout_p:
            return None
        run = importlib.import_module(self.package).flash_attn_func
        window = (self._everything, self._everything) if work.window is None else (work.window - 1, 0)

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            out = run(query, key, value, causal=work.causal, window_size=window)
            return out[0] if isinstance(out, tuple) else out  # some versions return the lse, too

        return _swapped(work, attend)

    def decode(self, work: DecodeWorkload) -> Call | None:
        run = getattr(importlib.import_module(self.package), "flash_attn_with_kvcache", None)
        if run is None:
            return None
        query, key, value = (_sequence_first(t) for t in work.tensors)
        lengths = torch.full((len(key),), key.shape[1], dtype=torch.int32, device=key.device)

        def attend() -> Tensor:
            out = run(query, key, value, cache_seqlens=lengths)
            return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

        return torch.no_grad()(attend)

    def packed(self, work: PackedWorkload) -> Call | None:
        run = getattr(importlib.import_module(self.package), "flash_attn_varlen_func", None)
        if run is None:
            return None
        bounds, longest = work.bounds(), work.longest
        named = dict(
            zip(("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"), (*bounds, *longest), strict=True)
        )
        # Some versions find out the longest by themselves.
        takes = inspect.signature(run).parameters
        more = {name: value for name, value in named.items() if name in takes}

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            out = run(query, key, value, causal=work.causal, **more)
            return out[0] if isinstance(out, tuple) else out

        return timed(attend, work.tensors, work.dout, backward=work.backward, alone=work.alone)

    def paged(self, work: PagedWorkload) -> Call | None:
        run = getattr(importlib.import_module(self.package), "flash_attn_with_kvcache", None)
        if run is None:
            return None
        takes = inspect.signature(run).parameters
        table = next((name for name in ("block_table", "page_table") if name in takes), None)
        if table is None:
            return None
        query = _sequence_first(work.query)

        def attend(key_cache: Tensor, value_cache: Tensor) -> Tensor:
            out = run(query, key_cache, value_cache, cache_seqlens=work.lengths, **{table: work.table})
            return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

        return timed(attend, work.tensors[1:])


class XFormers(Library):
    """xformers: ``memory_efficient_attention``, which picks its kernel itself."""

    name = "xformers"
    package = "xformers.ops"

    def attention(self, work: AttentionWorkload) -> Call | None:
        if work.key_lengths is not None or work.window is not None or work.dropout_p or work.grouped:
            return None
        if work.bias is not None:
            return None  # it wants one laid out for it, whose gradient is then another tensor's
        ops = importlib.import_module(self.package)
        mask = ops.LowerTriangularMask() if work.causal else None
        return _swapped(work, lambda q, k, v: ops.memory_efficient_attention(q, k, v, attn_bias=mask))


class Liger(Library):
    """Liger: row-wise ops, the gate of a feed-forward, and linear + cross entropy."""

    name = "liger-kernel"
    package = "liger_kernel.transformers.functional"

    def softmax(self, work: SoftmaxWorkload) -> Call | None:
        run = importlib.import_module(self.package)
        ops: dict[str, Callable[..., Tensor]] = {
            "softmax": lambda x: run.liger_softmax(x),
            "layer_norm": lambda x, weight, bias: run.liger_layer_norm(x, weight, bias, _EPS),
            # In place it would overwrite the gradient that it is given.
            "rms_norm": lambda x, weight: run.liger_rms_norm(x, weight, _EPS, in_place=False),
        }
        if work.op not in ops or work.out is not None:
            return None
        return timed(ops[work.op], work.tensors, work.dout, backward=work.backward)

    def feed_forward(self, work: FeedForwardWorkload) -> Call | None:
        if work.weight_gate is None or work.activation != "silu":
            return None
        run = importlib.import_module(self.package)
        linear = torch.nn.functional.linear

        def plain(
            x: Tensor, weight: Tensor, bias: Tensor, weight_out: Tensor, bias_out: Tensor, gate: Tensor
        ) -> Tensor:
            return linear(run.liger_swiglu(linear(x, weight, bias), linear(x, gate)), weight_out, bias_out)

        return timed(plain, work.tensors, work.dout, backward=work.backward)

    def linear_cross_entropy(self, work: LossWorkload) -> Call | None:
        run, target = importlib.import_module(self.package), work.target
        return timed(
            lambda hidden, weight: run.liger_fused_linear_cross_entropy(hidden, weight, target),
            work.tensors,
            backward=work.backward,
        )


class Quack(Library):
    """quack: softmax and rms norm, written in CuTe."""

    name = "quack"
    package = "quack.softmax"
    slow_to_build = True

    def softmax(self, work: SoftmaxWorkload) -> Call | None:
        if work.op not in ("softmax", "rms_norm") or work.out is not None:
            return None
        module = importlib.import_module("quack.softmax" if work.op == "softmax" else "quack.rmsnorm")

        def run(*tensors: Tensor) -> Tensor:
            return module.softmax(*tensors) if work.op == "softmax" else module.rmsnorm(*tensors, eps=_EPS)

        return timed(run, work.tensors, work.dout, backward=work.backward)


GPU_PEERS: tuple[Peer, ...] = (
    FlashAttention("flash-attn 2", "flash_attn"),
    FlashAttention("flash-attn 3", "flash_attn_interface"),
    FlashAttention("flash-attn 4", "flash_attn.cute", everything=None),
    XFormers(),
    Liger(),
    Quack(),
)
