"""ONNX Runtime's attention: com.microsoft ``MultiHeadAttention``, and ``GroupQueryAttention`` for what only it does.

Inputs and outputs are bound to tensors that exist (IOBinding), with PyTorch's number of threads.  These ops take and
give what a projection makes and takes, ``[batch, seq_len, heads * head_dim]``, and ``MultiHeadAttention`` takes keys
and values in heads, too: of the two layouts the faster one is timed, and no conversion is.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastattn.tools.bench.peers.peer import Call, Peer
from fastattn.tools.bench.workload import AttentionWorkload, DecodeWorkload
from fastattn.tools.measure import time_in_turns

# The ops' attributes and inputs as of this version; the operator set as of ONNX 1.17.
_DOMAIN, _VERSION, _OPSET, _IR = "com.microsoft", 1, 21, 10


class OnnxRuntime(Peer):
    """ONNX Runtime on its CPU provider, without gradients: float32, and float16 where heads share keys."""

    name = "ONNX Runtime"

    def unavailable(self) -> str | None:
        missing = [name for name in ("onnxruntime", "onnx") if importlib.util.find_spec(name) is None]
        return f"not installed: {', '.join(missing)}" if missing else None

    def attention(self, work: AttentionWorkload) -> Call | None:
        if work.backward or work.dropout_p or work.query.device.type != "cpu":
            return None
        if work.window is not None or (work.grouped and work.only_causal):
            return _grouped(work) if work.key_lengths is None and work.bias is None else None
        if work.grouped or work.dtype != torch.float32:
            return None
        return _faster([_multi_head(work, in_heads) for in_heads in (True, False)])

    def decode(self, work: DecodeWorkload) -> Call | None:
        if work.grouped:
            return _grouped_decode(work) if work.query.device.type == "cpu" else None
        return self.attention(AttentionWorkload(work.query, work.key, work.value, work.query))


def _multi_head(work: AttentionWorkload, in_heads: bool) -> Call:
    batch, heads, seq_q, head_dim = work.query.shape
    inputs = {"query": _merged(work.query)}
    for name, tensor in (("key", work.key), ("value", work.value)):
        inputs[name] = tensor.contiguous() if in_heads else _merged(tensor)
    arguments = ["query", "key", "value"]
    if work.key_lengths is not None or work.bias is not None:
        arguments += ["", "", ""]  # bias of the projections, key_padding_mask, attention_bias
    if work.key_lengths is not None:
        inputs["key_lengths"], arguments[4] = work.key_lengths.int(), "key_lengths"
    if work.bias is not None:
        inputs["attention_bias"], arguments[5] = work.bias, "attention_bias"
    out = work.query.new_empty(batch, seq_q, heads * head_dim)
    attributes = {"num_heads": heads, "unidirectional": int(work.causal)}
    run = _session("MultiHeadAttention", arguments, attributes, inputs, {"output": out})
    return _returning(run, out, heads)


def _grouped(work: AttentionWorkload) -> Call | None:
    """Causal, in a window or not: the op knows no other mask."""
    batch, heads, seq_q, _ = work.query.shape
    heads_kv, seq_k, head_dim = work.key.shape[1:]
    if work.dtype == torch.bfloat16 or not (work.causal or work.window is not None):
        return None
    inputs = {"query": _merged(work.query), "key": _merged(work.key), "value": _merged(work.value)}
    present = {name: work.key.new_empty(batch, heads_kv, seq_k, head_dim) for name in ("key_out", "value_out")}
    out = work.query.new_empty(batch, seq_q, heads * head_dim)
    attributes = {"num_heads": heads, "kv_num_heads": heads_kv, "local_window_size": work.window or -1}
    run = _grouped_session(inputs, ["", ""], attributes, {"output": out, **present}, seq_k)
    return _returning(run, out, heads)


def _grouped_decode(work: DecodeWorkload) -> Call | None:
    """The last key and value are the step's own; those before lie in the cache, which the op extends in place."""
    heads, heads_kv, cache = work.query.shape[1], *work.key.shape[1:3]
    if work.dtype == torch.bfloat16:
        return None
    past = {"past_key": work.key.clone(), "past_value": work.value.clone()}
    inputs = {
        "query": _merged(work.query),
        "key": _merged(work.key[:, :, -1:]),
        "value": _merged(work.value[:, :, -1:]),
    }
    out = work.query.new_empty(work.query.shape[0], 1, heads * work.query.shape[-1])
    outputs = {"output": out, "key_out": past["past_key"], "value_out": past["past_value"]}
    attributes = {"num_heads": heads, "kv_num_heads": heads_kv}
    run = _grouped_session({**inputs, **past}, list(past), attributes, outputs, cache)
    return _returning(run, out, heads)


def _grouped_session(
    inputs: Mapping[str, Tensor],
    past: list[str],
    attributes: Mapping[str, Any],
    outputs: Mapping[str, Tensor],
    total: int,
) -> Call:
    batch = inputs["query"].shape[0]
    lengths = {
        "seqlens_k": torch.full((batch,), total - 1, dtype=torch.int32),
        "total_sequence_length": torch.tensor(total, dtype=torch.int32),
    }
    arguments = ["query", "key", "value", *past, *lengths]
    return _session("GroupQueryAttention", arguments, attributes, {**inputs, **lengths}, outputs)


def _session(
    op: str,
    arguments: Sequence[str],
    attributes: Mapping[str, Any],
    inputs: Mapping[str, Tensor],
    outputs: Mapping[str, Tensor],
) -> Call:
    """Returns the run of a model of one op, bound to tensors that it keeps alive."""
    import onnxruntime
    from onnx import helper

    def declared(tensors: Mapping[str, Tensor]) -> list[Any]:
        return [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(_numpy_dtype(t)), list(t.shape))
            for name, t in tensors.items()
        ]

    node = helper.make_node(op, arguments, list(outputs), domain=_DOMAIN, **attributes)
    graph = helper.make_graph([node], op, declared(inputs), declared(outputs))
    opsets = [helper.make_opsetid("", _OPSET), helper.make_opsetid(_DOMAIN, _VERSION)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=_IR)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    # Its threads spin while it runs, as by default, but not on while it is somebody else's turn.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    for bind, tensors in ((binding.bind_input, inputs), (binding.bind_output, outputs)):
        for name, t in tensors.items():
            bind(name, "cpu", 0, _numpy_dtype(t), list(t.shape), t.data_ptr())
    held = (dict(inputs), dict(outputs))

    def run() -> Any:
        session.run_with_iobinding(binding)
        return held

    return run


def _returning(run: Call, out: Tensor, heads: int) -> Call:
    """Returns a call that gives ``out`` [batch, seq_len, heads * head_dim] as a view in heads."""
    answer = out.unflatten(-1, (heads, -1)).transpose(1, 2)

    def call() -> Tensor:
        run()
        return answer

    return call


def _faster(calls: Sequence[Call]) -> Call:
    timings = time_in_turns(calls, budget=0.5, min_repeats=3)
    return min(zip(timings, calls, strict=True), key=lambda pair: pair[0].median)[1]


def _merged(heads: Tensor) -> Tensor:
    """[batch, heads, seq_len, head_dim] as [batch, seq_len, heads * head_dim]."""
    return heads.transpose(1, 2).flatten(2).contiguous()


def _numpy_dtype(tensor: Tensor) -> Any:
    return tensor.numpy().dtype


ONNX_PEERS: tuple[Peer, ...] = (OnnxRuntime(),)
