"""The rows of ``fastattn bench`` for pytest-benchmark: the same cases, peers and checks, one call at a time.

A file names its FAMILY and says which ``cases`` (name, direction) a row of the grid has; each becomes a test for
fastattn and for every peer of that family.
"""

from __future__ import annotations

import pytest
import torch

from fastattn.tools.bench import families, measuring, peers
from fastattn.tools.bench.peers.peer import Peer

DTYPES = ("float32", "bfloat16", "float16")


def pytest_generate_tests(metafunc):
    family = metafunc.module.FAMILY
    who = [measuring.OURS]
    # A peer offers a family by overriding its method.
    who += [p.name for p in peers.chosen() if getattr(type(p), family) is not getattr(Peer, family)]
    metafunc.parametrize("who", who)
    metafunc.parametrize("dtype", DTYPES)
    found = [(row, *case) for row, _ in families.rows(family) for case in metafunc.module.cases(row)]
    metafunc.parametrize(("row", "name", "direction"), found, ids=[f"{name}-{way}" for _, name, way in found])


@pytest.fixture(scope="session")
def built():
    """The cases of the row that was asked for last: one row's tensors are held at a time."""
    return {}


@pytest.fixture
def call(built, request, benchmark, row, name, direction, dtype, who):
    """What is timed: its answer has been compared with float64's."""
    family, kind = request.module.FAMILY, getattr(torch, dtype)
    if built.get("row") != (family, row, dtype):
        built.clear()
        built.update(row=(family, row, dtype), cases=list(families.cases(family, kind, [row])))
    (case,) = (c for c in built["cases"] if (c.name, c.direction) == (name, direction))
    benchmark.group = f"{family} {name}, {direction}, {dtype}"
    if who == measuring.OURS:
        line, ready = measuring.checked(case, kind, measuring.AUTOMATIC)
        if ready is None:
            pytest.fail(f"{line['note']}: error {line['error']}")
        benchmark.extra_info["error"] = line["error"]
        return ready
    (peer,) = peers.chosen([who])
    missing = peer.unavailable()
    if missing is not None:
        pytest.skip(missing)
    found = peers.ready(case.workload, [peer])
    if found.failed:
        pytest.fail(found.failed[who])
    if not found.calls:
        pytest.skip(f"{who} does not offer it")
    return found.calls[who]
