"""Layer norm and rms norm: every backend and instruction set against float64, eager PyTorch and torch.nn."""

import pytest
import torch
import torch.nn.functional as F
from conftest import backend_or_triton
from exactness import assert_as_exact_as_eager

import fastattn

backend = backend_or_triton
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def slow_in_triton(test, params):
    few = params.get("shape") in ((20,), (5003,)) or params.get("dtype") == torch.float32
    return test == "test_values_and_gradients_are_as_exact_as_eager" and not few


def inputs(lead, shape, dtype, weight_dtype=None, *, residual=True, bias=True, seed=0):
    """Random inputs by name; the mean is far from 0, where a careless variance loses its digits."""
    generator = torch.Generator().manual_seed(seed)
    weight_dtype = weight_dtype or dtype
    made = {
        "input": (torch.randn(*lead, *shape, generator=generator) + 3.0).to(dtype),
        "weight": torch.randn(shape, generator=generator).to(weight_dtype),
    }
    if bias:
        made["bias"] = torch.randn(shape, generator=generator).to(weight_dtype)
    if residual:
        made["residual"] = torch.randn(*lead, *shape, generator=generator).to(dtype)
    return made


def eager(input, weight, bias=None, residual=None, *, rms):
    total = input if residual is None else input + residual
    shape = weight.shape
    if rms:
        out = F.rms_norm(total, shape, weight.to(total.dtype), eps=1e-5)
    else:
        out = F.layer_norm(total, shape, weight.to(total.dtype), None if bias is None else bias.to(total.dtype), 1e-5)
    return out if residual is None else (out, total)


def ours(input, weight, bias=None, residual=None, *, rms, backend=None):
    if rms:
        return fastattn.rms_norm(input, weight, residual=residual, eps=1e-5, backend=backend)
    return fastattn.layer_norm(input, weight, bias, residual=residual, eps=1e-5, backend=backend)


def run(function, tensors, **options):
    """Returns outputs and gradients by name."""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in tensors.items()}
    outs = function(**leaves, **options)
    outs = outs if isinstance(outs, tuple) else (outs,)
    directions = [torch.linspace(-1, 1, o.numel()).sin().view(o.shape).to(o.dtype) for o in outs]
    grads = torch.autograd.grad(outs, list(leaves.values()), directions)
    named = dict(zip(("out", "total"), (o.detach() for o in outs), strict=False))
    return named | {f"d{name}": g for name, g in zip(leaves, grads, strict=True)}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize(
    ("lead", "shape"), [((2, 3), (20,)), ((70,), (7,)), ((5,), (64,)), ((3,), (4, 9)), ((2,), (5003,))]
)
def test_values_and_gradients_are_as_exact_as_eager(backend, dtype, rms, residual, lead, shape):
    tensors = inputs(lead, shape, dtype, residual=residual, bias=not rms)
    exact = run(eager, {name: t.double() for name, t in tensors.items()}, rms=rms)
    assert_as_exact_as_eager(run(ours, tensors, rms=rms, backend=backend), exact, run(eager, tensors, rms=rms))


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_parameters_of_another_precision(backend, dtype, weight_dtype):
    tensors = inputs((6,), (33,), dtype, weight_dtype)
    found = run(ours, tensors, rms=False, backend=backend)
    exact = run(eager, {name: t.double() for name, t in tensors.items()}, rms=False)
    of_eager = run(eager, {name: t.to(dtype) for name, t in tensors.items()}, rms=False)
    assert found["dweight"].dtype == weight_dtype
    of_eager = {name: t.to(found[name].dtype) for name, t in of_eager.items()}
    assert_as_exact_as_eager(found, exact, of_eager)


def test_strided_inputs_and_optional_parameters(backend):
    base = torch.randn(7, 4, 10, generator=torch.Generator().manual_seed(1))
    for x in (base.transpose(0, 1), base[::2, 1:, 2:], base[..., ::3], base[0, 0, :1].expand(4, 3, 5)):
        expected = F.layer_norm(x, x.shape[-1:])
        torch.testing.assert_close(fastattn.layer_norm(x, None, None, backend=backend), expected)
        torch.testing.assert_close(fastattn.rms_norm(x, None, backend=backend), F.rms_norm(x, x.shape[-1:]))


def test_only_some_gradients(backend):
    tensors = inputs((4,), (12,), torch.float32)
    full = run(ours, tensors, rms=False, backend=backend)
    for wanted in ("input", "residual", "weight", "bias"):
        leaf = tensors[wanted].clone().requires_grad_()
        out, total = ours(**(tensors | {wanted: leaf}), rms=False, backend=backend)
        pairs = [(o, torch.linspace(-1, 1, o.numel()).sin().view(o.shape)) for o in (out, total) if o.requires_grad]
        (grad,) = torch.autograd.grad([o for o, _ in pairs], leaf, [d for _, d in pairs])
        assert torch.equal(grad, full[f"d{wanted}"])
    # The sum alone may be used.
    leaf = tensors["input"].clone().requires_grad_()
    _, total = ours(**(tensors | {"input": leaf}), rms=False, backend=backend)
    assert torch.equal(torch.autograd.grad(total.sum(), leaf)[0], torch.ones_like(leaf))


@pytest.mark.parametrize("threads", [1, 2])
def test_bits_do_not_depend_on_threads(threads):
    tensors = inputs((300,), (200,), torch.float32)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        found = run(ours, tensors, rms=False)
        torch.set_num_threads(3 - threads)
        again = run(ours, tensors, rms=False)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[name], again[name]) for name in found)


@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
def test_empty_inputs(rms):
    weight = torch.ones(5, requires_grad=True)
    x = torch.zeros(0, 5, requires_grad=True)
    out = ours(x, weight, rms=rms)
    out.sum().backward()
    assert out.shape == x.grad.shape == (0, 5)
    assert torch.equal(weight.grad, torch.zeros(5))
    assert ours(torch.zeros(3, 0), torch.ones(0), rms=rms).shape == (3, 0)


@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize(("rows", "widths"), [(2, (32, 33, 65, 300)), (18, (40,))])
def test_rows_too_long_for_one_program_of_triton(rows, widths, rms, monkeypatch):
    """As if registers held 64 elements: rows of 64 are read once, and longer ones in chunks of 16."""
    norm = pytest.importorskip("fastattn.kernels.norm")
    monkeypatch.setattr("fastattn.kernels.rows.LONGEST", {4: 64, 8: 64})
    monkeypatch.setattr(norm, "_LONGEST_OWN", {4: 32, 8: 32})
    for columns in widths:
        tensors = inputs((rows,), (columns,), torch.float32, bias=not rms)
        exact = run(eager, {name: t.double() for name, t in tensors.items()}, rms=rms)
        found = run(ours, tensors, rms=rms, backend="triton")
        assert_as_exact_as_eager(found, exact, run(eager, tensors, rms=rms))


def test_nan_and_inf_stay_in_their_rows(backend):
    x = torch.randn(4, 40, generator=torch.Generator().manual_seed(2))
    x[1, 3], x[2, 5] = float("nan"), float("inf")
    out = fastattn.layer_norm(x, torch.ones(40), None, backend=backend)
    assert out[[1, 2]].isnan().all()
    assert torch.equal(out[[0, 3]], fastattn.layer_norm(x[[0, 3]], torch.ones(40), None, backend=backend))


@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
def test_derivatives_of_every_kind(rms):
    tensors = list(inputs((3,), (5,), torch.float64, bias=not rms).values())
    leaves = [t.requires_grad_() for t in tensors]

    def function(*args):
        return ours(args[0], args[1], *args[2:-1], residual=args[-1], rms=rms)

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.filterwarnings("ignore::fastattn.FallbackWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_forward_mode():
    x, weight, bias, _ = inputs((3,), (5,), torch.float64).values()
    tangent = torch.ones_like(x)
    _, found = torch.func.jvp(lambda t: fastattn.layer_norm(t, weight, bias), (x,), (tangent * x.sin(),))
    _, expected = torch.func.jvp(lambda t: F.layer_norm(t, (5,), weight, bias), (x,), (tangent * x.sin(),))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
def test_opcheck(rms, residual):
    tensors = inputs((4,), (6,), torch.float32, residual=residual, bias=not rms)
    leaves = {name: t.requires_grad_() for name, t in tensors.items()}
    args = (leaves["input"], leaves.get("residual"), leaves["weight"], leaves.get("bias"), 1, 1e-5, rms, "")
    torch.library.opcheck(torch.ops.fastattn.norm.default, args)


def test_compile_and_export():
    tensors = inputs((4,), (6,), torch.float32)

    def function(input, weight, bias, residual):
        return fastattn.layer_norm(input, weight, bias, residual=residual)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    plain = run(function, tensors)
    for name, value in run(compiled, tensors).items():
        assert torch.equal(value, plain[name])

    class Module(torch.nn.Module):
        def forward(self, input, weight, bias, residual):
            return function(input, weight, bias, residual)

    exported = torch.export.export(Module(), tuple(tensors.values())).module()
    assert torch.equal(exported(*tensors.values())[0], function(*tensors.values())[0])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.ones(2, 3), torch.ones(4), None), ValueError, r"end with weight's shape \[4\], got \[2, 3\]"),
        ((torch.ones(3), torch.ones(1, 3), None), ValueError, "end with weight's shape"),
        ((torch.ones(2, 3), torch.ones(3), torch.ones(1)), ValueError, r"bias must have shape \[3\]"),
        ((torch.tensor(1.0), None, None), ValueError, "a dimension to normalise over"),
        ((torch.ones(2, 3).int(), torch.ones(3), None), TypeError, "input must be float32"),
        ((torch.ones(2, 3), torch.ones(3).int(), None), TypeError, "weight must be float32"),
        (("x", None, None), TypeError, "input must be a tensor, got str"),
    ],
)
def test_wrong_input(arguments, error, message):
    with pytest.raises(error, match=message):
        fastattn.layer_norm(*arguments)


def test_wrong_options():
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match="eps must be >= 0, got -1"):
        fastattn.layer_norm(x, None, None, eps=-1.0)
    with pytest.raises(ValueError, match=r"residual must have shape \[2, 3\], got \[3\]"):
        fastattn.layer_norm(x, None, None, residual=torch.ones(3))
    with pytest.raises(TypeError, match=r"residual must have input's dtype torch.float32, got torch.float64"):
        fastattn.layer_norm(x, None, None, residual=x.double())


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm"])
def test_modules_are_drop_in(name, affine):
    stock = getattr(torch.nn, name)((4, 5), elementwise_affine=affine)
    mine = getattr(fastattn.nn, name)((4, 5), elementwise_affine=affine)
    assert isinstance(mine, type(stock))
    if affine:
        torch.nn.init.normal_(stock.weight)
    mine.load_state_dict(stock.state_dict(), strict=True)
    stock.load_state_dict(mine.state_dict(), strict=True)
    x = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(mine(x), stock(x))
    out, total = mine(x, residual=x)
    torch.testing.assert_close(out, stock(2 * x))
    assert torch.equal(total, 2 * x)
    with pytest.raises(ValueError, match=r"normalized_shape \[4, 5\], got \[3, 5\]"):
        mine(x[:, 0])
