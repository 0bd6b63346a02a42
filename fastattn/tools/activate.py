"""Routes PyTorch's own ``scaled_dot_product_attention`` to fastattn, and back.

Two overrides in PyTorch's dispatcher.  The op itself, which is a composite, is overridden for eager calls, so that all
of them arrive. While a compiler traces it is left as it is: what is traced outlives the routing, in compiled functions
and in caches on disk.  Compiled code calls the flash kernel that the composite chooses, and that is overridden too.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from fastattn import masks
from fastattn.errors import FallbackWarning, UnsupportedError
from fastattn.ops._dispatch import resolve
from fastattn.ops.attention import scaled_dot_product_attention
from fastattn.spec.attention import DIFFERENTIABLE, AttentionCall, attention_call, kept_lse_dtype, lse_dtype

_FLASH = "_scaled_dot_product_flash_attention_for_cpu"
_FLASH_BACKWARD = "_scaled_dot_product_flash_attention_for_cpu_backward"


class Activation:
    """What :func:`activate` returns: a context manager that routes for the length of a ``with`` block."""

    def __init__(self, was_on: bool) -> None:
        self._was_on = was_on

    def __enter__(self) -> Activation:
        _routing.enter(self._was_on)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _routing.leave()


def activate() -> Activation:
    """Routes ``torch.nn.functional.scaled_dot_product_attention`` on CPU tensors to fastattn.

    Every caller is reached, in every thread: your code, ``nn.MultiheadAttention`` and ``nn.Transformer*``, Hugging Face
    models with ``attn_implementation="sdpa"``.  PyTorch's fused inference path of ``nn.MultiheadAttention`` and
    ``nn.TransformerEncoderLayer`` does not call it and is switched off meanwhile (``torch.backends.mha``).  A call that
    asks for the math backend (``torch.nn.attention.sdpa_kernel``), and one that fastattn refuses, goes to PyTorch as
    before; the latter warns once.  Compiled code is reached where PyTorch gives the call to its flash kernel: not with
    dropout, a mask that requires a gradient, or a value dim of its own.

    Returns:
        A handle; ``with fastattn.activate(): ...`` routes inside the block only.  Without ``with``, :func:`deactivate`
        ends it.

    Blocks nest and may overlap between threads: the routing ends with the last of them, and PyTorch is then exactly as
    before.

    Differs from ``torch.nn.attention.activate_flash_attention_impl``, which reaches only the calls that PyTorch gives
    to its flash kernel, and of which one can be active at a time.
    """
    return Activation(_routing.switch_on())


def deactivate() -> None:
    """Ends what :func:`activate` began, if it is active; ``with`` blocks still open keep routing until they end."""
    _routing.switch_off()


class _Routing:
    """The override in PyTorch's dispatcher: in place while it is switched on or a block is open."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._on = False
        self._blocks = 0
        self._library: torch.library.Library | None = None
        self._fastpath_before = True

    @property
    def active(self) -> bool:
        return self._library is not None

    def switch_on(self) -> bool:
        """Returns whether it was on before."""
        with self._lock:
            was_on, self._on = self._on, True
            self._update()
            return was_on

    def switch_off(self) -> None:
        with self._lock:
            self._on = False
            self._update()

    def enter(self, was_on: bool) -> None:
        with self._lock:
            # activate() switched on; the block takes that over, and leaves the switch as it found it.
            self._on = was_on
            self._blocks += 1
            self._update()

    def leave(self) -> None:
        with self._lock:
            self._blocks -= 1
            self._update()

    def _update(self) -> None:
        wanted = self._on or self._blocks > 0
        if wanted and self._library is None:
            self._fastpath_before = torch.backends.mha.get_fastpath_enabled()
            torch.backends.mha.set_fastpath_enabled(False)
            self._library = torch.library.Library("aten", "IMPL")
            # The first is reached with autograd in the way, the second in inference mode.
            for key in ("AutogradCPU", "CPU"):
                self._library.impl("scaled_dot_product_attention", _routed, key)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="(?s).*Overriding a previously registered kernel")
                self._library.impl(_FLASH, _forward_or(_original(_FLASH)), "CPU")
                self._library.impl(_FLASH_BACKWARD, _backward_or(_original(_FLASH_BACKWARD)), "CPU")
        elif not wanted and self._library is not None:
            self._library._destroy()
            self._library = None
            torch.backends.mha.set_fastpath_enabled(self._fastpath_before)


_routing = _Routing()
_warned: set[str] = set()


def is_active() -> bool:
    """Returns whether ``scaled_dot_product_attention`` is routed to fastattn now."""
    return _routing.active


def _routed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    why = ""
    if not _composite_first(query, attn_mask, is_causal):
        try:
            return scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        except (UnsupportedError, ValueError, TypeError) as error:
            why = str(error)
    # decompose() is the op's own composite implementation, which an override of its dispatch keys leaves in place.
    out = torch.ops.aten.scaled_dot_product_attention.default.decompose(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )
    # Only now: where PyTorch refuses the call too, its own error says what is wrong.
    _warn(why)
    return out


def _composite_first(query: Tensor, attn_mask: Tensor | None, is_causal: bool) -> bool:
    """Whether PyTorch's composite shall see a call first; it leads to the flash kernel, and so back to us, where it
    can."""
    if type(query) not in (Tensor, torch.nn.Parameter) or torch._C._len_torch_dispatch_stack() > 0:
        return True  # traced, counted or otherwise looked at
    if not torch._C._get_flash_sdp_enabled():
        return True  # the user asked for another backend
    # PyTorch's documentation forbids both, its flash kernel ands them: which it is stays its business.
    return is_causal and attn_mask is not None


def _warn(why: str) -> None:
    if why and why not in _warned:
        _warned.add(why)
        warnings.warn(f"PyTorch serves this scaled_dot_product_attention: {why}", FallbackWarning, stacklevel=3)


def _original(op: str) -> Callable[..., Any]:
    """Returns PyTorch's own kernel of an op, for use while it is overridden."""
    kernel = torch.library.get_kernel(f"aten::{op}", "CPU")
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    return lambda *args, **kwargs: kernel.call_boxed(keys, *args, **kwargs)


def _flash_call(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool, attn_mask: Tensor | None, scale: float | None
) -> AttentionCall:
    query, key, value = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, value))
    allowed = attn_mask is not None and attn_mask.dtype == torch.bool
    mask: masks.Mask | None = masks.Causal("top_left") if is_causal else None
    if attn_mask is not None and allowed:
        mask = masks.Dense(attn_mask) if mask is None else mask & masks.Dense(attn_mask)
    return attention_call(
        query,
        key,
        value,
        mask=mask,
        bias=None if allowed else attn_mask,
        dropout_p=0.0,
        softmax_scale=scale,
        softcap=None,
        sinks=None,
        generator=None,
        backend=resolve(None),
    )


def _forward_or(original: Callable[..., Any]) -> Callable[..., Any]:
    def forward(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        attn_mask: Tensor | None = None,
        scale: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        try:
            out, lse = torch.ops.fastattn.attention(*_flash_call(query, key, value, is_causal, attn_mask, scale))
        except (UnsupportedError, ValueError, TypeError) as error:
            result = original(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)
            _warn(str(error))
            return result
        # Compiled code relies on PyTorch's strides.
        lse = lse.to(lse_dtype(query.dtype))
        return _laid_out(out, torch.empty_like(query)), lse.transpose(1, 2).contiguous().transpose(1, 2)

    return forward


def _backward_or(original: Callable[..., Any]) -> Callable[..., Any]:
    def backward(
        grad_out: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        logsumexp: Tensor,
        dropout_p: float,
        is_causal: bool,
        *,
        attn_mask: Tensor | None = None,
        scale: float | None = None,
    ) -> tuple[Tensor, ...]:
        try:
            call = _flash_call(query, key, value, is_causal, attn_mask, scale)
            lse = logsumexp.to(kept_lse_dtype(query.device)).contiguous()
            needed = [name in ("query", "key", "value") for name in DIFFERENTIABLE]
            grad_out = grad_out if grad_out.stride(-1) == 1 else grad_out.contiguous()
            with _above_autograd():
                grads = torch.ops.fastattn.attention_backward(*call, out, lse, grad_out, None, needed)
        except (UnsupportedError, ValueError, TypeError) as error:
            result = original(
                grad_out, query, key, value, out, logsumexp, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
            )
            _warn(str(error))
            return result
        # PyTorch's are [batch, seq_len, heads, head_dim] in memory.
        return tuple(_laid_out(g, torch.empty_permuted(g.shape, (0, 2, 1, 3), dtype=g.dtype)) for g in grads[:3])

    return backward


def _above_autograd() -> torch._C._ForceDispatchKeyGuard:
    """Ends, for a block, what PyTorch sets for a kernel below autograd: the reference backend differentiates its
    formula."""
    exclude = torch._C._dispatch_tls_local_exclude_set().remove(torch._C.DispatchKey.AutogradFunctionality)
    return torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), exclude)


def _laid_out(tensor: Tensor, like: Tensor) -> Tensor:
    return tensor if tensor.stride() == like.stride() else like.copy_(tensor)
