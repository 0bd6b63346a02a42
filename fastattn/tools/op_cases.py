"""The calls that ``fastattn verify ops`` checks: every mask with every bias, and every other feature once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fastattn.ops.attention as attention_op
from fastattn import masks
from fastattn.biases import Alibi, RelativeBias, RelativePosition
from fastattn.masks import Mask, Shape
from fastattn.reference.philox import keep_mask
from fastattn.spec.checks import draw_dropout_state
from fastattn.tools import eager, row_cases
from fastattn.tools.op_case import SEED, Draw, OpCase, Tensors

# No multiple of any tile, and more than one of each: edges, full blocks and the steps between them all occur.
_SHAPE = Shape(batch=2, num_heads_q=2, seq_len_q=117, seq_len_k=453)
# Where a tensor has one element a head, or a row's errors share one denominator, two heads are too few for a mean: more
# heads, and # several draws taken together.
_MANY_HEADS = Shape(batch=2, num_heads_q=16, seq_len_q=37, seq_len_k=70)
_ONE_QUERY = Shape(batch=2, num_heads_q=16, seq_len_q=1, seq_len_k=453)
_DRAWS = 4
_HEAD_DIM = 64
_DROPOUT_P = 0.3


def attention_cases() -> Iterator[OpCase]:
    """Yields every mask with every bias, and each further feature under a causal mask with lengths."""
    for mask in MASKS:
        for bias in ("none", "dense", "per-head", "alibi", "relative"):
            yield _attention_case(mask, bias)
    for feature in ("softcap", "sinks", "gqa", "mqa", "dropout", "value-dim", "scale", "one-query"):
        yield _attention_case("causal & lengths", "none", feature)


def _lengths(shape: Shape) -> Mask:
    # The second length is 0: all rows of that batch entry are empty.
    return masks.KeyLengths(torch.tensor([shape.seq_len_k * 5 // 6, 0]))


def _segments(shape: Shape) -> Mask:
    ids = (torch.arange(n) // (n // 3) for n in shape[2:])
    return masks.Segments(*(i.expand(shape.batch, -1) for i in ids))


def _dense(shape: Shape) -> Mask:
    return masks.Dense(torch.rand(shape, generator=torch.Generator().manual_seed(SEED)) < 0.8)


MASKS: dict[str, Callable[[Shape], Mask | None]] = {
    "none": lambda shape: None,
    "causal": lambda shape: masks.Causal(),
    "causal top-left": lambda shape: masks.Causal("top_left"),
    "window": lambda shape: masks.Window(shape.seq_len_k // 4, 8),
    "lengths": _lengths,
    "segments": _segments,
    "dense": _dense,
    "causal & lengths": lambda shape: masks.Causal() & _lengths(shape),
    "all of them": lambda shape: (
        masks.Window(shape.seq_len_k // 2, 0) & _lengths(shape) & _segments(shape) & _dense(shape)
    ),
}


def _attention_case(mask_name: str, bias_name: str, feature: str = "") -> OpCase:
    shape = _SHAPE
    if bias_name == "alibi" or feature == "sinks":
        shape = _MANY_HEADS
    if feature == "one-query":
        shape = _ONE_QUERY
    options: dict[str, Any] = {
        "softcap": {"softcap": 1.5},
        "dropout": {"dropout_p": _DROPOUT_P},
        "scale": {"softmax_scale": 0.31},
    }.get(feature, {})
    mask = MASKS[mask_name](shape)
    return OpCase(
        "attention",
        mask_name,
        feature or ("" if bias_name == "none" else f"{bias_name} bias"),
        partial(_attention_tensors, shape, bias_name, feature),
        partial(_attention, mask, bias_name, options),
        partial(_eager_attention, mask, shape, bias_name, options),
        draws=1 if shape == _SHAPE and bias_name != "relative" else _DRAWS,
    )


def _attention_tensors(shape: Shape, bias_name: str, feature: str, seed: int) -> Tensors:
    draw = Draw(seed)
    heads = shape.num_heads_q
    heads_kv = {"gqa": heads // 2, "mqa": 1}.get(feature, heads)
    tensors = {
        "query": draw(shape.batch, heads, shape.seq_len_q, _HEAD_DIM),
        "key": draw(shape.batch, heads_kv, shape.seq_len_k, _HEAD_DIM),
        "value": draw(shape.batch, heads_kv, shape.seq_len_k, 40 if feature == "value-dim" else _HEAD_DIM),
    }
    if bias_name == "dense":
        tensors["bias"] = draw(*shape)
    if bias_name == "per-head":
        tensors["bias"] = draw(1, *shape[1:])
    if bias_name == "alibi":
        tensors["bias"] = draw(heads).exp() / 16
    if bias_name == "relative":
        tensors["bias"] = draw(32, heads)
    if feature == "sinks":
        tensors["sinks"] = draw(heads)
    return tensors


def _attention(
    mask: Mask | None, bias_name: str, options: Mapping[str, Any], tensors: Tensors, backend: str | None
) -> Tensors:
    bias = _bias(bias_name, tensors.get("bias"))
    out, lse = attention_op.attention(
        tensors["query"],
        tensors["key"],
        tensors["value"],
        mask=mask,
        bias=bias,
        sinks=tensors.get("sinks"),
        return_lse=True,
        generator=torch.Generator().manual_seed(SEED) if "dropout_p" in options else None,
        backend=backend,
        **options,
    )
    return {"out": out, "lse": lse}


def _eager_attention(
    mask: Mask | None, shape: Shape, bias_name: str, options: Mapping[str, Any], tensors: Tensors
) -> Tensors:
    bias = _bias(bias_name, tensors.get("bias"))
    if isinstance(bias, RelativeBias):
        distance = torch.arange(shape.seq_len_k)[None, :] - torch.arange(shape.seq_len_q)[:, None]
        bias = bias.diagonals(*shape[1:])[:, distance + shape.seq_len_q - 1].to(tensors["query"].dtype)
    keep = None
    if "dropout_p" in options:
        state = draw_dropout_state(_DROPOUT_P, torch.Generator().manual_seed(SEED), torch.device("cpu"))
        assert state is not None
        keep = keep_mask(state, _DROPOUT_P, shape.batch * shape.num_heads_q, *shape[2:]).view(shape)
    out, lse = eager.attention(
        tensors["query"],
        tensors["key"],
        tensors["value"],
        visible=None if mask is None else mask.to_dense(*shape),
        bias=bias,
        sinks=tensors.get("sinks"),
        keep=keep,
        **options,
    )
    return {"out": out, "lse": lse}


def _bias(name: str, tensor: Tensor | None) -> Tensor | RelativeBias | None:
    if tensor is None or name in ("dense", "per-head"):
        return tensor
    return Alibi(tensor) if name == "alibi" else RelativePosition(tensor, max_distance=64)


FAMILIES: dict[str, Callable[[], Iterator[OpCase]]] = {"attention": attention_cases, **row_cases.FAMILIES}


def cases(ops: Iterable[str] | None = None) -> Iterator[OpCase]:
    """Yields the cases of each of ``ops``, by default of all.

    Raises:
        ValueError: there is no op of that name.
    """
    for name in FAMILIES if ops is None else ops:
        if name not in FAMILIES:
            raise ValueError(f"op must be one of {', '.join(map(repr, FAMILIES))}, got {name!r}")
        yield from FAMILIES[name]()
