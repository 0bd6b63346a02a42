"""The tables of attention's tiles, and the search over them."""

from __future__ import annotations

import pytest
import torch
from conftest import TRITON

import fastattn

pytestmark = pytest.mark.skipif(not TRITON, reason="needs Triton")
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


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about Triton's interpreter")
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
