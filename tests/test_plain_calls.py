"""A plain call takes one step in C++: it must give the long way's bits, and decline whatever is not plain."""

from __future__ import annotations

import math
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastattn
from fastattn.backends import extension
from fastattn.backends.extension import plain
from fastattn.masks import Causal, Window
from fastattn.reference.rotary_embedding import turns_of_base

pytestmark = pytest.mark.skipif(extension.load()[0] is None, reason="the C++ extension is not built")

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _random(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64).to(dtype)


def _attention(q, k, v, mask=None, softmax_scale=None, dropout_p=0.0, grouped=True):
    left, right, align = (None, None, "") if mask is None else (mask.left, mask.right, mask.align)
    return plain.attention(q, k, v, left, right, align == "bottom_right", softmax_scale, dropout_p, grouped)


def _equal(got, expected):
    assert isinstance(got, torch.Tensor)
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    assert [s for n, s in zip(got.shape, got.stride(), strict=True) if n > 1] == [
        s for n, s in zip(expected.shape, expected.stride(), strict=True) if n > 1
    ]
    assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (3, 1)])
@pytest.mark.parametrize(
    "mask", [None, Causal(), Causal("top_left"), Window(1, 2), Window(None, 1, "top_left")], ids=repr
)
def test_attention_is_that_of_the_long_way(dtype, heads, mask):
    query, scale = _random(2, heads[0], 5, 8, dtype=dtype), 0.3
    key, value = _random(2, heads[1], 7, 8, dtype=dtype), _random(2, heads[1], 7, 8, dtype=dtype) + 1
    _equal(
        _attention(query, key, value, mask, scale),
        fastattn.attention(query, key, value, mask=mask, softmax_scale=scale, backend="cpu"),
    )
    assert torch.equal(
        fastattn.attention(query, key, value, mask=mask),
        fastattn.attention(query, key, value, mask=mask, backend="cpu"),
    )


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (2, 0, 1), (1, 2, 0)])
@pytest.mark.parametrize("sizes", [(2, 3, 4), (1, 3, 4), (2, 3, 1), (2, 1, 4)])
@pytest.mark.parametrize("chunks", [1, 3])
def test_attention_lays_its_result_out_like_the_query(order, sizes, chunks):
    memory = _random(*(sizes[d] for d in order), 8 * chunks)
    query = memory.permute(*(order.index(d) for d in range(3)), 3).chunk(chunks, dim=-1)[0]
    assert query.shape == (*sizes, 8)
    key = _random(sizes[0], sizes[1], 6, 8)
    got = _attention(query, key, key)
    expected = fastattn.attention(query, key, key, backend="cpu")
    assert torch.equal(got, expected)
    if order != (1, 2, 0):  # heads outermost: the long way makes it contiguous
        _equal(got, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 4), (2, 3, 4, 5)])
def test_softmax_is_that_of_the_long_way(dtype, shape):
    x = _random(*shape, dtype=dtype)
    for dim in range(-len(shape), len(shape)):
        _equal(plain.softmax(x, dim, 0.7, False), fastattn.softmax(x, dim, scale=0.7, backend="cpu"))
        _equal(plain.softmax(x, dim, 1, True), fastattn.log_softmax(x, dim, backend="cpu"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 4, 5)])
@pytest.mark.parametrize("num_dims", [1, 2])
def test_norm_is_that_of_the_long_way(dtype, shape, num_dims):
    if num_dims > len(shape):
        return
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x, residual = _random(*shape, dtype=dtype), _random(*shape, dtype=dtype) - 1
    for weight_dtype in {dtype, wide}:
        weight = _random(*shape[-num_dims:], dtype=weight_dtype)
        bias = weight + 1
        for w, b in ((weight, bias), (weight, None), (None, bias), (None, None)):
            _equal(plain.norm(x, w, b, None, 1e-5, False), fastattn.layer_norm(x, w, b, backend="cpu"))
        _equal(plain.norm(x, weight, None, None, 0, True), fastattn.rms_norm(x, weight, eps=0, backend="cpu"))
        got = plain.norm(x, weight, bias, residual, 1e-5, False)
        expected = fastattn.layer_norm(x, weight, bias, residual=residual, backend="cpu")
        for a, b in zip(got, expected, strict=True):
            _equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_feed_forward_is_that_of_the_long_way(dtype, activation, gated, bias):
    x, weight_in, weight_out = (_random(*s, dtype=dtype) for s in ((2, 3, 16), (40, 16), (16, 40)))
    gate = _random(40, 16, dtype=dtype) - 0.5 if gated else None
    bias_in, bias_out = (_random(n, dtype=dtype) if bias else None for n in (40, 16))
    bias_gate = bias_in if gated else None
    _equal(
        plain.feed_forward(x, weight_in, bias_in, gate, bias_gate, weight_out, bias_out, activation, 0.0),
        fastattn.feed_forward(
            x, weight_in, bias_in, weight_out, bias_out, activation=activation, weight_gate=gate, bias_gate=bias_gate,
            backend="cpu",
        ),
    )  # fmt: skip


def _rotary(query, key=None, positions=None, cos=None, sin=None, offset=0, dim=8, interleaved=False, scale=1.0):
    turns = turns_of_base(1e4, dim, torch.device("cpu")) if cos is None else None
    return plain.rotary_embedding(query, key, turns, positions, cos, sin, offset, dim, interleaved, scale, False)


@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dim", [8, 4])
def test_rotary_embedding_is_that_of_the_long_way(dtype, interleaved, dim):
    query, key = _random(2, 3, 5, 8, dtype=dtype), _random(2, 5, 1, 8, dtype=dtype).transpose(1, 2)
    positions = torch.arange(5) * 3
    for angles in (
        {"offset": 4},
        {"positions": positions},
        {"positions": torch.stack((positions, positions + 1))},
        {"cos": _random(5, dim // 2), "sin": _random(1, 5, dim // 2, dtype=torch.float64)},
        *([] if interleaved else [{"cos": _random(2, 5, dim), "sin": _random(5, dim, dtype=torch.bfloat16)}]),
    ):
        options = {"interleaved": interleaved, "scale": 1.25, **angles}
        expected = fastattn.rotary_embedding(query, key, rotary_dim=dim, backend="cpu", **options)
        for got, want in zip(_rotary(query, key, dim=dim, **options), expected, strict=True):
            _equal(got, want)
        _equal(_rotary(query, dim=dim, **options), expected[0])
        assert torch.equal(fastattn.rotary_embedding(query, rotary_dim=dim, **options), expected[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3,), (2, 4), (2, 1, 3)])
def test_embedding_is_that_of_the_long_way(dtype, shape):
    weight, ids = _random(7, 20, dtype=dtype), torch.arange(24)[: math.prod(shape)].view(shape) % 7
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for table in (None, _random(9, 20, dtype=dtype), _random(9, 20, dtype=wide)):
        offset = 0 if table is None else 3
        expected = fastattn.embedding(ids, weight, position_table=table, offset=offset, scale=1.5, backend="cpu")
        _equal(plain.embedding(weight, ids, table, offset, 1.5), expected)
        assert torch.equal(fastattn.embedding(ids, weight, position_table=table, offset=offset, scale=1.5), expected)


_IDS = torch.tensor([[3, 0], [1, 1]])


def _calls(x=None):
    """Returns, by op, a plain call on ``x`` [2, 2, 4, 8] and constants like it."""
    x = torch.ones(2, 2, 4, 8) if x is None else x
    with torch.no_grad():
        weight, bias = torch.ones(8, 8, dtype=x.dtype), torch.zeros(8, dtype=x.dtype)
    rows = x.flatten(0, 2) if x.layout == torch.strided else x
    return {
        "attention": lambda: _attention(x, x, x),
        "softmax": lambda: plain.softmax(x, -1, 1.0, False),
        "norm": lambda: plain.norm(x, bias, bias, None, 1e-5, False),
        "feed_forward": lambda: plain.feed_forward(x, weight, bias, None, None, weight, bias, "relu", 0.0),
        "rotary_embedding": lambda: _rotary(x),
        "embedding": lambda: plain.embedding(rows, _IDS, None, 0, 1.0),
    }


OPS = tuple(_calls())


class _FunctionMode(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@contextmanager
def _functorch():
    level = torch._C._functorch._vmap_increment_nesting(2, "error")
    try:
        yield level
    finally:
        torch._C._functorch._vmap_decrement_nesting()


WATCHERS = {
    "dispatch mode": TorchDispatchMode,
    "function mode": _FunctionMode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "profiler": lambda: torch.profiler.profile(acc_events=True, activities=[torch.profiler.ProfilerActivity.CPU]),
    "forward mode": torch.autograd.forward_ad.dual_level,
    "functorch": _functorch,
}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("watcher", WATCHERS)
def test_a_watched_call_is_not_plain(op, watcher):
    call = _calls()[op]
    assert isinstance(call(), torch.Tensor)
    with WATCHERS[watcher]():
        assert call() is None
    assert isinstance(call(), torch.Tensor)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("op", OPS)
def test_a_traced_call_is_not_plain(op):
    found = []
    torch.jit.trace(lambda x: found.append(_calls(x)[op]()) or x + 1, torch.ones(2, 2, 4, 8), check_trace=False)
    assert found == [None]


class _Subclass(torch.Tensor):
    pass


_ONES = torch.ones(2, 2, 4, 8)
TENSORS = {
    "subclass": _ONES.as_subclass(_Subclass),
    "meta": _ONES.to("meta"),
    "integers": _ONES.long(),
    "complex": _ONES.to(torch.complex64),
    "sparse": _ONES.to_sparse(),
    "empty": _ONES[:0],
    "no tensor": [1.0],
    "nothing": None,
}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("kind", TENSORS)
def test_an_unusual_tensor_is_not_plain(op, kind):
    x = TENSORS[kind]
    calls = _calls()
    if kind in ("no tensor", "nothing"):
        calls |= {"attention": lambda: _attention(x, x, x), "softmax": lambda: plain.softmax(x, -1, 1.0, False)}
        calls["norm"] = lambda: plain.norm(x, None, None, None, 1e-5, False)
        weight = torch.ones(8, 8)
        calls["feed_forward"] = lambda: plain.feed_forward(x, weight, None, None, None, weight, None, "relu", 0.0)
        calls["rotary_embedding"] = lambda: _rotary(x)
        calls["embedding"] = lambda: plain.embedding(x, torch.zeros(2, dtype=torch.int64), None, 0, 1.0)
    else:
        calls = _calls(x)
    assert calls[op]() is None


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_not_plain():
    assert plain.softmax(torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(1, 3)]), -1, 1.0, False) is None


Q, X, W, B = torch.ones(2, 2, 4, 8), torch.ones(3, 8), torch.ones(16, 8), torch.ones(8)
NOT_PLAIN = {
    "attention, key's batch": lambda: _attention(Q, Q[:1], Q[:1]),
    "attention, value's heads": lambda: _attention(Q, Q, Q[:, :1]),
    "attention, value's length": lambda: _attention(Q, Q, Q[:, :, :2]),
    "attention, head_dim": lambda: _attention(Q, Q[..., :4], Q),
    "attention, value's head_dim": lambda: _attention(Q, Q, Q[..., :4]),
    "attention, heads": lambda: _attention(torch.ones(2, 3, 4, 8), Q, Q),
    "attention, no key heads": lambda: _attention(Q, Q[:, :0], Q[:, :0]),
    "attention, ungrouped heads": lambda: _attention(Q, Q[:, :1], Q[:, :1], grouped=False),
    "attention, dimensions": lambda: _attention(Q[0], Q[0], Q[0]),
    "attention, dtypes": lambda: _attention(Q, Q.double(), Q),
    "attention, strides": lambda: _attention(Q.mT.contiguous().mT, Q, Q),
    "attention, key's strides": lambda: _attention(Q, Q.mT.contiguous().mT, Q),
    "attention, expanded": lambda: _attention(Q[:1].expand(2, -1, -1, -1), Q, Q),
    "attention, scale": lambda: _attention(Q, Q, Q, softmax_scale=float("inf")),
    "attention, scale's type": lambda: _attention(Q, Q, Q, softmax_scale="1"),
    "attention, huge scale": lambda: _attention(Q, Q, Q, softmax_scale=10**400),
    "attention, dropout": lambda: _attention(Q, Q, Q, dropout_p=0.1),
    "attention, dropout's type": lambda: _attention(Q, Q, Q, dropout_p=torch.zeros(())),
    "attention, window": lambda: _attention(Q, Q, Q, Window(10**30, 0)),
    "softmax, dim": lambda: plain.softmax(X, 2, 1.0, False),
    "softmax, negative dim": lambda: plain.softmax(X, -3, 1.0, False),
    "softmax, dim's type": lambda: plain.softmax(X, True, 1.0, False),
    "softmax, huge dim": lambda: plain.softmax(X, 1 << 80, 1.0, False),
    "softmax, scale": lambda: plain.softmax(X, 0, float("nan"), False),
    "softmax, strides": lambda: plain.softmax(X.T, 0, 1.0, False),
    "softmax, no dimension": lambda: plain.softmax(torch.ones(()), 0, 1.0, False),
    "softmax, five dimensions": lambda: plain.softmax(torch.ones(1, 1, 1, 1, 1), 0, 1.0, False),
    "softmax, large": lambda: plain.softmax(torch.ones(1 << 18), 0, 1.0, False),
    "softmax, arguments": lambda: plain.softmax(X),
    "norm, weight's shape": lambda: plain.norm(X, W, None, None, 1e-5, False),
    "norm, bias's shape": lambda: plain.norm(X, B, X, None, 1e-5, False),
    "norm, weight's precision": lambda: plain.norm(X, B.double(), None, None, 1e-5, False),
    "norm, residual's shape": lambda: plain.norm(X, B, None, X[:1], 1e-5, False),
    "norm, residual's dtype": lambda: plain.norm(X, B, None, X.half(), 1e-5, False),
    "norm, eps": lambda: plain.norm(X, B, None, None, -1e-5, False),
    "norm, strides": lambda: plain.norm(torch.ones(8, 3).T, B, None, None, 1e-5, False),
    "norm, no dimension": lambda: plain.norm(torch.ones(()), None, None, None, 1e-5, False),
    "feed_forward, model_dim": lambda: plain.feed_forward(X[:, :4], W, None, None, None, W.T, None, "relu", 0.0),
    "feed_forward, out_dim": lambda: plain.feed_forward(X, W, None, None, None, W.mT[:4], None, "relu", 0.0),
    "feed_forward, bias": lambda: plain.feed_forward(X, W, B, None, None, torch.ones(8, 16), None, "relu", 0.0),
    "feed_forward, strides": lambda: plain.feed_forward(X, W, None, None, None, W.T, None, "relu", 0.0),
    "feed_forward, activation": lambda: plain.feed_forward(X, W, None, None, None, torch.ones(8, 16), None, "r", 0.0),
    "feed_forward, no activation": lambda: plain.feed_forward(X, W, None, None, None, torch.ones(8, 16), None, 1, 0.0),
    "feed_forward, dropout": lambda: plain.feed_forward(X, W, None, None, None, torch.ones(8, 16), None, "relu", 0.5),
    "feed_forward, bias without gate": lambda: plain.feed_forward(
        X, W, None, None, torch.ones(16), torch.ones(8, 16), None, "relu", 0.0
    ),
    "feed_forward, float64": lambda: plain.feed_forward(
        X.double(), W.double(), None, None, None, torch.ones(8, 16).double(), None, "relu", 0.0
    ),
    "feed_forward, dtypes": lambda: plain.feed_forward(
        X, W.half(), None, None, None, torch.ones(8, 16), None, "relu", 0.0
    ),
}

IDS = torch.tensor([[0, 2], [1, 1]])
NOT_PLAIN |= {
    "rotary, dimensions": lambda: _rotary(Q[0]),
    "rotary, float64": lambda: _rotary(Q.double()),
    "rotary, key's length": lambda: _rotary(Q, Q[:, :, :2]),
    "rotary, key's dtype": lambda: _rotary(Q, Q.half()),
    "rotary, strides": lambda: _rotary(torch.ones(2, 2, 8, 4).mT),
    "rotary, expanded": lambda: _rotary(Q[:, :1].expand(-1, 2, -1, -1)),
    "rotary, offset": lambda: _rotary(Q, offset=-1),
    "rotary, offset's type": lambda: _rotary(Q, offset=1.0),
    "rotary, dim": lambda: _rotary(Q, dim=10),
    "rotary, odd dim": lambda: _rotary(Q, dim=3),
    "rotary, scale": lambda: _rotary(Q, scale=float("nan")),
    "rotary, turns": lambda: plain.rotary_embedding(Q, None, IDS[0], None, None, None, 0, 8, False, 1.0, False),
    "rotary, positions' dtype": lambda: _rotary(Q, positions=torch.arange(4).int()),
    "rotary, positions' length": lambda: _rotary(Q, positions=torch.arange(3)),
    "rotary, positions' batch": lambda: _rotary(Q, positions=torch.zeros(3, 4, dtype=torch.int64)),
    "rotary, positions' strides": lambda: _rotary(Q, positions=torch.arange(8)[::2]),
    "rotary, table's width": lambda: _rotary(Q, cos=torch.ones(4, 3), sin=torch.ones(4, 3)),
    "rotary, table's length": lambda: _rotary(Q, cos=torch.ones(3, 8), sin=torch.ones(3, 8)),
    "rotary, table twice": lambda: _rotary(Q, cos=torch.ones(4, 8), sin=torch.ones(4, 8), interleaved=True),
    "rotary, one table": lambda: _rotary(Q, cos=torch.ones(4, 8)),
    "rotary, table's gradient": lambda: _rotary(Q, cos=torch.ones(4, 8, requires_grad=True), sin=torch.ones(4, 8)),
    "embedding, ids' dtype": lambda: plain.embedding(W, IDS.int(), None, 0, 1.0),
    "embedding, ids' strides": lambda: plain.embedding(W, IDS.t(), None, 0, 1.0),
    "embedding, id": lambda: plain.embedding(W, IDS + 16, None, 0, 1.0),
    "embedding, negative id": lambda: plain.embedding(W, IDS - 1, None, 0, 1.0),
    "embedding, scalar id": lambda: plain.embedding(W, IDS[0, 0], None, 0, 1.0),
    "embedding, weight": lambda: plain.embedding(Q, IDS, None, 0, 1.0),
    "embedding, strides": lambda: plain.embedding(torch.ones(8, 16).T, IDS, None, 0, 1.0),
    "embedding, table's width": lambda: plain.embedding(W, IDS, W[:, :4], 0, 1.0),
    "embedding, table's length": lambda: plain.embedding(W, IDS, X, 2, 1.0),
    "embedding, table's precision": lambda: plain.embedding(W, IDS, X.double(), 0, 1.0),
    "embedding, offset": lambda: plain.embedding(W, IDS, X, -1, 1.0),
    "embedding, scale": lambda: plain.embedding(W, IDS, None, 0, float("inf")),
}


@pytest.mark.parametrize("case", NOT_PLAIN)
def test_what_does_not_fit_is_declined_without_an_error(case):
    assert NOT_PLAIN[case]() is None


@pytest.mark.parametrize("op", OPS)
def test_gradients_are_wanted_only_where_they_are_enabled(op):
    x = torch.ones(2, 2, 4, 8, requires_grad=True)
    call = _calls(x)[op]
    assert type(call()) is list
    with torch.no_grad():
        assert isinstance(call(), torch.Tensor)
    with torch.inference_mode():
        assert call().is_inference()


@pytest.mark.parametrize("op", OPS)
def test_parameters_are_plain(op):
    with torch.no_grad():
        assert isinstance(_calls(torch.nn.Parameter(torch.ones(2, 2, 4, 8)))[op](), torch.Tensor)


def test_public_functions_keep_their_messages():
    with pytest.raises(ValueError, match="must be >= 0"):
        fastattn.layer_norm(X, B, None, eps=-1.0)
    with pytest.raises(ValueError, match="dim must be in"):
        fastattn.softmax(X, 5)
    with pytest.raises(TypeError, match="must be a number"):
        fastattn.attention(Q, Q, Q, dropout_p=torch.zeros(()))
    with pytest.raises(ValueError, match="broadcast together"):
        fastattn.scaled_dot_product_attention(torch.ones(2, 4, 4, 8), Q, Q)
    with pytest.raises(ValueError, match="activation must be one of"):
        fastattn.feed_forward(X, W, None, torch.ones(8, 16), None, activation="tanh")


def test_observers_and_the_backend_asked_for_are_met():
    seen = []
    with fastattn.ops._dispatch.observe(lambda op, call, backend: seen.append((op, backend.name))):
        fastattn.softmax(X)
    with fastattn.use_backend("reference"), fastattn.ops._dispatch.observe(lambda op, _, b: seen.append((op, b.name))):
        fastattn.softmax(X)
    assert seen == [("softmax", "cpu"), ("softmax", "reference")]


def test_everything_is_declined_without_the_extension(monkeypatch):
    monkeypatch.setattr(extension, "load", lambda: (None, "not built"))
    assert extension._PlainCalls().softmax(X, -1, 1.0, False) is None


def test_compiled_calls_meet_the_op():
    seen = []

    def backend(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    compiled = torch.compile(lambda x: fastattn.softmax(x), backend=backend, fullgraph=True)
    assert torch.equal(compiled(X), fastattn.softmax(X))
    assert any("fastattn.softmax" in name for name in seen)


def test_tensors_are_read_by_their_attributes_where_torch_offers_no_exchange():
    """As in a torch whose tensor type carries no DLPack table: the same bits, on either way, and nothing declined."""
    code = """
import torch
{without}
import fastattn
from fastattn.backends.extension import plain
x = torch.randn(2, 3, 5, 16, generator=torch.Generator().manual_seed(1))
for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
    q = x.to(dtype)
    assert isinstance(plain.softmax(q, -1, 1.0, False), torch.Tensor)
    assert plain.softmax(q.int(), -1, 1.0, False) is None
    leaf = q.transpose(1, 2).requires_grad_()
    results = [fastattn.attention(leaf, leaf, leaf), fastattn.softmax(leaf), fastattn.layer_norm(leaf, None, None)]
    results += torch.autograd.grad(sum(r.double().square().sum() for r in results), leaf)
    print([t.double().flatten().tolist() for t in results])
"""
    without = "torch.Tensor.__dlpack_c_exchange_api__ = None"
    outputs = [
        subprocess.run(
            [sys.executable, "-c", code.format(without=line)], check=True, capture_output=True, text=True
        ).stdout
        for line in ("", without)
    ]
    assert outputs[0].count("\n") == 4
    assert outputs[0] == outputs[1]
