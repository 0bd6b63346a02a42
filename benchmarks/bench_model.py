"""The base encoder-decoder: greedy generation, and a training step."""

FAMILY = "model"


def cases(row):
    if row.startswith("generate"):
        return [(row, "greedy")]
    return [(row, "train step"), (row, "train step, fused loss")]


def test_model(call, benchmark):
    benchmark(call)
