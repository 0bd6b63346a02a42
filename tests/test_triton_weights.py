"""Attention weights in Triton: every reduction against float64, in tiles of every kind."""

from __future__ import annotations

import attention_cases
import pytest
import torch
from conftest import TRITON
from exactness import assert_as_exact_as_eager
from test_attention_weights import DTYPES, in_float64, weights_of_case

import fastattn
from fastattn.masks import Causal, Dense
from fastattn.ops import attention_weights as op
from fastattn.reference import attention_weights as formula
from fastattn.spec.attention_weights import REDUCTIONS, result_shape

pytestmark = pytest.mark.skipif(not TRITON, reason="Triton is not installed")
NAMES = ["one-of-each", "causal-more-queries", "segments-causal", "bias-gqa", "alibi", "dropout-gqa", "few-queries"]


@pytest.mark.parametrize("name", NAMES)
def test_reductions_as_exact_as_eager(name):
    case = attention_cases.CASES[name]
    rows, columns = case.seq_len
    asked = [("none", {}), ("key_sum", {}), ("entropy", {}), ("head_mean", {}), ("top_k", {"top_k": min(4, columns)})]
    asked += [("pooled", {"pool_size": size}) for size in (33, max(rows, columns) + 1)]
    for shift, (reduce, options) in enumerate(asked):
        dtype = DTYPES[(NAMES.index(name) + shift) % 4]
        call = weights_of_case(case, dtype, reduce, "triton", **options)
        found, keys = op.weigh(call)
        assert found.shape == result_shape(call)
        exact = formula.reduced_weights(in_float64(call))[0]
        eager = formula.reduced_weights(call)[0].to(dtype)
        what = f"{reduce} {options} {dtype}"
        assert_as_exact_as_eager({what: found}, {what: exact}, {what: eager})
        assert keys.shape == (found.shape if reduce == "top_k" else (0,))


@pytest.mark.parametrize("distinct", [True, False])
def test_top_k_prefers_the_first_key(distinct):
    generator = torch.Generator().manual_seed(9)
    query = torch.randn(1, 2, 70, 8, generator=generator)
    # Three kinds of keys only: most weights are equal to many others.
    key = torch.randn(1, 2, 140 if distinct else 3, 8, generator=generator)
    key = key if distinct else key[:, :, torch.randint(3, (140,), generator=generator)]
    options = {"mask": Causal("top_left"), "backend": "triton"}
    weights = fastattn.attention_weights(query, key, **options)
    values, keys = fastattn.attention_weights(query, key, reduce="top_k", top_k=5, **options)
    expected, expected_keys = weights.sort(dim=-1, descending=True, stable=True)
    assert torch.equal(values, expected[..., :5])
    assert torch.equal(keys, expected_keys[..., :5].masked_fill(values == 0, -1))


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_poison_that_is_masked_does_not_exist_and_poison_that_is_seen_does(reduce):
    generator = torch.Generator().manual_seed(7)
    query, clean = (torch.randn(1, 2, n, 24, generator=generator) for n in (70, 100))
    visible = torch.rand(1, 1, 70, 100, generator=generator) < 0.5
    visible[..., [7, 99]] = False
    key = clean.clone()
    key[:, :, 7], key[:, :, 99] = float("nan"), float("inf")
    options = {"mask": Dense(visible), "reduce": reduce, "backend": "triton", "top_k": 3 if reduce == "top_k" else None}
    found, expected = (fastattn.attention_weights(query, k, **options) for k in (key, clean))
    for got, want in zip(found, expected, strict=True):
        # Of poisoned rows the lse is added up once more, perhaps in another order.
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    query[0, 1, 66] = float("nan")
    result = fastattn.attention_weights(query, clean, **options)
    result = result[0] if reduce == "top_k" else result
    poisoned = torch.zeros_like(result, dtype=torch.bool)
    if reduce == "key_sum":
        poisoned[0, 1] = visible[0, 0, 66]
    elif reduce == "head_mean":
        poisoned[0, 66] = visible[0, 0, 66]
    elif reduce == "pooled":
        poisoned[0, 1, 1] = True
    else:
        poisoned[0, 1, 66] = visible[0, 0, 66] if reduce == "none" else True
    assert torch.equal(result.isnan(), poisoned)
