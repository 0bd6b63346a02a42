"""The summary of a run: a function of its records, short enough for the end of a log."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from fastattn.tools.bench.gpu import targets
from fastattn.tools.bench.gpu.jobs import Record
from fastattn.tools.bench.measuring import OURS

# Characters: what comes last in a log is often all that is kept of it.
MOST = 7500
_FAILURES, _WORD = 12, 150


def text(records: Sequence[Record]) -> str:
    """Returns the summary as Markdown; what does not fit is counted instead of listed."""
    for rows in (60, 40, 25, 12, 4):
        found = "\n\n".join(filter(None, _parts(records, rows)))
        if len(found) <= MOST:
            break
    return found[:MOST].rstrip() + "\n"


def _parts(records: Sequence[Record], rows: int) -> list[str]:
    first = merged(records, "run")
    commit = first.get("software", {}).get("commit", "unknown")
    head = f"# fastattn on {first.get('device', 'an unknown device')}, commit {commit}"
    if first.get("not_a_gpu"):
        head += "\n\nNo GPU: Triton's interpreter on tiny shapes. This tests the command and says nothing of speed."
    return [
        head,
        _environment(first),
        _numerics(records, rows),
        _speed(records, first.get("limits", {}), rows),
        _search(records),
        _failures(records),
    ]


def merged(records: Sequence[Record], section: str) -> Record:
    """Returns all that the records of a section say, the later over the earlier."""
    found: Record = {}
    for record in records:
        if record.get("section") == section:
            found |= record
    return found


def _environment(first: Record) -> str:
    software = first.get("software", {})
    lines = []
    device = {k: v for k, v in first.get("machine", {}).items() if k != "name"}
    if device:
        lines.append("; ".join(f"{k} {v}" for k, v in device.items()))
    lines.append("; ".join(f"{k} {v}" for k, v in software.items() if k not in ("commit", "system", "cpu")))
    limits = first.get("limits", {})
    if limits:
        lines.append(
            f"copy {limits['copy']:.0f} GB/s read and written, bf16 product {limits['matmul']:.0f} TFLOP/s (measured)"
        )
    for name in ("before", "during", "after"):
        if first.get(f"clocks_{name}"):
            lines.append(f"{name}: " + "; ".join(f"{k} {v}" for k, v in first[f"clocks_{name}"].items()))
    if first.get("peers"):
        lines.append("peers: " + ", ".join(first["peers"]))
    if first.get("absent"):
        lines.append("not here: " + ", ".join(first["absent"]))
    if first.get("seconds"):
        lines.append(f"took {first['seconds']:.0f} s")
    return "\n".join(f"- {line}" for line in lines if line)


def _numerics(records: Sequence[Record], rows: int) -> str:
    found = [r for r in records if r.get("section") == "numerics" and "ok" in r]
    if not found:
        return "## Numerics\n\nNothing was checked."
    parts = ["## Numerics"]
    counts: dict[tuple[str, str], Counter[str]] = {}
    for record in found:
        verdict = "refused" if record["ok"] is None else "pass" if record["ok"] else "FAIL"
        counts.setdefault((record["backend"], record["op"]), Counter())[verdict] += 1
    table = [
        [backend, op, str(c["pass"]), str(c["FAIL"] or ""), str(c["refused"] or "")]
        for (backend, op), c in counts.items()
    ]
    parts.append(_table(["backend", "op", "pass", "FAIL", "refused"], table))
    failed = [r for r in found if r["ok"] is False]
    for record in failed[: min(rows, _FAILURES)]:
        said = [record["backend"], record["op"], record["row"], record["dtype"], record["direction"], record["check"]]
        why = (
            record.get("note")
            or f"{record.get('tensor', 'error')} {_number(record.get('error'))}, allowed {_number(record.get('bound'))}"
        )
        parts.append(f"- FAIL {', '.join(filter(None, said))}: {why}"[: 2 * _WORD])
    if len(failed) > min(rows, _FAILURES):
        parts.append(f"- and {len(failed) - min(rows, _FAILURES)} more failures in results.jsonl")
    return "\n\n".join(parts[:2]) + "".join("\n" + part for part in ["", *parts[2:]])


def _speed(records: Sequence[Record], limits: dict[str, float], rows: int) -> str:
    groups = targets.grouped(records)
    if not groups:
        return "## Speed\n\nNothing was timed."
    parts = ["## Speed (bfloat16)"]
    found = list(targets.reached(records, limits))
    if found:
        table = [_target(r) for r in found]
        parts.append(_table(["target", "row", "wanted", "measured", "x best peer", "memory", ""], table[:rows]))
        if len(found) > rows:
            parts.append(f"and {len(found) - rows} more rows in results.jsonl")
    told = {(r.aim.op, r.row, r.aim.direction, "bfloat16") for r in found}
    others = []
    for key, group in groups.items():
        if key in told or OURS not in group:
            continue
        op, row, direction, dtype = key
        ours, peer = group[OURS], targets.best_peer(group)
        ratio = "" if peer is None else f"{group[peer]['median_us'] / ours['median_us']:.2f} ({peer})"
        others.append([f"{op} {row}", direction, dtype, _rate(ours["figure"], ours["unit"]), ratio])
    if others and rows > 12:
        parts.append("Other rows:")
        parts.append(_table(["row", "direction", "dtype", "measured", "x best peer"], others[:rows]))
    elif others:
        parts.append(f"{len(others)} other rows are in results.jsonl.")
    candidates = [
        f"{row}, {direction}, {dtype}: {name} {group[OURS]['median_us'] / group[name]['median_us']:.2f}"
        for (_, row, direction, dtype), group in groups.items()
        for name in group
        if OURS in group and name != OURS and name.startswith(OURS)
    ]
    if candidates:
        parts.append(f"Candidates, x as fast as the default: {'; '.join(candidates[:rows])}.")
    return "\n\n".join(parts)


def _target(found: targets.Reached) -> list[str]:
    ratio = "" if found.ratio is None else f"{found.ratio:.2f} ({found.peer})"
    memory = ""
    if found.aim.op in ("linear_cross_entropy", "feed_forward") and found.memory is not None:
        memory = f"{found.memory / 1e9:.2f} GB"
        if found.peer_memory is not None:
            memory += f", peer {found.peer_memory / 1e9:.2f}"
    share = "" if found.share is None else f" ({found.share:.0%})"
    name = found.aim.name
    measured = _rate(found.figure, found.unit) + share
    return [name, found.row, targets.wanted(found.aim), measured, ratio, memory, "met" if found.met else "missed"]


def _search(records: Sequence[Record]) -> str:
    found = [r for r in records if r.get("section") == "search"]
    if not found:
        return ""
    results = [r for r in found if "literal" in r]
    bad = Counter(str(r["note"]).split(":")[0] for r in found if r.get("ok") is False)
    checked = sum("ok" in r for r in found)
    parts = [
        f"## Tile search: {checked} candidates, " + (", ".join(f"{n} {what}" for what, n in bad.items()) or "all right")
    ]
    lines = []
    for r in results:
        gain = "the one there does not run" if r["gain"] is None else f"x {r['gain']:.3f}"
        lines.append(f"{r['literal']}  # {gain}, {r['direction']} of {r['row']}")
    if lines:
        parts.append("```python\n" + "\n".join(lines) + "\n```")
    return "\n\n".join(parts)


def _failures(records: Sequence[Record]) -> str:
    outcomes = [r for r in records if r.get("section") == "outcome"]
    broken = [r for r in outcomes if r["status"] != "dropped"]
    dropped = [r["job"] for r in outcomes if r["status"] == "dropped"]
    untimed = [r for r in records if r.get("section") == "speed" and r.get("who") == OURS and r.get("note")]
    lines = [f"- {r['job']}: {r['status']}: {r['error']}"[:_WORD] for r in broken]
    lines += [
        f"- not timed: {r['op']} {r['row']}, {r['direction']}, {r['dtype']}: {r['note']}"[:_WORD] for r in untimed
    ]
    parts = ["## What went wrong"]
    parts += lines[:_FAILURES] or ["Nothing."]
    if len(lines) > _FAILURES:
        parts.append(f"- and {len(lines) - _FAILURES} more; log.txt has their traces")
    if dropped:
        parts.append(
            f"- dropped for lack of time: {len(dropped)} jobs, the first of them: {', '.join(dropped[:5])}"[: 2 * _WORD]
        )
    return parts[0] + "\n\n" + "\n".join(parts[1:])


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _number(value: Any) -> str:
    return f"{value:.1e}" if isinstance(value, int | float) else str(value)


def _rate(value: float, unit: str) -> str:
    return f"{value:.3g} {unit}" if value < 1000 else f"{value:.0f} {unit}"
