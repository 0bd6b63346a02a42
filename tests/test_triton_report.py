"""The Triton kernels compile without a GPU, and docs/triton-report.md says what the compiler made of them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from conftest import TRITON

from fastattn.tools import triton_report

REPORT = Path(__file__).parent.parent / triton_report.REPORT
# Where a thread spills, at most how many bytes, and why: (architecture or "", kernel, bytes).
SPILLED = (
    # 128 x 256 logits come out of tensor memory at once, in the epilogue.
    ("100", "cross entropy gradients bfloat16", 120),
    # A few values beside the loops.
    ("80", "attention forward bfloat16 (64|128)", 16),
    ("90", "attention forward bfloat16 128 packed causal", 8),
    ("100", "attention forward bfloat16 128 everything", 8),
    ("100", "decode pages", 16),
    # A walk over blocks, of which a search may make use, holds what the next block needs beside the output.
    ("100", "attention forward bfloat16 128 causal .*persistent", 160),
    # The output alone takes half of the registers, and addresses of keys that come by pointers the rest.
    ("", "attention forward bfloat16 256", 88),
    # Addresses of operands of 8 bytes, beside the loops and in the repair; of float32, a few values.
    ("", "attention forward float(32|64)", 240),
    # Of what softcap, dropout and a bias need at once; in float64 twice the registers.
    ("90", "decode_kernel bfloat16 64 packed everything", 48),
    ("100", "decode_kernel bfloat16 256 packed everything", 40),
    ("", "decode_kernel float32", 32),
    ("", "decode_kernel float64", 304),
    # Two sums take half of the registers, and these calls have a bias, softcap and dropout, or no boxes, too.
    ("90", "attention backward, keys bfloat16 (64|128) (packed )?everything", 72),
    ("80", "attention backward, keys bfloat16 256 packed causal", 8),
    ("90", "attention backward, keys bfloat16 256 packed causal", 80),
    ("100", "attention backward, keys bfloat16", 24),
    # The four operands of a tile's two products go through registers at once.
    ("80", "attention backward, diagonals bfloat16 128", 8),
    ("90", "attention backward, (bias|diagonals) bfloat16 256 everything", 32),
    ("100", "attention backward, (bias|diagonals) bfloat16 256 everything", 136),
    # Where a packed sequence lies, beside them.
    ("90", "attention backward, diagonals bfloat16 128 packed", 32),
    ("", "attention backward, diagonals bfloat16 256 packed", 208),
    # It nearly never runs.
    ("", "attention backward, repair bfloat16", 16),
    ("", "attention backward, repair float(32|64)", 2328),
    # As in the forward: on the plain cores, or with operands of 8 bytes, from registers.
    ("", r"attention (backward, (keys|queries|diagonals)|weights, \w+) float32", 48),
    ("", r"attention (backward, (rows|keys|queries|bias|diagonals)|weights, \w+) float64", 624),
)

# Kernels of 16 bits whose work is products, all of which run on matrix units.
PRODUCTS = (
    "attention forward bfloat16",
    "decode_kernel bfloat16",
    "decode pages",
    *(f"attention backward, {of} bfloat16" for of in ("rows", "keys", "queries", "repair", "bias", "diagonals")),
    *(f"attention weights, {of} bfloat16" for of in ("none", "head_mean", "key_sum", "entropy", "top_k", "pooled")),
    *(f"linear {of}.* bfloat16" for of in ("forward", "with residual", "input's gradient", "weights' gradient")),
    *(f"feed-forward {of} bfloat16" for of in ("hidden", "gradients")),
    *(f"cross entropy {of} bfloat16$" for of in ("forward", "gradients", "exponentials")),
)
# Those that are for one architecture alone.
HOPPER = r"hopper attention fwd( repair)? bfloat16"
# Which of them may run on those of single warps where warpgroups have some, and why: a warpgroup's product has 64 rows.
FEW_ROWS = (
    ("decode", "16 packed queries"),
    ("attention backward, repair", "the smallest tile, that it fits every GPU"),
    (r"attention backward, keys bfloat16 \d+ .*\(16, 32,", "32 keys: for little shared memory, or 256 columns a sum"),
    (r"attention backward, (rows|bias|diagonals) bfloat16 256 .*\(16, 16,", "for little shared memory"),
)
# Shared memory that a program may have on every GPU.
EVERYWHERE = 99 << 10

pytestmark = pytest.mark.skipif(not TRITON, reason="needs Triton")
reported = pytest.mark.skipif(not REPORT.exists(), reason="there is no report yet")


def compiler(*arguments: str, fails: bool = False) -> str:
    """Runs Python with Triton's compiler instead of its interpreter, in which the other tests of this process run.

    Args:
        fails: whether it may, having printed why.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 or (fails and done.stdout.strip()), done.stdout + done.stderr
    return done.stdout.strip()


def test_products_run_on_the_matrix_units_of_each_architecture():
    """One kernel of the many, because to compile them all takes minutes: the widest product in bfloat16."""
    code = (
        "from fastattn.tools.triton_report import *\n"
        "for sm in ARCHITECTURES:\n"
        "    found = [c for c, _ in configurations(sm, ['product']) if c.name == 'linear forward bfloat16']\n"
        "    line = compiled(sm, found[1])\n"
        "    print(line.kernel, line.registers > 64, line.spilled, line.warpgroup > 0, line.warp > 0)"
    )
    found = compiler("-c", code).splitlines()
    assert found == [
        "linear forward bfloat16 True 0 False True",
        "linear forward bfloat16 True 0 True False",
        "linear forward bfloat16 True 0 True False",
    ]


@cache
def outdated() -> str:
    """Returns which lines of the report are missing or stale."""
    return compiler("-m", "fastattn.tools.triton_report", "--check", "--out", str(REPORT), fails=True)


def report() -> list[triton_report.Line]:
    if outdated():
        pytest.skip("the report is not current")
    return list(triton_report.read(REPORT).values())


@reported
def test_the_report_is_current():
    """Else: python -m fastattn.tools.triton_report."""
    assert not outdated(), outdated()


@reported
def test_nothing_spills_but_what_is_listed():
    lines = report()
    used = set()
    for line in filter(lambda line: line.spilled, lines):
        found = [entry for entry in SPILLED if entry[0] in ("", str(line.sm)) and re.match(entry[1], line.kernel)]
        assert found, f"sm_{line.sm} {line.kernel} spills {line.spilled} bytes"
        assert line.spilled <= max(most for _, _, most in found), f"sm_{line.sm} {line.kernel} spills {line.spilled}"
        used.update(found)
    assert used == set(SPILLED), "listed, and nothing spills there"
    assert all(line.programs >= 1 for line in lines)


@reported
def test_products_of_16_bits_run_on_matrix_units():
    """Those of warpgroups, where there are such and a product has rows enough."""
    found: dict[tuple[int, str], list[triton_report.Line]] = {}
    seen, excused = set(), set()
    for line in report():
        patterns = [pattern for pattern in (*PRODUCTS, HOPPER) if re.match(pattern, line.kernel)]
        seen.update((line.sm, pattern) for pattern in patterns)
        if patterns:
            # Some names have no tile: of their lines the small ones are for few rows.
            found.setdefault((line.sm, line.kernel), []).append(line)
    for (sm, kernel), lines in found.items():
        assert all(line.warp or line.warpgroup for line in lines), f"sm_{sm} {kernel}"
        if sm > 80 and not any(line.warpgroup for line in lines):
            why = {of for of, _ in FEW_ROWS if re.match(of, kernel)}
            assert why, f"sm_{sm} {kernel}"
            excused |= why
    assert seen == {(sm, pattern) for sm in triton_report.ARCHITECTURES for pattern in PRODUCTS} | {(90, HOPPER)}
    assert excused == {of for of, _ in FEW_ROWS}, "listed, and every product is a warpgroup's"


@reported
def test_warpgroups_products_do_not_wait_for_one_another():
    """A few may, where something lies between two of them that is the same sum's."""
    for line in report():
        assert line.serial <= line.warpgroup / 10, f"sm_{line.sm} {line.kernel}: {line.serial} of {line.warpgroup}"


@reported
def test_attentions_last_tile_fits_every_gpu():
    """But of float64 and head_dim 256, of which the smallest there are need more."""
    needed: dict[tuple[int, str, bool], dict[str, int]] = {}
    for line in report():
        found = re.match(r"(attention .*) (plain|causal|everything) (\(.*)", line.kernel)
        if found and "packed" not in found[1]:
            kernel, call, tile = found.groups()
            # These have a table of their own for calls with everything.
            rich = call == "everything" and re.search("forward|keys", kernel) is not None
            each = needed.setdefault((line.sm, kernel, rich), {})
            each[tile] = max(each.get(tile, 0), line.shared)
    large = {kernel for (_, kernel, _), each in needed.items() if min(each.values()) > EVERYWHERE}
    assert "attention backward, keys float64 256" in large
    assert all("float64 256" in kernel for kernel in large), large
