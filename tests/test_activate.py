"""activate(): F.scaled_dot_product_attention runs on fastattn, gives PyTorch's answer, and comes back exactly."""

from __future__ import annotations

import threading
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import fastattn
from fastattn.backends.extension import plain
from fastattn.ops import _dispatch
from fastattn.tools import activate as routing

pytestmark = pytest.mark.filterwarnings("ignore::fastattn.FallbackWarning")


@pytest.fixture(autouse=True)
def _never_left_on():
    yield
    left_on = routing.is_active()
    fastattn.deactivate()
    assert not left_on, "the test left the routing on"


@pytest.fixture
def arrivals(monkeypatch):
    """Counts the calls that reach fastattn."""
    seen = []
    original = routing.scaled_dot_product_attention

    def counted(*args, **kwargs):
        seen.append(args)
        return original(*args, **kwargs)

    monkeypatch.setattr(routing, "scaled_dot_product_attention", counted)
    return seen


def _qkv(*shape, requires_grad=False, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=g, dtype=dtype).requires_grad_(requires_grad) for _ in range(3)]


CALLS = {
    "plain": {},
    "causal": {"is_causal": True},
    "mask": {"attn_mask": torch.ones(9, 9, dtype=torch.bool).tril()},
    "float mask": {"attn_mask": torch.linspace(-1, 1, 81).view(9, 9)},
    "scale": {"scale": 0.2},
}


@pytest.mark.parametrize("options", CALLS.values(), ids=CALLS.keys())
def test_values_and_gradients_are_those_of_float64(options, arrivals):
    exact = [t.detach().double().requires_grad_() for t in _qkv(2, 3, 9, 8)]
    wide = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in options.items()}
    expected = F.scaled_dot_product_attention(*exact, **wide)
    expected_grads = torch.autograd.grad(expected.square().sum(), exact)
    with fastattn.activate():
        inputs = _qkv(2, 3, 9, 8, requires_grad=True)
        out = F.scaled_dot_product_attention(*inputs, **options)
        grads = torch.autograd.grad(out.square().sum(), inputs)
    assert len(arrivals) == 1
    torch.testing.assert_close(out.double(), expected, atol=2e-6, rtol=2e-6)
    for grad, want in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad.double(), want, atol=1e-5, rtol=1e-5)


def test_inference_mode_autocast_and_early_imports_arrive(arrivals):
    q, k, v = _qkv(1, 2, 5, 8)
    with fastattn.activate(), torch.inference_mode():
        F.scaled_dot_product_attention(q, k, v)
        torch._C._nn.scaled_dot_product_attention(q, k, v)
        with torch.autocast("cpu", torch.bfloat16):
            assert F.scaled_dot_product_attention(q, k, v).dtype == torch.bfloat16
    assert len(arrivals) == 3


def test_modules_arrive_in_training_and_in_evaluation(arrivals):
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    x = _qkv(2, 5, 16)[0]
    with torch.no_grad():
        expected = layer(x)
        with fastattn.activate():
            torch.testing.assert_close(layer.train()(x), expected)
            torch.testing.assert_close(layer.eval()(x), expected)
    assert len(arrivals) == 2


@pytest.fixture
def served(monkeypatch):
    """Names the ops that fastattn serves."""
    seen = []
    original = _dispatch.choose

    def choose(op, call, *failed):
        seen.append(op)
        return original(op, call, *failed)

    monkeypatch.setattr(_dispatch, "choose", choose)
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"is_causal": True}, {"attn_mask": torch.rand(9, 9) < 0.7}, {"attn_mask": torch.rand(2, 1, 9, 9)}],
    ids=["plain", "causal", "mask", "float mask"],
)
def test_compiled_code_follows_the_routing(served, options, dtype):
    torch._dynamo.reset()
    if "attn_mask" in options and options["attn_mask"].dtype != torch.bool:
        options = {"attn_mask": options["attn_mask"].to(dtype)}
    compiled = torch.compile(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **options), backend="aot_eager", fullgraph=True
    )
    heads_last = [t.transpose(1, 2) for t in _qkv(2, 9, 3, 8, dtype=dtype)]
    inputs = [t.detach().requires_grad_() for t in heads_last]

    def run():
        served.clear()
        out = compiled(*inputs)
        return out, *torch.autograd.grad(out.float().square().sum(), inputs)

    expected = run()
    assert not served
    with fastattn.activate():
        found = run()
    assert served == ["attention", "attention_backward"]
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)
        assert got.stride() == want.stride()
    # Compiled while active, and yet PyTorch's own again; nothing of ours was traced.
    torch._dynamo.reset()
    with fastattn.activate():
        run()
    for got, want in zip(run(), expected, strict=True):
        assert torch.equal(got, want)
    assert not served
    torch._dynamo.reset()


def test_operation_counters_see_pytorchs_op():
    q, k, v = _qkv(1, 2, 5, 8)
    with FlopCounterMode(display=False) as stock:
        F.scaled_dot_product_attention(q, k, v)
    with fastattn.activate(), FlopCounterMode(display=False) as routed:
        F.scaled_dot_product_attention(q, k, v)
    assert routed.get_total_flops() == stock.get_total_flops()


def test_everything_is_restored():
    q, k, v = _qkv(2, 3, 9, 8)
    before = F.scaled_dot_product_attention(q, k, v)
    op = torch.ops.aten.scaled_dot_product_attention.default
    keys = ("CPU", "AutogradCPU")
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with fastattn.activate():
            assert all(torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), key) for key in keys)
        assert torch.backends.mha.get_fastpath_enabled() is False
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    with fastattn.activate():
        assert torch.backends.mha.get_fastpath_enabled() is False
    assert torch.backends.mha.get_fastpath_enabled() is True
    assert not any(torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), key) for key in keys)
    assert torch.equal(F.scaled_dot_product_attention(q, k, v), before)


def test_restored_after_an_error():
    with pytest.raises(KeyError), fastattn.activate():
        raise KeyError
    assert not routing.is_active()


def test_blocks_nest_inside_a_switch():
    fastattn.activate()
    fastattn.activate()
    with fastattn.activate(), fastattn.activate():
        pass
    assert routing.is_active()
    fastattn.deactivate()
    assert not routing.is_active()
    fastattn.deactivate()


def test_a_block_keeps_routing_through_deactivate():
    with fastattn.activate():
        fastattn.deactivate()
        assert routing.is_active()
    assert not routing.is_active()


def test_overlapping_threads():
    inside, leave = threading.Barrier(3), threading.Event()

    def work():
        with fastattn.activate():
            inside.wait()
            leave.wait()
            assert routing.is_active()

    threads = [threading.Thread(target=work) for _ in range(2)]
    for t in threads:
        t.start()
    inside.wait()
    with fastattn.activate():
        pass
    assert routing.is_active()
    leave.set()
    for t in threads:
        t.join()
    assert not routing.is_active()


def test_a_request_for_the_math_backend_is_respected(arrivals):
    q, k, v = _qkv(1, 2, 5, 8)
    with fastattn.activate(), sdpa_kernel(SDPBackend.MATH):
        F.scaled_dot_product_attention(q, k, v)
    assert not arrivals


def test_bad_input_raises_pytorchs_own_error():
    q = torch.randn(1, 4, 5, 8)
    bad = torch.randn(1, 2, 5, 8)
    with pytest.raises(RuntimeError) as stock:
        F.scaled_dot_product_attention(q, bad, bad)
    with fastattn.activate(), pytest.raises(RuntimeError) as routed:
        F.scaled_dot_product_attention(q, bad, bad)
    assert str(routed.value) == str(stock.value)


def test_a_mask_together_with_is_causal_means_what_it_means_to_pytorch(served):
    q, k, v = _qkv(1, 2, 5, 8)
    mask = torch.tensor([[True, True, False, True, True]])
    expected = F.scaled_dot_product_attention(q, k, v, mask, is_causal=True)
    with fastattn.activate():
        torch.testing.assert_close(F.scaled_dot_product_attention(q, k, v, mask, is_causal=True), expected)
    assert served == ["attention"]


@pytest.mark.parametrize("compiled", [False, True])
def test_what_fastattn_refuses_is_served_by_pytorch_with_one_warning(compiled, monkeypatch):
    def refuse(op, call, *failed):
        raise fastattn.UnsupportedError(op, {"cpu": ["is asleep"]})

    torch._dynamo.reset()
    call = (
        torch.compile(F.scaled_dot_product_attention, backend="aot_eager")
        if compiled
        else F.scaled_dot_product_attention
    )
    inputs = _qkv(1, 2, 5, 8, requires_grad=True)
    expected = call(*inputs)
    expected_grads = torch.autograd.grad(expected.square().sum(), inputs)
    monkeypatch.setattr(_dispatch, "choose", refuse)
    monkeypatch.setattr(plain, "attention", lambda *args: None, raising=False)
    routing._warned.clear()
    with fastattn.activate(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        out = call(*inputs)
        grads = torch.autograd.grad(out.square().sum(), inputs)
        call(*inputs)
    assert torch.equal(out, expected)
    assert all(torch.equal(g, want) for g, want in zip(grads, expected_grads, strict=True))
    assert {w.category for w in caught} == {fastattn.FallbackWarning}
    assert 1 <= len(caught) <= 2, "one for each direction"
    assert "is asleep" in str(caught[0].message)
    torch._dynamo.reset()


def test_importing_activates_nothing():
    assert not routing.is_active()
