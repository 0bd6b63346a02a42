"""Attention as an op: dispatcher, compile, export, derivatives of every order, drop-in SDPA, bad and empty input."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attention_cases import CASES, Case, arguments, inputs, run
from torch import Tensor
from torch.autograd import forward_ad

import fastattn
from fastattn.backends.cpu import CpuBackend
from fastattn.backends.extension import plain
from fastattn.biases import Alibi, RelativePosition
from fastattn.errors import FallbackWarning, UnsupportedError
from fastattn.masks import Causal, Dense, KeyLengths, Segments, Window
from fastattn.ops import _dispatch
from fastattn.spec.attention import attention_call

HAS_CPU = fastattn.backends()["cpu"].available
BACKENDS = ["reference", *(["cpu"] if HAS_CPU else [])]
SMALL = ["plain", "everything", "alibi", "relative", "dropout-gqa", "bias-keys"]


def shrink(name: str) -> Case:
    """Returns a case of a few rows, so that numerical derivatives are quick."""
    case = CASES[name]
    return Case(**{**vars(case), "batch": 2, "seq_len": (5, 6), "head_dim": (3, 2)})


# Dispatcher.


def as_leaves(call: Any) -> tuple[Any, ...]:
    return tuple(t.detach().requires_grad_(t.requires_grad) if isinstance(t, Tensor) else t for t in call)


def check_ops(call: Any, dlse: Tensor | None, dtype: torch.dtype) -> None:
    torch.library.opcheck(torch.ops.fastattn.attention.default, as_leaves(call))
    plain = tuple(t.detach() if isinstance(t, Tensor) else t for t in call)
    out, lse = torch.ops.fastattn.attention(*plain)
    needed = [t is not None for t in plain[:6]]
    args = (*plain, out, lse, torch.randn_like(out), dlse, needed)
    torch.library.opcheck(torch.ops.fastattn.attention_backward.default, args)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(name: str, dtype: torch.dtype) -> None:
    given = inputs(shrink(name), dtype).to(dtype)
    more = arguments(given)
    check_ops(attention_call(**more, backend=""), given.dlse, dtype)


@pytest.mark.parametrize("how", ["transposed", "expanded", "sliced"])
def test_opcheck_strides(how: str) -> None:
    leaf = torch.randn(2, 5, 2, 8)
    tensor = {
        "transposed": lambda: leaf.transpose(1, 2),
        "expanded": lambda: leaf[:, :1].expand(-1, 5, -1, -1),
        "sliced": lambda: leaf[..., :3],
    }[how]()
    more = arguments(inputs(Case()), query=tensor.requires_grad_(), key=tensor.detach(), value=tensor.detach())
    check_ops(attention_call(**more, backend=""), None, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["plain", "everything", "relative"])
def test_compile(name: str, backend: str) -> None:
    given = inputs(replace(shrink(name), dropout_p=0.0)).to(torch.float32)

    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return fastattn.attention(**arguments(given, backend=backend, query=query, key=key, value=value)) * 2.0

    leaves = [given.leaves[n] for n in ("query", "key", "value")]
    expected = call(*leaves)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")(*leaves)
    assert torch.equal(compiled, expected)
    for a, b in zip(
        torch.autograd.grad(compiled, leaves, given.dout),
        torch.autograd.grad(expected, leaves, given.dout),
        strict=True,
    ):
        assert torch.equal(a, b)


class Block(torch.nn.Module):
    def forward(self, query: Tensor, lengths: Tensor) -> Tensor:
        mask = Causal() & KeyLengths(lengths)
        bias = Alibi.geometric(query.shape[1])
        out = fastattn.attention(query, query, query, mask=mask, bias=bias, softcap=4.0)
        return out + fastattn.scaled_dot_product_attention(query, query, query, is_causal=True)


def test_export() -> None:
    example = torch.randn(2, 4, 10, 8), torch.tensor([10, 3])
    length = torch.export.Dim("length", min=2, max=64)
    program = torch.export.export(Block(), example, dynamic_shapes=({2: length}, {}))
    for seq_len in (10, 23):
        query, lengths = torch.randn(2, 4, seq_len, 8), torch.tensor([7, seq_len])
        torch.testing.assert_close(program.module()(query, lengths), Block()(query, lengths))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    query = torch.randn(1, 2, 9, 8, requires_grad=True)
    with torch.autocast("cpu", dtype=dtype):
        out = fastattn.attention(query, query, query)
        wide = fastattn.attention(query.double(), query.double(), query.double())
    assert out.dtype == dtype
    assert wide.dtype == torch.float64
    (grad,) = torch.autograd.grad(out.sum(), query)
    assert grad.dtype == torch.float32
    half = query.detach().to(dtype)
    assert torch.equal(out, fastattn.attention(half, half, half))


def test_refusal_gives_each_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CpuBackend, "unavailable", lambda self: "install g++")
    query = torch.randn(1, 2, 3, 4)
    with pytest.raises(UnsupportedError, match="cpu: install g"):
        fastattn.attention(query, query, query, backend="cpu")
    monkeypatch.setattr(plain, "attention", lambda *args: None)
    _dispatch._warned.clear()
    with pytest.warns(FallbackWarning, match="because: cpu: install g"):
        fastattn.attention(query, query, query)
    fastattn.attention(query, query, query)  # an error if it warned again


def test_automatic_choice() -> None:
    query = torch.randn(1, 2, 3, 4)
    if HAS_CPU:
        assert torch.equal(
            fastattn.attention(query, query, query), fastattn.attention(query, query, query, backend="cpu")
        )
    with fastattn.use_backend("reference"):
        inside = fastattn.attention(query, query, query)
    assert torch.equal(inside, fastattn.attention(query, query, query, backend="reference"))


# Derivatives.


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SMALL)
def test_gradcheck(name: str, backend: str) -> None:
    given = inputs(shrink(name)).to(torch.float64)
    names = list(given.leaves)

    def call(*leaves: Tensor) -> tuple[Tensor, ...]:
        more = arguments(given._replace(leaves=dict(zip(names, leaves, strict=True))), backend=backend, return_lse=True)
        out, lse = fastattn.attention(**more)
        return out, torch.where(lse.isneginf(), 0.0, lse)  # an empty row's lse has no numerical derivative

    leaves = tuple(given.leaves.values())
    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)


@pytest.mark.filterwarnings("ignore::fastattn.FallbackWarning", "ignore:.torch.jit.script. is deprecated")
@pytest.mark.parametrize("name", SMALL)
def test_forward_mode(name: str) -> None:
    given = inputs(shrink(name)).to(torch.float64)
    leaves = {n: t.detach() for n, t in given.leaves.items()}
    torch.manual_seed(0)
    tangents = {n: torch.randn_like(t) for n, t in leaves.items()}
    with forward_ad.dual_level():
        duals = {n: forward_ad.make_dual(t, tangents[n]) for n, t in leaves.items()}
        out = fastattn.attention(**arguments(given._replace(leaves=duals)))
        tangent = forward_ad.unpack_dual(out).tangent

    def along(step: float) -> Tensor:
        moved = {n: t + step * tangents[n] for n, t in leaves.items()}
        return fastattn.attention(**arguments(given._replace(leaves=moved)))

    torch.testing.assert_close(tangent, (along(1e-5) - along(-1e-5)) / 2e-5, rtol=1e-6, atol=1e-7)


@pytest.mark.filterwarnings("ignore::fastattn.FallbackWarning")
def test_function_transforms() -> None:
    query, key, value = (torch.randn(3, 1, 2, 5, 4, dtype=torch.float64) for _ in range(3))

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return fastattn.attention(q, k, v, mask=Causal()).square().sum()

    grads = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1, 2)))(query, key, value)
    for i in range(3):
        leaves = [t[i].clone().requires_grad_() for t in (query, key, value)]
        for a, b in zip(grads, torch.autograd.grad(loss(*leaves), leaves), strict=True):
            torch.testing.assert_close(a[i], b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_second_order_matches_plain_pytorch(backend: str) -> None:
    leaves = [torch.randn(1, 2, 7, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]

    def penalty(function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        (grad,) = torch.autograd.grad(function(*leaves).sin().sum(), leaves[0], create_graph=True)
        return torch.autograd.grad(grad.square().sum(), leaves)

    found = penalty(lambda q, k, v: fastattn.attention(q, k, v, backend=backend))
    for a, b in zip(found, penalty(lambda q, k, v: torch.softmax(q @ k.mT / 2.0, -1) @ v), strict=True):
        torch.testing.assert_close(a, b)


# Drop-in SDPA.


@pytest.mark.parametrize(
    ("shapes", "options"),
    [
        (((7, 8), (9, 8), (9, 5)), {}),
        (((3, 7, 8), (3, 9, 8), (3, 9, 5)), {"scale": -0.3}),
        (((2, 3, 7, 8), (2, 3, 9, 8), (2, 3, 9, 8)), {"is_causal": True}),
        (((2, 3, 4, 7, 8), (2, 3, 4, 9, 8), (2, 3, 4, 9, 8)), {"mask": (2, 3, 1, 7, 9)}),
        (((2, 3, 4, 7, 8), (1, 1, 4, 9, 8), (2, 1, 4, 9, 8)), {"mask": (7, 9)}),
        (((2, 6, 7, 8), (2, 2, 9, 8), (2, 2, 9, 8)), {"enable_gqa": True, "mask": (2, 1, 7, 9), "float": True}),
        (((2, 4, 7, 8), (2, 1, 9, 8), (2, 1, 9, 8)), {}),
    ],
)
def test_sdpa_is_torchs(shapes: tuple[tuple[int, ...], ...], options: dict[str, Any]) -> None:
    torch.manual_seed(1)
    leaves = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    options = dict(options)
    size = options.pop("mask", None)
    if size is not None:
        mask = torch.randn(size, dtype=torch.float64)
        options["attn_mask"] = mask if options.pop("float", False) else (mask < 1).index_fill(-1, torch.tensor(0), True)
    found = fastattn.scaled_dot_product_attention(*leaves, **options)
    expected = F.scaled_dot_product_attention(*leaves, **options)
    torch.testing.assert_close(found, expected)
    dout = torch.randn_like(found)
    for a, b in zip(torch.autograd.grad(found, leaves, dout), torch.autograd.grad(expected, leaves, dout), strict=True):
        torch.testing.assert_close(a, b)


# Bad input: a clear error before any kernel runs.


def tensors(**changed: Any) -> dict[str, Any]:
    made = {name: torch.randn(2, 4, 5, 8) for name in ("query", "key", "value")}
    return {**made, **changed}


def like(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(size, dtype=dtype)


BAD: list[tuple[str, type[Exception], dict[str, Any]]] = [
    ("query must be a tensor, got list", TypeError, {"query": [1.0]}),
    (
        "query must be float32, bfloat16, float16 or float64, got torch.int64",
        TypeError,
        {"query": like(2, 4, 5, 8).long()},
    ),
    ("key must have query's dtype torch.float32, got torch.float64", TypeError, {"key": like(2, 4, 5, 8).double()}),
    ("key must be on query's device cpu, got meta", TypeError, {"key": torch.empty(2, 4, 5, 8, device="meta")}),
    ("query must be 4-D [batch, heads, seq_len, head_dim], got [4, 5, 8]", ValueError, {"query": like(4, 5, 8)}),
    ("head_dim must be >= 1", ValueError, {n: like(2, 4, 5, 0) for n in ("query", "key", "value")}),
    ("key must be [batch=2, num_heads_kv, seq_len_k, head_dim=8]", ValueError, {"key": like(2, 4, 5, 7)}),
    ("key must be [batch=2", ValueError, {"key": like(3, 4, 5, 8)}),
    ("value must be [batch=2, num_heads_kv=4, seq_len_k=5, head_dim_v]", ValueError, {"value": like(2, 4, 6, 8)}),
    ("multiple of num_heads_kv, got 4 and 3", ValueError, {"key": like(2, 3, 5, 8), "value": like(2, 3, 5, 8)}),
    ("multiple of num_heads_kv, got 4 and 0", ValueError, {"key": like(2, 0, 5, 8), "value": like(2, 0, 5, 8)}),
    ("query must be contiguous in its last dimension (stride 1)", ValueError, {"query": like(2, 4, 8, 5).mT}),
    ("query must be a dense (strided) tensor", TypeError, {"query": like(2, 4, 5, 8).to_sparse()}),
    ("mask must be a fastattn.masks.Mask or a bool tensor, got str", TypeError, {"mask": "causal"}),
    ("Dense mask must be bool (True may attend), got torch.float32", TypeError, {"mask": like(5, 5)}),
    ("Dense mask must broadcast to", ValueError, {"mask": like(5, 4) > 0}),
    ("KeyLengths.lengths must have shape [2], got [3]", ValueError, {"mask": KeyLengths(like(3).long())}),
    ("KeyLengths.lengths must be int32 or int64", TypeError, {"mask": KeyLengths(like(2))}),
    ("Segments.ids_q must have shape [2, 5], got [2, 4]", ValueError, {"mask": Segments(like(2, 4).int())}),
    ("bias must broadcast to", ValueError, {"bias": like(2, 3, 5, 5)}),
    ("bias must be a tensor, Alibi or RelativePosition, got int", TypeError, {"bias": 3}),
    ("bias must be float32, bfloat16, float16 or float64", TypeError, {"bias": like(5, 5).int()}),
    ("Alibi needs one slope a query head: expected 4, got 2", ValueError, {"bias": Alibi(like(2))}),
    ("RelativePosition needs one column a query head", ValueError, {"bias": RelativePosition(like(32, 3))}),
    ("sinks must have shape [num_heads_q] = [4], got [3]", ValueError, {"sinks": like(3)}),
    ("dropout_p must be in [0, 1), got 1.0", ValueError, {"dropout_p": 1.0}),
    ("dropout_p must be in [0, 1), got -0.1", ValueError, {"dropout_p": -0.1}),
    ("dropout_p must be finite, got nan", ValueError, {"dropout_p": float("nan")}),
    ("softmax_scale must be finite, got nan", ValueError, {"softmax_scale": float("nan")}),
    ("softmax_scale must be a number, got str", TypeError, {"softmax_scale": "1"}),
    ("softcap must be > 0 (None for none), got 0", ValueError, {"softcap": 0.0}),
    ("softcap must be finite, got inf", ValueError, {"softcap": float("inf")}),
    ("backend must be one of", ValueError, {"backend": "tpu"}),
]


@pytest.mark.parametrize(("message", "error", "changed"), BAD, ids=[m for m, _, _ in BAD])
def test_bad_input(message: str, error: type[Exception], changed: dict[str, Any]) -> None:
    with pytest.raises(error, match=re.escape(message)):
        fastattn.attention(**tensors(**changed))


def test_bad_masks() -> None:
    with pytest.raises(ValueError, match="left must be >= 0"):
        Window(-1, 0)
    with pytest.raises(ValueError, match="align must be"):
        Causal("middle")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="must be bool"):
        Dense(torch.zeros(3))
    q = torch.randn(1, 1, 2, 4)
    with pytest.raises(ValueError, match="exclude each other"):
        fastattn.scaled_dot_product_attention(q, q, q, attn_mask=torch.ones(2, 2, dtype=torch.bool), is_causal=True)


# Empty input: the mathematically right empty result.


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("batch", "heads", "len_q", "len_k", "dim_v"),
    [(0, 2, 3, 4, 5), (2, 0, 3, 4, 5), (2, 2, 0, 4, 5), (2, 2, 3, 0, 5), (2, 2, 3, 4, 0), (0, 0, 0, 0, 0)],
)
@pytest.mark.parametrize("sinks", [False, True])
def test_empty(batch: int, heads: int, len_q: int, len_k: int, dim_v: int, sinks: bool, backend: str) -> None:
    query = torch.randn(batch, heads, len_q, 6, requires_grad=True)
    key = torch.randn(batch, heads, len_k, 6, requires_grad=True)
    value = torch.randn(batch, heads, len_k, dim_v, requires_grad=True)
    sink = torch.randn(heads, requires_grad=True) if sinks else None
    out, lse = fastattn.attention(
        query, key, value, mask=Causal() & Window(3, None), sinks=sink, return_lse=True, backend=backend
    )
    assert out.shape == (batch, heads, len_q, dim_v)
    assert (out == 0).all()
    if len_k == 0:
        expected = torch.full_like(lse, float("-inf")) if sink is None else sink[None, :, None].expand_as(lse)
        assert torch.equal(lse, expected)
    leaves = [t for t in (query, key, value, sink) if t is not None]
    grads = torch.autograd.grad([out, lse], leaves, [torch.randn_like(out), torch.ones_like(lse)])
    assert all(g.shape == t.shape and g.isfinite().all() for g, t in zip(grads, leaves, strict=True))
    if sink is not None and len_k == 0:
        torch.testing.assert_close(grads[-1], torch.full((heads,), float(batch * len_q)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_are_not_written(backend: str) -> None:
    given = inputs(CASES["everything"]).to(torch.float32)
    before = {n: t.detach().clone() for n, t in given.leaves.items()}
    run(given, backend)
    assert all(torch.equal(t, before[n]) for n, t in given.leaves.items())
