"""Every kernel that shares its work among threads, forward and backward, as calls that can be repeated.

``tests/test_concurrency.py`` compares the bits of their results; run as a program, under ThreadSanitizer (``make
sanitize-threads``), this file runs them all on 4 threads, and from several Python threads at once. It needs no pytest.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import fastattn
from fastattn.backends import BY_NAME
from fastattn.backends.extension import kernels
from fastattn.biases import Alibi
from fastattn.masks import Causal, Dense, KeyLengths, Segments, Window
from fastattn.ops.attention_with_weights import attend_with_weights
from fastattn.spec.attention import attention_call
from fastattn.spec.linear import linear_call

Op = Callable[[], list[Tensor]]


def ops() -> dict[str, Op]:
    """Returns the calls by name; each repeats with the same bits, at any number of threads.

    Every call is large enough for several threads, and its tensors too small for PyTorch's own operators to start any:
    those would hang in a forked child.
    """
    rng = torch.Generator().manual_seed(0)

    def randn(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(size, generator=rng).to(dtype)

    def qkv(batch: int, heads: int, heads_kv: int, rows: int, keys: int, dim: int, dtype: torch.dtype) -> list[Tensor]:
        return [
            randn(batch, heads, rows, dim, dtype=dtype),
            randn(batch, heads_kv, keys, dim, dtype=dtype),
            randn(batch, heads_kv, keys, dim, dtype=dtype),
        ]

    found: dict[str, Op] = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        name = str(dtype).removeprefix("torch.")
        found |= {
            # More heads than threads: each thread packs for itself. One head: all pack and share.
            f"attention heads {name}": _attention(*qkv(2, 4, 4, 70, 90, 16, dtype)),
            f"attention shared {name}": _attention(*qkv(1, 1, 1, 300, 500, 32, dtype), mask=Causal()),
            f"attention grouped {name}": _attention(*qkv(1, 6, 2, 130, 200, 8, dtype), mask=Window(60, 20)),
            f"decode {name}": _attention(*qkv(1, 2, 1, 1, 900, 16, dtype)),
            f"softmax {name}": _softmax(randn(40, 700, dtype=dtype), dim=-1),
            f"layer_norm {name}": _norm(fastattn.layer_norm, randn(100, 200, dtype=dtype), randn(200, dtype=dtype)),
            f"embedding {name}": _embedding(
                torch.randint(0, 40, (4, 50), generator=rng), randn(40, 72, dtype=dtype), randn(60, 72, dtype=dtype)
            ),
            f"rotary_embedding {name}": _differentiated(
                lambda *t: torch.cat(fastattn.rotary_embedding(*t, offset=3, backend="cpu"), dim=1),
                [randn(2, 4, 80, 32, dtype=dtype), randn(2, 2, 80, 32, dtype=dtype)],
            ),
        }
        for tokens in (3, 200):  # few tokens have a kernel of their own
            for activation, gated in (("gelu", False), ("silu", True)):
                found[f"feed_forward {activation} {tokens} {name}"] = _feed_forward(
                    [randn(tokens, 24, dtype=dtype), randn(300, 24, dtype=dtype), randn(300, dtype=dtype)]
                    + [randn(20, 300, dtype=dtype), randn(20, dtype=dtype)]
                    + ([randn(300, 24, dtype=dtype), randn(300, dtype=dtype)] if gated else []),
                    activation,
                    randn(tokens, 20, dtype=dtype) if gated else None,
                )
        if dtype != torch.float64:
            found[f"linear {name}"] = _linear(
                [randn(200, 70, dtype=dtype), randn(192, 70, dtype=dtype), randn(192, dtype=dtype)],
                [randn(200, 64, dtype=dtype) for _ in range(3)],
            )
            found[f"linear_cross_entropy {name}"] = _linear_cross_entropy(
                randn(60, 32, dtype=dtype), randn(400, 32, dtype=dtype), torch.randint(0, 400, (60,), generator=rng)
            )
    plain = qkv(2, 2, 2, 100, 300, 16, torch.float32)
    long = qkv(1, 2, 2, 100, 300, 16, torch.float32)
    masks = {
        "lengths": KeyLengths(torch.tensor([200, 11])) & Causal(),
        "segments": Segments(torch.arange(100).expand(2, -1) // 40, torch.arange(300).expand(2, -1) // 120),
        "dense": Dense(torch.rand(2, 1, 100, 300, generator=rng) < 0.5),
    }
    for name, mask in masks.items():
        found[f"attention {name}"] = _attention(*plain, mask=mask)
    # A bias that several tasks share: they add to its gradient in turns.
    for shape in ((1, 2, 100, 300), (1, 1, 100, 300), (1, 1, 1, 300), (2, 2, 100, 1), (1, 1, 1, 1)):
        found[f"attention bias {'x'.join(map(str, shape))}"] = _attention(*plain, bias=randn(*shape))
    found |= {
        "attention alibi, sinks": _attention(*plain, slopes=randn(2), sinks=randn(2)),
        "attention dropout, softcap": _attention(*plain, dropout_p=0.3, softcap=2.0),
        "log_softmax": _softmax(randn(4, 6000), dim=-1, log=True),  # few long lines, cut into pieces
        "softmax dim 0": _softmax(randn(300, 90), dim=0, mask=torch.rand(300, 90, generator=rng) < 0.7),
        "rms_norm": _norm(fastattn.rms_norm, randn(100, 200), randn(200)),
        "weights": lambda: [fastattn.attention_weights(*long[:2], mask=Causal())],
        "weights top_k": lambda: list(fastattn.attention_weights(*long[:2], reduce="top_k", top_k=3)),
        "varlen": _differentiated(
            lambda *t: fastattn.varlen_attention(*t, torch.tensor([0, 60, 150]), torch.tensor([0, 100, 200])),
            [randn(150, 2, 16), randn(200, 2, 16), randn(200, 2, 16)],
        ),
    }
    for dtype in (torch.float32, torch.bfloat16):
        found[f"paged attention {dtype}"] = _paged(
            randn(2, 4, 1, 32, dtype=dtype), randn(80, 16, 2, 32, dtype=dtype), [600, 37]
        )
    for tensors in (long, qkv(2, 4, 2, 200, 330, 64, torch.bfloat16)):
        call = attention_call(*tensors, mask=Causal(), backend="cpu")
        found[f"attention with weights {call.query.dtype}"] = lambda call=call: list(attend_with_weights(call))
    for reduce in ("head_mean", "key_sum", "entropy", "pooled"):
        found[f"weights {reduce}"] = lambda reduce=reduce: [fastattn.attention_weights(*long[:2], reduce=reduce)]
    return found


def _differentiated(function: Callable[..., Tensor], tensors: list[Tensor]) -> Op:
    """Returns the call of ``function``; with gradients where they are enabled."""
    leaves = [t.requires_grad_() for t in tensors]
    dout = torch.ones_like(function(*leaves).detach())

    def run() -> list[Tensor]:
        out = function(*leaves)
        return [out, *torch.autograd.grad(out, leaves, dout)] if out.requires_grad else [out]

    return run


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None = None,
    slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    **options: object,
) -> Op:
    learned = {"bias": bias, "slopes": slopes, "sinks": sinks}
    names = [name for name, tensor in learned.items() if tensor is not None]

    def call(*tensors: Tensor) -> Tensor:
        more = dict(zip(names, tensors[3:], strict=True))
        if slopes is not None:
            more["bias"] = Alibi(more.pop("slopes"))
        return fastattn.attention(
            *tensors[:3], **more, **options, generator=torch.Generator().manual_seed(5), backend="cpu"
        )

    return _differentiated(call, [query, key, value, *(t for t in learned.values() if t is not None)])


def _softmax(input: Tensor, dim: int, log: bool = False, mask: Tensor | None = None) -> Op:
    op = fastattn.log_softmax if log else fastattn.softmax
    return _differentiated(partial(op, dim=dim, mask=mask, backend="cpu"), [input])


def _norm(op: Callable[..., Tensor], input: Tensor, weight: Tensor) -> Op:
    return _differentiated(
        partial(op, backend="cpu"), [input, weight, *([weight + 1] if op is fastattn.layer_norm else [])]
    )


def _feed_forward(tensors: list[Tensor], activation: str, residual: Tensor | None) -> Op:
    added = {} if residual is None else {"residual": residual, "output_dropout_p": 0.3}

    def call(*t: Tensor) -> Tensor:
        gate = {"weight_gate": t[5], "bias_gate": t[6]} if len(t) > 5 else {}
        generator = torch.Generator().manual_seed(7)
        return fastattn.feed_forward(
            *t[:5], **gate, **added, activation=activation, dropout_p=0.2, generator=generator, backend="cpu"
        )

    return _differentiated(call, tensors)


def _linear(tensors: list[Tensor], douts: list[Tensor]) -> Op:
    call = linear_call(*tensors, parts=len(douts), backend="cpu")

    def run() -> list[Tensor]:
        if kernels().isa() != "amx":  # elsewhere PyTorch multiplies
            return []
        backend = BY_NAME["cpu"]
        return [*backend.linear(call), *backend.linear_backward(call, douts, [True, True, False])[:2]]

    return run


def _linear_cross_entropy(hidden: Tensor, weight: Tensor, target: Tensor) -> Op:
    return _differentiated(
        lambda h, w: fastattn.linear_cross_entropy(h, w, target, label_smoothing=0.1, backend="cpu"), [hidden, weight]
    )


def _embedding(ids: Tensor, weight: Tensor, position_table: Tensor) -> Op:
    def call(weight: Tensor, position_table: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(11)
        return fastattn.embedding(
            ids, weight, position_table=position_table, dropout_p=0.2, generator=generator, backend="cpu"
        )

    return _differentiated(call, [weight, position_table])


def _paged(query: Tensor, cache: Tensor, lengths: list[int]) -> Op:
    pages = -(-max(lengths) // cache.shape[1])
    table = torch.arange(len(lengths) * pages, dtype=torch.int32).view(len(lengths), pages)
    return lambda: [fastattn.paged_attention(query, cache, cache, table, torch.tensor(lengths), backend="cpu")]


def bits(tensors: list[Tensor]) -> list[bytes]:
    """Returns what ``tensors`` hold; it starts no thread, which torch.equal may."""
    return [t.detach().reshape(-1).view(torch.uint8).numpy().tobytes() for t in tensors]


def main() -> None:
    """Runs every op on 4 threads on each instruction set, then all of them from 3 Python threads at once."""
    calls = ops()
    for isa in kernels().available_isas():
        kernels().set_isa(isa)
        torch.set_num_threads(1)
        expected = {name: bits(op()) for name, op in calls.items()}
        torch.set_num_threads(4)
        wrong = [name for name, op in calls.items() if bits(op()) != expected[name]]

        def everything(expected=expected, wrong=wrong) -> None:
            torch.set_num_threads(4)
            wrong.extend(name for name, op in calls.items() if bits(op()) != expected[name])

        threads = [threading.Thread(target=everything) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if wrong:
            sys.exit(f"{isa}: other bits on 4 threads: {', '.join(wrong)}")
        print(f"{isa}: {len(calls)} ops on 4 threads, alone and in company", flush=True)


if __name__ == "__main__":
    main()
