"""Attention's backward in Triton: in how many shares it runs changes no value, and what they hold does not grow."""

from __future__ import annotations

import importlib

import attention_cases
import pytest
import torch
from attention_cases import Case, assert_as_exact_as_eager, inputs, run
from conftest import TRITON

pytestmark = pytest.mark.skipif(not TRITON, reason="Triton is not installed")
CASES = {
    "plain": Case(heads=(4, 4), seq_len=(70, 300)),
    "causal": Case(batch=1, heads=(3, 3), seq_len=(300, 300), mask="causal"),
    "causal-gqa": Case(heads=(4, 2), seq_len=(262, 280), mask="causal", bias=(False, True, True, True)),
    "window": Case(batch=1, heads=(2, 1), seq_len=(600, 200), mask="window"),
    "everything": attention_cases.CASES["everything"],
}


def kernels(name: str):
    return importlib.import_module(f"fastattn.kernels.{name}")


@pytest.fixture
def room(request, monkeypatch):
    """Has room for as many slabs at once as the test's parameter says, and notes the shares that are made."""
    slabs = kernels("slabs")
    slabs.plan.cache_clear()
    monkeypatch.setattr(slabs, "LEAST_BYTES", 0)
    monkeypatch.setattr(slabs, "programs_at_once", lambda device: request.param)
    made = []
    shares = slabs.Plan.shares

    def noted(plan, first_plane, last_plane):
        found = list(shares(plan, first_plane, last_plane))
        made.extend(found)
        return iter(found)

    monkeypatch.setattr(slabs.Plan, "shares", noted)
    yield made
    slabs.plan.cache_clear()


@pytest.mark.parametrize("room", [1, 3], indirect=True)
@pytest.mark.parametrize("name", CASES)
def test_the_number_of_shares_changes_no_bit(name, room):
    given = inputs(CASES[name]).to(torch.float32)
    few = run(given, "triton")
    assert len(room) > 1
    assert_as_exact_as_eager(few, CASES[name], torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels("slabs"), "LEAST_BYTES", 1 << 30)
        kernels("slabs").plan.cache_clear()
        room.clear()
        whole = run(given, "triton")
        assert len(room) == 1
    for grad, expected in zip(few.grads.values(), whole.grads.values(), strict=True):
        assert torch.equal(grad, expected)


def test_slabs_hold_about_one_round_of_programs_whatever_the_length():
    plan = kernels("slabs").plan
    for seq_len in (1 << 14, 1 << 17, 1 << 20):
        for band, elements in ((None, seq_len), ((-seq_len, 0), seq_len), ((-1000, 0), 2048)):
            made = plan(band, seq_len, seq_len, 8, 128, 2, 132)
            held = made.num_planes * made.num_slabs * 128 * made.width * 2
            assert held <= max(1.1 * 132 * 128 * 2 * elements, 128 << 20), (seq_len, band, made)
    # Under a causal mask two tiles of keys share a slab, and nothing of it is empty but what alignment costs.
    made = plan((-8192, 0), 8192, 8192, 16, 128, 2, 132)
    assert made.paired
    assert made.slabs == 32
    assert made.width <= 8192 + 2 * 256
    # Four heads with 64 tiles each: every multiprocessor has something to do.
    assert made.num_planes * 64 >= 132


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_gradients_are_repaired_in_every_share(poison):
    """Queries that see nothing, and keys that nobody sees, are poisoned; shares of several heads each must mend it."""
    case = Case(batch=2, heads=(4, 2), seq_len=(150, 100), mask="causal+lengths")
    given = inputs(case).to(torch.float32)
    clean = run(given, "triton")
    allowed = given.mask.to_dense(*case.shape)
    poisoned = inputs(case).to(torch.float32)
    with torch.no_grad():
        poisoned.leaves["query"].masked_fill_(~allowed.any(dim=3)[..., None], poison)
        unseen = ~allowed.any(dim=2).unflatten(1, (2, 2)).any(dim=2)
        poisoned.leaves["key"].masked_fill_(unseen[..., None], poison)
    for name, tensor in run(poisoned, "triton").named().items():
        torch.testing.assert_close(tensor, clean.named()[name], rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_what_is_seen_and_not_finite_is_added_as_such():
    """Infinities keep their sign, cancel to NaN, and make NaN of a weight of 0; nothing else is touched."""
    global tl, tile  # where a kernel looks for them
    triton, tl = importlib.import_module("triton"), importlib.import_module("triton.language")
    tile, launch = kernels("tile"), kernels("launch")
    inf, nan = float("inf"), float("nan")
    weights, values = torch.rand(16, 16) + 0.1, torch.randn(16, 16)
    seen = torch.rand(16, 16) < 0.5
    values[3, 0], values[5, 0], values[7, 1], values[9, 2], values[11, 3] = inf, -inf, -inf, nan, inf
    seen[0], seen[1] = False, True
    weights[2, 11], seen[2, 11] = 0.0, True
    weights[4, 7], seen[4, 7] = -1.0, True
    weights = torch.where(seen, weights, 0.0)
    out = torch.zeros(16, 16)

    @triton.jit
    def kernel(weights, values, seen, out):
        at = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
        sums = tile.add_seen(tl.load(out + at), tl.load(weights + at), tl.load(values + at), tl.load(seen + at) != 0)
        tl.store(out + at, sums)

    launch.run((kernel, (1,), (weights, values, seen.to(torch.int32), out), {}))
    expected = torch.where(seen[:, :, None], weights[:, :, None] * values[None], 0.0).sum(dim=1)
    torch.testing.assert_close(out, expected, equal_nan=True)
    assert out.isnan().any()
    assert out.isinf().any()
