"""Properties of the C++ kernels over random shapes, strides, masks, dtypes and values, with guard bytes round outputs.

FASTATTN_PROPERTY_EXAMPLES sets how many examples each test draws; they are the same ones every time.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from conftest import ISAS, _cpu
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.overrides import TorchFunctionMode

import fastattn
from fastattn.backends import BY_NAME
from fastattn.masks import Causal, Dense, KeyLengths, Mask, Segments, Window
from fastattn.spec.attention import AttentionCall, attention_call
from fastattn.spec.feed_forward import feed_forward_call
from fastattn.spec.norm import norm_call
from fastattn.spec.softmax import SoftmaxBackwardCall, softmax_call

pytestmark = pytest.mark.skipif(not ISAS, reason="the extension is not built")

examples = settings(
    max_examples=int(os.environ.get("FASTATTN_PROPERTY_EXAMPLES", "60")),
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)

GUARD = 256  # bytes on either side of an output
PATTERN = 0xA5


class GuardedOutputs(TorchFunctionMode):
    """Lays every tensor that is allocated uninitialised between guard bytes, one element off the usual alignment."""

    def __init__(self) -> None:
        super().__init__()
        self.bases: list[tuple[Tensor, int, int]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") not in ("new_empty", "empty_like", "empty") or result.numel() == 0:
            return result
        start = GUARD + result.element_size()
        size = result.numel() * result.element_size()
        base = torch.full((start + size + GUARD,), PATTERN, dtype=torch.uint8)
        self.bases.append((base, start, size))
        return base[start : start + size].view(result.dtype).as_strided(result.shape, result.stride())

    def check(self) -> None:
        assert self.bases, "no output was guarded"
        for base, start, size in self.bases:
            assert bool((base[:start] == PATTERN).all()), "written before an output"
            assert bool((base[start + size :] == PATTERN).all()), "written behind an output"


@contextmanager
def guarded(isa: str) -> Iterator[None]:
    before = _cpu.isa()
    _cpu.set_isa(isa)
    outputs = GuardedOutputs()
    try:
        with outputs:
            yield
    finally:
        _cpu.set_isa(before)
    outputs.check()


DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Lengths at the edges of register tiles, vectors, words of mask bits and tiles of keys, and anything between.
lengths = st.one_of(
    st.sampled_from([1, 15, 16, 17, 63, 64, 65, 95, 96, 97, 191, 192, 193, 255, 256, 257]), st.integers(1, 300)
)
dims = st.one_of(st.sampled_from([1, 7, 8, 16, 32, 33, 64, 128]), st.integers(1, 80))


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """Returns ``tensor``, 4-D, with the same values in another place."""
    if layout == "transposed":
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "inside":  # a part of something larger, at an odd offset
        around = tensor.new_full([n + 3 for n in tensor.shape], float("nan"))
        around[1:-2, 1:-2, 1:-2, 1:-2] = tensor
        return around[1:-2, 1:-2, 1:-2, 1:-2]
    if layout == "shared":  # one batch entry for all
        return tensor[:1].expand_as(tensor)
    assert layout == "contiguous"
    return tensor


layouts = st.sampled_from(["contiguous", "transposed", "inside", "shared"])


@st.composite
def attention_calls(draw: st.DrawFn) -> AttentionCall:
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    dtype = draw(st.sampled_from(DTYPES))
    batch, heads_kv = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    heads = heads_kv * draw(st.integers(1, 3))
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
    return attention_call(
        laid_out(randn(batch, heads, len_q, dim), draw(layouts)),
        laid_out(randn(batch, heads_kv, len_k, dim), draw(layouts)),
        laid_out(randn(batch, heads_kv, len_k, dim_v), draw(layouts)),
        mask=mask,
        bias=randn(*broadcast_size()) if draw(st.integers(0, 3)) == 0 else None,
        dropout_p=draw(st.sampled_from([0.0, 0.0, 0.0, 0.3])),
        softmax_scale=None,
        softcap=draw(st.sampled_from([None, None, None, 2.0])),
        sinks=randn(heads) if draw(st.integers(0, 3)) == 0 else None,
        generator=rng,
        backend="cpu",
    )


def reference(call: AttentionCall) -> AttentionCall:
    """Returns ``call`` in float64."""
    return type(call)(*(t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in call))


def differentiate(backend: str, call: AttentionCall, dout: Tensor) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """Returns out, lse and the gradients of query, key, value, bias, relative bias and sinks."""
    kernels = BY_NAME[backend]
    out, lse = kernels.attention(call)
    needed = [t is not None for t in (call.query, call.key, call.value, call.bias, call.relative_bias, call.sinks)]
    return out, lse, kernels.attention_backward(call, out, lse, dout, None, needed)


def assert_close(found: Tensor, expected: Tensor, scale: float, dtype: torch.dtype, what: str) -> None:
    """Asserts that ``found`` is within 64 eps of ``expected`` for results of which ``scale`` bounds every term."""
    eps = torch.finfo(dtype).eps
    assert found.shape == expected.shape, what
    assert bool(found.isfinite().all()), f"{what} is not finite"
    error = float((found.double() - expected.double()).abs().max()) if found.numel() else 0.0
    assert error <= 64 * eps * scale + torch.finfo(dtype).smallest_normal, f"{what}: off by {error}, scale {scale}"


def assert_same(found: Any, expected: Any, call: AttentionCall, dout: Tensor) -> None:
    """Compares two results of :func:`differentiate`, each gradient against what bounds the terms of its sum."""

    def largest(tensor: Tensor | None) -> float:
        return 0.0 if tensor is None or tensor.numel() == 0 else float(tensor.double().abs().max())

    (out, lse, grads), (right, right_lse, right_grads) = found, expected
    dtype = call.query.dtype
    q, k, v, bias, g = (largest(t) for t in (call.query, call.key, call.value, call.bias, dout))
    dim, dim_v = call.query.shape[3], call.value.shape[3]
    keep = 1.0 / (1.0 - call.dropout_p)
    score = 1.0 + call.softmax_scale * q * k * math.sqrt(dim) + bias
    assert_close(out, right, score * v * keep, dtype, "out")
    assert torch.equal(lse.isneginf(), right_lse.isneginf())
    finite = ~right_lse.isneginf()
    # lse is never held in less than float32.
    assert_close(
        lse[finite], right_lse[finite], score * dim, max(dtype, torch.float32, key=lambda t: t.itemsize), "lse"
    )
    ds = score * g * v * math.sqrt(dim_v) * keep
    rows = call.query.shape[2] * call.group_size
    scales = (ds * k, rows * ds * q, rows * score * g * keep, rows * len_of(call.bias, call) * ds, 0.0, rows * ds)
    for name, grad, wanted, scale in zip(
        ("dq", "dk", "dv", "dbias", "", "dsinks"), grads, right_grads, scales, strict=True
    ):
        if grad is not None:
            assert_close(grad, wanted, scale, dtype, name)


def len_of(bias: Tensor | None, call: AttentionCall) -> int:
    """How many scores share an entry of a bias, over the rows."""
    return 1 if bias is None else math.prod(call.shape) // max(bias.numel(), 1)


@examples
@given(call=attention_calls(), isa=st.sampled_from(ISAS or [""]), poison=st.sampled_from(["", "nan", "inf"]))
def test_attention(call, isa, poison):
    """Forward and backward equal float64's, whatever lies where nobody may look, and stay within their outputs."""
    torch.manual_seed(1)
    dout = torch.randn(*call.query.shape[:3], call.value.shape[3]).to(call.query.dtype)
    right = differentiate("reference", reference(call), dout.double())
    clean = call
    if poison:
        call = poisoned(call, float(poison))
    with guarded(isa):
        found = differentiate("cpu", call, dout)
    assert_same(found, right, clean, dout)


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
@given(call=attention_calls(), isa=st.sampled_from(ISAS or [""]), scale=st.sampled_from([1e-30, 1e-10, 1e3, 1e15]))
def test_attention_with_extreme_scores(call, isa, scale):
    """However large or small the scores, an output lies in the hull of the visible values, and gradients are finite."""
    if call.query.dtype == torch.float16:
        scale = min(scale, 1e3)
    query, key = call.query * scale, call.key * scale
    call = call._replace(query=query, key=key, bias=None, dropout_state=None, dropout_p=0.0)
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


@examples
@given(
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from(DTYPES),
    lead=st.integers(1, 40),
    columns=st.one_of(lengths, st.integers(1, 5000)),
    layout=layouts,
    masked=st.booleans(),
    log=st.booleans(),
    scale=st.sampled_from([1.0, -0.3, 50.0]),
    isa=st.sampled_from(ISAS or [""]),
)
def test_softmax(seed, dtype, lead, columns, layout, masked, log, scale, isa):
    rng = torch.Generator().manual_seed(seed)
    input = laid_out(torch.randn(2, 1, lead, columns, generator=rng).to(dtype), layout)
    mask = torch.rand(2, 1, lead, columns, generator=rng) < 0.5 if masked else None
    dout = torch.randn(2, 1, lead, columns, generator=rng).to(dtype)
    if mask is not None:
        input = input.masked_fill(~mask, float("nan"))

    def run(backend, input, dout):
        call = softmax_call(input, 3, mask=mask, scale=scale, dtype=None, log=log, backend=backend)
        out = BY_NAME[backend].softmax(call)
        visible = call._replace(input=input).mask
        return out, BY_NAME[backend].softmax_backward(
            SoftmaxBackwardCall(out, dout, visible, 3, scale, input.dtype, log, backend)
        )

    right, right_grad = run("reference", input.double(), dout.double())
    with guarded(isa):
        out, grad = run("cpu", input, dout)
    hidden = right.isneginf()
    assert torch.equal(out.isneginf(), hidden)
    reach = float(right[~hidden].abs().max()) if (~hidden).any() else 0.0
    score = 1.0 + abs(scale) * 5.0
    assert_close(out[~hidden], right[~hidden], max(reach, 1e-3) * score, dtype, "out")
    total = 8.0 * abs(scale) * (columns if log else 1.0)
    assert_close(grad, right_grad, score * total, dtype, "dinput")


@examples
@given(
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from(DTYPES),
    lead=st.integers(1, 40),
    columns=st.one_of(lengths, st.integers(2, 3000)),
    layout=layouts,
    rms=st.booleans(),
    residual=st.booleans(),
    affine=st.booleans(),
    isa=st.sampled_from(ISAS or [""]),
)
def test_norm(seed, dtype, lead, columns, layout, rms, residual, affine, isa):
    rng = torch.Generator().manual_seed(seed)

    def randn(*size):
        return torch.randn(size, generator=rng).to(dtype)

    input = laid_out(randn(2, 1, lead, columns), layout)
    other = randn(2, 1, lead, columns) if residual else None
    weight, bias = (randn(columns), None if rms else randn(columns)) if affine else (None, None)
    options = {"eps": 1e-2, "rms": rms}
    tensors = [None if t is None else t.double() for t in (input, weight, bias, other)]
    wide = norm_call(*tensors[:3], residual=tensors[3], backend="reference", **options)
    right = BY_NAME["reference"].norm(wide)
    with guarded(isa):
        found = BY_NAME["cpu"].norm(norm_call(input, weight, bias, residual=other, backend="cpu", **options))
    # A row's mean cancels, and the smallest rstd divides what is left.
    assert_close(found[0], right[0], 60.0, dtype, "out")
    if residual:
        assert_close(found[1], right[1], 10.0, dtype, "total")


@examples
@given(
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from(DTYPES[:3]),
    tokens=lengths,
    model_dim=dims,
    ff_dim=lengths,
    out_dim=dims,
    layout=layouts,
    activation=st.sampled_from(["relu", "gelu", "gelu_tanh", "silu"]),
    gated=st.booleans(),
    biased=st.booleans(),
    dropout_p=st.sampled_from([0.0, 0.0, 0.4]),
    isa=st.sampled_from(ISAS or [""]),
)
def test_feed_forward(
    seed, dtype, tokens, model_dim, ff_dim, out_dim, layout, activation, gated, biased, dropout_p, isa
):
    rng = torch.Generator().manual_seed(seed)

    def randn(*size):
        return torch.randn(size, generator=rng).to(dtype)

    input = laid_out(randn(2, 1, tokens, model_dim), layout)
    # As large as keeps every sum near 1.
    weight_in, weight_out = randn(ff_dim, model_dim) / model_dim**0.5, randn(out_dim, ff_dim) / ff_dim**0.5
    tensors = {
        "input": input,
        "weight_in": weight_in,
        "bias_in": randn(ff_dim) if biased else None,
        "weight_out": weight_out,
        "bias_out": randn(out_dim) if biased else None,
        "weight_gate": randn(ff_dim, model_dim) / model_dim**0.5 if gated else None,
        "bias_gate": randn(ff_dim) if biased and gated else None,
    }
    dout = randn(2, 1, tokens, out_dim)

    def run(backend, tensors, dout):
        options = {"activation": activation, "dropout_p": dropout_p, "backend": backend}
        call = feed_forward_call(**tensors, generator=torch.Generator().manual_seed(3), **options)
        needed = [tensors[n] is not None for n in ("input", "weight_in", "bias_in", "weight_gate", "bias_gate")]
        needed += [True, tensors["bias_out"] is not None]
        kernels = BY_NAME[backend]
        return kernels.feed_forward(call), *kernels.feed_forward_backward(call, dout, needed)

    right = run("reference", {n: None if t is None else t.double() for n, t in tensors.items()}, dout.double())
    with guarded(isa):
        found = run("cpu", tensors, dout)
    for k, (one, expected) in enumerate(zip(found, right, strict=True)):
        if one is not None:
            terms = 2 * tokens if k > 1 else 1
            assert_close(one, expected, 8.0 * max(1.0, float(expected.abs().max())) * terms**0.5, dtype, f"result {k}")
