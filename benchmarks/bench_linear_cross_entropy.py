"""Linear + cross entropy: the loss, and both gradients with it."""

FAMILY = "linear_cross_entropy"


def cases(row):
    return [(row, "forward"), (row, "forward + backward")]


def test_linear_cross_entropy(call, benchmark):
    benchmark(call)
