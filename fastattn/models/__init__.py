"""Whole models: the encoder-decoder Transformer, its tokenizers, and the grapheme-to-phoneme task."""

from fastattn.models.config import Seq2SeqConfig
from fastattn.models.generation import GenerationSettings
from fastattn.models.seq2seq import Seq2Seq
from fastattn.models.tokenizer import Seq2SeqTokenizer, Tokenizer

__all__ = ["GenerationSettings", "Seq2Seq", "Seq2SeqConfig", "Seq2SeqTokenizer", "Tokenizer"]
