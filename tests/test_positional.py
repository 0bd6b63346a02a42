"""Positional encodings against their formulas, in float64."""

from __future__ import annotations

import math

import pytest
import torch

from fastattn.nn import LearnedPositionalEncoding, RotaryEmbedding, SinusoidalPositionalEncoding


def sinusoid(position: int, feature: int, model_dim: int) -> float:
    angle = position / 10000.0 ** (2 * (feature // 2) / model_dim)
    return math.sin(angle) if feature % 2 == 0 else math.cos(angle)


@pytest.mark.parametrize("model_dim", [1, 5, 16])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-7), (torch.bfloat16, 4e-3)]
)
def test_sinusoids_follow_the_formula(model_dim, dtype, tolerance):
    # 40 positions of a table made for 8: it must grow.
    encoding = SinusoidalPositionalEncoding(model_dim, max_len=8)
    added = encoding(torch.zeros(2, 37, model_dim, dtype=dtype), offset=3)
    expected = [[sinusoid(3 + p, f, model_dim) for f in range(model_dim)] for p in range(37)]
    assert added.dtype == dtype
    torch.testing.assert_close(added[1].double(), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=tolerance)


def test_sinusoids_of_float64_are_not_those_of_float32():
    far = SinusoidalPositionalEncoding(4)(torch.zeros(1, 1, 4, dtype=torch.float64), offset=100_000)[0, 0]
    expected = torch.tensor([sinusoid(100_000, f, 4) for f in range(4)], dtype=torch.float64)
    torch.testing.assert_close(far, expected, rtol=0, atol=1e-10)


def test_sinusoids_stay_out_of_the_state_and_survive_a_cast():
    encoding = SinusoidalPositionalEncoding(6)
    assert not encoding.state_dict()
    before = encoding(torch.zeros(1, 9, 6))
    assert torch.equal(encoding.half().float()(torch.zeros(1, 9, 6)), before)


def test_learned_adds_its_rows_and_gets_their_gradients():
    encoding = LearnedPositionalEncoding(4, max_len=10)
    x = torch.randn(3, 5, 4)
    out = encoding(x, offset=2)
    torch.testing.assert_close(out, x + encoding.weight[2:7])
    out.sum().backward()
    expected = torch.zeros(10, 4)
    expected[2:7] = 3.0
    torch.testing.assert_close(encoding.weight.grad, expected)
    with pytest.raises(ValueError, match="max_len=10"):
        encoding(x, offset=6)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_is_a_rotation_by_position(interleaved):
    torch.manual_seed(0)
    rotary = RotaryEmbedding(8, interleaved=interleaved)
    x = torch.randn(2, 3, 6, 8, dtype=torch.float64)
    out = rotary(x, offset=4)
    pairs = [(2 * i, 2 * i + 1) if interleaved else (i, i + 4) for i in range(4)]
    for position in range(6):
        for i, (a, b) in enumerate(pairs):
            turned = torch.complex(x[..., position, a], x[..., position, b])
            turned = turned * complex(
                math.cos((4 + position) * 10000 ** (-i / 4)), math.sin((4 + position) * 10000 ** (-i / 4))
            )
            torch.testing.assert_close(out[..., position, a], turned.real)
            torch.testing.assert_close(out[..., position, b], turned.imag)


def test_rotary_scores_depend_on_the_distance_alone():
    torch.manual_seed(1)
    rotary = RotaryEmbedding(16)
    q, k = torch.randn(2, 1, 16, dtype=torch.float64)
    score = [(rotary(q, offset=p + 7) * rotary(k, offset=p)).sum() for p in (0, 5, 1000)]
    torch.testing.assert_close(score[1], score[0])
    torch.testing.assert_close(score[2], score[0])


def test_rotary_positions_may_differ_by_row():
    rotary = RotaryEmbedding(4)
    x = torch.randn(2, 1, 3, 4)
    positions = torch.tensor([[0, 1, 2], [5, 6, 7]])[:, None]
    out = rotary(x, positions=positions)
    torch.testing.assert_close(out[0], rotary(x[0]))
    torch.testing.assert_close(out[1], rotary(x[1], offset=5))


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_gradient_is_the_inverse_rotation(interleaved):
    rotary = RotaryEmbedding(4, interleaved=interleaved)
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(rotary, x)


@pytest.mark.parametrize("make", [SinusoidalPositionalEncoding, LearnedPositionalEncoding, RotaryEmbedding])
def test_bad_input_is_refused(make):
    with pytest.raises(ValueError, match="must be positive, got 0"):
        make(0)
    module = make(4)
    with pytest.raises(ValueError, match=r"\[\.\.\., seq_len, 4\], got shape \(2, 5\)"):
        module(torch.zeros(2, 5))
    with pytest.raises(ValueError, match="offset must be non-negative"):
        module(torch.zeros(2, 4), offset=-1)


def test_rotary_refuses_odd_dimensions_and_other_positions():
    with pytest.raises(ValueError, match="even, got 3"):
        RotaryEmbedding(3)
    with pytest.raises(ValueError, match="seq_len=3"):
        RotaryEmbedding(4)(torch.zeros(3, 4), positions=torch.arange(2))


def test_an_empty_sequence_stays_empty():
    for module in (SinusoidalPositionalEncoding(4), LearnedPositionalEncoding(4), RotaryEmbedding(4)):
        assert module(torch.zeros(2, 0, 4)).shape == (2, 0, 4)
