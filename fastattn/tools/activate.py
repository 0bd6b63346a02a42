"""Routes PyTorch's own ``scaled_dot_product_attention`` to fastattn, and back."""

from __future__ import annotations

import threading
import warnings
from types import TracebackType

import torch
from torch import Tensor

from fastattn.errors import FallbackWarning, UnsupportedError
from fastattn.ops.attention import scaled_dot_product_attention

_OP = "scaled_dot_product_attention"
# The first is reached with autograd in the way, the second in inference mode.
_KEYS = ("AutogradCPU", "CPU")


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
    models with ``attn_implementation="sdpa"``, ``torch.compile``.  PyTorch's fused inference path of
    ``nn.MultiheadAttention`` and ``nn.TransformerEncoderLayer`` does not call it and is switched off meanwhile
    (``torch.backends.mha``).  A call that asks for the math backend (``torch.nn.attention.sdpa_kernel``), and one that
    fastattn refuses, goes to PyTorch as before; the latter warns once.

    Returns:
        A handle; ``with fastattn.activate(): ...`` routes inside the block only.  Without ``with``, :func:`deactivate`
        ends it.

    Blocks nest and may overlap between threads: the routing ends with the last of them, and PyTorch is then exactly as
    before.

    Differs from ``torch.nn.attention.activate_flash_attention_impl``, which reaches only the calls that PyTorch gives
    to its flash kernel: not those with dropout, a mask that requires a gradient, or a value dim of its own.
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
            for key in _KEYS:
                self._library.impl(_OP, _routed, key)
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
    why = _not_ours(attn_mask, is_causal)
    if why is None:
        try:
            return scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        except (UnsupportedError, ValueError, TypeError) as error:
            why = str(error)
    # decompose() is the op's own composite implementation, which an override of its dispatch keys leaves in place.
    out = torch.ops.aten.scaled_dot_product_attention.default.decompose(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )
    # Only now: where PyTorch refuses the call too, its own error says what is wrong.
    if why and why not in _warned and not torch.compiler.is_compiling():
        _warned.add(why)
        warnings.warn(f"PyTorch serves this scaled_dot_product_attention: {why}", FallbackWarning, stacklevel=2)
    return out


def _not_ours(attn_mask: Tensor | None, is_causal: bool) -> str | None:
    """Returns why PyTorch shall serve a call before fastattn is asked ("" where the user chose so), or None."""
    if not torch._C._get_flash_sdp_enabled():
        return ""
    if is_causal and attn_mask is not None:
        # Its documentation forbids both, its CPU kernel ands them: that stays its business.
        return "attn_mask was given together with is_causal=True"
    return None
