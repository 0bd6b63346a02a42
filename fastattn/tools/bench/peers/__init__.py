"""Who else runs the benchmark's workloads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fastattn.tools.bench.peers.peer import Peer
from fastattn.tools.bench.peers.torch_peers import TORCH_PEERS
from fastattn.tools.bench.workload import Workload

PEERS: tuple[Peer, ...] = TORCH_PEERS


def chosen(names: Sequence[str] | None = None) -> list[Peer]:
    """Returns the peers of these names; all if None.

    Raises:
        ValueError: there is no peer of a name.
    """
    known = {peer.name: peer for peer in PEERS}
    for name in names or ():
        if name not in known:
            raise ValueError(f"peer must be one of {', '.join(map(repr, known))}, got {name!r}")
    return list(PEERS) if names is None else [known[name] for name in dict.fromkeys(names)]


def calls(workload: Workload, peers: Sequence[Peer] | None = None) -> dict[str, Callable[[], Any]]:
    """Returns, by name, a call of every peer that can run here and offers this workload."""
    found = {}
    for peer in PEERS if peers is None else peers:
        if peer.unavailable() is None:
            call = peer.call(workload)
            if call is not None:
                found[peer.name] = call
    return found
