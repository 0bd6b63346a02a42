"""Fixtures that the tests of several ops share."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator

import pytest

# Triton reads it when it is imported, which is when its backend serves the first call. With a GPU too, because tests
# hand over CPU tensors: what kernels compute on a GPU is benchmarks/gpu.py's to check.
os.environ.setdefault("TRITON_INTERPRET", "1")
# Tests of kernels that are there in Triton too take these as further parameters.
TRITON = [] if importlib.util.find_spec("triton") is None else ["triton"]

try:
    from fastattn import _cpu
except ImportError:
    _cpu = None
ISAS = [] if _cpu is None else _cpu.available_isas()


def each_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each backend in turn; "cpu" once for each instruction set that this machine has."""
    if request.param not in ISAS:
        yield request.param
        return
    before = _cpu.isa()
    _cpu.set_isa(request.param)
    yield "cpu"
    _cpu.set_isa(before)


backend = pytest.fixture(params=["reference", *ISAS])(each_backend)
# For the tests of ops that are there in Triton too: ``backend = backend_or_triton``. By that name in here it would be
# everybody's.
backend_or_triton = pytest.fixture(params=["reference", *ISAS, *TRITON])(each_backend)


@pytest.fixture(autouse=True)
def leave_out_in_triton(request: pytest.FixtureRequest) -> None:
    """Skips a test on Triton where its module's ``slow_in_triton(test, params)`` says so."""
    params = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    slow = getattr(request.module, "slow_in_triton", None)
    if slow is not None and params.get("backend") == "triton" and slow(request.node.originalname, params):
        pytest.skip("the interpreter is slow: a few cases stand for the others")


@pytest.fixture(autouse=True)
def watch_triton(request: pytest.FixtureRequest) -> Iterator[None]:
    """Watches what Triton kernels load and store in the interpreter."""
    params = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if "triton" not in (params.get("backend"), request.node.path.stem.split("_")[1]):
        yield
        return
    from memory_watch import watching

    with watching():
        yield
