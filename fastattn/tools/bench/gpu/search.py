"""The tile search: every candidate is compiled and compared with float64, then those that are right are timed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from fastattn.ops._dispatch import use_backend
from fastattn.tools.bench import families
from fastattn.tools.bench.case import Case
from fastattn.tools.bench.gpu.jobs import Context, Emit, Job
from fastattn.tools.bench.measuring import TOLERANCE
from fastattn.tools.measure import time_in_turns

Tile = tuple[int, ...]

# Of a multiprocessor of an H200, in bytes: what certainly fits no GPU is not tried.
_SHARED = 227 << 10
# 32-bit registers that accumulators of a thread may take; more spill.
_REGISTERS = 224
# A candidate must be faster by this to be worth a change.
_WORTH = 0.02


@dataclass(frozen=True)
class Search:
    """A place in a table, and the row that its tile is chosen by.

    Attributes:
        table: "FORWARD", "BACKWARD_KEYS", "BACKWARD_QUERIES" or "DECODE" of ``kernels/tiles.py``, or "TILES" of
            ``kernels/product.py``.
        key: of the table's place: bytes an element, then head_dim, or numbers held for an element.
        family: of the row.
        row: its name.
        shape: it itself.
        direction: that is timed.
        few: the same with fewer queries, keys or tokens, for the check.
    """

    table: str
    key: tuple[int, int]
    family: str
    row: str
    shape: Any
    direction: str
    few: Any

    @property
    def name(self) -> str:
        return f"{self.table} {self.key} {self.row}"

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, values: dict[str, Any]) -> Search:
        return cls(**{**values, "key": tuple(values["key"])})


def searches(*, quick: bool, tiny: bool) -> Iterator[Search]:
    """Yields the places to search, the most important first."""
    if tiny:
        shape = {"batch": 1, "heads": [2, 1], "seq_len": [20, 20], "head_dim": 16, "causal": True}
        yield Search("FORWARD", (2, 256), "attention", "tiny", shape, "forward", shape)
        yield Search("TILES", (2, 2), "feed_forward", "tiny", [20, 16, 40, "gelu"], "forward", [20, 16, 40, "gelu"])
        return
    rows = dict(families.rows("attention", device="cuda"))
    short = {name: {**row, "seq_len": [512, 512]} for name, row in rows.items()}
    yield Search("FORWARD", (2, 128), "attention", "d128-8k", rows["d128-8k"], "forward", short["d128-8k"])
    if quick:
        return
    yield Search("FORWARD", (2, 64), "attention", "d64-full", rows["d64-full"], "forward", short["d64-full"])
    for table in ("BACKWARD_KEYS", "BACKWARD_QUERIES"):
        for dim, row in ((128, "d128-8k"), (64, "d64-full")):
            yield Search(table, (2, dim), "attention", row, rows[row], "backward", short[row])
    decode = dict(families.rows("decode", device="cuda"))["gpu"]
    yield Search("DECODE", (2, 128), "decode", "gpu", decode, "forward", {**decode, "cache": 1024})
    yield Search("FORWARD", (2, 256), "attention", "d256-8k", rows["d256-8k"], "forward", short["d256-8k"])
    big = [8192, 4096, 16384, "gelu"]
    yield Search("TILES", (2, 2), "feed_forward", "gelu", big, "forward", [512, *big[1:]])


def candidates(search: Search, *, quick: bool, tiny: bool) -> list[Tile]:
    """Returns the tiles to try: those of ``tiles.candidates`` where the kernels say so themselves, else a grid."""
    if tiny:
        return [(16, 16, 4, 1), (32, 16, 4, 1)] if search.table != "TILES" else [(16, 32, 16, 4, 1)]
    if search.table == "TILES":
        return [
            (rows, columns, depth, warps, stages)
            for rows in (64, 128)
            for columns in (64, 128, 256)
            for depth in (32, 64)
            for warps in (4, 8)
            for stages in (3, 4)
            if stages * (rows + search.key[1] * columns) * depth * 2 <= _SHARED
            and rows * columns * max(search.key[1] - 1, 1) // (32 * warps) <= _REGISTERS
        ]
    found = _grid(search)
    return found[:8] if quick else found


def _grid(search: Search) -> list[Tile]:
    """Returns tiles that may fit shared memory and registers, the likely ones first."""
    dim = search.key[1]
    if search.table == "DECODE":
        return [(16, keys, warps, stages) for keys in (64, 32, 128) for warps in (4, 8) for stages in (3, 4, 2)]
    found: list[Tile] = []
    for rows in (128, 64):
        for columns in (64, 128, 32):
            for warps in (8, 4):
                for stages in (3, 2, 4):
                    held, streamed = (rows, columns) if search.table != "BACKWARD_KEYS" else (columns, rows)
                    # Keys and values, or queries and their gradients, are on their way; two sums in the backward.
                    sums = 1 if search.table != "BACKWARD_KEYS" else 2
                    shared = 2 * dim * (held * (1 if search.table == "FORWARD" else 2) + 2 * streamed * stages)
                    registers = (sums * held * dim + 2 * rows * columns) // (32 * warps)
                    if shared <= _SHARED and registers <= _REGISTERS:
                        found.append((rows, columns, warps, stages))
    return found


def _table(search: Search, device: str) -> tuple[dict[Any, Any], Any, Any]:
    """Returns a table's part for this GPU, the key of the place there, and how a tile is made."""
    from fastattn.kernels import product, tiles
    from fastattn.kernels.launch import Tile, architecture

    table: dict[int, dict[Any, Any]] = product.TILES if search.table == "TILES" else getattr(tiles, search.table)
    known = table[max(a for a in table if a <= architecture(torch.device(device)))]
    dim = search.key[1]
    key = min((k for k in known if k[0] == search.key[0] and k[1] >= dim), key=lambda k: k[1])
    return known, key, product.ProductTile if search.table == "TILES" else Tile


@contextmanager
def forced(search: Search, tile: Sequence[int] | None, device: str) -> Iterator[None]:
    """Lets the place of a search hold one tile alone, so that it or none is launched; None leaves what is there."""
    known, key, make = _table(search, device)
    before = known[key]
    if tile is not None:
        # A product's tile for few rows stays what it is.
        known[key] = (before[0], make(*tile)) if search.table == "TILES" else (make(*tile),)
    try:
        yield
    finally:
        known[key] = before


def _case(search: Search, shape: Any, device: str) -> Case:
    found = families.FAMILIES[search.family](search.row, shape, torch.bfloat16, device)
    return next(case for case in found if case.direction in (search.direction, _stand_in(search, device)))


def _stand_in(search: Search, device: str) -> str:
    return "forward + backward" if search.direction == "backward" and device == "cpu" else search.direction


def _wrong(case: Case, search: Search, tile: Sequence[int] | None, context: Context) -> str | None:
    """Returns why a tile is out of the question; None if it computes what it should."""
    try:
        with forced(search, tile, context.device), use_backend("triton"):
            error = case.error()
    except Exception as problem:
        if context.device != "cpu":
            torch.cuda.synchronize()  # raises where the GPU is lost to this process
        return f"does not run: {type(problem).__name__}: {problem}".strip().splitlines()[0][:200]
    return None if error <= TOLERANCE[torch.bfloat16] else f"wrong: off by {error:.0e}"


def _check(job: Job, context: Context, emit: Emit) -> None:
    """Compiles a candidate and compares it with float64; the kernel is then on the disk."""
    search, tile = Search.of(job.parameters["search"]), job.parameters["tile"]
    case = _case(search, search.few, context.device)
    note = _wrong(case, search, tile, context)
    if context.inject.get(job.name) == "wrong":
        note = "wrong: it was to be"
    emit({"search": search.name, "tile": tile, "ok": note is None, **({"note": note} if note else {})})


def _time(job: Job, context: Context, emit: Emit) -> None:
    """Times the candidates in turns, beside what the table holds now, and emits the better table."""
    search, tiles = Search.of(job.parameters["search"]), [tuple(t) for t in job.parameters["tiles"]]
    case = _case(search, search.shape, context.device)
    known, key, _ = _table(search, context.device)
    now = tuple(known[key][1 if search.table == "TILES" else 0])
    kept: list[Tile] = []
    for tile in [now, *(tile for tile in tiles if tile != now)]:
        # What is there is tried as it is, with its smaller ones behind it.
        note = _wrong(case, search, None if tile == now else tile, context)
        if note is None:
            kept.append(tile)
        else:
            emit({"search": search.name, "tile": list(tile), "ok": False, "note": note})
    if not kept:
        return

    def run(tile: Tile) -> Any:
        with forced(search, None if tile == now else tile, context.device), use_backend("triton"):
            return case.ours()

    timings = time_in_turns(
        [partial(run, tile) for tile in kept],
        budget=0.25 * context.seconds * len(kept),
        min_repeats=5,
        patience=1.5,
        device=context.device,
    )
    times = {tile: timing.median for tile, timing in zip(kept, timings, strict=True)}
    best = min(times, key=lambda tile: times[tile])
    if now in times and times[best] > (1.0 - _WORTH) * times[now]:
        best = now
    emit(
        {
            "search": search.name,
            "table": search.table,
            "key": list(search.key),
            "row": search.row,
            "direction": search.direction,
            "now": list(now),
            "best": list(best),
            "gain": times[now] / times[best] if now in times else None,
            "times_us": {"x".join(map(str, tile)): time for tile, time in sorted(times.items(), key=lambda t: t[1])},
            "literal": _literal(search, known, key, best, context.device),
        }
    )


def _literal(search: Search, known: dict[Any, Any], key: Any, best: Tile, device: str) -> str:
    """Returns the place of the table as one writes it, the best tile first and what was there behind it."""
    from fastattn.kernels.launch import architecture

    before = list(known[key])
    if search.table == "TILES":
        entries = [before[0], type(before[1])(*best)]
        make = "ProductTile"
    else:
        make, first = "Tile", type(before[0])(*best)
        entries = [first, *(tile for tile in before if tuple(tile) != best)]
    held = ", ".join(f"{make}({', '.join(map(str, tile))})" for tile in entries)
    return f"{search.table}[{architecture(torch.device(device))}][{key}] = ({held}{',' if len(entries) == 1 else ''})"


KINDS: dict[str, Callable[[Job, Context, Emit], None]] = {"check": _check, "time": _time}
