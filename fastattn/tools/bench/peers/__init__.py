"""Who else runs the benchmark's workloads: every peer is judged by float64 before it is timed."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import NamedTuple

from fastattn.tools.bench.peers import compiled
from fastattn.tools.bench.peers.check import Check
from fastattn.tools.bench.peers.compiled import COMPILED_PEERS
from fastattn.tools.bench.peers.ctranslate2_model import CTRANSLATE2_PEERS
from fastattn.tools.bench.peers.gpu_libraries import GPU_PEERS
from fastattn.tools.bench.peers.onnx_runtime import ONNX_PEERS
from fastattn.tools.bench.peers.openvino_sdpa import OPENVINO_PEERS
from fastattn.tools.bench.peers.peer import Call, Peer
from fastattn.tools.bench.peers.torch_peers import TORCH_PEERS
from fastattn.tools.bench.workload import Workload

PEERS: tuple[Peer, ...] = (
    *TORCH_PEERS,
    *COMPILED_PEERS,
    *ONNX_PEERS,
    *OPENVINO_PEERS,
    *CTRANSLATE2_PEERS,
    *GPU_PEERS,
)


class Ready(NamedTuple):
    """Who runs a workload.

    Attributes:
        calls: by name, of every peer that can run here, offers the workload and answered it rightly.
        failed: by name, what went wrong with the others that offer it.
        errors: by name, how far the largest element's share an answer of ``calls`` is from float64.
    """

    calls: dict[str, Call]
    failed: dict[str, str]
    errors: dict[str, float]


def chosen(names: Sequence[str] | None = None, *, quick: bool = False, device: str = "cpu") -> list[Peer]:
    """Returns the peers of these names; if None all that run on the device, or with ``quick`` those soon ready.

    Raises:
        ValueError: there is no peer of a name.
    """
    known = {peer.name: peer for peer in PEERS}
    for name in names or ():
        if name not in known:
            raise ValueError(f"peer must be one of {', '.join(map(repr, known))}, got {name!r}")
    if names is None:
        kind = device.split(":")[0]
        return [peer for peer in PEERS if kind in peer.devices and not (quick and peer.slow_to_build)]
    return [known[name] for name in dict.fromkeys(names)]


def absent(peers: Sequence[Peer]) -> dict[str, str]:
    """Returns, by name, why a peer cannot run here."""
    reasons = {peer.name: peer.unavailable() for peer in peers}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def ready(workload: Workload, peers: Sequence[Peer] | None = None) -> Ready:
    """Makes every peer's call of a workload ready to be timed: built, compiled, and its answer compared with float64.

    Only one workload's calls are ready at a time: those of the last one may have to compile again.
    """
    found = Ready({}, {}, {})
    check = Check(workload)
    compiled.forget()
    for peer in PEERS if peers is None else peers:
        if peer.unavailable() is not None:
            continue
        try:
            with warnings.catch_warnings():
                # What a peer has to say about itself is no reason to stop.
                warnings.simplefilter("ignore")
                call = peer.call(workload)
                if call is None:
                    continue
                judged = call if check.workload is workload else peer.call(check.workload)
                assert judged is not None
                off, wrong = check.judged(judged())
        except Exception as error:  # a peer's failure is a line of the report, whatever it raises
            found.failed[peer.name] = f"failed: {type(error).__name__}: {error}".splitlines()[0][:200]
            continue
        if wrong is None:
            found.calls[peer.name], found.errors[peer.name] = call, off
        else:
            found.failed[peer.name] = wrong
    return found
