"""Properties of softmax, norms, feed-forward and the loss over random shapes, strides, masks, dtypes and values."""

from __future__ import annotations

import pytest
import torch
from conftest import ISAS
from hypothesis import given
from hypothesis import strategies as st
from property_tools import DTYPES, assert_close, dims, examples, guarded, laid_out, layouts, lengths

from fastattn.backends import BY_NAME
from fastattn.spec.feed_forward import feed_forward_call
from fastattn.spec.linear import linear_call
from fastattn.spec.linear_cross_entropy import linear_cross_entropy_call
from fastattn.spec.norm import NormBackwardCall, norm_call
from fastattn.spec.softmax import SoftmaxBackwardCall, softmax_call

pytestmark = pytest.mark.skipif(not ISAS, reason="the extension is not built")


@examples
@given(
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from(DTYPES),
    lead=st.integers(1, 40),
    columns=st.one_of(lengths, st.integers(1, 5000)),
    dim=st.sampled_from([3, 3, 3, 0, 2]),
    layout=layouts,
    mask_layout=layouts,
    poison=st.sampled_from([None, "nan", "inf", "-inf"]),
    log=st.booleans(),
    scale=st.sampled_from([1.0, -0.3, 50.0, 1e30]),
    tiny=st.booleans(),
    isa=st.sampled_from(ISAS or [""]),
)
def test_softmax(seed, dtype, lead, columns, dim, layout, mask_layout, poison, log, scale, tiny, isa):
    rng = torch.Generator().manual_seed(seed)
    shape = (2, 1, lead, columns)
    if dtype == torch.float16:  # which holds no larger results
        scale = min(scale, 50.0)
    input = torch.randn(shape, generator=rng).to(dtype)
    if tiny:
        input = input * (torch.finfo(dtype).smallest_normal / 4)
    mask = None
    if poison:
        # Where one batch entry stands for both, what is masked is too.
        mask = laid_out(torch.rand(shape, generator=rng) < 0.5, "shared" if layout == "shared" else mask_layout)
        input = input.masked_fill(~mask, float(poison))
    input = laid_out(input, layout)
    dout = laid_out(torch.randn(shape, generator=rng).to(dtype), layout)

    def run(backend, input, dout):
        call = softmax_call(input, dim, mask=mask, scale=scale, dtype=None, log=log, backend=backend)
        out = BY_NAME[backend].softmax(call)
        return out, BY_NAME[backend].softmax_backward(
            SoftmaxBackwardCall(out, dout, call.mask, dim, scale, input.dtype, log, backend)
        )

    right, right_grad = run("reference", input.double(), dout.double())
    with guarded(isa):
        out, grad = run("cpu", input, dout)
        hidden = right.isneginf()
        assert torch.equal(out.isneginf(), hidden)
        reach = float(right[~hidden].abs().max()) if (~hidden).any() else 0.0
        score = 1.0 + abs(scale) * 5.0
        assert_close(out[~hidden], right[~hidden], max(reach, 1e-3) * score, dtype, "out")
        total = 8.0 * abs(scale) * (shape[dim] if log else 1.0)
        assert_close(grad, right_grad, score * total, dtype, "dinput")


@examples
@given(
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from(DTYPES),
    lead=st.integers(1, 40),
    columns=st.one_of(lengths, st.integers(2, 3000)),
    layout=layouts,
    dout_layout=layouts,
    rms=st.booleans(),
    residual=st.booleans(),
    affine=st.booleans(),
    needed=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    magnitude=st.sampled_from([1.0, 1.0, 1e-3, 1e3]),
    isa=st.sampled_from(ISAS or [""]),
)
def test_norm(seed, dtype, lead, columns, layout, dout_layout, rms, residual, affine, needed, magnitude, isa):
    rng = torch.Generator().manual_seed(seed)

    def randn(*size):
        return torch.randn(size, generator=rng).to(dtype)

    input = laid_out(randn(2, 1, lead, columns) * magnitude, layout)
    other = laid_out(randn(2, 1, lead, columns) * magnitude, dout_layout) if residual else None
    parameters = randn(columns), None if rms else randn(columns)
    if affine:
        parameters = [None if p is None else laid_out(p[None, None, None], layout)[0, 0, 0] for p in parameters]
    weight, bias = parameters if affine else (None, None)
    dout, dtotal = (laid_out(randn(2, 1, lead, columns), dout_layout) for _ in range(2))
    dtotal = dtotal if residual else None
    eps = 1e-2 * magnitude**2

    def wide(tensor):
        return None if tensor is None else tensor.double()

    def run(backend, input, weight, bias, other, dout, dtotal):
        kernels = BY_NAME[backend]
        call = norm_call(input, weight, bias, residual=other, eps=eps, rms=rms, backend=backend)
        out, total, mean, rstd = kernels.norm(call)
        normed = total if residual else call.input
        wanted = [needed[0], needed[1] and weight is not None, needed[2] and bias is not None]
        call = NormBackwardCall(
            normed, call.weight, call.bias, mean, rstd, dout, dtotal, call.num_dims, eps, rms, wanted, backend
        )
        return call, [out, total, *kernels.norm_backward(call)]

    tensors = (input, weight, bias, other, dout, dtotal)
    _, right = run("reference", *map(wide, tensors))
    with guarded(isa):
        call, found = run("cpu", *tensors)
        if residual:  # the backward starts from the rounded sum
            call = call._replace(**{f: wide(getattr(call, f)) for f in ("input", "weight", "bias", "dout", "dtotal")})
            right[2:] = BY_NAME["reference"].norm_backward(call)
        # A row's mean cancels, and the smallest rstd divides what is left.
        assert_close(found[0], right[0], 60.0, dtype, "out")
        if residual:
            assert_close(found[1], right[1], 10.0 * magnitude, dtype, "total")
        rows = 2.0 * lead
        scales = (60.0 * (1.0 + 10.0 / magnitude), 60.0 * rows, 10.0 * rows)
        for name, grad, expected, scale in zip(
            ("dinput", "dweight", "dbias"), found[2:], right[2:], scales, strict=True
        ):
            assert (grad is None) == (expected is None), name
            if grad is not None:
                assert_close(grad, expected, scale, dtype, name)


@examples
@given(
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from(DTYPES[:3]),
    tokens=lengths,
    model_dim=dims,
    ff_dim=lengths,
    out_dim=dims,
    layout=layouts,
    weight_layout=layouts,
    tiny=st.booleans(),
    wanted=st.lists(st.booleans(), min_size=7, max_size=7),
    activation=st.sampled_from(["relu", "gelu", "gelu_tanh", "silu"]),
    gated=st.booleans(),
    biased=st.booleans(),
    dropout_p=st.sampled_from([0.0, 0.0, 0.4]),
    isa=st.sampled_from(ISAS or [""]),
)
def test_feed_forward(
    seed,
    dtype,
    tokens,
    model_dim,
    ff_dim,
    out_dim,
    layout,
    weight_layout,
    tiny,
    wanted,
    activation,
    gated,
    biased,
    dropout_p,
    isa,
):
    rng = torch.Generator().manual_seed(seed)

    def randn(*size):
        return torch.randn(size, generator=rng).to(dtype)

    input = laid_out(randn(2, 1, tokens, model_dim) * (torch.finfo(dtype).smallest_normal / 2 if tiny else 1.0), layout)
    # As large as keeps every sum near 1.
    weight_in, weight_out = randn(ff_dim, model_dim) / model_dim**0.5, randn(out_dim, ff_dim) / ff_dim**0.5
    weight_in, weight_out = (laid_out(w[None, None], weight_layout)[0, 0] for w in (weight_in, weight_out))
    tensors = {
        "input": input,
        "weight_in": weight_in,
        "bias_in": randn(ff_dim) if biased else None,
        "weight_out": weight_out,
        "bias_out": randn(out_dim) if biased else None,
        "weight_gate": randn(ff_dim, model_dim) / model_dim**0.5 if gated else None,
        "bias_gate": randn(ff_dim) if biased and gated else None,
    }
    dout = laid_out(randn(2, 1, tokens, out_dim), layout)

    def run(backend, tensors, dout):
        options = {"activation": activation, "dropout_p": dropout_p, "backend": backend}
        call = feed_forward_call(**tensors, generator=torch.Generator().manual_seed(3), **options)
        needed = [tensors[n] is not None for n in ("input", "weight_in", "bias_in", "weight_gate", "bias_gate")]
        needed += [True, tensors["bias_out"] is not None]
        needed = [want and there for want, there in zip(wanted, needed, strict=True)]
        kernels = BY_NAME[backend]
        return kernels.feed_forward(call), *kernels.feed_forward_backward(call, dout, needed)

    right = run("reference", {n: None if t is None else t.double() for n, t in tensors.items()}, dout.double())
    with guarded(isa):
        found = run("cpu", tensors, dout)
        for k, (one, expected) in enumerate(zip(found, right, strict=True)):
            assert (one is None) == (expected is None)
            if one is not None:
                terms = 2 * tokens if k > 1 else 1
                scale = 8.0 * max(1.0, float(expected.abs().max())) * terms**0.5
                assert_close(one, expected, scale, dtype, f"result {k}")


@examples
@given(
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from(DTYPES),
    tokens=lengths,
    model_dim=dims,
    vocab_size=st.one_of(lengths, st.integers(1, 6000)),
    layout=layouts,
    biased=st.booleans(),
    ignored=st.sampled_from([0.0, 0.3, 1.0]),
    poison=st.sampled_from([None, "nan", "inf"]),
    smoothing=st.sampled_from([0.0, 0.0, 0.1]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    magnitude=st.sampled_from([1.0, 1.0, 1e-30, 1e4]),
    isa=st.sampled_from(ISAS or [""]),
)
def test_linear_cross_entropy(
    seed, dtype, tokens, model_dim, vocab_size, layout, biased, ignored, poison, smoothing, reduction, magnitude, isa
):
    """Whatever the hidden states of ignored tokens hold."""
    rng = torch.Generator().manual_seed(seed)

    def randn(*size):
        return torch.randn(size, generator=rng).to(dtype)

    magnitude = min(magnitude, 10.0) if dtype == torch.float16 else magnitude
    hidden = randn(1, 1, tokens, model_dim) * magnitude
    skipped = torch.rand(1, 1, tokens, generator=rng) < ignored
    if poison:
        hidden = hidden.masked_fill(skipped[..., None], float(poison))
    target = torch.randint(0, vocab_size, (1, 1, tokens), generator=rng).masked_fill(skipped, -100)
    tensors = {
        "hidden": laid_out(hidden, layout),
        "weight": laid_out((randn(vocab_size, model_dim) / model_dim**0.5)[None, None], layout)[0, 0],
        "bias": randn(vocab_size) if biased else None,
    }
    dloss = randn(*(target.shape if reduction == "none" else ())).to(torch.promote_types(dtype, torch.float32))

    def run(backend, tensors, dloss):
        options = {"ignore_index": -100, "label_smoothing": smoothing, "reduction": reduction, "backend": backend}
        call = linear_cross_entropy_call(**tensors, target=target, **options)
        loss, lse = BY_NAME[backend].linear_cross_entropy(call)
        return loss, lse, *BY_NAME[backend].linear_cross_entropy_backward(call, lse, dloss, [True, True, biased])

    right = run("reference", {n: None if t is None else t.double() for n, t in tensors.items()}, dloss.double())
    with guarded(isa):
        found = run("cpu", tensors, dloss)
        # PyTorch's products round where ours would not: to the inputs' precision, at the size of the logits.
        score = 1.0 + 10.0 * magnitude
        counted = float((target >= 0).sum())
        grad = 8.0 * float(dloss.abs().max()) / (max(counted, 1.0) if reduction == "mean" else 1.0)
        total = score * max(counted, 1.0) if reduction == "sum" else score
        weights = max(float(tensors["weight"].abs().max()), 1.0) * vocab_size**0.5
        scales = (
            total * 8.0,
            score * 8.0,
            grad * score * weights,
            grad * score * score * counted,
            grad * score * counted,
        )
        for name, one, expected, scale in zip(
            ("loss", "lse", "dhidden", "dweight", "dbias"), found, right, scales, strict=True
        ):
            assert (one is None) == (expected is None), name
            if one is not None:
                assert_close(one, expected, scale, dtype, name)


@examples
@given(
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from(DTYPES),
    tokens=lengths,
    in_dim=lengths,
    part_dim=lengths,
    parts=st.integers(1, 3),
    layout=layouts,
    weight_layout=layouts,
    biased=st.booleans(),
    needed=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    magnitude=st.sampled_from([1.0, 1.0, 1.0, "tiny", "huge"]),
    isa=st.sampled_from(ISAS or [""]),
)
def test_linear(seed, dtype, tokens, in_dim, part_dim, parts, layout, weight_layout, biased, needed, magnitude, isa):
    rng = torch.Generator().manual_seed(seed)

    def randn(*size):
        return torch.randn(size, generator=rng).to(dtype)

    # Sums of the largest must not overflow.
    factor = {"tiny": torch.finfo(dtype).smallest_normal / 2, "huge": torch.finfo(dtype).max / 2**12}.get(
        magnitude, 1.0
    )
    tensors = (
        laid_out(randn(2, 1, tokens, in_dim) * factor, layout),
        laid_out((randn(parts * part_dim, in_dim) / in_dim**0.5)[None, None], weight_layout)[0, 0],
        randn(parts * part_dim) if biased else None,
    )
    douts = [laid_out(randn(2, 1, tokens, part_dim) / tokens, layout) for _ in range(parts)]

    def run(backend, tensors, douts):
        call = linear_call(*tensors, parts=parts, backend=backend)
        kernels = BY_NAME[backend]
        wanted = [*needed[:2], needed[2] and biased]
        return [*kernels.linear(call), *kernels.linear_backward(call, douts, wanted)]

    right = run("reference", [None if t is None else t.double() for t in tensors], [d.double() for d in douts])
    with guarded(isa):
        for k, (one, expected) in enumerate(zip(run("cpu", tensors, douts), right, strict=True)):
            assert (one is None) == (expected is None), k
            if one is not None:
                of_input = k < parts or k == parts + 1  # the results and the weight's gradient
                size = max(factor if of_input else 0.0, 1.0 if k != parts + 1 and (biased or k >= parts) else 0.0)
                assert_close(one, expected, 40.0 * size, dtype, f"result {k}")
