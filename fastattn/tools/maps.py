"""Records which token looked at which, and shows it."""

from __future__ import annotations

import fnmatch
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastattn.backends.base import Backend
from fastattn.ops.attention_weights import log_total, weigh
from fastattn.spec.attention import AttentionCall
from fastattn.spec.attention_weights import weights_call
from fastattn.tools import maps_html
from fastattn.tools.activate import activate
from fastattn.tools.swap import swap
from fastattn.tools.watch import watching

Labels = Mapping[str, tuple[Sequence[str], Sequence[str]]] | tuple[Sequence[str], Sequence[str]]

# Weights of one call that are kept whole; above, cells of several tokens are.  2^22 float32 are 16 MiB.
_WHOLE_ELEMENTS = 1 << 22
# A picture of more cells a side than this shows no more on a screen.
_POOLED_SIDE = 256


class AttentionMap(NamedTuple):
    """The attention weights of one call.

    Attributes:
        weights: float32 [batch, num_heads, rows, columns], before dropout; a query a row, a key a column, unless
            pooled.
        pool_size: 1, or the side of the cells, in tokens, over which the weights of a long call are averaged.
    """

    weights: Tensor
    pool_size: int = 1


class AttentionMaps:
    """What :func:`record_attention` recorded, by the name of the layer.

    ``maps[name]`` is the weights of a layer's last call, float32 [batch, num_heads, rows, columns].  Where a layer was
    called for one new token at a time, as in generation with a cache, it is all of them, one row a token.
    """

    def __init__(self) -> None:
        self._calls: dict[str, list[AttentionMap]] = {}

    @property
    def names(self) -> list[str]:
        """The layers that attended, in the order in which they first did."""
        return list(self._calls)

    def calls(self, name: str) -> list[AttentionMap]:
        """Returns every call of a layer.

        Raises:
            KeyError: it did not attend; the message lists those that did.
        """
        if name not in self._calls:
            raise KeyError(
                f"no attention recorded in {name!r}; layers are {', '.join(map(repr, self._calls)) or 'none'}"
            )
        return self._calls[name]

    def __getitem__(self, name: str) -> Tensor:
        return self.map(name).weights

    def __len__(self) -> int:
        return len(self._calls)

    def __iter__(self) -> Iterator[str]:
        return iter(self._calls)

    def map(self, name: str) -> AttentionMap:
        """Returns the last call of a layer, or all steps of a generation as one."""
        calls = self.calls(name)
        if len(calls) > 1 and _are_steps(calls):
            return AttentionMap(_stacked([c.weights for c in calls]))
        return calls[-1]

    def save_html(
        self,
        path: str | os.PathLike[str],
        *,
        labels: Labels | None = None,
        batch: int = 0,
        title: str = "Attention maps",
    ) -> Path:
        """Writes one page with every layer and head, to look at in a browser; it needs no network.

        Args:
            path: of the file.
            labels: the tokens of the rows and of the columns: one pair for all layers, or pairs by layer name, which
                may be a pattern ("encoder.*"), the first that fits.  By default positions.
            batch: which entry of the batch to show.
            title: of the page.

        Returns:
            The path.

        Raises:
            ValueError: nothing was recorded, labels do not fit, or the batch has no such entry.
        """
        layers = [self._layer(name, labels, batch) for name in self._require()]
        target = Path(path)
        target.write_text(maps_html.page(title, layers), encoding="utf-8")
        return target

    def save_png(
        self,
        path: str | os.PathLike[str],
        *,
        layers: str | Sequence[str] | None = None,
        labels: Labels | None = None,
        batch: int = 0,
        title: str | None = None,
    ) -> Path:
        """Writes a picture: a row of heads for each layer, behind their mean.

        Args:
            path: of the file; a suffix that matplotlib knows (".png", ".svg", ".pdf").
            layers: names or patterns of the layers to show; by default all.
            labels: as in :meth:`save_html`.
            batch: which entry of the batch to show.
            title: above the picture.

        Returns:
            The path.

        Raises:
            ValueError: no layer fits, labels do not fit, or the batch has no such entry.
            ModuleNotFoundError: matplotlib is not installed; the message says how to get it.
        """
        from fastattn.tools import maps_png

        patterns = ["*"] if layers is None else [layers] if isinstance(layers, str) else list(layers)
        names = [n for n in self._require() if any(fnmatch.fnmatchcase(n, p) for p in patterns)]
        if not names:
            raise ValueError(f"no layer fits {patterns}; layers are {', '.join(map(repr, self.names))}")
        maps_png.save(Path(path), [self._layer(name, labels, batch) for name in names], title)
        return Path(path)

    def _require(self) -> list[str]:
        if not self._calls:
            raise ValueError("no attention was recorded: run the model inside `with record_attention(model) as maps`")
        return self.names

    def _layer(self, name: str, labels: Labels | None, batch: int) -> maps_html.Layer:
        found = self.map(name)
        if not 0 <= batch < found.weights.shape[0]:
            raise ValueError(f"batch must be in [0, {found.weights.shape[0]}), got {batch}")
        weights = found.weights[batch]
        pair = _labels_for(name, labels)
        sides = []
        for side, length, given in zip(("rows", "columns"), weights.shape[1:], pair or (None, None), strict=True):
            if given is None:
                sides.append([_position(i, found.pool_size) for i in range(length)])
            elif len(given) != length:
                raise ValueError(f"{name} has {length} {side}, got {len(given)} labels")
            else:
                sides.append([str(label) for label in given])
        return maps_html.Layer(name or "attention", weights, sides[0], sides[1])


@contextmanager
def record_attention(model: nn.Module) -> Iterator[AttentionMaps]:
    """Records the attention weights of every layer of ``model`` that attends inside the block.

    ``nn.MultiheadAttention`` and ``F.scaled_dot_product_attention`` run on fastattn meanwhile (see
    :func:`fastattn.swap` and :func:`fastattn.activate`), which computes the weights from query, key and lse beside the
    output: no layer has to be asked for them, and what the model returns is what it always returns.  The weights are
        those before dropout.  Those of long
    sequences are averaged over cells, in memory that does not grow with the product of the lengths.

    Args:
        model: any module; it is the same again after the block.

    Yields:
        The maps, which are complete after the block.
    """
    maps = AttentionMaps()

    def on_call(layer: str, op: str, call: Any, backend: Backend) -> None:
        if op == "attention":
            maps._calls.setdefault(layer, []).append(_weights(call))

    report = swap(model, verbose=False)
    try:
        with activate(), watching(model, on_call):
            yield maps
    finally:
        report.undo()


@torch.no_grad()
def _weights(call: AttentionCall) -> AttentionMap:
    shape = call.shape
    wide = torch.float64 if call.query.dtype == torch.float64 else torch.float32
    query, key = call.query.to(wide), call.key.to(wide)
    plain = call._replace(query=query, key=key, value=key, dropout_state=None, dropout_p=0.0)
    lse = log_total(plain)
    if shape.batch * shape.num_heads_q * shape.seq_len_q * shape.seq_len_k <= _WHOLE_ELEMENTS:
        weights, _ = weigh(weights_call(plain, lse, "none", None, 1))
        return AttentionMap(weights.float())
    size = -(-max(shape.seq_len_q, shape.seq_len_k) // _POOLED_SIDE)
    weights, _ = weigh(weights_call(plain, lse, "pooled", None, size))
    return AttentionMap(weights.float(), size)


def _are_steps(calls: Sequence[AttentionMap]) -> bool:
    """Whether calls are the steps of one generation: a prompt, then one query at a time over keys that never shrink."""
    for before, after in itertools.pairwise(calls):
        same = before.weights.shape[:2] == after.weights.shape[:2] and before.pool_size == after.pool_size == 1
        if not same or after.weights.shape[2] != 1 or after.weights.shape[3] < before.weights.shape[3]:
            return False
    return True


def _stacked(weights: Sequence[Tensor]) -> Tensor:
    columns = max(w.shape[3] for w in weights)
    return torch.cat([nn.functional.pad(w, (0, columns - w.shape[3])) for w in weights], dim=2)


def _labels_for(name: str, labels: Labels | None) -> tuple[Sequence[str], Sequence[str]] | None:
    if not isinstance(labels, Mapping):
        return labels
    return next((pair for pattern, pair in labels.items() if fnmatch.fnmatchcase(name, pattern)), None)


def _position(i: int, pool_size: int) -> str:
    return str(i) if pool_size == 1 else f"{i * pool_size}-{(i + 1) * pool_size - 1}"
