"""Triton kernels for GPUs (``kernels/``); on CPU tensors in Triton's interpreter, where TRITON_INTERPRET=1 is set."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastattn.backends.base import Backend
from fastattn.kernels.arguments import Dropout, Mask, Problem, View
from fastattn.spec.attention import DIFFERENTIABLE, AttentionCall, empty_output, lse_dtype

_LOG2_E = 1.4426950408889634
MAX_HEAD_DIM = 256


def interpreted() -> bool:
    """Returns whether kernels run in Triton's interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


class TritonBackend(Backend):
    name = "triton"

    @property
    def device_types(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("cpu",) if interpreted() else ("cuda",)

    def unavailable(self) -> str | None:
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed: pip install 'triton>=3.6'"
        if not interpreted() and not torch.cuda.is_available():
            return "there is no GPU (TRITON_INTERPRET=1 runs the kernels on the CPU, for tests)"
        return None

    def refuses(self, op: str, call: NamedTuple) -> list[str]:
        reasons = super().refuses(op, call)
        if isinstance(call, AttentionCall) and max(call.query.shape[3], call.value.shape[3]) > MAX_HEAD_DIM:
            reasons.append(f"takes a head_dim of at most {MAX_HEAD_DIM}")
        return reasons

    def attention(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        from fastattn.kernels.attention_forward import attention_forward

        out, lse = empty_output(call)
        if out.numel() == 0:
            lse.fill_(-math.inf)
            return out, lse
        batch, heads, seq_len_q, head_dim = call.query.shape
        head_dim_v = call.value.shape[3]
        rows, keys = tile(call)
        attention_forward[(-(-seq_len_q // rows), batch * heads)](
            view(call.query),
            view(call.key),
            view(call.value),
            view(out),
            lse,
            call.sinks,
            problem(call),
            head_dim,
            head_dim_v,
            PRECISION=precision(),
            ROWS=rows,
            KEYS=keys,
            DIM=padded(head_dim),
            DIM_V=padded(head_dim_v),
        )
        return out, lse

    def attention_backward(
        self, call: AttentionCall, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None, needed: Sequence[bool]
    ) -> list[Tensor | None]:
        from fastattn.kernels import attention_backward as backward

        grads = [
            torch.empty_like(tensor) if need and tensor is not None else None
            for tensor, need in zip((getattr(call, f) for f in DIFFERENTIABLE), needed, strict=True)
        ]
        dquery, dkey, dvalue, dbias, _, dsinks = grads
        batch, heads, seq_len_q, head_dim = call.query.shape
        heads_kv, seq_len_k, head_dim_v = call.value.shape[1:]
        if out.numel() == 0 or seq_len_k == 0:
            return [None if grad is None else grad.zero_() for grad in grads]
        rows, keys = tile(call)
        dout = dout if dout.stride(-1) == 1 else dout.contiguous()
        lse = lse.contiguous()
        statistics = [lse.new_empty(lse.shape, dtype=lse_dtype(call.query.dtype)) for _ in range(3)]
        blocks, tiles = -(-seq_len_q // rows), -(-seq_len_k // keys)
        dims = {"DIM_V": padded(head_dim_v)}
        backward.attention_backward_rows[(blocks, batch * heads)](
            view(out),
            view(dout),
            lse,
            None if dlse is None else dlse.to(lse.dtype).contiguous(),
            *statistics,
            seq_len_q,
            heads,
            head_dim_v,
            ROWS=rows,
            **dims,
        )
        inputs = (view(call.query), view(call.key), view(call.value), view(dout), *statistics)
        rest = (problem(call), call.softmax_scale, head_dim, head_dim_v)
        sizes = {"PRECISION": precision(), "ROWS": rows, "KEYS": keys, "DIM": padded(head_dim), **dims}
        if dkey is not None or dvalue is not None:
            backward.attention_backward_keys[(tiles, batch * heads_kv)](
                *inputs, broadcast(dkey), broadcast(dvalue), *rest, **sizes
            )
        if dquery is not None or dbias is not None:
            written = None if dbias is None else dbias.zero_()
            backward.attention_backward_queries[(blocks, batch * heads)](
                *inputs, broadcast(dquery), broadcast(written), *rest, **sizes
            )
        if dsinks is not None and call.sinks is not None:
            weight = (call.sinks.to(lse.dtype)[:, None] - lse).exp()
            dsinks.copy_(-(torch.where(lse.isneginf(), 0.0, weight) * statistics[2]).sum(dim=(0, 2)))
        return grads


def tile(call: AttentionCall) -> tuple[int, int]:
    return 64, 64


def padded(dim: int) -> int:
    """Returns the power of two, at least 16, that holds ``dim``."""
    return max(16, 1 << (dim - 1).bit_length())


def precision() -> str:
    """Returns how float32 is multiplied: as float32, unless PyTorch's own setting allows TF32."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def view(tensor: Tensor) -> View:
    return View(tensor, *tensor.stride())


def broadcast(tensor: Tensor | None) -> View:
    """Returns a view in which a dimension of size 1 is every index's."""
    if tensor is None:
        return View(None, 0, 0, 0, 0)
    return View(tensor, *(0 if n == 1 else s for n, s in zip(tensor.shape, tensor.stride(), strict=True)))


def problem(call: AttentionCall) -> Problem:
    """Returns what the scores of ``call`` depend on."""
    _, num_heads_q, seq_len_q, seq_len_k = call.shape
    relative_bias = None if call.relative_bias is None else call.relative_bias[None, :, None]
    plain = not call.softcap and call.bias is None and relative_bias is None
    return Problem(
        seq_len_q,
        seq_len_k,
        num_heads_q,
        call.group_size,
        call.softmax_scale * _LOG2_E if plain else call.softmax_scale,
        call.softcap or None,
        mask(call),
        broadcast(call.bias),
        broadcast(relative_bias),
        Dropout(call.dropout_state, int(call.dropout_p * 2.0**32), 1.0 / (1.0 - call.dropout_p)),
    )


def mask(call: AttentionCall) -> Mask:
    """Returns the mask of ``call``."""
    _, _, seq_len_q, seq_len_k = call.shape
    lo: int | None = None
    hi: int | None = None
    if call.diag_lo > -seq_len_q or call.diag_hi < seq_len_k:
        # Beyond these bounds the band covers everything or nothing.
        lo = min(max(call.diag_lo, -seq_len_q), seq_len_k + 1)
        hi = max(min(call.diag_hi, seq_len_k), -seq_len_q - 1)
    dense = None if call.dense_mask is None else call.dense_mask.view(torch.uint8)
    return Mask(lo, hi, call.key_lengths, call.segments_q, call.segments_k, broadcast(dense))
