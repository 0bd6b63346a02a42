"""Prints every product of two numbers in 32 bits that a Triton kernel makes, but for those that count few things.

``python triton_offsets.py PART PARTS``: of all kinds of kernels each PARTS-th, from number PART on. Run by
``test_triton_offsets.py`` as programs of their own, with Triton's compiler and not its interpreter. It reads the
compiler's first form of a kernel (TTIR), where an offset that is made in 32 bits stands as such: a product of a batch
entry, a head, a row or a column with a stride or a length must be made in 64, or a tensor of more than 2^31 elements is
read and written in the wrong places.
"""

from __future__ import annotations

import importlib
import itertools
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastattn.biases import Alibi
from fastattn.masks import Dense, Segments, Window
from fastattn.spec.attention import AttentionCall, attention_call
from fastattn.spec.softmax import SoftmaxBackwardCall, softmax_call
from fastattn.tools import triton_report

MODULES = triton_report.MODULES
# Numbers of heads, shares or batch entries, whose products count programs; and how many keys or classes a share or a
# cell has, whose products stay below the number of all.
FEW = re.compile(
    r"num_heads\w*|num_planes|group_size|\w*heads|splits|keys_a_split|share|num_slabs|pool_size|\w*batches"
)


def everything(dtype: torch.dtype, dim: int) -> Iterator[tuple[str, AttentionCall]]:
    """Yields one call for ``tiles.example_calls``, with strides of every kind; no number is 1, which is a constant."""
    query = torch.empty(2, 4, 100, dim, dtype=dtype)
    key = torch.empty(2, 2, 100, dim, dtype=dtype)
    ids = torch.empty(2, 100, dtype=torch.int32)
    mask = Window(7, 9) & Segments(ids) & Dense(torch.empty(2, 4, 100, 200).bool()[..., ::2])
    sizes: dict[str, Any] = {"mask": mask, "dropout_p": 0.5, "softcap": 2.0, "backend": "triton"}
    yield "bias", attention_call(query, key, key, bias=torch.empty(2, 4, 100, 200, dtype=dtype)[..., ::2], **sizes)
    yield "diagonals", attention_call(query, key, key, bias=Alibi(torch.empty(4)), **sizes)


def ttir(configuration: Any) -> str:
    """Returns the first form of a kernel."""
    import triton.compiler
    from triton._C.libtriton import ir
    from triton.compiler.compiler import make_backend

    class Found(Exception):
        pass

    def first_stage(source: Any, target: Any, options: dict[str, Any], **_: Any) -> None:
        backend = make_backend(target)
        parsed = backend.parse_options(dict(options))
        context = ir.context()
        ir.load_dialects(context)
        backend.load_dialects(context)
        made = backend.get_codegen_implementation(parsed), backend.get_module_map()
        module = source.make_ir(target, parsed, *made, context)
        stages: dict[str, Any] = {}
        backend.add_stages(stages, parsed, source.language)
        raise Found(str(stages["ttir"](module, {})))

    triton.compiler.compile = first_stage
    configuration.kernel.device_caches.clear()
    try:
        configuration.kernel.warmup(*configuration.arguments, grid=(1,), **configuration.options)
    except Found as found:
        return str(found)
    raise AssertionError(configuration.name)


def argument_names(names: Sequence[str], arguments: Sequence[Any], kept: Sequence[str] = ()) -> Iterator[str]:
    """Yields the names of a kernel's arguments as the compiler sees them: fields of tuples, and no constants, which a 1
    is but in those that are ``kept``."""
    from triton.language import constexpr

    for name, value in zip(names, arguments, strict=False):
        if isinstance(value, tuple):
            yield from argument_names(getattr(value, "_fields", [name] * len(value)), value)
        elif hasattr(value, "block_shape"):
            # A descriptor comes with its sizes and strides.
            yield from [name] * (1 + 2 * len(value.block_shape))
        elif isinstance(value, Tensor) or not (
            value is None or isinstance(value, constexpr) or (type(value) is int and value == 1 and name not in kept)
        ):
            yield name


def narrow_products(configuration: Any) -> Iterator[str]:
    """Yields the 32-bit products of two numbers of which neither is a constant or counts few things."""
    text = ttir(configuration)
    kernel = configuration.kernel
    (header,) = re.findall(r"tt\.func public @\w+\((.*?)\) attributes", text)
    given = re.findall(r"(%\w+): ", header)
    names = list(argument_names(kernel.arg_names, configuration.arguments, kernel.do_not_specialize))
    assert len(given) == len(names), (given, names)
    few = {at for at, name in zip(given, names, strict=True) if FEW.fullmatch(name)}
    few |= set(re.findall(r"(%\w+) = arith\.constant", text))
    few |= {at for at, name in re.findall(r"(%([a-z]\w*?)(?:_\d+)?) = ", text) if FEW.fullmatch(name)}
    # What such a number is copied into, divided by or less than is one itself.
    for line in re.finditer(r"(%\w+) = (?:tt\.splat|arith\.divsi|arith\.minsi) (%\w+)", text):
        if line[2] in few:
            few.add(line[1])
    for line in re.finditer(r"(%\w+) = arith\.muli (%\w+), (%\w+) : (?:tensor<[\dx]+xi32>|i32) ", text):
        if line[2] not in few and line[3] not in few:
            yield f"{line[1]} = {line[2]} * {line[3]}"


def strided(module: str) -> Iterator[Any]:
    """Yields kernels whose results have columns that are no neighbours, which no table has."""
    from fastattn.kernels import product, softmax
    from fastattn.kernels.launch import Configuration
    from fastattn.kernels.rows import row_views

    launches = []
    if module == "product":
        x = torch.empty(512, 512, device="meta")
        launches = [product.product_launch(product.TILES[90][4, 1][1], x, x, x.t(), product.Epilogue(bias=x[0]))]
    elif module == "softmax":
        x = torch.empty(4, 1 << 18, 8, device="meta")
        forward = softmax_call(x, 1, mask=None, scale=1.0, dtype=None, log=False, backend="triton")
        backward = SoftmaxBackwardCall(x, x, None, 1, 1.0, x.dtype, False, "triton")
        for call, tensors in ((forward, 2), (backward, 3)):
            views, sizes = row_views(1, *[x] * tensors, None)
            launches += softmax.launches(call, views, sizes, x.dtype, backward=tensors == 3)
    for kernel, _, arguments, options in launches:
        yield Configuration(f"{module}, strided", kernel, arguments, options)


def main(part: int, parts: int) -> None:
    from triton.runtime import driver

    from fastattn.kernels import tiles
    from fastattn.tools.triton_report import _OfflineDriver

    driver.set_active(_OfflineDriver(90))
    tiles.example_calls = everything
    numbers = itertools.count(-part)
    checked = 0
    for module in MODULES:
        seen, kernels = set(), set()
        table = importlib.import_module(f"fastattn.kernels.{module}").configurations(90)
        for configuration in itertools.chain(table, strided(module)):
            kernel = configuration.kernel
            switches = (f"{name}={on}" for name, on in configuration.options.items() if isinstance(on, bool))
            kind = kernel.fn.__name__, *argument_names(kernel.arg_names, configuration.arguments), *switches
            # Other tiles and dtypes have the same offsets, and float64's kernels fewer arguments for them.
            if kind in seen or ("float64" in configuration.name and kernel in kernels):
                continue
            seen.add(kind)
            kernels.add(kernel)
            if next(numbers) % parts == 0:
                checked += 1
                for product in narrow_products(configuration):
                    print(f"{module}: {configuration.name}: {product}")
    print(f"checked {checked}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
