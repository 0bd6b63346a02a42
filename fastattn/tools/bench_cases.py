"""What ``fastattn bench`` times: each row of the grid as a call of ours, the same call of each peer, and a check."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib import resources
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastattn.nn
from fastattn import masks
from fastattn.ops.attention import attention
from fastattn.ops.feed_forward import feed_forward
from fastattn.ops.softmax import softmax
from fastattn.reference import attention as formula
from fastattn.spec.attention import AttentionCall, attention_call
from fastattn.spec.attention_weights import select_rows
from fastattn.tools import bench_model, eager
from fastattn.tools.bench_case import Case, relative

# Queries that the float64 reference is computed for: all of a long row's would take minutes.
_CHECKED_QUERIES = 48
# An eager peer that holds more scores than this tells nothing but that memory is slow.
_EAGER_ELEMENTS = 1 << 25
_SEED = 11


def grid() -> dict[str, Any]:
    """Returns the shapes on which speed is judged."""
    return tomllib.loads(resources.files("fastattn.tools").joinpath("bench_grid.toml").read_text(encoding="utf-8"))


def cases(family: str, dtype: torch.dtype, names: Sequence[str] | None) -> Iterator[Case]:
    """Yields the cases of a family in a dtype, built one at a time, so that one row's tensors are held at a time.

    Raises:
        ValueError: there is no such family.
    """
    if family not in FAMILIES:
        raise ValueError(f"family must be one of {', '.join(map(repr, FAMILIES))}, got {family!r}")
    for name, row in _rows(grid()[family]):
        if name != "gpu" and (names is None or name in names):
            yield from FAMILIES[family](name, row, dtype)


def _rows(table: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yields each row of a table and its name; rows that stand under a task's name instead of "rows" hold it, too."""
    for task, rows in table.items():
        # A table in the table is for GPUs.
        for row in () if isinstance(rows, Mapping) else rows:
            if task != "rows":
                yield "-".join((task, "x".join(map(str, row.values())))), {**row, "task": task}
            else:
                yield (row["name"] if isinstance(row, Mapping) else "x".join(map(str, row))), row


class _Draw:
    """Normal random tensors of a dtype from a stream of their own."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._generator = torch.Generator().manual_seed(_SEED)
        self._dtype = dtype

    def __call__(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=self._generator) * scale).to(self._dtype)


def _attention(name: str, row: Mapping[str, Any], dtype: torch.dtype) -> Iterator[Case]:
    draw = _Draw(dtype)
    batch, (heads, heads_kv), (seq_q, seq_k), dim = row["batch"], row["heads"], row["seq_len"], row["head_dim"]
    query = draw(batch, heads, seq_q, dim)
    key, value = (draw(batch, heads_kv, seq_k, dim) for _ in range(2))
    bias = draw(1, heads, seq_q, seq_k) if row.get("bias") == "learned" else None
    lengths = torch.linspace(seq_k // 2, seq_k, batch).long() if row.get("key_lengths") else None
    dropout_p = row.get("dropout", 0.0)
    mask: masks.Mask | None = masks.Causal() if row["causal"] else None
    # What PyTorch is given where is_causal does not say it.
    allowed = None
    if "window" in row:
        mask = masks.Window(row["window"] - 1, 0)
        allowed = mask.to_dense(1, 1, seq_q, seq_k)
    if lengths is not None:
        mask = masks.KeyLengths(lengths)
        allowed = (torch.arange(seq_k) < lengths[:, None])[:, None, None, :]
    pairs = _visible_pairs(row, lengths)

    def call(*tensors: Tensor, generator: torch.Generator | None = None) -> AttentionCall:
        q, k, v, *rest = tensors
        return attention_call(
            q,
            k,
            v,
            mask=mask,
            bias=rest[0] if rest else None,
            dropout_p=dropout_p,
            softmax_scale=None,
            softcap=None,
            sinks=None,
            generator=generator,
            backend="",
        )

    def ours(*tensors: Tensor, generator: torch.Generator | None = None) -> Tensor:
        q, k, v, *rest = tensors
        bias = rest[0] if rest else None
        out = attention(q, k, v, mask=mask, bias=bias, dropout_p=dropout_p, generator=generator)
        assert isinstance(out, Tensor)
        return out

    def sdpa(*tensors: Tensor) -> Tensor:
        q, k, v, *rest = tensors
        return F.scaled_dot_product_attention(
            q,
            k,
            v,
            rest[0] if rest else allowed,
            dropout_p,
            row["causal"] and allowed is None,
            enable_gqa=heads != heads_kv,
        )

    def plain(*tensors: Tensor) -> Tensor:
        q, k, v, *rest = tensors
        visible = torch.ones(seq_q, seq_k, dtype=torch.bool).tril() if row["causal"] and allowed is None else allowed
        return eager.attention(q, k, v, visible=visible, bias=rest[0] if rest else None)[0]

    peers: dict[str, Callable[..., Tensor]] = {"torch SDPA": sdpa}
    if batch * heads * seq_q * seq_k <= _EAGER_ELEMENTS and not dropout_p:
        peers["torch eager"] = plain
    tensors = [query, key, value] + ([] if bias is None else [bias])
    dout = draw(batch, heads, seq_q, dim)

    flops = 4.0 * heads * pairs * dim
    for direction, factor in (("forward", 1.0), ("forward + backward", 3.5)):
        backward = direction != "forward"
        run = _with_backward if backward else _without_gradients
        yield Case(
            "attention",
            name,
            direction,
            run(ours, tensors, dout),
            {n: run(peer, tensors, dout) for n, peer in peers.items()},
            factor * flops,
            "GFLOP/s",
            partial(_attention_error, ours, call, tensors, dout, backward),
        )


def _visible_pairs(row: Mapping[str, Any], lengths: Tensor | None) -> float:
    """Returns how many (query, key) pairs of one head are computed, over the batch; a causal square counts as half."""
    batch, (seq_q, seq_k) = row["batch"], row["seq_len"]
    if lengths is not None:
        return float(seq_q * lengths.sum().item())
    if "window" in row:
        return float(batch * sum(min(i + 1, row["window"]) for i in range(seq_q)))
    return batch * seq_q * seq_k * (0.5 if row["causal"] else 1.0)


def _attention_error(
    ours: Callable[..., Tensor], call: Callable[..., AttentionCall], tensors: list[Tensor], dout: Tensor, backward: bool
) -> float:
    """Returns the largest error of the output, or of any gradient, over its largest element.

    Some queries only are compared, and only they get a gradient: that of every key and value still comes from the whole
    call.
    """
    seq_q = dout.shape[2]
    rows = torch.linspace(0, seq_q - 1, min(seq_q, _CHECKED_QUERIES)).long()
    leaves = [t.detach().requires_grad_(backward) for t in tensors]
    exact = [t.detach().double().requires_grad_(backward) for t in tensors]
    whole = call(*exact, generator=torch.Generator().manual_seed(_SEED))
    if whole.dropout_state is None:
        reference = formula.attention(select_rows(whole, rows))[0]
    else:
        # Dropout counts rows from the first, so all are needed; the grid's row with dropout is short.
        reference = formula.attention(whole)[0][:, :, rows]
    out = ours(*leaves, generator=torch.Generator().manual_seed(_SEED))
    if not backward:
        return relative(out[:, :, rows], reference)
    sparse = torch.zeros_like(dout)
    sparse[:, :, rows] = dout[:, :, rows]
    grads = torch.autograd.grad(out, leaves, sparse)
    wanted = torch.autograd.grad(reference, exact, dout[:, :, rows].double())
    return max(relative(g, w) for g, w in zip(grads, wanted, strict=True))


def _without_gradients(function: Callable[..., Any], tensors: Sequence[Tensor], dout: Tensor) -> Callable[[], Any]:
    @torch.no_grad()
    def run() -> Any:
        return function(*tensors)

    return run


def _with_backward(function: Callable[..., Any], tensors: Sequence[Tensor], dout: Tensor) -> Callable[[], Any]:
    leaves = [t.detach().requires_grad_() for t in tensors]
    return lambda: torch.autograd.grad(function(*leaves), leaves, dout)


def _decode(name: str, row: Mapping[str, Any], dtype: torch.dtype) -> Iterator[Case]:
    draw = _Draw(dtype)
    (heads, heads_kv), cache, dim = row["heads"], row["cache"], row["head_dim"]
    query = draw(row["batch"], heads, 1, dim)
    key, value = (draw(row["batch"], heads_kv, cache, dim) for _ in range(2))
    tensors = [query, key, value]

    def exact() -> float:
        reference = eager.attention(*(t.double() for t in tensors))[0]
        out = attention(*tensors)
        assert isinstance(out, Tensor)
        return relative(out, reference)

    yield Case(
        "decode",
        name,
        "forward",
        _without_gradients(attention, tensors, query),
        {
            "torch SDPA": _without_gradients(
                lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=heads != heads_kv), tensors, query
            )
        },
        float(2 * key.numel() * key.element_size()),
        "GB/s",
        exact,
    )


def _softmax(name: str, row: Sequence[int], dtype: torch.dtype) -> Iterator[Case]:
    draw = _Draw(dtype)
    tensors, dout = [draw(*row)], draw(*row)
    few = slice(0, 64)
    size = float(tensors[0].numel() * tensors[0].element_size())
    for direction, moved in (("forward", 2.0), ("forward + backward", 5.0)):
        run = _without_gradients if direction == "forward" else _with_backward

        def exact(backward: bool = direction != "forward") -> float:
            x = tensors[0][few].detach().requires_grad_(backward)
            y = tensors[0][few].detach().double().requires_grad_(backward)
            if not backward:
                return relative(softmax(x), y.softmax(-1))
            (ours,) = torch.autograd.grad(softmax(x), x, dout[few])
            return relative(ours, torch.autograd.grad(y.softmax(-1), y, dout[few].double())[0])

        yield Case(
            "softmax",
            name,
            direction,
            run(softmax, tensors, dout),
            {"torch.softmax": run(lambda x: x.softmax(-1), tensors, dout)},
            moved * size,
            "GB/s",
            exact,
        )


def _feed_forward(name: str, row: Sequence[Any], dtype: torch.dtype) -> Iterator[Case]:
    draw = _Draw(dtype)
    tokens, model_dim, ff_dim, activation = row
    gated = activation == "swiglu"
    tensors = [
        draw(tokens, model_dim),
        draw(ff_dim, model_dim, scale=model_dim**-0.5),
        draw(ff_dim),
        draw(model_dim, ff_dim, scale=ff_dim**-0.5),
        draw(model_dim),
    ]
    if gated:
        tensors.append(draw(ff_dim, model_dim, scale=model_dim**-0.5))
    activation = "silu" if gated else activation
    dout = draw(tokens, model_dim)

    def ours(*t: Tensor) -> Tensor:
        return feed_forward(t[0], t[1], t[2], t[3], t[4], activation=activation, weight_gate=t[5] if gated else None)

    def peer(*t: Tensor) -> Tensor:
        return eager.feed_forward(
            t[0], t[1], t[2], t[3], t[4], activation=activation, weight_gate=t[5] if gated else None
        )

    def exact(backward: bool) -> float:
        leaves = [t.detach().requires_grad_(backward) for t in tensors]
        wide = [t.detach().double().requires_grad_(backward) for t in tensors]
        out, wanted = ours(*leaves), peer(*wide)
        if not backward:
            return relative(out, wanted)
        grads = torch.autograd.grad(out, leaves, dout), torch.autograd.grad(wanted, wide, dout.double())
        return max(relative(g, w) for g, w in zip(*grads, strict=True))

    flops = 2.0 * tokens * model_dim * ff_dim * (3 if gated else 2)
    for direction, factor in (("forward", 1.0), ("forward + backward", 3.0)):
        backward = direction != "forward"
        run = _with_backward if backward else _without_gradients
        yield Case(
            "feed_forward",
            name,
            direction,
            run(ours, tensors, dout),
            {"torch eager": run(peer, tensors, dout)},
            factor * flops,
            "GFLOP/s",
            partial(exact, backward),
        )


def _module(name: str, row: Sequence[int], dtype: torch.dtype) -> Iterator[Case]:
    draw = _Draw(dtype)
    batch, seq_len, embed_dim, heads = row
    stock = nn.MultiheadAttention(embed_dim, heads, batch_first=True)
    with torch.no_grad():
        for p in stock.parameters():
            p.copy_(draw(*p.shape, scale=embed_dim**-0.5))
    stock = stock.to(dtype)
    ours = fastattn.nn.MultiheadAttention(embed_dim, heads, batch_first=True, dtype=dtype)
    ours.load_state_dict(stock.state_dict())
    x = draw(batch, seq_len, embed_dim)
    # Four projections, and the two products of the attention itself.
    flops = batch * (8.0 * seq_len * embed_dim**2 + 4.0 * seq_len**2 * embed_dim)

    def step(module: nn.MultiheadAttention) -> Callable[[], Any]:
        parameters = list(module.parameters())

        def run() -> Any:
            out, _ = module.train()(x, x, x)
            return torch.autograd.grad(out, parameters, x)

        return run

    def forward(module: nn.MultiheadAttention) -> Callable[[], Any]:
        @torch.no_grad()
        def run() -> Any:
            return module.eval()(x, x, x)

        return run

    def exact() -> float:
        wide = nn.MultiheadAttention(embed_dim, heads, batch_first=True, dtype=torch.float64)
        wide.load_state_dict(stock.state_dict())
        with torch.no_grad():
            found, wanted = ours.eval()(x, x, x), wide.train()(x.double(), x.double(), x.double())
        return max(relative(f, w) for f, w in zip(found, wanted, strict=True))

    for direction, run, factor in (("eval", forward, 1.0), ("train step", step, 3.0)):
        yield Case(
            "module",
            name,
            direction,
            run(ours),
            {"torch.nn": run(stock)},
            factor * flops,
            "GFLOP/s",
            exact,
        )


FAMILIES: dict[str, Callable[[str, Any, torch.dtype], Iterator[Case]]] = {
    "attention": _attention,
    "decode": _decode,
    "softmax": _softmax,
    "feed_forward": _feed_forward,
    "module": _module,
    "model": bench_model.cases,
}
