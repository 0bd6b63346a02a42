"""The linear op: every backend and instruction set against float64 and eager PyTorch."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from conftest import backend_or_triton
from exactness import assert_as_exact_as_eager

import fastattn
from fastattn.backends.extension import kernels, load, plain
from fastattn.backends.products import fuses_on_tiles, multiplies_on_tiles, product
from fastattn.ops import linear as op
from fastattn.spec.linear import linear_call

backend = backend_or_triton
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# lead, in_dim, out_dim, parts; 600 and more is deeper than one block of float32, 1600 than one of bfloat16.
SHAPES = [
    ((130,), 96, 96, 3),
    ((3, 11), 70, 50, 1),
    ((2, 65), 600, 64, 2),
    ((5,), 1600, 33, 1),
    ((290,), 32, 576, 1),
    ((1,), 1, 1, 1),
    ((7, 9), 40, 60, 3),
]


def slow_in_triton(test, params):
    # What overflows on the way, or cancels, depends on the order in which a product adds up.
    if test == "test_extreme_numbers_are_multiplied_as_pytorch_does":
        return params["value"] in (3e38, 1e30)
    few = params.get("dtype") in (torch.float32, torch.bfloat16) or params.get("shape") in (SHAPES[1], SHAPES[5])
    return test == "test_values_and_gradients_are_as_exact_as_eager" and not few


def tensors(lead, in_dim, out_dim, dtype, *, bias=True, seed=0):
    draw = torch.Generator().manual_seed(seed)
    made = {
        "input": torch.randn(*lead, in_dim, generator=draw).to(dtype),
        "weight": (torch.randn(out_dim, in_dim, generator=draw) / in_dim**0.5).to(dtype),
    }
    return made | ({"bias": torch.randn(out_dim, generator=draw).to(dtype)} if bias else {})


def ours(input, weight, bias=None, *, parts, backend):
    return op._linear(*linear_call(input, weight, bias, parts=parts, backend=backend))


def eager(input, weight, bias=None, *, parts):
    return F.linear(input, weight, bias).chunk(parts, dim=-1)


def run(function, given, **options):
    """Returns outputs and gradients by name."""
    leaves = {name: t.detach().requires_grad_() for name, t in given.items()}
    outs = function(**leaves, **options)
    directions = [torch.arange(o.numel()).add(1.0 + k).sin().view(o.shape).to(o.dtype) for k, o in enumerate(outs)]
    grads = torch.autograd.grad(outs, list(leaves.values()), directions)
    named = {f"out{k}": o.detach() for k, o in enumerate(outs)}
    return named | {f"d{name}": g for name, g in zip(leaves, grads, strict=True)}


def check(given, backend, parts=1):
    exact = run(eager, {name: t.double() for name, t in given.items()}, parts=parts)
    assert_as_exact_as_eager(run(ours, given, parts=parts, backend=backend), exact, run(eager, given, parts=parts))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_are_as_exact_as_eager(backend, dtype, shape):
    lead, in_dim, out_dim, parts = shape
    check(tensors(lead, in_dim, out_dim, dtype), backend, parts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides(backend, dtype):
    given = tensors((40, 3), 64, 96, dtype, bias=False)
    given["input"] = given["input"].transpose(0, 1)
    check(given, backend, 3)
    given["weight"] = given["weight"].t().contiguous().t()
    given["input"] = given["input"][..., ::2].repeat(1, 1, 2)
    check(given, backend, 1)
    wide = torch.randn(96, 200, generator=torch.Generator().manual_seed(3)).to(dtype)
    check({**given, "weight": wide[:, 7:71]}, backend, 3)


def test_a_deep_product_of_many_rows_in_chunks(backend):
    """More rows of the left operand than are packed at once: float32 [4096, 2100] is 52 MB in pieces."""
    if backend != "cpu":
        pytest.skip("packs nothing")
    draw = torch.Generator().manual_seed(1)
    left, right = torch.randn(4096, 2100, generator=draw), torch.randn(33, 2100, generator=draw)
    out = torch.empty(4096, 33)
    product([left], right, [out], right_transposed=True)
    exact = left.double() @ right.double().t()
    assert_as_exact_as_eager({"out": out}, {"out": exact}, {"out": left @ right.t()})


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 3e38, 1e30, 1e-30, 1e-42, 0.0])
def test_extreme_numbers_are_multiplied_as_pytorch_does(backend, value):
    given = tensors((140,), 64, 96, torch.float32)
    given["input"][3] = value
    given["input"][4:] *= value if abs(value) < 1 else 1.0
    with torch.no_grad():
        found, expected = ours(**given, parts=3, backend=backend), eager(**given, parts=3)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_same_bits_at_any_thread_count(dtype):
    if load()[0] is None or kernels().isa() != "amx":
        pytest.skip("PyTorch multiplies here")
    given, before, runs = tensors((300,), 700, 288, dtype), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            runs.append(run(ours, given, parts=3, backend="cpu"))
    finally:
        torch.set_num_threads(before)
    for name, other in itertools.product(runs[0], runs[1:]):
        if name != "dbias":
            assert torch.equal(runs[0][name], other[name]), name


def test_second_derivatives_and_a_graph_used_twice(backend):
    given = {k: t.double().requires_grad_() for k, t in tensors((4,), 5, 6, torch.float64).items()}

    def function(*args):
        return ours(*args, parts=2, backend=backend)

    assert torch.autograd.gradcheck(function, tuple(given.values()))
    assert torch.autograd.gradgradcheck(function, tuple(given.values()))
    outs = function(*given.values())
    first = torch.autograd.grad(outs[0].sum(), list(given.values()), retain_graph=True)
    again = torch.autograd.grad(outs[0].sum(), list(given.values()))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_only_the_gradients_that_are_needed(backend):
    given = tensors((33,), 64, 64, torch.float32)
    given["weight"].requires_grad_()
    out = ours(**given, parts=1, backend=backend)[0]
    (grad,) = torch.autograd.grad(out.square().sum(), [given["weight"]])
    wide = given["weight"].detach().double().requires_grad_()
    exact = F.linear(given["input"].double(), wide, given["bias"].double())
    torch.testing.assert_close(grad, torch.autograd.grad(exact.square().sum(), [wide])[0].float(), rtol=1e-4, atol=1e-4)


def test_no_tokens(backend):
    given = tensors((0, 4), 64, 96, torch.float32)
    found = run(ours, given, parts=3, backend=backend)
    assert found["out0"].shape == (0, 4, 32)
    assert not found["dweight"].any()


@pytest.mark.filterwarnings("ignore")
def test_opcheck():
    given = tensors((3, 4), 8, 6, torch.float32)
    for requires_grad in (False, True):
        args = [t.clone().requires_grad_(requires_grad) for t in given.values()]
        torch.library.opcheck(torch.ops.fastattn.linear.default, (*args, 3, ""))


@pytest.mark.parametrize("bad", ["shape", "dtype", "parts", "bias"])
def test_bad_input(bad):
    given = tensors((3,), 8, 6, torch.float32)
    if bad == "shape":
        given["weight"] = given["weight"][:, 1:]
    elif bad == "dtype":
        given["weight"] = given["weight"].double()
    elif bad == "bias":
        given["bias"] = given["bias"][1:]
    with pytest.raises(TypeError if bad == "dtype" else ValueError, match=r"must|divide"):
        linear_call(**given, parts=4 if bad == "parts" else 1, backend="")


def test_the_choice_of_a_product():
    for isa, dtype, rows, columns, depth, expected in [
        ("amx", torch.float32, 1024, 512, 512, True),
        ("amx", torch.float32, 16, 512, 512, False),
        ("amx", torch.float32, 1024, 32, 512, False),
        ("amx", torch.float32, 1024, 512, 8, False),
        ("amx", torch.float16, 1024, 512, 512, True),
        ("amx", torch.float64, 1024, 512, 512, False),
        ("avx512", torch.float32, 1024, 512, 512, False),
        ("avx2", torch.float16, 1024, 512, 512, False),
        ("portable", torch.bfloat16, 1024, 512, 512, False),
    ]:
        assert multiplies_on_tiles(isa, dtype, rows, columns, depth) == expected, (isa, dtype, rows, columns, depth)


def test_the_choice_of_a_feed_forward():
    for isa, dtype, tokens, expected in [
        ("amx", torch.float32, 1024, True),
        ("amx", torch.bfloat16, 1024, True),
        ("amx", torch.bfloat16, 16, False),
        ("amx", torch.float64, 1024, False),
        ("avx512", torch.float32, 1024, False),
    ]:
        assert fuses_on_tiles(isa, dtype, tokens) == expected, (isa, dtype, tokens)


@pytest.mark.parametrize("length", [70, 140])
def test_modules_use_it_and_agree_with_pytorch(backend, length, monkeypatch):
    """The attention module and the layers, with gradients, whichever product they take."""
    if backend != "cpu":
        pytest.skip("modules choose by themselves")
    seen = []
    monkeypatch.setattr(op, "_linear", lambda *a, _op=op._linear: seen.append(a[3]) or _op(*a))
    torch.manual_seed(0)
    stock = torch.nn.TransformerDecoderLayer(128, 2, 256, 0.0, batch_first=True)
    layer = fastattn.nn.TransformerDecoderLayer(128, 2, 256, 0.0, batch_first=True)
    layer.load_state_dict(stock.state_dict())
    x, memory = torch.randn(2, length, 128), torch.randn(2, 80, 128)
    found, expected = layer(x, memory), stock(x, memory)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for f, e in zip(
        torch.autograd.grad(found.square().sum(), list(layer.parameters())),
        torch.autograd.grad(expected.square().sum(), list(stock.parameters())),
        strict=True,
    ):
        torch.testing.assert_close(f, e, rtol=1e-3, atol=1e-3)
    # Self-attention's three projections and output, cross-attention's query, keys and values, output, and few tokens'
    # feed-forward; under autograd each is called twice.
    expected_parts = [3, 1, 1, 2, 1] + ([1, 1] if length == 70 else [])
    assert seen[::2] == (expected_parts if kernels().isa() == "amx" else [])


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_hooks_autocast_and_forward_mode_reach_pytorchs_product():
    weight, x = torch.randn(128, 128), torch.randn(256, 128)
    with torch.autocast("cpu", torch.bfloat16):
        assert op.linear(x, weight, None)[0].dtype == torch.bfloat16
    _, tangent = torch.func.jvp(lambda w: op.linear(x, w, None)[0], (weight,), (weight,))
    torch.testing.assert_close(tangent, x @ weight.t(), rtol=1e-4, atol=1e-4)
    module = fastattn.nn.MultiheadAttention(128, 2, batch_first=True)
    called = []
    module.out_proj.register_forward_hook(lambda *_: called.append(True))
    module(x[None], x[None], x[None])
    assert called


needs_extension = pytest.mark.skipif(load()[0] is None, reason="the C++ extension is not built")
FEW = [((1, 1), 512, 130), ((2, 3), 300, 257), ((32,), 2048, 40), ((5, 1, 3), 512, 128)]


@needs_extension
@pytest.mark.parametrize("few_isa", ["portable", "avx2", "avx512", "amx"])
@pytest.mark.parametrize("shape", FEW, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_a_few_rows_are_as_exact_as_eager(few_isa, shape, bias):
    lead, in_dim, out_dim = shape
    lead = lead if len(lead) > 1 else (lead[0], 1)
    extension = kernels()
    if few_isa not in extension.available_isas():
        pytest.skip(f"{few_isa} cannot run here")
    before = extension.isa()
    extension.set_isa(few_isa)
    try:
        given = tensors(lead, in_dim, out_dim, torch.float32, bias=bias)
        wide = {name: t.double() for name, t in given.items()}
        found = plain.linear(given["input"], given["weight"], given.get("bias"))
        assert_as_exact_as_eager({"out": found}, {"out": F.linear(**wide)}, {"out": F.linear(**given)})
        assert found.shape == (*lead, out_dim)
    finally:
        extension.set_isa(before)


@needs_extension
def test_a_few_rows_of_weights_with_gaps_and_any_number_of_threads():
    draw = torch.Generator().manual_seed(0)
    x, weight = torch.randn(3, 2, 500, generator=draw), torch.randn(300, 600, generator=draw)[:, 7:507]
    expected = plain.linear(x, weight.contiguous(), None)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(plain.linear(x, weight, None), expected)
    finally:
        torch.set_num_threads(threads)


@needs_extension
def test_a_few_rows_go_there_without_gradients_alone():
    x, weight = torch.randn(2, 512), torch.randn(256, 512, requires_grad=True)
    seen = []
    original = plain.linear
    plain.linear = lambda *args: seen.append(original(*args)) or seen[-1]
    try:
        assert op.linear(x, weight, None)[0].grad_fn is not None
        with torch.no_grad():
            parts = op.linear(x, weight, None, 2)
    finally:
        plain.linear = original
    assert seen[0] is None
    assert torch.equal(torch.cat(parts, dim=-1), seen[1])


X, W = torch.ones(2, 512), torch.ones(256, 512)
NOT_FEW = {
    "many rows": lambda: plain.linear(torch.ones(33, 512), W, None),
    "few weights": lambda: plain.linear(X, W[:64], None),
    "sizes": lambda: plain.linear(X[:, :500], W, None),
    "bias": lambda: plain.linear(X, W, torch.ones(255)),
    "dtypes": lambda: plain.linear(X, W.double(), None),
    "half": lambda: plain.linear(X.half(), W.half(), None),
    "strides": lambda: plain.linear(torch.ones(512, 2).t(), W, None),
    "weight's strides": lambda: plain.linear(X, torch.ones(512, 256).t(), None),
    "expanded weight": lambda: plain.linear(X, W[:1].expand(256, -1), None),
    "one dimension": lambda: plain.linear(X[0], W, None),
    "no tensor": lambda: plain.linear(X, None, None),
}


@pytest.mark.parametrize("case", NOT_FEW)
def test_what_is_no_linear_layer_of_few_rows_is_declined(case):
    assert NOT_FEW[case]() is None
