"""Decode in Triton: however keys are shared out, the answer is the same."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("is about Triton's interpreter", allow_module_level=True)

from fastattn.kernels import decode
from fastattn.reference import attention as formula
from fastattn.spec.attention import attention_call, empty_output


def a_call(dtype, head_dim, keys, heads=(3, 1), queries=2):
    generator = torch.Generator().manual_seed(head_dim)
    shapes = [(2, heads[0], queries, head_dim), (2, heads[1], keys, head_dim), (2, heads[1], keys, 24)]
    query, key, value = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return attention_call(query, key, value, sinks=torch.ones(heads[0], dtype=dtype), backend="triton")


@pytest.mark.parametrize(("splits", "keys"), [(1, 90), (3, 90), (18, 1200), (40, 1300)])
def test_any_number_of_shares(splits, keys):
    """Also more than the second kernel adds at a time, and some that no key is left for."""
    call = a_call(torch.bfloat16, 16, keys)
    out, lse = empty_output(call)
    decode.decode_fwd(call, out, lse, splits)
    wide = call._replace(query=call.query.double(), key=call.key.double(), value=call.value.double())
    exact, exact_lse = formula.attention(wide)
    assert (out - exact).abs().max() <= 2 * torch.finfo(torch.bfloat16).eps * exact.abs().max()
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("head_dim", [24, 40, 200])
def test_columns_shared_out_among_warps(dtype, head_dim):
    call = a_call(dtype, head_dim, 70)
    out, lse = empty_output(call)
    decode.decode_fwd(call, out, lse, 2)
    wide = call._replace(query=call.query.double(), key=call.key.double(), value=call.value.double())
    exact, exact_lse = formula.attention(wide)
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=8 * torch.finfo(dtype).eps)
    torch.testing.assert_close(lse, exact_lse, rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-14)


@pytest.mark.parametrize("batch", [1, 2, 4, 7, 16, 17, 33, 50, 64])
@pytest.mark.parametrize("heads_kv", [1, 2, 8])
@pytest.mark.parametrize("keys", [2048, 8192, 131072])
def test_shares_keep_a_gpu_busy(batch, heads_kv, keys):
    """As many programs as fill 132 multiprocessors, where keys suffice, and few at the end of a launch."""
    one, most = batch * heads_kv, min(keys // decode.LEAST_KEYS, decode.MOST_SPLITS)
    splits = decode._cheapest(one, keys, 132, 4.0, (8 << 20) / (4 * 128))
    assert 1 <= splits <= most
    count = one * splits
    if one * keys * 512 > 64 << 20:  # else to begin a second kernel takes as long as anything
        assert count >= min(0.7 * 2 * 132, one * most)
        waves = count / (3 * 132)
        assert count >= 2 * 132 or waves < 1
        last = count % (3 * 132)
        assert last == 0 or last >= 132 or count > 12 * 132 or splits == most
