"""Compiles every Triton kernel with every tile of its table, without a GPU, and says what the compiler made of it.

``python -m fastattn.tools.triton_report`` brings docs/triton-report.md up to date: what has not changed since is not
compiled again.  ``--check`` compiles nothing and names the lines that are missing or stale.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib
import multiprocessing
import os
import queue
import re
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fastattn.kernels.launch import Configuration

ARCHITECTURES = (80, 90, 100)
MODULES = (
    "softmax",
    "norm",
    "dropout",
    "sums",
    "product",
    "feed_forward",
    "linear_cross_entropy",
    "rotary_embedding",
    "embedding",
    "linear_cross_entropy_one_pass",
    "attention_forward",
    "hopper",
    "decode",
    "attention_backward",
    "attention_bias_backward",
    "attention_weights",
)
REPORT = Path("docs/triton-report.md")
_HEAD = """# What the compiler made of the Triton kernels

Written by `python -m fastattn.tools.triton_report`; no GPU has anything to do with it. Registers are a thread's,
spilled bytes a thread's stack, shared memory is a program's, in bytes. Programs: as many as registers, threads and
shared memory of a multiprocessor leave room for. Warpgroup (HGMMA, or tcgen05 on sm_100) and warp (HMMA, DMMA): matrix
instructions in the machine code. Serial: HGMMA that wait for the one before them, though both add to the same sum; the
assembler does so where it finds something else that writes to their registers. The key changes with the source and the
arguments.
"""
_COLUMNS = ("sm", "kernel", "warps", "registers", "spilled", "shared", "programs", "warpgroup", "warp", "serial", "key")
# Shared memory of a multiprocessor in bytes, of which a program takes 1 KB more than it asks for.
_SHARED = {80: 164 << 10, 90: 228 << 10, 100: 228 << 10}
_REGISTERS, _THREADS, _PROGRAMS = 65536, 2048, 32


class Line(NamedTuple):
    """A configuration as it was compiled; the fields are the table's columns."""

    sm: int
    kernel: str
    warps: int
    registers: int
    spilled: int
    shared: int
    programs: int
    warpgroup: int
    warp: int
    serial: int
    key: str


class _OfflineDriver:
    """What Triton asks of a GPU's driver before it compiles."""

    def __init__(self, architecture: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", architecture, 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        # Triton keeps what it has compiled by device: each architecture is another one.
        return self.target.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def configurations(architecture: int, modules: Sequence[str] = MODULES) -> Iterator[tuple[Configuration, str]]:
    """Yields each configuration and its key."""
    for name in modules:
        for configuration in importlib.import_module(f"fastattn.kernels.{name}").configurations(architecture):
            yield configuration, key(architecture, configuration)


def key(architecture: int, configuration: Configuration) -> str:
    """Returns 12 hexadecimal digits of what decides over the machine code, besides the compiler's version."""
    options = sorted(configuration.options.items())
    text = f"{architecture} {_code(configuration.kernel)} {_described(configuration.arguments)} {options}"
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def compiled(architecture: int, configuration: Configuration) -> Line:
    """Compiles a kernel and reads what the compiler made of it.

    Raises:
        ValueError: it does not fit the GPU, or does nothing.
    """
    import triton
    from triton.runtime import driver

    driver.set_active(_OfflineDriver(architecture))
    made = configuration.kernel.warmup(*configuration.arguments, grid=(1,), **configuration.options)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("--dump-resource-usage", "-sass")
        )
    registers, spilled = (int(re.search(rf"{word}:(\d+)", usage)[1]) for word in ("REG", "STACK"))  # type: ignore[index]
    warps, shared = made.metadata.num_warps, made.metadata.shared
    if shared + 1024 > _SHARED[architecture]:
        raise ValueError(f"{configuration.name} needs {shared} bytes of shared memory")
    if not re.search(r"\b(?:STG|UTMASTG|RED|ATOMG)\b", code):
        raise ValueError(f"{configuration.name} stores nothing: the compiler took it apart")
    programs = min(
        # Registers are given to a warp in units of 256.
        _REGISTERS // (-(-registers * 32 // 256) * 256 * warps),
        _THREADS // (32 * warps),
        _SHARED[architecture] // (shared + 1024),
        _PROGRAMS,
    )
    warpgroup = len(re.findall(r"\b(?:HGMMA|UTCHMMA|UTCQMMA)\b", code))
    warp = len(re.findall(r"\b(?:HMMA|DMMA)\b", code))
    name = configuration.name.replace("|", "/")
    return Line(
        architecture,
        name,
        warps,
        registers,
        spilled,
        shared,
        programs,
        warpgroup,
        warp,
        _serial(code),
        key(architecture, configuration),
    )


def _serial(code: str) -> int:
    """Returns how many HGMMA of some machine code wait for the one before them, though both add to the same sum."""
    # An instruction that others wait for says so; of a product that is several of them, only the last should.
    found = re.findall(r"\bHGMMA\.\S+ (R\d+), ([^;]*);|\b(WARPGROUP\.DEPBAR\.LE gsb0, 0x0|BRA)\b", code)
    return sum(
        "gsb0" in operands and "gsb0" in wait and to == again and re.search(rf"\b{to}\b", more) is not None
        for (to, operands, _), (_, _, wait), (again, more, _) in zip(found, found[1:], found[2:], strict=False)
    )


def read(path: Path) -> dict[str, Line]:
    """Returns the lines of a report by their key; none where there is no report."""
    found = {}
    for text in path.read_text().splitlines() if path.exists() else ():
        cells = [cell.strip() for cell in text.strip("|").split("|")]
        # A report of other columns is made anew.
        if text.startswith("|") and cells[0].isdigit() and len(cells) == len(_COLUMNS):
            line = Line._make([int(cells[0]), cells[1], *map(int, cells[2:-1]), cells[-1]])
            found[line.key] = line
    return found


def written(lines: Sequence[Line]) -> str:
    """Returns the report."""
    import triton

    rows = [_COLUMNS, tuple("-" * len(name) for name in _COLUMNS), *lines]
    table = "\n".join("| " + " | ".join(str(cell) for cell in row) + " |" for row in rows)
    return f"{_HEAD}\nTriton {triton.__version__}.\n\n{table}\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status, 1 where ``--check`` finds something."""
    parser = argparse.ArgumentParser(prog="python -m fastattn.tools.triton_report", description=__doc__)
    parser.add_argument("--out", type=Path, default=REPORT, help="the report (docs/triton-report.md)")
    parser.add_argument("--check", action="store_true", help="compile nothing, name what is not up to date")
    parser.add_argument("--limit", type=int, default=sys.maxsize, help="configurations to compile at most")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes that compile")
    given = parser.parse_args(arguments)
    known = read(given.out)
    for line in () if given.check else _compiled_by_many(frozenset(known), given.limit, given.jobs):
        known[line.key] = line
        print(*line[:-1], flush=True)
        # Whoever interrupts it goes on from here.
        given.out.write_text(written([*known.values()]))
    lines, missing = [], []
    for architecture in ARCHITECTURES:
        for configuration, current in configurations(architecture):
            if current in known:
                lines.append(known[current])
            else:
                missing.append(f"sm_{architecture} {configuration.name}")
    stale = [f"{line.sm} {line.kernel}" for line in known.values() if line not in lines]
    if given.check:
        print(*(f"missing: {name}" for name in missing), *(f"stale: {name}" for name in stale), sep="\n")
        return int(bool(missing or stale))
    given.out.write_text(written(lines))
    return 0


def _compiled_by_many(known: frozenset[str], limit: int, jobs: int) -> Iterator[Line]:
    """Yields a line for each configuration that is not known, at most ``limit``, as ``jobs`` processes have it."""
    # A process of its own each: Triton's compiler runs on one thread.
    context = multiprocessing.get_context("spawn")
    found = context.Queue()
    processes = [
        context.Process(target=_compile_share, args=(number, jobs, known, limit, found), daemon=True)
        for number in range(jobs)
    ]
    for process in processes:
        process.start()
    running = jobs
    while running:
        try:
            line = found.get(timeout=1)
        except queue.Empty:
            if any(process.exitcode for process in processes):
                raise RuntimeError("the compiler died") from None
            continue
        if isinstance(line, Line):
            yield line
        elif line is None:
            running -= 1
        else:
            raise line


def _compile_share(number: int, jobs: int, known: frozenset[str], limit: int, found: Any) -> None:
    """Puts the lines of every ``jobs``-th configuration that is not known into a queue, and None after the last."""
    at, seen = 0, set(known)
    parent = multiprocessing.parent_process()
    try:
        for architecture in ARCHITECTURES:
            for configuration, current in configurations(architecture):
                if parent is not None and not parent.is_alive():
                    return  # it was interrupted: nobody reads on
                if current in seen or at >= limit:
                    continue
                if at % jobs == number:
                    found.put(compiled(architecture, configuration))
                seen.add(current)
                at += 1
        found.put(None)
    except Exception as error:
        # Not the error itself: the compiler's own may not go from one process to another.
        found.put(RuntimeError(f"{type(error).__name__}: {error}"))


@cache
def _code(kernel: Any) -> list[tuple[str, str]]:
    """Returns the code of a kernel, and of all it calls, by name."""
    found: dict[str, str] = {}
    _collect(kernel, found)
    return sorted(found.items())


def _collect(kernel: Any, found: dict[str, str]) -> None:
    """Adds the code of a kernel, and of all it calls, without its docstrings and comments; and the constants used."""
    from triton.language import constexpr
    from triton.runtime.jit import JITFunction

    name = f"{kernel.fn.__module__}.{kernel.fn.__name__}"
    if name in found:
        return
    tree = ast.parse(textwrap.dedent(kernel.src))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    # Not the tree's own dump, which is another one in each version of Python.
    found[name] = ast.unparse(tree)
    scope = kernel.fn.__globals__
    for node in ast.walk(tree):
        used: Any = None
        if isinstance(node, ast.Name):
            used = scope.get(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module = scope.get(node.value.id)
            used = getattr(module, node.attr, None) if isinstance(module, ModuleType) else None
        if isinstance(used, constexpr):
            found[f"{name} {ast.unparse(node)}"] = repr(used.value)
        elif isinstance(used, JITFunction) and used.fn.__module__.startswith("fastattn."):
            _collect(used, found)


def _described(value: Any) -> str:
    """Returns what the compiler knows of an argument."""
    if isinstance(value, Tensor):
        return f"{value.dtype}{list(value.shape)}{value.stride()}"
    if isinstance(value, tuple):
        return f"({', '.join(_described(item) for item in value)})"
    if hasattr(value, "block_shape"):
        return f"{_described(value.base)} in {value.block_shape}"
    return repr(value)


if __name__ == "__main__":
    sys.exit(main())
