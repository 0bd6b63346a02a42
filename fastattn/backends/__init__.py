"""One file a backend: what it refuses and why, and its launches."""

from __future__ import annotations

from fastattn.backends.base import Backend
from fastattn.backends.cpu import CpuBackend
from fastattn.backends.reference import ReferenceBackend
from fastattn.backends.triton import TritonBackend

# In the order in which the automatic choice asks them.
ALL: tuple[Backend, ...] = (CpuBackend(), TritonBackend(), ReferenceBackend())
BY_NAME: dict[str, Backend] = {backend.name: backend for backend in ALL}
