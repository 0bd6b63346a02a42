"""Plain calls that want gradients: the long way's bits, and everything that autograd promises of a node."""

from __future__ import annotations

import gc
import weakref
from itertools import product

import pytest
import torch
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fastattn
from fastattn.backends import extension
from fastattn.masks import Causal, Window

pytestmark = pytest.mark.skipif(extension.load()[0] is None, reason="the C++ extension is not built")

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _random(*shape, dtype=torch.float32, seed=0):
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape) + seed), dtype=torch.float64)
    return values.to(dtype).requires_grad_()


def _op(name, dtype=torch.float64):
    """Returns a call of an op, of any of its tensors and ``backend=``, and its tensors."""
    if name == "attention":
        tensors = [_random(2, heads, n, 8, dtype=dtype) for heads, n in ((4, 5), (2, 7), (2, 7))]
        return lambda q, k, v, **kw: fastattn.attention(q, k, v, mask=Causal(), softmax_scale=0.3, **kw), tensors
    if name == "softmax":
        return lambda x, **kw: fastattn.softmax(x, 1, scale=0.7, **kw), [_random(2, 5, 3, dtype=dtype)]
    if name == "log_softmax":
        return lambda x, **kw: fastattn.log_softmax(x, **kw), [_random(2, 3, 5, dtype=dtype)]
    if name == "layer_norm":
        tensors = [_random(3, 8, dtype=dtype), *(_random(8, dtype=dtype, seed=s) for s in (1, 2))]
        return lambda x, w, b, **kw: fastattn.layer_norm(x, w, b, **kw), tensors
    if name == "rms_norm":
        return lambda x, w, **kw: fastattn.rms_norm(x, w, **kw), [
            _random(2, 3, 8, dtype=dtype),
            _random(8, dtype=dtype),
        ]
    if name == "feed_forward":
        tensors = [_random(*shape, dtype=dtype) for shape in ((2, 3, 16), (40, 16), (40,), (16, 40), (16,))]
        return lambda *t, **kw: fastattn.feed_forward(*t, activation="gelu", **kw), tensors
    if name == "rotary_embedding":
        cos, sin = (_random(5, 3, dtype=dtype, seed=s).detach() for s in (1, 2))
        tensors = [_random(2, 3, 5, 8, dtype=dtype)]
        return lambda x, **kw: fastattn.rotary_embedding(x, rotary_dim=6, cos=cos, sin=sin, **kw), tensors
    if name == "embedding":
        ids = torch.tensor([[1, 4, 1], [3, 4, 4]])
        tensors = [_random(6, 8, dtype=dtype), _random(7, 8, dtype=dtype, seed=1)]
        return lambda w, t, **kw: fastattn.embedding(
            ids, w, position_table=t, offset=2, scale=1.5, padding_idx=0, **kw
        ), tensors
    raise AssertionError(name)


OPS = ("attention", "softmax", "log_softmax", "layer_norm", "rms_norm", "rotary_embedding", "embedding", "feed_forward")
# Linear ones keep nothing of what they are linear in.
LINEAR = ("rotary_embedding", "embedding")


def _grads(call, tensors, dout, **kwargs):
    wanted = [t for t in tensors if t is not None and t.requires_grad]
    return torch.autograd.grad(call(*tensors, **kwargs), wanted, dout)


def _dout(call, tensors):
    with torch.no_grad():
        return _random(*call(*tensors).shape, dtype=tensors[0].dtype, seed=9).detach()


def _is_plain(out):
    return "Plain" in out.grad_fn.name()


def _equal(found, expected):
    for got, want in zip(found, expected, strict=True):
        assert got.dtype == want.dtype
        assert got.stride() == want.stride()
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_gradients_are_those_of_the_long_way(op, dtype):
    if (op, dtype) == ("feed_forward", torch.float64):
        pytest.skip("PyTorch multiplies")
    call, tensors = _op(op, dtype)
    dout = _dout(call, tensors)
    for wanted in product((False, True), repeat=len(tensors)):
        if not any(wanted):
            continue
        for tensor, want in zip(tensors, wanted, strict=True):
            tensor.requires_grad_(want)
        assert _is_plain(call(*tensors))
        _equal([call(*tensors)], [call(*tensors, backend="cpu")])
        _equal(_grads(call, tensors, dout), _grads(call, tensors, dout, backend="cpu"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (3, 1)])
@pytest.mark.parametrize("mask", [None, Causal("top_left"), Window(1, 2), Window(None, 1, "top_left")], ids=repr)
@pytest.mark.parametrize("scale", [None, 0.3])
def test_attention_s_masks_and_heads(dtype, heads, mask, scale):
    tensors = [
        _random(2, h, n, 8, dtype=dtype, seed=s) for h, n, s in ((heads[0], 5, 0), (heads[1], 7, 1), (heads[1], 7, 2))
    ]

    def call(q, k, v, **kwargs):
        return fastattn.attention(q, k, v, mask=mask, softmax_scale=scale, **kwargs)

    dout = _dout(call, tensors)
    assert _is_plain(call(*tensors))
    _equal(_grads(call, tensors, dout), _grads(call, tensors, dout, backend="cpu"))


@pytest.mark.parametrize("chunks", [1, 3])
def test_attention_of_projected_heads(chunks):
    # [batch, seq_len, heads, head_dim] in memory, cut out of one projection or not.
    memory = [_random(2, 5, 3 * 8 * chunks, seed=s) for s in range(3)]

    def call(*memory, **kwargs):
        heads = (m.chunk(chunks, dim=-1)[0].unflatten(-1, (3, 8)).transpose(1, 2) for m in memory)
        return fastattn.attention(*heads, **kwargs)

    dout = _dout(call, memory)
    assert _is_plain(call(*memory))
    _equal(_grads(call, memory, dout), _grads(call, memory, dout, backend="cpu"))


def test_scaled_dot_product_attention_has_plain_gradients():
    tensors = [_random(1, 2, 4, 8, seed=s) for s in range(3)]
    for is_causal in (False, True):
        mask = Causal("top_left") if is_causal else None
        out = fastattn.scaled_dot_product_attention(*tensors, is_causal=is_causal)
        dout = torch.ones_like(out) * torch.arange(8.0)
        assert _is_plain(out)
        expected = fastattn.attention(*tensors, mask=mask, backend="cpu")
        _equal(torch.autograd.grad(out, tensors, dout), torch.autograd.grad(expected, tensors, dout))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parameters", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("used", [(True, True), (True, False), (False, True)])
def test_norm_with_a_residual(dtype, parameters, used):
    x, residual = _random(4, 8, dtype=dtype), _random(4, 8, dtype=dtype, seed=1)
    weight, bias = (
        _random(8, dtype=dtype, seed=s) if given else None for s, given in zip((2, 3), parameters, strict=True)
    )
    douts = [_random(4, 8, dtype=dtype, seed=s).detach() for s in (4, 5)]
    tensors = [t for t in (x, residual, weight, bias) if t is not None]

    def grads(backend):
        outs = fastattn.layer_norm(x, weight, bias, residual=residual, backend=backend)
        assert _is_plain(outs[0]) == (backend is None)
        kept = [(o, d) for o, d, use in zip(outs, douts, used, strict=True) if use]
        return torch.autograd.grad([o for o, _ in kept], tensors, [d for _, d in kept], allow_unused=True)

    for got, want in zip(grads(None), grads("cpu"), strict=True):
        assert (got is None) == (want is None)
        assert got is None or torch.equal(got, want)


@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_feed_forward_s_activations_and_gates(dtype, activation, gated, bias):
    x, weight_in, weight_out, gate = (_random(*s, dtype=dtype) for s in ((2, 3, 16), (40, 16), (16, 40), (40, 16)))
    bias_in, bias_gate, bias_out = (_random(n, dtype=dtype, seed=n) if bias else None for n in (40, 40, 16))
    gate, bias_gate = (gate, bias_gate) if gated else (None, None)

    def call(x, weight_in, bias_in, weight_out, bias_out, gate, bias_gate, **kwargs):
        return fastattn.feed_forward(
            x, weight_in, bias_in, weight_out, bias_out, activation=activation, weight_gate=gate, bias_gate=bias_gate,
            **kwargs,
        )  # fmt: skip

    tensors = [x, weight_in, bias_in, weight_out, bias_out, gate, bias_gate]
    dout = _dout(call, tensors)
    assert _is_plain(call(*tensors))
    _equal(_grads(call, tensors, dout), _grads(call, tensors, dout, backend="cpu"))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("layout", ["expanded", "transposed", "large step"])
def test_gradients_of_results_need_not_be_contiguous(op, layout):
    call, tensors = _op(op, torch.float32)
    dout = _dout(call, tensors)
    if layout == "expanded":
        dout = torch.full((), 0.5).expand(dout.shape)
    elif layout == "transposed":
        dout = dout.mT.contiguous().mT
    else:
        dout = torch.stack((dout, dout), dim=-1)[..., 0]
    _equal(_grads(call, tensors, dout), _grads(call, tensors, dout.contiguous(), backend="cpu"))


@pytest.mark.filterwarnings("ignore::fastattn.FallbackWarning")
@pytest.mark.parametrize("op", OPS[:-1])
def test_second_derivatives(op):
    call, tensors = _op(op)
    assert _is_plain(call(*tensors))
    assert torch.autograd.gradcheck(call, tensors)
    assert torch.autograd.gradgradcheck(call, tensors)


def test_second_derivatives_of_the_norm_s_sum():
    tensors = [_random(3, 4, dtype=torch.float64, seed=s) for s in range(2)]

    def call(x, residual):
        return fastattn.rms_norm(x, None, residual=residual)

    assert _is_plain(call(*tensors)[0])
    assert torch.autograd.gradgradcheck(call, tensors)


def test_second_derivatives_of_the_feed_forward():
    call, tensors = _op("feed_forward", torch.float32)
    assert _is_plain(call(*tensors))
    dout = _dout(call, tensors)

    def second(tensors, dout, **kwargs):
        grads = torch.autograd.grad(call(*tensors, **kwargs), tensors, dout, create_graph=True)
        return torch.autograd.grad(sum((g * g).sum() for g in grads), tensors, allow_unused=True)

    wide = [t.detach().double().requires_grad_() for t in tensors]
    for got, want in zip(second(tensors, dout), second(wide, dout.double(), backend="reference"), strict=True):
        assert (got is None) == (want is None)
        if got is not None:
            torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4 * want.abs().max().item())


@pytest.mark.parametrize("op", [op for op in OPS if op not in LINEAR])
def test_a_changed_input_or_result_is_noticed(op):
    call, tensors = _op(op, torch.float32)
    keeps_result = op in ("attention", "softmax", "log_softmax")
    out = call(*tensors)
    with torch.no_grad():
        (out if keeps_result else tensors[0]).add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("op", OPS)
def test_a_graph_is_freed_and_kept_as_asked(op):
    call, tensors = _op(op, torch.float32)
    out, dout = call(*tensors), _dout(call, tensors)
    first = torch.autograd.grad(out, tensors, dout, retain_graph=True)
    _equal(torch.autograd.grad(out, tensors, dout), first)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(out, tensors, dout)


@pytest.mark.parametrize("op", OPS)
def test_nothing_outlives_its_graph(op):
    call, tensors = _op(op, torch.float32)
    gc.disable()
    try:
        tensor = tensors[0] * 1.0
        out = call(tensor, *tensors[1:])
        kept = weakref.ref(tensor), weakref.ref(out.grad_fn)
        del tensor, out
        assert [ref() for ref in kept] == [None, None]
    finally:
        gc.enable()


@pytest.mark.parametrize("op", OPS)
def test_saved_tensors_go_through_hooks(op):
    call, tensors = _op(op, torch.float32)
    dout, packed = _dout(call, tensors), []

    def pack(tensor):
        packed.append(tensor.shape)
        return tensor.detach().to(torch.float64), tensor.dtype

    with saved_tensors_hooks(pack, lambda kept: kept[0].to(kept[1])):
        out = call(*tensors)
    assert _is_plain(out)
    assert packed
    expected = _grads(call, tensors, dout, backend="cpu")
    _equal(torch.autograd.grad(out, tensors, dout), expected)
    with save_on_cpu():
        out = call(*tensors)
    _equal(torch.autograd.grad(out, tensors, dout), expected)


@pytest.mark.parametrize("op", OPS)
def test_hooks_that_return_other_layouts(op):
    call, tensors = _op(op, torch.float32)
    dout = _dout(call, tensors)
    with saved_tensors_hooks(
        lambda t: t.detach(), lambda t: torch.stack((t, t), dim=-1)[..., 0] if t.dim() < 2 else t.mT.contiguous().mT
    ):
        found = _grads(call, tensors, dout)
    for got, want in zip(found, _grads(call, tensors, dout, backend="cpu"), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(op, use_reentrant):
    call, tensors = _op(op, torch.float32)
    dout = _dout(call, tensors)
    out = checkpoint(call, *tensors, use_reentrant=use_reentrant)
    for tensor in tensors:
        tensor.grad = None
    out.backward(dout)
    _equal([t.grad for t in tensors], _grads(call, tensors, dout, backend="cpu"))


@pytest.mark.parametrize("op", OPS)
def test_hooks_of_tensors_and_nodes(op):
    call, tensors = _op(op, torch.float32)
    dout, seen = _dout(call, tensors), []
    out = call(*tensors)
    out.register_hook(lambda grad: grad * 2.0)
    out.grad_fn.register_prehook(lambda grads: seen.append("before"))
    out.grad_fn.register_hook(lambda inputs, outputs: seen.append("after"))
    _equal(torch.autograd.grad(out, tensors, dout), _grads(call, tensors, dout * 2.0, backend="cpu"))
    assert seen == ["before", "after"]


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled", "ignore:Error detected in")
def test_anomaly_mode_finds_the_node():
    with torch.autograd.detect_anomaly():
        x = torch.full((2, 3), float("nan"), requires_grad=True)
        out = fastattn.softmax(x)
        assert _is_plain(out)
        with pytest.raises(RuntimeError, match=r"PlainSoftmaxBackward.*nan values"):
            out.sum().backward()


@pytest.mark.parametrize("op", OPS)
def test_whoever_watches_sees_the_gradient_s_op(op):
    call, tensors = _op(op, torch.float32)
    name = {"log_softmax": "softmax", "layer_norm": "norm", "rms_norm": "norm"}.get(op, op)
    name += "" if op == "rotary_embedding" else "_backward"  # the rotation back is a rotation
    seen = []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    out = call(*tensors)
    with Seen():
        out.sum().backward()
    assert f"fastattn.{name}.default" in seen
    seen.clear()
    out = call(*tensors)
    with fastattn.ops._dispatch.observe(lambda op, call, backend: seen.append((op, backend.name))):
        out.sum().backward()
    assert seen == [(name, "cpu")]


@pytest.mark.parametrize("op", OPS)
def test_gradients_of_parts_of_a_result(op):
    call, tensors = _op(op, torch.float32)
    dout = _dout(call, tensors)
    mask = torch.zeros_like(dout)
    mask[..., :1] = 1.0
    out = call(*tensors)
    found = torch.autograd.grad((out * dout)[..., :1].sum(), tensors)
    _equal(found, _grads(call, tensors, dout * mask, backend="cpu"))


def test_nothing_large_is_served(monkeypatch):
    x = torch.randn(1 << 18, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert not _is_plain(fastattn.softmax(x))
