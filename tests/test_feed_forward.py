"""The feed-forward block: every backend and instruction set against the formula in float64 and eager PyTorch.

Long because every form of the block (activation, gate, dropouts, residual) is held against it with one set of helpers.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import TRITON
from exactness import assert_as_exact_as_eager
from torch import Tensor

import fastattn
from fastattn.reference.philox import keep_mask

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
ACTIVATIONS = ["relu", "gelu", "gelu_tanh", "silu"]
NAMES = ["input", "weight_in", "bias_in", "weight_gate", "bias_gate", "weight_out", "bias_out"]

try:
    from fastattn import _cpu
except ImportError:
    _cpu = None
ISAS = [] if _cpu is None else _cpu.available_isas()
BACKENDS = ["reference", *ISAS, *TRITON]


def slow_in_triton(test, params):
    dtype, gated = params.get("dtype", torch.float32), params.get("gated")
    shape = params.get("model_dim"), params.get("tokens")
    chosen = gated != (dtype == torch.float32) and (dtype == torch.float32 or params.get("activation") == "silu")
    return {
        "test_as_exact_as_eager": not chosen or dtype == torch.float64,
        "test_as_exact_as_eager_at_size": True,
        "test_as_exact_as_eager_however_many_tokens": (dtype == torch.float64) == (shape[1] != 5) or shape[1] == 385,
        "test_every_edge": shape not in ((1, 1), (3, 5), (17, 1), (17, 17), (17, 65), (64, 33)),
        "test_dropout_drops_what_the_generator_says": dtype == torch.float16 or shape[1] == 69,
    }.get(test, False)


@pytest.fixture
def backend(request):
    """Selects a backend; an instruction set's name means "cpu" on that instruction set."""
    if request.param in ("reference", "triton"):
        yield request.param
        return
    _cpu.set_isa(request.param)
    yield "cpu"
    _cpu.set_isa(ISAS[-1])


every_backend = pytest.mark.parametrize("backend", BACKENDS, indirect=True)


def through_the_reference(test):
    """Marks a test of forward-mode derivatives: they say that they run on the reference, and PyTorch scripts them."""
    for warning in ("ignore::fastattn.FallbackWarning", "ignore:.*torch.jit:DeprecationWarning"):
        test = pytest.mark.filterwarnings(warning)(test)
    return test


def tensors(lead, model_dim, ff_dim, *, gated=True, biased=True, out_dim=None, dtype=torch.float32, seed=0):
    """Returns random inputs of a block by name, of a size that a trained one has."""
    out_dim = model_dim if out_dim is None else out_dim
    shapes = {
        "input": (*lead, model_dim),
        "weight_in": (ff_dim, model_dim),
        "bias_in": (ff_dim,),
        "weight_gate": (ff_dim, model_dim),
        "bias_gate": (ff_dim,),
        "weight_out": (out_dim, ff_dim),
        "bias_out": (out_dim,),
    }
    generator = torch.Generator().manual_seed(seed)
    made: dict[str, Tensor | None] = {}
    for name, shape in shapes.items():
        scale = shape[-1] ** -0.5 if name.startswith("weight") else 1.0
        made[name] = (torch.randn(shape, generator=generator) * scale).to(dtype)
        if ("gate" in name and not gated) or ("bias" in name and not biased):
            made[name] = None
    return made


def run(inputs: dict[str, Tensor | None], function: Any) -> dict[str, Tensor]:
    """Returns a function's output and its gradients by name."""
    leaves = {name: None if t is None else t.detach().clone().requires_grad_() for name, t in inputs.items()}
    out = function(**leaves)
    direction = torch.linspace(-1.0, 1.0, out.numel(), dtype=torch.float64).sin().view(out.shape).to(out.dtype)
    present = {name: t for name, t in leaves.items() if t is not None}
    grads = torch.autograd.grad(out, present.values(), direction)
    return {"out": out.detach()} | dict(zip(present, grads, strict=True))


def eager(activation, keep=None, dropout_p=0.0):
    """Returns the block as a user of PyTorch writes it, with a given dropout mask."""
    act = {
        "relu": F.relu,
        "gelu": F.gelu,
        "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
        "silu": F.silu,
    }[activation]

    def block(input, weight_in, bias_in, weight_gate, bias_gate, weight_out, bias_out):
        hidden = act(F.linear(input, weight_in, bias_in))
        if weight_gate is not None:
            hidden = hidden * F.linear(input, weight_gate, bias_gate)
        if keep is not None:
            hidden = hidden * keep.view(hidden.shape) / (1 - dropout_p)
        return F.linear(hidden, weight_out, bias_out)

    return block


def fused(**options):
    return lambda **leaves: fastattn.feed_forward(**leaves, **options)


def doubled(inputs):
    return {name: None if t is None else t.double() for name, t in inputs.items()}


@every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_as_exact_as_eager(backend, dtype, activation, gated):
    inputs = tensors((3, 45), 72, 200, gated=gated, dtype=dtype)
    found = run(inputs, fused(activation=activation, backend=backend))
    exact = run(doubled(inputs), eager(activation))
    assert_as_exact_as_eager(found, exact, run(inputs, eager(activation)))


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_as_exact_as_eager_at_size(backend, dtype):
    """Several blocks of tokens, of hidden units and of the summed dimensions."""
    inputs = tensors((700,), 300, 1100, gated=False, dtype=dtype, seed=1)
    found = run(inputs, fused(activation="gelu", backend=backend))
    assert_as_exact_as_eager(found, run(doubled(inputs), eager("gelu")), run(inputs, eager("gelu")))


@every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [5, 40, 385])
def test_as_exact_as_eager_however_many_tokens(backend, dtype, tokens):
    inputs = tensors((tokens,), 72, 200, dtype=dtype)
    found = run(inputs, fused(activation="silu", backend=backend))
    assert_as_exact_as_eager(found, run(doubled(inputs), eager("silu")), run(inputs, eager("silu")))


@pytest.mark.parametrize("backend", ISAS, indirect=True)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize(
    ("tokens", "model_dim", "ff_dim", "out_dim"),
    # In the last a task has more hidden units than it takes at once, and fewer columns are left than it writes at once.
    [(5, 96, 160, 64), (16, 96, 160, 64), (32, 96, 160, 64), (16, 160, 2400, 288)],
)
def test_few_tokens_of_half_precision(backend, gated, tokens, model_dim, ff_dim, out_dim):
    """Dimensions of whole tiles: weights are multiplied where they lie."""
    inputs = tensors((tokens,), model_dim, ff_dim, gated=gated, out_dim=out_dim, dtype=torch.bfloat16, seed=tokens)
    state = torch.randint((1 << 63) - 1, (2,), generator=torch.Generator().manual_seed(5))
    keep = keep_mask(state, 0.3, 1, tokens, ff_dim)

    def dropped(**leaves):
        generator = torch.Generator().manual_seed(5)
        return fastattn.feed_forward(**leaves, activation="silu", dropout_p=0.3, generator=generator, backend=backend)

    exact = run(doubled(inputs), eager("silu", keep, 0.3))
    assert_as_exact_as_eager(run(inputs, dropped), exact, run(inputs, eager("silu", keep, 0.3)))


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize(("tokens", "ff_dim"), [(2100, 200), (2100, 4700), (1100, 6100)])
def test_as_exact_as_eager_in_stretches_and_groups(gated, tokens, ff_dim):
    """More tokens, or hidden units, than the backward on AMX takes at once."""
    inputs = tensors((tokens,), 24, ff_dim, gated=gated, dtype=torch.bfloat16)
    found = run(inputs, fused(activation="relu"))
    assert_as_exact_as_eager(found, run(doubled(inputs), eager("relu")), run(inputs, eager("relu")))


@every_backend
@pytest.mark.parametrize("tokens", [1, 2, 5, 15, 16, 17, 31, 33, 63, 65, 129])
@pytest.mark.parametrize(("model_dim", "ff_dim", "out_dim"), [(1, 1, 1), (3, 7, 2), (17, 65, 33), (64, 48, 8)])
def test_every_edge(backend, tokens, model_dim, ff_dim, out_dim):
    inputs = tensors((tokens,), model_dim, ff_dim, out_dim=out_dim, seed=tokens)
    found = run(inputs, fused(activation="silu", backend=backend))
    for name, expected in run(doubled(inputs), eager("silu")).items():
        torch.testing.assert_close(
            found[name].double(), expected, rtol=1e-5, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("tokens", [13, 69])
def test_dropout_drops_what_the_generator_says(backend, dtype, gated, tokens):
    inputs = tensors((tokens,), 16, 150, gated=gated, dtype=dtype)
    state = torch.randint((1 << 63) - 1, (2,), generator=torch.Generator().manual_seed(5))
    keep = keep_mask(state, 0.3, 1, tokens, 150)
    assert 0.6 < keep.float().mean() < 0.8

    def dropped(**leaves):
        generator = torch.Generator().manual_seed(5)
        return fastattn.feed_forward(**leaves, activation="gelu", dropout_p=0.3, generator=generator, backend=backend)

    exact = run(doubled(inputs), eager("gelu", keep, 0.3))
    assert_as_exact_as_eager(run(inputs, dropped), exact, run(inputs, eager("gelu", keep, 0.3)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_block_of_tokens_after_another_in_triton(dtype, monkeypatch):
    """Gradients of weights are added up over blocks, whose dropout goes on where the last one's ended."""
    kernels = pytest.importorskip("fastattn.kernels.feed_forward")
    monkeypatch.setattr(kernels, "HIDDEN_BYTES", 1)
    test_dropout_drops_what_the_generator_says("triton", dtype, True, 150)


@every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("tokens", [13, 69])
def test_residual_and_last_dropout(backend, dtype, dropout_p, tokens):
    """One call is the layer's end: x + dropout(feed_forward(x)), which draws what two calls draw."""
    inputs = tensors((tokens,), 16, 150, gated=False, out_dim=24, dtype=dtype)
    inputs["residual"] = torch.randn(tokens, 24, generator=torch.Generator().manual_seed(2)).to(dtype)
    generator = torch.Generator().manual_seed(5)
    states = [torch.randint((1 << 63) - 1, (2,), generator=generator) for _ in range(2 if dropout_p else 1)]
    *inner, last = [keep_mask(s, 0.3, 1, tokens, n)[0] for s, n in zip(states, (150, 24)[-len(states) :], strict=True)]
    options = {"activation": "gelu", "dropout_p": dropout_p, "output_dropout_p": 0.3, "backend": backend}

    def ours(**leaves):
        return fastattn.feed_forward(**leaves, **options, generator=torch.Generator().manual_seed(5))

    def right(residual, **leaves):
        return residual + eager("gelu", inner[0] if inner else None, 0.3)(**leaves) * last / 0.7

    assert_as_exact_as_eager(run(inputs, ours), run(doubled(inputs), right), run(inputs, right))


@every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("strided", [False, True])
def test_residual(backend, dtype, strided):
    inputs = tensors((4, 9), 16, 50, gated=False, dtype=dtype)
    residual = torch.randn(4, 9, 16, generator=torch.Generator().manual_seed(2)).to(dtype)
    inputs["residual"] = residual.transpose(0, 1).contiguous().transpose(0, 1) if strided else residual

    def right(residual, **leaves):
        return residual + eager("gelu")(**leaves)

    found = run(inputs, fused(activation="gelu", backend=backend))
    assert_as_exact_as_eager(found, run(doubled(inputs), right), run(inputs, right))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_residual_by_default(dtype):
    """Without a backend named, a plain call adds in place: the same bits, the same gradients, and only to its own."""
    inputs = tensors((4, 9), 16, 50, gated=False, dtype=dtype)
    inputs["residual"] = torch.randn(4, 9, 16, generator=torch.Generator().manual_seed(2)).to(dtype)
    kept = inputs["residual"].clone()
    alone = {name: t for name, t in inputs.items() if name != "residual"}
    expected = run(inputs, lambda residual, **leaves: fastattn.feed_forward(**leaves) + residual)
    for name, tensor in run(inputs, fastattn.feed_forward).items():
        torch.testing.assert_close(tensor, expected[name])
    with torch.no_grad():
        assert torch.equal(fastattn.feed_forward(**inputs), fastattn.feed_forward(**alone) + kept)
    assert torch.equal(inputs["residual"], kept)
    only = inputs | {"residual": kept.clone().requires_grad_()}
    (grad,) = torch.autograd.grad(fastattn.feed_forward(**only, output_dropout_p=0.5), [only["residual"]], kept)
    assert torch.equal(grad, kept)


def test_a_residual_in_triton_after_a_block_of_tokens(monkeypatch):
    kernels = pytest.importorskip("fastattn.kernels.feed_forward")
    monkeypatch.setattr(kernels, "HIDDEN_BYTES", 1)
    test_residual_and_last_dropout("triton", torch.float32, 0.3, 150)


@every_backend
def test_dropout_follows_the_global_generator(backend):
    inputs = tensors((40,), 8, 64)
    torch.manual_seed(3)
    a = fastattn.feed_forward(**inputs, dropout_p=0.5, backend=backend)
    b = fastattn.feed_forward(**inputs, dropout_p=0.5, backend=backend)
    torch.manual_seed(3)
    assert torch.equal(a, fastattn.feed_forward(**inputs, dropout_p=0.5, backend=backend))
    assert not torch.equal(a, b)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_strides(backend, dtype):
    inputs = tensors((4, 6), 24, 40, dtype=dtype)
    strided = dict(inputs)
    strided["input"] = inputs["input"].transpose(0, 1).contiguous().transpose(0, 1)
    strided["weight_in"] = F.pad(inputs["weight_in"], (3, 5))[:, 3:-5]
    strided["weight_out"] = inputs["weight_out"].t().contiguous().t()
    strided["weight_gate"] = torch.cat([inputs["weight_gate"]] * 2)[::2].copy_(inputs["weight_gate"])
    strided["bias_in"] = torch.stack([inputs["bias_in"]] * 2, 1)[:, 0]
    leaves = {name: t.detach().requires_grad_() for name, t in strided.items()}
    out = fastattn.feed_forward(**leaves, backend=backend)
    direction = torch.randn_like(out).transpose(0, 1).contiguous().transpose(0, 1)
    grads = torch.autograd.grad(out, leaves.values(), direction)
    plain = {name: t.detach().requires_grad_() for name, t in inputs.items()}
    expected = fastattn.feed_forward(**plain, backend=backend)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    expected_grads = torch.autograd.grad(expected, plain.values(), direction)
    for grad, right in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, right)


@every_backend
@pytest.mark.parametrize("lead", [(), (1,), (2, 3, 4), (0,), (2, 0)])
def test_leading_dimensions(backend, lead):
    inputs = tensors(lead, 12, 20)
    found, expected = run(inputs, fused(backend=backend)), run(inputs, eager("relu"))
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-5)


@every_backend
@pytest.mark.parametrize(
    "wanted", [*itertools.combinations(NAMES, 1), ("input", "bias_out"), ("weight_in", "weight_gate")]
)
def test_only_the_gradients_asked_for(backend, wanted):
    inputs = tensors((30,), 12, 20)
    everything = run(inputs, fused(activation="gelu", backend=backend))
    leaves = {name: t.detach().requires_grad_(name in wanted) for name, t in inputs.items()}
    out = fastattn.feed_forward(**leaves, activation="gelu", backend=backend)
    direction = torch.linspace(-1.0, 1.0, out.numel(), dtype=torch.float64).sin().view(out.shape).to(out.dtype)
    out.backward(direction)
    for name, leaf in leaves.items():
        if name in wanted:
            torch.testing.assert_close(leaf.grad, everything[name])
        else:
            assert leaf.grad is None


@pytest.mark.parametrize("backend", ISAS, indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [16, 1500])
def test_same_bits_at_any_thread_count(backend, dtype, tokens):
    inputs = tensors((tokens,), 96, 1280, dtype=dtype)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 2, 3):
            torch.set_num_threads(threads)
            results.append(
                run(
                    inputs,
                    fused(
                        activation="silu", dropout_p=0.1, generator=torch.Generator().manual_seed(1), backend=backend
                    ),
                )
            )
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for name, tensor in results[0].items():
            assert torch.equal(tensor, other[name]), name


@every_backend
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_token_of_nan_stays_alone(backend, activation):
    inputs = tensors((20,), 8, 33)
    right = fastattn.feed_forward(**inputs, activation=activation, backend=backend)
    inputs["input"][7] = float("nan")
    out = fastattn.feed_forward(**inputs, activation=activation, backend=backend)
    assert out[7].isnan().all()
    others = torch.arange(20) != 7
    torch.testing.assert_close(out[others], right[others])


@through_the_reference
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_derivatives_of_every_order(activation, gated):
    inputs = {n: t for n, t in tensors((5,), 3, 4, gated=gated, dtype=torch.float64).items() if t is not None}
    inputs["residual"] = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    leaves = [t.requires_grad_() for t in inputs.values()]
    generator = torch.Generator()

    def block(*args):
        generator.manual_seed(0)
        full = dict.fromkeys(NAMES) | dict(zip(inputs, args, strict=True))
        options = {"activation": activation, "dropout_p": 0.2, "output_dropout_p": 0.3, "generator": generator}
        return fastattn.feed_forward(**full, **options)

    assert torch.autograd.gradcheck(block, leaves)
    assert torch.autograd.gradgradcheck(block, leaves)
    assert torch.autograd.gradcheck(block, leaves, check_forward_ad=True, check_backward_ad=False)


@through_the_reference
def test_torch_func():
    inputs = tensors((4, 6), 5, 7, dtype=torch.float64)
    rest = {name: t for name, t in inputs.items() if name != "input"}
    each = torch.func.vmap(lambda x: fastattn.feed_forward(x, **rest))(inputs["input"])
    torch.testing.assert_close(each, fastattn.feed_forward(**inputs))
    jacobian = torch.func.jacrev(lambda x: fastattn.feed_forward(x, **rest))(inputs["input"][0, 0])
    expected = torch.autograd.functional.jacobian(lambda x: fastattn.feed_forward(x, **rest), inputs["input"][0, 0])
    torch.testing.assert_close(jacobian, expected)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(gated, dtype):
    inputs = tensors((2, 9), 8, 12, gated=gated, dtype=dtype)
    args = [None if t is None else t.requires_grad_() for t in (inputs[n] for n in NAMES)]
    state = torch.tensor([3, 4])
    args.append(torch.randn(2, 9, 8, dtype=dtype).requires_grad_() if gated else None)
    numbers = (state, state + 1 if gated else None, "gelu", 0.25, 0.5 if gated else 0.0, "")
    torch.library.opcheck(torch.ops.fastattn.feed_forward.default, (*args, *numbers))
    dout = torch.randn(2, 9, 8, dtype=dtype)
    plain = [None if t is None else t.detach() for t in args]
    needed = [t is not None for t in plain[:-1]]
    torch.library.opcheck(torch.ops.fastattn.feed_forward_backward.default, (*plain, *numbers, dout, needed))


def test_compile():
    inputs = tensors((2, 9), 8, 12)

    def block(**leaves):
        return fastattn.feed_forward(**leaves, activation="gelu") * 2.0

    found = run(inputs, torch.compile(block, fullgraph=True, backend="aot_eager"))
    for name, expected in run(inputs, block).items():
        torch.testing.assert_close(found[name], expected)


def test_export():
    module = fastattn.nn.FeedForward(8, 12, activation="silu", gated=True).eval()
    x = torch.randn(2, 5, 8)
    tokens = torch.export.Dim("tokens", min=2, max=64)
    program = torch.export.export(module, (x,), dynamic_shapes=({1: tokens},))
    other = torch.randn(2, 11, 8)
    torch.testing.assert_close(program.module()(other), module(other))


@every_backend
def test_autocast(backend):
    inputs = tensors((2, 9), 8, 12)
    inputs["input"] = inputs["input"].bfloat16()  # as what an earlier layer returns under autocast
    leaves = {name: t.requires_grad_() for name, t in inputs.items()}
    with torch.autocast("cpu", torch.bfloat16):
        out = fastattn.feed_forward(**leaves, backend=backend)
    assert out.dtype == torch.bfloat16
    cast = {name: t.detach().bfloat16() for name, t in inputs.items()}
    torch.testing.assert_close(out, fastattn.feed_forward(**cast, backend=backend))
    out.sum().backward()
    assert leaves["weight_in"].grad.dtype == torch.float32


def bad(**changes: Any) -> dict[str, Any]:
    return tensors((2, 3), 8, 12) | changes


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (bad(input=torch.randn(2, 7)), ValueError, r"weight_in must be \[ff_dim >= 1, model_dim=7\], got \[12, 8\]"),
        (bad(input=torch.randn(2, 0)), ValueError, r"model_dim >= 1, got \[2, 0\]"),
        (bad(input=torch.tensor(1.0)), ValueError, r"input must be \[..., model_dim\]"),
        (bad(input=[1.0]), TypeError, "input must be a tensor, got list"),
        (bad(input=torch.ones(2, 8, dtype=torch.int32)), TypeError, "got torch.int32"),
        (bad(weight_in=torch.randn(12, 8).double()), TypeError, "dtype torch.float32, got torch.float64"),
        (bad(weight_in=torch.randn(12, 8, device="meta")), TypeError, "must be on input's device cpu, got meta"),
        (bad(weight_in=torch.randn(12)), ValueError, r"weight_in must be"),
        (bad(weight_out=torch.randn(8, 11)), ValueError, r"weight_out must be \[model_dim >= 1, ff_dim=12\]"),
        (bad(bias_in=torch.randn(11)), ValueError, r"bias_in must have shape \[12\], got \[11\]"),
        (bad(bias_out=torch.randn(1)), ValueError, r"bias_out must have shape \[8\], got \[1\]"),
        (bad(weight_gate=torch.randn(11, 8)), ValueError, r"weight_gate must have shape \[12, 8\]"),
        (bad(weight_gate=None), ValueError, "bias_gate needs weight_gate"),
        (bad(activation="swish"), ValueError, "activation must be one of .*, got 'swish'"),
        (bad(dropout_p=1.0), ValueError, r"dropout_p must be in \[0, 1\), got 1.0"),
        (bad(dropout_p=float("nan")), ValueError, "dropout_p must be finite"),
        (bad(output_dropout_p=-0.1), ValueError, r"output_dropout_p must be in \[0, 1\), got -0.1"),
        (bad(residual=torch.randn(2, 3, 9)), ValueError, r"residual must have shape \[2, 3, 8\], got \[2, 3, 9\]"),
        (bad(residual=torch.randn(8)), ValueError, r"residual must have shape \[2, 3, 8\], got \[8\]"),
        (bad(residual=torch.randn(2, 3, 8).half()), TypeError, "residual must have input's dtype torch.float32"),
        (bad(residual=[1.0]), TypeError, "residual must be a tensor, got list"),
        (bad(backend="tpu"), ValueError, "backend must be one of"),
    ],
)
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        fastattn.feed_forward(**arguments)


@pytest.mark.skipif("amx" not in ISAS, reason="needs AMX")
@pytest.mark.parametrize("name", ["input", "weight_in", "weight_gate", "weight_out"])
@pytest.mark.parametrize("value", [float("inf"), float("nan"), 3.4e38])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_what_has_no_pieces_takes_the_other_kernel(name, value, dtype):
    """float32 and float16 reach AMX in pieces: what is not finite, or rounds to it, goes to AVX-512 as a whole."""
    inputs = tensors((50,), 40, 70, dtype=dtype)
    inputs[name][7, 9] = value
    found = {}
    for isa in ("amx", "avx512"):
        _cpu.set_isa(isa)
        found[isa] = run(inputs, fused(activation="silu", backend="cpu"))
    _cpu.set_isa(ISAS[-1])
    for tensor, expected in zip(found["amx"].values(), found["avx512"].values(), strict=True):
        assert torch.equal(tensor.nan_to_num(1.0, 2.0, 3.0), expected.nan_to_num(1.0, 2.0, 3.0))


@pytest.mark.parametrize("backend", ISAS, indirect=True)
@pytest.mark.parametrize("scale", [1e-35, 1e-30, 1e-25, 1e30])
def test_any_scale(backend, scale):
    inputs = tensors((70,), 40, 100, gated=False)
    inputs |= {name: inputs[name] * scale for name in ("weight_out", "bias_out")}
    found = run(inputs, fused(activation="gelu", backend=backend))
    assert_as_exact_as_eager(found, run(doubled(inputs), eager("gelu")), run(inputs, eager("gelu")))


@pytest.mark.skipif(
    _cpu is None or sys.platform != "linux", reason="needs the extension and the kernel's high-water mark"
)
@pytest.mark.parametrize(("dtype", "most"), [("float32", 30e6), ("bfloat16", 45e6)])
def test_memory(dtype, most):
    """Neither direction holds [tokens, ff_dim], here 134 MB in float32 and 67 MB in bfloat16, nor float32 copies of the
    weights, which are 34 MB."""
    code = f"""
import torch, fastattn
from fastattn.tools.measure import peak_memory
torch.set_num_threads(2)
make = lambda *shape: torch.randn(*shape, dtype=torch.{dtype}, requires_grad=True)
def step(tokens, width):
    leaves = make(tokens, 128), make(width, 128), make(width), make(128, width), make(128)
    def run():
        out = fastattn.feed_forward(*leaves, activation="gelu", backend="cpu")
        return out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))
    return run
step(8, 8)()
results = []
run = step(1024, 32768)
peak = peak_memory(lambda: results.extend(run()))
print(peak - sum(t.numel() * t.element_size() for t in results))
"""
    excess = int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
    assert excess < most
