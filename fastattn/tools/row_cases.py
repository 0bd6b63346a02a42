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


def softmax_cases(rows: int = _ROWS, columns: int = _COLUMNS) -> Iterator[OpCase]:
    yield from _softmax_cases("softmax", eager.softmax, rows, columns)


def log_softmax_cases(rows: int = _ROWS, columns: int = _COLUMNS) -> Iterator[OpCase]:
    yield from _softmax_cases("log_softmax", eager.log_softmax, rows, columns)


def _softmax_cases(op: str, plain: Callable[..., Tensor], rows: int, columns: int) -> Iterator[OpCase]:
    allowed = torch.rand(rows, columns, generator=torch.Generator().manual_seed(SEED)) < 0.7
    lengths = torch.arange(columns) < columns * 700 // _COLUMNS
    for mask_name, mask in (("none", None), ("dense", allowed), ("lengths", lengths)):
        for scale in (1.0, 0.125):

            def ours(t: Tensors, backend: str | None, mask: Tensor | None = mask, scale: float = scale) -> Tensors:
                given = None if mask is None else mask.to(t["input"].device).expand(rows, columns)
                return {"out": getattr(fastattn, op)(t["input"], mask=given, scale=scale, backend=backend)}

            def theirs(t: Tensors, mask: Tensor | None = mask, scale: float = scale) -> Tensors:
                return {"out": plain(t["input"], None if mask is None else mask.to(t["input"].device), scale)}

            variant = "" if scale == 1.0 else f"scale {scale}"
            yield OpCase(op, mask_name, variant, lambda seed: {"input": Draw(seed)(rows, columns) * 3}, ours, theirs)


def layer_norm_cases(rows: int = _ROWS, columns: int = _COLUMNS) -> Iterator[OpCase]:
    yield from _norm_cases("layer_norm", ("weight", "bias"), eager.layer_norm, rows, columns)


def rms_norm_cases(rows: int = _ROWS, columns: int = _COLUMNS) -> Iterator[OpCase]:
    yield from _norm_cases("rms_norm", ("weight",), eager.rms_norm, rows, columns)


def _norm_cases(
    op: str, parameters: tuple[str, ...], plain: Callable[..., Tensor], rows: int, columns: int
) -> Iterator[OpCase]:
    for with_residual in (False, True):

        def tensors(seed: int, with_residual: bool = with_residual) -> Tensors:
            draw = Draw(seed)
            names = ("input", "residual") if with_residual else ("input",)
            found = {name: draw(rows, columns) + 0.5 for name in names}
            return found | {name: draw(columns) for name in parameters}

        def ours(t: Tensors, backend: str | None) -> Tensors:
            affine = [t[name] for name in parameters]
            result = getattr(fastattn, op)(t["input"], *affine, residual=t.get("residual"), backend=backend)
            return {"out": result[0], "sum": result[1]} if "residual" in t else {"out": result}

        def theirs(t: Tensors) -> Tensors:
            total = t["input"] + t["residual"] if "residual" in t else t["input"]
            out = plain(total, *(t[name] for name in parameters))
            return {"out": out, "sum": total} if "residual" in t else {"out": out}

        yield OpCase(op, "", "residual" if with_residual else "", tensors, ours, theirs)


def feed_forward_cases(tokens: int = _ROWS, model_dim: int = _MODEL_DIM, ff_dim: int = _FF_DIM) -> Iterator[OpCase]:
    for activation in ("relu", "gelu", "gelu_tanh", "silu"):
        for gated in (False, True):
            for biases in (True, False):
                if biases or activation == "relu":
                    yield _feed_forward_case(activation, gated, biases, (tokens, model_dim, ff_dim))
    yield _feed_forward_case("gelu", False, True, (tokens, model_dim, ff_dim), residual=True)


def _feed_forward_case(
    activation: str, gated: bool, biases: bool, shape: tuple[int, int, int], residual: bool = False
) -> OpCase:
    tokens, model_dim, ff_dim = shape

    def tensors(seed: int) -> Tensors:
        draw = Draw(seed)
        found = {
            "input": draw(tokens, model_dim),
            "weight_in": draw(ff_dim, model_dim) * model_dim**-0.5,
            "weight_out": draw(model_dim, ff_dim) * ff_dim**-0.5,
        }
        if gated:
            found["weight_gate"] = draw(ff_dim, model_dim) * model_dim**-0.5
        if biases:
            found |= {"bias_in": draw(ff_dim), "bias_out": draw(model_dim)}
            if gated:
                found["bias_gate"] = draw(ff_dim)
        if residual:
            found["residual"] = draw(tokens, model_dim)
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


def linear_cross_entropy_cases(
    tokens: int = _ROWS, model_dim: int = _MODEL_DIM, vocabulary: int = _VOCABULARY
) -> Iterator[OpCase]:
    target = torch.randint(vocabulary, (tokens,), generator=torch.Generator().manual_seed(SEED))
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
                "hidden": draw(tokens, model_dim),
                "weight": draw(vocabulary, model_dim) * 0.3 * (_MODEL_DIM / model_dim) ** 0.5,
                "bias": draw(vocabulary),
            }

        def ours(t: Tensors, backend: str | None, options: Mapping[str, Any] = options) -> Tensors:
            loss = fastattn.linear_cross_entropy(
                t["hidden"], t["weight"], target.to(t["hidden"].device), bias=t["bias"], backend=backend, **options
            )
            return {"loss": loss}

        def theirs(t: Tensors, options: Mapping[str, Any] = options) -> Tensors:
            logits = torch.nn.functional.linear(t["hidden"], t["weight"], t["bias"])
            return {"loss": torch.nn.functional.cross_entropy(logits, target.to(logits.device), **options)}

        yield OpCase("linear_cross_entropy", "", variant, tensors, ours, theirs)


FAMILIES: dict[str, Callable[[], Iterator[OpCase]]] = {
    "softmax": softmax_cases,
    "log_softmax": log_softmax_cases,
    "layer_norm": layer_norm_cases,
    "rms_norm": rms_norm_cases,
    "feed_forward": feed_forward_cases,
    "linear_cross_entropy": linear_cross_entropy_cases,
}
