"""Attention weights over several tiles of queries and keys: every instruction set against float64 and eager PyTorch."""

import pytest
import torch
from exactness import assert_as_exact_as_eager

import fastattn
from fastattn.masks import Causal, KeyLengths

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BATCH, HEADS, KV_HEADS, QUERIES, KEYS, DIM = 2, 4, 2, 70, 300, 40


def inputs(dtype, seed=0, scale=1.0):
    draw = torch.Generator().manual_seed(seed)
    query = (torch.randn(BATCH, HEADS, QUERIES, DIM, generator=draw) * scale).to(dtype)
    return query, torch.randn(BATCH, KV_HEADS, KEYS, DIM, generator=draw).to(dtype)


def eager(query, key, visible=None, bias=None):
    scores = query @ key.repeat_interleave(HEADS // KV_HEADS, dim=1).transpose(-1, -2) * DIM**-0.5
    scores = scores if bias is None else scores + bias.to(scores.dtype)
    scores = scores if visible is None else scores.masked_fill(~visible, float("-inf"))
    return scores.softmax(dim=-1)


def visible_to(mask):
    rows, columns = torch.arange(QUERIES)[:, None], torch.arange(KEYS)
    if mask == "causal":
        return (columns <= rows + KEYS - QUERIES)[None, None], Causal()
    lengths = torch.tensor([257, 20])
    return (columns < lengths[:, None, None, None]), KeyLengths(lengths)


@pytest.mark.parametrize("reduce", ["none", "head_mean"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ["plain", "causal", "lengths", "bias"])
def test_weights(backend, dtype, reduce, case):
    query, key = inputs(dtype)
    bias = torch.randn(1, HEADS, QUERIES, KEYS, generator=torch.Generator().manual_seed(7)) if case == "bias" else None
    visible, mask = visible_to(case) if case in ("causal", "lengths") else (None, None)
    bias = None if bias is None else bias.to(dtype)
    found = fastattn.attention_weights(query, key, mask=mask, bias=bias, reduce=reduce, backend=backend)
    exact = eager(query.double(), key.double(), visible, bias)
    of_eager = eager(query, key, visible, bias)
    if reduce == "head_mean":
        exact, of_eager = exact.mean(dim=1), of_eager.mean(dim=1)
    assert found.dtype == dtype
    assert_as_exact_as_eager({"weights": found}, {"weights": exact}, {"weights": of_eager})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_masked_keys_do_not_exist(backend, dtype, bad):
    query, key = inputs(dtype)
    _, mask = visible_to("lengths")
    expected = fastattn.attention_weights(query, key, mask=mask, reduce="head_mean", backend=backend)
    key[0, :, 257:], key[1, :, 20:] = bad, bad
    found = fastattn.attention_weights(query, key, mask=mask, reduce="head_mean", backend=backend)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-38, 1e-3, 300.0, 1e4])
def test_rows_sum_to_one_at_any_scale(backend, dtype, scale):
    query, key = inputs(dtype, scale=scale)
    weights = fastattn.attention_weights(query, key, reduce="none", backend=backend).double()
    assert float(weights.min()) >= 0.0
    assert float(weights.max()) <= 1.0
    # Each weight is rounded by itself.
    torch.testing.assert_close(
        weights.sum(-1), torch.ones(()).double().expand(BATCH, HEADS, QUERIES), rtol=0, atol=0.02
    )


def test_same_bits_at_any_thread_count(backend):
    query, key = inputs(torch.bfloat16)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(fastattn.attention_weights(query, key, reduce="head_mean", backend=backend))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found[1:])
