"""OpenVINO's ``ScaledDotProductAttention`` on its CPU plugin, with PyTorch's number of threads.

Each row is a model of its own with fixed shapes, which the plugin compiles into one fused kernel; with dynamic ones, or
with tensors in another layout, it was never faster.  Memory is shared with PyTorch's tensors, so nothing is copied.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

from fastattn.tools.bench.peers.peer import Call, Peer
from fastattn.tools.bench.workload import AttentionWorkload, DecodeWorkload


class OpenVino(Peer):
    """OpenVINO: every dtype that the processor multiplies natively, every mask and an added bias; no gradients."""

    name = "OpenVINO"

    def unavailable(self) -> str | None:
        return "not installed: openvino" if importlib.util.find_spec("openvino") is None else None

    def attention(self, work: AttentionWorkload) -> Call | None:
        import openvino
        import openvino.opset13 as ops

        capability = {torch.float32: "FP32", torch.bfloat16: "BF16", torch.float16: "FP16"}[work.dtype]
        core = openvino.Core()
        if work.backward or work.dropout_p or work.query.device.type != "cpu":
            return None
        if capability not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            return None
        visible = None if work.only_causal else work.visible()
        tensors = [work.query, work.key, work.value]
        if work.bias is not None:
            if visible is not None or work.causal:
                return None  # one argument for both
            tensors.append(work.bias)
        elif visible is not None:
            tensors.append(visible)
        tensors = [t.contiguous() for t in tensors]
        parameters = [ops.parameter(list(t.shape), _type(t.dtype)) for t in tensors]
        query, key, value, *mask = parameters
        group = work.query.shape[1] // work.key.shape[1]
        if group > 1:
            key, value = (_repeated(p, t, group) for p, t in ((key, work.key), (value, work.value)))
        out = ops.scaled_dot_product_attention(query, key, value, *mask, causal=work.only_causal)
        compiled = core.compile_model(
            openvino.Model([out], parameters, "attention"),
            "CPU",
            {
                "INFERENCE_NUM_THREADS": torch.get_num_threads(),
                "INFERENCE_PRECISION_HINT": _type(work.dtype),
                "PERFORMANCE_HINT": "LATENCY",
                # Threads tied to a core wait for it where somebody else's turn has left it busy.
                "ENABLE_CPU_PINNING": False,
            },
        )
        request = compiled.create_infer_request()
        answer = torch.empty_like(work.query)
        for index, tensor in enumerate(tensors):
            request.set_input_tensor(index, _shared(tensor))
        request.set_output_tensor(0, _shared(answer))
        held = (tensors, answer)

        def run() -> Tensor:
            request.infer()
            return held[1]

        return run

    def decode(self, work: DecodeWorkload) -> Call | None:
        return self.attention(AttentionWorkload(work.query, work.key, work.value, work.query))


def _repeated(node: Any, tensor: Tensor, group: int) -> Any:
    """Returns the keys or values of each query head: the op itself knows no groups."""
    import numpy
    import openvino.opset13 as ops

    batch, heads, seq_len, head_dim = tensor.shape
    node = ops.unsqueeze(node, ops.constant(numpy.array(2)))
    shape = numpy.array([batch, heads, group, seq_len, head_dim])
    node = ops.broadcast(node, ops.constant(shape), broadcast_spec="BIDIRECTIONAL")
    return ops.reshape(node, ops.constant(numpy.array([batch, heads * group, seq_len, head_dim])), False)


def _type(dtype: torch.dtype) -> Any:
    from openvino import Type

    types = {torch.float32: Type.f32, torch.bfloat16: Type.bf16, torch.float16: Type.f16, torch.bool: Type.boolean}
    return types[dtype]


def _shared(tensor: Tensor) -> Any:
    """Returns the tensor's own memory as one of OpenVINO's; the caller keeps it alive."""
    import openvino

    if tensor.dtype == torch.bfloat16:  # NumPy has none
        return openvino.Tensor(
            tensor.view(torch.uint16).numpy(), openvino.Shape(list(tensor.shape)), openvino.Type.bf16
        )
    return openvino.Tensor(tensor.numpy(), shared_memory=True)


OPENVINO_PEERS: tuple[Peer, ...] = (OpenVino(),)
