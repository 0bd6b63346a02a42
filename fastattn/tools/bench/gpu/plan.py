"""Which jobs a run has, and how important each is: the lower, the sooner it is begun, and what comes last is dropped
when time is short."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from fastattn.tools import op_cases
from fastattn.tools.bench import families
from fastattn.tools.bench.gpu import numerics, search
from fastattn.tools.bench.gpu.jobs import Job

# Rows of the grid that a quick run times.
_QUICK_ROWS = {
    "attention": ("d64-full", "d128-8k", "d128-16k", "bias-grad"),
    "decode": ("long", "gpu"),
    "packed": ("packed-mixed", "packed-decode"),
    "paged": ("paged-16",),
    "softmax": ("65536x4096", "8192x32768", "1024x262144"),
    "feed_forward": ("8192x4096x16384xgelu",),
    "linear_cross_entropy": ("8192x4096x131072",),
    "rotary": ("4x32x8x8192x128",),
    "embedding": ("8x8192x131072x4096",),
}
# Of a family's first row.
_IMPORTANCE = {
    "attention": 0.0,
    "decode": 1.0,
    "packed": 1.2,
    "paged": 1.3,
    "linear_cross_entropy": 1.5,
    "feed_forward": 1.8,
    "softmax": 2.0,
    "rotary": 2.6,
    "embedding": 2.6,
}
_FORWARD, _BOTH, _BACKWARD = "forward", "forward + backward", "backward"
_ROW_OPS = ("softmax", "log_softmax", "layer_norm", "rms_norm")
_TINY_ROW: dict[str, Any] = {"batch": 1, "heads": [2, 1], "seq_len": [20, 20], "head_dim": 16, "causal": True}
_TINY: dict[str, list[tuple[str, Any]]] = {
    "attention": [("tiny", _TINY_ROW)],
    "decode": [("tiny", {"batch": 1, "heads": [2, 1], "cache": 33, "head_dim": 16})],
    "packed": [("tiny", {"lengths": [9, 4], "heads": [2, 1], "head_dim": 16, "causal": True})],
    "paged": [("tiny", {"batch": 2, "heads": [2, 1], "cache": 33, "page_size": 16, "head_dim": 16})],
    "softmax": [("3x70", [3, 70])],
    "linear_cross_entropy": [("5x16x40", [5, 16, 40])],
    "feed_forward": [("5x16x40xgelu", [5, 16, 40, "gelu"])],
    "rotary": [("1x2x1x7x16", [1, 2, 1, 7, 16])],
    "embedding": [("2x5x9x16", [2, 5, 9, 16])],
}  # fmt: skip
# Masks and biases that between them reach every branch; the others come later.
_FIRST_MASKS, _FIRST_BIASES = ("none", "causal & lengths", "all of them"), ("", "dense bias", "relative bias")


def environment() -> Job:
    return Job("environment", "environment", "environment", limit=90.0)


def checks(backends: Sequence[str], *, quick: bool, tiny: bool) -> list[Job]:
    """Returns the jobs of numerics."""
    found: list[Job] = []
    for backend in backends:
        found += _rules(backend, quick=quick, tiny=tiny)
        if backend == "reference":
            continue
        raced = ("d128-causal",) if tiny else numerics.RACED
        for row in raced:
            given = {"row": row, "backend": backend}
            found.append(Job(f"races {row} {backend}", "numerics", "races", given, importance=1.5, limit=180.0))
        for op in ("softmax",) if tiny else numerics.RACED_OPS:
            given = {"op": op, "backend": backend}
            found.append(Job(f"races of {op} {backend}", "numerics", "row-races", given, importance=2.5))
        for kind in ("dropout", "poison", "weights", "packed", "paged"):
            found.append(Job(f"{kind} {backend}", "numerics", kind, {"backend": backend}, importance=2.0))
        if backend == "triton" and not tiny:
            found += _specialised()
        if not (quick or tiny):
            found.append(Job(f"huge {backend}", "numerics", "huge", {"backend": backend}, importance=4.0, limit=180.0))
    return found


def _specialised() -> Iterator[Job]:
    """Yields the checks of the kernel that ``hopper.py`` launches, which no table of tiles names before it is known to
    pay; where it cannot run, they are the plain kernel's."""
    from fastattn.kernels.launch import Tile

    given: dict[str, Any] = {"backend": "triton", "tile": list(Tile(128, 128, 8, 2, specialised=True))}
    for row in ("d64-full", "d128-causal", "d128-gqa"):
        name = f"races {row} triton specialised"
        yield Job(name, "numerics", "races", {**given, "row": row}, importance=1.6, limit=180.0)
    yield Job("poison triton specialised", "numerics", "poison", given, importance=2.0)
    # Without a mask and causal, d64 and d128.
    for index in (0, 1, 4, 5):
        rule = {**given, "op": "large", "index": index, "dtype": "bfloat16"}
        yield Job(f"large triton specialised #{index}", "numerics", "rule", rule, importance=1.7)


def _rules(backend: str, *, quick: bool, tiny: bool) -> Iterator[Job]:
    """Yields a job for each case of `fastattn verify`, each larger one and each dtype."""
    for op in ["rms_norm", "large"] if tiny else [*op_cases.FAMILIES, "large"]:
        cases = numerics.large_cases(tiny) if op == "large" else op_cases.cases([op])
        for index, case in enumerate(cases):
            first = case.op != "attention" or (case.mask in _FIRST_MASKS and case.variant in _FIRST_BIASES)
            if tiny and op != "large" and index > 0:
                break
            for dtype in ("bfloat16",) if tiny else ("bfloat16", "float16", "float32"):
                if quick and (dtype != "bfloat16" or backend == "reference" or not (first or op == "large")):
                    continue
                if op == "large" and (dtype == "float32" or backend == "reference"):
                    continue
                importance = (1.0 if first else 3.0) + {"bfloat16": 0.0, "float16": 1.0, "float32": 2.0}[dtype]
                if op == "large":
                    importance = 1.2 if dtype == "bfloat16" else 2.2
                if backend == "reference":
                    importance += 0.6
                label = ", ".join(filter(None, [case.mask, case.variant]))
                words = ["verify", op, case.op if op == "large" else "", label, dtype, backend]
                name = " ".join(filter(None, words))
                given = {"op": op, "index": index, "dtype": dtype, "backend": backend}
                yield Job(f"{name} #{index}", "numerics", "rule", given, importance=importance)


def timings(*, quick: bool, tiny: bool, device: str) -> list[Job]:
    """Returns the jobs that time rows."""
    found = []
    for family in _IMPORTANCE:
        rows = _TINY[family] if tiny else families.rows(family, _QUICK_ROWS[family] if quick else None, device)
        for at, (row, shape) in enumerate(rows):
            for job in _row(family, row, shape, at, quick=quick, tiny=tiny):
                found.append(job)
    return found


def _row(family: str, row: str, shape: Any, at: int, *, quick: bool, tiny: bool) -> Iterator[Job]:
    """Yields a row's jobs: bfloat16 beside everybody, and attention in float16 beside what needs no compiling."""
    base = _IMPORTANCE[family]
    given: dict[str, Any] = {"family": family, "row": row, "shape": shape, "dtype": "bfloat16"}
    given |= {"directions": [_FORWARD, _BOTH, _BACKWARD], "compiled": not (quick or tiny)}
    if tiny:
        given["peers"] = ["torch SDPA", "torch eager"]
    if tiny and family == "packed":
        given["directions"] = [_FORWARD]
    importance = base + 0.05 * at
    if family == "softmax":
        for k, op in enumerate(_ROW_OPS):
            if not quick or op in ("softmax", "rms_norm"):
                yield _timing({**given, "op": op}, importance + 0.01 * k)
        return
    yield _timing(given, importance)
    if family == "attention" and not (quick or tiny):
        yield _timing(
            {**given, "dtype": "float16", "directions": [_FORWARD, _BOTH], "compiled": False}, importance + 3.0
        )


def _timing(given: dict[str, Any], importance: float) -> Job:
    words = ["time", given["family"], given.get("op"), given["row"], given["dtype"]]
    return Job(" ".join(filter(None, words)), "speed", "time", given, importance=importance, limit=90.0, least=4.0)


def warmings(jobs: Sequence[Job]) -> list[Job]:
    """Returns a job for each that times, which has all of its kernels compiled beforehand."""
    return [
        Job(job.name.replace("time", "warm", 1), "speed", "warm", job.parameters, 0.1 * job.importance, limit=240.0)
        for job in jobs
    ]


def candidates(architecture: int, *, quick: bool, tiny: bool) -> list[Job]:
    """Returns the jobs that check each candidate of the tile search on an architecture."""
    found = []
    for k, one in enumerate(search.searches(quick=quick, tiny=tiny)):
        for at, tile in enumerate(search.candidates(one, architecture, quick=quick, tiny=tiny)):
            given = {"search": one.as_json(), "tile": list(tile)}
            name = f"candidate {one.name} {'x'.join(map(str, tile))}"
            importance = 2.8 + 0.1 * k + 0.01 * at
            found.append(Job(name, "search", "check", given, importance=importance, limit=60.0))
    return found
