"""The C++ attention kernels against the float64 formula, on every instruction set of this machine."""

from __future__ import annotations

import random
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest
import torch
from exactness import assert_as_exact_as_eager

from fastattn import masks
from fastattn.backends.cpu import CpuBackend
from fastattn.biases import Alibi
from fastattn.reference import attention as formula
from fastattn.reference.attention_weights import attention_weights
from fastattn.reference.philox import keep_mask
from fastattn.spec.attention import attention_call, lse_dtype
from fastattn.spec.attention_weights import weights_call

kernels = pytest.importorskip("fastattn._cpu")
backend = CpuBackend()
FLOATS = ("query", "key", "value", "bias", "relative_bias", "sinks")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.fixture(params=kernels.available_isas())
def isa(request):
    before = kernels.isa()
    kernels.set_isa(request.param)
    yield request.param
    kernels.set_isa(before)


def make_call(query, key, value, **options):
    defaults = dict.fromkeys(("mask", "bias", "softmax_scale", "softcap", "sinks", "generator"))
    return attention_call(query, key, value, **{**defaults, "dropout_p": 0.0, "backend": "cpu", **options})


def weights_of(call, lse, reduce="none"):
    return backend.attention_weights(weights_call(call, lse, reduce, None, 1))[0]


def in_float64(call):
    return call._replace(**{f: getattr(call, f).double() for f in FLOATS if getattr(call, f) is not None})


def random_call(seed):
    """A call with any combination of shape, layout, dtype and feature."""
    pick = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    dtype = DTYPES[seed % 4]
    batch, heads_kv, group = pick.choice([1, 2]), pick.choice([1, 2]), pick.choice([1, 2, 3])
    heads = heads_kv * group
    rows, columns = pick.choice([1, 3, 64, 100, 130]), pick.choice([1, 5, 64, 100, 257, 520])
    dim, dim_v = pick.choice([1, 3, 16, 40, 64, 72, 128]), pick.choice([1, 16, 24, 64, 65, 130])

    def tensor(*shape, dtype=dtype):
        return torch.randn(shape, generator=generator).to(dtype)

    def flip(probability):
        return pick.random() < probability

    def heads_first(heads, rows, dim):
        return tensor(batch, rows, heads, dim).transpose(1, 2) if flip(0.5) else tensor(batch, heads, rows, dim)

    mask = masks.Window(None, None)
    if flip(0.4):
        mask = mask & masks.Window(
            pick.choice([None, 0, 70]), pick.choice([0, 5]), pick.choice(["bottom_right", "top_left"])
        )
    if flip(0.4):
        mask = mask & masks.KeyLengths(
            torch.tensor([pick.choice([0, 1, columns // 2, columns + 5]) for _ in range(batch)])
        )
    if flip(0.3):
        ids = torch.randint(0, 3, (batch, rows), generator=generator).sort(dim=1)[0]
        mask = mask & masks.Segments(ids.int(), torch.randint(0, 3, (batch, columns), generator=generator).int())
    if flip(0.4):
        shape = (pick.choice([1, batch]), pick.choice([1, heads]), pick.choice([1, rows]), pick.choice([1, columns]))
        mask = mask & masks.Dense(torch.rand(shape, generator=generator) < 0.7)
    bias = None
    if flip(0.4):
        shape = (pick.choice([1, batch]), pick.choice([1, heads]), pick.choice([1, columns]), pick.choice([1, rows]))
        bias = tensor(*shape, dtype=pick.choice(DTYPES)).transpose(2, 3)  # no contiguous row
        bias = bias if flip(0.5) else bias.contiguous()
    elif flip(0.3):
        bias = Alibi(torch.rand(heads, generator=generator))
    return make_call(
        heads_first(heads, rows, dim),
        heads_first(heads_kv, columns, dim),
        heads_first(heads_kv, columns, dim_v),
        mask=mask,
        bias=bias,
        dropout_p=pick.choice([0.0, 0.0, 0.3]),
        softmax_scale=pick.choice([None, None, 0.05, -0.1, 0.0]),
        softcap=pick.choice([None, None, 2.0]),
        sinks=tensor(heads, dtype=pick.choice(DTYPES)) if flip(0.3) else None,
        generator=generator,
    )


@cache
def expected(seed):
    """The call of ``seed``, its results in float64 and those of the formula in the call's own dtype."""
    call = random_call(seed)
    exact, eager = results(in_float64(call)), results(call)
    return call, exact, {name: tensor.to(call.query.dtype) for name, tensor in eager.items()}


def results(call):
    out, lse = formula.attention(call)
    weights = attention_weights(call, lse)
    return {"out": out, "lse": lse, "weights": weights, "mean": weights.mean(dim=1)}


@pytest.mark.parametrize("seed", range(24))
def test_forward_and_weights_as_exact_as_eager(isa, seed):
    call, exact, eager = expected(seed)
    out, lse = backend.attention(call)
    empty = exact["lse"].isneginf()
    assert torch.equal(lse.isneginf(), empty)
    found = {
        "out": out,
        "lse": lse.to(lse_dtype(call.query.dtype)),
        "weights": weights_of(call, lse),
        "mean": weights_of(call, lse, "head_mean"),
    }
    found, exact, eager = ({**r, "lse": r["lse"].masked_fill(empty, 0.0)} for r in (found, exact, eager))
    assert_as_exact_as_eager(found, exact, eager)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["key", "value", "bias", "query"])
def test_masked_poison_does_not_exist_and_visible_poison_spreads(isa, where, bad):
    generator = torch.Generator().manual_seed(7)
    tensors = {
        "query": torch.randn(2, 4, 70, 33, generator=generator),
        "key": torch.randn(2, 2, 300, 33, generator=generator),
        "value": torch.randn(2, 2, 300, 40, generator=generator),
        "bias": torch.randn(2, 4, 70, 300, generator=generator),
    }
    if where == "query":
        tensors["query"][:, :, 5, 0] = bad
    elif where == "bias":
        tensors["bias"][:, :, :, [3, 150, 299]] = bad
    else:
        tensors[where][:, :, [3, 150, 299]] = bad
    dense = torch.rand(2, 1, 70, 300, generator=generator) < 0.5
    mask = masks.Causal() & masks.Dense(dense) & masks.KeyLengths(torch.tensor([299, 160]))
    bias = tensors.pop("bias")
    call = make_call(**tensors, mask=mask, bias=bias if where == "bias" else None)
    out, lse = backend.attention(call)
    exact_out, exact_lse = formula.attention(in_float64(call))
    assert exact_out.isfinite().any()
    assert exact_out.isfinite().all() == (where == "bias" and bad == float("-inf"))
    torch.testing.assert_close(out.double(), exact_out, rtol=1e-4, atol=1e-4, equal_nan=True)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("scale", [1e4, 1e30])
def test_huge_scores(isa, scale):
    generator = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(1, 2, n, 16, generator=generator) for n in (7, 300, 300))
    call = make_call(query, key, value, softmax_scale=scale)
    torch.testing.assert_close(
        backend.attention(call)[0].double(), formula.attention(in_float64(call))[0], rtol=1e-2, atol=1e-2
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "group"), [(1, 1), (1, 7), (3, 4)])
def test_few_queries_against_a_long_cache(isa, rows, group, dtype):
    """The decode kernel: pieces of 512 keys, one of them wholly masked, and poison behind the mask."""
    generator = torch.Generator().manual_seed(4)
    query = torch.randn(2, 2 * group, rows, 40, generator=generator).to(dtype)
    key, value = (torch.randn(2, 2, 1300, d, generator=generator).to(dtype) for d in (40, 72))
    lengths = torch.tensor([1300, 400])
    value[1, :, 400:] = float("nan")
    key[1, :, 400:] = float("nan")
    call = make_call(query, key, value, mask=masks.KeyLengths(lengths) & masks.Causal())
    found, exact, eager = (
        {"out": out, "lse": lse.to(lse_dtype(c.query.dtype))}
        for c, (out, lse) in (
            (call, backend.attention(call)),
            (in_float64(call), formula.attention(in_float64(call))),
            (call, formula.attention(call)),
        )
    )
    assert_as_exact_as_eager(found, exact, eager)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_query_of_the_decode_kernel_does_not_see_those_beside_it(isa, dtype):
    """Seven heads share a key head, in blocks of 4, 2 and 1: each gets the bits that it gets alone."""
    generator = torch.Generator().manual_seed(5)
    query, key, value = (
        torch.randn(1, *shape, generator=generator).to(dtype) for shape in ((7, 1, 136), (1, 777, 136), (1, 777, 200))
    )
    call = make_call(query, key, value)
    out, lse = backend.attention(call)
    for head in range(7):
        alone = backend.attention(make_call(query[:, head : head + 1], key, value))
        assert torch.equal(out[:, head], alone[0][:, 0])
        assert torch.equal(lse[:, head], alone[1][:, 0])
    exact, eager = ({"out": formula.attention(c)[0]} for c in (in_float64(call), call))
    assert_as_exact_as_eager({"out": out}, exact, eager)


def test_dropout_mask_is_the_reference_generator(isa):
    state = torch.tensor([0x123456789ABCDEF, 77])
    keep = torch.empty(3, 5, 130, dtype=torch.bool)
    kernels.dropout_mask(keep, state, 0.3)
    assert torch.equal(keep, keep_mask(state, 0.3, 3, 5, 130).view(3, 5, 130).bool())


def test_unknown_or_impossible_instruction_sets_are_refused():
    with pytest.raises(RuntimeError, match="expected amx, avx512, avx2 or portable"):
        kernels.set_isa("sse9")


def test_lse_is_kept_in_float64():
    for dtype in DTYPES:
        tensor = torch.ones(1, 1, 2, 4, dtype=dtype)
        out, lse = backend.attention(make_call(tensor, tensor, tensor))
        assert (out.dtype, lse.dtype) == (dtype, torch.float64)


def test_kernels_share_no_code_between_instruction_sets():
    """A weak symbol outside an instruction set's namespace could be linked from a wider one into a narrower one."""
    objects = sorted((Path(__file__).parent.parent / "build").glob("temp*/cpu/*.*.o"))
    if not objects or shutil.which("nm") is None:
        pytest.skip("no objects of a build here, or no nm")
    for path in objects:
        isa = path.stem.rsplit(".", 1)[1]
        listing = subprocess.run(["nm", "-C", path], capture_output=True, text=True, check=True).stdout.splitlines()
        weak = [line[19:] for line in listing if line[17:18] in "WVu" and "DW.ref.__gxx_personality" not in line]
        assert [name for name in weak if f"fastattn::{isa}::" not in name] == [], path.name


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("scale", [1e5, 1e15])
def test_huge_scores_choose_their_largest(isa, dtype, scale):
    """Rounding a score and rounding the row's maximum must not differ by anything that a power of two could magnify."""
    torch.manual_seed(3)
    query = torch.randn(1, 1, 40, 1).to(dtype) * scale
    key, value = torch.arange(1.0, 70.0)[None, None, :, None].to(dtype), torch.randn(1, 1, 69, 3).to(dtype)
    out, lse = backend.attention(make_call(query, key, value, softmax_scale=1.0))
    best = torch.where(query < 0, 0, 68).expand_as(out)
    assert torch.equal(out, value.gather(2, best))
    expected = query.double() * key.double().take(best[..., :1])
    torch.testing.assert_close(lse.double(), expected[..., 0], rtol=1e-6, atol=0)
