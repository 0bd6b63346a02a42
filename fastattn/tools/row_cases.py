"""The cases of ``fastattn verify ops`` for the ops that work row by row: softmax, norms, feed-forward and the loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

import fastattn
from fastattn.tools import eager
from fastattn.tools.op_case import SEED, Draw, OpCase, Tensors

# Columns are no multiple of any vector, and more than a block's; a hundred rows are more than a thread's share.
_ROWS, _COLUMNS = 101, 1037
_MODEL_DIM, _FF_DIM = 96, 203
_VOCABULARY = 517


def softmax_cases() -> Iterator[OpCase]:
    yield from _softmax_cases("softmax", eager.softmax)


def log_softmax_cases() -> Iterator[OpCase]:
    yield from _softmax_cases("log_softmax", eager.log_softmax)


def _softmax_cases(op: str, plain: Callable[..., Tensor]) -> Iterator[OpCase]:
    allowed = torch.rand(_ROWS, _COLUMNS, generator=torch.Generator().manual_seed(SEED)) < 0.7
    for mask_name, mask in (("none", None), ("dense", allowed), ("lengths", torch.arange(_COLUMNS) < 700)):
        for scale in (1.0, 0.125):

            def ours(t: Tensors, backend: str | None, mask: Tensor | None = mask, scale: float = scale) -> Tensors:
                given = None if mask is None else mask.expand(_ROWS, _COLUMNS)
                return {"out": getattr(fastattn, op)(t["input"], mask=given, scale=scale, backend=backend)}

            def theirs(t: Tensors, mask: Tensor | None = mask, scale: float = scale) -> Tensors:
                return {"out": plain(t["input"], mask, scale)}

            variant = "" if scale == 1.0 else f"scale {scale}"
            yield OpCase(op, mask_name, variant, lambda seed: {"input": Draw(seed)(_ROWS, _COLUMNS) * 3}, ours, theirs)


def layer_norm_cases() -> Iterator[OpCase]:
    yield from _norm_cases("layer_norm", ("weight", "bias"), eager.layer_norm)


def rms_norm_cases() -> Iterator[OpCase]:
    yield from _norm_cases("rms_norm", ("weight",), eager.rms_norm)


def _norm_cases(op: str, parameters: tuple[str, ...], plain: Callable[..., Tensor]) -> Iterator[OpCase]:
    for with_residual in (False, True):

        def tensors(seed: int, with_residual: bool = with_residual) -> Tensors:
            draw = Draw(seed)
            names = ("input", "residual") if with_residual else ("input",)
            found = {name: draw(_ROWS, _COLUMNS) + 0.5 for name in names}
            return found | {name: draw(_COLUMNS) for name in parameters}

        def ours(t: Tensors, backend: str | None) -> Tensors:
            affine = [t[name] for name in parameters]
            result = getattr(fastattn, op)(t["input"], *affine, residual=t.get("residual"), backend=backend)
            return {"out": result[0], "sum": result[1]} if "residual" in t else {"out": result}

        def theirs(t: Tensors) -> Tensors:
            total = t["input"] + t["residual"] if "residual" in t else t["input"]
            out = plain(total, *(t[name] for name in parameters))
            return {"out": out, "sum": total} if "residual" in t else {"out": out}

        yield OpCase(op, "", "residual" if with_residual else "", tensors, ours, theirs)


def feed_forward_cases() -> Iterator[OpCase]:
    for activation in ("relu", "gelu", "gelu_tanh", "silu"):
        for gated in (False, True):
            for biases in (True, False):
                if biases or activation == "relu":
                    yield _feed_forward_case(activation, gated, biases)
    yield _feed_forward_case("gelu", False, True, residual=True)


def _feed_forward_case(activation: str, gated: bool, biases: bool, residual: bool = False) -> OpCase:
    def tensors(seed: int) -> Tensors:
        draw = Draw(seed)
        found = {
            "input": draw(_ROWS, _MODEL_DIM),
            "weight_in": draw(_FF_DIM, _MODEL_DIM) * _MODEL_DIM**-0.5,
            "weight_out": draw(_MODEL_DIM, _FF_DIM) * _FF_DIM**-0.5,
        }
        if gated:
            found["weight_gate"] = draw(_FF_DIM, _MODEL_DIM) * _MODEL_DIM**-0.5
        if biases:
            found |= {"bias_in": draw(_FF_DIM), "bias_out": draw(_MODEL_DIM)}
            if gated:
                found["bias_gate"] = draw(_FF_DIM)
        if residual:
            found["residual"] = draw(_ROWS, _MODEL_DIM)
        return found

    def arguments(t: Tensors) -> tuple[list[Any], Mapping[str, Any]]:
        positional = [t["input"], t["weight_in"], t.get("bias_in"), t["weight_out"], t.get("bias_out")]
        gate = {"weight_gate": t.get("weight_gate"), "bias_gate": t.get("bias_gate")}
        return positional, {"activation": activation, **gate}

    def ours(t: Tensors, backend: str | None) -> Tensors:
        positional, named = arguments(t)
        return {"out": fastattn.feed_forward(*positional, **named, residual=t.get("residual"), backend=backend)}

    def theirs(t: Tensors) -> Tensors:
        positional, named = arguments(t)
        out = eager.feed_forward(*positional, **named)
        return {"out": t["residual"] + out if residual else out}

    variant = activation + (", gated" if gated else "") + ("" if biases else ", no biases")
    variant += ", residual" if residual else ""
    return OpCase("feed_forward", "", variant, tensors, ours, theirs)


def linear_cross_entropy_cases() -> Iterator[OpCase]:
    target = torch.randint(_VOCABULARY, (_ROWS,), generator=torch.Generator().manual_seed(SEED))
    # Every seventh token is padding.
    target[::7] = -100
    for variant, options in (
        ("mean", {}),
        ("sum", {"reduction": "sum"}),
        ("none", {"reduction": "none"}),
        ("label smoothing", {"label_smoothing": 0.1}),
    ):

        def tensors(seed: int) -> Tensors:
            draw = Draw(seed)
            return {
                "hidden": draw(_ROWS, _MODEL_DIM),
                "weight": draw(_VOCABULARY, _MODEL_DIM) * 0.3,
                "bias": draw(_VOCABULARY),
            }

        def ours(t: Tensors, backend: str | None, options: Mapping[str, Any] = options) -> Tensors:
            loss = fastattn.linear_cross_entropy(
                t["hidden"], t["weight"], target, bias=t["bias"], backend=backend, **options
            )
            return {"loss": loss}

        def theirs(t: Tensors, options: Mapping[str, Any] = options) -> Tensors:
            logits = torch.nn.functional.linear(t["hidden"], t["weight"], t["bias"])
            return {"loss": torch.nn.functional.cross_entropy(logits, target, **options)}

        yield OpCase("linear_cross_entropy", "", variant, tensors, ours, theirs)


FAMILIES: dict[str, Callable[[], Iterator[OpCase]]] = {
    "softmax": softmax_cases,
    "log_softmax": log_softmax_cases,
    "layer_norm": layer_norm_cases,
    "rms_norm": rms_norm_cases,
    "feed_forward": feed_forward_cases,
    "linear_cross_entropy": linear_cross_entropy_cases,
}
