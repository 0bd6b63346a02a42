"""Feed-forward: the output, and all gradients with it."""

FAMILY = "feed_forward"


def cases(row):
    return [(row, "forward"), (row, "forward + backward")]


def test_feed_forward(call, benchmark):
    benchmark(call)
