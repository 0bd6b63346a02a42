"""Runs Triton kernels on a driver that does nothing (fake_cuda.c): test_triton_launch.py reads what is printed.

``launch``: every kernel once. The interpreter passes arguments in Python, and compiling passes none. What lies between,
Triton's own launcher in C, takes tuples apart and must arrive at as many parameters as the machine code has.

``replay``: ops of the public API, until launches are recorded (``kernels/replay.py``) and once more. What is replayed
must be what was launched the first time, but for the pointers to what was allocated.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
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


LIBRARY = load_driver()

import torch  # noqa: E402
from triton.backends.nvidia import driver as nvidia  # noqa: E402
from triton.runtime import driver  # noqa: E402

import fastattn  # noqa: E402
from fastattn.backends.triton import TritonBackend  # noqa: E402
from fastattn.kernels import replay, tiles  # noqa: E402
from fastattn.kernels.launch import Tile  # noqa: E402
from fastattn.masks import Causal, KeyLengths  # noqa: E402

launched: list[tuple[tuple[int, ...], list[Any]]] = []


class Launcher(nvidia.CudaLauncher):
    """Triton's launcher, which also takes down what it was given."""

    def __call__(self, x: int, y: int, z: int, stream: int, function: int, *arguments: Any) -> None:
        launched.append(((x, y, z, function), list(leaves(arguments[4:]))))
        super().__call__(x, y, z, stream, function, *arguments)


class Driver(nvidia.CudaDriver):
    def __init__(self) -> None:
        self.utils = nvidia.CudaUtils()
        self.launcher_cls = Launcher
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device: 0
        self.get_device_capability = lambda device: divmod(ARCHITECTURE, 10)


def leaves(arguments: Any) -> Iterator[Any]:
    """Yields arguments one by one; of a tensor its pointer, of a descriptor its tensor's and all else."""
    for value in arguments:
        if isinstance(value, (tuple, list)):
            yield from leaves(value)
        elif hasattr(value, "base"):
            yield from (value.base.data_ptr(), *value.shape, *value.strides, value.padding)
        else:
            yield value.data_ptr() if isinstance(value, torch.Tensor) else value


def kernels() -> Iterator[tuple[str, Any]]:
    """Yields a configuration of each kernel: its last, which is the smallest and so the quickest to compile."""
    found: dict[str, Any] = {}
    for file in sorted((HERE.parent / "kernels").glob("*.py")):
        module = importlib.import_module(f"fastattn.kernels.{file.stem}")
        if hasattr(module, "configurations"):
            for configuration in module.configurations(ARCHITECTURE):
                found[f"{file.stem}.{configuration.kernel.fn.__name__}"] = configuration
    yield from found.items()


def launch() -> None:
    """Prints of each kernel how many parameters are passed, how many it has, and how many launches there were."""
    passed = []
    make_launcher = nvidia.make_launcher

    def counted(*arguments: Any) -> str:
        source = make_launcher(*arguments)
        passed.append(re.search(r"void \*params\[\] = \{(.*)\}", source)[1].count("&"))  # type: ignore[index]
        return source

    nvidia.make_launcher = counted
    for name, configuration in kernels():
        made = configuration.kernel[(1,)](*configuration.arguments, **configuration.options)
        header = made.asm["ptx"].split(".entry", 1)[1].split(")", 1)[0]
        print(name, passed.pop(), header.count(".param"), LIBRARY.fake_launches(), sep=" | ")


def calls() -> dict[str, tuple[list[torch.Tensor], Callable[..., Any]]]:
    """Returns inputs and function of calls, by name."""
    torch.manual_seed(0)

    def bfloat16(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.bfloat16)

    x, weight, bias = bfloat16(64, 256), bfloat16(256), bfloat16(256)
    w_in, w_out = bfloat16(512, 256), bfloat16(256, 512)
    query, key = bfloat16(2, 4, 200, 64), bfloat16(2, 2, 200, 64)
    lengths, leaf = torch.tensor([100, 200], dtype=torch.int32), bfloat16(2, 4, 200, 64).requires_grad_()
    return {
        "softmax": ([x], fastattn.softmax),
        "softmax, in shares": ([bfloat16(2, 1 << 18)], fastattn.softmax),
        "norm of other tensors": ([x, weight, bias], fastattn.layer_norm),
        "norm": ([x, weight, bias], lambda x, w, b: fastattn.layer_norm(x, w, b, residual=x)),
        "embedding": ([torch.tensor([[1, 2, 0]]), w_in], lambda ids, w: fastattn.embedding(ids, w, scale=2.0)),
        "rotary embedding": ([query, key], fastattn.rotary_embedding),
        "feed-forward": ([x, w_in, w_out], lambda x, i, o: fastattn.feed_forward(x, i, None, o, None)),
        "attention": ([query, key, key], lambda q, k, v: fastattn.attention(q, k, v, return_lse=True)),
        "masked": (
            [query, key, key, lengths],
            lambda q, k, v, n: fastattn.attention(q, k, v, mask=Causal() & KeyLengths(n)),
        ),
        "attention for Hopper": (
            [query, key, key],
            lambda q, k, v: fastattn.attention(q, k, v, mask=Causal(), return_lse=True),
        ),
        "decode": ([query[:, :, :1], key, key], fastattn.attention),
        "packed, a few queries": (
            [bfloat16(3, 4, 64), bfloat16(900, 2, 64), bfloat16(900, 2, 64)],
            lambda q, k, v: fastattn.varlen_attention(q, k, v, torch.tensor([0, 1, 3]), torch.tensor([0, 200, 900])),
        ),
        "attention of others": ([query, query, query.clone()], fastattn.attention),
        "pages": (
            [query[:, :, :1], bfloat16(8, 16, 2, 64), bfloat16(8, 16, 2, 64), lengths // 4],
            lambda q, k, v, n: fastattn.paged_attention(q, k, v, torch.arange(8, dtype=torch.int32).view(2, 4), n),
        ),
        "gradients": ([leaf, query, query], lambda q, k, v: torch.autograd.grad(fastattn.attention(q, k, v), q, k)),
    }


def same(first: list[Any], again: list[Any], inputs: set[int]) -> bool:
    """Whether launches are the same, but for what the pointers are that no tensor of the caller has."""
    renamed: dict[int, int] = {}
    if [where for where, _ in first] != [where for where, _ in again]:
        return False
    for (_, before), (_, now) in zip(first, again, strict=True):
        for value, other in zip(before, now, strict=True):
            # Addresses are large, and sizes here are not.
            if type(value) is int and value > 1 << 32 and value not in inputs:
                if renamed.setdefault(value, other) != other:
                    return False
            elif not (value is other or value == other):
                return False
    return True


def replayed() -> None:
    """Prints of each call whether it was replayed, whether launches are the same, and the number of launches."""
    TritonBackend.device_types = ("cpu",)
    TritonBackend.unavailable = lambda self: None
    torch.cuda.current_device = lambda: 0
    for name in list(sys.modules):
        if name.startswith("fastattn.kernels."):
            importlib.import_module(name).__dict__.update(architecture=lambda device: ARCHITECTURE)
    for name, (inputs, function) in calls().items():
        replay.forget()
        found = []
        tile = Tile(128, 128, 8, 2, specialised=True)
        forced = tiles.using("forward", tile) if "Hopper" in name else nullcontext()
        with forced, fastattn.use_backend("triton"):
            for at in range(replay.RECORDED + 1):
                launched.clear()
                result = function(*inputs)
                found.append((list(launched), [(t.shape, t.stride(), t.dtype) for t in leaves_of(result)]))
                if at == 0 and "other" in name:
                    # What is recorded has one tensor in place of two, and must not stay there.
                    for _ in range(replay.RECORDED):
                        function(*inputs[:-1], inputs[-2])
            plans = [plan for plan in replay.plans() if plan]
        pointers = {t.data_ptr() for t in inputs}
        good = same(found[0][0], found[-1][0], pointers) and found[0][1] == found[-1][1]
        print(name, len(plans), good, len(found[-1][0]), sep=" | ")


def leaves_of(result: Any) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else list(result)


if __name__ == "__main__":
    driver.set_active(Driver())
    {"launch": launch, "replay": replayed}[sys.argv[1]]()
