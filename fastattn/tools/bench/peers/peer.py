"""What a peer of the benchmark is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastattn.tools.bench.workload import (
    AttentionWorkload,
    DecodeWorkload,
    EmbeddingWorkload,
    FeedForwardWorkload,
    LossWorkload,
    ModelWorkload,
    ModuleWorkload,
    PackedWorkload,
    PagedWorkload,
    RotaryWorkload,
    SoftmaxWorkload,
    Workload,
)

Call = Callable[[], Any]


class Peer:
    """Somebody who can run workloads of some families; a subclass says which by overriding their methods.

    A method returns a call that is ready to be timed (built, compiled, weights loaded) and returns what
    :mod:`~fastattn.tools.bench.workload` says, or None where the peer does not offer this workload: a dtype, a mask, a
    gradient.
    """

    name: str
    #: Whether getting a call ready takes seconds; a quick run does without.
    slow_to_build = False
    #: Where it runs: "cpu", "cuda".
    devices: tuple[str, ...] = ("cpu",)

    def unavailable(self) -> str | None:
        """Returns why this peer cannot run here; None if it can."""
        return None

    def call(self, workload: Workload) -> Call | None:
        """Returns a call of ``workload`` that is ready to be timed; None if the peer does not offer it."""
        return getattr(self, workload.family)(workload)

    def attention(self, work: AttentionWorkload) -> Call | None:
        return None

    def decode(self, work: DecodeWorkload) -> Call | None:
        return None

    def packed(self, work: PackedWorkload) -> Call | None:
        return None

    def paged(self, work: PagedWorkload) -> Call | None:
        return None

    def softmax(self, work: SoftmaxWorkload) -> Call | None:
        return None

    def feed_forward(self, work: FeedForwardWorkload) -> Call | None:
        return None

    def linear_cross_entropy(self, work: LossWorkload) -> Call | None:
        return None

    def rotary(self, work: RotaryWorkload) -> Call | None:
        return None

    def embedding(self, work: EmbeddingWorkload) -> Call | None:
        return None

    def module(self, work: ModuleWorkload) -> Call | None:
        return None

    def model(self, work: ModelWorkload) -> Call | None:
        return None
