"""KVCache: what it returns is what was appended, whatever it does to its buffers."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn

from fastattn.nn import KVCache, TransformerDecoder, TransformerDecoderLayer

MODULE, OTHER = nn.Identity(), nn.Identity()


def rows(batch=2, length=1, seed=0):
    return torch.randn(2, batch, 3, length, 4, generator=torch.Generator().manual_seed(seed)).unbind()


@pytest.mark.parametrize("max_len", [None, 40])
def test_positions_accumulate(max_len):
    cache = KVCache(max_len)
    keys, values = [], []
    for step, length in enumerate([3, 1, 1, 20, 1, 14]):
        key, value = rows(length=length, seed=step)
        keys.append(key)
        values.append(value)
        all_keys, all_values = cache.append(MODULE, key, value)
        assert torch.equal(all_keys, torch.cat(keys, 2))
        assert torch.equal(all_values, torch.cat(values, 2))
        assert cache.length == all_keys.shape[2]
    too_long = pytest.raises(ValueError, match="41 positions asked of a KVCache with max_len=40")
    with too_long if max_len else contextlib.nullcontext():
        cache.append(MODULE, *rows())


@pytest.mark.parametrize(("max_len", "most_moves"), [(None, 5), (300, 1)])
def test_growth_copies_rarely(max_len, most_moves):
    cache = KVCache(max_len)
    addresses = {cache.append(MODULE, *rows(seed=step))[0].data_ptr() for step in range(256)}
    assert len(addresses) <= most_moves  # 16, 32, 64, 128, 256
    assert cache.memory() <= 2 * 2 * (max_len or 256) * 3 * 4 * 4


def test_modules_have_entries_of_their_own():
    cache = KVCache()
    key, value = rows()
    cache.append(MODULE, key, value)
    assert cache.append(OTHER, value, key)[0].shape[2] == 1


def test_fixed_projects_once():
    cache, calls = KVCache(), []

    def project():
        calls.append(1)
        return rows(length=5)

    first = cache.fixed(MODULE, project)
    second = cache.fixed(MODULE, project)
    assert len(calls) == 1
    assert first[0] is second[0]
    assert cache.length == 0


def test_reorder_moves_rows():
    cache = KVCache()
    key, value = rows(batch=3, length=2)
    source = rows(batch=3, length=5, seed=9)
    cache.append(MODULE, key, value)
    cache.fixed(OTHER, lambda: source)
    order = torch.tensor([2, 2, 0, 1])
    cache.reorder(order)
    new_key, new_value = rows(batch=4, seed=5)
    all_keys, all_values = cache.append(MODULE, new_key, new_value)
    assert torch.equal(all_keys, torch.cat((key[order], new_key), 2))
    assert torch.equal(all_values, torch.cat((value[order], new_value), 2))
    assert torch.equal(cache.fixed(OTHER, tuple)[1], source[1][order])
    cache.reorder(torch.tensor([1, 0, 3, 2]), fixed=False)
    assert torch.equal(cache.fixed(OTHER, tuple)[1], source[1][order])
    with pytest.raises(ValueError, match="2 rows for another number"):
        cache.reorder(torch.tensor([0, 1]), fixed=False)
    with pytest.raises(ValueError, match="one-dimensional"):
        cache.reorder(torch.zeros(2, 2, dtype=torch.int64))


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="max_len must be positive"):
        KVCache(0)
    cache = KVCache()
    key, value = rows()
    with pytest.raises(ValueError, match="agree in all but head_dim"):
        cache.append(MODULE, key, value[:, :, :0])
    cache.append(MODULE, key, value)
    with pytest.raises(ValueError, match="this cache holds keys of batch 2"):
        cache.append(MODULE, key[:1], value[:1])
    with pytest.raises(ValueError, match="float32; got"):
        cache.append(MODULE, key.double(), value.double())
    with pytest.raises(RuntimeError, match="no_grad"):
        cache.append(MODULE, key.requires_grad_(), value)
    assert cache.length == 1


@pytest.mark.filterwarnings("ignore:.*reference backend")
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("prefix", [1, 3])
def test_a_cached_decoder_equals_an_uncached_one(norm_first, prefix):
    torch.manual_seed(0)
    layer = TransformerDecoderLayer(16, 4, 32, batch_first=True, norm_first=norm_first, dtype=torch.float64)
    decoder = TransformerDecoder(layer, 2, nn.LayerNorm(16, dtype=torch.float64)).eval()
    tgt, memory = torch.randn(3, 7, 16, dtype=torch.float64), torch.randn(3, 5, 16, dtype=torch.float64)
    padding = torch.arange(5) >= torch.tensor([[5], [2], [4]])
    causal = nn.Transformer.generate_square_subsequent_mask(7, dtype=torch.bool)
    with torch.no_grad():
        expected = decoder(tgt, memory, tgt_mask=causal, memory_key_padding_mask=padding)
        cache = KVCache()
        mask = causal[:prefix, :prefix]
        parts = [decoder(tgt[:, :prefix], memory, tgt_mask=mask, memory_key_padding_mask=padding, cache=cache)]
        for i in range(prefix, 7):
            parts.append(decoder(tgt[:, i : i + 1], memory, memory_key_padding_mask=padding, cache=cache))
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-12, atol=1e-12)
