"""What was to be reached, beside what was measured: a function of the results' records."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from fastattn.tools.bench.gpu.jobs import Record
from fastattn.tools.bench.measuring import OURS

_FORWARD, _BOTH, _BACKWARD = "forward", "forward + backward", "backward"
_EAGER = ("torch eager", "torch.compile")


class Aim(NamedTuple):
    """A speed to reach.

    Attributes:
        name: of it.
        op: family of the rows.
        rows: names, or for row-wise ops what they begin with.
        direction: of the call.
        rate: TFLOP/s in bfloat16 on an H200; 0 where only a ratio counts.
        share: of the copy bandwidth; 0 for none.
        ratio: of the best peer's time to ours; 0 for none.
        peers: who that may be; all if empty.
        bytes: memory that ours may take at most, besides the gradients that it returns; 0 for any.
        lean: whether it may take no more than the best peer.
    """

    name: str
    op: str
    rows: tuple[str, ...]
    direction: str
    rate: float = 0.0
    share: float = 0.0
    ratio: float = 0.0
    peers: tuple[str, ...] = ()
    bytes: float = 0.0
    lean: bool = False


AIMS = (
    Aim("attention forward d128, full", "attention", ("d128-16k",), _FORWARD, rate=620, ratio=0.95),
    Aim("attention forward d128, causal", "attention", ("d128-8k", "d128-32k"), _FORWARD, rate=600, ratio=0.95),
    Aim("attention forward d64", "attention", ("d64-full", "d64-causal"), _FORWARD, rate=480, ratio=0.95),
    Aim("attention backward d128", "attention", ("d128-8k", "d128-16k", "d128-32k"), _BACKWARD, rate=520, ratio=0.95),
    Aim("attention backward d64", "attention", ("d64-full", "d64-causal"), _BACKWARD, rate=400, ratio=0.95),
    Aim("bias gradient", "attention", ("bias-grad",), _BOTH, ratio=5.0),
    Aim("decode", "decode", ("long", "gpu"), _FORWARD, share=0.85),
    Aim("decode, packed", "packed", ("packed-decode",), _FORWARD, share=0.85),
    Aim("decode, paged", "paged", ("paged-16", "paged-256"), _FORWARD, share=0.85),
    *(
        Aim(f"{op.replace('_', ' ')}, {way}", "softmax", (op,), way, share=0.9)
        for op in ("softmax", "log_softmax", "layer_norm", "rms_norm")
        for way in (_FORWARD, _BOTH)
    ),
    Aim("linear + cross entropy", "linear_cross_entropy", ("8192x4096x131072",), _BOTH, 0, 0, 1.0, _EAGER, 1e9),
    Aim("feed-forward forward", "feed_forward", (), _FORWARD, ratio=1.0, lean=True),
)  # fmt: skip


class Reached(NamedTuple):
    """What was measured of an aim in a row.

    Attributes:
        aim: which.
        row: name.
        figure: TFLOP/s or GB/s.
        unit: of the figure.
        share: of the aim's rate or of the copy bandwidth's part; None where it has neither.
        ratio: of the best peer's time to ours; None without one.
        peer: the best one.
        memory: bytes that ours took besides gradients; None where unknown.
        peer_memory: bytes that the best peer took, likewise.
    """

    aim: Aim
    row: str
    figure: float
    unit: str
    share: float | None
    ratio: float | None
    peer: str | None
    memory: float | None
    peer_memory: float | None

    @property
    def met(self) -> bool:
        """Whether all that the aim asks for was reached."""
        enough = (self.share is None or self.share >= 1.0) and (
            not self.aim.bytes or (self.memory or 0) <= self.aim.bytes
        )
        if self.aim.lean and None not in (self.memory, self.peer_memory):
            enough = enough and self.memory <= self.peer_memory  # type: ignore[operator]
        return enough and (not self.aim.ratio or (self.ratio is not None and self.ratio >= self.aim.ratio))


Key = tuple[str, str, str, str]


def grouped(records: Sequence[Record]) -> dict[Key, dict[str, Record]]:
    """Returns who was timed, by (op, row, direction, dtype) and then by name."""
    found: dict[Key, dict[str, Record]] = {}
    for record in records:
        if record.get("section") == "speed" and record.get("median_us"):
            key = record["op"], record["row"], record["direction"], record["dtype"]
            group = found.setdefault(key, {})
            # The fastest of ours, where several backends ran.
            if record["who"] not in group or record["median_us"] < group[record["who"]]["median_us"]:
                group[record["who"]] = record
    return found


def best_peer(group: Mapping[str, Record], among: Sequence[str] = ()) -> str | None:
    """Returns the fastest peer of a group; None if there is none. Ours with other kernels is no peer."""
    others = [name for name in group if not name.startswith(OURS) and (not among or name in among)]
    return min(others, key=lambda name: group[name]["median_us"], default=None)


def reached(records: Sequence[Record], limits: Mapping[str, float]) -> Iterator[Reached]:
    """Yields what was measured of each aim, in bfloat16."""
    groups = grouped(records)
    for aim in AIMS:
        for (op, row, direction, dtype), group in groups.items():
            meant = row.split(" ")[0] in aim.rows if aim.rows else True
            if (op, direction, dtype) == (aim.op, aim.direction, "bfloat16") and meant and OURS in group:
                yield _reached(aim, row, group, limits)


def _reached(aim: Aim, row: str, group: Mapping[str, Record], limits: Mapping[str, float]) -> Reached:
    ours = group[OURS]
    peer = best_peer(group, aim.peers)
    share: float | None = None
    if aim.rate:
        share = ours["figure"] / aim.rate
    elif aim.share and limits.get("copy"):
        share = ours["figure"] / (aim.share * limits["copy"])
    return Reached(
        aim,
        row,
        ours["figure"],
        ours["unit"],
        share,
        None if peer is None else group[peer]["median_us"] / ours["median_us"],
        peer,
        _memory(ours),
        None if peer is None else _memory(group[peer]),
    )


def _memory(record: Record) -> float | None:
    taken = record.get("memory_bytes")
    return None if taken is None else max(taken - record.get("gradient_bytes", 0.0), 0.0)


def wanted(aim: Aim) -> str:
    """Returns what an aim asks for, in words."""
    parts = (
        f"{aim.rate:g} TFLOP/s" if aim.rate else "",
        f"{aim.share:.0%} of copy" if aim.share else "",
        f"{aim.ratio:g} x best peer" if aim.ratio else "",
        f"under {aim.bytes / 1e9:g} GB beside gradients" if aim.bytes else "",
        "no more memory" if aim.lean else "",
    )
    return ", ".join(filter(None, parts))
