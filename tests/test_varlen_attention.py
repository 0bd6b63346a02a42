"""Packed sequences, against each sequence by itself."""

import pytest
import torch

import fastattn
from fastattn.biases import Alibi
from fastattn.masks import Causal, KeyLengths, Window

LENGTHS_Q = [3, 0, 5, 1]
LENGTHS_K = [4, 2, 5, 0]


def cumulative(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def packed(seed=0):
    generator = torch.Generator().manual_seed(seed)

    def make(tokens, heads, dim):
        return torch.randn(tokens, heads, dim, generator=generator, dtype=torch.float64).requires_grad_()

    return make(sum(LENGTHS_Q), 4, 8), make(sum(LENGTHS_K), 2, 8), make(sum(LENGTHS_K), 2, 6)


@pytest.mark.parametrize("mask", [None, Causal(), Causal("top_left"), Window(1, 1)], ids=repr)
@pytest.mark.parametrize("bias", [None, Alibi.geometric(4, dtype=torch.float64)], ids=["no-bias", "alibi"])
def test_each_sequence_by_itself(mask, bias):
    q, k, v = packed()
    out, lse = fastattn.varlen_attention(
        q, k, v, cumulative(LENGTHS_Q), cumulative(LENGTHS_K), mask=mask, bias=bias, softcap=4.0, return_lse=True
    )
    expected, expected_lse = [], []
    for a, b, c in zip(q.split(LENGTHS_Q), k.split(LENGTHS_K), v.split(LENGTHS_K), strict=True):
        one = [t.transpose(0, 1)[None] for t in (a, b, c)]
        o, s = fastattn.attention(*one, mask=mask, bias=bias, softcap=4.0, return_lse=True, backend="reference")
        expected.append(o[0].transpose(0, 1))
        expected_lse.append(s[0])
    torch.testing.assert_close(out, torch.cat(expected))
    torch.testing.assert_close(lse, torch.cat(expected_lse, dim=1))
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    for got, want in zip(
        torch.autograd.grad(out, (q, k, v), dout),
        torch.autograd.grad(torch.cat(expected), (q, k, v), dout),
        strict=True,
    ):
        torch.testing.assert_close(got, want)


def test_dropout_differs_between_sequences_and_repeats_with_the_generator():
    q = torch.zeros(16, 1, 4)
    v = torch.eye(8).repeat(2, 1)[:, None]
    bounds = torch.tensor([0, 8, 16])

    def attend():
        return fastattn.varlen_attention(
            q, q, v, bounds, bounds, dropout_p=0.5, generator=torch.Generator().manual_seed(5)
        )

    out = attend()
    assert torch.equal(out, attend())
    assert not torch.equal(out[:8], out[8:])


@pytest.mark.parametrize(
    ("bounds", "options", "error", "message"),
    [
        ([0, 4, 8], {}, ValueError, "end with the number of tokens 9"),
        ([0, 5, 4, 9], {}, ValueError, "never fall"),
        ([1, 9], {}, ValueError, "start with 0"),
        ([9], {}, ValueError, "at least 2 elements"),
        ([0.0, 9.0], {}, TypeError, "int32 or int64"),
        ([0, 9], {"mask": KeyLengths(torch.ones(1).int())}, TypeError, "Causal or Window"),
        ([0, 9], {"bias": torch.zeros(9, 9)}, TypeError, "Alibi or RelativePosition"),
    ],
)
def test_wrong_bounds_and_options(bounds, options, error, message):
    q = torch.randn(9, 1, 4)
    with pytest.raises(error, match=message):
        fastattn.varlen_attention(q, q, q, torch.tensor(bounds), torch.tensor([0, 9]), **options)
