"""benchmarks/: the documented command finds every file, and runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastattn.tools.bench import families

ROOT = Path(__file__).resolve().parent.parent
FAMILIES = ("attention", "decode", "softmax", "feed_forward", "linear_cross_entropy", "module", "model")

pytestmark = [
    pytest.mark.skipif(not (ROOT / "benchmarks" / "conftest.py").exists(), reason="not a checkout"),
    pytest.mark.filterwarnings("ignore:enable_nested_tensor"),
]


def _pytest(*arguments):
    pytest.importorskip("pytest_benchmark")
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "pytest", "benchmarks", *arguments, "-p", "no:cacheprovider"]
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200, check=False)


def test_every_row_is_collected():
    result = _pytest("--benchmark-only", "--collect-only", "-q", "-q")
    assert result.returncode == 0, result.stdout + result.stderr
    for family in FAMILIES:
        (count,) = (int(line.rsplit(": ", 1)[1]) for line in result.stdout.splitlines() if f"bench_{family}.py" in line)
        # Each row in three dtypes, by fastattn and at least one peer.
        assert count >= len(families.rows(family)) * 3 * 2


def test_one_row_runs():
    chosen = "decode and one- and float32 and (fastattn or SDPA)"
    result = _pytest("--benchmark-only", "-k", chosen, "--benchmark-max-time=0.01", "--benchmark-min-rounds=1")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "decode one, forward, float32" in result.stdout
    assert "3 passed" in result.stdout


@pytest.mark.parametrize("family", ["attention", "decode", "softmax", "feed_forward", "linear_cross_entropy", "module"])
def test_the_files_name_the_harness_cases(family):
    small = {
        "attention": {"batch": 1, "heads": [1, 1], "seq_len": [3, 3], "head_dim": 8, "causal": False},
        "decode": {"batch": 1, "heads": [1, 1], "cache": 4, "head_dim": 8},
        "softmax": [2, 8],
        "feed_forward": [2, 8, 8, "relu"],
        "linear_cross_entropy": [2, 8, 8],
        "module": [1, 3, 8, 1],
    }[family]
    scope: dict[str, object] = {}
    exec((ROOT / "benchmarks" / f"bench_{family}.py").read_text(encoding="utf-8"), scope)
    assert scope["FAMILY"] == family
    named = set(scope["cases"]("row"))
    made = {(case.name, case.direction) for case in families.FAMILIES[family]("row", small, torch.float32, "cpu")}
    # Into a buffer only where the C++ kernels are built, and nowhere else.
    assert named == {(name, direction) for name, direction in made if "into a buffer" not in direction}
