"""Triton's matrix products in every way that a GPU may take, and the loss in one pass, in the interpreter."""

from __future__ import annotations

import gc
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from conftest import TRITON
from torch import Tensor

import fastattn
from fastattn.spec.linear_cross_entropy import LinearCrossEntropyCall

pytestmark = pytest.mark.skipif(
    not TRITON or torch.cuda.is_available(), reason="needs Triton, and its interpreter because tensors are the CPU's"
)

if TRITON:
    from fastattn.kernels import linear_cross_entropy_one_pass as one_pass
    from fastattn.kernels import product as products
    from fastattn.kernels.interpreter import as_on_a_gpu
    from fastattn.kernels.launch import run
    from fastattn.kernels.product import Epilogue, ProductTile


def matrices(rows, columns, depth, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    make = lambda *size: torch.randn(*size, generator=generator).to(dtype)  # noqa: E731
    return make(rows, depth), make(depth, columns)


def turned(matrix: Tensor) -> Tensor:
    """Returns the same matrix, whose columns are adjacent in memory instead of its rows, or the other way round."""
    return matrix.t().contiguous().t()


@pytest.mark.parametrize("boxes", [True, False], ids=["boxes", "pointers"])
@pytest.mark.parametrize("persistent", [True, False], ids=["persistent", "a program a tile"])
@pytest.mark.parametrize("turn", [(False, False), (True, False), (False, True)], ids=str)
def test_every_way_gives_the_same(boxes, persistent, turn, monkeypatch):
    monkeypatch.setattr(products, "multiprocessors", lambda _: 3)
    a, b = matrices(72, 88, 104)
    expected, bias = torch.empty(72, 88, dtype=a.dtype), torch.randn(88).bfloat16()
    run(products.product_launch(ProductTile(16, 32, 32, 4, 1, boxes=False), a, b, expected, Epilogue(bias)))
    torch.testing.assert_close(expected, (a.double() @ b.double() + bias.double()).bfloat16())
    a, b = (turned(m) if turn_it else m for m, turn_it in zip((a, b), turn, strict=True))
    out = torch.empty_like(expected)
    tile = ProductTile(16, 32, 32, 4, 1, boxes, persistent)
    kernel, grid, arguments, options = products.product_launch(tile, a, b, out, Epilogue(bias))
    assert (arguments[1] is not None) == (arguments[3] is not None) == boxes
    assert grid == ((3,) if persistent else (15,))
    run((kernel, grid, arguments, options))
    # In the interpreter NumPy multiplies, whose sums depend on how its operands lie.
    torch.testing.assert_close(out, expected, rtol=2**-7, atol=1e-5)
    assert any(turn) or torch.equal(out, expected)


@pytest.mark.parametrize(("columns", "offset"), [(100, 0), (104, 1)], ids=["odd rows", "odd start"])
def test_what_the_copy_engine_does_not_take_comes_by_pointers(columns, offset):
    a = torch.randn(40, columns + offset).bfloat16()[:, offset:]
    tile = ProductTile(16, 32, 32, 4, 1)
    assert products.box(a, 16, 32, tile, 90) is None
    assert products.box(torch.randn(40, 104), 16, 32, tile, 90) is None
    out = torch.empty(40, 40, dtype=torch.bfloat16)
    run(products.product_launch(tile, a, a.t(), out))
    torch.testing.assert_close(out, (a.double() @ a.double().t()).bfloat16())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_product_cut_in_depth(dtype, monkeypatch):
    monkeypatch.setattr(products, "_LEAST_CUT_DEPTH", 32)
    monkeypatch.setattr(products, "_LEAST_CUT_ROWS", 1)
    monkeypatch.setattr(products, "multiprocessors", lambda _: 7)
    a, b = matrices(40, 72, 130, dtype)
    out = torch.empty(40, 72, dtype=dtype)
    tile = products.product_tiles(a.device, dtype, 40)[0]
    assert products.parts(tile, 40, 72, 130, 7) == 3
    products.product(a, b, out)
    torch.testing.assert_close(out, (a.double() @ b.double()).to(dtype))


def test_parts_of_a_product():
    tile = ProductTile(128, 256, 64, 8, 4)
    assert products.parts(tile, 8192, 8192, 1 << 17, 132) == 1  # 2,048 tiles: the last round matters little
    assert products.parts(tile, 1408, 4096, 1 << 17, 132) == 3  # 176 tiles are 1.3 rounds, 528 are 4
    assert products.parts(tile, 128, 256, 1 << 17, 132) == 4
    assert products.parts(tile, 128, 256, 4096, 132) == 1
    assert products.parts(tile, 1408, 4096, 1 << 17, 0) == 1


def test_a_sum_of_products_keeps_24_bits():
    """Of 20 products; rounded to bfloat16 each time, the sum would be off by more than one rounding."""
    out, low = torch.empty(40, 72, dtype=torch.bfloat16), torch.empty(40, 72, dtype=torch.uint8)
    exact, rounded = torch.zeros(40, 72, dtype=torch.float64), torch.zeros(40, 72, dtype=torch.bfloat16)
    tile = ProductTile(16, 32, 32, 4, 1)
    for at in range(20):
        a, b = matrices(40, 72, 32, seed=at)
        run(products.product_launch(tile, a, b, out, Epilogue(add=at > 0, low=low, last=at == 19)))
        exact += a.double() @ b.double()
        rounded += (a.double() @ b.double()).bfloat16()
    half_ulp = torch.finfo(torch.bfloat16).eps / 2 * exact.abs() + 1e-3
    assert ((out.double() - exact).abs() <= 1.02 * half_ulp).all()
    assert ((rounded.double() - exact).abs() > 1.02 * half_ulp).any()


def test_a_sum_of_products_that_are_not_finite():
    out, low = torch.empty(16, 16, dtype=torch.bfloat16), torch.empty(16, 16, dtype=torch.uint8)
    a, b = matrices(16, 16, 16)
    a[0], a[1] = float("nan"), float("inf")
    b.abs_()
    for at in range(3):
        run(
            products.product_launch(
                ProductTile(16, 16, 16, 4, 1), a, b, out, Epilogue(add=at > 0, low=low, last=at == 2)
            )
        )
    assert out[0].isnan().all()
    assert torch.equal(out[1], torch.full_like(out[1], float("inf")))
    assert out[2:].isfinite().all()


def loss_inputs(dtype=torch.float32, tokens=70, vocab_size=150):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, 16, generator=generator).to(dtype)
    weight = (torch.randn(vocab_size, 16, generator=generator) / 2).to(dtype)
    bias = torch.randn(vocab_size, generator=generator).to(dtype)
    return [t.requires_grad_() for t in (hidden, weight, bias)], torch.randint(
        vocab_size, (tokens,), generator=generator
    )


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(one_pass, "LOGITS_BYTES", 1)
    monkeypatch.setattr(one_pass, "LEAST_TOKENS", 32)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_again_and_times_any_number(dtype):
    """The first backward hands out what the forward has computed; the next one computes it anew."""
    (hidden, weight, bias), target = loss_inputs(dtype)
    loss = fastattn.linear_cross_entropy(hidden, weight, target, bias=bias, backend="triton") * 3.0
    first = torch.autograd.grad(loss, [hidden, weight, bias], retain_graph=True)
    kept = [g.clone() for g in first]
    again = torch.autograd.grad(loss, [hidden, weight, bias])
    wide = [t.detach().double().requires_grad_() for t in (hidden, weight, bias)]
    exact = torch.autograd.grad(F.cross_entropy(F.linear(*wide), target) * 3.0, wide)
    for one, copy, other, right in zip(first, kept, again, exact, strict=True):
        assert torch.equal(one, copy)
        assert torch.equal(one, other)
        tolerance = 1e-5 if dtype == torch.float32 else 0.02
        torch.testing.assert_close(one.double(), right, rtol=tolerance, atol=tolerance * float(right.abs().max()))


def test_a_loss_without_gradients_computes_none(monkeypatch):
    monkeypatch.setattr(one_pass, "linear_cross_entropy_one_pass", None)
    (hidden, weight, _), target = loss_inputs()
    with torch.no_grad():
        fastattn.linear_cross_entropy(hidden, weight, target, backend="triton")
    fastattn.linear_cross_entropy(hidden, weight, target, reduction="none", backend="triton").sum().backward()


def test_blocks_of_tokens():
    def call(tokens, vocab_size, dtype=torch.bfloat16):
        make = lambda *size: torch.empty(*size, dtype=dtype, device="meta")  # noqa: E731
        target = torch.empty(tokens, dtype=torch.int64, device="meta")
        return LinearCrossEntropyCall(make(tokens, 4096), make(vocab_size, 4096), target, None, -100, 0.0, "mean", "")

    assert list(one_pass.token_blocks(call(5, 1000))) == [slice(0, 5)]
    assert list(one_pass.token_blocks(call(300, 1 << 24))) == [slice(0, 128), slice(128, 256), slice(256, 300)]
    blocks = list(one_pass.token_blocks(call(8192, 131072)))
    assert [b.stop - b.start for b in blocks] == [1408] * 5 + [1152]
    # Logits, the further bits of the weights' gradient, and what a product cut into three parts adds up: under 1 GB.
    assert 1408 * 131072 * 2 + 131072 * 4096 + 3 * 1408 * 4096 * 4 < 1e9


@pytest.fixture
def prompt_interpreter(monkeypatch):
    """Has the interpreter give back what a launch was given as soon as it is done: it holds it in a circle."""

    @contextmanager
    def interpreting():
        with as_on_a_gpu():
            yield
        gc.collect()

    monkeypatch.setattr("fastattn.kernels.launch.as_on_a_gpu", interpreting)
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("small_blocks", "prompt_interpreter")
def test_memory():
    """Two blocks of logits' worth at most, besides the gradients: the logits of all tokens are ten."""
    (hidden, weight, bias), target = loss_inputs(tokens=320, vocab_size=600)
    with torch.profiler.profile(
        profile_memory=True, acc_events=True, activities=[torch.profiler.ProfilerActivity.CPU]
    ) as profile:
        loss = fastattn.linear_cross_entropy(hidden, weight, target, bias=bias, backend="triton")
        grads = torch.autograd.grad(loss, [hidden, weight, bias])
    held, peak = 0, 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    assert 0 < peak - sum(g.nbytes for g in grads) < 2 * 32 * 600 * 4


def test_the_loss_works_in_blocks_of_classes(monkeypatch):
    """What the backward holds at a time is bounded, whatever the vocabulary."""
    monkeypatch.setattr("fastattn.kernels.linear_cross_entropy.LOGITS_BYTES", 1)
    from fastattn.kernels.linear_cross_entropy import class_blocks

    target = torch.zeros(7, dtype=torch.int64)
    call = LinearCrossEntropyCall(torch.zeros(7, 4), torch.zeros(600, 4), target, None, -100, 0.0, "mean", "triton")
    assert [(block.start, block.stop) for block in class_blocks(call)] == [(0, 256), (256, 512), (512, 600)]
