"""Softmax, log-softmax and the norms, over rows."""

FAMILY = "softmax"


def cases(row):
    ops = ("softmax", "log_softmax", "layer_norm", "rms_norm")
    return [(f"{op} {row}", direction) for op in ops for direction in ("forward", "forward + backward")]


def test_softmax(call, benchmark):
    benchmark(call)
