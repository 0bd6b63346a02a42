"""Attention calls of every kind, seeded random inputs for them, and attention written in plain PyTorch.

:func:`eager` shares no code with ``fastattn.reference``: in float64 it is the second opinion that checks the
reference, in a lower precision it is the yardstick that the numerics rule compares errors with.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from exactness import assert_within_rule
from torch import Tensor

import fastattn
from fastattn.biases import Alibi, RelativePosition
from fastattn.masks import Causal, Dense, KeyLengths, Mask, Segments, Window


@dataclass(frozen=True)
class Case:
    """One kind of call.

    ``mask`` names masks of :data:`MASKS` joined by "+"; ``bias`` lists which dimensions of a dense bias are full.
    """

    batch: int = 2
    heads: tuple[int, int] = (2, 2)
    seq_len: tuple[int, int] = (70, 70)
    head_dim: tuple[int, int] = (16, 16)
    mask: str = ""
    bias: tuple[bool, bool, bool, bool] | None = None
    relative: str = ""
    softcap: float | None = None
    softmax_scale: float | None = None
    sinks: bool = False
    dropout_p: float = 0.0

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (self.batch, self.heads[0], *self.seq_len)


CASES: dict[str, Case] = {
    "plain": Case(),
    "one-of-each": Case(batch=1, heads=(1, 1), seq_len=(1, 1), head_dim=(1, 1)),
    "one-query": Case(seq_len=(1, 133), head_dim=(64, 64)),
    "one-key": Case(seq_len=(37, 1)),
    "cross": Case(seq_len=(65, 260), head_dim=(64, 64)),
    "long": Case(batch=1, heads=(1, 1), seq_len=(530, 790), head_dim=(8, 8)),
    "dim-3-5": Case(head_dim=(3, 5)),
    "dim-17-33": Case(head_dim=(17, 33)),
    "dim-80": Case(head_dim=(80, 80)),
    "dim-128-64": Case(head_dim=(128, 64)),
    "dim-64-128": Case(head_dim=(64, 128)),
    "dim-256": Case(batch=1, head_dim=(256, 256)),
    "dim-300-270": Case(batch=1, heads=(1, 1), head_dim=(300, 270)),
    "gqa": Case(heads=(6, 2), seq_len=(50, 90)),
    "mqa": Case(heads=(5, 1), seq_len=(50, 90), mask="causal"),
    "few-queries": Case(heads=(4, 2), seq_len=(1, 700), head_dim=(16, 24), mask="lengths"),
    "few-queries-everything": Case(
        batch=3,
        heads=(6, 2),
        seq_len=(3, 530),
        head_dim=(20, 16),
        mask="window+lengths+segments",
        bias=(True, True, True, True),
        sinks=True,
        dropout_p=0.2,
    ),
    "scale": Case(softmax_scale=-0.4),
    "causal": Case(seq_len=(200, 200), head_dim=(64, 64), mask="causal"),
    "causal-more-keys": Case(seq_len=(50, 150), mask="causal"),
    "causal-more-queries": Case(seq_len=(150, 50), mask="causal"),
    "causal-top-left": Case(seq_len=(50, 150), mask="causal_top_left"),
    "causal-top-left-more-queries": Case(seq_len=(150, 50), mask="causal_top_left"),
    "causal-long": Case(batch=1, heads=(1, 1), seq_len=(900, 900), head_dim=(8, 8), mask="causal"),
    "window": Case(seq_len=(200, 200), mask="window"),
    "window-long": Case(batch=1, heads=(1, 1), seq_len=(900, 900), head_dim=(8, 8), mask="window"),
    "window-future": Case(seq_len=(130, 190), mask="window_future"),
    "lengths": Case(batch=4, seq_len=(70, 130), mask="lengths"),
    "lengths-causal": Case(batch=4, seq_len=(130, 130), mask="lengths+causal"),
    "segments": Case(seq_len=(140, 140), mask="segments"),
    "segments-causal": Case(seq_len=(140, 140), mask="segments+causal"),
    "dense": Case(mask="dense"),
    "dense-head": Case(mask="dense_head"),
    "dense-keys": Case(mask="dense_keys"),
    "dense-queries": Case(mask="dense_queries"),
    "all-masks": Case(batch=3, heads=(4, 2), seq_len=(190, 210), mask="causal+window+lengths+segments+dense"),
    "bias-full": Case(seq_len=(70, 90), bias=(True, True, True, True)),
    "bias-heads": Case(seq_len=(70, 90), bias=(False, True, True, True)),
    "bias-batch": Case(seq_len=(70, 90), bias=(True, False, True, True)),
    "bias-shared": Case(seq_len=(70, 90), bias=(False, False, True, True), mask="causal"),
    "bias-keys": Case(seq_len=(70, 90), bias=(True, False, False, True)),
    "bias-queries": Case(seq_len=(70, 90), bias=(False, True, True, False)),
    "bias-number": Case(seq_len=(70, 90), bias=(False, False, False, False), sinks=True),
    "bias-gqa": Case(heads=(4, 2), seq_len=(130, 70), bias=(False, True, True, True)),
    "alibi": Case(heads=(4, 2), seq_len=(90, 130), relative="alibi", mask="causal"),
    "relative": Case(seq_len=(130, 70), relative="learned"),
    "relative-shared": Case(seq_len=(70, 130), relative="shared"),
    "softcap": Case(softcap=1.5, mask="causal"),
    "sinks": Case(seq_len=(90, 60), sinks=True, mask="causal"),
    "dropout": Case(seq_len=(150, 130), dropout_p=0.3),
    "dropout-gqa": Case(heads=(4, 2), seq_len=(70, 131), dropout_p=0.5, mask="causal"),
    "everything": Case(
        batch=3,
        heads=(4, 2),
        seq_len=(180, 230),
        head_dim=(40, 24),
        mask="causal+lengths+segments+dense_head",
        bias=(True, True, True, True),
        softcap=3.0,
        sinks=True,
        dropout_p=0.2,
    ),
}


def random_case(seed: int) -> Case:
    """Returns a call drawn at random from all that ``attention`` offers."""
    rng = np.random.default_rng(seed)

    def pick(*choices: Any) -> Any:
        return choices[rng.integers(len(choices))]

    heads_kv = pick(1, 2, 3)
    names = [name for name in MASKS if rng.random() < 0.2]
    kind = pick("none", "bias", "relative")
    return Case(
        batch=pick(1, 2, 3),
        heads=(heads_kv * pick(1, 1, 2, 3), heads_kv),
        seq_len=(int(rng.integers(1, 260)), int(rng.integers(1, 420))),
        head_dim=(int(rng.integers(1, 100)), int(rng.integers(1, 100))),
        mask="+".join(names),
        bias=tuple(bool(rng.integers(2)) for _ in range(4)) if kind == "bias" else None,
        relative=pick("alibi", "learned", "shared") if kind == "relative" else "",
        softcap=pick(None, None, 2.0),
        softmax_scale=pick(None, None, 0.3),
        sinks=pick(False, False, True),
        dropout_p=pick(0.0, 0.0, 0.25),
    )


def _ints(low: int, high: int, size: tuple[int, ...], rng: torch.Generator) -> Tensor:
    return torch.randint(low, high, size, generator=rng)


def _segments(case: Case, rng: torch.Generator) -> Mask:
    ids_q, ids_k = (_ints(0, 3, (case.batch, n), rng).sort(dim=1).values for n in case.seq_len)
    return Segments(ids_q, ids_k - 1)  # some queries find no key of their segment


def _lengths(case: Case, rng: torch.Generator) -> Mask:
    lengths = _ints(0, case.seq_len[1] + 1, (case.batch,), rng)
    lengths[0] = case.seq_len[1] + 7  # clamped
    if case.batch > 1:
        lengths[1] = 0
    return KeyLengths(lengths)


def _dense(*full: bool) -> Callable[[Case, torch.Generator], Mask]:
    def make(case: Case, rng: torch.Generator) -> Mask:
        size = [n if is_full else 1 for n, is_full in zip(case.shape, full, strict=True)]
        return Dense(torch.rand(size, generator=rng) < 0.6)

    return make


MASKS: dict[str, Callable[[Case, torch.Generator], Mask]] = {
    "causal": lambda case, rng: Causal(),
    "causal_top_left": lambda case, rng: Causal("top_left"),
    "window": lambda case, rng: Window(33, 5),
    "window_future": lambda case, rng: Window(None, 20, "top_left") & Window(3, None),
    "lengths": _lengths,
    "segments": _segments,
    "dense": _dense(True, True, True, True),
    "dense_head": _dense(False, True, True, True),
    "dense_keys": _dense(True, False, False, True),
    "dense_queries": _dense(False, False, True, False),
}


class Inputs(NamedTuple):
    """What one call gets: leaf tensors that gradients flow to, and the rest.

    ``dlse`` is 0 where the row is empty and lse -inf.
    """

    case: Case
    leaves: dict[str, Tensor]
    mask: Mask | None
    dout: Tensor
    dlse: Tensor

    def to(self, dtype: torch.dtype) -> Inputs:
        """Returns fresh leaves with these values in ``dtype``; dlse in lse's dtype."""
        leaves = {name: leaf.detach().to(dtype).clone().requires_grad_() for name, leaf in self.leaves.items()}
        return self._replace(leaves=leaves, dout=self.dout.to(dtype), dlse=self.dlse.to(lse_dtype(dtype)))


@cache
def inputs(case: Case, dtype: torch.dtype = torch.float32) -> Inputs:
    """Returns random inputs, representable in ``dtype``, as float64."""
    # crc32 and not hash(): the same numbers in every process.
    rng = torch.Generator().manual_seed(zlib.crc32(repr(case).encode()))

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=rng).to(dtype).double()

    batch, heads_q, len_q, len_k = case.shape
    dim, dim_v = case.head_dim
    leaves = {
        "query": randn(batch, heads_q, len_q, dim),
        "key": randn(batch, case.heads[1], len_k, dim),
        "value": randn(batch, case.heads[1], len_k, dim_v),
    }
    if case.bias is not None:
        leaves["bias"] = randn(*(n if full else 1 for n, full in zip(case.shape, case.bias, strict=True)))
    if case.relative == "alibi":
        leaves["slopes"] = randn(heads_q).abs() * 0.125  # exact, a power of two
    elif case.relative:
        leaves["table"] = randn(32 if case.relative == "learned" else 9, heads_q)
    if case.sinks:
        leaves["sinks"] = randn(heads_q)
    mask = None
    for name in filter(None, case.mask.split("+")):
        made = MASKS[name](case, rng)
        mask = made if mask is None else mask & made
    dlse = randn(batch, heads_q, len_q)
    if mask is not None and not case.sinks:
        dlse = dlse * mask.to_dense(*case.shape).any(dim=-1)
    return Inputs(case, leaves, mask, randn(batch, heads_q, len_q, dim_v), dlse)


class Result(NamedTuple):
    out: Tensor
    lse: Tensor
    grads: dict[str, Tensor]

    def named(self) -> dict[str, Tensor]:
        return {"out": self.out, "lse": self.lse, **{f"d{name}": grad for name, grad in self.grads.items()}}


def arguments(given: Inputs, **more: Any) -> dict[str, Any]:
    """Returns the keyword arguments of ``fastattn.attention`` for ``given``."""
    case, leaves = given.case, given.leaves
    bias: Any = leaves.get("bias")
    if "slopes" in leaves:
        bias = Alibi(leaves["slopes"])
    elif "table" in leaves:
        bias = RelativePosition(leaves["table"], bidirectional=case.relative == "learned", max_distance=60)
    generator = torch.Generator().manual_seed(5) if case.dropout_p else None
    return {
        **{name: leaves[name] for name in ("query", "key", "value")},
        "mask": given.mask,
        "bias": bias,
        "dropout_p": case.dropout_p,
        "softmax_scale": case.softmax_scale,
        "softcap": case.softcap,
        "sinks": leaves.get("sinks"),
        "generator": generator,
        **more,
    }


def differentiate(given: Inputs, out: Tensor, lse: Tensor) -> Result:
    loss_of = [out, lse]
    grads = torch.autograd.grad(loss_of, list(given.leaves.values()), [given.dout, given.dlse.to(lse.dtype)])
    return Result(out.detach(), lse.detach(), dict(zip(given.leaves, grads, strict=True)))


def run(given: Inputs, backend: str) -> Result:
    """Returns outputs and every gradient of ``fastattn.attention`` on ``backend``."""
    out, lse = fastattn.attention(**arguments(given, backend=backend, return_lse=True))
    return differentiate(given, out, lse)


def eager(given: Inputs) -> Result:
    """Returns the same by plain PyTorch, every operation rounded to the dtype of the leaves."""
    case, leaves = given.case, given.leaves
    group = case.heads[0] // case.heads[1]
    query = leaves["query"]
    key, value = (leaves[name].repeat_interleave(group, dim=1) for name in ("key", "value"))
    scale = case.head_dim[0] ** -0.5 if case.softmax_scale is None else case.softmax_scale
    s = query @ key.transpose(-1, -2) * scale
    if case.softcap:
        s = case.softcap * torch.tanh(s / case.softcap)
    bias = arguments(given)["bias"]
    if isinstance(bias, Tensor):
        s = s + bias
    elif bias is not None:
        len_q, len_k = case.seq_len
        diagonals = bias.diagonals(case.heads[0], len_q, len_k).to(s.dtype)
        s = s + torch.stack([diagonals[:, len_q - 1 - i : len_q - 1 - i + len_k] for i in range(len_q)], dim=1)
    allowed = torch.ones(case.shape, dtype=torch.bool) if given.mask is None else given.mask.to_dense(*case.shape)
    s = s.masked_fill(~allowed, torch.finfo(s.dtype).min)
    if case.sinks:
        s = torch.cat([leaves["sinks"][None, :, None, None].expand(*case.shape[:3], 1), s], dim=-1)
    p = torch.softmax(s, dim=-1)[..., -case.seq_len[1] :] * allowed
    if case.dropout_p:
        p = p * torch.from_numpy(philox_keep(case)) / (1.0 - case.dropout_p)
    lse = s.logsumexp(dim=-1)
    if not case.sinks:
        lse = lse.masked_fill(~allowed.any(dim=-1), float("-inf"))
    return differentiate(given, p @ value, lse)


@cache
def exact(case: Case, dtype: torch.dtype = torch.float32) -> Result:
    """Returns the float64 reference's results for ``inputs(case, dtype)``."""
    return run(inputs(case, dtype).to(torch.float64), "reference")


@cache
def yardstick(case: Case, dtype: torch.dtype) -> Result:
    """Returns eager PyTorch's results in ``dtype``; lse, which fastattn never holds in less, at least in float32."""
    result = eager(inputs(case, dtype).to(dtype))
    return result if dtype.itemsize >= 4 else result._replace(lse=eager(inputs(case, dtype).to(torch.float32)).lse)


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def assert_as_exact_as_eager(found: Result, case: Case, dtype: torch.dtype) -> None:
    """Asserts the numerics rule, as ``exactness.assert_within_rule`` has it."""
    right, stock = exact(case, dtype).named(), yardstick(case, dtype).named()
    for name, tensor in found.named().items():
        expected = right[name]
        assert tensor.shape == expected.shape, name
        assert torch.equal(tensor.isneginf(), expected.isneginf()), name
        finite = ~expected.isneginf()
        error = (tensor.double() - expected)[finite].abs()
        of_eager = (stock[name].double() - expected)[finite].abs()
        if error.numel() == 0:
            continue
        assert not error.isnan().any(), f"{name} has NaN"
        assert_within_rule(name, error, of_eager, float(expected[finite].abs().max()), tensor.dtype)


def philox_4x32_10(counter: list[np.ndarray], key: tuple[int, int]) -> list[np.ndarray]:
    """Philox-4x32-10 in uint64 numpy arithmetic, from the paper (Salmon et al. 2011)."""
    low = np.uint64(0xFFFFFFFF)
    c0, c1, c2, c3 = (np.asarray(c, dtype=np.uint64) for c in counter)
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (
            (p1 >> np.uint64(32)) ^ c1 ^ np.uint64(k0),
            p1 & low,
            (p0 >> np.uint64(32)) ^ c3 ^ np.uint64(k1),
            p0 & low,
        )
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [c0, c1, c2, c3]


def philox_keep(case: Case, generator_seed: int = 5) -> np.ndarray:
    """Returns which weights survive dropout: bool [batch, num_heads_q, seq_len_q, seq_len_k]."""
    batch, heads, len_q, len_k = case.shape
    drawn = torch.randint(2**63 - 1, (2,), generator=torch.Generator().manual_seed(generator_seed))
    seed, offset = (int(x) for x in drawn)
    b, h, i, j = np.ogrid[:batch, :heads, :len_q, :len_k]
    words = philox_4x32_10([j // 4, i, b * heads + h, np.array(offset % 2**32)], (seed % 2**32, seed >> 32))
    which = np.broadcast_to(j % 4, (batch, heads, len_q, len_k))
    return np.choose(which, [np.broadcast_to(w, which.shape) for w in words]) >= np.uint64(case.dropout_p * 2**32)
