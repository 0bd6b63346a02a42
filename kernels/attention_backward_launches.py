"""The launches that add up the gradients of queries, keys and values, in the shares of ``slabs.py``."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn.kernels import slabs, tiles
from fastattn.kernels.arguments import View, broadcast, number, problem, view
from fastattn.kernels.attention_backward_repair import attention_bwd_repair_kernel
from fastattn.kernels.attention_backward_sums import attention_bwd_keys_kernel, attention_bwd_queries_kernel
from fastattn.kernels.boxes import box
from fastattn.kernels.launch import Launch, Tile, cdiv, launch, padded, precision, start
from fastattn.kernels.scores import Statistics
from fastattn.kernels.slabs import Share, Slabs
from fastattn.kernels.tile import FLAGGED
from fastattn.spec.attention import AttentionCall


class Grads(NamedTuple):
    """What is written; None where it is not wanted.

    Attributes:
        query: like the query.
        key: contiguous where heads share keys; likewise ``value``.
        bias: [batch, num_heads_q, seq_len_q, seq_len_k] that is 0 already, where each query has a bias of its own.
        of_keys: [batch, num_heads_q, seq_len_k] in the dtype of accumulators, where all queries share one.
    """

    query: Tensor | None
    key: Tensor | None
    value: Tensor | None
    bias: Tensor | None
    of_keys: Tensor | None


class Sums:
    """The launches for a call with one tile of keys."""

    def __init__(
        self, call: AttentionCall, dout: Tensor, statistics: Statistics, grads: Grads, tile: Tile, architecture: int
    ) -> None:
        self.call, self.dout, self.statistics, self.grads, self.tile = call, dout, statistics, grads, tile
        self.device = architecture
        self.problem = problem(call)
        mask = self.problem.mask
        batch, num_heads_q, seq_len_q, seq_len_k = call.shape
        self.planes = batch * num_heads_q
        self.tiles = cdiv(seq_len_k, tile.columns)
        self.packed = call.starts_q is not None
        # Each packed sequence has a band of its own.
        band = None if mask.diag_lo is None or mask.diag_hi is None or self.packed else (mask.diag_lo, mask.diag_hi)
        self.plan = slabs.plan(
            band, seq_len_q, seq_len_k, self.planes, tile.columns, call.query.element_size(),
            slabs.programs_at_once(call.query.device),
        )  # fmt: skip
        # Shares of whole groups of heads, or several of one group.
        self.group = call.group_size
        self.planes_at_once = cdiv(self.plan.num_planes, self.group) * self.group
        numbers = self.plan.num_planes * self.plan.num_slabs * tile.columns * self.plan.width
        self.room = Slabs(None if grads.query is None else call.query.new_empty(numbers), self.plan.width)
        hides = any(field is not None for field in (mask.diag_lo, mask.key_lengths, mask.segments_q, mask.dense.data))
        self.flags = [self._flags(seq_len_k), self._flags(seq_len_q)] if hides else [None, None]
        # The heads of a group have sums of their own, which are then added up: a program for all heads of a group would
        # leave a GPU without work where there are few keys and few groups.
        self.partial = [
            statistics[0].new_empty((1, num_heads_q if self.packed else self.planes_at_once, *tensor.shape[2:]))
            if self.group > 1 and grad is not None
            else None
            for grad, tensor in ((grads.key, call.key), (grads.value, call.value))
        ]
        so_far = None
        if self.plan.splits_planes and grads.query is not None:
            so_far = statistics[0].new_empty((1, 1, seq_len_q, call.query.shape[3]))
        self.so_far = broadcast(so_far)

    def run(self) -> None:
        """Launches all of it."""
        queries = tiles.choose(tiles.BACKWARD_QUERIES, self.call, self.device)
        for first in range(0, self.planes, self.planes_at_once):
            last = min(first + self.planes_at_once, self.planes)
            for share in self.plan.shares(first, last):
                start(self.keys_launch(share, first))
                if self.grads.query is None:
                    continue
                for at, part in enumerate(self.plan.tile_ranges(share, self.tiles)):
                    again = share.first_slab > 0 or at > 0

                    def multiply(tile: Tile, share: Share = share, part: Any = part, again: bool = again) -> None:
                        start(self.queries_launch(share, part, again, tile))

                    launch("attention_backward, queries", queries, multiply)
            if self.flags[0] is not None:
                start(self.repair_launch(first, last - first))
            for partial, grad in zip(self.partial, (self.grads.key, self.grads.value), strict=True):
                if partial is not None and grad is not None and not self.packed:
                    sums = partial[0, : last - first].unflatten(0, (-1, self.group)).sum(dim=1)
                    grad.flatten(0, 1)[first // self.group : last // self.group].copy_(sums)

        for partial, grad in zip(self.partial, (self.grads.key, self.grads.value), strict=True):
            if partial is not None and grad is not None and self.packed:
                grad.copy_(partial.unflatten(1, (-1, self.group)).sum(dim=2))

    def keys_launch(self, share: Share, base_plane: int) -> Launch:
        """Returns the launch for the keys of a share; ``base_plane`` is the first plane of the heads' own sums."""
        outputs = (*self._of_keys(), self.grads.of_keys, broadcast(self.grads.bias), self.room, self.flags[0])
        (first, last), (other, end) = [*self.plan.tile_ranges(share, self.tiles), (0, 0)][:2]
        places = (share.first_plane, share.num_planes, self._base(base_plane), share.first_slab, share.num_slabs)
        rows, keys, call = self.tile.rows, self.tile.columns, self.call
        found = [
            self._box(tensor, size, self.tile)
            for tensor, size in ((call.query, rows), (call.key, keys), (call.value, keys), (self.dout, rows))
        ]
        found.append(slabs.box(self.room, keys, rows, self.device) if self.tile.boxes else None)
        sizes = {"ROWS": rows, "KEYS": keys, **_dims(call)}
        return (
            attention_bwd_keys_kernel,
            (share.num_planes * (last - first + end - other),),
            (*self._inputs(), *outputs, self.problem, *found, *self._numbers(), *places, first, last - first, other),
            {"PRECISION": precision(), "PAIRED": self.plan.paired, **sizes, **self.tile.options},
        )

    def queries_launch(self, share: Share, part: tuple[int, int], again: bool, tile: Tile) -> Launch:
        """Returns the launch for the queries of a share, over a range of its tiles of keys."""
        call = self.call
        tensors = (view(call.key), broadcast(self.grads.query), self.so_far, self.room, self.flags[1])
        places = (share.first_plane, share.first_slab, share.num_slabs, *part, int(again))
        keys = min(tile.columns, self.tile.columns)
        found = (self._box(call.key, keys, tile), slabs.box(self.room, keys, tile.rows, self.device))
        sizes = {"TILE": self.tile.columns, "ROWS": tile.rows, "KEYS": keys}
        return (
            attention_bwd_queries_kernel,
            (share.num_planes * cdiv(call.shape.seq_len_q, tile.rows),),
            (*tensors, self.problem, *found, *self._numbers()[:2], *places),
            {
                "PRECISION": precision(),
                "PAIRED": self.plan.paired,
                "DIM": _dims(call)["DIM"],
                **sizes,
                **tile.options,
            },
        )

    def repair_launch(self, first_plane: int, num_planes: int) -> Launch:
        """Returns the launch that repairs what is not finite in some planes."""
        call = self.call
        tile = tiles.REPAIR
        tiles_k, blocks = cdiv(call.shape.seq_len_k, tile.rows), cdiv(call.shape.seq_len_q, tile.rows)
        programs = num_planes * (tiles_k + (0 if self.grads.query is None else blocks))
        outputs = (broadcast(self.grads.query), *self._of_keys(), *self.flags)
        places = (first_plane, num_planes, self._base(first_plane))
        return (
            attention_bwd_repair_kernel,
            (programs,),
            (*self._inputs(), *outputs, self.problem, *self._numbers(), *places),
            {"PRECISION": precision(), "SIZE": tile.rows, **_dims(call), **tile.options},
        )

    def _inputs(self) -> tuple[Any, ...]:
        call = self.call
        return (view(call.query), view(call.key), view(call.value), view(self.dout), *self.statistics)

    def _of_keys(self) -> tuple[View, View]:
        key, value = self.partial if self.group > 1 else (self.grads.key, self.grads.value)
        return broadcast(key), broadcast(value)

    def _base(self, plane: int) -> int:
        if self.group == 1:
            return -1
        return 0 if self.packed else plane

    def _numbers(self) -> tuple[Any, ...]:
        call = self.call
        return (number(call.softmax_scale, call.query.dtype), call.query.shape[3], call.value.shape[3])

    def _box(self, tensor: Tensor, rows: int, tile: Tile) -> Any:
        # A box would reach from one packed sequence into the next.
        return box(tensor, rows, self.device) if tile.boxes and not self.packed else None

    def _flags(self, length: int) -> Tensor:
        return self.statistics[0].new_empty((self.planes, cdiv(length, FLAGGED.value)), dtype=torch.int32)


def _dims(call: AttentionCall) -> dict[str, int]:
    return {"DIM": padded(call.query.shape[3]), "DIM_V": padded(call.value.shape[3])}
