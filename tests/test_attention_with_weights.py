"""Out and mean weights in one pass: the output of attention, bit for bit, and the weights of float64."""

import attention_cases
import pytest
import torch
from exactness import assert_as_exact_as_eager
from torch import Tensor

import fastattn.nn as fnn
from fastattn import masks
from fastattn.ops import attention_weights as weights_op
from fastattn.ops.attention import attend
from fastattn.ops.attention_with_weights import attend_with_weights
from fastattn.reference import attention_weights as formula
from fastattn.spec.attention import attention_call
from fastattn.spec.attention_weights import weights_call

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def call_of(query, key, value, **options):
    options = {"backend": "cpu", "generator": torch.Generator().manual_seed(1), **options}
    return attention_call(query, key, value, **options)


def qkv(dtype, batch=2, heads=2, rows=110, keys=300, dim=64):
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(batch, heads, n, dim, generator=generator).to(dtype) for n in (rows, keys, keys)]


def assert_is_attention(call, found):
    """The same bits as attention, and weights as exact as eager PyTorch's."""
    out, lse, weights = found
    expected, expected_lse = attend(call)
    assert torch.equal(out.nan_to_num(7.0), expected.nan_to_num(7.0))
    assert torch.equal(lse.nan_to_num(7.0), expected_lse.nan_to_num(7.0))
    attention = call._replace(
        **{
            f: None if getattr(call, f) is None else getattr(call, f).double()
            for f in ("query", "key", "value", "bias", "relative_bias", "sinks")
        }
    )
    exact_lse = attend(attention._replace(backend="reference"))[1]
    exact = formula.reduced_weights(weights_call(attention, exact_lse, "head_mean", None, 1))[0]
    rounded = weights_call(call, exact_lse.to(torch.promote_types(call.query.dtype, torch.float32)), "none", None, 1)
    eager = formula.reduced_weights(rounded)[0].to(call.query.dtype).mean(1)
    assert_as_exact_as_eager({"weights": weights}, {"weights": exact}, {"weights": eager})


@pytest.mark.parametrize("name", attention_cases.CASES)
def test_every_kind_of_call(backend, name):
    case = attention_cases.CASES[name]
    # All dtypes in turn over the cases.
    at = list(attention_cases.CASES).index(name)
    for dtype in (DTYPES[at % 4], DTYPES[(at + 1) % 4]):
        given = attention_cases.inputs(case, dtype).to(dtype)
        call = attention_call(**{**attention_cases.arguments(given), "backend": backend})
        call = type(call)(*(t.detach() if isinstance(t, torch.Tensor) else t for t in call))
        assert_is_attention(call, attend_with_weights(call))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["plain", "causal", "lengths", "dense", "bias", "dropout"])
def test_several_tiles_and_panels(backend, dtype, kind):
    """Long enough for AMX in every dtype, for more blocks of queries than a panel has, and for ragged ends."""
    query, key, value = qkv(dtype, heads=3, rows=301, keys=330)
    generator = torch.Generator().manual_seed(2)
    options = {
        "plain": {},
        "causal": {"mask": masks.Causal()},
        "lengths": {"mask": masks.KeyLengths(torch.tensor([201, 0]))},
        "dense": {"mask": masks.Dense(torch.rand(2, 3, 301, 330, generator=generator) < 0.3)},
        # Scores that grow from tile to tile move what is subtracted from them.
        "bias": {"bias": (torch.arange(330) * 0.2).to(dtype)[None, None, None]},
        "dropout": {"dropout_p": 0.25, "mask": masks.Window(120, 3)},
    }[kind]
    call = call_of(query, key, value, **options, backend=backend)
    assert_is_attention(call, attend_with_weights(call))


@pytest.mark.parametrize("dtype", DTYPES)
def test_more_heads_than_are_added_up_together(backend, dtype):
    call = call_of(*qkv(dtype, batch=1, heads=19, rows=70, keys=90, dim=32), mask=masks.Causal(), backend=backend)
    assert_is_attention(call, attend_with_weights(call))


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_stays_where_it_is_visible(backend, dtype):
    query, key, value = qkv(dtype)
    visible = torch.rand(2, 1, 110, 300, generator=torch.Generator().manual_seed(3)) < 0.5
    visible[..., [7, 150, 299]] = False
    mask = masks.Dense(visible) & masks.KeyLengths(torch.tensor([300, 200]))
    clean = attend_with_weights(call_of(query, key, value, mask=mask, backend=backend))
    key[:, :, [7, 150, 299]] = float("nan")
    key[1, :, 200:] = float("inf")
    value[:, :, [7, 150]] = float("nan")
    found = attend_with_weights(call_of(query, key, value, mask=mask, backend=backend))
    for got, want in zip(found, clean, strict=True):
        torch.testing.assert_close(got, want)
    query[0, 1, 100] = float("nan")
    weights = attend_with_weights(call_of(query, key, value, mask=mask, backend=backend))[2]
    poisoned = torch.zeros_like(weights, dtype=torch.bool)
    poisoned[0, 100] = visible[0, 0, 100]
    assert torch.equal(weights.isnan(), poisoned)
    torch.testing.assert_close(weights.masked_fill(poisoned, 0.0), clean[2].masked_fill(poisoned, 0.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-38, 300.0, 1e4])
def test_rows_sum_to_one_at_any_scale(backend, dtype, scale):
    query, key, value = qkv(torch.float32)
    call = call_of((query * scale).to(dtype), key.to(dtype), value.to(dtype), backend=backend)
    weights = attend_with_weights(call)[2].double()
    assert 0.0 <= float(weights.min()) <= float(weights.max()) <= 1.0
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 110, dtype=torch.float64), rtol=0, atol=0.02)


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_at_every_thread_count(backend, dtype):
    calls = [
        call_of(*qkv(dtype, batch, 4, 500, 260), mask=masks.Causal(), dropout_p=0.1, backend=backend)
        for batch in (1, 3)
    ]
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append([t for call in calls for t in attend_with_weights(call)])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def graph(dtype=torch.float64, **options):
    tensors = [t.requires_grad_() for t in qkv(dtype, 2, 2, 20, 30, 8)]
    bias = torch.randn(1, 2, 20, 30, generator=torch.Generator().manual_seed(9)).to(dtype).requires_grad_()
    return call_of(*tensors, bias=bias, mask=masks.Causal(), **options), [*tensors, bias]


def in_two_passes(call):
    out, lse = attend(call)
    return out, lse, weights_op.weigh(weights_call(call, lse, "head_mean", None, 1))[0]


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (0, 1, 2)])
def test_gradients(wanted):
    """Of any of the results, first and second order, with dropout."""
    results = []
    for op in (attend_with_weights, in_two_passes):
        call, leaves = graph(dropout_p=0.2)
        found = [op(call)[i] for i in wanted]
        directions = [torch.linspace(-1, 1, t.numel(), dtype=t.dtype).view(t.shape) for t in found]
        first = torch.autograd.grad(found, leaves, directions, retain_graph=True, allow_unused=True)
        again = torch.autograd.grad(found, leaves, directions, create_graph=True, allow_unused=True)
        again = [g for g in again if g is not None]
        second = torch.autograd.grad(sum(g.square().sum() for g in again), leaves, allow_unused=True)
        results.append([*first, *again, *second])
    for got, want in zip(*results, strict=True):
        got, want = (torch.zeros(()) if g is None else g for g in (got, want))
        torch.testing.assert_close(got, want.expand_as(got), rtol=1e-9, atol=1e-11)


def test_unused_weights_cost_no_backward(monkeypatch):
    module = fnn.MultiheadAttention(16, 2, batch_first=True)
    x = torch.randn(2, 40, 16, requires_grad=True)
    leaves = [x, *module.parameters()]

    def refuse(*args):
        raise AssertionError("the weights' gradient is not wanted")

    expected = torch.autograd.grad(module(x, x, x, need_weights=False)[0].sum(), leaves)
    with monkeypatch.context() as patch:
        patch.setattr(weights_op, "_attention_weights_backward", refuse)
        found = torch.autograd.grad(module(x, x, x)[0].sum(), leaves)
        with pytest.raises(AssertionError, match="not wanted"):
            torch.autograd.grad(module(x, x, x)[1].square().sum(), x)
    for got, want in zip(found, expected, strict=True):
        assert torch.equal(got, want)


def test_opcheck():
    call = (t.detach().requires_grad_(t.requires_grad) if isinstance(t, Tensor) else t for t in graph(torch.float32)[0])
    torch.library.opcheck(torch.ops.fastattn.attention_with_weights.default, tuple(call))


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0)])
def test_nothing_to_attend_to(shape):
    batch, heads, rows, keys = shape
    call = call_of(*qkv(torch.float32, batch, heads, rows, keys, 8), backend="")
    out, lse, weights = attend_with_weights(call)
    assert out.shape == (batch, heads, rows, 8)
    assert lse.shape == (batch, heads, rows)
    assert weights.shape == (batch, rows, keys)
    assert not out.any()
