"""Calls at the same time as other calls, on any number of threads and under signals: the bits of a call by itself."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from threaded_ops import bits, ops

pytest.importorskip("fastattn._cpu")


@pytest.fixture
def threads() -> Iterator[int]:
    """Restores the number of threads."""
    before = torch.get_num_threads()
    yield before
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def calls():
    return ops()


@pytest.fixture(scope="module")
def expected(calls):
    """The bits of each call, with and without gradients, one after another on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        found = {(name, False): bits(op()) for name, op in calls.items()}
    found |= {(name, True): bits(op()) for name, op in calls.items()}
    torch.set_num_threads(before)
    return found


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_the_number_of_threads_changes_no_bit(calls, expected, threads, count):
    torch.set_num_threads(count)
    assert [name for name, op in calls.items() if bits(op()) != expected[name, True]] == []


def test_calls_from_several_python_threads(calls, expected, threads):
    """Each Python thread calls all ops in an order, on a number of threads and with a gradient mode of its own."""
    wrong: list[object] = []
    start = threading.Barrier(4)

    def work(index: int) -> None:
        try:
            torch.set_num_threads(index + 1)
            names = list(calls)
            random.Random(index).shuffle(names)
            start.wait(30)
            for name in names:
                grad = (index + len(name)) % 2 == 0
                with torch.set_grad_enabled(grad):
                    if bits(calls[name]()) != expected[name, grad]:
                        wrong.append((index, name, grad))
        except BaseException as error:
            wrong.append(error)
            raise

    workers = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert not any(worker.is_alive() for worker in workers), "a call hangs"
    assert wrong == []


SIGNALS = """
import os, signal, sys, threading, time
import torch
import fastattn
from threaded_ops import bits, ops

torch.set_num_threads(4)
calls = ops()
expected = {name: bits(op()) for name, op in calls.items()}


def check():
    assert [name for name, op in calls.items() if bits(op()) != expected[name]] == []

"""

# Timers that go off all the time: one by the clock, one by the processor time of all threads, the kernels' among them.
TIMERS = """
count = {signal.SIGALRM: 0, signal.SIGPROF: 0}


def handler(number, frame):
    count[number] += 1
    torch.ones(3).softmax(0)  # a handler may itself use PyTorch, and the kernels
    fastattn.softmax(torch.ones(3, 5))


for number, timer in ((signal.SIGALRM, signal.ITIMER_REAL), (signal.SIGPROF, signal.ITIMER_PROF)):
    signal.signal(number, handler)
    signal.setitimer(timer, 0.002, 0.002)
while min(count.values()) < 20:
    check()
for timer in (signal.ITIMER_REAL, signal.ITIMER_PROF):
    signal.setitimer(timer, 0)
"""

INTERRUPTS = """
signal.signal(signal.SIGINT, signal.default_int_handler)
inputs = [torch.randn(1, 4, 900, 64, requires_grad=True) for _ in range(3)]
dout = torch.ones_like(inputs[0])


def long_call():
    out = fastattn.attention(*inputs, mask=fastattn.masks.Causal())
    return bits([out, *torch.autograd.grad(out, inputs, dout)])


right = long_call()
begin = time.perf_counter()
assert long_call() == right
took = time.perf_counter() - begin
for k in range(12):
    try:
        timer = threading.Timer(took * (k + 1) / 10, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        assert long_call() == right  # where the signal came late
        timer.join()
        time.sleep(60)
        sys.exit("no KeyboardInterrupt came")
    except KeyboardInterrupt:
        timer.join()
    assert long_call() == right  # the next call
check()
"""


@pytest.mark.parametrize("code", [TIMERS, INTERRUPTS], ids=["timers", "keyboard interrupt"])
def test_signals(code):
    """In a process of its own: pytest has its own use for these signals."""
    path = f"import sys; sys.path.append({str(Path(__file__).parent)!r})\n"
    result = subprocess.run(
        [sys.executable, "-c", path + SIGNALS + code], capture_output=True, text=True, timeout=240, check=False
    )
    assert result.returncode == 0, result.stderr
