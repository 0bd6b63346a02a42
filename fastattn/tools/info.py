"""``fastattn info``: what is here, what can run, and how to get the rest."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from types import ModuleType

import torch

import fastattn
from fastattn.tools.table import heading, table

_OPTIONAL = ("numpy", "safetensors", "tokenizers", "matplotlib", "triton")


def report() -> str:
    """Returns the whole of ``fastattn info``."""
    sections = [("versions", versions()), ("processor", processor()), ("settings", settings())]
    parts = [f"{heading(title)}\n{_pairs(pairs)}" for title, pairs in sections]
    parts.append(f"{heading('backends')}\n{backends_table()}")
    return "\n\n".join(parts)


def versions() -> dict[str, str]:
    """Returns the versions of what fastattn stands on."""
    found = {
        "fastattn": fastattn.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "platform": platform.platform(),
    }
    for name in _OPTIONAL:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def processor() -> dict[str, str]:
    """Returns the CPU, its instruction sets as the kernels see them, and the threads."""
    found = {
        "CPU": cpu_name(),
        "cores": f"{len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()}",
        "torch threads": str(torch.get_num_threads()),
    }
    kernels = _kernels()
    if kernels is not None:
        found["kernels run on"] = kernels.isa()
        found["kernels built for"] = ", ".join(kernels.available_isas())
        found["CPU features"] = ", ".join(kernels.cpu_flags()) or "none"
    return found


def settings() -> dict[str, str]:
    """Returns the environment variables that fastattn and its threads read."""
    names = [*sorted(n for n in os.environ if n.startswith("FASTATTN_")), "OMP_NUM_THREADS", "KMP_AFFINITY"]
    found = {name: os.environ[name] for name in names if name in os.environ}
    return found or {"environment": "no FASTATTN_* or OMP_* variable is set"}


def backends_table() -> str:
    """Returns what can run here, in the order in which the automatic choice asks, and how to get the rest."""
    rows = []
    for name, status in fastattn.backends().items():
        detail = status.reason or {"reference": "formulas in PyTorch: right everywhere, slower"}.get(name, "")
        kernels = _kernels()
        if name == "cpu" and status.available and kernels is not None:
            detail = f"C++ kernels, {kernels.isa()}, {torch.get_num_threads()} threads"
        rows.append([name, "yes" if status.available else "no", detail])
    return table(("backend", "runs", ""), rows, left=(0, 1, 2))


def environment() -> dict[str, object]:
    """Returns what a measurement depends on, for a results file."""
    kernels = _kernels()
    return {
        "fastattn": fastattn.__version__,
        "commit": commit(),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "isa": None if kernels is None else kernels.isa(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def commit() -> str:
    """Returns the commit of the checkout that this package lies in, "-dirty" where files differ; else "unknown"."""
    folder = Path(fastattn.__file__).parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # an installed copy may lie in somebody else's checkout
        return git("describe", "--always", "--dirty", "--exclude=*", "--abbrev=12")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def cpu_name() -> str:
    """Returns the processor's model name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _kernels() -> ModuleType | None:
    from fastattn.backends.cpu import CpuBackend
    from fastattn.backends.extension import kernels

    return None if CpuBackend().unavailable() else kernels()


def _pairs(pairs: dict[str, str]) -> str:
    width = max(map(len, pairs))
    return "\n".join(f"  {name.ljust(width)}  {value}" for name, value in pairs.items())
