"""Grapheme to phoneme: the CMU dictionary as a sequence-to-sequence task, and its error rates."""

from __future__ import annotations

import functools
import gzip
import hashlib
import importlib.resources
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastattn.models.seq2seq import Seq2Seq
from fastattn.models.tokenizer import Seq2SeqTokenizer, Tokenizer

NUM_TEST_WORDS = 12_000  # as in the literature (Yao and Zweig 2015: 12,000 of CMUdict held out)
NUM_VALIDATION_WORDS = 2_700

# Held-out words to show: easy and hard, some with spellings that hardly tell.
EXAMPLES = (
    "laughter",
    "symphony",
    "microscope",
    "choreography",
    "paleontology",
    "epistemology",
    "lugubrious",
    "inattention",
    "denouement",
    "queue",
)

Pronunciations = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Split:
    """Three disjoint sets of words, each with its stress-free pronunciations ("K AE T"), in dictionary order."""

    train: Pronunciations
    validation: Pronunciations
    test: Pronunciations


@functools.cache
def load_dictionary() -> Pronunciations:
    """The shipped CMU dictionary: lower-case word to its distinct pronunciations, most usual first, stress removed."""
    packed = importlib.resources.files("fastattn.data").joinpath("cmudict.dict.gz").read_bytes()
    return parse_dictionary(gzip.decompress(packed).decode("utf-8"))


def parse_dictionary(text: str) -> Pronunciations:
    """Words and pronunciations of a dictionary in CMUdict's format.

    A line is ``word PHONEME ... # comment``; a further pronunciation repeats the word as ``word(2)``; a digit after a
    vowel is its stress, removed here.

    Raises:
        ValueError: a line with a word and no phoneme, with its number.
    """
    words: dict[str, list[str]] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        fields = line.split("#", 1)[0].split()
        if not fields:
            continue
        if len(fields) == 1:
            raise ValueError(f"line {number}: expected a word and its phonemes, got {line!r}")
        word = re.sub(r"\(\d+\)$", "", fields[0])
        phonemes = " ".join(re.sub(r"\d+$", "", phoneme) for phoneme in fields[1:])
        known = words.setdefault(word, [])
        if phonemes not in known:  # two entries may differ only in stress
            known.append(phonemes)
    return {word: tuple(known) for word, known in words.items()}


@functools.cache
def load_split() -> Split:
    """The dictionary in training, validation (2,700) and held-out test (12,000) words.

    Words are ranked by the SHA-256 of their spelling, so the split depends on nothing but the words, and all
    pronunciations of a word are on the same side.
    """
    return split_dictionary(load_dictionary(), NUM_VALIDATION_WORDS, NUM_TEST_WORDS)


def split_dictionary(dictionary: Pronunciations, num_validation: int, num_test: int) -> Split:
    """``load_split`` for any dictionary and sizes.

    Raises:
        ValueError: fewer words than asked for.
    """
    if num_validation + num_test > len(dictionary):
        raise ValueError(f"cannot hold out {num_validation} + {num_test} of {len(dictionary)} words")
    ranked = sorted(dictionary, key=lambda word: hashlib.sha256(word.encode()).digest())
    test, validation = set(ranked[:num_test]), set(ranked[num_test : num_test + num_validation])
    held_out = test | validation

    def pick(wanted: set[str] | None) -> Pronunciations:
        return {w: p for w, p in dictionary.items() if (w not in held_out if wanted is None else w in wanted)}

    return Split(train=pick(None), validation=pick(validation), test=pick(test))


def train_tokenizer(words: Pronunciations) -> Seq2SeqTokenizer:
    """One token a letter on the source side, one a phoneme on the target side."""
    source = Tokenizer.train(words, kind="char", fold_case=True)
    return Seq2SeqTokenizer(source, Tokenizer.train((p for prons in words.values() for p in prons), kind="word"))


def pairs(words: Pronunciations) -> list[tuple[str, str]]:
    """One (word, pronunciation) pair a pronunciation."""
    return [(word, pronunciation) for word, prons in words.items() for pronunciation in prons]


@functools.cache
def load_model() -> Seq2Seq:
    """The shipped model, trained by ``fastattn train g2p``; ``config.metadata`` says how, and how well it does.

    Raises:
        FileNotFoundError, ValueError: a missing or damaged file of the installation.
    """
    with importlib.resources.as_file(importlib.resources.files("fastattn.data").joinpath("g2p")) as folder:
        return Seq2Seq.from_pretrained(folder)


@dataclass(frozen=True)
class Pronunciation:
    """How a word is said, and where the model looked when it chose each phoneme.

    Args:
        word: as given.
        phonemes: as in ("K", "AE", "T").
        letters: the source tokens, ``<eos>`` last.
        attention: cross-attention weights ``[num_decoder_layers, num_heads, phonemes + <eos>, letters]``, or None.
    """

    word: str
    phonemes: tuple[str, ...]
    letters: tuple[str, ...]
    attention: Tensor | None = None

    def __str__(self) -> str:
        return " ".join(self.phonemes)


def pronounce(
    words: Sequence[str], model: Seq2Seq | None = None, *, attention: bool = False, **settings: Any
) -> list[Pronunciation]:
    """Pronounce words, in any case and with any accents.

    Args:
        words: one word each.
        model: by default the shipped one.
        attention: also give the cross-attention weights.
        **settings: of ``Seq2Seq.generate``, such as ``strategy="beam", num_beams=5``.

    Raises:
        ValueError: an empty word, one that is too long, or one with characters that the model never saw: whatever it
            said about those would be made up.
        TypeError: words is one string, or holds something else than strings.
    """
    if isinstance(words, str):
        raise TypeError(f"words must be a sequence of words, got the single string {words!r}")
    model = load_model() if model is None else model
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise ValueError("pronouncing needs a model with a tokenizer")
    for word in words:
        if not isinstance(word, str):
            raise TypeError(f"a word must be a str, got {type(word).__name__}")
        if not tokenizer.source.encode(word, on_unknown="error"):
            raise ValueError(f"cannot pronounce the empty word {word!r}")
    said = []
    for word, phonemes in zip(words, model.generate(list(words), **settings), strict=True):
        source = tokenizer.encode_source([word])
        weights = None
        if attention:
            target_in = tokenizer.encode_target([phonemes])[:, :-1]
            weights = model.cross_attention(source, target_in)[:, 0]
        said.append(
            Pronunciation(word, tuple(phonemes.split()), tuple(tokenizer.source.tokens(source[0].tolist())), weights)
        )
    return said


@torch.no_grad()
def evaluate(model: Seq2Seq, words: Pronunciations, **settings: Any) -> ErrorRates:
    """Error rates of a model's pronunciations of words; ``settings`` are those of ``Seq2Seq.generate``."""
    spellings = list(words)
    # The longest pronunciation of the dictionary has 28 phonemes; a model in training may not end at all.
    settings = {"batch_size": 256, "max_new_tokens": min(32, model.config.max_len - 1), **settings}
    said = model.generate(spellings, on_unknown="ignore", **settings)
    return error_rates(dict(zip(spellings, said, strict=True)), words)


@dataclass(frozen=True)
class ErrorRates:
    """Error rates of pronunciations, in per cent.

    ``phoneme`` (PER): edit distance to the nearest reference over the number of phonemes in that reference, summed over
    words.  ``word`` (WER): words that match none of their references.
    """

    phoneme: float
    word: float
    num_words: int

    def __str__(self) -> str:
        return f"PER {self.phoneme:.2f} %, WER {self.word:.2f} % on {self.num_words:,} words"


def error_rates(predicted: Mapping[str, str], references: Pronunciations) -> ErrorRates:
    """Error rates of one predicted pronunciation a word against all its references.

    Raises:
        ValueError: no words, or a word without a reference.
    """
    if not predicted:
        raise ValueError("error rates of no words are undefined")
    unknown = [word for word in predicted if word not in references]
    if unknown:
        raise ValueError(f"no reference pronunciation for {unknown[:5]}")
    edits = phonemes = wrong = 0
    for word, pronunciation in predicted.items():
        hypothesis = pronunciation.split()
        candidates = [reference.split() for reference in references[word]]
        distance, length = min((edit_distance(hypothesis, reference), len(reference)) for reference in candidates)
        edits, phonemes, wrong = edits + distance, phonemes + length, wrong + (distance > 0)
    return ErrorRates(100.0 * edits / phonemes, 100.0 * wrong / len(predicted), len(predicted))


def edit_distance(first: Sequence[str], second: Sequence[str]) -> int:
    """Levenshtein distance: fewest insertions, deletions and substitutions from one sequence to the other."""
    previous = list(range(len(second) + 1))
    for i, a in enumerate(first, start=1):
        current = [i]
        for j, b in enumerate(second, start=1):
            current.append(min(previous[j] + 1, current[j - 1] + 1, previous[j - 1] + (a != b)))
        previous = current
    return previous[-1]
