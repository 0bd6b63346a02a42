"""ALiBi and relative-position biases, against their formulas written out."""

import math

import pytest
import torch

import fastattn
from fastattn.biases import Alibi, RelativeBias, RelativePosition


def written_out(bias: RelativeBias, heads: int, seq_q: int, seq_k: int) -> torch.Tensor:
    i, j = torch.arange(seq_q)[:, None], torch.arange(seq_k)[None, :]
    return bias.diagonals(heads, seq_q, seq_k)[:, j - i + seq_q - 1]


@pytest.mark.parametrize(("seq_q", "seq_k"), [(4, 4), (3, 6), (5, 2)])
def test_alibi_is_slope_times_distance_to_the_aligned_key(seq_q, seq_k):
    slopes = torch.tensor([0.5, 0.25], dtype=torch.float64)
    got = written_out(Alibi(slopes), 2, seq_q, seq_k)
    for i in range(seq_q):
        for j in range(seq_k):
            assert torch.equal(got[:, i, j], -slopes * abs(i + seq_k - seq_q - j))


def test_geometric_slopes_are_the_published_ones():
    assert Alibi.geometric(8).slopes.tolist() == [2.0**-h for h in range(1, 9)]
    assert Alibi.geometric(3).slopes.tolist() == [2.0**-4, 2.0**-8, 2.0**-2]


def bucket_by_hand(distance: int, buckets: int, max_distance: int, bidirectional: bool) -> int:
    first = 0
    if bidirectional:
        buckets //= 2
        first = buckets if distance > 0 else 0
        distance = abs(distance)
    else:
        distance = max(-distance, 0)
    exact = buckets // 2
    if distance < exact:
        return first + distance
    spread = math.log(distance / exact) / math.log(max_distance / exact) * (buckets - exact)
    return first + min(exact + int(spread), buckets - 1)


@pytest.mark.parametrize("bidirectional", [True, False])
def test_relative_position_buckets(bidirectional):
    buckets, seq_q, seq_k = 16, 40, 70
    table = torch.arange(buckets, dtype=torch.float64)[:, None]
    got = written_out(RelativePosition(table, bidirectional, max_distance=32), 1, seq_q, seq_k)
    for i in range(0, seq_q, 3):
        for j in range(seq_k):
            distance = j - (i + seq_k - seq_q)
            assert got[0, i, j] == bucket_by_hand(distance, buckets, 32, bidirectional)


@pytest.mark.parametrize("kind", ["alibi", "relative_position"])
def test_gradients_reach_the_parameters(kind):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, n, 4, dtype=torch.float64) for n in (5, 6, 6))
    parameter = torch.rand(2 if kind == "alibi" else (8, 2), dtype=torch.float64, requires_grad=True)

    def attend(p):
        bias = Alibi(p) if kind == "alibi" else RelativePosition(p, max_distance=8)
        return fastattn.attention(q, k, v, bias=bias, backend="reference")

    assert torch.autograd.gradcheck(attend, parameter)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Alibi(torch.ones(2, 2)), "slopes must be a float tensor"),
        (lambda: Alibi(torch.ones(2)).diagonals(3, 4, 4), "expected 3, got 2"),
        (lambda: Alibi.geometric(0), "num_heads must be >= 1"),
        (lambda: RelativePosition(torch.ones(3, 2)), "at least 4 buckets"),
        (lambda: RelativePosition(torch.ones(32, 2), max_distance=8), "max_distance must be above 8"),
        (lambda: RelativePosition(torch.ones(32, 2)).diagonals(3, 4, 4), "expected 3, got 2"),
    ],
)
def test_wrong_biases_say_what_was_expected(make, message):
    with pytest.raises(ValueError, match=message):
        make()
