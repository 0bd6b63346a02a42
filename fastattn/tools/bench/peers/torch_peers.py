"""PyTorch itself: its fused attention, its modules, and the ops one writes attention and feed-forward with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastattn.tools import eager
from fastattn.tools.bench import model, module
from fastattn.tools.bench.case import timed
from fastattn.tools.bench.peers.peer import Call, Peer
from fastattn.tools.bench.positions import rotary_tables, rotated
from fastattn.tools.bench.workload import (
    AttentionWorkload,
    DecodeWorkload,
    EmbeddingWorkload,
    FeedForwardWorkload,
    LossWorkload,
    ModelWorkload,
    ModuleWorkload,
    RotaryWorkload,
    SoftmaxWorkload,
)

# An eager peer that holds more scores than this tells nothing but that memory is slow.
_EAGER_ELEMENTS, _EAGER_ELEMENTS_GPU = 1 << 25, 1 << 28


class TorchSdpa(Peer):
    """``F.scaled_dot_product_attention``, which chooses its kernel itself."""

    name = "torch SDPA"
    devices: tuple[str, ...] = ("cpu", "cuda")

    def attention(self, work: AttentionWorkload) -> Call | None:
        allowed = None if work.only_causal else work.visible()

        def sdpa(*tensors: Tensor) -> Tensor:
            query, key, value, *bias = tensors
            given = bias[0] if bias else allowed
            return F.scaled_dot_product_attention(
                query, key, value, given, work.dropout_p, work.only_causal, enable_gqa=work.grouped
            )

        if work.bias is not None and (work.only_causal or allowed is not None):
            return None  # one argument for both
        return timed(sdpa, work.tensors, work.dout, backward=work.backward, alone=work.alone)

    def decode(self, work: DecodeWorkload) -> Call | None:
        return timed(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=work.grouped), work.tensors)


class TorchSdpaMath(TorchSdpa):
    """``F.scaled_dot_product_attention`` with its fused kernel switched off: the composition of ops that PyTorch itself
    falls back to."""

    name = "torch SDPA (math)"
    devices = ("cpu",)

    def attention(self, work: AttentionWorkload) -> Call | None:
        batch, heads, seq_q, _ = work.query.shape
        if batch * heads * seq_q * work.key.shape[2] > _EAGER_ELEMENTS:
            return None
        return _without_flash(super().attention(work))

    def decode(self, work: DecodeWorkload) -> Call | None:
        return _without_flash(super().decode(work))


def _without_flash(call: Call | None) -> Call | None:
    if call is None:
        return None

    # The switch itself: `sdpa_kernel` would cost a decode step more than the switching does.
    def run() -> Any:
        before = torch.backends.cuda.flash_sdp_enabled()
        torch.backends.cuda.enable_flash_sdp(False)
        try:
            return call()
        finally:
            torch.backends.cuda.enable_flash_sdp(before)

    return run


class TorchSdpaKernel(TorchSdpa):
    """``F.scaled_dot_product_attention`` bound to one of its GPU kernels; one that refuses a call raises."""

    devices = ("cuda",)

    def __init__(self, name: str, backend: str) -> None:
        self.name = f"torch SDPA ({name})"
        self._backend = backend

    def unavailable(self) -> str | None:
        return None if torch.cuda.is_available() else "runs on CUDA devices alone"

    def attention(self, work: AttentionWorkload) -> Call | None:
        batch, heads, seq_q, _ = work.query.shape
        if self._backend == "MATH" and batch * heads * seq_q * work.key.shape[2] > _EAGER_ELEMENTS_GPU:
            return None
        return self._bound(super().attention(work))

    def decode(self, work: DecodeWorkload) -> Call | None:
        return self._bound(super().decode(work))

    def _bound(self, call: Call | None) -> Call | None:
        if call is None:
            return None
        from torch.nn.attention import SDPBackend, sdpa_kernel

        backend = getattr(SDPBackend, self._backend)

        def run() -> Any:
            with sdpa_kernel(backend):
                return call()

        return run


class TorchEager(Peer):
    """Attention and feed-forward as one writes them from PyTorch's ops, and the fused row-wise ops."""

    name = "torch eager"
    devices: tuple[str, ...] = ("cpu", "cuda")

    def attention(self, work: AttentionWorkload) -> Call | None:
        batch, heads, seq_q, _ = work.query.shape
        most = _EAGER_ELEMENTS_GPU if work.query.is_cuda else _EAGER_ELEMENTS
        if batch * heads * seq_q * work.key.shape[2] > most or work.dropout_p:
            return None
        visible = work.visible()

        def plain(*tensors: Tensor) -> Tensor:
            query, key, value, *bias = tensors
            return eager.attention(query, key, value, visible=visible, bias=bias[0] if bias else None)[0]

        return timed(plain, work.tensors, work.dout, backward=work.backward, alone=work.alone)

    def softmax(self, work: SoftmaxWorkload) -> Call | None:
        columns = (work.input.shape[-1],)
        ops: dict[str, Callable[..., Tensor]] = {
            "softmax": lambda x: x.softmax(-1),
            "log_softmax": lambda x: x.log_softmax(-1),
            "layer_norm": lambda x, weight, bias: F.layer_norm(x, columns, weight, bias),
            "rms_norm": lambda x, weight: F.rms_norm(x, columns, weight, 1e-5),
        }
        op = ops[work.op]
        if work.out is not None:
            if work.op not in ("softmax", "log_softmax"):
                return None
            into = torch.softmax if work.op == "softmax" else torch.log_softmax
            return timed(lambda x: into(x, -1, out=work.out), work.tensors)
        return timed(op, work.tensors, work.dout, backward=work.backward)

    def feed_forward(self, work: FeedForwardWorkload) -> Call | None:
        def plain(*tensors: Tensor) -> Tensor:
            x, weight_in, bias_in, weight_out, bias_out, *gate = tensors
            return eager.feed_forward(
                x,
                weight_in,
                bias_in,
                weight_out,
                bias_out,
                activation=work.activation,
                weight_gate=gate[0] if gate else None,
            )

        return timed(plain, work.tensors, work.dout, backward=work.backward)

    def linear_cross_entropy(self, work: LossWorkload) -> Call | None:
        target = work.target
        # In the inputs' dtype throughout: the fastest way to write it, and the least exact.
        return timed(
            lambda hidden, weight: F.cross_entropy(F.linear(hidden, weight), target),
            work.tensors,
            backward=work.backward,
        )

    def rotary(self, work: RotaryWorkload) -> Call | None:
        tables = rotary_tables(work, work.dtype)

        def plain(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
            return rotated(query, *tables), rotated(key, *tables)

        return timed(plain, work.tensors, work.douts, backward=work.backward)

    def embedding(self, work: EmbeddingWorkload) -> Call | None:
        ids, scale = work.ids, work.scale

        def plain(weight: Tensor, table: Tensor) -> Tensor:
            return F.embedding(ids, weight) * scale + table

        return timed(plain, work.tensors, work.dout, backward=work.backward)


class TorchNn(Peer):
    """``torch.nn``'s modules, with the native fast path where they take it."""

    name = "torch.nn"
    devices: tuple[str, ...] = ("cpu", "cuda")

    def module(self, work: ModuleWorkload) -> Call | None:
        return module.call(module.stock(work, work.dtype), work)

    def model(self, work: ModelWorkload) -> Call | None:
        return model.stock_call(work)


class TorchNnSlowPath(TorchNn):
    """``torch.nn``'s modules with the native fast path, which only evaluation takes, switched off."""

    name = "torch.nn (fast path off)"

    def module(self, work: ModuleWorkload) -> Call | None:
        return None if work.backward or work.training else _without_fastpath(super().module(work))

    def model(self, work: ModelWorkload) -> Call | None:
        return None if work.target is not None else _without_fastpath(super().model(work))


def _without_fastpath(call: Call | None) -> Call | None:
    if call is None:
        return None

    def run() -> Any:
        before = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            return call()
        finally:
            torch.backends.mha.set_fastpath_enabled(before)

    return run


TORCH_PEERS: tuple[Peer, ...] = (
    TorchSdpa(),
    TorchSdpaMath(),
    TorchSdpaKernel("flash", "FLASH_ATTENTION"),
    TorchSdpaKernel("cuDNN", "CUDNN_ATTENTION"),
    TorchSdpaKernel("efficient", "EFFICIENT_ATTENTION"),
    TorchSdpaKernel("math on a GPU", "MATH"),
    TorchEager(),
    TorchNn(),
    TorchNnSlowPath(),
)
