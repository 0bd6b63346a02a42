"""The Triton kernels compile without a GPU, and docs/triton-report.md says what the compiler made of them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TRITON

from fastattn.tools import triton_report

REPORT = Path(__file__).parent.parent / triton_report.REPORT
# Where a thread spills, at most how many bytes, and why: (architecture or "", kernel, bytes).
SPILLED = (
    ("80", r"norm backward bfloat16 \[8192, 1024\]", 8),
    # 128 x 256 logits come out of tensor memory at once, in the epilogue.
    ("100", "cross entropy gradients bfloat16", 120),
    # A few values beside the loops.
    ("80", "attention forward bfloat16 (64|128)", 16),
    ("90", "decode_kernel bfloat16", 8),
    ("100", "decode pages", 16),
    # The output alone takes half of the registers; the loop that repairs it spills, and nearly never runs.
    ("", "attention forward bfloat16 256", 360),
    # Products of float32 run on the plain cores, from registers, and so does float64 on sm_100. Not tuned yet.
    ("", "(attention forward|decode_kernel) float(32|64)", 4704),
)

# Kernels of 16 bits whose work is products.
PRODUCTS = (
    r"attention forward bfloat16",
    r"decode_kernel bfloat16",
    r"decode pages",
    *(rf"attention backward, {kernel} bfloat16" for kernel in ("rows", "keys", "queries", "repair")),
    *(rf"attention backward, {kernel} bfloat16" for kernel in ("bias", "diagonals")),
    *(rf"attention weights, {of} bfloat16" for of in ("none", "head_mean", "key_sum", "entropy", "top_k", "pooled")),
    *(rf"linear {of}.* bfloat16" for of in ("forward", "with residual", "input's gradient", "weights' gradient")),
    *(rf"feed-forward {of} bfloat16" for of in ("hidden", "gradients")),
    *(rf"cross entropy {of} bfloat16" for of in ("forward", "gradients", "exponentials")),
)
# Of those, whose products are not a warpgroup's, which has 64 rows: (kernel, why).
FEW_ROWS = (
    (r"decode", "16 packed queries"),
    (r"attention backward, repair", "the smallest tile, which fits every GPU"),
    (r"attention .*\((16|32), \d+, ", "a GPU with little shared memory, or a head_dim with many registers"),
    (r"attention backward, keys .*\(\d+, 32, ", "32 keys, of which there are two sums of 256 columns"),
    (r"(linear|feed-forward|cross entropy)", "small tiles for few rows, second in their tables"),
)

pytestmark = pytest.mark.skipif(not TRITON, reason="needs Triton")
reported = pytest.mark.skipif(not REPORT.exists(), reason="there is no report yet")


def compiler(*arguments: str) -> str:
    """Runs Python with Triton's compiler instead of its interpreter, in which the other tests of this process run."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


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


@reported
def test_the_report_is_current():
    """Else: python -m fastattn.tools.triton_report."""
    compiler("-m", "fastattn.tools.triton_report", "--check", "--out", str(REPORT))


@reported
def test_nothing_spills_but_what_is_listed():
    lines = triton_report.read(REPORT).values()
    used = set()
    for line in filter(lambda line: line.spilled, lines):
        found = [entry for entry in SPILLED if entry[0] in ("", str(line.sm)) and re.match(entry[1], line.kernel)]
        assert found, f"sm_{line.sm} {line.kernel} spills {line.spilled} bytes"
        assert line.spilled <= max(most for _, _, most in found), f"sm_{line.sm} {line.kernel} spills {line.spilled}"
        used.update(found)
    assert used == set(SPILLED), "listed, and nothing spills there"
    assert all(line.programs >= 1 for line in lines)


@reported
def test_attention_runs_on_the_matrix_units_of_each_architecture():
    """Half precision, whatever the call."""
    lines = [
        line for line in triton_report.read(REPORT).values() if line.kernel.startswith("attention forward bfloat16")
    ]
    assert {line.sm for line in lines} == set(triton_report.ARCHITECTURES)
    for line in lines:
        assert line.warp if line.sm == 80 else line.warpgroup, f"sm_{line.sm} {line.kernel}"
