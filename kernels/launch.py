"""Tiles of kernels, and how a kernel is launched with the largest that fits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cache
from typing import Any, NamedTuple, TypeVar

import torch
import triton
from triton.runtime.errors import OutOfResources, PTXASError

from fastattn.errors import UnsupportedError
from fastattn.kernels.interpreter import as_on_a_gpu, is_interpreting
from fastattn.kernels.replay import Launch, note


class Tile(NamedTuple):
    """What is chosen for a kernel, and changes its speed alone.

    Attributes:
        rows: of a tile, a power of two from 16 on.
        columns: of a tile, likewise.
        num_warps: a program.
        num_stages: tiles that are on their way from memory.
        boxes: whether the GPU's copy engine fetches tiles where it can (``boxes.py``).
            Kernels that have no descriptors take no notice of it.
        persistent: whether attention's forward has as many programs as run at once, each of which takes block after
            block. Other kernels take no notice of it.
        specialised: whether ``hopper.py`` serves the calls that it can; only attention's forward takes notice of it.
    """

    rows: int
    columns: int
    num_warps: int
    num_stages: int
    boxes: bool = True
    persistent: bool = False
    specialised: bool = False

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}

    def __str__(self) -> str:
        notes = {"pointers": not self.boxes, "persistent": self.persistent, "specialised": self.specialised}
        return ", ".join([f"{tuple(self[:4])}", *(note for note, so in notes.items() if so)])


class Configuration(NamedTuple):
    """A kernel as some call would launch it, to be compiled: ``kernel.warmup(*arguments, grid=(1,), **options)``."""

    name: str
    kernel: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]


AnyTile = TypeVar("AnyTile", bound=tuple[int, ...])

# Of each op, its tiles and GPU: the tiles that did not fit, and why the last of them did not.
_failed: dict[tuple[str, tuple[tuple[int, ...], ...], int], tuple[int, str]] = {}


def launch(op: str, tiles: Sequence[AnyTile], start: Callable[[AnyTile], Any]) -> None:
    """Calls ``start`` with the first tile for which the current GPU has shared memory, registers and instructions.

    Args:
        op: for messages.
        tiles: the fastest first, the smallest last.
        start: launches a kernel.

    Raises:
        UnsupportedError: none fits.
    """
    interpreting = is_interpreting()
    key = (op, tuple(tiles), -1 if interpreting else torch.cuda.current_device())
    while True:
        number, why = _failed.get(key, (0, ""))
        if number == len(tiles):
            raise UnsupportedError(op, {"triton": [why]})
        try:
            with as_on_a_gpu() if interpreting else nullcontext():
                start(tiles[number])
            return
        except OutOfResources as error:
            needs = f"the smallest tile {tuple(tiles[number])} needs {error.required} of {error.name}"
            _failed[key] = number + 1, f"{needs}, and this GPU has {error.limit}"
        except OverflowError as error:  # by a grid of 2^31 programs
            raise UnsupportedError(op, {"triton": [f"a number of its launch is too large: {error}"]}) from error
        except PTXASError as error:
            _failed[key] = number + 1, f"the assembler of triton {triton.__version__} has no code for this GPU: {error}"


def start(launch: Launch) -> None:
    """Launches a kernel, inside of :func:`launch` or :func:`run`."""
    kernel, grid, arguments, options = launch
    note(kernel[grid](*arguments, **options), launch)


def run(kernel_launch: Launch) -> None:
    """Launches a kernel whose only tile fits every GPU that kernels are for.

    Raises:
        UnsupportedError: it does not fit this one.
    """
    kernel, _, _, options = kernel_launch
    launch(
        kernel.fn.__name__.strip("_"),
        [tuple(v for v in options.values() if type(v) is int)],
        lambda _: start(kernel_launch),
    )


@cache
def architecture(device: torch.device) -> int:
    """Returns a GPU's compute capability, times 10; 0 in the interpreter, and for GPUs that count otherwise."""
    if device.type != "cuda" or torch.version.hip is not None:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@cache
def multiprocessors(device: torch.device) -> int:
    """Returns how many multiprocessors a GPU has; 0 in the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 0


def cdiv(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)


def padded(dim: int) -> int:
    """Returns the power of two, at least 16, that holds ``dim``."""
    return max(16, 1 << (dim - 1).bit_length())


def precision() -> str:
    """Returns how float32 is multiplied: as float32, unless PyTorch's own setting allows TF32."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
