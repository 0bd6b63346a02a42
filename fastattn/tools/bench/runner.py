"""``fastattn bench``: every answer is checked against float64, then timed beside its peers, in turns, in one
process."""

from __future__ import annotations

import json
import os
import sys
import textwrap
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from fastattn.ops._dispatch import check_name
from fastattn.tools import info
from fastattn.tools.bench import limits, page, peers, report
from fastattn.tools.bench.families import FAMILIES, cases, rows
from fastattn.tools.bench.measuring import AUTOMATIC, Line, Settings, measure
from fastattn.tools.table import heading

RESULTS = "results.jsonl"
# In operations: what a quick run still takes a second for.
_QUICK_WORK = 2e10
_QUICK_BUDGET, _BUDGET = 0.3, 1.5  # seconds for each of those that are timed
# In cores: what other processes may take before the run says so.
_DISTURBED = 0.1
_VERSIONS = ("onnxruntime", "openvino", "ctranslate2", "numpy")


def run(
    families: Sequence[str] = (),
    *,
    names: Sequence[str] | None = None,
    dtypes: Sequence[torch.dtype] = (torch.float32,),
    device: str = "cpu",
    backends: Sequence[str] | None = None,
    peer_names: Sequence[str] | None = None,
    quick: bool = False,
    out: Path | None = None,
) -> int:
    """Prints the tables of each family; returns 0, or 1 if an answer was wrong.

    Args:
        families: tables of the grid; all if empty or ["all"].
        names: rows; all if None.
        dtypes: of the inputs.
        device: "cpu" or a CUDA device.
        backends: ours to time side by side, "auto" being each call's own choice, which is the default.
        peer_names: who else is timed; everybody who can run here if None.
        quick: leaves out what takes long and times the rest more briefly.
        out: folder that gets results.jsonl, to which the lines are appended, and report.html with its plots.

    Raises:
        ValueError: a family, row, backend or peer is unknown, or there is no such device.
    """
    families = list(FAMILIES) if not families or "all" in families else list(dict.fromkeys(families))
    planned = sum(len(rows(family, names, device)) for family in families) * len(dtypes)
    if not planned:
        raise ValueError(f"no row of {', '.join(families)} has a name in {list(names or ())}")
    backends = [b if b == AUTOMATIC else check_name(b) for b in dict.fromkeys(backends or [AUTOMATIC])]
    _check_device(device)
    wanted = peers.chosen(peer_names, quick=quick, device=device)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)

    start = _first_line(wanted, device)
    print(_environment(start), flush=True)
    found_limits = limits.Limits(**start["limits"]) if start.get("limits") else None
    ready = [peer for peer in wanted if peer.name not in start["not_here"]]
    settings = Settings(backends, ready, device, _QUICK_BUDGET if quick else _BUDGET, found_limits)
    lines = [start]
    load = _Load()
    if out is not None:
        _append(out / RESULTS, [start])
    # On a terminal alone: a log gets the tables.
    with tqdm(total=planned, unit="row", leave=False, disable=not sys.stderr.isatty()) as progress:
        for family in families:
            found: list[Line] = []
            for dtype in dtypes:
                for name, _ in rows(family, names, device):
                    progress.set_description(f"{family} {name}")
                    for case in cases(family, dtype, [name], device):
                        if quick and case.flops > _QUICK_WORK:
                            continue
                        measured = measure(case, dtype, settings)
                        if out is not None:  # at once: a run that is stopped keeps what it has
                            _append(out / RESULTS, measured)
                        found += measured
                    progress.update()
            if found:
                progress.write(f"\n{report.text(found)}")
                sys.stdout.flush()
            lines += found
    lines.append({"other_cores": load.of_others()})
    if out is not None:
        _append(out / RESULTS, lines[-1:])
    if (lines[-1]["other_cores"] or 0.0) > _DISTURBED:
        print(f"\nOther processes kept {lines[-1]['other_cores']:.1f} cores busy meanwhile: the figures are disturbed.")
    for peer, reasons in _left_out(lines).items():
        print("\n" + textwrap.fill(f"{peer} left out of {len(reasons)} rows, e.g. {reasons[0]}", report.WIDTH))
    if out is not None:
        print("\n" + "\n".join(map(str, [out / RESULTS, *page.write(page.read(out / RESULTS), out)])))
        if page.missing():
            print(page.missing())
    return 1 if any(line.get("note") == "WRONG" for line in lines) else 0


class _Load:
    """How many cores other processes kept busy since this was made."""

    def __init__(self) -> None:
        self._start = self._now()

    def of_others(self) -> float | None:
        """Returns the mean number of cores; None where the system does not tell."""
        if self._start is None:
            return None
        now = self._now()
        assert now is not None
        busy, own, elapsed = (b - a for a, b in zip(self._start, now, strict=True))
        return round(max(busy - own, 0.0) / max(elapsed, 1e-9), 2)

    @staticmethod
    def _now() -> tuple[float, float, float] | None:
        """Returns the seconds that all processes have used together, that this one and its children have, and now."""
        try:
            ticks = [int(n) for n in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        except (OSError, ValueError):
            return None
        user, nice, system, _idle, _wait, irq, softirq, steal = ticks
        busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        return busy, sum(os.times()[:4]), time.perf_counter()


def _check_device(device: str) -> None:
    try:
        kind, index = torch.device(device).type, torch.device(device).index or 0
    except RuntimeError:
        kind, index = "", 0
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"device must be 'cpu' or 'cuda', got {device!r}")
    if kind == "cuda":
        if not torch.cuda.is_available():
            raise ValueError("there is no CUDA device here (torch.cuda.is_available() is False): use --device cpu")
        if index >= torch.cuda.device_count():
            raise ValueError(f"there are {torch.cuda.device_count()} CUDA devices, got {device!r}")
        torch.cuda.set_device(index)  # the clock's events are recorded on the current one


def _first_line(wanted: Sequence[peers.Peer], device: str) -> Line:
    """Returns what the figures of a run depend on, and what the machine was measured to do at best."""
    environment = info.environment()
    for name in _VERSIONS:
        try:
            environment[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    if device != "cpu":
        environment["device"] = torch.cuda.get_device_name(device)
    missing = {peer.name: why for peer in wanted if (why := peer.unavailable()) is not None}
    measured = limits.measure() if device == "cpu" else None
    return {
        "environment": environment,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S"),
        "limits": None if measured is None else measured._asdict(),
        "peers": [peer.name for peer in wanted if peer.name not in missing],
        "not_here": missing,
    }


def _environment(line: Line) -> str:
    pairs = [*line["environment"].items()]
    if line["limits"]:
        found = limits.Limits(**line["limits"])
        pairs += [(f"limit: {name}", value) for name, value in found.described().items()]
    pairs.append(("peers", ", ".join(line["peers"]) or "none"))
    pairs += [(f"not here: {name}", why) for name, why in line["not_here"].items()]
    width = max(len(name) for name, _ in pairs)
    text = [heading("environment")]
    for name, value in pairs:
        start, rest = f"  {name.ljust(width)}  ", " " * (width + 4)
        text.append(textwrap.fill(str(value), report.WIDTH, initial_indent=start, subsequent_indent=rest))
    return "\n".join(text)


def _left_out(lines: Sequence[Line]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in lines:
        for peer, reason in line.get("left_out", {}).items():
            found.setdefault(peer, []).append(f"{line['family']} {line['row']}, {line['dtype']}: {reason}")
    return found


def _append(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
