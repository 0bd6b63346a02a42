"""attention_weights: every summary against the whole matrix in float64, in one block of rows and in many."""

from __future__ import annotations

import attention_cases
import pytest
import torch
from conftest import backend_or_triton
from exactness import assert_as_exact_as_eager

import fastattn
from fastattn import masks
from fastattn.biases import Alibi
from fastattn.ops import attention_weights as op
from fastattn.reference import attention_weights as formula
from fastattn.spec.attention import attention_call, lse_dtype
from fastattn.spec.attention_weights import REDUCTIONS, result_shape, weights_call

pytestmark = pytest.mark.filterwarnings("ignore::fastattn.FallbackWarning")

backend = backend_or_triton
# Of the many kinds of calls, one of each that a tile of weights tells apart.
IN_TRITON = ("one-of-each", "causal-more-queries", "segments-causal", "bias-gqa", "alibi", "dropout-gqa", "few-queries")


def slow_in_triton(test, params):
    # In Triton 40 keys are two passes, of 32 ranks each; in float64 one for each rank.
    passes = params.get("top_k", 40) != 40 or (params.get("dtype") == torch.float64 and params.get("distinct", False))
    return passes or params.get("name", IN_TRITON[0]) not in IN_TRITON


BATCH, HEADS, HEADS_KV, ROWS, COLUMNS, DIM, TOP_K, POOL = 2, 4, 2, 11, 13, 8, 3, 4


@pytest.fixture(params=[1 << 22, 3 * BATCH * HEADS * COLUMNS], ids=["one block", "blocks"])
def blocks(request, monkeypatch):
    monkeypatch.setattr(op, "_BLOCK_ELEMENTS", request.param)
    monkeypatch.setattr(formula, "BLOCK_ELEMENTS", request.param)


def inputs(dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(BATCH, HEADS, ROWS, DIM, generator=generator, dtype=torch.float64)
    key = torch.randn(BATCH, HEADS_KV, COLUMNS, DIM, generator=generator, dtype=torch.float64)
    return query.to(dtype), key.to(dtype)


CASES = {
    "plain": dict,
    "causal": lambda: {"mask": masks.Causal()},
    "window and lengths": lambda: {"mask": masks.Window(3, 1) & masks.KeyLengths(torch.tensor([COLUMNS, 5]))},
    "segments": lambda: {
        "mask": masks.Segments(torch.arange(ROWS).expand(BATCH, -1) // 4, torch.arange(COLUMNS).expand(BATCH, -1) // 5)
    },
    "dense rows": lambda: {
        "mask": torch.rand(1, HEADS, ROWS, COLUMNS, generator=torch.Generator().manual_seed(5)) > 0.4
    },
    "empty rows": lambda: {"mask": torch.arange(ROWS)[:, None].expand(ROWS, COLUMNS) % 2 == 0},
    "bias": lambda: {"bias": torch.randn(1, HEADS, ROWS, COLUMNS, generator=torch.Generator().manual_seed(6))},
    "alibi and softcap": lambda: {"bias": Alibi.geometric(HEADS), "softcap": 2.0, "softmax_scale": 0.7},
}


def whole(query, key, *, mask=None, bias=None, softmax_scale=None, softcap=None):
    """P in float64 by another road than the library's: explicit masks, torch.softmax."""
    query, key = query.double(), key.double().repeat_interleave(HEADS // HEADS_KV, dim=1)
    s = query @ key.mT * (DIM**-0.5 if softmax_scale is None else softmax_scale)
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    if isinstance(bias, torch.Tensor):
        s = s + bias
    elif bias is not None:
        distance = (torch.arange(ROWS)[:, None] + COLUMNS - ROWS - torch.arange(COLUMNS)).abs()
        s = s - bias.slopes.double()[:, None, None] * distance
    if mask is None:
        return s.softmax(-1)
    allowed = mask if isinstance(mask, torch.Tensor) else mask.to_dense(BATCH, HEADS, ROWS, COLUMNS)
    return s.masked_fill(~allowed, float("-inf")).softmax(-1).nan_to_num(0.0).expand(BATCH, HEADS, -1, -1)


def summary(weights, reduce):
    if reduce == "none":
        return weights
    if reduce == "head_mean":
        return weights.mean(1)
    if reduce == "key_sum":
        return weights.sum(2)
    if reduce == "entropy":
        return torch.special.entr(weights).sum(-1)
    if reduce == "top_k":
        return weights.sort(-1, descending=True).values[..., :TOP_K]
    rows = [chunk.split(POOL, -1) for chunk in weights.split(POOL, -2)]
    return torch.stack([torch.stack([cell.mean((-2, -1)) for cell in row], -1) for row in rows], -2)


def ask(query, key, reduce, **options):
    options |= {"top_k": TOP_K} if reduce == "top_k" else {}
    result = fastattn.attention_weights(query, key, reduce=reduce, pool_size=POOL, **options)
    return result[0] if reduce == "top_k" else result


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_values_and_gradients(reduce, case):
    options = CASES[case]()
    query, key = (t.requires_grad_() for t in inputs())
    leaves = [query, key]
    if isinstance(options.get("bias"), torch.Tensor):
        options["bias"] = options["bias"].double().requires_grad_()
        leaves.append(options["bias"])
    result = ask(query, key, reduce, **options)
    expected = summary(whole(query, key, **options), reduce)
    torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-12)

    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    found = torch.autograd.grad(result, leaves, direction, retain_graph=True)
    if reduce == "entropy":
        # The plain formula's own derivative is NaN at a weight of 0: take it where it is defined.
        weights = whole(query, key, **options)
        expected = -(weights * weights.clamp_min(1e-300).log()).sum(-1)
    for grad, reference in zip(found, torch.autograd.grad(expected, leaves, direction), strict=True):
        torch.testing.assert_close(grad, reference.nan_to_num(0.0), rtol=1e-8, atol=1e-10)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_double_backward(reduce):
    query, key = (t[:, :, :5].clone().requires_grad_() for t in inputs())
    options = {"mask": masks.Causal(), "reduce": reduce, "pool_size": 2} | ({"top_k": 2} if reduce == "top_k" else {})

    def call(query, key):
        result = fastattn.attention_weights(query, key, **options)
        return result[0] if reduce == "top_k" else result

    assert torch.autograd.gradcheck(call, (query, key), fast_mode=True)
    assert torch.autograd.gradgradcheck(call, (query, key), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_one_rounding(reduce, dtype):
    query, key = inputs(dtype)
    result = ask(query, key, reduce, mask=masks.Causal())
    assert result.dtype == dtype
    expected = summary(whole(query, key, mask=masks.Causal()), reduce)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(result.double(), expected, rtol=eps if dtype != torch.float32 else 8 * eps, atol=2 * eps)


@pytest.mark.parametrize("rows", [slice(2, 9), [7, 0, 3, 3], torch.tensor([-1]), slice(None, None, 2)])
@pytest.mark.parametrize("heads", [None, [3, 0], slice(1, 3)])
@pytest.mark.parametrize("case", CASES)
def test_selection(case, heads, rows):
    options = CASES[case]()
    query, key = inputs()
    result = fastattn.attention_weights(query, key, rows=rows, heads=heads, **options)
    index = torch.arange(ROWS)[rows]
    expected = whole(query, key, **options)[:, :, index]
    if heads is not None:
        expected = expected[:, torch.arange(HEADS)[heads]]
    torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-12)


def test_top_k_names_the_keys():
    query, key = inputs()
    weights, keys = fastattn.attention_weights(query, key, mask=masks.Causal(), reduce="top_k", top_k=5)
    expected = whole(query, key, mask=masks.Causal())
    assert keys.dtype == torch.int64
    torch.testing.assert_close(expected.gather(-1, keys.clamp_min(0)) * (keys >= 0), weights)
    # Query 0 of 11 sees the first 3 of 13 keys.
    assert torch.equal(keys[:, :, 0] == -1, torch.tensor([False, False, False, True, True]).expand(BATCH, HEADS, 5))


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_no_keys(reduce):
    if reduce == "top_k":
        pytest.skip("there is no top of nothing")
    query, key = inputs()
    result = fastattn.attention_weights(query, key[:, :, :0], reduce=reduce)
    assert not result.any()


@pytest.mark.parametrize("reduce", ["none", "top_k", "pooled"])
def test_opcheck(reduce):
    query, key = (t.requires_grad_() for t in inputs(torch.float32))
    call = attention_call(
        query, key, key, mask=masks.Causal(), bias=None, dropout_p=0.0, softmax_scale=None, softcap=None, sinks=None,
        generator=None, backend="reference",
    )  # fmt: skip
    lse = torch.randn(BATCH, HEADS, ROWS, requires_grad=True)
    weights = weights_call(call, lse, reduce, 2 if reduce == "top_k" else None, 4)
    torch.library.opcheck(torch.ops.fastattn.attention_weights.default, op._flat(weights))


def test_compiles():
    query, key = (t.requires_grad_() for t in inputs(torch.float32))

    def call(query, key):
        return fastattn.attention_weights(query, key, mask=masks.Causal(), reduce="entropy", rows=slice(2, 8))

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(query, key), call(query, key))
    grads = [torch.autograd.grad(f(query, key).sum(), (query, key)) for f in (compiled, call)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_autocast_keeps_the_lse():
    query, key = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        result = fastattn.attention_weights(query, key)
    assert result.dtype == torch.bfloat16
    expected = whole(query.bfloat16(), key.bfloat16())
    torch.testing.assert_close(result.double(), expected, rtol=2**-8, atol=1e-6)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_forward_mode():
    query, key = inputs()
    _, tangent = torch.func.jvp(lambda q: fastattn.attention_weights(q, key, reduce="key_sum"), (query,), (query,))
    scaled = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    expected = torch.autograd.functional.jacobian(lambda a: whole(query * a, key).sum(2), scaled)
    torch.testing.assert_close(tangent, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduce": "mean"}, "reduce must be one of"),
        ({"reduce": "top_k"}, "top_k goes with"),
        ({"top_k": 3}, "top_k goes with"),
        ({"reduce": "top_k", "top_k": COLUMNS + 1}, "top_k must be in"),
        ({"reduce": "pooled", "pool_size": 0}, "pool_size must be"),
        ({"rows": [ROWS]}, "rows must be in"),
        ({"heads": [-HEADS - 1]}, "heads must be in"),
        ({"rows": []}, "selects nothing"),
    ],
)
def test_wrong_inputs(options, message):
    with pytest.raises(ValueError, match=message):
        fastattn.attention_weights(*inputs(), **options)


@pytest.mark.parametrize("reduce", [r for r in REDUCTIONS if r != "none"])
def test_reference_reductions_hold_no_matrix(reduce, monkeypatch):
    sizes = []
    whole_weights = formula.attention_weights

    def spy(call, lse):
        weights = whole_weights(call, lse)
        sizes.append(weights.numel())
        return weights

    monkeypatch.setattr(formula, "attention_weights", spy)
    monkeypatch.setattr(formula, "BLOCK_ELEMENTS", 4 * BATCH * HEADS * COLUMNS)
    query, key = inputs()
    ask(query, key, reduce, backend="reference")
    assert max(sizes) <= formula.BLOCK_ELEMENTS
    assert sum(sizes) == BATCH * HEADS * ROWS * COLUMNS


DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def weights_of_case(case, dtype, reduce, backend, top_k=None, pool_size=1):
    """The op's call for a case of attention, with the lse that float64 has."""
    given = attention_cases.inputs(case, dtype).to(dtype)
    arguments = {**attention_cases.arguments(given), "backend": backend}
    call = attention_call(**arguments)
    lse = attention_cases.exact(case, dtype).lse.to(lse_dtype(dtype))
    detached = (t.detach() if isinstance(t, torch.Tensor) else t for t in call)
    return weights_call(type(call)(*detached), lse, reduce, top_k, pool_size)


def in_float64(call):
    attention = call.attention
    wide = {f: getattr(attention, f) for f in ("query", "key", "value", "bias", "relative_bias", "sinks")}
    attention = attention._replace(**{f: None if t is None else t.double() for f, t in wide.items()})
    return call._replace(attention=attention, lse=call.lse.double())


@pytest.mark.parametrize("name", attention_cases.CASES)
def test_reductions_as_exact_as_eager(backend, name):
    """Every mask, bias, layout of heads and dropout; reductions, cells and k that fit the tiles and that do not."""
    case = attention_cases.CASES[name]
    rows, columns = case.seq_len
    # All dtypes in turn: which one a reduction gets differs from case to case.
    for shift, (reduce, options) in enumerate(
        [
            ("key_sum", {}),
            ("entropy", {}),
            ("head_mean", {}),
            ("top_k", {"top_k": min(5, columns)}),
            ("top_k", {"top_k": min(40, columns)}),
            ("pooled", {"pool_size": 1}),
            ("pooled", {"pool_size": 7}),
            ("pooled", {"pool_size": 64}),
            ("pooled", {"pool_size": 100}),
            ("pooled", {"pool_size": max(rows, columns) + 1}),
            ("none", {}),
        ]
    ):
        dtype = DTYPES[(list(attention_cases.CASES).index(name) + shift) % 4]
        if backend == "triton" and dtype == torch.float64 and options.get("top_k", 0) > 5:
            continue  # a pass over the keys for each of them
        call = weights_of_case(case, dtype, reduce, backend, **options)
        found, keys = op.weigh(call)
        assert found.shape == result_shape(call)
        exact = formula.reduced_weights(in_float64(call))[0]
        eager = formula.reduced_weights(call)[0].to(dtype)
        assert_as_exact_as_eager(
            {f"{reduce} {options}": found}, {f"{reduce} {options}": exact}, {f"{reduce} {options}": eager}
        )
        assert keys.shape == (found.shape if reduce == "top_k" else (0,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("top_k", [1, 2, 31, 40, 300, 700])
@pytest.mark.parametrize("distinct", [True, False])
def test_top_k_is_exact_and_prefers_the_first_key(backend, top_k, dtype, distinct):
    generator = torch.Generator().manual_seed(9)
    query = torch.randn(1, 2, 101, 8, generator=generator).to(dtype)
    # Five kinds of keys only: most weights are equal to many others.
    key = torch.randn(1, 2, 700 if distinct else 5, 8, generator=generator).to(dtype)
    key = key if distinct else key[:, :, torch.randint(5, (700,), generator=generator)]
    mask = masks.Causal("top_left") & masks.Window(90, None)
    weights = fastattn.attention_weights(query, key, mask=mask, backend=backend)
    values, keys = fastattn.attention_weights(query, key, mask=mask, reduce="top_k", top_k=top_k, backend=backend)
    expected, expected_keys = weights.sort(dim=-1, descending=True, stable=True)
    assert torch.equal(values, expected[..., :top_k])
    if backend == "reference":  # torch.topk: any of the equal keys
        assert torch.equal(weights.gather(-1, keys.clamp_min(0)) * (keys >= 0), values)
    else:
        assert torch.equal(keys, expected_keys[..., :top_k].masked_fill(values == 0, -1))


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize(("heads", "dtype"), [(1, torch.float32), (4, torch.bfloat16)])
def test_same_bits_at_every_thread_count(reduce, heads, dtype):
    generator = torch.Generator().manual_seed(2)
    query, key = (torch.randn(1, heads, 1100, 32, generator=generator).to(dtype).requires_grad_() for _ in range(2))
    slopes = torch.rand(heads, generator=generator).requires_grad_()
    options = {"mask": masks.Causal(), "reduce": reduce} | ({"top_k": 9} if reduce == "top_k" else {})
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 4, 2):
            torch.set_num_threads(count)
            results = pair(fastattn.attention_weights(query, key, bias=Alibi(slopes), **options))
            direction = torch.linspace(-1, 1, results[0].numel()).view(results[0].shape).to(dtype)
            found.append([*results, *torch.autograd.grad(results[0], (query, key, slopes), direction)])
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


# Cells as large as a tile, and many in one.
@pytest.mark.parametrize(("reduce", "pool_size"), [*((reduce, 64) for reduce in REDUCTIONS), ("pooled", 7)])
def test_masked_poison_does_not_exist_and_visible_poison_stays_in_its_row(backend, reduce, pool_size):
    generator = torch.Generator().manual_seed(7)
    query, key = (torch.randn(2, 2, n, 24, generator=generator) for n in (110, 300))
    clean = key.clone()
    key[:, :, [7, 150, 299]] = float("nan")
    key[1, :, 200:] = float("inf")
    visible = torch.rand(2, 1, 110, 300, generator=generator) < 0.5
    visible[..., [7, 150, 299]] = False
    visible[0, :, 100, 60:80] = False
    mask = masks.Dense(visible) & masks.KeyLengths(torch.tensor([300, 200]))
    options = {"mask": mask, "reduce": reduce, "backend": backend, "pool_size": pool_size}
    options |= {"top_k": 9} if reduce == "top_k" else {}
    found, expected = (pair(fastattn.attention_weights(query, k, **options)) for k in (key, clean))
    for got, want in zip(found, expected, strict=True):
        assert torch.equal(got, want)

    query[0, 1, 100] = float("nan")
    result = pair(fastattn.attention_weights(query, clean, **options))[0]
    poisoned = torch.zeros_like(result, dtype=torch.bool)
    seen = visible[0, 0, 100]
    if reduce == "key_sum":
        poisoned[0, 1] = seen
    elif reduce == "head_mean":
        poisoned[0, 100] = seen
    elif reduce == "pooled":
        poisoned[0, 1, 100 // pool_size] = torch.stack([cell.any() for cell in seen.split(pool_size)])
        assert pool_size == 64 or not poisoned[0, 1, 100 // pool_size].all()
    elif reduce == "none":
        poisoned[0, 1, 100] = seen
    else:
        poisoned[0, 1, 100] = True
    assert torch.equal(result.isnan(), poisoned)
    if backend != "reference":  # whose products of matrices with a NaN in them may be added up in another order
        assert torch.equal(result[~poisoned], expected[0][~poisoned])


def pair(result):
    return result if isinstance(result, tuple) else (result,)
