"""How fast: the benchmark's rows, ours and the peers' in turns."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

import torch

from fastattn.errors import UnsupportedError
from fastattn.ops._dispatch import use_backend
from fastattn.spec.attention import attention_call
from fastattn.tools.bench import families, peers
from fastattn.tools.bench.attention import arguments_of
from fastattn.tools.bench.case import Case, size
from fastattn.tools.bench.gpu.jobs import Context, Emit, Job, Record
from fastattn.tools.bench.measuring import OURS, TOLERANCE, Line, Settings, measure
from fastattn.tools.bench.peers import compiled
from fastattn.tools.bench.peers.peer import Peer
from fastattn.tools.bench.workload import AttentionWorkload

# Kernels of attention's forward that a tile must ask for: modules whose ``tiles_for(call, architecture)`` yields such
# tiles, the likely ones first, and what the results call them.
CANDIDATES = {"fastattn.kernels.hopper": "Gluon"}


def _cases(job: Job, context: Context) -> Iterator[Case]:
    """Yields the cases of a row that the job asks for."""
    given = job.parameters
    dtype = getattr(torch, given["dtype"])
    for case in families.FAMILIES[given["family"]](given["row"], given["shape"], dtype, context.device):
        if case.direction in given["directions"] and given.get("op", "") in ("", case.name.split(" ")[0]):
            yield case


def _peers(job: Job, context: Context) -> list[Peer]:
    given = job.parameters
    found = peers.chosen(given.get("peers"), quick=not given["compiled"], device=context.device)
    return [peer for peer in found if peer.unavailable() is None]


def _time(job: Job, context: Context, emit: Emit) -> None:
    """Checks and times each direction of a row; one that fails takes no other with it."""
    who = _peers(job, context)
    settings = Settings(list(context.backends), who, context.device, context.seconds)
    dtype = getattr(torch, job.parameters["dtype"])
    for case in _cases(job, context):
        try:
            more, notes = _variants(case, dtype, context)
            for label, note in notes.items():
                emit({**_named(case, job), "who": label, "backend": "triton", "note": note})
            lines = measure(replace(case, others={**case.others, **more}), dtype, settings)
        except Exception as problem:
            if context.device != "cpu":
                torch.cuda.synchronize()  # raises where the GPU is lost to this process: the job has failed, too
            emit({**_named(case, job), "who": OURS, "note": f"failed: {type(problem).__name__}: {problem}"[:300]})
            continue
        for k, line in enumerate(lines):
            for record in flattened(line, case):
                # All of ours were timed in the same turns as the peers: once is enough of these.
                if k == 0 or record["who"] == OURS:
                    emit({**_named(case, job), **record})


def _candidates(case: Case, context: Context) -> Iterator[tuple[str, Callable[[Callable[[], Any]], Any]]]:
    """Yields a name, and what runs a function with kernels that no table of tiles names yet: attention's forward, with
    the first tile of each that :data:`CANDIDATES` offers."""
    work = case.workload
    if not isinstance(work, AttentionWorkload) or work.backward or "triton" not in context.backends:
        return
    for module, label in CANDIDATES.items():
        if importlib.util.find_spec(module) is None:
            continue
        from fastattn.kernels import tiles
        from fastattn.kernels.launch import architecture

        call = attention_call(*work.tensors[:3], **arguments_of(work, *work.tensors[3:]), backend="triton")
        offered = importlib.import_module(module).tiles_for(call, architecture(work.query.device))
        for tile in islice(offered, 1):
            yield f"{OURS} ({label})", partial(_within, partial(tiles.using, "forward", tile))


def _variants(case: Case, dtype: torch.dtype, context: Context) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """Returns, by name, ours with each of :func:`_candidates` that agrees with float64, and what is wrong with the
    others."""
    calls: dict[str, Callable[[], Any]] = {}
    notes: dict[str, str] = {}
    for who, run in _candidates(case, context):
        try:
            error = run(case.error)
        except Exception as problem:
            if context.device != "cpu":
                torch.cuda.synchronize()  # raises where the GPU is lost to this process
            notes[who] = f"failed: {type(problem).__name__}: {problem}"[:300]
            continue
        if error <= TOLERANCE[dtype]:
            calls[who] = partial(run, case.ours)
        else:
            notes[who] = f"WRONG: off by {error:.0e}"
    return calls, notes


def _within(choice: Callable[[], AbstractContextManager[None]], run: Callable[[], Any]) -> Any:
    with choice(), use_backend("triton"):
        return run()


def _named(case: Case, job: Job) -> Record:
    return {"op": case.family, "row": case.name, "direction": case.direction, "dtype": job.parameters["dtype"]}


def flattened(line: Line, case: Case) -> Iterator[Record]:
    """Yields a record for each that was timed, and for each that was left out with the reason."""
    backend, work = line["backend"], case.workload
    gradients = size(getattr(work, "tensors", ())) if getattr(work, "backward", False) else 0.0
    times, memory, errors = (line.get(name, {}) for name in ("times_us", "memory_bytes", "peer_errors"))
    if OURS not in times:
        yield {"who": OURS, "backend": backend, "error": line["error"], "note": line.get("note", "not timed")}
    for name, timing in times.items():
        ours = name == OURS
        yield {
            "who": name,
            "backend": backend if ours else None,
            "served_by": line.get("served_by") if ours else None,
            "median_us": timing["median"],
            "p20_us": timing["p20"],
            "p80_us": timing["p80"],
            "repeats": timing["repeats"],
            **figure(case, timing["median"]),
            "error": line["error"] if ours else errors.get(name),
            "memory_bytes": memory.get(name),
            "gradient_bytes": gradients,
            "flops": case.flops,
            "moved": case.moved,
        }
    for name, reason in line.get("left_out", {}).items():
        yield {"who": name, "backend": None, "note": reason}


def figure(case: Case, median: float) -> dict[str, Any]:
    """Returns what a median, in microseconds, amounts to."""
    if case.unit == "GB/s":
        return {"figure": case.moved / median / 1e3, "unit": "GB/s"}
    return {"figure": case.flops / median / 1e6, "unit": "TFLOP/s"}


def _warm(job: Job, context: Context, emit: Emit) -> None:
    """Runs each direction of a row once, and lets the peers that compile do so: all of it is then on the disk.

    Nothing is compared: float64 would take more memory than many of these jobs have together.
    """
    slow = [peer for peer in _peers(job, context) if peer.slow_to_build]
    for case in _cases(job, context):
        compiled.forget()
        for backend in context.backends:
            with suppress(UnsupportedError), use_backend(backend):
                case.ours()
        for _, run in _candidates(case, context):
            with suppress(Exception):
                run(case.ours)
        for peer in slow:
            # What a peer cannot do, timing finds out and says.
            with suppress(Exception):
                assert case.workload is not None
                call = peer.call(case.workload)
                if call is not None:
                    call()


KINDS: dict[str, Callable[[Job, Context, Emit], None]] = {"time": _time, "warm": _warm}
