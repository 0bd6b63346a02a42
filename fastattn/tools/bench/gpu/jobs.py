"""What the processes of a run tell each other: jobs, and the records that come of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

Record = dict[str, Any]
Emit = Callable[[Record], None]


@dataclass(frozen=True)
class Job:
    """Something to be done in a child process.

    Attributes:
        name: unique, as it is written in results and messages.
        section: whose job it is: "environment", "numerics", "speed" or "search".
        kind: of the section's jobs.
        parameters: that JSON can hold.
        importance: the lower, the sooner; what is not begun in time is dropped.
        limit: seconds after which the child is taken for hung.
        least: seconds that must be left for it to be begun.
    """

    name: str
    section: str
    kind: str
    parameters: dict[str, Any] = field(default_factory=dict)
    importance: float = 0.0
    limit: float = 120.0
    least: float = 2.0

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Context:
    """What every job of a run goes by.

    Attributes:
        device: "cuda", or "cpu" for Triton's interpreter.
        backends: ours that are checked and timed.
        quick: fewer repeats.
        tiny: as few as there can be, for a test of the command itself.
        seconds: for each call that is timed.
        limits: what the machine was measured to do, by name: GB/s and TFLOP/s.
        inject: by a job's name, what is to go wrong with it: "raise", "die", "hang" or "wrong".
    """

    device: str = "cuda"
    backends: tuple[str, ...] = ("triton",)
    quick: bool = False
    tiny: bool = False
    seconds: float = 0.2
    limits: dict[str, float] = field(default_factory=dict)
    inject: dict[str, str] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, values: dict[str, Any]) -> Context:
        return cls(**{**values, "backends": tuple(values["backends"])})

    def repeats(self, full: int, quick: int) -> int:
        """Returns how often something is repeated."""
        return 3 if self.tiny else quick if self.quick else full


def finite(value: Any) -> Any:
    """Returns a value as JSON can hold it: a number that is none becomes its name."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return value


def with_tile(kind: Callable[[Job, Context, Emit], None]) -> Callable[[Job, Context, Emit], None]:
    """Returns a kind of job whose parameter "tile", if it has one, every forward of attention takes."""

    def run(job: Job, context: Context, emit: Emit) -> None:
        if "tile" not in job.parameters:
            return kind(job, context, emit)
        from fastattn.kernels import launch, tiles

        tile = launch.Tile._make(job.parameters["tile"])
        with tiles.using("forward", tile):
            kind(job, context, lambda line: emit({**line, "row": f"{line['row']} {tile}"}))

    return run
