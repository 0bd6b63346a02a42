"""The attention maps of a Seq2Seq on a text."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastattn.models import Seq2Seq
from fastattn.tools.maps import AttentionMaps, record_attention


@torch.no_grad()
def record(model: Seq2Seq, text: str) -> tuple[AttentionMaps, dict[str, tuple[Sequence[str], Sequence[str]]], str]:
    """Returns the maps of ``model`` as it generates from ``text``, the labels of their rows and columns, and what it
    generated.

    A row of the decoder's maps is labelled with the token that was chosen there, not with the one before it that was
    read.

    Raises:
        ValueError: the model has no tokenizer, or ``text`` is empty, too long or has unknown characters.
    """
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise ValueError("maps of a text need a model with a tokenizer")
    if not tokenizer.source.encode(text, on_unknown="error"):
        raise ValueError(f"cannot draw the maps of an empty text, got {text!r}")
    generated = model.generate(text)
    source = tokenizer.encode_source([text])
    target = tokenizer.encode_target([generated])
    was_training = model.training
    model.eval()
    try:
        # Teacher-forced on what it generated: the same weights as step by step, in one call a layer.
        with record_attention(model) as maps:
            model(source, target[:, :-1])
    finally:
        model.train(was_training)
    letters = _shown(tokenizer.source.tokens(source[0].tolist()))
    said = _shown(tokenizer.target.tokens(target[0].tolist()))
    read, chosen = said[:-1], said[1:]
    labels: dict[str, tuple[Sequence[str], Sequence[str]]] = {
        "*encoder*": (letters, letters),
        "*decoder*.self_attn": (chosen, read),
        "*decoder*": (chosen, letters),
    }
    return maps, labels, generated


def _shown(tokens: Sequence[str]) -> list[str]:
    return [{"<bos>": "start", "<eos>": "end"}.get(token, token) for token in tokens]
