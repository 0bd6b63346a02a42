"""Decode: one query against a cache."""

FAMILY = "decode"


def cases(row):
    return [(row, "forward")]


def test_decode(call, benchmark):
    benchmark(call)
