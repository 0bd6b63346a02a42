"""Attention: the output, and all gradients with it."""

FAMILY = "attention"


def cases(row):
    return [(row, "forward"), (row, "forward + backward")]


def test_attention(call, benchmark):
    benchmark(call)
