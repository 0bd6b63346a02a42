"""Seq2SeqConfig: everything that rebuilds a Seq2Seq except its weights and its tokenizer."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

_POSITIONAL = ("sinusoidal", "learned", "none")
_ACTIVATIONS = ("relu", "gelu")


@dataclasses.dataclass(frozen=True)
class Seq2SeqConfig:
    """The shape of an encoder-decoder Transformer; immutable, validated when made, stored as ``config.json``.

    Args:
        source_vocab_size, target_vocab_size: rows of the two embeddings, special tokens included.
        model_dim, num_heads, ff_dim: as in Vaswani et al. 2017 (d_model, h, d_ff); ``num_heads`` divides ``model_dim``.
        num_encoder_layers, num_decoder_layers: depths.
        dropout: probability in [0, 1), for embeddings, attention and feed-forward alike.
        activation: ``"relu"`` or ``"gelu"``.
        norm_first: normalise before each block (stable without long warm-up) instead of after it.
        layer_norm_eps: added to the variance.
        positional_encoding: ``"sinusoidal"``, ``"learned"`` or ``"none"``.
        max_len: most positions on either side, special tokens included.
        share_embeddings: one embedding for source and target; needs equal vocabulary sizes.
        label_smoothing: of the training loss, in [0, 1).
        pad_id, bos_id, eos_id, unk_id: special tokens, the same on both sides.
        tokenizer_fingerprint: SHA-256 of the tokenizer this model is trained with; None while it has none.
        metadata: anything worth knowing about the weights (data, command, error rates); JSON values only.

    Raises:
        ValueError: a value outside its range, naming the field, what was got and what was expected.
        TypeError: a field of the wrong type.
    """

    source_vocab_size: int
    target_vocab_size: int
    model_dim: int = 512
    num_heads: int = 8
    ff_dim: int = 2048
    num_encoder_layers: int = 6
    num_decoder_layers: int = 6
    dropout: float = 0.1
    activation: str = "relu"
    norm_first: bool = True
    layer_norm_eps: float = 1e-5
    positional_encoding: str = "sinusoidal"
    max_len: int = 512
    share_embeddings: bool = False
    label_smoothing: float = 0.1
    pad_id: int = 0
    bos_id: int = 1
    eos_id: int = 2
    unk_id: int = 3
    tokenizer_fingerprint: str | None = None
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _check_type(field.name, getattr(self, field.name), str(field.type))
        for name in ("source_vocab_size", "target_vocab_size", "model_dim", "num_heads", "ff_dim"):
            self._require(getattr(self, name) > 0, name, "a positive integer")
        for name in ("num_encoder_layers", "num_decoder_layers"):
            self._require(getattr(self, name) >= 0, name, "a non-negative integer")
        for name in ("dropout", "label_smoothing"):
            self._require(0.0 <= getattr(self, name) < 1.0, name, "a number in [0, 1)")
        self._require(self.model_dim % self.num_heads == 0, "model_dim", f"a multiple of num_heads={self.num_heads}")
        self._require(self.activation in _ACTIVATIONS, "activation", f"one of {_ACTIVATIONS}")
        self._require(self.positional_encoding in _POSITIONAL, "positional_encoding", f"one of {_POSITIONAL}")
        self._require(self.max_len >= 2, "max_len", "at least 2, room for one token and the end")
        self._require(self.layer_norm_eps > 0.0, "layer_norm_eps", "a positive number")
        vocab = min(self.source_vocab_size, self.target_vocab_size)
        ids = (self.pad_id, self.bos_id, self.eos_id, self.unk_id)
        for name, value in zip(("pad_id", "bos_id", "eos_id", "unk_id"), ids, strict=True):
            self._require(0 <= value < vocab, name, f"in [0, {vocab}), inside both vocabularies")
        if len(set(ids)) != len(ids):
            raise ValueError(f"pad_id, bos_id, eos_id and unk_id must differ, got {ids}")
        if self.share_embeddings and self.source_vocab_size != self.target_vocab_size:
            raise ValueError(
                "share_embeddings needs equal vocabulary sizes, got "
                f"source_vocab_size={self.source_vocab_size} and target_vocab_size={self.target_vocab_size}"
            )

    def _require(self, condition: bool, name: str, expected: str) -> None:
        if not condition:
            raise ValueError(f"{name} must be {expected}, got {getattr(self, name)!r}")

    def replace(self, **changes: Any) -> Seq2SeqConfig:
        """A copy with some fields changed, validated again."""
        return dataclasses.replace(self, **changes)

    def to_json(self) -> str:
        """Readable JSON, one field a line, in the order of the fields."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Seq2SeqConfig:
        """The inverse of ``to_json``; unknown or missing fields are errors, so that no setting is lost unnoticed.

        Raises:
            ValueError: not JSON, not an object, unknown or missing fields, or values out of range.
            TypeError: a field of the wrong type.
        """
        try:
            values = json.loads(text)
        except ValueError as error:
            raise ValueError(f"not valid JSON: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"expected a JSON object, got {type(values).__name__}")
        fields = dataclasses.fields(cls)
        unknown = sorted(set(values) - {field.name for field in fields})
        if unknown:
            raise ValueError(f"unknown fields {unknown}; expected only {[field.name for field in fields]}")
        required = ("source_vocab_size", "target_vocab_size")
        missing = [name for name in required if name not in values]
        if missing:
            raise ValueError(f"missing fields {missing}")
        return cls(**values)


def _check_type(name: str, value: Any, annotation: str) -> None:
    """Fields are annotated with a handful of plain types; JSON and callers must supply exactly those."""
    kinds: dict[str, Any] = {
        "int": int,
        "float": (int, float),
        "bool": bool,
        "str": str,
        "str | None": (str, type(None)),
    }
    expected = kinds.get(annotation, dict)
    wrong_bool = isinstance(value, bool) and annotation in ("int", "float")  # bool is a subclass of int
    if wrong_bool or not isinstance(value, expected):
        wanted = annotation if annotation in kinds else "dict"
        raise TypeError(f"{name} must be {wanted}, got {type(value).__name__} {value!r}")
