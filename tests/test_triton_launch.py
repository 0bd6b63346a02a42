"""Triton kernels go through Triton's launcher, on a driver that does nothing (fake_gpu.py)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TRITON

pytestmark = pytest.mark.skipif(not TRITON, reason="needs Triton")


def on_fake_gpu(what: str) -> list[list[str]]:
    """Returns what is printed, line by line and taken apart."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).parent / "fake_gpu.py"
    done = subprocess.run([sys.executable, script, what], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return [line.split(" | ") for line in done.stdout.splitlines()]


def test_launchers_pass_what_kernels_take():
    lines = on_fake_gpu("launch")
    assert len(lines) > 20
    for at, (kernel, passed, taken, launches) in enumerate(lines):
        assert (passed, launches) == (taken, str(at + 1)), kernel


def test_what_is_replayed_is_what_was_launched():
    lines = on_fake_gpu("replay")
    assert len(lines) > 3
    for call, plans, same, launches in lines:
        assert int(plans) >= 1, f"{call} is not replayed"
        assert same == "True", f"{call} is replayed as something else"
        # For Hopper, what computes and what repairs.
        assert int(launches) >= (2 if "Hopper" in call else 1), call
