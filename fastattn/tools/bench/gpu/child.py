"""A child process: does the jobs that stand on its standard input, one and its context a line, and says what came of
them.

Each line that it writes is a JSON object: ``{"ready": ...}`` once, then for each job any number of ``{"record": ...}``
and one ``{"done": name, "error": ..., "trace": ...}``.  What anybody prints goes to standard error.  A GPU that has
met an illegal address serves its process no more: then it says so (``"poisoned"``) and ends.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

from fastattn.tools.bench.gpu import environment, numerics, search, speed
from fastattn.tools.bench.gpu.jobs import Context, Emit, Job, finite

KINDS: dict[str, dict[str, Callable[[Job, Context, Emit], None]]] = {
    "environment": environment.KINDS,
    "numerics": numerics.KINDS,
    "speed": speed.KINDS,
    "search": search.KINDS,
}
POISONED = 3


def main() -> int:
    """Runs jobs until there are no more; returns the exit status."""
    with os.fdopen(os.dup(1), "w", buffering=1) as out:
        os.dup2(2, 1)  # whatever a library prints is no answer

        def say(**line: Any) -> None:
            out.write(json.dumps(finite(line)) + "\n")

        context = Context.of(json.loads(sys.argv[1]))
        if context.device != "cpu":
            torch.zeros(1, device=context.device)
        with suppress(Exception):  # whoever needs it finds out why
            importlib.import_module("triton")
        # What is imported is never garbage; to look through it takes a tenth of a second before each figure of memory.
        gc.collect()
        gc.freeze()
        say(ready=os.getpid())
        for line in sys.stdin:
            sent = json.loads(line)
            job, context = Job(**sent["job"]), Context.of(sent["context"])
            error = trace = None
            try:
                _inject(context.inject.get(job.name))
                KINDS[job.section][job.kind](job, context, lambda record: say(record=record))
            except Exception as problem:
                error = f"{type(problem).__name__}: {problem}".strip().splitlines()[0][:300]
                trace = traceback.format_exc()
                del problem
            poisoned = not _alive(context.device)
            say(done=job.name, error=error, trace=trace, poisoned=poisoned)
            if poisoned:
                return POISONED
    return 0


def _inject(what: str | None) -> None:
    """Lets a job go wrong, for a test of what becomes of the others."""
    if what == "raise":
        raise RuntimeError("this was to be raised")
    if what == "die":
        os.abort()
    if what == "hang":
        time.sleep(3600)


def _alive(device: str) -> bool:
    if device == "cpu":
        return True
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except Exception:
        return False
    return True


if __name__ == "__main__":
    sys.stdout.flush()
    sys.exit(main())
