"""The tiles of attention's kernels: for each architecture, number of bytes an element and head_dim, the fastest first.

Where the GPU has too little shared memory for one, the next is tried (``launch.launch``). None has been measured on a
GPU yet: they are what fits registers and shared memory by the compiler's report.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from fastattn.kernels.launch import Tile
from fastattn.masks import Causal, KeyLengths
from fastattn.spec.attention import AttentionCall, attention_call

Choices = dict[tuple[int, int], tuple[Tile, ...]]
Table = dict[int, Choices]

# In the interpreter, and on GPUs that no table knows: small enough for all of them.
ANY = 0
_SMALL: Choices = {
    (2, 256): (Tile(64, 64, 4, 2), Tile(64, 32, 4, 1), Tile(16, 16, 4, 1)),
    (4, 256): (Tile(64, 64, 4, 1), Tile(32, 32, 4, 1), Tile(16, 16, 4, 1)),
    (8, 256): (Tile(64, 64, 4, 1), Tile(32, 32, 4, 1), Tile(16, 16, 4, 1)),
}
# Products of float32 and float64 run on the plain cores, from registers.
_WIDE: Choices = {
    (4, 64): (Tile(64, 32, 4, 2), Tile(32, 32, 4, 1)),
    (4, 128): (Tile(64, 32, 8, 2), Tile(32, 16, 4, 1)),
    (4, 256): (Tile(32, 32, 8, 1), Tile(16, 16, 4, 1)),
    (8, 64): (Tile(32, 32, 4, 1), Tile(16, 16, 4, 1)),
    (8, 128): (Tile(32, 32, 8, 1), Tile(16, 16, 4, 1)),
    (8, 256): (Tile(16, 16, 8, 1),),
}
# Queries, then keys.
FORWARD: Table = {
    ANY: _SMALL,
    80: {
        (2, 64): (Tile(128, 64, 4, 3), Tile(128, 64, 4, 2), Tile(64, 32, 4, 2)),
        (2, 128): (Tile(128, 64, 8, 2), Tile(64, 32, 4, 2)),
        (2, 256): (Tile(64, 64, 8, 2), Tile(64, 32, 4, 1), Tile(32, 32, 4, 1)),
        **_WIDE,
    },
    90: {
        (2, 64): (Tile(128, 128, 8, 3), Tile(128, 64, 4, 2)),
        (2, 128): (Tile(128, 64, 8, 3), Tile(64, 64, 4, 2)),
        (2, 256): (Tile(128, 64, 8, 2), Tile(64, 32, 4, 1)),
        **_WIDE,
    },
}
FORWARD[100] = FORWARD[90]
# Queries a step, then the keys whose gradients a program owns.
BACKWARD_KEYS: Table = {
    ANY: _SMALL,
    80: {
        (2, 64): (Tile(64, 128, 8, 2), Tile(32, 64, 4, 2), Tile(32, 32, 4, 1)),
        (2, 128): (Tile(32, 128, 8, 2), Tile(32, 64, 4, 1), Tile(32, 32, 4, 1)),
        (2, 256): (Tile(32, 64, 8, 1), Tile(16, 32, 4, 1)),
        **_WIDE,
    },
    90: {
        (2, 64): (Tile(64, 128, 8, 2), Tile(64, 64, 4, 2)),
        (2, 128): (Tile(32, 128, 8, 2), Tile(32, 64, 4, 2)),
        (2, 256): (Tile(64, 64, 8, 1), Tile(32, 32, 4, 1)),
        **_WIDE,
    },
}
BACKWARD_KEYS[100] = BACKWARD_KEYS[90]
# The queries whose gradients a program owns, then keys a step.
BACKWARD_QUERIES: Table = {
    ANY: _SMALL,
    80: {
        (2, 64): (Tile(128, 64, 8, 2), Tile(64, 32, 4, 2), Tile(32, 32, 4, 1)),
        (2, 128): (Tile(128, 32, 8, 2), Tile(64, 32, 4, 1), Tile(32, 32, 4, 1)),
        (2, 256): (Tile(64, 32, 8, 1), Tile(32, 16, 4, 1)),
        **_WIDE,
    },
    90: {
        (2, 64): (Tile(128, 64, 8, 2), Tile(64, 64, 4, 2)),
        (2, 128): (Tile(128, 64, 8, 2), Tile(64, 64, 4, 2)),
        (2, 256): (Tile(64, 64, 8, 1), Tile(32, 32, 4, 1)),
        **_WIDE,
    },
}
BACKWARD_QUERIES[100] = BACKWARD_QUERIES[90]
# Tiles of scores that are computed for themselves: square, because a diagonal's owner walks along it.
SQUARE: Table = {
    ANY: _SMALL,
    80: {
        (2, 128): (Tile(64, 64, 4, 1), Tile(32, 32, 4, 1)),
        (2, 256): (Tile(64, 64, 8, 1), Tile(32, 32, 4, 1), Tile(16, 16, 4, 1)),
        (4, 128): (Tile(32, 32, 4, 1), Tile(16, 16, 4, 1)),
        (4, 256): (Tile(32, 32, 8, 1), Tile(16, 16, 4, 1)),
        (8, 256): (Tile(16, 16, 4, 1),),
    },
}
SQUARE[90] = SQUARE[100] = SQUARE[80]
# Keys a step, of a few packed queries, whose number is their own.
DECODE: Table = {
    ANY: _SMALL,
    80: {
        (2, 64): (Tile(16, 128, 4, 3), Tile(16, 64, 4, 2), Tile(16, 32, 4, 1)),
        (2, 128): (Tile(16, 64, 4, 3), Tile(16, 64, 4, 2), Tile(16, 32, 4, 1)),
        (2, 256): (Tile(16, 32, 4, 3), Tile(16, 32, 4, 2), Tile(16, 16, 4, 1)),
        (4, 128): (Tile(16, 32, 4, 2), Tile(16, 16, 4, 1)),
        (4, 256): (Tile(16, 16, 4, 2), Tile(16, 16, 4, 1)),
        (8, 256): (Tile(16, 16, 4, 1),),
    },
}
DECODE[90] = DECODE[100] = DECODE[80]


def choose(table: Table, call: AttentionCall, architecture: int) -> tuple[Tile, ...]:
    """Returns the tiles to try for a call: those of the newest architecture of the table that is not newer."""
    known = table[max(a for a in table if a <= architecture)]
    dim = max(call.query.shape[3], call.value.shape[3])
    return next(tile for (size, most), tile in known.items() if size == call.query.element_size() and dim <= most)


def calls(table: Table, architecture: int) -> Iterator[tuple[str, AttentionCall, Tile]]:
    """Yields ``(name, call, tile)`` for each tile of a table: calls to compile a kernel for."""
    dtypes = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}
    for (size, dim), choices in table[architecture].items():
        for tile in choices:
            for name, call in example_calls(dtypes[size], dim):
                yield f"{dtypes[size]}".removeprefix("torch.") + f" {dim} {name} {tuple(tile)}", call, tile


def example_calls(dtype: torch.dtype, dim: int) -> Iterator[tuple[str, AttentionCall]]:
    """Yields calls that between them reach every branch of a kernel, by name."""
    query = torch.empty(2, 4, 1024, dim, dtype=dtype)
    key = torch.empty(2, 2, 1024, dim, dtype=dtype)
    bias = torch.empty(2, 4, 1024, 1024, dtype=dtype)
    lengths = KeyLengths(torch.empty(2, dtype=torch.int32))
    options: dict[str, dict[str, Any]] = {
        "plain": {},
        "causal": {"mask": Causal()},
        "everything": {"mask": Causal() & lengths, "bias": bias, "dropout_p": 0.5, "softcap": 2.0},
    }
    for name, given in options.items():
        yield name, attention_call(query, key, key, backend="triton", **given)
