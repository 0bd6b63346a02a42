"""The tables of attention's tiles, and the search over them."""

from __future__ import annotations

import pytest
import torch
from conftest import TRITON

import fastattn

pytestmark = pytest.mark.skipif(not TRITON, reason="needs Triton")
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="is about Triton's interpreter")
DTYPES = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}


def calls(dim):
    from fastattn.kernels import tiles

    return [call for dtype in DTYPES.values() for _, call in tiles.example_calls(dtype, dim)]


@pytest.mark.parametrize("name", ["forward", "forward_rich", "decode", "backward_keys", "backward_queries", "square"])
@pytest.mark.parametrize("architecture", [0, 80, 90, 100])
def test_candidates_begin_with_the_tables_own_and_never_repeat(name, architecture):
    from fastattn.kernels import tiles

    for dim in (64, 128, 200):
        for call in calls(dim):
            own = tiles.choose(tiles.TABLES[name], call, architecture)
            found = list(tiles.candidates(name, call, architecture))
            assert tuple(found[: len(own)]) == own
            assert len(found) == len(set(found)) >= len(set(own))


def test_a_search_may_name_the_tile():
    from fastattn.kernels import tiles
    from fastattn.kernels.launch import Tile

    call = calls(64)[0]
    usual = tiles.choose(tiles.FORWARD, call, 90)
    outer, inner = Tile(32, 32, 4, 1), Tile(16, 16, 4, 1)
    with tiles.using("forward", outer):
        with tiles.using("forward", inner), tiles.using("square", outer):
            assert tiles.choose(tiles.FORWARD, call, 90) == (inner,)
            assert tiles.choose(tiles.DECODE, call, 90) != (inner,)
        assert tiles.choose(tiles.FORWARD, call, 90) == (outer,)
    assert tiles.choose(tiles.FORWARD, call, 90) == usual


@interpreted
@pytest.mark.parametrize("rows", [16, 32])
def test_the_tile_changes_no_result(rows):
    from fastattn.kernels import tiles
    from fastattn.kernels.launch import Tile

    query, key, value = (torch.randn(1, 2, 37, 16, dtype=torch.float64) for _ in range(3))
    mask = fastattn.masks.Causal()
    with tiles.using("forward", Tile(rows, 16, 4, 1)):
        found = fastattn.attention(query, key, value, mask=mask, backend="triton")
    expected = fastattn.attention(query, key, value, mask=mask, backend="reference")
    torch.testing.assert_close(found, expected)


@interpreted
@pytest.mark.parametrize(("causal", "packed"), [(False, False), (True, False), (True, True)])
def test_a_persistent_grid_changes_no_bit(causal, packed):
    """Eight planes of three blocks among six programs, back and forth."""
    from fastattn.kernels import attention_forward, tiles
    from fastattn.kernels.launch import Tile

    generator = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(96, h, 16, generator=generator).bfloat16() for h in (4, 2, 2))
    mask = fastattn.masks.Causal() if causal else None
    bounds = torch.tensor([0, 43, 96])
    tile = Tile(16, 16, 4, 1)
    assert attention_forward._programs(tile, query.device) == 6

    def found(tile):
        with tiles.using("forward", tile), tiles.using("forward_rich", tile):
            if packed:
                return fastattn.varlen_attention(query, key, value, bounds, bounds, mask=mask, backend="triton")
            entries = (t.view(2, 48, -1, 16).transpose(1, 2) for t in (query, key, value))
            return fastattn.attention(*entries, mask=mask, backend="triton")

    assert torch.equal(found(tile._replace(persistent=True)), found(tile))


@interpreted
def test_whole_tiles_of_packed_keys_come_by_descriptors():
    """The sequences before and behind are NaN, which no tile of another one may fetch."""
    from fastattn.kernels import attention_forward, tiles
    from fastattn.kernels.launch import Tile
    from fastattn.spec.varlen_attention import varlen_call

    generator = torch.Generator().manual_seed(2)
    query, key, value = (torch.randn(70, h, 16, generator=generator).bfloat16() for h in (4, 2, 2))
    own = slice(5, 56)
    for tensor in (query, key, value):
        tensor[:5], tensor[56:] = float("nan"), float("nan")
    bounds, tile = torch.tensor([0, 5, 56, 70]), Tile(16, 16, 4, 1)
    call = varlen_call(query, key, value, bounds, bounds, backend="triton")
    arguments = attention_forward._arguments(call, torch.empty_like(call.query), torch.empty(0), tile, 90)
    assert [argument is not None for argument in arguments[7:11]] == [False, True, True, False]
    for mask in (None, fastattn.masks.Causal()):
        with tiles.using("forward", tile), tiles.using("forward_rich", tile):
            found = fastattn.varlen_attention(query, key, value, bounds, bounds, mask=mask, backend="triton")
        entry = [t[None, own].transpose(1, 2).double() for t in (query, key, value)]
        expected = fastattn.attention(*entry, mask=mask, backend="reference")[0].transpose(0, 1)
        torch.testing.assert_close(found[own].double(), expected, atol=2**-8, rtol=2**-8)
        assert torch.cat((found[:5], found[56:])).isnan().all()


@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_poisoned_rows_are_made_again_by_themselves(dtype):
    """A value that only the last block may see, under a sink: what others get is as if it were not there."""
    from fastattn.kernels import tiles
    from fastattn.kernels.launch import Tile

    generator = torch.Generator().manual_seed(3)
    query, key, value = (torch.randn(1, 2, 50, 16, generator=generator).to(dtype) for _ in range(3))
    sinks = torch.randn(2, generator=generator).to(dtype)
    poisoned = value.clone()
    poisoned[:, :, 37] = float("nan")
    with tiles.using("forward", Tile(32, 32, 4, 1)):
        found = fastattn.attention(
            query, key, poisoned, mask=fastattn.masks.Causal(), sinks=sinks, return_lse=True, backend="triton"
        )
    expected = fastattn.attention(
        *(t.double() for t in (query, key, value)),
        mask=fastattn.masks.Causal(), sinks=sinks.double(), return_lse=True, backend="reference",
    )  # fmt: skip
    near = {"atol": 2**-7, "rtol": 2**-7} if dtype == torch.bfloat16 else {"atol": 1e-6, "rtol": 1e-5}
    torch.testing.assert_close(found[0][:, :, :37].double(), expected[0][:, :, :37], **near)
    assert found[0][:, :, 37:].isnan().all()
    torch.testing.assert_close(found[1].double(), expected[1].double(), **near)
