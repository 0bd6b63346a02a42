"""``memory_watch`` sees what it is there for."""

from __future__ import annotations

import pytest
import torch
from conftest import TRITON

if not TRITON:
    pytest.skip("needs Triton", allow_module_level=True)

import triton
import triton.language as tl


@triton.jit
def _shift_kernel(input, out, shift, length, SIZE: tl.constexpr):
    """Writes ``out[i] = input[i + shift]`` for a block of ``i``."""
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(out + at, tl.load(input + at + shift, mask=at + shift < length), mask=at < length)


@triton.jit
def _everybody_kernel(out):
    """Every program writes to the same place."""
    tl.store(out, tl.program_id(0))


def test_what_stays_inside_and_apart_passes():
    x, out = torch.arange(8.0), torch.zeros(8)
    _shift_kernel[(2,)](x, out, 0, 8, SIZE=4)
    assert torch.equal(x, out)


def test_addresses_outside_are_seen():
    x, out = torch.arange(8.0), torch.zeros(8)
    with pytest.raises(Exception, match="1 of 4 addresses lie outside"):
        _shift_kernel[(2,)](x[1:], out, -1, 8, SIZE=4)


def test_races_are_seen():
    x = torch.arange(9.0)
    for out in (x, x[1:]):  # the one that reads comes first, or the one that writes
        with pytest.raises(AssertionError, match="1 addresses are read by one program and written by another"):
            _shift_kernel[(2,)](x, out, 1 if out is x else 0, 8, SIZE=4)
    with pytest.raises(AssertionError, match="1 addresses are written by more than one program"):
        _everybody_kernel[(2,)](x)
