"""``fastattn verify``."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from fastattn.models import Seq2Seq, g2p
from fastattn.tools.table import heading
from fastattn.tools.verify import ModelReport, verify
from fastattn.tools.verify_ops import DTYPES, verify_ops

_WORDS = 16


def run(
    what: str,
    ops: Sequence[str] | None,
    dtypes: Sequence[str] | None,
    backend: str | None,
    only_failures: bool,
    load: Callable[[], Seq2Seq],
) -> int:
    """Prints the tables and returns 0 if every row passes, else 1."""
    ok = True
    if what in ("ops", "all"):
        chosen = DTYPES if dtypes is None else [getattr(torch, d) for d in dtypes]
        print(heading("ops against float64, beside eager PyTorch in the same dtype"), flush=True)
        report = verify_ops(ops=ops, dtypes=chosen, backend=backend)
        print(f"{report.table(only_failures)}\n\n{report.summary()}\n", flush=True)
        ok &= report.ok
    if what in ("model", "all"):
        model_report = verify_model(load())
        print(model_report)
        ok &= model_report.ok
    return 0 if ok else 1


def verify_model(model: Seq2Seq) -> ModelReport:
    """Verifies a Seq2Seq, outputs and gradients, on held-out words; on random tokens where it is not about words."""
    config, tokenizer = model.config, model.tokenizer
    words = list(g2p.load_split().test)[:_WORDS]
    if tokenizer is not None and config.metadata.get("task", "g2p") == "g2p":
        said = [g2p.load_split().test[w][0] for w in words]
        source = tokenizer.encode_source(words, on_unknown="ignore")
        target = tokenizer.encode_target(said, on_unknown="ignore")[:, :-1]
    else:
        generator = torch.Generator().manual_seed(0)
        length = min(24, config.max_len)
        source = torch.randint(4, config.source_vocab_size, (_WORDS, length), generator=generator)
        target = torch.randint(4, config.target_vocab_size, (_WORDS, length), generator=generator)
    return verify(model, source, target)
