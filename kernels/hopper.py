"""Launches of ``hopper_forward.py``: attention forward on Hopper, where a tile asks for it and the call allows it.

What it does not serve, the plain kernel serves.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import torch
import triton
from torch import Tensor

from fastattn.kernels import tiles
from fastattn.kernels.arguments import mask, problem, view
from fastattn.kernels.boxes import box
from fastattn.kernels.interpreter import is_interpreting
from fastattn.kernels.launch import Configuration, Tile, cdiv, multiprocessors, padded, start
from fastattn.kernels.replay import Launch
from fastattn.kernels.running import folds
from fastattn.spec.attention import AttentionCall, empty_output

_HOPPER = 90
_EACH = 64  # queries of a group of warps
_PLAIN_ROWS = 128
# Gluon is no settled interface: the versions of Triton in which this one was seen to compile.
_KNOWN = triton.__version__.split(".")[:2] == ["3", "6"]
# For each padded head_dim the rows, columns and stages of tiles, the likely ones first, for which there are registers
# and shared memory; with 256 columns only where there is no mask, whose bounds spill.
CHOICES = {
    64: ((192, 64, 4), (128, 128, 2), (128, 128, 4), (128, 64, 4)),
    128: ((128, 128, 2), (128, 64, 3), (128, 64, 2)),
    256: ((128, 64, 2),),
}


def serves(call: AttentionCall, tile: Tile, architecture: int) -> bool:
    """Returns whether the kernel computes a call, on such a GPU and with such a tile."""
    dim = padded(call.query.shape[3])
    return (
        tile.specialised
        and architecture == _HOPPER
        and not is_interpreting()
        and _is_there()
        and call.query.element_size() == 2
        and (tile.rows, tile.columns, tile.num_stages) in CHOICES.get(dim, ())
        and padded(call.value.shape[3]) == dim
        and call.value.shape[3] % 8 == 0  # else the rows of out are not aligned
        and (dim < 256 or not _hides(call))
        and folds(call)
        and call.dropout_state is None
        and call.sinks is None
        and call.starts_q is None
        and call.segments_q is None
        and call.dense_mask is None
        and all(box(t, tile.columns, architecture) is not None for t in (call.query, call.key, call.value))
    )


def tiles_for(call: AttentionCall, architecture: int) -> Iterator[Tile]:
    """Yields tiles that are worth a search for a call; other calls run with them as with plain ones of 8 warps."""
    for rows, columns, stages in CHOICES.get(padded(call.query.shape[3]), ()):
        tile = Tile(rows, columns, 8, stages, specialised=True)
        if serves(call, tile, architecture):
            yield from (tile, tile._replace(persistent=True))


def plain(tile: Tile) -> Tile:
    """Returns the tile that a call which is not served runs with on the plain kernel."""
    return tile._replace(rows=_PLAIN_ROWS, specialised=False) if tile.rows > _PLAIN_ROWS and tile.specialised else tile


def attention_fwd_hopper(call: AttentionCall, out: Tensor, lse: Tensor, tile: Tile) -> None:
    """Writes out and lse of a call that :func:`serves` says it can."""
    for launch in _launches(call, out, lse, tile):
        start(launch)


def _hides(call: AttentionCall) -> bool:
    """Returns whether a mask may hide anything: a band, or lengths."""
    return mask(call).diag_lo is not None or call.key_lengths is not None


def _is_there() -> bool:
    return _KNOWN and importlib.util.find_spec("triton.experimental.gluon.language.nvidia.hopper") is not None


def _launches(call: AttentionCall, out: Tensor, lse: Tensor, tile: Tile) -> Iterator[Launch]:
    from fastattn.kernels.hopper_forward import attention_fwd_hopper_kernel, attention_fwd_hopper_repair_kernel

    batch, num_heads_q, seq_len_q, _ = call.shape
    dim = padded(call.query.shape[3])
    groups = tile.rows // _EACH
    blocks = cdiv(seq_len_q, tile.rows) * batch * num_heads_q
    meant, hides = problem(call), _hides(call)
    flags = lse.new_empty(lse.shape, dtype=torch.int32) if hides else None
    boxes = ((call.query, _EACH), (call.key, tile.columns), (call.value, tile.columns), (out, _EACH))
    arguments = (*(_gluon_box(tensor, side) for tensor, side in boxes), lse, flags, meant, blocks)
    sizes = {"KEYS": tile.columns, "DIM": dim, "GROUPS": groups}
    programs = min(blocks, multiprocessors(call.query.device) or blocks) if tile.persistent else blocks
    yield attention_fwd_hopper_kernel, (programs,), arguments, {**sizes, "STAGES": tile.num_stages, "num_warps": 4}
    if hides:
        views = (view(call.query), view(call.key), view(call.value), view(out))
        dims = (call.query.shape[3], call.value.shape[3])
        options = {**sizes, "DIM_V": dim, "num_warps": 4, "num_stages": 1}
        yield attention_fwd_hopper_repair_kernel, (blocks * groups,), (*views, lse, flags, meant, *dims), options


def _gluon_box(tensor: Tensor, rows: int) -> Any:
    """Returns the descriptor of ``boxes.box`` as Gluon takes it, with the layout of its boxes in shared memory."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    plain = box(tensor, rows, _HOPPER)
    assert plain is not None, "serves() asked"
    dtype = gl.bfloat16 if tensor.dtype == torch.bfloat16 else gl.float16
    layout = gl.NVMMASharedLayout.get_default_for(plain.block_shape, dtype)
    return TensorDescriptor(plain.base, plain.shape, plain.strides, plain.block_shape, layout)


def configurations(architecture: int) -> Iterator[Configuration]:
    """Yields both kernels for calls with and without a band; none but for Hopper."""
    seen = set()
    for dim, choices in CHOICES.items():
        for name, call in tiles.example_calls(torch.bfloat16, dim):
            for rows, columns, stages in choices:
                tile = Tile(rows, columns, 8, stages, specialised=True)
                if not serves(call, tile, architecture):
                    continue
                for kernel, _, arguments, options in _launches(call, *empty_output(call), tile):
                    what = kernel.fn.__name__.removesuffix("_kernel").replace("_hopper", "").replace("_", " ")
                    title = f"hopper {what} bfloat16 {dim} {name}"
                    # The repair is the same for any number of stages.
                    if (title, *options.values()) not in seen:
                        seen.add((title, *options.values()))
                        yield Configuration(f"{title} {tile}", kernel, arguments, options)
