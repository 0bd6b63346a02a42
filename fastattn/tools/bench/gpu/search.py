"""The tile search: every candidate is compiled and compared with float64, then those that are right are timed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from typing import Any

import torch

from fastattn.ops._dispatch import use_backend
from fastattn.spec.attention import attention_call
from fastattn.tools.bench import families
from fastattn.tools.bench.case import Case
from fastattn.tools.bench.gpu.jobs import Context, Emit, Job
from fastattn.tools.bench.measuring import TOLERANCE
from fastattn.tools.measure import time_in_turns

Tile = tuple[int, ...]

# Of a program, in bytes: a product's tile that certainly fits no GPU is not tried.
_SHARED = 227 << 10
# 32-bit accumulators that a thread has registers for.
_REGISTERS = 208
# A candidate must be faster by this to be worth a change.
_WORTH = 0.02
PRODUCT = "product"
# Candidates of a search; of those that matter less, and of a quick run's, half.
_MOST = 20
_LESS = ("forward_rich", "backward_keys_rich", "square")


@dataclass(frozen=True)
class Search:
    """A place in a table, and the row that its tile is chosen by.

    Attributes:
        table: a key of ``tiles.TABLES``, or "product" for ``product.TILES``.
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
        yield Search("forward", (2, 16), "attention", "tiny", shape, "forward", shape)
        yield Search(PRODUCT, (2, 2), "feed_forward", "tiny", [20, 16, 40, "gelu"], "forward", [20, 16, 40, "gelu"])
        return
    rows = dict(families.rows("attention", device="cuda"))
    short = {name: {**row, "seq_len": [512, 512]} for name, row in rows.items()}
    yield Search("forward", (2, 128), "attention", "d128-8k", rows["d128-8k"], "forward", short["d128-8k"])
    if quick:
        return
    yield Search("forward", (2, 64), "attention", "d64-full", rows["d64-full"], "forward", short["d64-full"])
    for dim, row in ((128, "d128-8k"), (64, "d64-full")):
        for table in ("backward_keys", "backward_queries"):
            yield Search(table, (2, dim), "attention", row, rows[row], "backward", short[row])
    decode = dict(families.rows("decode", device="cuda"))["gpu"]
    yield Search("decode", (2, 128), "decode", "gpu", decode, "forward", {**decode, "cache": 1024})
    big = [8192, 4096, 16384, "gelu"]
    yield Search(PRODUCT, (2, 2), "feed_forward", "gelu", big, "forward", [512, *big[1:]])
    yield Search("forward", (2, 256), "attention", "d256-8k", rows["d256-8k"], "forward", short["d256-8k"])
    # Calls with a bias take tiles of their own, and its gradient square ones.
    for table, direction in (("square", "backward"), ("backward_keys_rich", "backward"), ("forward_rich", "forward")):
        for dim in (64,) if table == "square" else (64, 128):
            bias, small = ({**found["bias-grad"], "head_dim": dim} for found in (rows, short))
            yield Search(table, (2, dim), "attention", f"bias-grad d{dim}", bias, direction, small)


def candidates(search: Search, architecture: int, *, quick: bool, tiny: bool) -> list[Tile]:
    """Returns the tiles to try on an architecture, the likely ones first."""
    found: list[Tile]
    if search.table == PRODUCT:
        from fastattn.kernels.product import ProductTile

        made = [(16, 32, 16, 4, 1)] if tiny else _product_tiles(search.key[1])
        # With what else a tile has by default, so that one which the table holds is known as such.
        found = [tuple(ProductTile(*tile)) for tile in made]
    else:
        from fastattn.kernels import hopper, tiles

        query = torch.empty(1, 1, 16, search.key[1], dtype=torch.bfloat16)
        call = attention_call(query, query, query, backend="triton")
        own = len(tiles.choose(tiles.TABLES[search.table], call, architecture))
        known = list(tiles.candidates(search.table, call, architecture))
        known += hopper.tiles_for(call, architecture) if search.table == "forward" else ()
        # Those of the table, then large tiles first: they are what was fast elsewhere.
        likely = sorted(
            known[own:],
            key=lambda t: (not (t.specialised or t.persistent), abs(t.rows - 128), abs(t.columns - 96), -t.num_stages),
        )
        found = [tuple(tile) for tile in (*known[:own], *likely)]
    return found[: 2 if tiny else _MOST // 2 if quick or search.table in _LESS else _MOST]


def _product_tiles(numbers: int) -> Iterator[tuple[int, int, int, int, int]]:
    for rows, columns, depth, warps, stages in product((128, 64), (128, 64, 256), (64, 32), (8, 4), (3, 4)):
        shared = stages * (rows + numbers * columns) * depth * 2
        if shared <= _SHARED and rows * columns * max(numbers - 1, 1) // (32 * warps) <= _REGISTERS:
            yield rows, columns, depth, warps, stages


@contextmanager
def forced(search: Search, tile: Sequence[int], device: str) -> Iterator[None]:
    """Lets the kernels of a search take a tile, and none but it."""
    from fastattn.kernels import replay, tiles
    from fastattn.kernels.launch import Tile as AttentionTile
    from fastattn.kernels.product import ProductTile

    if search.table != PRODUCT:
        with tiles.using(search.table, AttentionTile._make(tile)):
            yield
        return
    known = _products(device)
    before = known[search.key]
    # The tile for few rows stays what it is.
    known[search.key] = (before[0], ProductTile._make(tile))
    # What is remembered was launched with another tile.
    replay.forget()
    try:
        yield
    finally:
        known[search.key] = before
        replay.forget()


def _products(device: str) -> dict[tuple[int, int], tuple[Any, Any]]:
    """Returns the table of products for this GPU."""
    from fastattn.kernels.launch import architecture
    from fastattn.kernels.product import TILES

    return TILES[max(a for a in TILES if a <= architecture(torch.device(device)))]


def _there(search: Search, device: str) -> tuple[str, list[Any]]:
    """Returns the place of a table as one writes it, and the tiles that it holds; of a product's, that for many rows
    last."""
    from fastattn.kernels import tiles
    from fastattn.kernels.launch import architecture

    here = architecture(torch.device(device))
    if search.table == PRODUCT:
        return f"TILES[{here}][{search.key}]", list(_products(device)[search.key])
    table = tiles.TABLES[search.table]
    known = table[max(a for a in table if a <= here)]
    size, dim = search.key
    key = next((s, most) for s, most in known if s == size and dim <= most)
    return f"{search.table.upper()}[{here}][{key}]", list(known[key])


def _literal(search: Search, best: Tile, device: str) -> str:
    """Returns the place of the table as it should be: the best tile first, and what was there behind it."""
    place, there = _there(search, device)
    make = type(there[0])
    held = (
        [there[0], make(*best)] if search.table == PRODUCT else [make(*best), *(t for t in there if tuple(t) != best)]
    )
    return f"{place} = ({', '.join(map(_written, held))}{',' if len(held) == 1 else ''})"


def _written(tile: Any) -> str:
    defaults = type(tile)._field_defaults
    values = [str(v) for name, v in zip(tile._fields, tile, strict=True) if name not in defaults]
    values += [f"{name}={getattr(tile, name)}" for name, value in defaults.items() if getattr(tile, name) != value]
    return f"{type(tile).__name__}({', '.join(values)})"


def _case(search: Search, shape: Any, device: str) -> Case:
    found = families.FAMILIES[search.family](search.row, shape, torch.bfloat16, device)
    return next(case for case in found if case.direction == search.direction)


def _wrong(case: Case, search: Search, tile: Sequence[int], context: Context) -> str | None:
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
    _, there = _there(search, context.device)
    now = tuple(there[-1 if search.table == PRODUCT else 0])
    kept: list[Tile] = []
    for tile in [now, *(tile for tile in tiles if tile != now)]:
        note = _wrong(case, search, tile, context)
        if note is None:
            kept.append(tile)
        else:
            emit({"search": search.name, "tile": list(tile), "ok": False, "note": note})
    if not kept:
        return

    def run(tile: Tile) -> Any:
        with forced(search, tile, context.device), use_backend("triton"):
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
            "literal": _literal(search, best, context.device),
        }
    )


KINDS: dict[str, Callable[[Job, Context, Emit], None]] = {"check": _check, "time": _time}
