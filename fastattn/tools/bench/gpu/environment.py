"""The machine: what it is, how its clocks stand, and what it does at best."""

from __future__ import annotations

import platform
import shutil
import statistics
import subprocess
import threading
from collections.abc import Callable
from functools import partial
from importlib import metadata
from typing import Any

import torch

from fastattn.ops._dispatch import backends
from fastattn.tools import info
from fastattn.tools.bench import limits, peers
from fastattn.tools.bench.gpu.jobs import Context, Emit, Job
from fastattn.tools.measure import time_in_turns

PACKAGES = (
    "torch", "triton", "numpy", "matplotlib", "liger-kernel", "flash-attn", "flash-attn-3", "flash-attn-4", "xformers",
    "quack-kernels", "nvidia-cudnn-cu13", "nvidia-cublas",
)  # fmt: skip
_SMI = {
    "driver_version": "driver",
    "clocks.sm": "SM clock, MHz",
    "clocks.mem": "memory clock, MHz",
    "clocks.max.sm": "highest SM clock, MHz",
    "power.draw": "power, W",
    "power.limit": "power limit, W",
    "temperature.gpu": "temperature, C",
    "utilization.gpu": "busy, %",
    "clocks_event_reasons.active": "reasons for lower clocks",
}
# Bytes that are copied, and the side of the square matrices that are multiplied, to find the limits.
_COPIED, _SIDE = 1 << 32, 8192


def smi(fields: tuple[str, ...] = tuple(_SMI)) -> dict[str, str]:
    """Returns what nvidia-smi says of the first GPU, by name; nothing where there is none, or no nvidia-smi."""
    if shutil.which("nvidia-smi") is None:
        return {}
    found: dict[str, str] = {}
    command = ["nvidia-smi", "-i", "0", "--format=csv,noheader,nounits"]
    try:
        # All at once is quicker, but one unknown name makes it refuse all.
        answer = subprocess.run(
            [*command, f"--query-gpu={','.join(fields)}"], capture_output=True, text=True, timeout=20
        )
        if answer.returncode == 0:
            values = answer.stdout.strip().splitlines()[0].split(", ")
            return {_SMI[name]: value for name, value in zip(fields, values, strict=True)}
        for name in fields:
            one = subprocess.run([*command, f"--query-gpu={name}"], capture_output=True, text=True, timeout=20)
            if one.returncode == 0:
                found[_SMI[name]] = one.stdout.strip().splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError, ValueError):
        return found
    return found


class Sampler:
    """Asks nvidia-smi every few seconds how the clocks stand, while a block runs."""

    _FIELDS = ("clocks.sm", "power.draw", "temperature.gpu")

    def __init__(self, seconds: float = 4.0) -> None:
        self._seconds = seconds
        self._stop = threading.Event()
        self._found: dict[str, list[float]] = {}
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Sampler:
        if shutil.which("nvidia-smi") is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(5.0)

    def _run(self) -> None:
        while not self._stop.wait(self._seconds):
            for name, value in smi(self._FIELDS).items():
                try:
                    self._found.setdefault(name, []).append(float(value))
                except ValueError:
                    continue

    def summary(self) -> dict[str, str]:
        """Returns least, median and most of each."""
        return {
            name: f"{min(values):.0f} / {statistics.median(values):.0f} / {max(values):.0f}"
            for name, values in self._found.items()
        }


def software() -> dict[str, Any]:
    """Returns the versions of what the figures depend on, and the commit; nothing that wakes a GPU."""
    found: dict[str, Any] = {
        "commit": info.commit(),
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": info.cpu_name(),
        "CUDA of torch": torch.version.cuda,
    }
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _environment(job: Job, context: Context, emit: Emit) -> None:
    """Emits what the device is, which backends run, and the limits as they are measured."""
    device: dict[str, Any] = {"name": info.cpu_name()}
    if context.device != "cpu":
        properties = torch.cuda.get_device_properties(context.device)
        device = {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "SMs": properties.multi_processor_count,
            "L2, MB": round(properties.L2_cache_size / 2**20),
            "memory, GiB": round(properties.total_memory / 2**30, 1),
            "shared memory a block, KB": getattr(properties, "shared_memory_per_block_optin", 0) // 1024,
            "cuDNN": torch.backends.cudnn.version(),
        }
    status = {name: found.reason or "available" for name, found in backends().items()}
    here: list[str] = []
    absent: list[str] = []
    for peer in peers.chosen(device=context.device):
        (here if peer.unavailable() is None else absent).append(peer.name)
    emit({"machine": device, "backends": status, "peers": here, "absent": absent})
    emit({"limits": _cpu_limits() if context.device == "cpu" else _gpu_limits(context)})


def _cpu_limits() -> dict[str, float]:
    found = limits.measure()
    if found is None:
        return {"copy": 1.0, "matmul": 1.0}
    return {"copy": found.copy, "matmul": found.bfloat16 / 1e3}


def _gpu_limits(context: Context) -> dict[str, float]:
    """Returns "copy", GB/s read and written together, and "matmul", TFLOP/s in bf16; medians, on normal random data."""
    free = torch.cuda.mem_get_info()[0]
    count = min(_COPIED, free // 4) // 2
    source = torch.randn(count // 4, device=context.device)
    target = torch.empty_like(source)
    (copy,) = time_in_turns([partial(target.copy_, source)], budget=1.0, device=context.device)
    moved = 2.0 * source.numel() * source.element_size()
    del source, target
    a, b = (torch.randn(_SIDE, _SIDE, device=context.device, dtype=torch.bfloat16) for _ in range(2))
    (matmul,) = time_in_turns([lambda: a @ b], budget=1.0, min_repeats=20, device=context.device)
    return {"copy": moved / copy.median / 1e3, "matmul": 2.0 * _SIDE**3 / matmul.median / 1e6}


KINDS: dict[str, Callable[[Job, Context, Emit], None]] = {"environment": _environment}
