"""Builds `fastattn._cpu`, the C++ kernels, without torch.

Each kernel of `csrc/cpu/` is compiled once for each instruction set of `ISAS`, `*_amx.cpp` for AMX alone, the files of
`COMPILED_ONCE` once. Objects are kept in the build folder and rebuilt only when a source, a header or the command
changed. Without a compiler the package still installs and runs on its reference backend; FASTATTN_REQUIRE_CPU=1 makes
that an error. FASTATTN_SANITIZE names sanitizers to build with (`make sanitize`).
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CPU_DIR = ROOT / "csrc" / "cpu"
IS_X86 = platform.machine().lower() in ("x86_64", "amd64")

# Everything else is a kernel.
COMPILED_ONCE = (
    "bindings",
    "isa",
    "lines",
    "pages",
    "parallel",
    "plain_calls",
    "plain_gradients",
    "python_tensor",
    "scratch",
)
KNOW_PYTHON = ("bindings", "plain_calls", "plain_gradients", "python_tensor")

# Flags of each instruction set; "portable" is whatever the compiler takes as its baseline.
ISAS: dict[str, list[str]] = {"portable": []}
if IS_X86:
    ISAS["avx2"] = ["-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2"]
    ISAS["avx512"] = [*ISAS["avx2"], "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
    if sys.platform == "linux":  # which alone gives tile registers to a process that asks
        ISAS["amx"] = [*ISAS["avx512"], "-DFASTATTN_ISA_AVX512", "-mavx512bf16", "-mamx-tile", "-mamx-bf16"]

# NaN, Inf and signed zero keep their meaning (no -ffast-math); only errno and floating-point traps are given up.
COMMON_FLAGS = [
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-fopenmp",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
    "-Wextra",
    "-Wno-maybe-uninitialized",  # g++ 12 sees some inside its own AVX-512 header, and of the plain kind too
    "-Wno-uninitialized",
    "-Wno-unknown-warning-option",
]

# Optimised as little as keeps the sanitised tests within minutes; the first finding ends the process.
SANITIZE = os.environ.get("FASTATTN_SANITIZE", "")
SANITIZE_FLAGS = [f"-fsanitize={SANITIZE}", "-fno-sanitize-recover=all", "-O1", "-g1"] if SANITIZE else []


class BuildUnavailable(RuntimeError):
    """The C++ extension cannot be built here; the message says what to install."""


def find_compiler() -> list[str]:
    """Returns the C++ compiler's command: $CXX, else the first of g++, clang++, c++ on the path."""
    if os.environ.get("CXX"):
        command = shlex.split(os.environ["CXX"])
        if shutil.which(command[0]) is None:
            raise BuildUnavailable(f"CXX={os.environ['CXX']} is not an executable")
        return command
    for name in ("g++", "clang++", "c++"):
        if shutil.which(name):
            return [name]
    raise BuildUnavailable("no C++ compiler found: install one (for example `apt install g++`) and install again")


def accepts(compiler: list[str], flags: list[str]) -> bool:
    """Whether the compiler knows these flags."""
    command = [*compiler, *flags, "-x", "c++", "-fsyntax-only", os.devnull]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def is_current(target: Path, command: list[str]) -> bool:
    """Whether `target` was built by this command and is newer than everything its depfile names."""
    depfile, stamp = target.with_suffix(".d"), target.with_suffix(".cmd")
    if not (target.exists() and depfile.exists() and stamp.exists()) or stamp.read_text() != shlex.join(command):
        return False
    dependencies = depfile.read_text().replace("\\\n", " ").split(":", 1)[1]
    built = target.stat().st_mtime_ns
    paths = [Path(name.replace("\0", " ")) for name in dependencies.replace("\\ ", "\0").split()]
    return all(path.exists() and path.stat().st_mtime_ns <= built for path in paths)


def run(command: list[str]) -> None:
    """Runs one compiler command; on failure raises with its output."""
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise BuildUnavailable(f"{shlex.join(command)}\n{result.stdout}{result.stderr}")
    if result.stderr:
        print(result.stderr, file=sys.stderr, flush=True)


def compile_object(target: Path, command: list[str]) -> None:
    """Compiles one object unless it is current."""
    if is_current(target, command):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    run(command)
    target.with_suffix(".cmd").write_text(shlex.join(command))


class BuildExt(build_ext):
    """Compiles the kernels once per instruction set, two or more at a time."""

    def build_extension(self, ext: Extension) -> None:
        try:
            self._build_cpu(Path(self.get_ext_fullpath(ext.name)))
        except (BuildUnavailable, OSError) as error:
            if os.environ.get("FASTATTN_REQUIRE_CPU") == "1":
                raise SystemExit(
                    f"fastattn: the C++ extension failed to build and FASTATTN_REQUIRE_CPU=1: {error}"
                ) from error
            print(
                "\nWARNING: fastattn is installed WITHOUT its C++ kernels and runs on the slow reference backend.\n"
                f"{error}\n",
                file=sys.stderr,
                flush=True,
            )

    def _build_cpu(self, library: Path) -> None:
        try:
            import pybind11
        except ImportError as error:
            raise BuildUnavailable("pybind11 is missing: `pip install pybind11` and build again") from error
        python_include = sysconfig.get_path("include")
        if not (Path(python_include) / "Python.h").exists():
            raise BuildUnavailable(f"Python.h is not in {python_include}: install Python's headers (python3-dev)")
        compiler = find_compiler()
        out_dir = Path(self.build_temp) / "cpu"
        isas = {isa: flags for isa, flags in ISAS.items() if isa != "amx" or accepts(compiler, flags)}
        targets = [f"-DFASTATTN_HAS_{isa.upper()}" for isa in isas]
        jobs: list[tuple[Path, list[str]]] = []

        def add(source: Path, name: str, flags: list[str]) -> None:
            target = out_dir / f"{name}.o"
            depfile = ["-MMD", "-MF", str(target.with_suffix(".d"))]
            base = [*compiler, *COMMON_FLAGS, *SANITIZE_FLAGS, *targets, *flags, f"-I{CPU_DIR}"]
            jobs.append((target, [*base, *depfile, "-c", str(source), "-o", str(target)]))

        python_flags = ["-isystem", pybind11.get_include(), "-isystem", python_include]
        for source in sorted(CPU_DIR.glob("*.cpp")):
            if source.stem in COMPILED_ONCE:
                add(source, source.stem, python_flags if source.stem in KNOW_PYTHON else [])
                continue
            for isa, flags in isas.items():
                # AMX has kernels of its own for some of the work and AVX-512's for the rest.
                if (isa == "amx") == source.stem.endswith("_amx"):
                    add(
                        source,
                        f"{source.stem}.{isa}",
                        [*flags, f"-DFASTATTN_ISA={isa}", f"-DFASTATTN_ISA_{isa.upper()}"],
                    )

        workers = int(os.environ.get("MAX_JOBS", "0")) or max(2, os.cpu_count() or 2)
        with ThreadPoolExecutor(workers) as pool:
            for future in [pool.submit(compile_object, target, command) for target, command in jobs]:
                future.result()

        objects = [target for target, _ in jobs]
        # libgomp.so.1 by name: loaded after torch, whose wheel brings that very name, the process has one thread pool.
        link = [*compiler, "-shared", "-fopenmp", *SANITIZE_FLAGS, *map(str, objects), "-o", str(library)]
        if not library.exists() or any(o.stat().st_mtime_ns > library.stat().st_mtime_ns for o in objects):
            library.parent.mkdir(parents=True, exist_ok=True)
            run(link)


setup(
    packages=sorted({*find_packages(include=["fastattn", "fastattn.*"]), "fastattn.kernels"}),
    # They stand beside the package; for a checkout that is not installed, fastattn/kernels is a link to them.
    package_dir={"fastattn": "fastattn", "fastattn.kernels": "kernels"},
    # package_data says it all; folders of data are then not taken for packages that somebody forgot.
    include_package_data=False,
    package_data={
        "fastattn": ["py.typed"],
        "fastattn.data": ["*.gz", "LICENSE-*", "g2p/*"],
        "fastattn.tools": ["*.html"],
        "fastattn.tools.bench": ["*.toml"],
    },
    ext_modules=[Extension("fastattn._cpu", sources=[], optional=True)],
    cmdclass={"build_ext": BuildExt},
)
