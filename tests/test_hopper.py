"""The Hopper kernel of attention's forward: emulated against float64, with faults put in, and its machine code."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import TRITON
from gluon_emulator import Box, Machine, Pointer, functions, kernels

import fastattn
from fastattn.masks import Causal, Dense, KeyLengths, Segments, Window
from fastattn.reference.attention import attention as reference
from fastattn.spec.attention import attention_call

pytestmark = pytest.mark.skipif(not TRITON, reason="needs Triton")

# The tiles are smaller than a GPU's, whose instructions have sizes; nothing else depends on them.
EACH, KEYS, DIM = 8, 16, 16
MASKS = {
    "full": None,
    "causal": Causal(),
    "top left": Causal(align="top_left"),
    "window": Window(9, 2),
    "lengths": KeyLengths(torch.tensor([5, 0], dtype=torch.int32)),
    "causal lengths": Causal() & KeyLengths(torch.tensor([33, 1], dtype=torch.int32)),
}


def source() -> str:
    return (kernels() / "hopper_forward.py").read_text()


def emulated(text, call, seed, *, programs=3, stages=2, groups=2):
    """Returns out, lse and flags of a call as the kernel of a source computes them."""
    from fastattn.kernels.arguments import problem

    meant = problem(call)
    if call.key_lengths is not None:
        meant = meant._replace(mask=meant.mask._replace(key_lengths=Pointer(call.key_lengths)))
    batch, heads, seq_len_q, _ = call.query.shape
    blocks = -(-seq_len_q // (groups * EACH)) * batch * heads
    out = torch.full_like(call.query, 9.0)
    lse = torch.full(call.query.shape[:3], 9.0, dtype=torch.float64)
    flags = torch.full(lse.shape, 9, dtype=torch.int32)
    boxes = [Box(t, n, DIM) for t, n in ((call.query, EACH), (call.key, KEYS), (call.value, KEYS), (out, EACH))]
    for program in range(programs):
        machine = Machine(1000 * seed + program, program, programs)
        names = machine.names()
        masking = functions((kernels() / "masking.py").read_text(), names)
        names |= {"masking": SimpleNamespace(**masking), "LN_2": 0.6931471805599453}
        kernel = functions(text, {**names, "EACH": EACH})["attention_fwd_hopper_kernel"]
        kernel(*boxes, Pointer(lse), Pointer(flags), meant, blocks, KEYS, DIM, stages, groups)
    return out, lse, flags


def a_call(seq_len_q, seq_len_k, mask=None, dtype=torch.bfloat16, batch=2, dim=DIM):
    query = torch.randn(batch, 4, seq_len_q, dim).to(dtype)
    key, value = (torch.randn(batch, 2, seq_len_k, dim).to(dtype) for _ in range(2))
    return attention_call(query, key, value, mask=mask, backend="reference")


def check(call, found):
    out, lse, flags = found
    wide = call._replace(query=call.query.double(), key=call.key.double(), value=call.value.double())
    expected, expected_lse = reference(wide)
    # Weights and results are rounded to the call's dtype.
    error = 2.5 * torch.finfo(call.query.dtype).eps * float(expected.abs().max())
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=max(error, 1e-6))
    torch.testing.assert_close(lse, expected_lse.double(), rtol=1e-6, atol=1e-5)
    assert not flags.any()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("seq_len_q", "seq_len_k"), [(1, 1), (16, 16), (17, 50), (40, 97)])
def test_emulated_kernel_is_right(mask, seq_len_q, seq_len_k):
    call = a_call(seq_len_q, seq_len_k, MASKS[mask])
    check(call, emulated(source(), call, seq_len_q, stages=2 + seq_len_q % 3, groups=2 + seq_len_k % 2))


def test_one_program_computes_every_block_in_half_precision():
    call = a_call(50, 70, Causal(), torch.float16)
    check(call, emulated(source(), call, 1, programs=1))


def test_hidden_values_that_are_not_finite_raise_a_flag():
    call = a_call(32, 32, Causal(), batch=1)
    call.value[0, 0, 30] = float("nan")
    out, _, flags = emulated(source(), call, 5)
    bad = ~out.isfinite().all(-1)
    assert bad.sum() > 4 * 2  # rows that may not see it, too
    assert torch.equal(flags.bool(), bad)


WAITS = ("mbarrier.wait(", "mbarrier.arrive(", "fence_async_shared()", "tma.store_wait(", "mbarrier.expect(")


def faults():
    """Yields sources each of which lacks a line that waits or arrives, or has a phase or a count wrong."""
    lines = source().splitlines()
    # Looking again at what has come is for the assembler alone.
    repeated = [n for n, line in enumerate(lines) if "mbarrier.wait(v_full.index(before)" in line][1:]
    for number, line in enumerate(lines):
        if line.strip().startswith(WAITS) and number not in repeated:
            indent = line[: len(line) - len(line.lstrip())]
            yield f"without {line.strip()}", "\n".join([*lines[:number], f"{indent}pass", *lines[number + 1 :]])
    for old, new in (
        ("(phase & 1) ^ 1", "phase & 1"),
        ("warpgroup_mma_wait(1, deps=[scores])", "warpgroup_mma_wait(2, deps=[scores])"),
        ("warpgroup_mma_wait(0, deps=[adding])", "warpgroup_mma_wait(1, deps=[adding])"),
        ("(fetched + step) // STAGES & 1", "(fetched + step + 1) // STAGES & 1"),
        ("_barriers(STAGES, GROUPS)", "_barriers(STAGES, 1)"),
        ("queries.index(group), q_full", "queries.index(0), q_full"),
        ("fetched += steps", "fetched += steps - 1"),
    ):
        assert old in source()
        yield f"{new} for {old}", source().replace(old, new)


@pytest.mark.parametrize("text", [pytest.param(text, id=name) for name, text in faults()])
def test_emulator_finds_a_fault(text):
    call = a_call(40, 97, Causal(), batch=1)
    for seed in range(40):
        try:
            check(call, emulated(text, call, seed, programs=2))
        except AssertionError:
            return
    pytest.fail("nobody noticed")


CALLS = {
    "plain": ((40, 40, None), True),
    "lengths": ((40, 40, Causal() & KeyLengths(torch.tensor([5, 0], dtype=torch.int32))), True),
    "float32": ((40, 40, None, torch.float32), False),
    "dense": ((40, 40, Dense(torch.ones(40, 40).bool())), False),
    "segments": ((40, 40, Segments(torch.zeros(2, 40, dtype=torch.int32))), False),
}


@pytest.mark.parametrize("name", CALLS)
def test_calls_that_are_served(name, monkeypatch):
    from fastattn.kernels import hopper
    from fastattn.kernels.launch import Tile

    arguments, served = CALLS[name]
    call = a_call(*arguments, dim=64)
    tile = Tile(128, 128, 8, 2, specialised=True)
    monkeypatch.setattr(hopper, "_is_there", lambda: True)
    assert not hopper.serves(call, tile, 90)  # the interpreter has no Gluon
    monkeypatch.setattr(hopper, "is_interpreting", lambda: False)
    assert hopper.serves(call, tile, 90) == served
    assert bool(list(hopper.tiles_for(call, 90))) == served
    for other in (80, 100, 0):
        assert not hopper.serves(call, tile, other)
    assert not hopper.serves(call, tile._replace(specialised=False), 90)
    assert not hopper.serves(call._replace(softcap=3.0), tile, 90)
    assert not hopper.serves(call._replace(softmax_scale=-1.0), tile, 90)
    assert not hopper.serves(call._replace(sinks=torch.zeros(4)), tile, 90)
    assert not hopper.serves(call._replace(query=call.query[..., ::2]), tile, 90)
    assert not hopper.serves(call._replace(value=call.value[..., :60]), tile, 90)
    monkeypatch.setattr(hopper, "_is_there", lambda: False)
    assert not hopper.serves(call, tile, 90)


def test_what_is_not_served_goes_to_the_plain_kernel():
    from fastattn.kernels import tiles
    from fastattn.kernels.launch import Tile

    call = a_call(20, 20, Causal(), batch=1)
    with tiles.using("forward", Tile(16, 16, 4, 1, specialised=True)):
        out = fastattn.attention(call.query, call.key, call.value, mask=Causal(), backend="triton")
    torch.testing.assert_close(out, reference(call)[0], rtol=0, atol=0.02)


COMPILE = """
import subprocess, sys, tempfile
from pathlib import Path
import triton
from fastattn.kernels import hopper
from fastattn.tools.triton_report import _collect, _OfflineDriver
from triton.runtime import driver

driver.set_active(_OfflineDriver(90))
found = [c for c in hopper.configurations(90) if c.name.endswith("128 causal (128, 128, 8, 2), specialised")]
if not found:
    sys.exit()
sources = {}
_collect(found[0].kernel, sources)
assert "fastattn.kernels.masking.visible" in sources, "the report would not see that masks have changed"
made = found[0].kernel.warmup(*found[0].arguments, grid=(1,), **found[0].options)
with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
    file.write(made.asm["cubin"])
    file.flush()
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    code = subprocess.run([tool, "-sass", file.name], capture_output=True, text=True, check=True).stdout
print(made.asm["ptx"], "<machine code>", code)
"""


def test_machine_code_overlaps_exponentials_with_products():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    if not done.stdout:
        pytest.skip("this Triton has another Gluon")
    ptx, sass = done.stdout.split("<machine code>")
    # 504 registers for three groups of warps are what the program has: 168 a thread, as it starts.
    assert ".maxnreg 168" in ptx
    assert {"240", "24"} <= set(re.findall(r"setmaxnreg\S+\s+(\d+)", ptx))
    # Who says for its group that a buffer is empty has waited for the group's other warps.
    arrivals = list(re.finditer(r"mbarrier\.arrive\.shared::cta", ptx))
    assert len(arrivals) == 2 * 7
    for arrival in arrivals:
        assert re.findall(r"bar\.sync|wgmma\.\w+", ptx[: arrival.start()])[-1] == "bar.sync"
    # In each loop of each group: two products are begun, the first is waited for, a tile of exponentials, the second.
    word = r"HGMMA|MUFU\.EX2|WARPGROUP\.DEPBAR\.LE gsb0, 0x[01]|USETMAXREG"
    steps = re.sub(r"HGMMA", "h", " ".join(re.findall(word, sass)).replace("MUFU.EX2", "e"))
    loops = re.findall(r"((?:h )+)WARPGROUP.DEPBAR.LE gsb0, 0x1 ((?:e )+)WARPGROUP.DEPBAR.LE gsb0, 0x0 (?=h)", steps)
    assert len(loops) == 4
    for products, exponentials in loops:
        assert products.count("h") == 16
        assert exponentials.count("e") >= 64 * 128 // 128
