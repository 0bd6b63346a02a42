"""Trainable tokenizers: a thin wrapper of the `tokenizers` library, and the pair that a Seq2Seq needs."""

from __future__ import annotations

import functools
import hashlib
import json
import warnings
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    import tokenizers

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<unk>")  # ids 0, 1, 2, 3
PAD_ID, BOS_ID, EOS_ID, UNK_ID = range(4)
_FORMAT = "fastattn-tokenizers-1"


class Tokenizer:
    """Text to token ids and back: one `tokenizers.Tokenizer` whose ids 0 to 3 are ``<pad> <bos> <eos> <unk>``.

    The canonical JSON it was made from is kept, and the fingerprint is computed from that, so that a newer `tokenizers`
    which serialises differently does not change the identity of a trained model's tokenizer.

    Raises:
        ValueError: the JSON is no tokenizer, or its special tokens have other ids.
    """

    def __init__(self, definition: str) -> None:
        import tokenizers

        try:
            content = json.loads(definition)
            self._tokenizer = tokenizers.Tokenizer.from_str(definition)
        except Exception as error:  # the library raises bare Exception for anything it cannot parse
            raise ValueError(f"not a tokenizer definition: {error}") from error
        found = tuple(self._tokenizer.id_to_token(i) for i in range(4))
        if found != SPECIAL_TOKENS:
            raise ValueError(f"token ids 0 to 3 must be {SPECIAL_TOKENS}, got {found}")
        # A text that happens to contain "<eos>" is text: only this code places special tokens.
        self._tokenizer.encode_special_tokens = True
        self.definition = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))

    @classmethod
    def train(
        cls, texts: Iterable[str], *, kind: str = "bpe", vocab_size: int = 8000, fold_case: bool = False
    ) -> Tokenizer:
        """Learn a vocabulary from texts; the same texts give the same tokenizer.

        Args:
            texts: the training texts.
            kind: ``"bpe"`` (byte-level pairs: never an unknown token), ``"char"`` (one token a character) or ``"word"``
                (one token a whitespace-separated word, decoded with single spaces between).
            vocab_size: the most tokens, special ones included.
            fold_case: lower-case, strip accents and straighten apostrophes first, so that "Café" is "cafe".

        Raises:
            ValueError: an unknown kind, or a vocabulary with no room beside the special tokens.
        """
        from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers
        from tokenizers import Tokenizer as Backend

        if vocab_size <= len(SPECIAL_TOKENS):
            raise ValueError(f"vocab_size must exceed the {len(SPECIAL_TOKENS)} special tokens, got {vocab_size}")
        shared: dict[str, Any] = {"vocab_size": vocab_size, "special_tokens": list(SPECIAL_TOKENS), "min_frequency": 1}
        shared["show_progress"] = False
        trainer: Any
        if kind == "bpe":
            backend = Backend(models.BPE(unk_token="<unk>"))
            backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            backend.decoder = decoders.ByteLevel()
            trainer = trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **shared)
        elif kind == "char":
            backend = Backend(models.WordLevel(unk_token="<unk>"))
            backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
            backend.decoder = decoders.Fuse()
            trainer = trainers.WordLevelTrainer(**shared)
        elif kind == "word":
            backend = Backend(models.WordLevel(unk_token="<unk>"))
            backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
            trainer = trainers.WordLevelTrainer(**shared)
        else:
            raise ValueError(f'kind must be "bpe", "char" or "word", got {kind!r}')
        if fold_case:
            steps = [normalizers.Replace("\u2019", "'"), normalizers.NFD(), normalizers.StripAccents()]
            backend.normalizer = normalizers.Sequence([*steps, normalizers.Lowercase()])
        # No single character spells a special token; a learned piece or a word could.
        backend.train_from_iterator(texts if kind == "char" else map(_without_special, texts), trainer)
        return cls(backend.to_str())

    @property
    def backend(self) -> tokenizers.Tokenizer:
        """The wrapped `tokenizers.Tokenizer`."""
        return self._tokenizer

    @property
    def vocab_size(self) -> int:
        """Number of token ids, special ones included."""
        return self._tokenizer.get_vocab_size()

    def encode(self, text: str, *, on_unknown: str = "warn") -> list[int]:
        """Token ids of one text, without special tokens.

        Args:
            text: any text; "" gives [].
            on_unknown: what to do about pieces outside the vocabulary: ``"warn"`` (they become ``<unk>``, and a
                UserWarning names them), ``"error"`` (ValueError) or ``"ignore"`` (they become ``<unk>`` silently).

        Raises:
            TypeError: text is not a string.
            ValueError: unknown pieces with ``on_unknown="error"``.
        """
        if not isinstance(text, str):
            raise TypeError(f"text must be a str, got {type(text).__name__}")
        if on_unknown not in ("warn", "error", "ignore"):
            raise ValueError(f'on_unknown must be "warn", "error" or "ignore", got {on_unknown!r}')
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        # The word "<eos>" is in a word vocabulary, as the special token; a text that says so means no such thing.
        ids = [i if i >= len(SPECIAL_TOKENS) else UNK_ID for i in encoding.ids]
        if on_unknown != "ignore" and UNK_ID in ids:
            spans = [span for i, span in zip(ids, encoding.offsets, strict=True) if i == UNK_ID]
            pieces = sorted({text[start:end] for start, end in spans})
            message = f"{text!r} has pieces the tokenizer never saw: {', '.join(map(repr, pieces))}"
            if on_unknown == "error":
                raise ValueError(message)
            warnings.warn(f"{message}; each becomes <unk>, so the output is a guess", stacklevel=2)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, without special tokens; everything after the first ``<eos>`` is left out."""
        ids = [int(i) for i in ids]
        if EOS_ID in ids:
            ids = ids[: ids.index(EOS_ID)]
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """The token strings of ids, special ones included (for labels of attention maps)."""
        return [self._tokenizer.id_to_token(int(i)) or "" for i in ids]


class Seq2SeqTokenizer:
    """The source and the target tokenizer of one model; one object for both when they are shared.

    ``tokenizer.json`` holds both, so that they cannot be parted.
    """

    def __init__(self, source: Tokenizer, target: Tokenizer | None = None) -> None:
        self.source = source
        self.target = source if target is None else target

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 over both definitions: equal exactly when the two encode and decode alike."""
        text = self.source.definition + "\n" + self.target.definition
        return hashlib.sha256(text.encode()).hexdigest()

    def encode_source(self, texts: Sequence[str], *, on_unknown: str = "warn") -> Tensor:
        """Padded ids ``[batch, source_len]`` of texts, each ending in ``<eos>``: never empty, even for ""."""
        return pad([[*self.source.encode(text, on_unknown=on_unknown), EOS_ID] for text in texts])

    def encode_target(self, texts: Sequence[str], *, on_unknown: str = "warn") -> Tensor:
        """Padded ids ``[batch, target_len]`` of texts, each between ``<bos>`` and ``<eos>``."""
        return pad([[BOS_ID, *self.target.encode(text, on_unknown=on_unknown), EOS_ID] for text in texts])

    def decode(self, ids: Sequence[int]) -> str:
        """Text of target ids (see ``Tokenizer.decode``)."""
        return self.target.decode(ids)

    def to_json(self) -> str:
        """Both definitions in one JSON object; ``target`` is null when shared."""
        target = None if self.target is self.source else json.loads(self.target.definition)
        content = {"format": _FORMAT, "source": json.loads(self.source.definition), "target": target}
        return json.dumps(content, indent=1, ensure_ascii=False, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Seq2SeqTokenizer:
        """The inverse of ``to_json``.

        Raises:
            ValueError: the text is not JSON of that form.
        """
        try:
            content = json.loads(text)
        except ValueError as error:
            raise ValueError(f"not valid JSON: {error}") from error
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            got = content.get("format") if isinstance(content, dict) else type(content).__name__
            raise ValueError(f'expected a JSON object with "format": "{_FORMAT}", got {got!r}')
        missing = [key for key in ("source", "target") if key not in content]
        if missing:
            raise ValueError(f"missing keys {missing}")
        target = content["target"]
        return cls(Tokenizer(json.dumps(content["source"])), None if target is None else Tokenizer(json.dumps(target)))


def _without_special(text: str) -> str:
    """A training text in which no special token is spelt out: learned as a piece, it would take that token's id."""
    for token in SPECIAL_TOKENS:
        text = text.replace(token, " ")
    return text


def pad(sequences: Sequence[Sequence[int]], pad_id: int = PAD_ID) -> Tensor:
    """Int64 ``[batch, longest]`` with ``pad_id`` after the end of each sequence."""
    longest = max((len(sequence) for sequence in sequences), default=0)
    rows = [[*sequence, *[pad_id] * (longest - len(sequence))] for sequence in sequences]
    return torch.tensor(rows, dtype=torch.int64).reshape(len(rows), longest)
