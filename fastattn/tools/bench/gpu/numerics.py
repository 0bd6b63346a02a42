"""Whether the answers are right on this device: against float64, run after run, and whatever masked memory holds.

The file is longer than others because it is a list: a kind of check after another.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fastattn
from fastattn import masks
from fastattn.masks import Shape
from fastattn.ops import dropout as dropout_op
from fastattn.ops._dispatch import use_backend
from fastattn.reference.philox import keep_mask
from fastattn.spec.checks import draw_dropout_state
from fastattn.tools import op_cases, row_cases
from fastattn.tools.bench.case import Draw, relative
from fastattn.tools.bench.gpu.jobs import Context, Emit, Job, with_tile
from fastattn.tools.bench.measuring import TOLERANCE
from fastattn.tools.op_case import OpCase
from fastattn.tools.verify_ops import check

_SEED = 7


def large_cases(tiny: bool = False) -> Iterator[OpCase]:
    """Yields calls that cross every tile of every table several times, and no multiple of any."""
    if tiny:
        yield op_cases.attention_case("causal", "none", "gqa", shape=Shape(2, 2, 21, 35), head_dim=16)
        for cases in (
            row_cases.softmax_cases(3, 70),
            row_cases.feed_forward_cases(5, 16, 40),
            row_cases.linear_cross_entropy_cases(5, 16, 40),
        ):
            yield next(cases)
        return
    long = Shape(2, 4, 1029, 1283)
    for dim in (64, 128, 256):
        for mask, bias, feature in (
            ("none", "none", ""),
            ("causal", "none", "gqa"),
            ("all of them", "dense", ""),
            ("causal & lengths", "none", "dropout"),
        ):
            yield op_cases.attention_case(mask, bias, feature, shape=long, head_dim=dim)
    yield op_cases.attention_case("window", "relative", "", shape=Shape(2, 8, 1029, 1283), head_dim=96)
    yield op_cases.attention_case("causal", "alibi", "value-dim", shape=Shape(2, 16, 517, 771), head_dim=128)
    yield op_cases.attention_case("causal", "none", "gqa", shape=Shape(2, 8, 2048, 2048), head_dim=128)
    for dim in (64, 128):
        for feature in ("", "gqa", "mqa"):
            yield op_cases.attention_case("lengths", "none", feature, shape=Shape(2, 16, 1, 8191), head_dim=dim)
        yield op_cases.attention_case("causal", "none", "gqa", shape=Shape(2, 16, 5, 4099), head_dim=dim)
    for rows, columns in ((1031, 1024), (257, 4099), (33, 32768), (33, 40001), (33, 262143)):
        yield from list(row_cases.softmax_cases(rows, columns))[:3]
        yield from list(row_cases.log_softmax_cases(rows, columns))[:1]
        yield from row_cases.layer_norm_cases(rows, columns)
        yield from row_cases.rms_norm_cases(rows, columns)
    for case in row_cases.feed_forward_cases(701, 520, 1100):
        if case.variant in ("gelu", "silu, gated", "relu, no biases"):
            yield case
    yield from row_cases.feed_forward_cases(9, 520, 1100)
    yield from row_cases.linear_cross_entropy_cases(301, 264, 5003)


def _rule(job: Job, context: Context, emit: Emit) -> None:
    """Emits a record for each direction of a case of `fastattn verify`, in a dtype, on a backend."""
    given = job.parameters
    found = large_cases(context.tiny) if given["op"] == "large" else op_cases.cases([given["op"]])
    case = next(case for k, case in enumerate(found) if k == given["index"])
    dtype = getattr(torch, given["dtype"])
    with _poisoned_memory():
        for result in check(case, dtype, given["backend"], context.device):
            line = {"op": case.op, "row": ", ".join(filter(None, [case.mask, case.variant])), "dtype": given["dtype"]}
            line |= {"backend": given["backend"], "direction": result.direction, "check": "against float64"}
            if result.refused is not None:
                emit({**line, "ok": None, "note": f"refused: {result.refused}"[:300]})
                continue
            worst = result.worst
            emit(
                {
                    **line,
                    "ok": result.ok,
                    "tensor": worst.name,
                    "error": worst.ours.max,
                    "eager": worst.eager.max,
                    "bound": worst.max_bound,
                    "mean error": worst.ours.mean,
                    "mean bound": worst.mean_bound,
                    "strain": worst.strain,
                }
            )


@contextmanager
def _poisoned_memory() -> Iterator[None]:
    """Fills new tensors with NaN, so that an element that nobody wrote shows."""
    before, warned = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an op of the yardstick's that has no deterministic form
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before, warn_only=warned)


def _attention_arguments(name: str, device: str, tiny: bool) -> tuple[list[Tensor], dict[str, Any], Tensor]:
    """Returns the tensors, the other arguments and dout of a call that races are looked for in."""
    sizes: Mapping[str, tuple[int, int, int, int, int, int]] = {  # batch, heads, key heads, queries, keys, head_dim
        "d64-full": (2, 8, 8, 1024, 1024, 64),
        "d128-causal": (2, 8, 8, 1027, 1027, 128),
        "d128-gqa": (1, 16, 2, 2048, 2048, 128),
        "d256-causal": (1, 4, 4, 777, 777, 256),
        "bias-grad": (1, 4, 4, 515, 515, 64),
        "dropout": (2, 4, 4, 512, 640, 64),
        "decode": (4, 16, 4, 1, 8192, 128),
    }
    batch, heads, heads_kv, seq_q, seq_k, dim = (2, 2, 1, 17, 21, 16) if tiny else sizes[name]
    draw = Draw(torch.bfloat16, device)
    tensors = [draw(batch, heads, seq_q, dim), *(draw(batch, heads_kv, seq_k, dim) for _ in range(2))]
    options: dict[str, Any] = {}
    if "causal" in name:
        options["mask"] = masks.Causal()
    if name == "dropout":
        options["dropout_p"] = 0.3
    if name == "bias-grad":
        tensors.append(draw(1, heads, seq_q, seq_k))
    return tensors, options, draw(batch, heads, seq_q, dim)


RACED = ("d64-full", "d128-causal", "d128-gqa", "d256-causal", "bias-grad", "dropout", "decode")


RACED_OPS = (
    "softmax",
    "log_softmax",
    "layer_norm",
    "rms_norm",
    "dropout",
    "feed_forward",
    "linear_cross_entropy",
    "rotary_embedding",
    "embedding",
)


def _races(job: Job, context: Context, emit: Emit) -> None:
    """Runs a call again and again: output and gradients must be the same bits."""
    given = job.parameters
    tensors, options, dout = _attention_arguments(given["row"], context.device, context.tiny)

    def once(leaves: Sequence[Tensor]) -> list[Tensor]:
        query, key, value, *bias = leaves
        given_bias = bias[0] if bias else None
        generator = torch.Generator().manual_seed(_SEED) if "dropout_p" in options else None
        out = fastattn.attention(
            query, key, value, **options, bias=given_bias, generator=generator, backend=given["backend"]
        )
        assert isinstance(out, Tensor)
        return [out.detach(), *torch.autograd.grad(out, leaves, dout)]

    names = ["out", "dq", "dk", "dv", "dbias"]
    _repeat(once, tensors, names, context.repeats(1000, 100), given, "attention", emit)


def _row_races(job: Job, context: Context, emit: Emit) -> None:
    """The same of the other ops."""
    given = job.parameters
    backend, draw = given["backend"], Draw(torch.bfloat16, context.device)
    rows, columns = (5, 70) if context.tiny else (611, 5003)
    dim, wide = (16, 40) if context.tiny else (520, 2049)
    x, weight, bias = draw(rows, columns), draw(columns), draw(columns)
    hidden, w_in, w_out = draw(rows, dim), draw(wide, dim, scale=dim**-0.5), draw(dim, wide, scale=wide**-0.5)
    b_in, b_out = draw(wide), draw(dim)
    target = torch.randint(wide, (rows,), generator=torch.Generator().manual_seed(_SEED)).to(context.device)

    def drop(a: Tensor) -> Tensor:
        torch.manual_seed(_SEED)
        return dropout_op.dropout(a, 0.3)

    calls: dict[str, tuple[Callable[..., Any], list[Tensor]]] = {
        "softmax": (fastattn.softmax, [x]),
        "log_softmax": (fastattn.log_softmax, [x]),
        "layer_norm": (fastattn.layer_norm, [x, weight, bias]),
        "rms_norm": (fastattn.rms_norm, [x, weight]),
        "dropout": (drop, [x]),
        "feed_forward": (partial(fastattn.feed_forward, activation="gelu"), [hidden, w_in, b_in, w_out, b_out]),
        "linear_cross_entropy": (lambda h, w: fastattn.linear_cross_entropy(h, w, target), [hidden, w_in]),
    }
    calls["rotary_embedding"] = (fastattn.rotary_embedding, [draw(2, 4, rows, 16 if context.tiny else 64)])
    calls["embedding"] = (lambda w: fastattn.embedding(target % 37, w), [w_in])
    function, tensors = calls[given["op"]]

    def once(leaves: Sequence[Tensor]) -> list[Tensor]:
        with use_backend(backend):
            out = function(*leaves)
            return [out.detach(), *torch.autograd.grad(out.float().square().sum(), leaves)]

    names = ["out", *(f"gradient {k}" for k in range(len(tensors)))]
    _repeat(once, tensors, names, context.repeats(200, 50), given, given["op"], emit)


def _repeat(
    once: Callable[[Sequence[Tensor]], list[Tensor]],
    tensors: Sequence[Tensor],
    names: list[str],
    repeats: int,
    given: dict[str, Any],
    op: str,
    emit: Emit,
) -> None:
    """Runs ``once`` on two sets of tensors by turns, so that what is remembered of a call meets other pointers."""
    sets = [[(t.detach() * factor).requires_grad_() for t in tensors] for factor in (1.0, -0.5)]
    first = [once(leaves) for leaves in sets]
    moved: dict[str, int] = {}
    for k in range(repeats):
        for name, a, b in zip(names, first[k % 2], once(sets[k % 2]), strict=False):
            if not torch.equal(a, b):
                moved[name] = moved.get(name, 0) + 1
    note = "; ".join(f"{name} differed in {count} of {repeats} runs" for name, count in moved.items())
    line = {"op": op, "row": given.get("row", ""), "dtype": "bfloat16", "backend": given["backend"]}
    line |= {"direction": "forward + backward", "check": f"same bits {repeats} times"}
    emit({**line, "ok": not moved, **({"note": note} if note else {})})


def _judge(
    emit: Emit,
    given: dict[str, Any],
    op: str,
    row: str,
    error: float,
    limit: float,
    check: str,
    dtype: str = "bfloat16",
) -> None:
    line = {"op": op, "row": row, "dtype": dtype, "backend": given["backend"], "direction": "", "check": check}
    emit({**line, "ok": error <= limit, "error": error, "bound": limit})


def _dropout(job: Job, context: Context, emit: Emit) -> None:
    """Compares what is dropped with the reference's numbers on the CPU, and with the C++ kernels where they are."""
    given, p = job.parameters, 0.3
    batch, heads, queries, keys = (1, 2, 5, 9) if context.tiny else (2, 4, 301, 250)
    everybody = torch.zeros(batch, heads, queries, 16)
    # All weights are equal and the values are the identity: an output's columns are the weights themselves.
    value = torch.eye(keys).expand(batch, heads, keys, keys).contiguous()
    key = torch.zeros(batch, heads, keys, 16)

    def weights(device: str, backend: str) -> Tensor:
        generator = torch.Generator().manual_seed(_SEED)
        tensors = (t.to(device) for t in (everybody, key, value))
        found = fastattn.attention(*tensors, dropout_p=p, generator=generator, backend=backend)
        assert isinstance(found, Tensor)
        return found.cpu()

    found = weights(context.device, given["backend"])
    state = draw_dropout_state(p, torch.Generator().manual_seed(_SEED), torch.device("cpu"))
    assert state is not None
    kept = keep_mask(state, p, batch * heads, queries, keys).view(batch, heads, queries, keys)
    differing = float(((found != 0) != kept).sum())
    _judge(emit, given, "attention", "dropout", differing, 0.0, "drops what Philox says", "float32")
    if fastattn.backends()["cpu"].available:
        differing = float(((found != 0) != (weights("cpu", "cpu") != 0)).sum())
        _judge(emit, given, "attention", "dropout", differing, 0.0, "drops what the CPU drops", "float32")
    x = torch.ones(33, 17) if context.tiny else torch.ones(1025, 777)
    torch.manual_seed(_SEED)
    with use_backend(given["backend"]):
        layer = dropout_op.dropout(x.to(context.device), p)
    share = (layer == 0).double().mean().item()
    _judge(
        emit,
        given,
        "dropout",
        "layer",
        abs(share - p),
        0.2 if context.tiny else 0.01,
        "share of the dropped",
        "float32",
    )


def _poison(job: Job, context: Context, emit: Emit) -> None:
    """What is masked does not exist: NaN there changes neither the output nor a gradient."""
    given = job.parameters
    batch, heads, queries, keys, dim = (2, 2, 17, 37, 16) if context.tiny else (2, 4, 515, 777, 64)
    for dtype in (torch.bfloat16, torch.float16):
        draw = Draw(dtype, context.device)
        clean = [draw(batch, heads, queries, dim), *(draw(batch, heads, keys, dim) for _ in range(2))]
        bias, dout = draw(1, heads, queries, keys), draw(batch, heads, queries, dim)
        lengths = torch.tensor([keys * 2 // 3, keys // 5], device=context.device)
        allowed = torch.ones(1, 1, queries, keys, dtype=torch.bool, device=context.device)
        allowed[..., keys // 7 :: 5] = False
        # Kernels that a tile asks for may serve neither.
        served = 3 if "tile" in given else 4
        mask = masks.KeyLengths(lengths) if served == 3 else masks.KeyLengths(lengths) & masks.Dense(allowed)
        hidden = torch.arange(keys, device=context.device) >= lengths[:, None]
        dirty = [t.clone() for t in clean]
        for tensor in dirty[1:]:
            tensor[hidden[:, None].expand(-1, heads, -1)] = float("nan")
            if served == 4:
                tensor[:, :, keys // 7 :: 5] = float("inf")
        dirty_bias = bias.masked_fill(~allowed, float("nan"))
        answers = []
        for tensors in ([*clean, bias], [*dirty, dirty_bias]):
            leaves = [t.detach().requires_grad_() for t in tensors[:served]]
            extra = leaves[3] if served == 4 else None
            out = fastattn.attention(*leaves[:3], mask=mask, bias=extra, backend=given["backend"])
            assert isinstance(out, Tensor)
            answers.append([out.detach(), *torch.autograd.grad(out, leaves, dout)])
        # Of the gradients too: what is masked gets 0.
        error = max(relative(b, a.double()) for a, b in zip(*answers, strict=True))
        name = str(dtype).removeprefix("torch.")
        _judge(emit, given, "attention", "masked NaN", error, TOLERANCE[dtype], "as without them", name)


def _weights(job: Job, context: Context, emit: Emit) -> None:
    """Compares attention weights, whole and reduced, with float64."""
    given = job.parameters
    heads, queries, keys = (2, 17, 37) if context.tiny else (4, 515, 777)
    draw = Draw(torch.bfloat16, context.device)
    query, key = draw(2, heads, queries, 64), draw(2, heads, keys, 64)
    for reduce in ("none", "head_mean", "key_sum", "entropy", "top_k", "pooled"):
        more: dict[str, Any] = {"mask": masks.Causal(), "reduce": reduce}
        if reduce == "top_k":
            more["top_k"] = 3
        found = fastattn.attention_weights(query, key, **more, backend=given["backend"])
        exact = fastattn.attention_weights(query.double(), key.double(), **more, backend="reference")
        pair = (found[0], exact[0]) if isinstance(found, tuple) else (found, exact)
        assert isinstance(pair[0], Tensor)
        error = relative(pair[0], pair[1])  # type: ignore[arg-type]
        _judge(emit, given, "attention_weights", reduce, error, TOLERANCE[torch.bfloat16], "against float64")


def _packed(job: Job, context: Context, emit: Emit) -> None:
    """Compares packed sequences, output and gradients, with float64, and with themselves again and again."""
    given = job.parameters
    many = [3, 0, 17, 9] if context.tiny else [3, 129, 0, 517, 64, 1000]
    # Few queries of each share out their keys among programs.
    few_q, few_k = ([1, 0, 2], [259, 3, 5]) if context.tiny else ([1, 4, 0, 1, 2, 1], [4099, 1, 77, 8192, 300, 0])
    for row, lengths_q, lengths_k in (("causal", many, many), ("few queries", few_q, few_k)):
        bounds = [
            torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(context.device)
            for lengths in (lengths_q, lengths_k)
        ]
        draw = Draw(torch.bfloat16, context.device)
        tensors = [draw(sum(lengths_q), 4, 64), draw(sum(lengths_k), 2, 64), draw(sum(lengths_k), 2, 64)]
        dout = draw(sum(lengths_q), 4, 64)

        def answers(inputs: Sequence[Tensor], backend: str, bounds: Any = bounds, dout: Tensor = dout) -> list[Tensor]:
            leaves = [t.detach().requires_grad_() for t in inputs]
            query, key, value = leaves
            out = fastattn.varlen_attention(query, key, value, *bounds, mask=masks.Causal(), backend=backend)
            assert isinstance(out, Tensor)
            if context.tiny and len(key) > 256:
                return [out.detach()]  # the interpreter takes a minute for the rest
            return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(out.dtype))]

        exact = answers([t.double() for t in tensors], "reference")
        error = max(relative(a, b) for a, b in zip(answers(tensors, given["backend"]), exact, strict=True))
        _judge(emit, given, "varlen_attention", row, error, TOLERANCE[torch.bfloat16], "against float64")
        if context.tiny:
            continue  # nothing runs at the same time in the interpreter
        once = partial(answers, backend=given["backend"])
        names, repeats = ["out", "dq", "dk", "dv"], context.repeats(200, 30)
        _repeat(once, tensors, names, repeats, {**given, "row": row}, "varlen_attention", emit)


def _paged(job: Job, context: Context, emit: Emit) -> None:
    """Compares attention over pages with float64, and with itself again and again; what no length reaches is NaN."""
    given = job.parameters
    batch, length, queries = (2, 37, 2) if context.tiny else (5, 3001, 3)
    for page_size in (16,) if context.tiny else (16, 100, 256):
        draw = Draw(torch.bfloat16, context.device)
        pages = -(-length // page_size)
        query = draw(batch, 8, queries, 128)
        caches = [draw(batch * pages + 3, page_size, 2, 128) for _ in range(2)]
        order = torch.randperm(batch * pages, generator=torch.Generator().manual_seed(_SEED)).view(batch, pages)
        lengths = torch.linspace(0, length, batch).int()
        there = torch.zeros(batch * pages + 3, page_size, dtype=torch.bool)
        for b in range(batch):
            there[order[b]] = (torch.arange(pages * page_size) < lengths[b]).view(pages, page_size)
        table, lengths, hidden = (t.to(context.device) for t in (order, lengths, ~there))
        exact = [t.double().masked_fill(hidden[..., None, None], 0.0) for t in caches]
        for cache in caches:
            cache[hidden] = float("nan")

        def attend(tensors: Sequence[Tensor], backend: str, table: Tensor = table, lengths: Tensor = lengths) -> Any:
            query, key_cache, value_cache = tensors
            return fastattn.paged_attention(query, key_cache, value_cache, table, lengths, backend=backend)

        with torch.no_grad():
            found = attend([query, *caches], given["backend"])
            error = relative(found, attend([query.double(), *exact], "reference"))
            row = f"pages of {page_size}"
            _judge(emit, given, "paged_attention", row, error, TOLERANCE[torch.bfloat16], "against float64")
            repeats = context.repeats(200, 30)
            moved = sum(not torch.equal(found, attend([query, *caches], given["backend"])) for _ in range(repeats))
        _judge(emit, given, "paged_attention", row, float(moved), 0.0, f"same bits {repeats} times")


def _huge(job: Job, context: Context, emit: Emit) -> None:
    """Compares the end of tensors of more than 2^31 elements with a call on that end alone."""
    given = job.parameters
    draw = Draw(torch.bfloat16, context.device)
    x = draw(66_000, 32_768)
    out = fastattn.softmax(x, backend=given["backend"])
    error = relative(out[-64:], x[-64:].double().softmax(-1))
    _judge(emit, given, "softmax", "66000x32768", error, TOLERANCE[torch.bfloat16], "beyond 2^31 elements")
    del x, out
    tensors = [draw(1, 17, 1 << 20, 128), *(draw(1, 17, 1 << 20, 128) for _ in range(2))]
    window = masks.Window(63, 0)
    whole = fastattn.attention(*tensors, mask=window, backend=given["backend"])
    assert isinstance(whole, Tensor)
    end = [t[:, -1:, -1024:].double() for t in tensors]
    exact = fastattn.attention(*end, mask=window, backend="reference")
    assert isinstance(exact, Tensor)
    # The first queries of the piece would see keys before it.
    error = relative(whole[:, -1:, -512:], exact[:, :, -512:])
    _judge(emit, given, "attention", "1x17x1048576x128", error, TOLERANCE[torch.bfloat16], "beyond 2^31 elements")


KINDS: dict[str, Callable[[Job, Context, Emit], None]] = {
    "rule": with_tile(_rule),
    "races": with_tile(_races),
    "row-races": _row_races,
    "dropout": _dropout,
    "poison": with_tile(_poison),
    "weights": _weights,
    "packed": _packed,
    "paged": _paged,
    "huge": _huge,
}
