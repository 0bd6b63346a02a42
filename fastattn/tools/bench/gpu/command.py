"""The command itself: plans, runs the stages one after the other, and writes what they found."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fastattn.tools.bench.gpu import environment, lanes, pictures, plan, summary
from fastattn.tools.bench.gpu.jobs import Context, Job, Record, finite

RESULTS, SUMMARY, LOG, TILES = "results.jsonl", "summary.md", "log.txt", "tiles.json"
# Seconds that a run may take, all of it.
_BUDGET, _QUICK_BUDGET = 570.0, 170.0
# Parts of it at whose end checking and compiling, and timing, have to be over; and seconds for the plots.
_CHECKED, _TIMED, _FINISH = 0.5, 0.85, 10.0
_SECONDS, _QUICK_SECONDS = 0.15, 0.1
_MOST_LANES = 14
# Seconds for a job that is to hang, for the tests.
_HUNG = 2.0
SECTIONS = ("numerics", "speed", "search")


class Run:
    """A run and what it has found so far.

    Args:
        folder: that gets the files.
        context: of its jobs.
        budget: seconds.
        at_a_time: children while nothing is timed.
    """

    def __init__(self, folder: Path, context: Context, budget: float, at_a_time: int) -> None:
        self.folder = folder
        self.context = context
        self.records: list[Record] = []
        self.failed = False
        self._start = time.monotonic()
        self._budget = budget
        self._lanes = at_a_time
        self._results = (folder / RESULTS).open("w", encoding="utf-8")
        self._log = (folder / LOG).open("w", encoding="utf-8")
        self._common: Record = {}
        # Of stages that run one job at a time.
        self._spare = lanes.Spare()
        # What was dropped, until there is time for it after all.
        self._left: dict[str, Job] = {}

    def seconds(self) -> float:
        return time.monotonic() - self._start

    def at(self, part: float) -> float:
        """Returns when that part of the budget is used up, before the plots."""
        return self._start + part * (self._budget - _FINISH)

    def add(self, section: str, found: Record) -> None:
        """Keeps a record, and writes it at once."""
        record = finite({"section": section, **self._common, **found})
        self.records.append(record)
        self._results.write(json.dumps(record) + "\n")
        self._results.flush()

    def say(self, text: str) -> None:
        line = f"[{self.seconds():5.0f} s] {text}"
        print(line, flush=True)
        self.log(line)

    def log(self, text: str) -> None:
        self._log.write(text.rstrip() + "\n")
        self._log.flush()

    def stage(self, what: str, jobs: Sequence[Job], deadline: float, *, alone: bool) -> None:
        """Runs jobs; ``alone`` one at a time, so that they can be timed."""
        if not jobs:
            return
        count = 1 if alone else self._lanes
        hanging = {name for name, what in self.context.inject.items() if what == "hang"}
        jobs = [replace(job, limit=_HUNG) if job.name in hanging else job for job in jobs]
        self.say(f"{what}: {len(jobs)} jobs, {count} at a time, {max(deadline - time.monotonic(), 0):.0f} s at most")
        settings = {"TRITON_INTERPRET": "1" if self.context.device == "cpu" else "0"}
        if not alone:
            # Each core has a child already.
            settings |= {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        lanes.run(
            jobs,
            self.context,
            lanes=count,
            deadline=deadline,
            on_record=lambda job, record: self.add(job.section, {"job": job.name, **record}),
            on_outcome=self._outcome,
            environment=settings,
            spare=self._spare if alone else None,
        )
        self.write_summary()

    def _outcome(self, found: lanes.Outcome) -> None:
        self.log(
            f"[{self.seconds():5.0f} s] {found.status} {found.job.name} ({found.seconds:.1f} s) {found.error or ''}"
        )
        if found.trace and found.status != "done":
            self.log(found.trace)
        if found.status == "dropped":
            self._left[found.job.name] = found.job
            return
        self._left.pop(found.job.name, None)
        if found.status != "done":
            self.failed = True
            self.add("outcome", {"job": found.job.name, "status": found.status, "error": found.error})

    def write_summary(self) -> str:
        text = summary.text(self.records)
        (self.folder / SUMMARY).write_text(text, encoding="utf-8")
        return text

    def begin(self, commit: str | None = None) -> None:
        """Writes what the software is and how the clocks stand, and asks the device what it can do."""
        found: Record = {"software": environment.software(), "quick": self.context.quick}
        if commit:
            found["software"]["commit"] = commit
        found["time"] = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        if self.context.device == "cpu":
            found["not_a_gpu"] = True
        else:
            found["clocks_before"] = environment.smi()
        self._common = {"commit": found["software"]["commit"]}
        self.add("run", found)
        self.stage("environment", [plan.environment()], self.at(_CHECKED), alone=True)
        told = summary.merged(self.records, "environment")
        self.add("run", {k: told[k] for k in ("machine", "limits", "peers", "absent", "backends") if k in told})
        if "machine" in told:
            self._common["device"] = told["machine"]["name"]
        known: Mapping[str, str] = told.get("backends", {})
        able = tuple(n for n, status in known.items() if status == "available" and n not in ("cpu", "reference"))
        self.context = replace(self.context, backends=able, limits=told.get("limits", {}))
        for name, status in known.items():
            if status != "available":
                self.log(f"backend {name}: {status}")

    def work(self, sections: Sequence[str]) -> None:
        """Runs the sections."""
        options = {"quick": self.context.quick, "tiny": self.context.tiny}
        timed = plan.timings(**options, device=self.context.device) if "speed" in sections else []
        if not self.context.backends:
            self.say("no backend of ours can run here: only the reference is checked")
            timed = []
        searched = self._candidates() if "search" in sections and "triton" in self.context.backends else []
        checked = plan.checks([*self.context.backends, "reference"], **options) if "numerics" in sections else []
        # The interpreter compiles nothing.
        ahead = plan.warmings(timed) if self.context.device != "cpu" else []
        self.stage("checking and compiling", [*ahead, *checked, *searched], self.at(_CHECKED), alone=False)
        with environment.Sampler() as sampler:
            self.stage("timing", timed, self.at(_TIMED), alone=True)
            self.stage("timing again, without peers", self._alone(timed), self.at(1.0), alone=True)
        if sampler.summary():
            self.add("run", {"clocks_during": sampler.summary()})
        self.stage("tile search", self._chosen(searched), self.at(1.0), alone=True)
        self.stage("timing the rest", self._rest("speed", "time"), self.at(1.0), alone=True)
        self.stage("checking the rest", self._rest("numerics"), self.at(1.0), alone=False)

    def _rest(self, section: str, kind: str = "") -> list[Job]:
        """Returns what was dropped of a section, if there is time for any of it."""
        found = [job for job in self._left.values() if job.section == section and kind in ("", job.kind)]
        # A process takes a while to start.
        return found if self.at(1.0) - time.monotonic() > 10.0 + min((job.least for job in found), default=0.0) else []

    def _candidates(self) -> list[Job]:
        capability = summary.merged(self.records, "run").get("machine", {}).get("capability", "0.0")
        try:
            return plan.candidates(int(capability.replace(".", "")), quick=self.context.quick, tiny=self.context.tiny)
        except Exception as problem:  # no other section depends on it
            self.failed = True
            self.log(_trace(problem))
            self.add(
                "outcome", {"job": "candidates", "status": "failed", "error": f"{type(problem).__name__}: {problem}"}
            )
            return []

    def _alone(self, timed: Sequence[Job]) -> list[Job]:
        """Returns what failed as jobs without peers: it may have been one of these."""
        broken = {r["job"] for r in self.records if r["section"] == "outcome" and r["status"] != "dropped"}
        return [
            replace(job, name=f"{job.name} (alone)", parameters={**job.parameters, "peers": []})
            for job in timed
            if job.name in broken
        ]

    def _chosen(self, searched: Sequence[Job]) -> list[Job]:
        """Returns a job for each search, that times the candidates which were right."""
        right: dict[str, list[list[int]]] = {}
        for record in self.records:
            if record["section"] == "search" and record.get("ok"):
                right.setdefault(record["search"], []).append(record["tile"])
        found: dict[str, Job] = {}
        for job in searched:
            name = job.name.removeprefix("candidate ").rsplit(" ", 1)[0]
            if name in right and name not in found:
                given = {"search": job.parameters["search"], "tiles": right[name]}
                found[name] = Job(f"search {name}", "search", "time", given, importance=job.importance, least=5.0)
        return list(found.values())

    def finish(self) -> str:
        """Writes the plots, the table and the summary; returns the latter."""
        last: Record = {"seconds": self.seconds()}
        if self.context.device != "cpu":
            last["clocks_after"] = environment.smi()
        self.add("run", last)
        for name in self._left:
            self.add("outcome", {"job": name, "status": "dropped", "error": "out of time"})
        tables = [r for r in self.records if r["section"] == "search" and "literal" in r]
        if tables:
            (self.folder / TILES).write_text(json.dumps(tables, indent=1) + "\n", encoding="utf-8")
        first = summary.merged(self.records, "run")
        title = f"{first.get('device', 'unknown device')}, {first.get('software', {}).get('commit', 'unknown')}"
        try:
            for path in pictures.draw(self.records, first.get("limits", {}), title, self.folder):
                self.log(f"wrote {path}")
        except ImportError:
            self.log("no plots: matplotlib is not installed")
        except Exception as problem:  # the figures are written already
            self.failed = True
            self.add("outcome", {"job": "plots", "status": "failed", "error": f"{type(problem).__name__}: {problem}"})
        return self.write_summary()

    def close(self) -> None:
        self._spare.give(None)
        self._results.close()
        self._log.close()


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns 0, 1 if anything was wrong or failed, or 2 where there is no GPU."""
    given = _parser().parse_args(arguments)
    if given.device != "cpu" and not torch.cuda.is_available():
        print("gpu.py: there is no CUDA device here; --device cpu tests the command in Triton's interpreter")
        return 2
    given.out.mkdir(parents=True, exist_ok=True)
    tiny = given.device == "cpu"
    context = Context(
        device=given.device,
        quick=given.quick,
        tiny=tiny,
        seconds=0.02 if tiny else _QUICK_SECONDS if given.quick else _SECONDS,
        inject=dict(pair.split("=", 1)[::-1] for pair in given.inject),
    )
    budget = given.budget or (_QUICK_BUDGET if given.quick else _BUDGET)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    run = Run(given.out, context, budget, given.lanes or max(1, min(cores - 2, _MOST_LANES)))
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        try:
            run.begin(given.commit)
            run.work(given.sections)
        except KeyboardInterrupt:
            run.failed = True
            run.add("outcome", {"job": "the run", "status": "stopped", "error": "stopped from outside"})
        except Exception as problem:  # what was found is worth a summary
            run.failed = True
            run.log(_trace(problem))
            run.add("outcome", {"job": "the run", "status": "failed", "error": f"{type(problem).__name__}: {problem}"})
        text = run.finish()
    finally:
        signal.signal(signal.SIGTERM, before)
        run.close()
    print(f"\n{text}\n{given.out}/: {', '.join(sorted(path.name for path in given.out.iterdir()))}", flush=True)
    wrong = any(r["section"] == "numerics" and r.get("ok") is False for r in run.records)
    wrong |= any(r["section"] == "speed" and r.get("who") == "fastattn" and "note" in r for r in run.records)
    return 1 if wrong or run.failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python benchmarks/gpu.py",
        description="Checks and times every kernel on this GPU, searches better tiles, and sums it up.",
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for results.jsonl, summary.md, tiles.json, plots"
    )
    parser.add_argument("--quick", action="store_true", help="about 3 minutes: fewer rows, dtypes, repeats and peers")
    parser.add_argument("--budget", type=float, help=f"seconds in all ({_BUDGET:.0f}, quick {_QUICK_BUDGET:.0f})")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="only these")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, or cpu to test the command itself")
    parser.add_argument("--commit", help="what to write where the checkout has no history")
    parser.add_argument("--lanes", type=int, help="processes that check and compile at a time (one a core)")
    # What is to go wrong: "die=JOB", "raise=JOB", "hang=JOB" or "wrong=CANDIDATE"; for the tests.
    parser.add_argument("--inject", action="append", default=[], help=argparse.SUPPRESS)
    return parser


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def _trace(problem: BaseException) -> str:
    import traceback

    return "".join(traceback.format_exception(problem))


if __name__ == "__main__":
    sys.exit(main())
