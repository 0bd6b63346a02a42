"""The tiles of attention's kernels: for each architecture, number of bytes an element and head_dim, the fastest first.

Where the GPU has too little shared memory for one, the next is tried (``launch.launch``); after one of 99 KB, which
every GPU has, there is none. None has been measured on a GPU yet: they are what fits registers and shared memory by the
compiler's report.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

import torch

from fastattn.biases import Alibi
from fastattn.kernels import replay
from fastattn.kernels.launch import Tile, padded
from fastattn.masks import Causal, KeyLengths
from fastattn.spec.attention import AttentionCall, attention_call
from fastattn.spec.varlen_attention import varlen_call

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
# The forward's, which hold an output besides. Few keys a step, because a thread loads all of its operands of a product
# at once, and the compiler runs out of registers for them.
_WIDE_FORWARD: Choices = {
    **_WIDE,
    (4, 64): (Tile(32, 32, 4, 2), Tile(32, 16, 4, 1)),
    (4, 128): (Tile(32, 16, 8, 2), Tile(32, 16, 4, 1)),
    (4, 256): (Tile(32, 16, 8, 1), Tile(16, 16, 4, 1)),
    (8, 64): (Tile(32, 16, 4, 1), Tile(16, 16, 4, 1)),
    (8, 128): (Tile(32, 16, 8, 1), Tile(16, 16, 4, 1)),
}
_WIDE_FORWARD_RICH: Choices = {
    **_WIDE,
    (4, 64): (Tile(64, 16, 4, 2), Tile(32, 16, 4, 1)),
    (4, 128): (Tile(64, 16, 8, 2), Tile(32, 16, 4, 1)),
    (4, 256): (Tile(64, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 4, 1)),
    (8, 64): (Tile(32, 16, 4, 1), Tile(16, 16, 4, 1)),
}
# Queries, then keys.
FORWARD: Table = {
    ANY: _SMALL,
    80: {
        (2, 64): (Tile(128, 64, 4, 3), Tile(128, 64, 4, 2), Tile(64, 32, 4, 2)),
        (2, 128): (Tile(128, 64, 8, 2), Tile(64, 32, 4, 2)),
        (2, 256): (Tile(64, 64, 8, 2), Tile(64, 32, 8, 2), Tile(32, 32, 4, 1)),
        **_WIDE_FORWARD,
    },
    # 128 keys a step: the output is scaled half as often, and a step multiplies for longer than its exponentials take.
    90: {
        (2, 64): (Tile(128, 128, 8, 3), Tile(128, 64, 8, 2)),
        (2, 128): (Tile(128, 128, 8, 2), Tile(64, 64, 4, 2)),
        (2, 256): (Tile(128, 64, 8, 2), Tile(64, 32, 4, 1)),
        **_WIDE_FORWARD,
    },
}
FORWARD[100] = FORWARD[90]
# The same for calls whose scores are more than products (bias, softcap) or that drop: they take more registers.
FORWARD_RICH: Table = {
    ANY: _SMALL,
    80: {
        (2, 64): (Tile(128, 64, 8, 2), Tile(64, 32, 4, 2)),
        (2, 128): (Tile(128, 32, 8, 2), Tile(64, 32, 4, 2)),
        (2, 256): (Tile(64, 32, 8, 2), Tile(32, 32, 4, 1)),
        **_WIDE_FORWARD_RICH,
    },
    90: {
        (2, 64): (Tile(128, 64, 8, 3), Tile(128, 64, 8, 2)),
        (2, 128): (Tile(128, 32, 8, 2), Tile(64, 32, 4, 2)),
        (2, 256): (Tile(64, 64, 8, 2), Tile(64, 32, 8, 1)),
        **_WIDE_FORWARD_RICH,
    },
}
FORWARD_RICH[100] = FORWARD_RICH[90]
# Two sums of head_dim columns stay in registers; float64 with 256 of them has no tile for GPUs with 99 KB a program.
_WIDE_BACKWARD: Choices = {
    (4, 128): (Tile(16, 32, 8, 1),),
    (4, 256): (Tile(16, 16, 4, 1),),
    (8, 64): (Tile(32, 32, 8, 1),),
    (8, 256): (Tile(16, 16, 8, 1),),
}
# Queries a step, then the keys whose gradients a program owns. On sm_90 eight warps multiply scores twice over where
# there are but 64 keys, which is all that registers have room for at head_dim 256.
BACKWARD_KEYS: Table = {
    ANY: _SMALL,
    80: {
        (2, 64): (Tile(32, 128, 8, 2),),
        (2, 128): (Tile(32, 64, 8, 2),),
        (2, 256): (Tile(32, 64, 8, 2), Tile(16, 64, 8, 1)),
        **_WIDE_BACKWARD,
    },
    90: {
        (2, 64): (Tile(64, 128, 8, 3), Tile(64, 64, 4, 2)),
        (2, 128): (Tile(32, 128, 8, 3), Tile(32, 64, 4, 2)),
        (2, 256): (Tile(16, 64, 8, 2), Tile(16, 32, 4, 2, boxes=False)),
        **_WIDE_BACKWARD,
    },
}
BACKWARD_KEYS[100] = BACKWARD_KEYS[90]
# The same for calls whose scores are more than products (bias, softcap) or that drop.
BACKWARD_KEYS_RICH: Table = {
    ANY: _SMALL,
    80: {
        (2, 64): (Tile(16, 64, 8, 1),),
        (2, 128): (Tile(32, 64, 8, 2),),
        (2, 256): (Tile(16, 32, 8, 2),),
        **_WIDE_BACKWARD,
    },
    90: {
        (2, 64): (Tile(32, 128, 8, 2),),
        (2, 128): (Tile(16, 128, 8, 2, boxes=False), Tile(16, 32, 4, 2, boxes=False)),
        (2, 256): (Tile(16, 32, 8, 2, boxes=False),),
        **_WIDE_BACKWARD,
    },
}
BACKWARD_KEYS_RICH[100] = {
    **BACKWARD_KEYS_RICH[90],
    # Sums are in tensor memory there, and 64 keys a warpgroup's.
    (2, 256): (Tile(16, 64, 8, 2, boxes=False), Tile(16, 32, 8, 2, boxes=False)),
}
# The queries whose gradients a program owns, then keys a step.
BACKWARD_QUERIES: Table = {
    ANY: _SMALL,
    80: {
        (2, 64): (Tile(128, 64, 8, 2),),
        (2, 128): (Tile(128, 32, 8, 2),),
        (2, 256): (Tile(64, 32, 8, 1),),
        (4, 64): (Tile(64, 32, 4, 2),),
        (4, 128): (Tile(64, 32, 8, 2),),
        (4, 256): (Tile(32, 32, 8, 1),),
        (8, 64): (Tile(32, 32, 4, 1),),
        (8, 128): (Tile(32, 32, 8, 1),),
        (8, 256): (Tile(16, 16, 8, 1),),
    },
}
BACKWARD_QUERIES[90] = {
    **BACKWARD_QUERIES[80],
    (2, 64): (Tile(128, 64, 8, 3),),
    (2, 128): (Tile(128, 64, 8, 3),),
    (2, 256): (Tile(128, 32, 8, 3),),
}
BACKWARD_QUERIES[100] = BACKWARD_QUERIES[90]
# The smallest, which fits every GPU, of attention_backward_repair.py: it hardly ever has anything to do.
REPAIR = Tile(16, 16, 8, 1)
# Tiles of gradients of scores that are computed for themselves: square, because a diagonal's owner walks along it. On
# sm_80 both products' operands go through registers.
SQUARE: Table = {
    ANY: _SMALL,
    80: {
        (2, 128): (Tile(32, 32, 4, 1),),
        (2, 256): (Tile(16, 16, 4, 1),),
        (4, 256): (Tile(16, 16, 4, 1),),
        (8, 256): (Tile(16, 16, 4, 1),),
    },
}
SQUARE[90] = {
    **SQUARE[80],
    (2, 128): (Tile(64, 64, 8, 1),),
    (2, 256): (Tile(64, 64, 8, 1), Tile(16, 16, 4, 1)),
}
SQUARE[100] = SQUARE[90]
# Tiles of weights, square too, for each of which there is one product.
WEIGHTS: Table = {
    ANY: _SMALL,
    80: {
        (2, 128): (Tile(64, 64, 8, 1),),
        (2, 256): (Tile(64, 64, 8, 1),),
        (4, 128): (Tile(32, 32, 4, 1),),
        (4, 256): (Tile(32, 32, 8, 1),),
        (8, 256): (Tile(16, 16, 4, 1),),
    },
}
WEIGHTS[90] = WEIGHTS[100] = WEIGHTS[80]
# Keys a step, of a few packed queries, whose number is their own.
DECODE: Table = {
    ANY: _SMALL,
    80: {
        (2, 64): (Tile(16, 128, 4, 3), Tile(16, 64, 4, 2), Tile(16, 32, 4, 1)),
        (2, 128): (Tile(16, 64, 4, 3), Tile(16, 64, 4, 2), Tile(16, 32, 4, 1)),
        (2, 256): (Tile(16, 32, 4, 3), Tile(16, 32, 4, 2), Tile(16, 16, 4, 1)),
        # A program waits for its keys while others multiply: registers for three of them are worth more than stages.
        (4, 128): (Tile(16, 32, 4, 1),),
        (4, 256): (Tile(16, 16, 8, 1),),
        (8, 256): (Tile(16, 16, 8, 1),),
    },
}
DECODE[90] = DECODE[100] = DECODE[80]
TABLES: dict[str, Table] = {
    "forward": FORWARD,
    "forward_rich": FORWARD_RICH,
    "decode": DECODE,
    "backward_keys": BACKWARD_KEYS,
    "backward_keys_rich": BACKWARD_KEYS_RICH,
    "backward_queries": BACKWARD_QUERIES,
    "square": SQUARE,
    "weights": WEIGHTS,
}
_forced: dict[str, Tile] = {}

# Bytes of shared memory that a program may have, and the accumulators that a thread has registers for besides all else.
_SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
_ACCUMULATORS = 208
# Of each table's kernel, how many tiles of scores are alive at once, and of how many of a tile's dimensions (0 for its
# rows, 1 for its columns) it adds up a sum of head_dim columns.
_ALIVE: dict[str, tuple[int, tuple[int, ...]]] = {
    "forward": (1, (0,)),
    "forward_rich": (1, (0,)),
    "decode": (1, (0,)),
    "backward_keys": (2, (1, 1)),
    "backward_keys_rich": (2, (1, 1)),
    "backward_queries": (2, (0,)),
    "square": (2, ()),
    "weights": (1, ()),
}


@contextmanager
def using(name: str, tile: Tile) -> Iterator[None]:
    """Makes every kernel of the table of that name (a key of ``TABLES``) take ``tile``, whatever the call.

    Calls that it does not fit raise ``UnsupportedError`` then, and so a search learns that it does not.
    """
    before = dict(_forced)
    _forced[name] = tile
    try:
        # What is remembered was launched with other tiles.
        with replay.under(tuple(sorted(_forced.items()))):
            yield
    finally:
        _forced.clear()
        _forced.update(before)


def candidates(name: str, call: AttentionCall, architecture: int) -> Iterator[Tile]:
    """Yields the tiles that are worth a search for a call: first those of the table ``TABLES[name]``, then every other
    that shared memory and registers have room for by a rough count; the compiler has the last word."""
    table = TABLES[name]
    own = choose(table, call, architecture)
    yield from own
    if name.startswith("forward"):
        yield from (tile._replace(persistent=True) for tile in own)
    size, dim = call.query.element_size(), padded(max(call.query.shape[3], call.value.shape[3]))
    scores, sums = _ALIVE[name]
    known = max((a for a in _SHARED if a <= architecture), default=80)
    all_rows = (16,) if name == "decode" else (64, 128, 256) if size == 2 else (16, 32, 64)
    all_columns = (16, 32, 64, 128, 256) if name == "decode" else (32, 64, 128) if size == 2 else (16, 32, 64)
    for rows, columns, num_warps, num_stages in product(all_rows, all_columns, (4, 8), (1, 2, 3, 4)):
        # The rows of a product are shared out among warps, 16 each.
        owned = min(((rows, columns)[axis] for axis in sums), default=rows)
        if (name in ("square", "weights") and rows != columns) or (
            name != "decode" and size == 2 and owned < 16 * num_warps
        ):
            continue
        accumulators = scores * rows * columns + sum((rows, columns)[axis] * dim for axis in sums)
        # A step's two tiles for each stage, and what stays for the whole loop.
        step, stay = (rows, columns) if name.startswith("backward_keys") else (columns, rows)
        shared = size * dim * (2 * step * num_stages + stay)
        if accumulators * max(size, 4) > 4 * 32 * num_warps * _ACCUMULATORS or shared > _SHARED[known]:
            continue
        tile = Tile(rows, columns, num_warps, num_stages)
        if tile not in own:
            yield tile
        if name.startswith("forward") and size == 2 and known >= 90 and num_stages > 1:
            yield tile._replace(boxes=False)


def choose(table: Table, call: AttentionCall, architecture: int) -> tuple[Tile, ...]:
    """Returns the tiles to try for a call: those of the newest architecture of the table that is not newer, or the one
    that :func:`using` names."""
    for name, tile in _forced.items():
        if TABLES[name] is table:
            return (tile,)
    known = table[max(a for a in table if a <= architecture)]
    dim = max(call.query.shape[3], call.value.shape[3])
    return next(tile for (size, most), tile in known.items() if size == call.query.element_size() and dim <= most)


def is_rich(call: AttentionCall) -> bool:
    """Returns whether a call's scores are more than products, or it drops."""
    more = call.bias is not None or call.relative_bias is not None or call.dropout_state is not None
    return more or bool(call.softcap)


def calls(
    table: Table, architecture: int, packed: bool = False, wanted: Callable[[AttentionCall], bool] = lambda call: True
) -> Iterator[tuple[str, AttentionCall, Tile]]:
    """Yields ``(name, call, tile)`` for each tile of a table: calls to compile a kernel for.

    A first choice is compiled for every example, what follows it for the last, which asks for most. float32 and float64
    have no causal example, because its loops are those of "everything".

    Args:
        packed: whether the examples are packed sequences.
        wanted: whether an example is compiled.
    """
    dtypes = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}
    for (size, dim), choices in table[architecture].items():
        examples = [
            (name, call)
            for name, call in (packed_calls if packed else example_calls)(dtypes[size], dim)
            if wanted(call) and not (size > 2 and "causal" in name)
        ]
        for at, tile in enumerate(choices):
            for name, call in examples[-1:] if at else examples:
                if at and (packed or name == "plain"):
                    continue
                yield f"{dtypes[size]}".removeprefix("torch.") + f" {dim} {name} {tile}", call, tile


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


def packed_calls(dtype: torch.dtype, dim: int) -> Iterator[tuple[str, AttentionCall]]:
    """Yields the same of packed sequences."""
    query = torch.empty(2048, 4, dim, dtype=dtype)
    key = torch.empty(2048, 2, dim, dtype=dtype)
    bounds = torch.tensor([0, 1024, 2048])
    options: dict[str, dict[str, Any]] = {
        "packed causal": {"mask": Causal()},
        "packed everything": {"mask": Causal(), "bias": Alibi(torch.empty(4)), "dropout_p": 0.5, "softcap": 2.0},
    }
    for name, given in options.items():
        yield name, varlen_call(query, key, key, bounds, bounds, backend="triton", **given)
