"""Softmax and log-softmax: every backend and instruction set against the formula in float64 and eager PyTorch."""

from __future__ import annotations

import pytest
import torch
from conftest import backend_or_triton
from exactness import assert_as_exact_as_eager
from torch import Tensor

import fastattn
from fastattn.spec.softmax import softmax_call

backend = backend_or_triton
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
OPS = {"softmax": (fastattn.softmax, torch.softmax), "log_softmax": (fastattn.log_softmax, torch.log_softmax)}
# Widths on both sides of a register and of a chunk (8192 float32 elements, 128 and more in a strip of columns).
SHAPES = [
    ((5, 7), -1),
    ((3, 64), 1),
    ((2, 3, 200), 2),
    ((2, 9000), 1),
    ((1, 40000), 1),
    ((5, 7), 0),
    ((3, 40, 9), 1),
    ((2, 33, 70), 1),
    ((1100, 20), 0),
    ((2, 3, 4, 5), 1),
    ((4, 1, 6), 1),
    ((6, 5, 1), 1),
    ((1,), 0),
]


def slow_in_triton(test, params):
    dtype = params.get("dtype", torch.float32)
    return {
        "test_as_exact_as_eager": dtype != torch.float32 and params.get("shape") not in ((2, 9000), (3, 40, 9)),
        "test_mask_and_scale": dtype != torch.bfloat16 or params.get("scale") != -0.5,
        "test_what_is_masked_does_not_exist": params.get("junk") != float("inf") or dtype != torch.float32,
        "test_same_bits_again_and_at_any_number_of_threads": params.get("shape") != (3000, 40),
    }.get(test, False)


every_op = pytest.mark.parametrize("op", OPS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def normal(shape, dtype=torch.float32, seed=0, scale=3.0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def coin(shape, p=0.6, seed=1) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < p


def tolerance(*dtypes) -> dict[str, float]:
    """Returns bounds for results of O(1) that were rounded to the coarsest of ``dtypes`` on the way."""
    bounds = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}
    bound = max(bounds.get(d, 0.0) for d in dtypes)
    return {"rtol": bound, "atol": bound}


def run(function, input: Tensor, direction: Tensor) -> dict[str, Tensor]:
    """Returns a function's result and its gradient."""
    input = input.detach().requires_grad_()
    out = function(input)
    (grad,) = torch.autograd.grad(out, input, direction.to(out.dtype))
    return {"out": out.detach(), "grad": grad}


def masked_eager(theirs, dim, mask, scale=1.0):
    """The op with a mask as a user of PyTorch writes it; exact where every row has something visible."""

    return lambda input: theirs((input * scale).masked_fill(~mask, float("-inf")), dim)


@every_op
@every_dtype
@pytest.mark.parametrize(("shape", "dim"), SHAPES, ids=str)
def test_as_exact_as_eager(backend, op, dtype, shape, dim):
    ours, theirs = OPS[op]
    x, direction = normal(shape, dtype), normal(shape, dtype, seed=2, scale=1.0)
    found = run(lambda t: ours(t, dim, backend=backend), x, direction)
    exact = run(lambda t: theirs(t, dim), x.double(), direction)
    assert found["out"].dtype == found["grad"].dtype == dtype
    assert found["out"].is_contiguous()
    assert_as_exact_as_eager(found, exact, run(lambda t: theirs(t, dim), x, direction))


@every_op
@every_dtype
@pytest.mark.parametrize("scale", [0.125, -0.5])
@pytest.mark.parametrize(("shape", "dim"), SHAPES, ids=str)
def test_mask_and_scale(backend, op, dtype, shape, dim, scale):
    ours, theirs = OPS[op]
    x, direction = normal(shape, dtype), normal(shape, dtype, seed=2, scale=1.0)
    mask = coin(shape) | (torch.arange(shape[dim]) == 0).view(
        [-1 if d == dim % len(shape) else 1 for d in range(len(shape))]
    )
    direction = torch.where(mask, direction, 0.0)
    found = run(lambda t: ours(t, dim, mask=mask, scale=scale, backend=backend), x, direction)
    exact = run(masked_eager(theirs, dim, mask, scale), x.double(), direction)
    eager = run(masked_eager(theirs, dim, mask, scale), x, direction)
    hidden = float("-inf") if op == "log_softmax" else 0.0
    assert bool((found["out"][~mask] == hidden).all())
    for results in (found, exact, eager):
        results["out"] = torch.where(mask, results["out"], 0.0)
    assert_as_exact_as_eager(found, exact, eager)


@every_op
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("junk", [float("nan"), float("inf"), float("-inf"), 1e30])
@pytest.mark.parametrize(
    ("shape", "dim", "mask_shape"),
    [
        ((4, 90), 1, (4, 90)),
        ((4, 90), 1, (90,)),
        ((4, 90), 1, (4, 1)),
        ((4, 9000), 1, (4, 1)),
        ((90, 20), 0, (90, 20)),
        ((90, 20), 0, (20,)),
        ((90, 20), 0, (90, 1)),
        ((2, 3, 4, 50), 3, (2, 1, 1, 50)),
        ((2, 3, 4, 50), 3, (3, 4, 1)),
        ((2, 3, 40, 5), 2, (2, 1, 40, 1)),
        ((2, 3, 40, 5), 1, (3, 1, 5)),
    ],
    ids=str,
)
def test_what_is_masked_does_not_exist(backend, op, dtype, junk, shape, dim, mask_shape):
    """Masks broadcast, whole rows may be hidden, and NaN and Inf hidden in the input or in its gradient stay there."""
    ours = OPS[op][0]
    mask = coin(mask_shape)
    whole = mask.expand(shape)
    x, direction = normal(shape, dtype), normal(shape, dtype, seed=2)
    clean = run(lambda t: ours(t, dim, mask=whole, backend="reference"), x.double().masked_fill(~whole, 0.0), direction)
    found = run(
        lambda t: ours(t, dim, mask=mask, backend=backend),
        torch.where(whole, x, junk),
        torch.where(whole, direction, junk),
    )
    hidden = float("-inf") if op == "log_softmax" else 0.0
    assert bool((found["out"][~whole] == hidden).all())
    assert bool((found["grad"][~whole] == 0.0).all())
    for name in ("out", "grad"):
        torch.testing.assert_close(found[name].double(), clean[name], **tolerance(dtype))


@every_op
@pytest.mark.parametrize("dim", [0, 1])
def test_infinities_and_nan_that_are_visible_behave_as_in_pytorch(backend, op, dim):
    ours, theirs = OPS[op]
    x = normal((40, 40))
    x[0, 1] = x[1, 0] = float("-inf")
    x[3, 20] = x[20, 4] = float("inf")
    x[5, 21] = x[21, 6] = float("nan")
    x[7] = float("-inf")
    x[:, 8] = float("-inf")
    x[10] = 3e38
    torch.testing.assert_close(ours(x, dim, backend=backend), theirs(x, dim), equal_nan=True)


@every_op
def test_nan_beyond_the_first_chunk_reaches_the_whole_row(backend, op):
    x = torch.full((1, 30000), float("-inf"))
    x[0, 20000] = 1.0
    assert OPS[op][0](x, backend=backend)[0, 20000] == (1.0 if op == "softmax" else 0.0)
    x[0, 10000] = float("nan")
    assert bool(OPS[op][0](x, backend=backend).isnan().all())


def test_huge_scores_are_exact(backend):
    x = torch.tensor([[1e30, 1e30, -1e30], [1e4, 1e4 - 1.0, 0.0]])
    expected = torch.softmax(x.double(), -1)
    torch.testing.assert_close(fastattn.softmax(x, backend=backend).double(), expected, rtol=1e-6, atol=0.0)


@every_op
@pytest.mark.parametrize("dim", [-1, 1])
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.transpose(0, 1),
        lambda x: x.transpose(1, 2),
        lambda x: x[:, ::2],
        lambda x: x[:, :, ::2],
        lambda x: x[:, :, 3:17],
        lambda x: x[:, :1].expand(4, 30, 20),
        lambda x: x[..., :1],
        lambda x: x[:, None].expand(4, 3, 30, 20)[:, :, 5],
    ],
)
def test_strides_of_input_and_mask(backend, op, dim, view):
    x, mask = view(normal((4, 30, 20))), view(coin((4, 30, 20)))
    direction = normal(x.shape, seed=2)
    found = run(
        lambda t: OPS[op][0](t, dim, mask=mask, backend=backend),
        x,
        direction.transpose(0, 1).contiguous().transpose(0, 1),
    )
    expected = run(
        lambda t: OPS[op][0](t, dim, mask=mask.contiguous(), backend="reference"), x.double().contiguous(), direction
    )
    for name, result in expected.items():
        torch.testing.assert_close(found[name].double(), result, **tolerance(torch.float32))


@every_op
@pytest.mark.parametrize("masked", [False, True])
def test_rows_too_long_for_one_program_of_triton(op, masked, monkeypatch):
    """As if registers held 64 elements: longer rows are read in chunks, by as many programs as a GPU has room for."""
    kernels = pytest.importorskip("fastattn.kernels.softmax")
    monkeypatch.setattr("fastattn.kernels.rows.LONGEST", {4: 64, 8: 64})
    ours, theirs = OPS[op]
    for programs, rows, columns in ((1, 2, 64), (1, 3, 65), (1, 1, 150), (8, 2, 65), (9, 3, 150)):
        monkeypatch.setattr(kernels, "_FEW_PROGRAMS", programs)
        x, direction = normal((rows, columns)), normal((rows, columns), seed=2)
        mask = coin((rows, columns)) | (torch.arange(columns) == 40) if masked else torch.ones(columns).bool()
        direction = torch.where(mask, direction, 0.0)
        found = run(lambda t, m=mask: ours(t, mask=m if masked else None, backend="triton"), x, direction)
        exact = run(masked_eager(theirs, -1, mask), x.double(), direction)
        for name, expected in exact.items():
            torch.testing.assert_close(found[name].double(), expected, **tolerance(torch.float32))


def test_gradient_of_a_sum(backend):
    """A broadcast incoming gradient, as .sum() sends it."""
    x = normal((6, 30)).requires_grad_()
    fastattn.softmax(x, mask=coin((6, 30)), backend=backend).sum().backward()
    assert x.grad is not None
    assert float(x.grad.abs().max()) < 1e-6


@every_op
@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, 0, 4)], ids=str)
@pytest.mark.parametrize("dim", [0, -1])
def test_empty(backend, op, shape, dim):
    x = torch.randn(shape).requires_grad_()
    out = OPS[op][0](x, dim, mask=torch.ones(shape, dtype=torch.bool), backend=backend)
    out.sum().backward()
    assert out.shape == shape
    assert x.grad is not None
    assert x.grad.shape == shape


@every_op
def test_scalar(backend, op):
    ours, theirs = OPS[op]
    assert torch.equal(ours(torch.tensor(3.0), 0, backend=backend), theirs(torch.tensor(3.0), 0))


@every_op
@pytest.mark.parametrize("input_dtype", [*DTYPES, torch.int64, torch.bool], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtype_argument(backend, op, input_dtype, dtype):
    ours, theirs = OPS[op]
    x = normal((5, 40)).to(input_dtype)
    found, expected = ours(x, dtype=dtype, backend=backend), theirs(x, -1, dtype=dtype)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected, **tolerance(dtype))
    if x.is_floating_point():
        direction = normal((5, 40), seed=2)
        found = run(lambda t: ours(t, dtype=dtype, backend=backend), x, direction)
        expected = run(lambda t: theirs(t, -1, dtype=dtype), x, direction)
        assert found["grad"].dtype == input_dtype
        torch.testing.assert_close(found["grad"], expected["grad"], **tolerance(dtype, input_dtype))


@every_dtype
@pytest.mark.parametrize("columns", [1, 15, 16, 17, 100, 5000])
@pytest.mark.parametrize("offset", [0, 1, 7])
def test_writes_nothing_around_its_result(backend, dtype, columns, offset):
    """Into an existing buffer at any alignment, without a touch of what lies around it."""
    if backend != "cpu":
        pytest.skip("allocates its result")
    from fastattn import _cpu

    call = softmax_call(normal((3, columns), dtype), -1, mask=None, scale=1.0, dtype=None, log=False, backend="cpu")
    buffer = torch.full((offset + 3 * columns + 64,), 7.0, dtype=dtype)
    out = buffer[offset : offset + 3 * columns].view(3, columns)
    _cpu.softmax(call, out)
    assert bool((buffer[:offset] == 7.0).all())
    assert bool((buffer[offset + 3 * columns :] == 7.0).all())
    assert torch.equal(out, fastattn.softmax(call.input, backend=backend))


@every_op
@pytest.mark.parametrize(("shape", "dim"), [((3, 100_000), 1), ((500, 700), 1), ((3000, 40), 0)], ids=str)
def test_same_bits_again_and_at_any_number_of_threads(backend, op, shape, dim):
    x, direction, mask = normal(shape), normal(shape, seed=2), coin(shape)

    def once(threads):
        torch.set_num_threads(threads)
        return run(lambda t: OPS[op][0](t, dim, mask=mask, backend=backend), x, direction)

    before = torch.get_num_threads()
    try:
        if backend != "cpu":
            first, others = once(before), [once(before)]
        else:
            first, *others = [once(threads) for threads in (1, 1, 2, 3, 8)]
    finally:
        torch.set_num_threads(before)
    for other in others:
        for name, result in first.items():
            assert torch.equal(result, other[name]), name


@pytest.mark.filterwarnings("ignore::fastattn.FallbackWarning", "ignore:.*torch.jit:DeprecationWarning")
@every_op
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dim", [0, 1])
def test_derivatives_of_every_kind(backend, op, masked, dim):
    x = normal((4, 5), torch.float64).requires_grad_()
    # One row and one column are hidden as a whole.
    mask = (torch.arange(4)[:, None] != 1) & (torch.arange(5) != 2) & coin((4, 5), 0.9) if masked else None

    def function(t):
        out = OPS[op][0](t, dim, mask=mask, scale=0.7, backend=backend)
        return out if mask is None else torch.where(mask, out, 0.0)

    assert torch.autograd.gradcheck(function, (x,), check_forward_ad=True, check_batched_grad=False)
    assert torch.autograd.gradgradcheck(function, (x,), check_fwd_over_rev=False)
    direction = normal((4, 5), torch.float64, seed=3)
    _, jvp = torch.func.jvp(function, (x.detach(),), (direction,))
    (by_hand,) = torch.autograd.grad(function(x), x, direction)
    assert torch.allclose((jvp * direction).sum(), (by_hand * direction).sum())
    rows = torch.func.vmap(lambda row: OPS[op][0](row, 0, backend=backend))(x.detach())
    torch.testing.assert_close(rows, OPS[op][1](x.detach(), 1))


@pytest.mark.parametrize("dim", [0, 2])
@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [None, torch.float32], ids=str)
def test_opcheck(backend, dim, log, masked, dtype):
    x = normal((2, 3, 4), torch.bfloat16 if dtype else torch.float32)
    mask = coin((2, 1, 4)).expand(2, 3, 4) if masked else None
    args = (x.requires_grad_(), mask, dim, 0.5, dtype, log, backend)
    torch.library.opcheck(torch.ops.fastattn.softmax.default, args)
    out = torch.ops.fastattn.softmax(*args).detach()
    args = (out, normal((2, 3, 4)), mask, dim, 0.5, x.dtype, log, backend)
    torch.library.opcheck(torch.ops.fastattn.softmax_backward.default, args)


@every_op
def test_compile_and_export(backend, op):
    class Model(torch.nn.Module):
        def forward(self, x, mask):
            return OPS[op][0](x * 2.0, 1, mask=mask, scale=0.5, backend=backend)

    x, mask, direction = normal((4, 30)), coin((4, 1)), normal((4, 30), seed=2)
    compiled = torch.compile(Model(), fullgraph=True, backend="aot_eager", dynamic=True)
    found = run(lambda t: compiled(t, mask), x, direction)
    for name, expected in run(lambda t: Model()(t, mask), x, direction).items():
        assert torch.equal(found[name], expected), name
    exported = torch.export.export(Model(), (x, mask))
    assert torch.equal(exported.module()(x, mask), Model()(x, mask))


@every_op
@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_autocast_as_in_pytorch(op, device_type):
    """On CPUs PyTorch leaves softmax in its input's dtype; on CUDA it computes in float32."""
    if device_type == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    ours, theirs = OPS[op]
    backend = "reference" if device_type == "cuda" else None
    with torch.autocast(device_type, torch.bfloat16):
        for dtype in DTYPES:
            x = normal((3, 5), dtype).to(device_type)
            assert ours(x, backend=backend).dtype == theirs(x, -1).dtype


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (([1.0],), {}, TypeError, "input must be a tensor, got list"),
        ((torch.ones(3).long(),), {}, TypeError, "input must be float32.*got torch.int64"),
        ((torch.ones(3, dtype=torch.complex64),), {"dtype": torch.float32}, TypeError, "got torch.complex64"),
        ((torch.ones(3).to_sparse(),), {}, TypeError, "dense"),
        ((torch.ones(3),), {"dtype": torch.int32}, TypeError, "dtype must be float32"),
        ((torch.ones(2, 3), 2), {}, ValueError, r"dim must be in \[-2, 1\] for input \[2, 3\], got 2"),
        ((torch.ones(2, 3), -3), {}, ValueError, "got -3"),
        ((torch.ones(2, 3), 1.0), {}, TypeError, "dim must be an integer, got float"),
        ((torch.ones(2, 3), None), {}, TypeError, "dim must be an integer, got NoneType"),
        ((torch.ones(2, 3),), {"mask": torch.ones(2, 3)}, TypeError, "mask must be bool"),
        ((torch.ones(2, 3),), {"mask": [True]}, TypeError, "mask must be a bool tensor, got list"),
        ((torch.ones(2, 3),), {"mask": torch.ones(2, dtype=torch.bool)}, ValueError, r"got \[2\]"),
        ((torch.ones(3),), {"mask": torch.ones(2, 3, dtype=torch.bool)}, ValueError, r"shape \[3\], got \[2, 3\]"),
        ((torch.ones(3),), {"mask": torch.ones(3, dtype=torch.bool, device="meta")}, TypeError, "device cpu, got meta"),
        ((torch.ones(3),), {"scale": float("nan")}, ValueError, "scale must be finite"),
        ((torch.ones(3),), {"scale": "1"}, TypeError, "scale must be a number, got str"),
        ((torch.ones(3),), {"backend": "tpu"}, ValueError, "backend must be one of"),
    ],
)
@every_op
def test_bad_input(op, arguments, options, error, message):
    with pytest.raises(error, match=message):
        OPS[op][0](*arguments, **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPS)
def test_samples_of_pytorch(name, dtype):
    from torch.testing._internal.common_methods_invocations import op_db

    count = 0
    for variant in (o for o in op_db if o.name == name):
        for sample in variant.sample_inputs("cpu", dtype, requires_grad=True):
            count += 1
            found = OPS[name][0](sample.input, *sample.args, **sample.kwargs)
            expected = variant.op(sample.input, *sample.args, **sample.kwargs)
            bound = tolerance(dtype, found.dtype)
            torch.testing.assert_close(found, expected, **bound)
            grads = [torch.autograd.grad(o, sample.input, normal(o.shape, o.dtype))[0] for o in (found, expected)]
            torch.testing.assert_close(*grads, **bound)
    assert count >= 5
