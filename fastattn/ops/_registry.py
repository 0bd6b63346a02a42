"""Registers an op with PyTorch's dispatcher: schema, kernel, fake, autograd and autocast.

``Library.define`` and ``impl`` cost 3 us a call, ``torch.library.custom_op`` 12; a decode step takes tens.  Python
kernels under two keys cost 10 us, so a plain eager call goes around the dispatcher: nobody is there to see the op.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

LIBRARY = torch.library.Library("fastattn", "DEF")


def define(
    name: str,
    schema: str,
    *,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    function: type[torch.autograd.Function] | None = None,
    autocast: bool = False,
    autocast_float32: Sequence[str] = (),
) -> Callable[..., Any]:
    """Registers ``fastattn::name`` and returns a function that calls it.

    Args:
        name: of the op.
        schema: arguments and results, as in "(Tensor x, float y) -> Tensor".
        kernel: computes the op on any device (it asks ``_dispatch.serve`` for a backend).  In a list of results it may
            return None for one that is not wanted; the dispatcher, which has no such thing, gets an empty tensor.
        fake: returns uninitialised results of the right shapes, dtypes and strides.
        function: its first-order derivative; without one the op is not differentiable.
        autocast: True casts floating inputs to the autocast dtype where autocast is on; either way it is off inside.
        autocast_float32: device types on which it casts them to float32, as PyTorch does for sensitive ops.
    """
    LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    op = getattr(torch.ops.fastattn, name).default
    LIBRARY.impl(name, _without_none(kernel) if schema.endswith("Tensor[]") else kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastattn::{name}", fake, lib=LIBRARY)

    if function is None:
        # Fall through rather than exclude the autograd keys: a kernel may itself differentiate a formula.
        LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")
    else:
        LIBRARY.impl(name, _autograd(op, function), "Autograd")
    for device_type in ("cpu", "cuda"):
        kernel_under_autocast = _autocast(op, device_type, autocast, device_type in autocast_float32)
        LIBRARY.impl(name, kernel_under_autocast, f"Autocast{device_type.upper()}")

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling() or not _is_plain_eager(args):
            return op(*args)
        if function is not None and torch.is_grad_enabled() and any(_requires_grad(a) for a in args):
            return function.apply(*args)
        return kernel(*args)

    return call


def plain_apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """Returns ``function.apply`` without its checks for ``torch.func``, which a plain call has passed: 1.4 us less."""
    apply: Callable[..., Any] = super(torch.autograd.Function, function).apply  # type: ignore[misc]
    return apply


_PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None), bool, int, float, str, list, torch.dtype))


def _is_plain_eager(args: tuple[Any, ...]) -> bool:
    """Whether the dispatcher would do autograd at most: no mode, transform, trace or subclass would meet the op."""
    if (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._is_any_autocast_enabled()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or torch.autograd.profiler._is_profiler_enabled
    ):
        return False
    first = args[0]
    return (first.is_cpu or first.is_cuda) and _PLAIN.issuperset(map(type, args))


def _without_none(kernel: Callable[..., list[Tensor | None]]) -> Callable[..., list[Tensor]]:
    return lambda *args: [args[0].new_empty(0) if result is None else result for result in kernel(*args)]


def _autograd(op: torch._ops.OpOverload, function: type[torch.autograd.Function]) -> Callable[..., Any]:
    def differentiate(*args: Any) -> Any:
        if torch.is_grad_enabled() and any(_requires_grad(a) for a in args):
            return function.apply(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    return differentiate


def _requires_grad(arg: Any) -> bool:
    return isinstance(arg, Tensor) and arg.requires_grad


def _autocast(op: torch._ops.OpOverload, device_type: str, cast: bool, float32: bool) -> Callable[..., Any]:
    # Without a cast too, autocast must end here: it would round the products inside a kernel that is a formula.
    key = torch._C.DispatchKey.AutocastCPU if device_type == "cpu" else torch._C.DispatchKey.AutocastCUDA

    def cast_and_call(*args: Any) -> Any:
        dtype = torch.float32 if float32 else torch.get_autocast_dtype(device_type)
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            return op(*((_cast(a, dtype) for a in args) if cast or float32 else args))

    return cast_and_call


def _cast(arg: Any, dtype: torch.dtype) -> Any:
    # As PyTorch's own policy: float64 stays, because who asks for it wants it.
    if isinstance(arg, Tensor) and arg.is_floating_point() and arg.dtype != torch.float64:
        return arg.to(dtype)
    return arg
