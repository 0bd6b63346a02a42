"""Properties of the C++ kernels for attention over random shapes, strides, masks, dtypes and values.

``property_tools`` says how examples are drawn and what is guarded.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
from conftest import ISAS
from hypothesis import given
from hypothesis import strategies as st
from property_tools import DTYPES, assert_close, dims, examples, guarded, laid_out, layouts, lengths
from torch import Tensor

import fastattn
from fastattn.backends import BY_NAME
from fastattn.biases import Alibi, RelativeBias, RelativePosition
from fastattn.masks import Causal, Dense, KeyLengths, Mask, Segments, Window
from fastattn.spec.attention import AttentionCall, attention_call
from fastattn.spec.attention_weights import REDUCTIONS, weights_call

pytestmark = pytest.mark.skipif(not ISAS, reason="the extension is not built")


class Drawn(NamedTuple):
    """A call, contiguous, and how its query, key, value, bias and mask are to lie in memory."""

    call: AttentionCall
    layouts: tuple[str, ...]

    def placed(self, poison: str = "") -> AttentionCall:
        """Returns the call with its tensors laid out; ``poison`` stands in each key, value and bias nobody may see."""
        call = poisoned(self.call, float(poison)) if poison else self.call
        fields = {}
        for name, layout in zip(("query", "key", "value", "bias", "dense_mask"), self.layouts, strict=True):
            tensor = getattr(call, name)
            # What nobody may see differs from one batch entry to the next.
            if tensor is not None:
                fields[name] = laid_out(tensor, "contiguous" if poison and layout == "shared" else layout)
        return call._replace(**fields)


@st.composite
def attention_calls(draw: st.DrawFn, plain: bool = False) -> Drawn:
    """Calls of every kind; with ``plain`` none with dropout or sinks."""
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    dtype = draw(st.sampled_from(DTYPES))
    batch, heads_kv = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    heads = heads_kv * draw(st.integers(1, 3))
    if draw(st.integers(0, 3)) == 0:  # a step of generation
        len_q, len_k = draw(st.integers(1, 4)), draw(st.integers(1, 3000))
    else:
        len_q, len_k = draw(st.one_of(st.just(1), lengths)), draw(lengths)
    dim, dim_v = draw(dims), draw(dims)
    shape = (batch, heads, len_q, len_k)

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=rng).to(dtype)

    def flags(*size: int) -> Tensor:
        return torch.rand(size, generator=rng) < draw(st.sampled_from([0.05, 0.6, 0.95]))

    def broadcast_size() -> list[int]:
        return [n if draw(st.booleans()) else 1 for n in shape]

    masks: list[Mask] = []
    for kind in draw(st.lists(st.sampled_from(["causal", "window", "lengths", "segments", "dense"]), max_size=2)):
        if kind == "causal":
            masks.append(Causal(draw(st.sampled_from(["bottom_right", "top_left"]))))
        elif kind == "window":
            masks.append(Window(draw(st.integers(0, 70)), draw(st.integers(0, 70))))
        elif kind == "lengths":
            masks.append(KeyLengths(torch.randint(0, len_k + 2, (batch,), generator=rng)))
        elif kind == "segments":
            ids = [torch.randint(0, 3, (batch, n), generator=rng).sort().values for n in (len_q, len_k)]
            masks.append(Segments(*ids))
        else:
            masks.append(Dense(flags(*broadcast_size())))
    mask = None
    for one in masks:
        mask = one if mask is None else mask & one
    bias: Tensor | RelativeBias | None = None
    kind = draw(st.sampled_from(["", "", "dense", "alibi", "relative"]))
    if kind == "dense":
        bias = randn(*broadcast_size())
    elif kind == "alibi":
        bias = Alibi(randn(heads) / 16)
    elif kind == "relative":
        bias = RelativePosition(randn(8, heads), bidirectional=draw(st.booleans()), max_distance=40)
    # A tensor at a time may lie among the smallest numbers.
    tiny = draw(st.sampled_from(["", "", "", "query", "key", "value"]))
    places = tuple(draw(layouts) for _ in range(5))
    tensors = {
        "query": randn(batch, heads, len_q, dim),
        "key": randn(batch, heads_kv, len_k, dim),
        "value": randn(batch, heads_kv, len_k, dim_v),
    }
    for name, layout in zip(tensors, places[:3], strict=True):
        if name == tiny:
            tensors[name] *= torch.finfo(dtype).smallest_normal / 2
        if layout == "shared":
            tensors[name] = tensors[name][:1].repeat(batch, 1, 1, 1)
    call = attention_call(
        **tensors,
        mask=mask,
        bias=bias,
        dropout_p=0.0 if plain else draw(st.sampled_from([0.0, 0.0, 0.0, 0.3])),
        softmax_scale=draw(st.sampled_from([None, None, 0.3, -0.7])),
        softcap=draw(st.sampled_from([None, None, None, 2.0])),
        sinks=randn(heads) if not plain and draw(st.integers(0, 3)) == 0 else None,
        generator=rng,
        backend="cpu",
    )
    if call.bias is not None and places[3] == "shared":
        call = call._replace(bias=call.bias[:1].repeat(call.bias.shape[0], 1, 1, 1))
    if call.dense_mask is not None and places[4] == "shared":
        call = call._replace(dense_mask=call.dense_mask[:1].repeat(call.dense_mask.shape[0], 1, 1, 1))
    return Drawn(call, places)


def reference(call: AttentionCall) -> AttentionCall:
    """Returns ``call`` in float64."""
    return type(call)(*(t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in call))


def differentiate(
    backend: str, call: AttentionCall, dout: Tensor, dlse: Tensor | None = None, needed: list[bool] | None = None
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """Returns out, lse and the gradients of query, key, value, bias, relative bias and sinks, or the needed ones."""
    kernels = BY_NAME[backend]
    out, lse = kernels.attention(call)
    there = [t is not None for t in (call.query, call.key, call.value, call.bias, call.relative_bias, call.sinks)]
    needed = there if needed is None else [n and t for n, t in zip(needed, there, strict=True)]
    return out, lse, kernels.attention_backward(call, out, lse, dout, dlse, needed)


def assert_same(found: Any, expected: Any, call: AttentionCall, dout: Tensor, dlse: Tensor | None) -> None:
    """Compares two results of :func:`differentiate`, each gradient against what bounds the terms of its sum."""

    def largest(tensor: Tensor | None) -> float:
        return 0.0 if tensor is None or tensor.numel() == 0 else float(tensor.double().abs().max())

    (out, lse, grads), (right, right_lse, right_grads) = found, expected
    dtype = call.query.dtype
    q, k, v, g = (largest(t) for t in (call.query, call.key, call.value, dout))
    bias = largest(call.bias) + largest(call.relative_bias)
    dim, dim_v = call.query.shape[3], call.value.shape[3]
    keep = 1.0 / (1.0 - call.dropout_p)
    score = 1.0 + abs(call.softmax_scale) * q * k * math.sqrt(dim) + bias
    assert_close(out, right, score * v * keep, dtype, "out")
    assert torch.equal(lse.isneginf(), right_lse.isneginf())
    finite = ~right_lse.isneginf()
    # lse is never held in less than float32.
    assert_close(
        lse[finite], right_lse[finite], score * dim, max(dtype, torch.float32, key=lambda t: t.itemsize), "lse"
    )
    ds = score * (g * v * math.sqrt(dim_v) * keep + largest(dlse))
    rows = call.query.shape[2] * call.group_size
    drelative = call.shape.batch * call.shape.num_heads_q * call.query.shape[2] * ds
    scales = (ds * k, rows * ds * q, rows * score * g * keep, rows * len_of(call.bias, call) * ds, drelative, rows * ds)
    for name, grad, wanted, scale in zip(
        ("dq", "dk", "dv", "dbias", "drelative", "dsinks"), grads, right_grads, scales, strict=True
    ):
        assert (grad is None) == (wanted is None), name
        if grad is not None:
            assert_close(grad, wanted, scale, dtype, name)


def len_of(bias: Tensor | None, call: AttentionCall) -> int:
    """How many scores share an entry of a bias, over the rows."""
    return 1 if bias is None else math.prod(call.shape) // max(bias.numel(), 1)


@examples
@given(
    drawn=attention_calls(),
    isa=st.sampled_from(ISAS or [""]),
    poison=st.sampled_from(["", "nan", "inf"]),
    dout_layout=layouts,
    with_dlse=st.booleans(),
    needed=st.one_of(st.none(), st.lists(st.booleans(), min_size=6, max_size=6)),
)
def test_attention(drawn, isa, poison, dout_layout, with_dlse, needed):
    """Forward and backward equal float64's, whatever lies where nobody may look, and stay within their outputs."""
    rng, call = torch.Generator().manual_seed(1), drawn.call
    dout = torch.randn(*call.query.shape[:3], call.value.shape[3], generator=rng).to(call.query.dtype)
    dout = laid_out(dout, dout_layout)
    dlse = torch.randn(call.query.shape[:3], generator=rng, dtype=torch.float64) if with_dlse else None
    right = differentiate("reference", reference(call), dout.double(), dlse, needed)
    with guarded(isa):
        found = differentiate("cpu", drawn.placed(poison), dout, dlse, needed)
        assert_same(found, right, call, dout, dlse)


@examples
@given(
    drawn=attention_calls(plain=True),
    isa=st.sampled_from(ISAS or [""]),
    poison=st.sampled_from(["", "nan", "inf"]),
    reduce=st.sampled_from(REDUCTIONS),
    size=st.integers(1, 70),
)
def test_attention_weights(drawn, isa, poison, reduce, size):
    """The weights and their reductions equal float64's; ``size`` is the k of top_k, or the pool's."""
    call = drawn.call
    top_k = min(size, call.key.shape[2]) if reduce == "top_k" else None
    wide = reference(call)
    wide_call = weights_call(wide, BY_NAME["reference"].attention(wide)[1], reduce, top_k, size)
    right, _ = BY_NAME["reference"].attention_weights(wide_call)
    with guarded(isa):
        placed = drawn.placed(poison)
        lse = BY_NAME["cpu"].attention(placed)[1]
        found, keys = BY_NAME["cpu"].attention_weights(weights_call(placed, lse, reduce, top_k, size))
        score = 1.0 + float(right.abs().max()) + sum(float(t.abs().max()) for t in (call.query, call.key)) ** 2
        score += sum(float(t.abs().max()) for t in (call.bias, call.relative_bias) if t is not None)
        score *= call.query.shape[2] if reduce == "key_sum" else 1.0
        assert_close(found, right, score, call.query.dtype, reduce)
        if reduce == "top_k":
            weights, _ = BY_NAME["reference"].attention_weights(wide_call._replace(reduce="none", top_k=0))
            there = keys >= 0
            assert bool((found[~there] == 0).all())
            picked = weights.gather(3, keys.clamp(min=0)).where(there, 0.0)
            assert_close(found, picked, score, call.query.dtype, "the weights of the keys")
            places = keys.where(there, -1 - torch.arange(keys.shape[3])).sort().values
            assert bool((places.diff(dim=3) != 0).all()), "a key twice"


@examples
@given(
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from(DTYPES),
    pairs=st.lists(st.tuples(st.integers(0, 90), st.integers(0, 150)), min_size=1, max_size=4),
    heads=st.sampled_from([(1, 1), (2, 2), (4, 2)]),
    dim=dims,
    mask=st.sampled_from([None, Causal(), Causal("top_left"), Window(20, 5)]),
    layout=layouts,
    isa=st.sampled_from(ISAS or [""]),
)
def test_varlen_attention(seed, dtype, pairs, heads, dim, mask, layout, isa):
    """Packed sequences, some of them empty: each as by itself, forward and backward."""
    rng = torch.Generator().manual_seed(seed)
    tokens = [sum(n) for n in zip(*pairs, strict=True)]
    bounds = [torch.tensor([0, *n]).cumsum(0) for n in zip(*pairs, strict=True)]
    shapes = ((tokens[0], heads[0], dim), (tokens[1], heads[1], dim), (tokens[1], heads[1], dim))
    tensors = [torch.randn(shape, generator=rng).to(dtype) for shape in shapes]
    placed = [laid_out(t[None], layout)[0].requires_grad_() for t in tensors]
    dout = torch.randn(shapes[0], generator=rng).to(dtype)

    def run(backend, tensors, dout):
        out = fastattn.varlen_attention(*tensors, *bounds, mask=mask, backend=backend)
        return [out.detach(), *torch.autograd.grad(out, tensors, dout)]

    right = run("reference", [t.double().requires_grad_() for t in tensors], dout.double())
    with guarded(isa, outputs=False):
        score = 40.0 * dim
        for name, one, expected in zip(("out", "dq", "dk", "dv"), run("cpu", placed, dout), right, strict=True):
            assert_close(one, expected, score * (100.0 if name in ("dk", "dv") else 1.0), dtype, name)


def poisoned(call: AttentionCall, value: float) -> AttentionCall:
    """Returns ``call`` with ``value`` in each key, value and bias that no query may see."""
    allowed = fastattn.masks.visible(call.mask, call.shape, torch.device("cpu")).expand(call.shape)
    batch, _, _, len_k = call.shape
    hidden = ~allowed.reshape(batch, call.key.shape[1], -1, len_k).any(dim=2)[..., None]
    fields = {name: getattr(call, name).masked_fill(hidden, value) for name in ("key", "value")}
    if call.bias is not None:
        seen = allowed
        for dim, n in enumerate(call.bias.shape):
            seen = seen.any(dim=dim, keepdim=True) if n == 1 else seen
        fields["bias"] = call.bias.masked_fill(~seen, value)
    return call._replace(**fields)


@examples
@given(drawn=attention_calls(), isa=st.sampled_from(ISAS or [""]), scale=st.sampled_from([1e-30, 1e-10, 1e3, 1e15]))
def test_attention_with_extreme_scores(drawn, isa, scale):
    """However large or small the scores, an output lies in the hull of the visible values, and gradients are finite."""
    call = drawn.call
    if call.query.dtype == torch.float16:
        scale = min(scale, 1e3)
    query, key = call.query * scale, call.key * scale
    call = call._replace(query=query, key=key, bias=None, relative_bias=None, dropout_state=None, dropout_p=0.0)
    call = drawn._replace(call=call).placed()
    with guarded(isa):
        out, lse, grads = differentiate(
            "cpu", call, torch.ones(*query.shape[:3], call.value.shape[3], dtype=query.dtype)
        )
    assert not out.isnan().any()
    assert not lse.isnan().any()
    allowed = fastattn.masks.visible(call.mask, call.shape, torch.device("cpu")).expand(call.shape)
    assert bool((out[~allowed.any(dim=-1)] == 0).all())
    values = call.value.float().repeat_interleave(call.group_size, dim=1)
    slack = 4 * torch.finfo(out.dtype).eps * float(values.abs().max())
    low, high = values.amin(dim=2, keepdim=True), values.amax(dim=2, keepdim=True)
    # A sink, and a row without a key, pull the average towards 0.
    assert bool((out.float() <= high.clamp(min=0.0) + slack).all())
    assert bool((out.float() >= low.clamp(max=0.0) - slack).all())
    if call.query.dtype != torch.float16:  # where sums of large queries overflow
        assert all(bool(g.isfinite().all()) for g in grads if g is not None)
