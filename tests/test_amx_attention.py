"""Attention on AMX tiles: every edge of its tiles, every branch, and who is served by it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from attention_cases import MASKS, Case, Inputs, assert_as_exact_as_eager, inputs, run

_cpu = pytest.importorskip("fastattn._cpu")
pytestmark = pytest.mark.skipif("amx" not in _cpu.available_isas(), reason="no AMX here")

# A product is 32 x 32 x 32; a backward tile has 256 queries and 256 keys (64 and 64 where operands are in pieces), a
# forward tile 32 and 64.
LENGTHS = (2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 79, 96, 97, 127, 129, 159, 255, 256, 257, 289, 513)
DIMS = (1, 8, 16, 31, 32, 33, 48, 64, 65, 96, 128, 160)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.fixture(autouse=True)
def amx() -> Iterator[None]:
    before = _cpu.isa()
    _cpu.set_isa("amx")
    yield
    _cpu.set_isa(before)


# Queries and keys of which AMX serves a call, with 64 elements of key and value together.
SERVED = {torch.bfloat16: (70, 90), torch.float16: (70, 90), torch.float32: (270, 250)}


def edge_case(seed: int, smallest: int = 1, smallest_dim: int = 1) -> Case:
    """Returns a call whose sizes lie at the edges of tiles, with features drawn at random."""
    rng = np.random.default_rng(1000 + seed)
    lengths, dims = [n for n in LENGTHS if n >= smallest], [n for n in DIMS if n >= smallest_dim]

    def pick(*choices):
        return choices[rng.integers(len(choices))]

    heads_kv = pick(1, 2)
    bias = pick("none", "none", "bias", "relative")
    return Case(
        batch=pick(1, 2),
        heads=(heads_kv * pick(1, 1, 3), heads_kv),
        seq_len=(int(pick(*lengths)), int(pick(smallest, *lengths))),
        head_dim=(int(pick(*dims)), int(pick(*dims))),
        mask="+".join(name for name in MASKS if rng.random() < 0.12),
        bias=tuple(bool(rng.integers(2)) for _ in range(4)) if bias == "bias" else None,
        relative="learned" if bias == "relative" else "",
        softcap=pick(None, None, None, 2.0),
        sinks=pick(False, False, True),
        dropout_p=pick(0.0, 0.0, 0.25),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(30))
def test_edges_of_tiles(seed: int, dtype: torch.dtype) -> None:
    smallest = {torch.bfloat16: (1, 1), torch.float16: (64, 32), torch.float32: (256, 32)}
    case = edge_case(seed, *smallest[dtype])
    found = run(inputs(case, dtype).to(dtype), "cpu")
    assert_as_exact_as_eager(found, case, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("which", ["queries", "keys"])
def test_each_length(length: int, which: str, dtype: torch.dtype) -> None:
    other = 520 if dtype == torch.float32 and length >= 64 else 100
    seq_len = (length, other) if which == "queries" else (other, length)
    case = Case(batch=1, heads=(2, 1), seq_len=seq_len, head_dim=(64, 64))
    found = run(inputs(case, dtype).to(dtype), "cpu")
    assert_as_exact_as_eager(found, case, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", ["", "causal", "window"])
def test_keys_beyond_the_cache(dtype: torch.dtype, mask: str) -> None:
    """Where packed keys and values outgrow the cache, several blocks of queries share each tile of them."""
    case = Case(batch=1, heads=(1, 1), seq_len=(150, 6200), head_dim=(160, 128), mask=mask)
    found = run(inputs(case, dtype).to(dtype), "cpu")
    assert_as_exact_as_eager(found, case, dtype)


AT = 170
BEFORE, OTHERS, AFTER = torch.arange(AT), torch.arange(300) != AT, torch.arange(AT + 1, 300)
# Of a causal call: the rows that an element of row AT does not reach, bit for bit.
UNTOUCHED = {
    "query": {"out": OTHERS, "dquery": OTHERS, "dkey": AFTER, "dvalue": AFTER},
    "key": {"out": BEFORE, "dquery": BEFORE},
    "value": {"out": BEFORE, "dquery": BEFORE, "dvalue": torch.arange(300)},
    "dout": {"out": torch.arange(300), "dquery": OTHERS, "dkey": AFTER, "dvalue": AFTER},
}


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", UNTOUCHED)
def test_poison_stays_with_those_who_see_it(where: str, poison: float) -> None:
    case = Case(batch=1, heads=(2, 2), seq_len=(300, 300), head_dim=(40, 24), mask="causal")
    results = []
    for value in (0.5, poison):
        given = inputs(case, torch.bfloat16).to(torch.bfloat16)
        with torch.no_grad():
            (given.dout if where == "dout" else given.leaves[where])[0, 1, AT, 3] = value
        results.append(run(given, "cpu").named())
    clean, found = results
    assert not all(tensor.isfinite().all() for tensor in found.values())
    for name in ("out", "dquery", "dkey", "dvalue"):
        assert torch.equal(found[name][:, 0], clean[name][:, 0]), name
        rows = UNTOUCHED[where].get(name, BEFORE[:0])
        assert torch.equal(found[name][:, :, rows], clean[name][:, :, rows]), name


def bits(given: Inputs, isa: str) -> dict[str, torch.Tensor]:
    _cpu.set_isa(isa)
    return run(given, "cpu").named()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("where", ["query", "key", "value"])
@pytest.mark.parametrize("size", [float("nan"), float("inf"), 3.4e38, 1e30])
def test_what_has_no_pieces_is_left_to_avx512(where: str, size: float, dtype: torch.dtype) -> None:
    case = Case(batch=1, heads=(2, 2), seq_len=SERVED[dtype], head_dim=(40, 24), mask="causal")
    results = []
    for isa in ("amx", "avx512"):
        given = inputs(case, dtype).to(dtype)
        with torch.no_grad():
            given.leaves[where][0, 1, 50, 3] = size
        results.append(bits(given, isa))
    for name, tensor in results[0].items():
        assert torch.equal(tensor.nan_to_num(7.0), results[1][name].nan_to_num(7.0)), name


@pytest.mark.parametrize("where", ["value", "dout"])
@pytest.mark.parametrize("size", [1e-30, 1e-38])
def test_very_small_numbers(where: str, size: float) -> None:
    """Tiles take the last pieces of very small numbers for 0: what is left of them would be bfloat16."""
    case = Case(batch=1, heads=(2, 2), seq_len=SERVED[torch.float32], head_dim=(40, 24))
    plain = run(inputs(case, torch.float32).to(torch.float32), "cpu").named()
    given = inputs(case, torch.float32).to(torch.float32)
    with torch.no_grad():
        (given.dout if where == "dout" else given.leaves[where]).mul_(size)
    found = run(given._replace(dlse=torch.zeros_like(given.dlse)), "cpu").named()
    name = "out" if where == "value" else "dvalue"
    torch.testing.assert_close(found[name] / size, plain[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_large_scores_are_left_to_avx512(dtype: torch.dtype) -> None:
    """Scores whose rounding is a factor: forward and backward must round them alike."""
    case = Case(seq_len=SERVED[dtype], head_dim=(64, 64), softmax_scale=1e6)
    given = inputs(case, dtype)
    amx, avx512 = (bits(given.to(dtype), isa) for isa in ("amx", "avx512"))
    for name, tensor in amx.items():
        assert torch.equal(tensor, avx512[name]), name


def test_who_is_served() -> None:
    """AMX sums in another order than AVX-512, and rounds P and dS of bfloat16: the bits tell who has served."""
    long, single = Case(seq_len=(70, 90), head_dim=(48, 40)), Case(heads=(4, 1), seq_len=(1, 90))
    short = Case(seq_len=(63, 90), head_dim=(64, 64))
    for case, dtype, served in (
        (long, torch.bfloat16, True),
        (long, torch.float16, True),
        (long, torch.float32, False),
        (Case(seq_len=(270, 250), head_dim=(48, 40)), torch.float32, True),
        (single, torch.bfloat16, False),
        (short, torch.bfloat16, True),
        (short, torch.float16, False),
        (short, torch.float32, False),
        (Case(seq_len=(270, 310), head_dim=(16, 40)), torch.float32, False),
        (single, torch.float16, False),
        (single, torch.float32, False),
    ):
        amx, avx512 = (bits(inputs(case, dtype).to(dtype), isa) for isa in ("amx", "avx512"))
        for name in ("lse", "dquery", "dkey", "dvalue"):
            assert torch.equal(amx[name], avx512[name]) != served, (case, dtype, name)
