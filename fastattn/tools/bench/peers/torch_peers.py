"""PyTorch itself: its fused attention, its modules, and the ops one writes attention and feed-forward with."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastattn.tools import eager
from fastattn.tools.bench import model, module
from fastattn.tools.bench.case import timed
from fastattn.tools.bench.packed import gathered
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
    PackedWorkload,
    PagedWorkload,
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

    def packed(self, work: PackedWorkload) -> Call | None:
        """A call for each sequence."""
        if work.causal and not (work.square or work.longest[0] == 1):
            return None  # it aligns a causal mask at the first key
        counts_q, counts_k = map(list, zip(*work.lengths, strict=True))

        def each(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            parts = zip(query.split(counts_q), key.split(counts_k), value.split(counts_k), strict=True)
            outs = []
            for part in parts:
                q, k, v = (t.transpose(0, 1)[None] for t in part)
                causal = work.causal and len(part[0]) > 1
                out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=work.grouped)
                outs.append(out[0].transpose(0, 1))
            return torch.cat(outs)

        return timed(each, work.tensors, work.dout, backward=work.backward, alone=work.alone)

    def paged(self, work: PagedWorkload) -> Call | None:
        """Pages gathered, keys beyond a sequence's masked."""

        def gather_and_attend(query: Tensor, key_cache: Tensor, value_cache: Tensor) -> Tensor:
            key, value = gathered(work, key_cache), gathered(work, value_cache)
            there = torch.arange(key.shape[2], device=key.device) < work.lengths[:, None, None, None]
            return F.scaled_dot_product_attention(query, key, value, there, enable_gqa=work.grouped)

        return timed(gather_and_attend, work.tensors)


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

    def packed(self, work: PackedWorkload) -> Call | None:
        return None

    def paged(self, work: PagedWorkload) -> Call | None:
        return None


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

    def packed(self, work: PackedWorkload) -> Call | None:
        return None  # whichever of these is fastest is what the automatic choice takes for each sequence

    def paged(self, work: PagedWorkload) -> Call | None:
        return None

    def _bound(self, call: Call | None) -> Call | None:
        if call is None:
            return None
        from torch.nn.attention import SDPBackend, sdpa_kernel

        backend = getattr(SDPBackend, self._backend)

        def run() -> Any:
            with sdpa_kernel(backend):
                return call()

        return run


class TorchVarlen(Peer):
    """``torch.nn.attention.varlen.varlen_attn``: flash attention over packed sequences, and over pages where PyTorch is
    new enough."""

    name = "torch varlen"
    devices = ("cuda",)

    def unavailable(self) -> str | None:
        if importlib.util.find_spec("torch.nn.attention.varlen") is None:
            return f"torch {torch.__version__} has none"
        return None if torch.cuda.is_available() else "runs on CUDA devices alone"

    def packed(self, work: PackedWorkload) -> Call | None:
        attend, takes = _varlen()
        bounds, more = work.bounds(), _flags(takes, causal=work.causal, grouped=work.grouped)
        return timed(
            lambda q, k, v: attend(q, k, v, *bounds, *work.longest, **more),
            work.tensors,
            work.dout,
            backward=work.backward,
            alone=work.alone,
        )

    def paged(self, work: PagedWorkload) -> Call | None:
        attend, takes = _varlen()
        if not {"block_table", "seqused_k"} <= takes:
            return None
        query = work.query[:, :, 0].contiguous()
        starts = torch.arange(len(query) + 1, device=query.device, dtype=torch.int32)
        longest = work.table.shape[1] * work.key_cache.shape[1]
        more = _flags(takes, causal=False, grouped=work.grouped)
        more |= {"block_table": work.table, "seqused_k": work.lengths}

        def run(key_cache: Tensor, value_cache: Tensor) -> Tensor:
            return attend(query, key_cache, value_cache, starts, None, 1, longest, **more)[:, :, None]

        return timed(run, work.tensors[1:])


def _varlen() -> tuple[Callable[..., Any], set[str]]:
    """Returns PyTorch's function, and the names of what it takes, which differ between versions."""
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn, set(inspect.signature(varlen_attn).parameters)


def _flags(takes: set[str], *, causal: bool, grouped: bool) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if causal:
        found |= {"window_size": (-1, 0)} if "window_size" in takes else {"is_causal": True}
    if grouped and "enable_gqa" in takes:
        found["enable_gqa"] = True
    return found


class TorchNested(Peer):
    """``F.scaled_dot_product_attention`` on nested tensors, which are views of the packed ones."""

    name = "torch nested"
    devices = ("cuda",)

    def unavailable(self) -> str | None:
        return None if torch.cuda.is_available() else "is slow but on CUDA devices"

    def packed(self, work: PackedWorkload) -> Call | None:
        if work.grouped or (work.causal and not (work.square or work.longest[0] == 1)):
            return None
        bounds_q, bounds_k = work.bounds(torch.int64)
        causal = work.causal and work.longest[0] > 1

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            q, k, v = (
                torch.nested.nested_tensor_from_jagged(t, bounds, max_seqlen=longest).transpose(1, 2)
                for t, bounds, longest in zip(
                    (query, key, value),
                    (bounds_q, bounds_k, bounds_k),
                    (work.longest[0], work.longest[1], work.longest[1]),
                    strict=True,
                )
            )
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).values()

        return timed(attend, work.tensors, work.dout, backward=work.backward, alone=work.alone)


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
    TorchVarlen(),
    TorchNested(),
    TorchEager(),
    TorchNn(),
    TorchNnSlowPath(),
)
