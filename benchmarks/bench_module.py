"""nn.MultiheadAttention as called by default: evaluation, a forward in training, a training step."""

FAMILY = "module"


def cases(row):
    return [(row, "eval"), (row, "train"), (row, "train step")]


def test_module(call, benchmark):
    benchmark(call)
