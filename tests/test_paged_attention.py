"""Attention over a paged cache, against attention over the same keys side by side."""

from __future__ import annotations

import pytest
import torch
from conftest import backend_or_triton

import fastattn
from fastattn.errors import UnsupportedError
from fastattn.masks import Causal, Window
from fastattn.tools import verify_ops

backend = backend_or_triton
HEADS, HEADS_KV, DIM, DIM_V, PAGES = 4, 2, 16, 8, 11


def slow_in_triton(test, params):
    return params.get("page_size") in (1, 48) and params.get("mask") is not None


def cache(page_size, queries, max_pages=5, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def make(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "query": make(3, HEADS, queries, DIM),
        "key_cache": make(PAGES, page_size, HEADS_KV, DIM),
        "value_cache": make(PAGES, page_size, HEADS_KV, DIM_V),
        "block_table": torch.randint(PAGES, (3, max_pages), generator=generator, dtype=torch.int32),
        "cache_lengths": torch.tensor([max_pages * page_size - 2, page_size, 0]).clamp(0).int(),
    }


def expected(given, **options):
    """Each entry by itself, in the reference, its pages gathered one by one."""
    outs, lses = [], []
    for b, length in enumerate(given["cache_lengths"].tolist()):
        pages = given["block_table"][b].tolist()
        key, value = (torch.cat([given[n][p] for p in pages])[:length] for n in ("key_cache", "value_cache"))
        out, lse = fastattn.attention(
            given["query"][b : b + 1],
            *(t.transpose(0, 1)[None] for t in (key, value)),
            return_lse=True,
            backend="reference",
            **options,
        )
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs), torch.cat(lses)


@pytest.mark.parametrize("page_size", [1, 16, 32, 48], ids=str)
@pytest.mark.parametrize("queries", [1, 3, 40])
@pytest.mark.parametrize("mask", [None, Causal(), Window(9, 0)], ids=repr)
def test_pages_change_nothing(page_size, queries, mask, backend):
    given = cache(page_size, queries)
    found = fastattn.paged_attention(**given, mask=mask, softcap=3.0, return_lse=True, backend=backend)
    for got, want in zip(found, expected(given, mask=mask, softcap=3.0), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_long_caches_are_shared_out(dtype, backend):
    """Pages of any strides, sinks, and enough keys for several programs a head."""
    given = cache(64, 2, max_pages=6, dtype=dtype)
    for name in ("key_cache", "value_cache"):
        given[name] = given[name].transpose(0, 2).contiguous().transpose(0, 2)
    sinks = torch.randn(HEADS, generator=torch.Generator().manual_seed(2))
    found, lse = fastattn.paged_attention(**given, sinks=sinks, return_lse=True, backend=backend)
    wide = {n: t.double() if t.is_floating_point() else t for n, t in given.items()}
    want, want_lse = expected(wide, mask=Causal(), sinks=sinks.double())
    assert (found.double() - want).abs().max() <= 8 * torch.finfo(dtype).eps * want.abs().max()
    assert found.dtype == dtype
    torch.testing.assert_close(lse.double(), want_lse, atol=1e-2 if dtype.itemsize == 2 else 1e-5, rtol=0.0)


def test_a_number_that_is_no_pages_is_the_nearest(backend):
    given = cache(16, 1)
    given["block_table"][:, 0], given["block_table"][:, 1] = -(2**31), 2**31 - 1
    same = {**given, "block_table": given["block_table"].clamp(0, PAGES - 1)}
    found, want = (fastattn.paged_attention(**g, backend=backend) for g in (given, same))
    assert torch.equal(found, want)
    far = {**given, "block_table": given["block_table"].long()}
    far["block_table"][:, 0], far["block_table"][:, 1] = -(2**40), 2**32
    assert torch.equal(fastattn.paged_attention(**far, backend=backend), want)


def test_what_no_length_reaches_is_never_seen(backend):
    given = cache(16, 2)
    given["cache_lengths"] = torch.tensor([20, 16, 3])
    want = fastattn.paged_attention(**given, backend=backend)
    # Pages that entries share would be reached by another: each gets its own.
    given["block_table"] = torch.arange(PAGES)[:9].view(3, 3).int()
    want = fastattn.paged_attention(**given, backend=backend)
    for b, length in enumerate(given["cache_lengths"].tolist()):
        for at in range(length, 3 * 16):
            for name in ("key_cache", "value_cache"):
                given[name][given["block_table"][b, at // 16], at % 16] = float("nan")
    assert torch.equal(fastattn.paged_attention(**given, backend=backend), want)


def test_lengths_are_clamped(backend):
    given = cache(16, 1)
    given["cache_lengths"] = torch.tensor([10**12, 2**31, -5])
    full = {**given, "cache_lengths": torch.tensor([80, 80, 0])}
    found, want = (fastattn.paged_attention(**g, backend=backend) for g in (given, full))
    assert torch.equal(found, want)
    assert not found[2].any()


def test_same_bits_again(backend):
    given = cache(16, 3, dtype=torch.float32)
    first, second = (fastattn.paged_attention(**given, backend=backend) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("empty", ["batch", "queries", "pages", "table"])
def test_nothing_to_see(empty):
    given = cache(16, 2)
    if empty == "batch":
        given.update({n: given[n][:0] for n in ("query", "block_table", "cache_lengths")})
    if empty == "queries":
        given["query"] = given["query"][:, :, :0]
    if empty == "pages":
        given.update({n: given[n][:0] for n in ("key_cache", "value_cache")})
    if empty == "table":
        given["block_table"] = given["block_table"][:, :0]
    sinks = torch.randn(HEADS, dtype=torch.float64)
    out, lse = fastattn.paged_attention(**given, sinks=sinks, return_lse=True)
    assert not out.any()
    assert torch.equal(lse, sinks[None, :, None].expand_as(lse))
    if empty != "batch":
        assert fastattn.paged_attention(**given, return_lse=True)[1].isneginf().all()


def test_opcheck_and_compile():
    given = cache(16, 3, dtype=torch.float32)
    call = (*given.values(), None, -(1 << 61), 0, 0.25, 0.0, "")
    torch.library.opcheck(torch.ops.fastattn.paged_attention.default, call)
    compiled = torch.compile(lambda g: fastattn.paged_attention(**g, return_lse=True), fullgraph=True, backend="eager")
    for got, want in zip(compiled(given), fastattn.paged_attention(**given, return_lse=True), strict=True):
        assert torch.equal(got, want)


def test_it_has_no_gradient():
    given = cache(16, 1)
    given["query"].requires_grad_()
    with pytest.raises(RuntimeError, match="no gradient"):
        fastattn.paged_attention(**given)
    with torch.no_grad():
        assert fastattn.paged_attention(**given).isfinite().all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": torch.zeros(3, HEADS, DIM).double()}, ValueError, "query must be 4-D"),
        ({"key_cache": torch.zeros(PAGES, 16, HEADS_KV, DIM + 1).double()}, ValueError, "head_dim 16"),
        ({"key_cache": torch.zeros(PAGES, 16, 3, DIM).double()}, ValueError, "value_cache must be"),
        (
            {"value_cache": torch.zeros(PAGES, 16, HEADS_KV, 4).float()},
            TypeError,
            "value_cache must have query's dtype",
        ),
        ({"block_table": torch.zeros(2, 4).int()}, ValueError, r"block_table must be \[batch=3, max_pages\]"),
        ({"block_table": torch.zeros(3, 4)}, TypeError, "block_table must be an int32 or int64 tensor"),
        ({"cache_lengths": torch.zeros(4).int()}, ValueError, r"cache_lengths must have shape \[batch\] = \[3\]"),
        ({"sinks": torch.zeros(3)}, ValueError, "sinks must have shape"),
        ({"mask": fastattn.masks.KeyLengths(torch.zeros(3).int())}, TypeError, "mask must be Causal, Window or None"),
        ({"mask": Causal("top_left")}, ValueError, "align must be 'bottom_right'"),
        ({"softcap": 0.0}, ValueError, "softcap must be > 0"),
    ],
)
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        fastattn.paged_attention(**{**cache(16, 1), **change})


def test_a_head_dim_that_is_too_large():
    given = cache(16, 1)
    given["query"], given["key_cache"] = torch.zeros(3, HEADS, 1, 300), torch.zeros(PAGES, 16, HEADS_KV, 300)
    given["value_cache"] = given["value_cache"].float()
    with pytest.raises(UnsupportedError, match="head_dim of at most 256"):
        fastattn.paged_attention(**given, backend="triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_keeps_the_rule(dtype):
    report = verify_ops.verify_ops(ops=["paged_attention"], dtypes=[dtype])
    assert report.ok, report.table(only_failures=True)
    assert {r.direction for r in report.results} == {"forward"}
