"""Every Triton kernel goes through Triton's launcher, on a driver that does nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TRITON

pytestmark = pytest.mark.skipif(not TRITON, reason="needs Triton")


def test_launchers_pass_what_kernels_take():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).parent / "fake_gpu.py"
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) > 20
    for at, (kernel, passed, taken, launches) in enumerate(lines):
        assert (passed, launches) == (taken, str(at + 1)), kernel
