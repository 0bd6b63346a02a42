"""The cases of ``fastattn verify ops`` for the ops that know positions: rotary embedding, and embedding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

import fastattn
from fastattn.reference.philox import keep_mask
from fastattn.spec.checks import draw_dropout_state
from fastattn.tools import eager
from fastattn.tools.op_case import SEED, Draw, OpCase, Tensors

_VOCABULARY, _POSITIONS, _MODEL_DIM = 203, 150, 133
_DROPOUT_P = 0.1


def rotary_embedding_cases() -> Iterator[OpCase]:
    far = torch.randint(10**6, (2, 37), generator=torch.Generator().manual_seed(SEED))
    angle = torch.rand(37, 24, generator=torch.Generator().manual_seed(SEED)) * 100
    for variant, options in (
        ("", {}),
        ("neighbours", {"interleaved": True}),
        ("positions to 10^6", {"positions": far}),
        ("neighbours, positions to 10^6", {"positions": far, "interleaved": True}),
        ("half of the features", {"rotary_dim": 24, "offset": 5000}),
        ("tables", {"rotary_dim": 48, "cos": angle.cos(), "sin": angle.sin()}),
    ):

        def tensors(seed: int) -> Tensors:
            draw = Draw(seed)
            return {"query": draw(2, 6, 37, 48), "key": draw(2, 2, 37, 48)}

        def ours(t: Tensors, backend: str | None, options: Mapping[str, Any] = options) -> Tensors:
            given = _on(options, t["query"].device)
            query, key = fastattn.rotary_embedding(t["query"], t["key"], backend=backend, **given)
            return {"query": query, "key": key}

        def theirs(t: Tensors, options: Mapping[str, Any] = options) -> Tensors:
            given = _on(options, t["query"].device)
            return dict(zip(("query", "key"), eager.rotary_embedding(t["query"], t["key"], **given), strict=True))

        yield OpCase("rotary_embedding", "", variant, tensors, ours, theirs)


def embedding_cases() -> Iterator[OpCase]:
    generator = torch.Generator().manual_seed(SEED)
    # Squared, so that some ids come often and some never.
    ids = (torch.rand(7, 61, generator=generator) ** 2 * _VOCABULARY).long()
    positions = torch.randint(_POSITIONS, ids.shape, generator=generator)
    for variant, options in (
        ("", {}),
        ("padding", {"padding_idx": 0}),
        ("positions", {"positions": positions}),
        ("dropout", {"dropout_p": _DROPOUT_P}),
    ):

        def tensors(seed: int) -> Tensors:
            draw = Draw(seed)
            return {"weight": draw(_VOCABULARY, _MODEL_DIM), "position_table": draw(_POSITIONS, _MODEL_DIM)}

        def ours(t: Tensors, backend: str | None, options: Mapping[str, Any] = options) -> Tensors:
            seeded = torch.Generator().manual_seed(SEED) if "dropout_p" in options else None
            out = fastattn.embedding(
                ids.to(t["weight"].device),
                t["weight"],
                position_table=t["position_table"],
                scale=_MODEL_DIM**0.5,
                generator=seeded,
                backend=backend,
                **_on(options, t["weight"].device),
            )
            return {"out": out}

        def theirs(t: Tensors, options: Mapping[str, Any] = options) -> Tensors:
            device, keep = t["weight"].device, None
            if "dropout_p" in options:
                seeded = torch.Generator().manual_seed(SEED)
                state = draw_dropout_state(_DROPOUT_P, seeded, device)
                assert state is not None
                keep = keep_mask(state, _DROPOUT_P, 1, ids.numel(), _MODEL_DIM).view(*ids.shape, -1)
            out = eager.embedding(
                ids.to(device),
                t["weight"],
                position_table=t["position_table"],
                scale=_MODEL_DIM**0.5,
                keep=keep,
                **_on(options, device),
            )
            return {"out": out}

        yield OpCase("embedding", "", variant, tensors, ours, theirs)


def _on(options: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Returns the options with their tensors brought to a device."""
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in options.items()}


FAMILIES: dict[str, Callable[[], Iterator[OpCase]]] = {
    "rotary_embedding": rotary_embedding_cases,
    "embedding": embedding_cases,
}
