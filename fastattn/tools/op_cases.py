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
from fastattn.tools import eager, paged_cases, position_cases, row_cases
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
            yield attention_case(mask, bias)
    for feature in ("softcap", "sinks", "gqa", "mqa", "dropout", "value-dim", "scale", "one-query"):
        yield attention_case("causal & lengths", "none", feature)


def _lengths(shape: Shape, device: torch.device) -> Mask:
    # The second length is 0: all rows of that batch entry are empty.
    return masks.KeyLengths(torch.tensor([shape.seq_len_k * 5 // 6, 0], device=device))


def _segments(shape: Shape, device: torch.device) -> Mask:
    ids = (torch.arange(n, device=device) // max(n // 3, 1) for n in shape[2:])
    return masks.Segments(*(i.expand(shape.batch, -1) for i in ids))


def _dense(shape: Shape, device: torch.device) -> Mask:
    # Drawn on the CPU: the same wherever the tensors are.
    return masks.Dense((torch.rand(shape, generator=torch.Generator().manual_seed(SEED)) < 0.8).to(device))


MASKS: dict[str, Callable[[Shape, torch.device], Mask | None]] = {
    "none": lambda shape, device: None,
    "causal": lambda shape, device: masks.Causal(),
    "causal top-left": lambda shape, device: masks.Causal("top_left"),
    "window": lambda shape, device: masks.Window(shape.seq_len_k // 4, 8),
    "lengths": _lengths,
    "segments": _segments,
    "dense": _dense,
    "causal & lengths": lambda shape, device: masks.Causal() & _lengths(shape, device),
    "all of them": lambda shape, device: (
        masks.Window(shape.seq_len_k // 2, 0)
        & _lengths(shape, device)
        & _segments(shape, device)
        & _dense(shape, device)
    ),
}


def attention_case(
    mask_name: str, bias_name: str, feature: str = "", *, shape: Shape | None = None, head_dim: int = _HEAD_DIM
) -> OpCase:
    """Returns a call with one of :data:`MASKS`, a bias ("none", "dense", "per-head", "alibi" or "relative") and a
    feature ("" for none), by default of a shape that suits them."""
    given = shape is not None
    if shape is None:
        shape = _MANY_HEADS if bias_name == "alibi" or feature == "sinks" else _SHAPE
        shape = _ONE_QUERY if feature == "one-query" else shape
    options: dict[str, Any] = {
        "softcap": {"softcap": 1.5},
        "dropout": {"dropout_p": _DROPOUT_P},
        "scale": {"softmax_scale": 0.31},
    }.get(feature, {})
    mask = partial(MASKS[mask_name], shape)
    variant = feature or ("" if bias_name == "none" else f"{bias_name} bias")
    if given:
        variant = ", ".join(filter(None, [variant, f"d{head_dim} {'x'.join(map(str, shape))}"]))
    return OpCase(
        "attention",
        mask_name,
        variant,
        partial(_attention_tensors, shape, bias_name, feature, head_dim),
        partial(_attention, mask, bias_name, options),
        partial(_eager_attention, mask, shape, bias_name, options),
        draws=1 if given or (shape == _SHAPE and bias_name != "relative") else _DRAWS,
    )


def _attention_tensors(shape: Shape, bias_name: str, feature: str, head_dim: int, seed: int) -> Tensors:
    draw = Draw(seed)
    heads = shape.num_heads_q
    heads_kv = {"gqa": heads // 2, "mqa": 1}.get(feature, heads)
    tensors = {
        "query": draw(shape.batch, heads, shape.seq_len_q, head_dim),
        "key": draw(shape.batch, heads_kv, shape.seq_len_k, head_dim),
        "value": draw(
            shape.batch, heads_kv, shape.seq_len_k, head_dim * 5 // 8 if feature == "value-dim" else head_dim
        ),
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
    mask: Callable[[torch.device], Mask | None],
    bias_name: str,
    options: Mapping[str, Any],
    tensors: Tensors,
    backend: str | None,
) -> Tensors:
    bias = _bias(bias_name, tensors.get("bias"))
    out, lse = attention_op.attention(
        tensors["query"],
        tensors["key"],
        tensors["value"],
        mask=mask(tensors["query"].device),
        bias=bias,
        sinks=tensors.get("sinks"),
        return_lse=True,
        generator=torch.Generator().manual_seed(SEED) if "dropout_p" in options else None,
        backend=backend,
        **options,
    )
    return {"out": out, "lse": lse}


def _eager_attention(
    mask: Callable[[torch.device], Mask | None],
    shape: Shape,
    bias_name: str,
    options: Mapping[str, Any],
    tensors: Tensors,
) -> Tensors:
    bias = _bias(bias_name, tensors.get("bias"))
    device = tensors["query"].device
    visible = mask(device)
    if isinstance(bias, RelativeBias):
        keys, queries = (torch.arange(n, device=device) for n in (shape.seq_len_k, shape.seq_len_q))
        distance = keys[None, :] - queries[:, None]
        bias = bias.diagonals(*shape[1:])[:, distance + shape.seq_len_q - 1].to(tensors["query"].dtype)
    keep = None
    if "dropout_p" in options:
        state = draw_dropout_state(_DROPOUT_P, torch.Generator().manual_seed(SEED), device)
        assert state is not None
        keep = keep_mask(state, _DROPOUT_P, shape.batch * shape.num_heads_q, *shape[2:]).view(shape)
    out, lse = eager.attention(
        tensors["query"],
        tensors["key"],
        tensors["value"],
        visible=None if visible is None else visible.to_dense(*shape, device=device),
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


FAMILIES: dict[str, Callable[[], Iterator[OpCase]]] = {
    "attention": attention_cases,
    "paged_attention": paged_cases.paged_attention_cases,
    **row_cases.FAMILIES,
    **position_cases.FAMILIES,
}


def cases(ops: Iterable[str] | None = None) -> Iterator[OpCase]:
    """Yields the cases of each of ``ops``, by default of all.

    Raises:
        ValueError: there is no op of that name.
    """
    for name in FAMILIES if ops is None else ops:
        if name not in FAMILIES:
            raise ValueError(f"op must be one of {', '.join(map(repr, FAMILIES))}, got {name!r}")
        yield from FAMILIES[name]()
