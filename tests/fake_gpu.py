"""Launches every Triton kernel once, on a driver that does nothing (fake_cuda.c): run by test_triton_launch.py.

The interpreter passes arguments in Python, and compiling passes none. What lies between, Triton's own launcher in C,
takes tuples apart and must arrive at as many parameters as the machine code has.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ARCHITECTURE = 90


def load_driver() -> ctypes.CDLL:
    """Builds the driver and loads it under the name by which everything looks for it."""
    folder = tempfile.mkdtemp()
    library = Path(folder, "libcuda.so.1")
    command = [os.environ.get("CC", "gcc"), "-shared", "-fPIC", "-O1", "-Wl,-soname,libcuda.so.1"]
    subprocess.run([*command, "-o", library, HERE / "fake_cuda.c"], check=True)
    os.environ["TRITON_LIBCUDA_PATH"] = folder
    return ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def kernels() -> Iterator[Any]:
    """Yields a configuration of each kernel: its last, which is the smallest and so the quickest to compile."""
    found: dict[str, Any] = {}
    for file in sorted((HERE.parent / "kernels").glob("*.py")):
        module = importlib.import_module(f"fastattn.kernels.{file.stem}")
        if hasattr(module, "configurations"):
            for configuration in module.configurations(ARCHITECTURE):
                found[f"{file.stem}.{configuration.kernel.fn.__name__}"] = configuration
    yield from found.items()


def main() -> None:
    library = load_driver()
    from triton.backends.nvidia import driver as nvidia
    from triton.runtime import driver

    class Driver(nvidia.CudaDriver):
        def __init__(self) -> None:
            self.utils = nvidia.CudaUtils()
            self.launcher_cls = nvidia.CudaLauncher
            self.get_current_device = lambda: 0
            self.get_current_stream = lambda device: 0
            self.get_device_capability = lambda device: divmod(ARCHITECTURE, 10)

    passed = []
    make_launcher = nvidia.make_launcher

    def counted(*arguments: Any) -> str:
        source = make_launcher(*arguments)
        passed.append(re.search(r"void \*params\[\] = \{(.*)\}", source)[1].count("&"))  # type: ignore[index]
        return source

    nvidia.make_launcher = counted
    driver.set_active(Driver())
    for name, configuration in kernels():
        made = configuration.kernel[(1,)](*configuration.arguments, **configuration.options)
        header = made.asm["ptx"].split(".entry", 1)[1].split(")", 1)[0]
        print(name, passed.pop(), header.count(".param"), library.fake_launches())


if __name__ == "__main__":
    sys.exit(main())
