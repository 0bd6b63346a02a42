"""Masks: canonical forms, composition and errors, against masks written out by hand."""

import pytest
import torch

from fastattn.masks import Causal, Dense, KeyLengths, Mask, Segments, Window

BATCH, HEADS, SEQ_Q, SEQ_K = 2, 3, 5, 7
I = torch.arange(SEQ_Q)[:, None]  # noqa: E741
J = torch.arange(SEQ_K)[None, :]
OFFSET = SEQ_K - SEQ_Q
GENERATOR = torch.Generator().manual_seed(3)
IDS_Q = torch.randint(-2, 2, (BATCH, SEQ_Q), generator=GENERATOR)
IDS_K = torch.randint(-2, 2, (BATCH, SEQ_K), generator=GENERATOR)
OTHER_Q = torch.randint(0, 2, (BATCH, SEQ_Q), generator=GENERATOR, dtype=torch.int32)
OTHER_K = torch.randint(0, 2, (BATCH, SEQ_K), generator=GENERATOR, dtype=torch.int32)
DENSE = torch.rand((HEADS, 1, SEQ_K), generator=GENERATOR) < 0.5
LENGTHS = torch.tensor([0, 4])


def equal(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return (q[:, :, None] == k[:, None, :])[:, None]


CASES: dict[str, tuple[Mask, torch.Tensor]] = {
    "causal": (Causal(), J <= I + OFFSET),
    "causal-top-left": (Causal("top_left"), J <= I),
    "window": (Window(2, 1), (I + OFFSET - 2 <= J) & (J <= I + OFFSET + 1)),
    "window-top-left": (Window(1, None, "top_left"), I - 1 <= J),
    "key-lengths": (KeyLengths(LENGTHS), (LENGTHS[:, None] > J)[:, None, None]),
    "segments": (Segments(IDS_Q, IDS_K), equal(IDS_Q, IDS_K)),
    "dense": (Dense(DENSE), DENSE),
}


@pytest.mark.parametrize("name", CASES)
def test_each_mask_is_what_it_says(name):
    mask, expected = CASES[name]
    assert torch.equal(mask.to_dense(BATCH, HEADS, SEQ_Q, SEQ_K), expected.expand(BATCH, HEADS, SEQ_Q, SEQ_K))


@pytest.mark.parametrize("first", CASES)
@pytest.mark.parametrize("second", CASES)
def test_and_is_the_intersection(first, second):
    (a, dense_a), (b, dense_b) = CASES[first], CASES[second]
    shape = (BATCH, HEADS, SEQ_Q, SEQ_K)
    assert torch.equal((a & b).to_dense(*shape), (dense_a & dense_b).expand(shape))


def test_three_segments_and_extreme_ids():
    extreme_q = torch.where(IDS_Q > 0, torch.iinfo(torch.int64).max, torch.iinfo(torch.int64).min)
    extreme_k = torch.where(IDS_K > 0, torch.iinfo(torch.int64).max, torch.iinfo(torch.int64).min)
    mask = Segments(IDS_Q, IDS_K) & Segments(OTHER_Q, OTHER_K) & Segments(extreme_q, extreme_k)
    expected = equal(IDS_Q, IDS_K) & equal(OTHER_Q, OTHER_K) & equal(extreme_q, extreme_k)
    assert torch.equal(mask.to_dense(BATCH, HEADS, SEQ_Q, SEQ_K), expected.expand(BATCH, HEADS, SEQ_Q, SEQ_K))


def test_lengths_are_clamped_before_they_are_narrowed():
    mask = KeyLengths(torch.tensor([-5, 1 << 40]))
    assert mask.to_dense(2, 1, 1, 3).flatten(1).tolist() == [[False] * 3, [True] * 3]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Window(-1, 0), ValueError, "left must be >= 0"),
        (lambda: Causal("middle"), ValueError, "align must be"),
        (lambda: Dense(torch.zeros(2, 2)), TypeError, "must be bool"),
        (lambda: KeyLengths(torch.ones(2)).to_dense(2, 1, 1, 1), TypeError, "int32 or int64, got torch.float32"),
        (lambda: KeyLengths(torch.ones(3).int()).to_dense(2, 1, 1, 1), ValueError, r"shape \[2\], got \[3\]"),
        (lambda: Segments(IDS_Q).to_dense(BATCH, 1, SEQ_Q, SEQ_K), ValueError, r"ids_k must have shape \[2, 7\]"),
        (lambda: Dense(torch.ones(4, 1).bool()).to_dense(1, 1, 5, 7), ValueError, "must broadcast to"),
        (lambda: Mask().to_dense(1, 1, 1, 1), TypeError, "not a concrete mask"),
        (lambda: Causal() & torch.ones(1).bool(), TypeError, "unsupported operand"),
    ],
)
def test_wrong_masks_say_what_was_expected(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_repr_reads_like_the_code():
    assert (
        repr(Causal() & Window(3, None))
        == "Causal(align='bottom_right') & Window(left=3, right=None, align='bottom_right')"
    )
