"""Rotary embedding: every backend and instruction set against float64."""

from __future__ import annotations

import pytest
import torch
from conftest import backend_or_triton
from exactness import assert_as_exact_as_eager

import fastattn
from fastattn.ops import rotary_embedding as op
from fastattn.reference import rotary_embedding as formula
from fastattn.spec.rotary_embedding import RotaryEmbeddingCall
from fastattn.tools import eager

backend = backend_or_triton
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# batch, heads_q, heads_k, seq_len, head_dim, rotary_dim: tails of vectors and tiles, few and many rows, parts rotated.
SHAPES = [
    (2, 4, 2, 7, 16, 16),
    (1, 3, 1, 33, 20, 20),
    (3, 2, 2, 1, 64, 64),
    (2, 1, 1, 70, 12, 6),
    (1, 2, 3, 5, 130, 66),
]


def inputs(shape, dtype, seed=0):
    batch, heads_q, heads_k, seq_len, head_dim, _ = shape
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, heads_q, seq_len, head_dim, generator=generator, dtype=torch.float64)
    key = torch.randn(batch, heads_k, seq_len, head_dim, generator=generator, dtype=torch.float64)
    return {"query": query.to(dtype), "key": key.to(dtype)}


def run(function, tensors, **options):
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    outs = function(leaves["query"], leaves["key"], **options)
    directions = [torch.linspace(-1, 1, o.numel()).sin().view(o.shape).to(o.dtype) for o in outs]
    grads = torch.autograd.grad(outs, list(leaves.values()), directions)
    named = {f"{name}_out": o.detach() for name, o in zip(leaves, outs, strict=True)}
    return named | {f"d{name}": g for name, g in zip(leaves, grads, strict=True)}


def check(tensors, backend, **options):
    found = run(fastattn.rotary_embedding, tensors, backend=backend, **options)
    wide = {name: t.double() for name, t in tensors.items()}
    exact = run(fastattn.rotary_embedding, wide, backend="reference", **options)
    assert_as_exact_as_eager(found, exact, run(eager.rotary_embedding, tensors, **options))
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "neighbours"])
def test_values_and_gradients_are_as_exact_as_eager(backend, shape, dtype, interleaved):
    options = {"interleaved": interleaved, "rotary_dim": shape[-1], "offset": 3}
    found = check(inputs(shape, dtype), backend, **options)
    # What is not rotated is passed on, bit for bit.
    assert torch.equal(found["key_out"][..., shape[-1] :], inputs(shape, dtype)["key"][..., shape[-1] :])


@pytest.mark.parametrize("far", [10**5, 10**6, 2**31 + 5, 2**40, -(10**6)])
def test_angles_at_far_positions(backend, far):
    """As exact as the angle is in float64: 2^-53 of it, besides the rounding of cosine and sine."""
    half = 8
    x = torch.zeros(1, 1, 4, 2 * half)
    x[..., :half] = 1.0
    positions = far + torch.tensor([0, 1, 17, -3])
    out = fastattn.rotary_embedding(x, positions=positions, backend=backend).double()
    angle = positions.double()[:, None] * formula.frequencies(1e4, 2 * half)
    error = torch.maximum((out[0, 0, :, :half] - angle.cos()).abs(), (out[0, 0, :, half:] - angle.sin()).abs())
    assert float(error.max()) < 6.5e-8 + abs(far) * 2.0**-51


def test_every_quarter_of_a_turn(backend):
    """Frequencies of whole parts of a turn: signs and cosines change places where a quarter ends."""
    turn = 2 * torch.pi
    inv_freq = torch.tensor([turn / 8, turn / 4, turn / 2, turn * 0.9999, -turn / 3], dtype=torch.float64)
    x = torch.randn(1, 2, 40, 10, generator=torch.Generator().manual_seed(1))
    found = fastattn.rotary_embedding(x, inv_freq=inv_freq, backend=backend)
    exact = fastattn.rotary_embedding(x.double(), inv_freq=inv_freq, backend="reference")
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=5e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shared", [True, False])
def test_positions_of_a_batch(backend, shared, dtype):
    shape = (3, 2, 1, 9, 8, 8)
    positions = torch.randint(0, 5000, (9,) if shared else (3, 9), generator=torch.Generator().manual_seed(2))
    check(inputs(shape, dtype), backend, positions=positions)
    tensors = inputs(shape, dtype)
    rows = [
        fastattn.rotary_embedding(
            tensors["query"][b, :, i][None, :, None],
            offset=int(positions[i] if shared else positions[b, i]),
            backend=backend,
        )
        for b in range(3)
        for i in range(9)
    ]
    found = fastattn.rotary_embedding(tensors["query"], positions=positions.int(), backend=backend)
    assert torch.equal(found, torch.cat(rows).view(3, 9, 2, 8).transpose(1, 2))


def test_fractions_of_positions(backend):
    """Interpolated positions are frequencies of a longer wavelength."""
    x = inputs(SHAPES[0], torch.float32)["query"]
    found = fastattn.rotary_embedding(x, positions=torch.arange(7) / 4, backend=backend)
    expected = fastattn.rotary_embedding(x, inv_freq=formula.frequencies(1e4, 16) / 4, backend=backend)
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-7)


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "neighbours"])
@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("lead", [(), (1,), (2,)])
def test_tables_of_the_caller(backend, lead, twice, interleaved):
    tensors = inputs((2, 4, 2, 7, 16, 8), torch.bfloat16)
    angle = torch.randn(*lead, 7, 4, generator=torch.Generator().manual_seed(3))
    if twice:
        angle = angle.repeat_interleave(2, dim=-1) if interleaved else torch.cat((angle, angle), dim=-1)
    options = {"cos": angle.cos() * 1.1, "sin": angle.sin() * 1.1, "rotary_dim": 8, "interleaved": interleaved}
    check(tensors, backend, **options)
    half = {"cos": options["cos"].bfloat16(), "sin": options["sin"].bfloat16()}
    check(tensors, backend, **(options | half))


def test_scaled_frequencies(backend):
    """YaRN's kind: other frequencies, and a factor on cosine and sine."""
    inv_freq = formula.frequencies(5e5, 16) / torch.linspace(1, 8, 8)
    check(inputs(SHAPES[0], torch.float32), backend, inv_freq=inv_freq.float(), scale=1.3, offset=1000)


@pytest.mark.parametrize("order", ["bshd", "packed", "expanded", "rows"])
def test_strides(backend, order):
    generator = torch.Generator().manual_seed(4)
    if order == "bshd":
        query = torch.randn(2, 7, 3, 16, generator=generator).transpose(1, 2)
    elif order == "packed":
        query = torch.randn(2, 7, 9 * 16, generator=generator).view(2, 7, 9, 16).transpose(1, 2)[:, 2:5]
    elif order == "expanded":
        query = torch.randn(2, 1, 7, 16, generator=generator).expand(2, 3, 7, 16)
    else:
        query = torch.randn(2, 3, 14, 20, generator=generator)[:, :, ::2, :16]
    found = fastattn.rotary_embedding(query, backend=backend)
    assert torch.equal(found, fastattn.rotary_embedding(query.contiguous(), backend=backend))
    assert found.stride(-1) == 1
    if order == "bshd":
        assert found.stride() == query.stride()


def test_gradients_of_one_of_two(backend):
    tensors = inputs(SHAPES[0], torch.float32)
    full = run(fastattn.rotary_embedding, tensors, backend=backend)
    for name in tensors:
        leaves = tensors | {name: tensors[name].clone().requires_grad_()}
        outs = dict(zip(tensors, fastattn.rotary_embedding(**leaves, backend=backend), strict=True))
        out = outs[name]
        (grad,) = torch.autograd.grad(out, leaves[name], torch.linspace(-1, 1, out.numel()).sin().view(out.shape))
        assert torch.equal(grad, full[f"d{name}"])
        # A gradient of ones, which autograd hands on expanded.
        (grad,) = torch.autograd.grad(fastattn.rotary_embedding(leaves[name], backend=backend).sum(), leaves[name])
        torch.testing.assert_close(grad.square().sum(), torch.tensor(float(grad.numel())))


@pytest.mark.parametrize("interleaved", [False, True])
def test_derivatives_of_every_kind(interleaved):
    query, key = (t.requires_grad_() for t in inputs((1, 2, 1, 3, 6, 4), torch.float64).values())

    def function(q, k):
        return fastattn.rotary_embedding(q, k, rotary_dim=4, interleaved=interleaved, offset=2)

    assert torch.autograd.gradcheck(function, (query, key))
    assert torch.autograd.gradgradcheck(function, (query, key))


@pytest.mark.filterwarnings("ignore::fastattn.FallbackWarning")
def test_gradients_of_frequencies_and_tables():
    x = inputs((1, 1, 1, 3, 6, 6), torch.float64)["query"]
    inv_freq = torch.tensor([1.0, 0.3, 0.1], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda f: fastattn.rotary_embedding(x, inv_freq=f), inv_freq)
    cos, sin = (torch.randn(3, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda c, s: fastattn.rotary_embedding(x, cos=c, sin=s), (cos, sin))


@pytest.mark.filterwarnings("ignore::fastattn.FallbackWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_forward_mode_and_vmap():
    x = inputs((2, 2, 1, 3, 6, 6), torch.float64)["query"]
    _, found = torch.func.jvp(fastattn.rotary_embedding, (x,), (x.sin(),))
    torch.testing.assert_close(found, fastattn.rotary_embedding(x.sin()))
    found = torch.vmap(lambda t: fastattn.rotary_embedding(t, offset=4))(torch.stack((x, 2 * x)))
    torch.testing.assert_close(found[1], 2 * fastattn.rotary_embedding(x, offset=4))


@pytest.mark.parametrize("threads", [1, 2])
def test_bits_do_not_depend_on_threads(threads):
    tensors = inputs((2, 4, 2, 200, 64, 64), torch.float32)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        found = run(fastattn.rotary_embedding, tensors)
        torch.set_num_threads(3 - threads)
        again = run(fastattn.rotary_embedding, tensors)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[name], again[name]) for name in found)


@pytest.mark.parametrize("interleaved", [False, True])
def test_results_that_are_streamed(interleaved):
    """16 MiB and more are written past the caches: the same bits as in parts."""
    x = torch.randn(1, 16, 4200, 64, generator=torch.Generator().manual_seed(5))
    whole = fastattn.rotary_embedding(x, interleaved=interleaved)
    for head in (0, 15):
        assert torch.equal(whole[:, head], fastattn.rotary_embedding(x[:, head, None], interleaved=interleaved)[:, 0])


def test_a_row_with_nan_keeps_it(backend):
    x = torch.randn(1, 1, 4, 16, generator=torch.Generator().manual_seed(6))
    clean = fastattn.rotary_embedding(x, backend=backend)
    x[0, 0, 2, 3] = float("nan")
    found = fastattn.rotary_embedding(x, backend=backend)
    assert found[0, 0, 2, [3, 11]].isnan().all()
    found[0, 0, 2, [3, 11]] = clean[0, 0, 2, [3, 11]]
    assert torch.equal(found, clean)


def test_empty(backend):
    for shape in ((0, 2, 3, 8), (2, 0, 3, 8), (2, 2, 0, 8)):
        x = torch.zeros(shape, requires_grad=True)
        out = fastattn.rotary_embedding(x, backend=backend)
        assert out.shape == shape
        assert torch.autograd.grad(out.sum(), x)[0].shape == shape


@pytest.mark.parametrize("with_key", [False, True])
@pytest.mark.parametrize("tables", [False, True])
def test_opcheck(with_key, tables):
    query, key = (t.requires_grad_() for t in inputs(SHAPES[0], torch.float32).values())
    table = torch.ones(1, 7, 8) if tables else None
    positions = None if tables else torch.arange(7)[None]
    args = (query, key if with_key else None, positions, None, table, table, 1e4, 0, 16, False, 1.0, False, "")
    torch.library.opcheck(torch.ops.fastattn.rotary_embedding.default, args)


def test_compile_and_export():
    tensors = inputs(SHAPES[0], torch.float32)
    positions = torch.arange(7) * 3

    def function(query, key):
        return fastattn.rotary_embedding(query, key, positions)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    plain = run(function, tensors)
    for name, value in run(compiled, tensors).items():
        assert torch.equal(value, plain[name])

    class Module(torch.nn.Module):
        def forward(self, query, key):
            return function(query, key)

    exported = torch.export.export(Module(), tuple(tensors.values())).module()
    assert torch.equal(exported(*tensors.values())[1], plain["key_out"])


def test_few_or_many_heads_share_the_angles_in_triton(monkeypatch):
    """Every number of heads a program takes, groups that end among the queries and among the keys."""
    kernels = pytest.importorskip("fastattn.kernels.rotary_embedding")
    tensors = inputs((2, 5, 3, 3, 8, 8), torch.float32)
    expected = fastattn.rotary_embedding(**tensors, backend="triton")
    for programs in (1, 3, 12):
        monkeypatch.setattr(kernels, "_PROGRAMS", programs)
        found = fastattn.rotary_embedding(**tensors, backend="triton")
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


X = torch.ones(2, 3, 4, 8)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((X[0],), {}, ValueError, r"query must be \[batch, heads, seq_len, head_dim\], got shape \[3, 4, 8\]"),
        ((X, X[:1]), {}, ValueError, "key must have query's batch, seq_len and head_dim"),
        ((X, X.double()), {}, TypeError, "key must have query's dtype torch.float32"),
        ((X.transpose(2, 3),), {}, ValueError, "query must be contiguous in its last dimension"),
        ((X.int(),), {}, TypeError, "query must be float32"),
        ((X,), {"rotary_dim": 3}, ValueError, "rotary_dim must be even, from 2 to head_dim=8, got 3"),
        ((X,), {"rotary_dim": 10}, ValueError, "rotary_dim must be even"),
        ((X[..., :7],), {}, ValueError, "rotary_dim must be even"),
        ((X,), {"base": 0.0}, ValueError, "base must be positive"),
        ((X,), {"offset": -1}, ValueError, "offset must be non-negative, got -1"),
        ((X,), {"cos": torch.ones(4, 8)}, ValueError, "cos and sin come together"),
        ((X,), {"cos": torch.ones(4, 8), "sin": torch.ones(4, 8), "offset": 1}, ValueError, "without positions"),
        ((X,), {"cos": torch.ones(5, 8), "sin": torch.ones(5, 8)}, ValueError, r"cos must be \[seq_len, width\]"),
        ((X, None, torch.arange(3)), {}, ValueError, r"positions must be \[seq_len\] or \[batch, seq_len\]"),
        ((X, None, torch.arange(4)), {"offset": 1}, ValueError, "without an offset"),
        ((X, None, torch.ones(4, dtype=torch.bool)), {}, TypeError, "positions must be int64, int32 or floating"),
        ((X, None, [0, 1, 2, 3]), {}, TypeError, "positions must be a tensor, got list"),
        ((X,), {"inv_freq": torch.ones(3)}, ValueError, r"inv_freq must have shape \[rotary_dim / 2 = 4\]"),
        ((X,), {"scale": float("nan")}, ValueError, "scale must be finite"),
    ],
)
def test_wrong_input(arguments, options, error, message):
    with pytest.raises(error, match=message):
        fastattn.rotary_embedding(*arguments, **options)


def test_the_call_is_an_inverse_of_itself(backend):
    tensors = inputs(SHAPES[1], torch.float32)
    query, key = tensors.values()
    call = RotaryEmbeddingCall(query, key, None, None, None, None, 1e4, 5, 20, False, 1.0, False, backend)
    there = op._rotary_embedding(*call)
    back = op._rotary_embedding(*call._replace(query=there[0], key=there[1], inverse=True))
    torch.testing.assert_close(back, (query, key))
