"""Runs jobs in child processes, a few at a time, so that one which fails, dies or hangs takes none with it."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import fastattn
from fastattn.tools.bench.gpu.jobs import Context, Job, Record

# Seconds to import PyTorch and wake the GPU in, and to end a child that is asked to.
_START, _END = 180.0, 5.0
# Seconds for what is under way when the time is up.
_GRACE = 3.0
# Children in a row that may end before they have begun: then something else is wrong.
_STILLBORN = 3
_TAIL = 3000


class Outcome(NamedTuple):
    """What became of a job.

    Attributes:
        job: which.
        status: "done", "failed", "died", "hung" or "dropped".
        error: one line, if there is something to say.
        trace: a traceback, or the end of what the child printed.
        seconds: that it took.
    """

    job: Job
    status: str
    error: str | None
    trace: str | None
    seconds: float


def run(
    jobs: Sequence[Job],
    context: Context,
    *,
    lanes: int,
    deadline: float,
    on_record: Callable[[Job, Record], None],
    on_outcome: Callable[[Outcome], None],
    environment: Mapping[str, str] | None = None,
    spare: Spare | None = None,
) -> None:
    """Runs the jobs, the most important first, ``lanes`` at a time; returns when all are done or the time is up.

    Args:
        jobs: what to do.
        context: what they go by.
        lanes: child processes at a time.
        deadline: of ``time.monotonic()``; what has not begun by then is dropped, and what has not ended is stopped.
        on_record: called with each record, from one thread at a time.
        on_outcome: called once for each job, likewise.
        environment: variables for the children.
        spare: a child from before that may be taken, and that gets one of these.
    """
    queue, kept = _Queue(jobs, deadline), spare or Spare()
    lock = threading.Lock()

    def record(job: Job, found: Record) -> None:
        with lock:
            on_record(job, found)

    def outcome(found: Outcome) -> None:
        with lock:
            on_outcome(found)

    stop = threading.Event()
    threads = [
        threading.Thread(target=_Lane(context, queue, record, outcome, environment or {}, stop, kept).run, daemon=True)
        for _ in range(max(1, min(lanes, len(jobs))))
    ]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            while thread.is_alive():
                thread.join(0.2)
    except BaseException:
        stop.set()
        for thread in threads:
            thread.join(2 * _END)
        raise
    finally:
        if spare is None:
            kept.give(None)
    for job in queue.rest():
        outcome(Outcome(job, "dropped", "out of time", None, 0.0))


class _Queue:
    """Jobs by importance; of those that are left, the first for which there is time."""

    def __init__(self, jobs: Sequence[Job], deadline: float) -> None:
        self.deadline = deadline
        self._jobs = sorted(jobs, key=lambda job: job.importance)
        self._lock = threading.Lock()

    def take(self) -> Job | None:
        with self._lock:
            left = self.deadline - time.monotonic()
            for k, job in enumerate(self._jobs):
                if job.least <= left:
                    return self._jobs.pop(k)
        return None

    def rest(self) -> list[Job]:
        with self._lock:
            left, self._jobs = self._jobs, []
        return left


class Spare:
    """A child that has done its jobs and waits for others: to start one takes seconds."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._child: _Child | None = None

    def give(self, child: _Child | None) -> None:
        """Keeps a child, or none; the one from before ends."""
        with self._lock:
            before, self._child = self._child, child
        if before is not None:
            before.end()

    def take(self, environment: Mapping[str, str]) -> _Child | None:
        """Returns the child, if it runs and has these variables."""
        with self._lock:
            child, self._child = self._child, None
        if child is not None and (child.environment != environment or not child.running(0.0)):
            child.end()
            return None
        return child


class _Lane:
    """One child after another, until no job is left."""

    def __init__(
        self,
        context: Context,
        queue: _Queue,
        on_record: Callable[[Job, Record], None],
        on_outcome: Callable[[Outcome], None],
        environment: Mapping[str, str],
        stop: threading.Event,
        spare: Spare,
    ) -> None:
        self._spare = spare
        self._context = context
        self._queue = queue
        self._on_record = on_record
        self._on_outcome = on_outcome
        self._environment = environment
        self._stop = stop

    def run(self) -> None:
        stillborn = 0
        while stillborn < _STILLBORN and not self._stop.is_set():
            job = self._queue.take()
            if job is None:
                return
            child, ready = self._spare.take(self._environment), True
            if child is None:
                child = _Child(self._context, self._environment)
                ready = child.ready(self._queue.deadline, self._stop)
            try:
                # A job that finds no child to run in is told so, and the next one tried with another.
                if not ready:
                    stillborn += 1
                    self._on_outcome(Outcome(job, "died", "its process did not start", child.tail(), 0.0))
                    continue
                stillborn = 0
                while job is not None:
                    outcome = self._do(job, child)
                    self._on_outcome(outcome)
                    if not child.usable:
                        break
                    job = None if self._stop.is_set() else self._queue.take()
                else:
                    if not self._stop.is_set():
                        self._spare.give(child)
                        child = None
                    return
            finally:
                if child is not None:
                    child.end()

    def _do(self, job: Job, child: _Child) -> Outcome:
        start = time.monotonic()

        def outcome(status: str, error: str | None = None, trace: str | None = None) -> Outcome:
            return Outcome(job, status, error, trace, time.monotonic() - start)

        child.send(job, self._context)
        end = min(start + job.limit, max(self._queue.deadline, start) + _GRACE)
        while True:
            line = child.read(end, self._stop)
            if line is None:
                if not child.running():
                    return outcome("died", f"its process ended with status {child.status()}", child.tail())
                if time.monotonic() < start + job.limit:
                    return outcome("dropped", "stopped: out of time")
                return outcome("hung", f"stopped after {job.limit:.0f} s", child.tail())
            if "record" in line:
                self._on_record(job, line["record"])
            elif "done" in line:
                child.usable = not line["poisoned"]
                return outcome("failed" if line["error"] else "done", line["error"], line["trace"])


class _Child:
    """A process that does jobs, until it is told to end."""

    def __init__(self, context: Context, environment: Mapping[str, str]) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - it ends with the child
        self.environment = environment
        self.usable = True
        root = str(Path(fastattn.__file__).resolve().parent.parent)
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "fastattn.tools.bench.gpu.child", json.dumps(context.as_json())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**os.environ, "PYTHONPATH": path, **environment},
            start_new_session=True,  # so that what it starts itself, such as compilers, ends with it
        )
        self._text = b""

    def end(self) -> None:
        """Ends the process, and all that it started."""
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            try:
                stream.close()
            except OSError:
                continue
        if self.usable:
            try:
                self._process.wait(_END)
            except subprocess.TimeoutExpired:
                self.usable = False
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._log.close()

    def ready(self, deadline: float, stop: threading.Event) -> bool:
        """Waits until the child takes jobs; returns whether it does."""
        line = self.read(min(time.monotonic() + _START, max(deadline, time.monotonic() + 1.0)), stop)
        return line is not None and "ready" in line

    def send(self, job: Job, context: Context) -> None:
        pipe: IO[bytes] | None = self._process.stdin
        assert pipe is not None
        try:
            pipe.write(json.dumps({"job": job.as_json(), "context": context.as_json()}).encode() + b"\n")
            pipe.flush()
        except OSError:
            self.usable = False  # it has ended, which reading from it tells

    def read(self, end: float, stop: threading.Event) -> dict[str, Any] | None:
        """Returns the next line; None, and the child is of no more use, if none comes before ``end`` or ``stop``."""
        pipe = self._process.stdout
        assert pipe is not None
        while b"\n" not in self._text:
            left = end - time.monotonic()
            if left <= 0 or stop.is_set():
                self.usable = False
                return None
            if select.select([pipe], [], [], min(left, 0.5))[0]:
                found = os.read(pipe.fileno(), 1 << 16)
                if not found:
                    self.usable = False
                    return None
                self._text += found
        line, self._text = self._text.split(b"\n", 1)
        return json.loads(line)

    def running(self, seconds: float = 0.5) -> bool:
        """Whether the process still runs after so long."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return True
        return False

    def status(self) -> str:
        code = self._process.returncode
        if code is not None and code < 0:
            return signal.Signals(-code).name
        return str(code)

    def tail(self) -> str:
        """Returns the end of what the child printed."""
        size = self._log.seek(0, os.SEEK_END)
        self._log.seek(max(size - _TAIL, 0))
        return self._log.read().decode(errors="replace")
