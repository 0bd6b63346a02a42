"""Files that are either whole or absent: atomic writes, and training checkpoints that detect damage."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import pathlib
from typing import Any

import torch

_MAGIC = b"fastattn-checkpoint-1"


def write_atomically(path: pathlib.Path, content: bytes) -> None:
    """Write a file so that a reader, or a crash at any moment, sees the old content or the new, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # the rename must not reach the disk before the data
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()


def save_checkpoint(path: pathlib.Path, state: dict[str, Any]) -> None:
    """Store a training state at ``path``; what was there before becomes ``path`` + ``.previous``.

    The file is a line of magic and SHA-256, then the bytes of ``torch.save``: torch's own format notices truncation but
    not a flipped bit inside a tensor.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    payload = buffer.getvalue()
    header = _MAGIC + b" " + hashlib.sha256(payload).hexdigest().encode() + b"\n"
    staged = path.with_name(path.name + ".next")
    write_atomically(staged, header + payload)
    if path.exists():
        os.replace(path, previous_checkpoint(path))
    os.replace(staged, path)


def previous_checkpoint(path: pathlib.Path) -> pathlib.Path:
    """Where the checkpoint before ``path`` is kept."""
    return path.with_name(path.name + ".previous")


def load_checkpoint(path: pathlib.Path) -> dict[str, Any]:
    """The state stored by ``save_checkpoint``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a checkpoint, cut short or changed; the message names the file.
    """
    content = path.read_bytes()
    header, newline, payload = content.partition(b"\n")
    magic, _, digest = header.partition(b" ")
    if magic != _MAGIC or not newline:
        raise ValueError(f"{path} is not a training checkpoint: it starts with {content[:24]!r}")
    if hashlib.sha256(payload).hexdigest().encode() != digest:
        raise ValueError(
            f"{path} is damaged: its {len(payload):,} bytes do not have the SHA-256 that its header states"
        )
    return torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
