"""Embedding with scale, positions and dropout: every backend and instruction set against float64."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import TRITON, backend_or_triton
from exactness import assert_as_exact_as_eager

import fastattn
from fastattn.reference.embedding import sinusoids
from fastattn.reference.philox import keep_mask
from fastattn.spec.checks import draw_dropout_state
from fastattn.spec.embedding import embedding_call
from fastattn.tools import eager

backend = backend_or_triton
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
VOCABULARY, POSITIONS = 23, 40


def ids_of(*shape, seed=0):
    """Ids of which some come often and some never."""
    ids = torch.randint(VOCABULARY - 3, shape, generator=torch.Generator().manual_seed(seed))
    return torch.where(ids < 8, 5, ids)


def tables(columns, dtype, table_dtype=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(VOCABULARY, columns, generator=generator, dtype=torch.float64)
    table = torch.randn(POSITIONS, columns, generator=generator, dtype=torch.float64)
    return {"weight": weight.to(dtype), "position_table": table.to(table_dtype or dtype)}


def run(function, tensors, ids, **options):
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    out = function(ids, **leaves, **options)
    direction = torch.linspace(-1, 1, out.numel()).sin().view(out.shape).to(out.dtype)
    grads = torch.autograd.grad(out, list(leaves.values()), direction)
    return {"out": out.detach()} | {f"d{name}": g for name, g in zip(leaves, grads, strict=True)}


def check(tensors, ids, backend, dropout_p=0.0, **options):
    dropout, keep = {}, None
    if dropout_p:
        state = draw_dropout_state(dropout_p, torch.Generator().manual_seed(7), torch.device("cpu"))
        columns = tensors["weight"].shape[1]
        keep = keep_mask(state, dropout_p, 1, ids.numel(), columns).view(*ids.shape, columns)
        dropout = {"dropout_p": dropout_p, "generator": torch.Generator().manual_seed(7)}
    found = run(fastattn.embedding, tensors, ids, backend=backend, **dropout, **options)
    exact = run(
        eager.embedding, {n: t.double() for n, t in tensors.items()}, ids, keep=keep, dropout_p=dropout_p, **options
    )
    of_eager = run(eager.embedding, tensors, ids, keep=keep, dropout_p=dropout_p, **options)
    assert_as_exact_as_eager(found, exact, of_eager)
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "columns"), [((2, 9), 20), ((33,), 7), ((3, 1), 64), ((2, 2, 5), 130)])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_values_and_gradients_are_as_exact_as_eager(backend, dtype, shape, columns, dropout_p):
    check(tables(columns, dtype), ids_of(*shape), backend, dropout_p, scale=math.sqrt(columns), offset=3)


def test_many_tokens_of_a_row(backend):
    """More than a task or a tile of either kernel adds at once, of the most frequent id and of each position."""
    check(tables(20, torch.float32), ids_of(30, 11), backend, 0.1, scale=2.0)


@pytest.mark.parametrize("table_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_table_of_another_precision(backend, dtype, table_dtype):
    tensors, ids = tables(33, dtype, table_dtype), ids_of(3, 6)
    found = run(fastattn.embedding, tensors, ids, backend=backend)
    exact = run(eager.embedding, {name: t.double() for name, t in tensors.items()}, ids)
    of_eager = run(eager.embedding, tensors, ids)
    assert found["dposition_table"].dtype == table_dtype
    assert_as_exact_as_eager(found, exact, of_eager)


@pytest.mark.parametrize("lead", [(), (1,), (4,)])
def test_positions_one_by_one(backend, lead):
    positions = torch.randint(POSITIONS, (*lead, 6), generator=torch.Generator().manual_seed(1))
    check(tables(12, torch.float32), ids_of(4, 6), backend, 0.2, positions=positions)
    same = fastattn.embedding(ids_of(4, 6), **tables(12, torch.float32), positions=torch.arange(6), backend=backend)
    assert torch.equal(same, fastattn.embedding(ids_of(4, 6), **tables(12, torch.float32), backend=backend))


def test_without_positions(backend):
    weight, ids = tables(12, torch.float32)["weight"], ids_of(4, 6)
    leaf = weight.clone().requires_grad_()
    out = fastattn.embedding(ids, leaf, backend=backend)
    assert torch.equal(out, weight[ids])
    (grad,) = torch.autograd.grad(out.sum(), leaf)
    torch.testing.assert_close(grad[:, 0], torch.bincount(ids.view(-1), minlength=VOCABULARY).float())


def test_sinusoids(backend):
    """As float64 has them, added unrounded, also in half precision."""
    weight, ids = tables(14, torch.bfloat16)["weight"], ids_of(2, 5)
    rows = sinusoids(torch.arange(700, 705), 14)
    expected = (weight.double()[ids] * 3 + rows).bfloat16()
    given = {"position_table": "sinusoidal", "scale": 3.0, "backend": backend}
    assert torch.equal(fastattn.embedding(ids, weight, offset=700, **given), expected)
    positions = torch.arange(700, 705)
    assert torch.equal(fastattn.embedding(ids, weight, positions=positions, **given), expected)
    assert torch.equal(fastattn.embedding(ids, weight, positions=positions.expand(2, 5), **given), expected)


@pytest.mark.parametrize("padding_idx", [5, -3, None])
def test_padding_gets_no_gradient(backend, padding_idx):
    tensors, ids = tables(12, torch.float32), ids_of(4, 6)
    check(tensors, ids, backend, padding_idx=padding_idx)


def test_only_some_gradients(backend):
    tensors, ids = tables(12, torch.float32), ids_of(4, 6)
    full = run(fastattn.embedding, tensors, ids, backend=backend)
    for wanted in tensors:
        leaf = tensors[wanted].clone().requires_grad_()
        out = fastattn.embedding(ids, **(tensors | {wanted: leaf}), backend=backend)
        (grad,) = torch.autograd.grad(out, leaf, torch.linspace(-1, 1, out.numel()).sin().view(out.shape))
        assert torch.equal(grad, full[f"d{wanted}"])


def test_strides_and_whole_numbers(backend):
    tensors, ids = tables(12, torch.float32), ids_of(6, 4)
    expected = fastattn.embedding(ids.t(), **tensors, backend=backend)
    assert torch.equal(fastattn.embedding(ids.t().contiguous().int(), **tensors, backend=backend), expected)
    wide = {name: torch.cat((t, t), dim=1)[:, :12] for name, t in tensors.items()}
    assert torch.equal(fastattn.embedding(ids.t(), **wide, backend=backend), expected)
    turned = {name: t.t().contiguous().t() for name, t in tensors.items()}
    assert torch.equal(fastattn.embedding(ids.t(), **turned, backend=backend), expected)


@pytest.mark.parametrize("bad", [-1, VOCABULARY, 2**40, -(2**40)])
def test_ids_without_a_row(backend, bad):
    tensors, ids = tables(12, torch.float32), ids_of(4, 6)
    good = fastattn.embedding(ids, **tensors, backend=backend)
    ids[2, 3] = bad
    if backend == "triton":
        found = run(fastattn.embedding, tensors, ids, backend="triton")
        assert found["out"][2, 3].isnan().all()
        found["out"][2, 3] = good[2, 3]
        assert torch.equal(found["out"], good)
        assert found["dweight"].isfinite().all()
        return
    with pytest.raises(IndexError):
        fastattn.embedding(ids, **tensors, backend=backend)
    ids[2, 3] = 0
    with pytest.raises(IndexError):
        fastattn.embedding(
            ids, **tensors, positions=torch.full((6,), bad if bad < 0 else bad + POSITIONS), backend=backend
        )


def test_an_id_without_a_row_is_named():
    with pytest.raises(IndexError, match=r"ids must be in \[0, 3\), got 7"):
        fastattn.embedding(torch.tensor([1, 7]), torch.ones(3, 2), backend="cpu")
    with pytest.raises(IndexError, match=r"positions must be in \[0, 4\), got -2"):
        fastattn.embedding(
            torch.tensor([1, 1]),
            torch.ones(3, 2),
            position_table=torch.ones(4, 2),
            positions=torch.tensor([0, -2]),
            backend="cpu",
        )


def test_nan_stays_in_its_row(backend):
    tensors, ids = tables(12, torch.float32), torch.tensor([[1, 2], [3, 2]])
    clean = fastattn.embedding(ids, **tensors, backend=backend)
    tensors["weight"][3, 4] = float("nan")
    tensors["weight"][9] = float("nan")
    found = fastattn.embedding(ids, **tensors, backend=backend)
    assert found[1, 0, 4].isnan()
    found[1, 0, 4] = clean[1, 0, 4]
    assert torch.equal(found, clean)


def test_derivatives_of_every_kind():
    tensors, ids = tables(3, torch.float64), torch.tensor([[1, 2, 1], [4, 2, 5]])
    leaves = [t[:6].clone().requires_grad_() for t in tensors.values()]

    # Of column 0, which holds the padding, finite differences know nothing.
    def function(weight, table):
        return fastattn.embedding(
            ids,
            weight,
            position_table=table,
            scale=1.5,
            padding_idx=4,
            dropout_p=0.3,
            generator=torch.Generator().manual_seed(3),
        )

    assert torch.autograd.gradcheck(lambda w, t: function(w, t)[:, 1:], leaves)
    assert torch.autograd.gradgradcheck(lambda w, t: function(w, t)[:, 1:].square(), leaves)


@pytest.mark.filterwarnings("ignore::fastattn.FallbackWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_forward_mode_and_vmap():
    tensors, ids = tables(5, torch.float64), ids_of(3, 4)
    weight, table = tensors.values()
    _, found = torch.func.jvp(
        lambda w: fastattn.embedding(ids, w, position_table=table, scale=2.0), (weight,), (weight.sin(),)
    )
    torch.testing.assert_close(found, fastattn.embedding(ids, weight.sin(), scale=2.0))
    found = torch.vmap(lambda w: fastattn.embedding(ids, w, position_table=table))(torch.stack((weight, -weight)))
    torch.testing.assert_close(found[1], fastattn.embedding(ids, -weight, position_table=table))


@pytest.mark.parametrize("threads", [1, 2])
def test_bits_do_not_depend_on_threads(threads):
    tensors, ids = tables(300, torch.float32), ids_of(40, 40)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        found = run(fastattn.embedding, tensors, ids)
        torch.set_num_threads(3 - threads)
        again = run(fastattn.embedding, tensors, ids)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[name], again[name]) for name in found)


def test_results_that_are_streamed():
    """A result and a gradient of 16 MiB and more are written past the caches: the same bits as in parts."""
    columns = 192
    weight = torch.randn(23000, columns, generator=torch.Generator().manual_seed(0)).requires_grad_()
    ids = torch.randint(20000, (5000, 5), generator=torch.Generator().manual_seed(1))
    table = torch.randn(5, columns)
    out = fastattn.embedding(ids, weight, position_table=table, scale=2.0)
    torch.testing.assert_close(out[4321], torch.addcmul(table, weight[ids[4321]], torch.tensor(2.0)), rtol=0, atol=1e-6)
    (grad,) = torch.autograd.grad(out, weight, torch.ones_like(out))
    counts = torch.bincount(ids.view(-1), minlength=23000).float()
    assert torch.equal(grad, 2 * counts[:, None].expand_as(grad))


@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0)])
def test_empty(backend, shape):
    tensors, ids = tables(12, torch.float32), torch.zeros(shape, dtype=torch.int64)
    found = run(fastattn.embedding, tensors, ids, backend=backend)
    assert found["out"].shape == (*shape, 12)
    assert not found["dweight"].any()
    assert not found["dposition_table"].any()


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("with_table", [False, True])
def test_opcheck(dropout_p, with_table):
    tensors = {name: t.requires_grad_() for name, t in tables(6, torch.float32).items()}
    call = embedding_call(
        ids_of(2, 3),
        tensors["weight"],
        position_table=tensors["position_table"] if with_table else None,
        positions=None,
        offset=0,
        scale=2.0,
        padding_idx=1,
        dropout_p=dropout_p,
        generator=torch.Generator().manual_seed(0),
        backend="",
    )
    torch.library.opcheck(torch.ops.fastattn.embedding.default, tuple(call))


@pytest.mark.parametrize("position_table", ["learned", "sinusoidal"])
def test_compile_and_export(position_table):
    tensors, ids = tables(12, torch.float32), ids_of(4, 6)
    if position_table == "sinusoidal":
        del tensors["position_table"]

    def function(ids, weight, position_table="sinusoidal"):
        return fastattn.embedding(ids, weight, position_table=position_table, scale=2.0)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    plain = run(function, tensors, ids)
    for name, value in run(compiled, tensors, ids).items():
        assert torch.equal(value, plain[name])

    class Module(torch.nn.Module):
        def forward(self, ids, weight):
            return function(ids, weight)

    exported = torch.export.export(Module(), (ids, tensors["weight"])).module()
    assert torch.equal(exported(ids, tensors["weight"]), function(ids, tensors["weight"]))


@pytest.mark.skipif(not TRITON, reason="needs Triton")
def test_wide_rows_take_several_programs(monkeypatch):
    kernels = pytest.importorskip("fastattn.kernels.embedding")
    monkeypatch.setattr(kernels, "_COLUMNS", 16)
    monkeypatch.setattr(kernels, "_SUM_COLUMNS", 8)
    check(tables(37, torch.float32), ids_of(5, 7), "triton", 0.3, scale=1.5)


IDS, WEIGHT, TABLE = torch.zeros(2, 3, dtype=torch.int64), torch.ones(4, 6), torch.ones(5, 6)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((IDS, WEIGHT[0]), {}, ValueError, r"weight must be \[num_embeddings, model_dim\], got \[6\]"),
        ((IDS.float(), WEIGHT), {}, TypeError, "ids must be int64 or int32, got torch.float32"),
        (([1], WEIGHT), {}, TypeError, "ids must be a tensor, got list"),
        ((IDS[0, 0], WEIGHT), {}, ValueError, "got a scalar"),
        ((IDS, WEIGHT.int()), {}, TypeError, "weight must be float32"),
        ((IDS, WEIGHT), {"offset": 1}, ValueError, "rows of a position_table, which is not given"),
        ((IDS, WEIGHT), {"position_table": TABLE[:, 1:]}, ValueError, r"\[num_positions, model_dim=6\], got \[5, 5\]"),
        ((IDS, WEIGHT), {"position_table": TABLE, "offset": 3}, ValueError, "positions up to 5 asked for.* has 5"),
        ((IDS, WEIGHT), {"position_table": TABLE, "offset": -1}, ValueError, "offset must be non-negative, got -1"),
        ((IDS, WEIGHT), {"position_table": "learned"}, ValueError, "a tensor or 'sinusoidal', got 'learned'"),
        (
            (IDS, WEIGHT),
            {"position_table": TABLE, "positions": IDS[:, :2]},
            ValueError,
            r"positions must be \[seq_len\]",
        ),
        ((IDS, WEIGHT), {"position_table": TABLE, "positions": TABLE}, TypeError, "positions must be int64 or int32"),
        ((IDS, WEIGHT), {"position_table": TABLE, "positions": IDS, "offset": 1}, ValueError, "without an offset"),
        ((IDS, WEIGHT), {"padding_idx": 4}, ValueError, "padding_idx must be within num_embeddings=4, got 4"),
        ((IDS, WEIGHT), {"dropout_p": 1.0}, ValueError, "dropout_p must be in"),
        ((IDS, WEIGHT), {"scale": float("inf")}, ValueError, "scale must be finite"),
    ],
)
def test_wrong_input(arguments, options, error, message):
    with pytest.raises(error, match=message):
        fastattn.embedding(*arguments, **options)
