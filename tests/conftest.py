"""Fixtures that the tests of several ops share."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator

import pytest
import torch

# Triton reads it when it is imported, which is when its backend serves the first call.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Tests of kernels that are there in Triton too take these as further parameters.
TRITON = [] if importlib.util.find_spec("triton") is None else ["triton"]

try:
    from fastattn import _cpu
except ImportError:
    _cpu = None
ISAS = [] if _cpu is None else _cpu.available_isas()


@pytest.fixture(params=["reference", *ISAS])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each backend in turn; "cpu" once for each instruction set that this machine has."""
    if request.param == "reference":
        yield "reference"
        return
    before = _cpu.isa()
    _cpu.set_isa(request.param)
    yield "cpu"
    _cpu.set_isa(before)
