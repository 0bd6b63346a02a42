"""Attention: values and every gradient, on every backend and instruction set, against the float64 reference."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from attention_cases import (
    CASES,
    MASKS,
    Case,
    arguments,
    assert_as_exact_as_eager,
    eager,
    exact,
    inputs,
    philox_4x32_10,
    philox_keep,
    random_case,
    run,
)
from conftest import TRITON
from torch import Tensor

import fastattn
from fastattn.masks import Causal, KeyLengths, Segments, Window
from fastattn.reference.philox import keep_mask

try:
    from fastattn import _cpu
except ImportError:
    _cpu = None
ISAS = _cpu.available_isas() if _cpu is not None else []
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
CAUSAL = CASES["causal"]


# What Triton's interpreter, which takes about a second a call, runs in other dtypes than float32.
TRITON_IN_EVERY_DTYPE = {"dim-17-33", "one-key", "causal-more-keys", "softcap", "sinks", "relative", "everything"}


def left_out_in_triton(params: dict[str, Any]) -> str | None:
    """Returns why a test is not run on Triton's kernels, or None."""
    if params.get("name") == "dim-300-270":
        return "the kernels take heads of up to 256"
    in_float32 = params.get("dtype", torch.float32) == torch.float32
    few = (
        not in_float32 and params.get("name") not in TRITON_IN_EVERY_DTYPE,
        params.get("seed", 0) >= 6,
        not np.isnan(params.get("poison", np.nan)),
        "poison" in params and params.get("mask", "causal_top_left") not in ("causal_top_left", "lengths"),
        params.get("missing") in ("key", "value", "sinks"),
    )
    return "the interpreter is slow: a few cases stand for the others" if any(few) else None


@pytest.fixture(params=["reference", *(f"cpu-{isa}" for isa in ISAS), *TRITON])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """A backend's name, its instruction set in force."""
    name, _, isa = request.param.partition("-")
    if name == "triton":
        why = left_out_in_triton(request.node.callspec.params)
        if why is not None:
            pytest.skip(why)
        yield name
        return
    if not isa:
        yield name
        return
    if isa == "amx" and request.node.callspec.params.get("dtype", torch.bfloat16) != torch.bfloat16:
        pytest.skip("AMX has kernels for bfloat16 alone; the others are AVX-512's")
    before = _cpu.isa()
    _cpu.set_isa(isa)
    yield name
    _cpu.set_isa(before)


@pytest.fixture
def native(backend: str) -> torch.dtype:
    """A dtype for which the instruction set in force has kernels of its own."""
    return torch.bfloat16 if backend == "cpu" and _cpu.isa() == "amx" else torch.float32


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    """Of results that may have been added up in another order and then rounded to ``dtype``."""
    return dict.fromkeys(("rtol", "atol"), 1e-5 if dtype == torch.float32 else 2e-2)


def assert_same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    for name in a:
        assert torch.equal(a[name], b[name]), name


# Everything is compared with the reference: it has to agree with two definitions that it shares no code with.


@pytest.mark.parametrize("case", [*CASES.values(), *map(random_case, range(30))], ids=str)
def test_reference_is_the_definition(case: Case) -> None:
    second_opinion = eager(inputs(case).to(torch.float64)).named()
    for name, expected in exact(case).named().items():
        torch.testing.assert_close(
            second_opinion[name], expected, rtol=1e-9, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("name", ["plain", "cross", "causal", "dim-64-128", "bias-full", "mqa"])
def test_reference_is_torch_sdpa(name: str) -> None:
    case = replace(CASES[name], mask="") if name == "mqa" else CASES[name]
    given = inputs(case).to(torch.float64)
    query, key, value, *bias = given.leaves.values()
    out = F.scaled_dot_product_attention(
        query, key, value, bias[0] if bias else None, is_causal=case.mask == "causal", enable_gqa=name == "mqa"
    )
    grads = torch.autograd.grad(out, list(given.leaves.values()), given.dout)
    found = run(given._replace(dlse=torch.zeros_like(given.dlse)), "reference")
    for a, b in zip((found.out, *found.grads.values()), (out, *grads), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_masks_mean_what_they_say() -> None:
    len_q, len_k = 5, 7
    lengths, ids_q, ids_k = torch.tensor([3, 9]), torch.arange(10).view(2, 5) // 3, torch.arange(14).view(2, 7) // 4
    offset = len_k - len_q
    rules: list[tuple[Any, Any]] = [
        (Causal(), lambda b, i, j: j <= i + offset),
        (Causal("top_left"), lambda b, i, j: j <= i),
        (Window(2, 1), lambda b, i, j: i + offset - 2 <= j <= i + offset + 1),
        (Window(None, 1, "top_left"), lambda b, i, j: j <= i + 1),
        (KeyLengths(lengths), lambda b, i, j: j < lengths[b]),
        (Segments(ids_q, ids_k), lambda b, i, j: ids_q[b, i] == ids_k[b, j]),
    ]
    for mask, rule in rules:
        expected = [[[bool(rule(b, i, j)) for j in range(len_k)] for i in range(len_q)] for b in range(2)]
        assert mask.to_dense(2, 1, len_q, len_k)[:, 0].tolist() == expected, mask
    both = (Causal() & Segments(ids_q, ids_k)).to_dense(2, 1, len_q, len_k)
    assert torch.equal(
        both, Causal().to_dense(2, 1, len_q, len_k) & Segments(ids_q, ids_k).to_dense(2, 1, len_q, len_k)
    )


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # the known answers that the generator's authors publish
        ([0] * 4, (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([2**32 - 1] * 4, (2**32 - 1,) * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            (0xA4093822, 0x299F31D0),
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_known_answers(counter: list[int], key: tuple[int, int], expected: list[int]) -> None:
    words = philox_4x32_10([np.array(c) for c in counter], key)
    assert [int(w) for w in words] == expected


# Values and gradients.


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name: str, dtype: torch.dtype, backend: str) -> None:
    case = CASES[name]
    assert_as_exact_as_eager(run(inputs(case, dtype).to(dtype), backend), case, dtype)


@pytest.mark.parametrize("seed", range(40))
def test_random_calls(seed: int, backend: str, native: torch.dtype) -> None:
    case = random_case(seed)
    dtype = native if native == torch.bfloat16 else DTYPES[seed % 4]
    assert_as_exact_as_eager(run(inputs(case, dtype).to(dtype), backend), case, dtype)


@pytest.mark.parametrize("bias_dtype", DTYPES, ids=str)
def test_bias_and_sinks_of_another_dtype(bias_dtype: torch.dtype, backend: str) -> None:
    case = replace(CASES["bias-heads"], sinks=True)
    given = inputs(case, torch.bfloat16).to(torch.bfloat16)
    for name in ("bias", "sinks"):
        given.leaves[name] = given.leaves[name].detach().to(bias_dtype).requires_grad_()
    found = run(given, backend)
    assert found.grads["bias"].dtype == bias_dtype
    assert found.grads["sinks"].dtype == bias_dtype
    assert_as_exact_as_eager(found, case, torch.bfloat16)


@pytest.mark.parametrize("missing", ["query", "key", "value", "bias", "sinks", "table"])
def test_only_needed_gradients(missing: str, backend: str, native: torch.dtype) -> None:
    case = CASES["relative" if missing == "table" else "everything"]
    if backend == "triton" and missing != "table":  # two tiles each way, interpreted
        case = replace(case, batch=2, seq_len=(70, 90))
    complete = run(inputs(case).to(native), backend).grads
    given = inputs(case).to(native)
    given.leaves[missing].requires_grad_(False)
    for wanted in ({missing}, set(complete) - {missing}):
        for name, leaf in given.leaves.items():
            leaf.requires_grad_(name in wanted)
        out, lse = fastattn.attention(**arguments(given, backend=backend, return_lse=True))
        leaves = [given.leaves[name] for name in complete if name in wanted]
        grads = torch.autograd.grad([out, lse], leaves, [given.dout, given.dlse])
        for name, grad in zip([n for n in complete if n in wanted], grads, strict=True):
            assert torch.equal(grad, complete[name]), name


@pytest.mark.parametrize("which", ["out", "lse"])
def test_gradient_of_one_output(which: str, backend: str) -> None:
    case = replace(CASES["causal"], sinks=True)
    given = inputs(case).to(torch.float32)
    given64 = inputs(case).to(torch.float64)
    grads = []
    for g in (given, given64):
        name = backend if g is given else "reference"
        out, lse = fastattn.attention(**arguments(g, backend=name, return_lse=True))
        target, seed = (out, g.dout) if which == "out" else (lse, g.dlse)
        grads.append(torch.autograd.grad(target, list(g.leaves.values()), seed))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=2e-5)


# Strides.


def strided(tensor: Tensor, how: str) -> Tensor:
    """Returns ``tensor``'s values laid out in memory another way, last dimension contiguous."""
    batch, heads, length, dim = tensor.shape
    if how == "tokens-first":
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    if how == "packed":
        room = tensor.new_full((length, batch, heads, 2, dim + 3), float("nan"))
        room[:, :, :, 1, 2 : dim + 2] = tensor.permute(2, 0, 1, 3)
        return room[:, :, :, 1, 2 : dim + 2].permute(1, 2, 0, 3)
    assert how == "backwards-heads"
    room = tensor.new_full((heads, batch, length + 1, dim), float("nan"))
    room[:, :, 1:] = tensor.transpose(0, 1)
    return room[:, :, 1:].transpose(0, 1)


@pytest.mark.parametrize("how", ["tokens-first", "packed", "backwards-heads"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strided_inputs(how: str, dtype: torch.dtype, backend: str) -> None:
    case = Case(heads=(4, 2), seq_len=(70, 90), head_dim=(33, 20), mask="causal", bias=(False, True, True, True))
    plain = inputs(case, dtype).to(dtype)
    expected = run(plain, backend)
    leaves = {n: strided(t.detach(), how).requires_grad_() for n, t in plain.leaves.items() if n != "bias"}
    # A bias may even have a last dimension that is not contiguous.
    leaves["bias"] = plain.leaves["bias"].detach().transpose(2, 3).contiguous().transpose(2, 3).requires_grad_()
    found = run(plain._replace(leaves=leaves, dout=strided(plain.dout, how)), backend)
    assert_same_bits(found.named(), expected.named())


def test_expanded_inputs(backend: str) -> None:
    case = Case(batch=3, heads=(4, 2), seq_len=(40, 50))
    given = inputs(case).to(torch.float32)
    narrow = {n: t.detach()[:1, :1].requires_grad_() for n, t in given.leaves.items()}
    expanded = {n: t.expand_as(given.leaves[n]) for n, t in narrow.items()}
    written = {n: t.detach().clone().requires_grad_() for n, t in expanded.items()}
    for dout in (torch.ones(()).expand_as(given.dout), given.dout[:, :, :1].expand_as(given.dout)):
        out = fastattn.attention(**arguments(given._replace(leaves=expanded), backend=backend))
        grads = torch.autograd.grad(out, list(narrow.values()), dout)
        out = fastattn.attention(**arguments(given._replace(leaves=written), backend=backend))
        whole = torch.autograd.grad(out, list(written.values()), dout.contiguous())
        for grad, full in zip(grads, whole, strict=True):
            torch.testing.assert_close(grad, full.sum((0, 1), keepdim=True), rtol=1e-4, atol=1e-4)


def test_out_follows_the_memory_order_of_query(backend: str) -> None:
    query = torch.randn(2, 10, 4, 8).transpose(1, 2)
    out = fastattn.attention(query, query, query, backend=backend)
    assert out.transpose(1, 2).is_contiguous()


# Empty rows, and what is masked.


def test_empty_rows(backend: str, native: torch.dtype) -> None:
    case = Case(seq_len=(150, 50), mask="causal", bias=(False, True, True, True))
    found = run(inputs(case).to(native), backend)
    assert (found.out[:, :, :100] == 0).all()
    assert (found.lse[:, :, :100] == float("-inf")).all()
    assert (found.grads["query"][:, :, :100] == 0).all()
    assert (found.grads["bias"][:, :, :100] == 0).all()
    assert all(t.isfinite().all() for t in found.grads.values())


def test_every_row_empty(backend: str, native: torch.dtype) -> None:
    given = inputs(Case(sinks=True)).to(native)._replace(mask=KeyLengths(torch.zeros(2, dtype=torch.int32)))
    found = run(given, backend)
    assert (found.out == 0).all()
    assert torch.equal(found.lse, given.leaves["sinks"].detach().float()[None, :, None].expand(2, 2, 70))
    assert all((found.grads[n] == 0).all() for n in ("query", "key", "value"))
    torch.testing.assert_close(found.grads["sinks"], given.dlse.sum((0, 2)).to(native))


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("mask", MASKS)
def test_masked_places_do_not_exist(mask: str, poison: float, backend: str, native: torch.dtype) -> None:
    """NaN and Inf in keys, values and biases that no query sees, and in queries that see no key, change nothing."""
    case = Case(batch=2, heads=(4, 2), seq_len=(150, 170), mask=mask, bias=(True, True, True, True))
    given = inputs(case).to(native)
    clean = run(given, backend)
    allowed = given.mask.to_dense(*case.shape)
    unseen = ~allowed.any(dim=2).unflatten(1, (2, 2)).any(dim=2)  # [batch, num_heads_kv, seq_len_k]
    poisoned = inputs(case).to(native)
    with torch.no_grad():
        poisoned.leaves["bias"].masked_fill_(~allowed, poison)
        for name in ("key", "value"):
            poisoned.leaves[name].masked_fill_(unseen[..., None], poison)
        poisoned.leaves["query"].masked_fill_(~allowed.any(dim=3)[..., None], poison)
    for name, tensor in run(poisoned, backend).named().items():
        torch.testing.assert_close(tensor, clean.named()[name], **tolerance(native), msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["key", "value"])
def test_poison_stays_with_those_who_see_it(where: str, poison: float, backend: str, native: torch.dtype) -> None:
    """The last key of a causal call belongs to the last query alone: all other rows of out and dq keep their value."""
    case = Case(seq_len=(150, 150), head_dim=(24, 40), mask="causal")
    clean = run(inputs(case).to(native), backend)
    given = inputs(case).to(native)
    with torch.no_grad():
        given.leaves[where][:, :, -1] = poison
    found = run(given, backend)
    for name, tensor in (("out", found.out), ("lse", found.lse), ("dquery", found.grads["query"])):
        torch.testing.assert_close(tensor[:, :, :-1], clean.named()[name][:, :, :-1], **tolerance(native))
    assert not found.out[:, :, -1].isfinite().all()


def test_nan_that_is_seen_is_not_hidden(backend: str, native: torch.dtype) -> None:
    given = inputs(CASES["plain"]).to(native)
    with torch.no_grad():
        given.leaves["key"][0, 0, 3, 2] = float("nan")
    found = run(given, backend)
    assert found.out[0, 0].isnan().all()
    assert found.grads["query"][0, 0].isnan().all()
    assert found.out[1].isfinite().all()


def test_huge_scores(backend: str) -> None:
    """The maximum is subtracted before the exponential, so scores far beyond the range of exp give a one-hot row."""
    given = inputs(Case(softmax_scale=3e4)).to(torch.float32)
    found = run(given, backend)
    assert all(t.isfinite().all() for t in found.named().values())
    expected = run(inputs(Case(softmax_scale=3e4)).to(torch.float64), "reference")
    agree = (found.out.double() - expected.out).abs().amax(-1) < 1e-3
    assert agree.float().mean() > 0.95  # but for near ties, which float32 scores of this size decide by rounding


# Dropout.


@pytest.mark.parametrize("case", [CASES["dropout"], CASES["dropout-gqa"]], ids=str)
def test_dropout_drops_what_the_definition_says(case: Case, backend: str, native: torch.dtype) -> None:
    given = inputs(replace(case, mask="")).to(native)
    eye = torch.eye(case.seq_len[1], dtype=native).expand(case.batch, case.heads[1], -1, -1)
    weights = fastattn.attention(**arguments(given, backend=backend, value=eye))
    assert torch.equal(weights != 0, torch.from_numpy(philox_keep(case)))


def test_dropout_state_is_drawn_from_the_generator(backend: str) -> None:
    query = torch.randn(1, 2, 40, 8)

    def draw(seed: int | None) -> Tensor:
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return fastattn.attention(query, query, query, dropout_p=0.5, generator=generator, backend=backend)

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    torch.manual_seed(3)
    first, second = draw(None), draw(None)
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(draw(None), first)


def test_dropout_rate() -> None:
    kept = keep_mask(torch.tensor([7, 2**62 + 5]), 0.1, planes=4, rows=200, columns=501)
    assert abs(float(kept.float().mean()) - 0.9) < 0.003


# Determinism.


LONG = ("causal-long", "cross", "mqa", "long")


@pytest.mark.parametrize(
    "name", ["everything", "few-queries-everything", *LONG, "bias-shared", "bias-number", "relative"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_at_any_thread_count(name: str, dtype: torch.dtype, backend: str) -> None:
    if backend == "reference":
        pytest.skip("PyTorch's own sums depend on the number of threads")
    if backend == "triton":
        pytest.skip("its interpreter has one thread")
    given = inputs(CASES[name], dtype).to(dtype)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = run(given, backend).named()
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            assert_same_bits(run(given, backend).named(), expected)
    finally:
        torch.set_num_threads(before)
