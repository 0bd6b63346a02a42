"""Large outputs ask for huge pages: /proc/self/smaps says of each mapping whether it did, and what it holds."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn.backends.extension import load

SMAPS = Path("/proc/self/smaps")
ROLLUP = Path("/proc/self/smaps_rollup")
HUGE = Path("/sys/kernel/mm/transparent_hugepage/enabled")  # absent where the kernel knows no such pages

pytestmark = pytest.mark.skipif(load()[1] is not None or not SMAPS.exists() or not HUGE.exists(), reason="needs Linux")

ROWS, COLUMNS = 2048, 4096  # 32 MiB of float32: never part of a heap


def mapping(tensor: Tensor) -> dict[str, str]:
    """Returns what the system says of the mapping that holds the middle of ``tensor``."""
    address = tensor.data_ptr() + tensor.nbytes // 2
    inside, fields = False, {}
    for line in SMAPS.read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif inside:
            name, value = line.split(":", 1)
            fields[name] = value.strip()
    return fields


def attention(x: Tensor) -> Tensor:
    q = x.view(1, 64, 2048, 64)
    return fastattn.attention(q, q[:, :, :64], q[:, :, :64], backend="cpu")


OPS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda x: fastattn.softmax(x, backend="cpu"),
    "softmax_columns": lambda x: fastattn.softmax(x, 0, backend="cpu"),
    "layer_norm": lambda x: fastattn.layer_norm(x, None, None, backend="cpu"),
    "layer_norm_sum": lambda x: fastattn.layer_norm(x, None, None, residual=x.detach(), backend="cpu")[1],
    "attention": attention,
}


@pytest.mark.parametrize("op", OPS)
def test_large_outputs_and_gradients_ask_for_huge_pages(op: str) -> None:
    x = torch.randn(ROWS, COLUMNS, requires_grad=True)
    out = OPS[op](x)
    assert "hg" in mapping(out)["VmFlags"].split()
    if op in ("softmax", "softmax_columns", "layer_norm"):  # the others' gradients meet in a tensor of autograd's
        (grad,) = torch.autograd.grad(out, x, x.detach())
        assert "hg" in mapping(grad)["VmFlags"].split()


def test_asking_touches_nothing_beyond_the_output() -> None:
    def resident() -> int:
        # Of the whole process: a mapping may have grown together with a neighbour that asked for huge pages too.
        return int(re.search(r"^Rss: +(\d+)", ROLLUP.read_text(), re.MULTILINE)[1]) * 1024  # type: ignore[index]

    x = torch.randn(ROWS, COLUMNS)
    fastattn.softmax(x, backend="cpu")  # what a kernel keeps from its first call on
    gc.collect()  # so that nothing of other tests goes meanwhile
    before = resident()
    out = fastattn.softmax(x, backend="cpu")
    assert 0.9 * out.nbytes <= resident() - before <= out.nbytes + (256 << 10)
