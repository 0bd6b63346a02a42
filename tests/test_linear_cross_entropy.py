"""Linear + cross entropy against PyTorch's cross entropy of the logits, in float64 and eagerly."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import TRITON
from exactness import assert_as_exact_as_eager
from torch import Tensor

import fastattn
from fastattn.backends import blocked
from fastattn.backends.cpu import product_dtype

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
REDUCTIONS = ["none", "sum", "mean"]
every_backend = pytest.mark.parametrize(
    "backend", ["reference"] + ["cpu"] * fastattn.backends()["cpu"].available + TRITON
)


def slow_in_triton(test, params):
    few = {torch.float32: "mean", torch.bfloat16: "sum", torch.float16: "none", torch.float64: "mean"}
    return {
        "test_as_exact_as_eager": params.get("reduction") != few[params.get("dtype", torch.float32)],
        "test_every_block": params.get("dtype") == torch.float64 or params.get("reduction") == "sum",
    }.get(test, False)


def tensors(lead, model_dim, vocab_size, *, biased=True, ignored=0.2, dtype=torch.float32, seed=0):
    """Returns random inputs by name; about ``ignored`` of the targets are -100."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*size):
        return torch.randn(size, generator=generator)

    target = torch.randint(vocab_size, lead, generator=generator)
    target[torch.rand(lead, generator=generator) < ignored] = -100
    return {
        "hidden": randn(*lead, model_dim).to(dtype),
        "weight": (2.0 * randn(vocab_size, model_dim) * model_dim**-0.5).to(dtype),
        "bias": randn(vocab_size).to(dtype) if biased else None,
        "target": target,
    }


def run(inputs: dict[str, Tensor | None], function: Any) -> dict[str, Tensor]:
    """Returns a function's loss and its gradients by name; losses of single tokens get different upstream gradients."""
    leaves = {
        name: t.detach().clone().requires_grad_() if t is not None and t.is_floating_point() else t
        for name, t in inputs.items()
    }
    loss = function(**leaves)
    upstream = torch.linspace(-1.0, 2.0, loss.numel(), dtype=torch.float64).view(loss.shape).to(loss.dtype)
    wanted = {name: t for name, t in leaves.items() if t is not None and t.requires_grad}
    return {"loss": loss.detach()} | dict(
        zip(wanted, torch.autograd.grad(loss, wanted.values(), upstream), strict=True)
    )


def eager(**options):
    def function(hidden, weight, target, bias):
        logits = F.linear(hidden, weight, bias)
        loss = F.cross_entropy(logits.flatten(0, -2), target.flatten(), **options)
        return loss.view(target.shape) if options.get("reduction") == "none" else loss

    return function


def fused(**options):
    return lambda **leaves: fastattn.linear_cross_entropy(**leaves, **options)


def doubled(inputs):
    return {n: t.double() if t is not None and t.is_floating_point() else t for n, t in inputs.items()}


@pytest.fixture
def small_blocks(monkeypatch):
    """Cuts small inputs into many blocks of classes and of tokens."""
    monkeypatch.setattr(blocked, "_VOCAB_BLOCK", 96)
    monkeypatch.setattr(blocked, "_LOGITS_BLOCK", 1 << 10)
    if TRITON:
        monkeypatch.setattr("fastattn.kernels.linear_cross_entropy.LOGITS_BYTES", 1)
        monkeypatch.setattr("fastattn.kernels.linear_cross_entropy_one_pass.LOGITS_BYTES", 1)
        monkeypatch.setattr("fastattn.kernels.linear_cross_entropy_one_pass.LEAST_TOKENS", 32)


@every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_as_exact_as_eager(backend, dtype, reduction, label_smoothing):
    options = {"reduction": reduction, "label_smoothing": label_smoothing}
    inputs = tensors((3, 50), 40, 300, dtype=dtype)
    found = run(inputs, fused(**options, backend=backend))
    exact = run(doubled(inputs), eager(**options))
    assert_as_exact_as_eager(found, exact, run(inputs, eager(**options)))


@pytest.mark.usefixtures("small_blocks")
@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize(("tokens", "vocab_size"), [(1, 1), (1, 97), (33, 96), (70, 500)])
def test_every_block(backend, dtype, reduction, biased, tokens, vocab_size):
    options = {"reduction": reduction, "label_smoothing": 0.2}
    inputs = tensors((tokens,), 17, vocab_size, biased=biased, ignored=0.0, dtype=dtype, seed=tokens)
    found = run(inputs, fused(**options, backend=backend))
    for name, expected in run(doubled(inputs), eager(**options)).items():
        torch.testing.assert_close(found[name].double(), expected, rtol=2e-5, atol=1e-5)


@pytest.mark.usefixtures("small_blocks")
@every_backend
def test_sum_and_mean_are_those_of_none(backend):
    inputs = tensors((60,), 8, 400, dtype=torch.float64)
    each = fastattn.linear_cross_entropy(**inputs, reduction="none", backend=backend)
    counted = inputs["target"] != -100
    assert torch.equal(each == 0, ~counted)
    total = fastattn.linear_cross_entropy(**inputs, reduction="sum", backend=backend)
    torch.testing.assert_close(total, each.sum())
    torch.testing.assert_close(fastattn.linear_cross_entropy(**inputs, backend=backend), total / counted.sum())


@every_backend
@pytest.mark.parametrize("ignore_index", [-1, 3, 10_000])
def test_ignore_index(backend, ignore_index):
    inputs = tensors((80,), 8, 30, ignored=0.0)
    inputs["target"][::3] = ignore_index
    options = {"ignore_index": ignore_index, "reduction": "mean"}
    found = run(inputs, fused(**options, backend=backend))
    for name, expected in run(inputs, eager(**options)).items():
        torch.testing.assert_close(found[name], expected)


@every_backend
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("lead", [(4,), (0,), (2, 0)], ids=str)
def test_nothing_counts(backend, reduction, lead):
    inputs = tensors(lead, 8, 30, ignored=1.1)
    found = run(inputs, fused(reduction=reduction, backend=backend))
    assert found["loss"].shape == (lead if reduction == "none" else ())
    for name, tensor in found.items():
        assert torch.equal(tensor, torch.zeros_like(tensor)), name


@every_backend
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_is_ignored_does_not_exist(backend, poison):
    inputs = tensors((50,), 8, 30)
    ignored = inputs["target"] == -100
    assert 0 < ignored.sum() < 50
    right = run(inputs, fused(backend=backend))
    inputs["hidden"][ignored] = poison
    for name, tensor in run(inputs, fused(backend=backend)).items():
        assert torch.equal(tensor, right[name]), name
    assert torch.equal(right["hidden"][ignored], torch.zeros(int(ignored.sum()), 8))


@every_backend
def test_a_class_of_bias_minus_infinity_has_no_part(backend):
    inputs = tensors((50,), 8, 30, ignored=0.0)
    inputs["target"].clamp_(min=1)
    inputs["bias"][0] = float("-inf")
    found = run(inputs, fused(backend=backend))
    without = {name: t[1:] if name in ("weight", "bias") else t for name, t in inputs.items()}
    without["target"] = without["target"] - 1
    expected = run(without, fused(backend=backend))
    torch.testing.assert_close(found["loss"], expected["loss"])
    torch.testing.assert_close(found["hidden"], expected["hidden"])
    torch.testing.assert_close(found["weight"][1:], expected["weight"])
    assert torch.equal(found["weight"][0], torch.zeros(8))


@every_backend
def test_large_logits(backend):
    inputs = tensors((50,), 8, 30, dtype=torch.float32)
    inputs["hidden"] *= 1000.0
    found = run(inputs, fused(backend=backend))
    assert_as_exact_as_eager(found, run(doubled(inputs), eager()), run(inputs, eager()))


@every_backend
def test_any_strides(backend):
    inputs = tensors((4, 6), 24, 40)
    strided = dict(inputs)
    strided["hidden"] = inputs["hidden"].transpose(0, 1).contiguous().transpose(0, 1)
    strided["weight"] = inputs["weight"].t().contiguous().t()
    strided["target"] = inputs["target"].t().contiguous().t()
    strided["bias"] = torch.stack([inputs["bias"]] * 2, 1)[:, 0]
    for reduction in REDUCTIONS:
        right = run(inputs, fused(reduction=reduction, backend=backend))
        for name, tensor in run(strided, fused(reduction=reduction, backend=backend)).items():
            torch.testing.assert_close(tensor, right[name])


@every_backend
@pytest.mark.parametrize("wanted", [*itertools.combinations(["hidden", "weight", "bias"], 1), ("hidden", "weight")])
def test_only_the_gradients_asked_for(backend, wanted):
    inputs = tensors((50,), 8, 30)
    everything = run(inputs, fused(backend=backend))
    leaves = {n: t.detach().requires_grad_(n in wanted) if n != "target" else t for n, t in inputs.items()}
    (fastattn.linear_cross_entropy(**leaves, backend=backend) * -1.0).backward()
    for name, leaf in leaves.items():
        if name in wanted:
            torch.testing.assert_close(leaf.grad, everything[name])  # a single upstream gradient of -1
        else:
            assert leaf.grad is None


@pytest.mark.parametrize("backend", ["cpu"] * fastattn.backends()["cpu"].available)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(300, 64, 5000), (3000, 64, 50), (300, 1024, 5000), (20, 2048, 4096)], ids=str)
def test_same_bits_at_any_thread_count(backend, dtype, shape):
    tokens, model_dim, vocab_size = shape
    inputs = tensors((tokens,), model_dim, vocab_size, dtype=dtype)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            results.append(run(inputs, fused(backend=backend)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for name, tensor in results[0].items():
            assert torch.equal(tensor, other[name]), name


def test_the_logits_are_never_held():
    """At 2048 x 20000 the logits alone would take 164 MB."""
    if not fastattn.backends()["cpu"].available:
        pytest.skip("needs the extension")
    inputs = tensors((2048,), 16, 20_000)
    with torch.profiler.profile(
        profile_memory=True, acc_events=True, activities=[torch.profiler.ProfilerActivity.CPU]
    ) as profile:
        run(inputs, fused(backend="cpu"))
    held, peak = 0, 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    assert 0 < peak < 60 << 20


@pytest.mark.filterwarnings("ignore::fastattn.FallbackWarning", "ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_derivatives_of_every_order(reduction):
    inputs = tensors((5,), 3, 6, dtype=torch.float64)
    leaves = [inputs[n].requires_grad_() for n in ("hidden", "weight", "bias")]

    def loss(hidden, weight, bias):
        return fastattn.linear_cross_entropy(
            hidden, weight, inputs["target"], bias=bias, label_smoothing=0.1, reduction=reduction
        )

    assert torch.autograd.gradcheck(loss, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(loss, leaves)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(reduction, dtype):
    inputs = tensors((2, 9), 8, 12, dtype=dtype)
    hidden, weight, bias = (inputs[n].requires_grad_() for n in ("hidden", "weight", "bias"))
    args = (hidden, weight, inputs["target"], bias, -100, 0.1, reduction, "")
    torch.library.opcheck(torch.ops.fastattn.linear_cross_entropy.default, args)
    plain = [a.detach() if isinstance(a, Tensor) else a for a in args]
    loss, lse = torch.ops.fastattn.linear_cross_entropy(*plain)
    torch.library.opcheck(
        torch.ops.fastattn.linear_cross_entropy_backward.default,
        (*plain, lse, torch.ones_like(loss), [True, False, True]),
    )


def test_compile():
    inputs = tensors((2, 9), 8, 12)

    def loss(**leaves):
        return fastattn.linear_cross_entropy(**leaves) * 2.0

    found = run(inputs, torch.compile(loss, fullgraph=True, backend="aot_eager"))
    for name, expected in run(inputs, loss).items():
        torch.testing.assert_close(found[name], expected)


def test_export():
    class Loss(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(8, 12)

        def forward(self, hidden, target):
            return fastattn.linear_cross_entropy(hidden, self.linear.weight, target, bias=self.linear.bias)

    inputs, module, tokens = tensors((9,), 8, 12), Loss(), torch.export.Dim("tokens", min=2, max=64)
    program = torch.export.export(
        module, (inputs["hidden"], inputs["target"]), dynamic_shapes=({0: tokens}, {0: tokens})
    )
    other = tensors((15,), 8, 12)
    torch.testing.assert_close(
        program.module()(other["hidden"], other["target"]), module(other["hidden"], other["target"])
    )


@every_backend
def test_autocast(backend):
    inputs = tensors((2, 9), 8, 12)
    leaves = {n: t.requires_grad_() if t.is_floating_point() else t for n, t in inputs.items()}
    with torch.autocast("cpu", torch.bfloat16):
        loss = fastattn.linear_cross_entropy(**leaves, backend=backend)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, eager()(**inputs), rtol=0.02, atol=0.02)
    loss.backward()
    assert leaves["weight"].grad.dtype == torch.float32


@every_backend
def test_a_scaled_float16_loss_keeps_small_gradients(backend):
    """Gradients are scaled before they are rounded: what a loss scale saves from underflow is not lost inside."""
    inputs = tensors((400,), 16, 900, ignored=0.0, dtype=torch.float16)
    scale = 2.0**14
    found = run(inputs, lambda **leaves: fastattn.linear_cross_entropy(**leaves, backend=backend) * -scale)
    exact = run(doubled(inputs), lambda **leaves: eager()(**leaves) * -scale)
    if backend == "triton":
        # It rounds gradients of logits, like PyTorch, but scaled.
        assert_as_exact_as_eager(found, exact, run(inputs, lambda **leaves: eager()(**leaves) * -scale))
        return
    torch.testing.assert_close(found["weight"].double(), exact["weight"], rtol=2e-3, atol=1e-3)


def bad(**changes: Any) -> dict[str, Any]:
    return tensors((2, 3), 8, 12) | changes


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (bad(hidden=torch.randn(2, 3, 7)), ValueError, r"weight must be \[vocab_size >= 1, model_dim=7\]"),
        (bad(hidden=torch.randn(2, 3, 0)), ValueError, r"model_dim >= 1, got \[2, 3, 0\]"),
        (bad(hidden=1.0), TypeError, "hidden must be a tensor, got float"),
        (bad(weight=torch.randn(12, 8).half()), TypeError, "dtype torch.float32, got torch.float16"),
        (bad(weight=torch.randn(0, 8)), ValueError, r"vocab_size >= 1"),
        (bad(bias=torch.randn(11)), ValueError, r"bias must have shape \[12\], got \[11\]"),
        (
            bad(target=torch.zeros(2, 4, dtype=torch.int64)),
            ValueError,
            r"target must have shape \[2, 3\], got \[2, 4\]",
        ),
        (bad(target=torch.zeros(2, 3)), TypeError, "int64 tensor of class indices, got torch.float32"),
        (bad(target=[0]), TypeError, "int64 tensor of class indices, got list"),
        (bad(target=torch.zeros(2, 3, dtype=torch.int64, device="meta")), TypeError, "hidden's device cpu, got meta"),
        (bad(target=torch.full((2, 3), 12)), ValueError, r"in \[0, vocab_size=12\) or ignore_index=-100, got 12"),
        (bad(target=torch.full((2, 3), -1)), ValueError, "got -1"),
        (bad(ignore_index=None), TypeError, "ignore_index must be an int, got NoneType"),
        (bad(label_smoothing=1.5), ValueError, r"label_smoothing must be in \[0, 1\], got 1.5"),
        (bad(label_smoothing=float("nan")), ValueError, "label_smoothing must be finite"),
        (bad(reduction="max"), ValueError, "reduction must be one of 'none', 'sum', 'mean', got 'max'"),
        (bad(backend="tpu"), ValueError, "backend must be one of"),
    ],
)
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        fastattn.linear_cross_entropy(**arguments)


@pytest.mark.parametrize(
    ("flags", "dtype", "expected"),
    [
        ((), torch.float32, torch.float32),
        ((), torch.float64, torch.float64),
        ((), torch.bfloat16, torch.float32),
        (("avx512_bf16",), torch.bfloat16, torch.float32),
        (("amx_bf16",), torch.bfloat16, torch.bfloat16),
        (("amx_bf16",), torch.float16, torch.float32),
    ],
)
def test_half_precision_is_widened_without_amx(flags, dtype, expected):
    assert product_dtype(flags, dtype) == expected


@every_backend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model_dim", [1, 7, 62, 257])
def test_what_lies_between_rows_is_not_read(backend, dtype, model_dim):
    """PyTorch's product multiplies it by 0, which NaN survives."""
    inputs = tensors((40,), model_dim, 255, ignored=0.0, dtype=dtype)
    expected = fastattn.linear_cross_entropy(**inputs, backend=backend)
    for name in ("hidden", "weight"):
        around = inputs[name].new_full((inputs[name].shape[0], model_dim + 3), float("nan"))
        around[:, :model_dim] = inputs[name]
        inputs[name] = around[:, :model_dim]
    torch.testing.assert_close(fastattn.linear_cross_entropy(**inputs, backend=backend), expected)
