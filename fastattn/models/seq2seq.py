"""Seq2Seq: a whole encoder-decoder Transformer, from text to text."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, overload

import torch
from torch import Tensor, nn

from fastattn import nn as fnn
from fastattn.models import pretrained
from fastattn.models.config import Seq2SeqConfig
from fastattn.models.generation import GenerationSettings, Special, generate
from fastattn.models.tokenizer import Seq2SeqTokenizer, pad
from fastattn.nn.positional import NoPositions, embed
from fastattn.ops.linear import linear
from fastattn.ops.linear_cross_entropy import linear_cross_entropy


class Seq2Seq(nn.Module):
    """Encoder-decoder Transformer: tokenizer, embeddings, positions, encoder, decoder, tied output, softmax.

    ``logits = decoder(embed(target), encoder(embed(source))) @ E_target^T`` with
    ``embed(ids) = positions + sqrt(model_dim) * E[ids]``.  Token ids are int64 ``[batch, len]``, padded at the end with
    ``config.pad_id``; padding is invisible.

    Args:
        config: the shape.
        tokenizer: text to ids; None works on ids alone.  Its fingerprint is stored in the configuration, and from then
            on no other tokenizer is accepted.

    Raises:
        ValueError: a tokenizer other than the one the configuration names.

    Source: Vaswani et al. 2017, section 3; weight tying: Press and Wolf 2017.  Differs from ``torch.nn.Transformer``,
    which ``self.transformer`` replaces key for key, by being a whole model.
    """

    def __init__(self, config: Seq2SeqConfig, tokenizer: Seq2SeqTokenizer | None = None) -> None:
        super().__init__()
        if tokenizer is not None and config.tokenizer_fingerprint is None:
            config = config.replace(tokenizer_fingerprint=tokenizer.fingerprint)
        self.config = config
        self.tokenizer = tokenizer
        self.source_embedding = nn.Embedding(config.source_vocab_size, config.model_dim)
        self.target_embedding = (
            self.source_embedding
            if config.share_embeddings
            else nn.Embedding(config.target_vocab_size, config.model_dim)
        )
        self.source_position = _positional_encoding(config)
        self.target_position = _positional_encoding(config)
        self.transformer = fnn.Transformer(
            d_model=config.model_dim,
            nhead=config.num_heads,
            num_encoder_layers=config.num_encoder_layers,
            num_decoder_layers=config.num_decoder_layers,
            dim_feedforward=config.ff_dim,
            dropout=config.dropout,
            activation=config.activation,
            layer_norm_eps=config.layer_norm_eps,
            batch_first=True,
            norm_first=config.norm_first,
        )
        for embedding in (self.source_embedding, self.target_embedding):
            # Scaled by sqrt(model_dim) on the way in they have unit variance; tied on the way out, logits do too.
            nn.init.normal_(embedding.weight, std=config.model_dim**-0.5)

    @property
    def tokenizer(self) -> Seq2SeqTokenizer | None:
        """The tokenizer this model is trained with; setting another one raises ValueError."""
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Seq2SeqTokenizer | None) -> None:
        if tokenizer is not None:
            pretrained.check_tokenizer(tokenizer, self.config)
        self._tokenizer = tokenizer

    def encode(self, source: Tensor) -> Tensor:
        """The encoder's output ``[batch, source_len, model_dim]`` of token ids ``[batch, source_len]``."""
        _check_ids("source", source, self.config.max_len)
        embedded = self._embedded("source", self.source_embedding, self.source_position, source)
        return self.transformer.encoder(embedded, src_key_padding_mask=source == self.config.pad_id)

    def decode(
        self, target_in: Tensor, memory: Tensor, source_padding: Tensor, *, cache: fnn.KVCache | None = None
    ) -> Tensor:
        """The decoder's output, before the output projection.

        Args:
            target_in: token ids ``[batch, target_len]`` from ``<bos>`` on; with a cache, only those it does not hold.
            memory: the encoder's output ``[batch, source_len, model_dim]``.
            source_padding: bool ``[batch, source_len]``, True where the source is padding.
            cache: keys and values of earlier positions; grows by ``target_len``.

        Returns:
            ``[batch, target_len, model_dim]``.
        """
        past = 0 if cache is None else cache.length
        length = target_in.shape[1]
        _check_ids("target", target_in, self.config.max_len - past)
        embedded = self._embedded("target", self.target_embedding, self.target_position, target_in, past)
        arguments: dict[str, Any] = {"memory_key_padding_mask": source_padding}
        if cache is not None:
            if past and length > 1:
                raise ValueError(f"after the first call a cache takes one position at a time, got {length}")
            arguments["cache"] = cache
        if length > 1:
            arguments["tgt_mask"] = nn.Transformer.generate_square_subsequent_mask(
                length, device=target_in.device, dtype=torch.bool
            )
            arguments["tgt_is_causal"] = True
        return self.transformer.decoder(embedded, memory, **arguments)

    def forward(self, source: Tensor, target_in: Tensor) -> Tensor:
        """Teacher-forced logits.

        Args:
            source: token ids ``[batch, source_len]``, padded with ``config.pad_id``.
            target_in: token ids ``[batch, target_len]`` starting with ``<bos>``, padded likewise.

        Returns:
            Logits ``[batch, target_len, target_vocab_size]`` of the token after each position.

        Raises:
            ValueError: shapes, lengths or token ids out of range.
            TypeError: ids that are no integers.
        """
        return self._project(self.decode(target_in, self.encode(source), source == self.config.pad_id))

    def loss(self, source: Tensor, target: Tensor, *, label_smoothing: float | None = None) -> Tensor:
        """Mean cross entropy of each next target token; never holds tokens x vocabulary.

        Args:
            source: token ids ``[batch, source_len]``.
            target: token ids ``[batch, target_len]`` from ``<bos>`` to ``<eos>``; padding does not count.
            label_smoothing: by default the configuration's in training mode and 0 in evaluation.

        Returns:
            A scalar in nats a token.
        """
        if target.dim() != 2 or target.shape[1] < 2:
            raise ValueError(
                f"target must be [batch, at least 2], from <bos> to <eos>, got shape {tuple(target.shape)}"
            )
        if label_smoothing is None:
            label_smoothing = self.config.label_smoothing if self.training else 0.0
        return linear_cross_entropy(
            self.decode(target[:, :-1], self.encode(source), source == self.config.pad_id),
            self.target_embedding.weight,
            target[:, 1:],
            ignore_index=self.config.pad_id,
            label_smoothing=label_smoothing,
        )

    @overload
    def generate(self, inputs: str, **settings: Any) -> str: ...
    @overload
    def generate(self, inputs: Sequence[str], **settings: Any) -> list[str]: ...
    @overload
    def generate(self, inputs: Tensor | Sequence[Sequence[int]], **settings: Any) -> list[list[int]]: ...
    @torch.no_grad()
    def generate(
        self,
        inputs: str | Sequence[str] | Tensor | Sequence[Sequence[int]],
        *,
        strategy: str = "greedy",
        max_new_tokens: int | None = None,
        batch_size: int = 64,
        use_cache: bool = True,
        on_unknown: str = "warn",
        **settings: Any,
    ) -> str | list[str] | list[list[int]]:
        """Produce the target of each source, in evaluation mode whatever the present mode.

        Args:
            inputs: a text, texts, token ids ``[batch, source_len]`` or lists of token ids.  Texts get their ``<eos>``
                here; ids are taken as they are.  "" is a source of ``<eos>`` alone.
            strategy: ``"greedy"``, ``"beam"`` or ``"sample"``.
            max_new_tokens: the most tokens to produce, ``<eos>`` included; by default what ``config.max_len`` allows.
            batch_size: sources at a time; those of similar length go together.
            use_cache: keep keys and values instead of computing them anew at every step; the tokens are the same.
            on_unknown: characters the tokenizer never saw: ``"warn"``, ``"error"`` or ``"ignore"``.
            **settings: ``num_beams, length_penalty, temperature, top_k, top_p, generator``, see ``GenerationSettings``.

        Returns:
            A text for a text, a list of texts for texts, a list of token id lists (without special tokens) for ids.

        Raises:
            ValueError: a tokenizer that is missing or not the one of training, an empty or too long source, token ids
                or settings out of range, or unknown characters with ``on_unknown="error"``.
            TypeError: inputs of another type.
        """
        longest = self.config.max_len - 1  # <bos> takes the first position
        max_new_tokens = longest if max_new_tokens is None else max_new_tokens
        if max_new_tokens > longest:
            raise ValueError(f"max_new_tokens must be at most {longest} (max_len - 1), got {max_new_tokens}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if strategy == "beam":
            settings.setdefault("num_beams", 4)
        choice = GenerationSettings(strategy=strategy, max_new_tokens=max_new_tokens, **settings)
        if isinstance(inputs, str):
            return self._generate_texts([inputs], choice, batch_size, use_cache, on_unknown)[0]
        texts = [] if isinstance(inputs, Tensor) else [text for text in inputs if isinstance(text, str)]
        if texts and len(texts) == len(inputs):
            return self._generate_texts(texts, choice, batch_size, use_cache, on_unknown)
        return self._generate_ids(self._as_lists(inputs), choice, batch_size, use_cache)

    def _generate_texts(
        self, texts: Sequence[str], settings: GenerationSettings, batch_size: int, use_cache: bool, on_unknown: str
    ) -> list[str]:
        if self.tokenizer is None:
            raise ValueError("this model has no tokenizer: give token ids, or a model folder with a tokenizer")
        pretrained.check_tokenizer(self.tokenizer, self.config)
        source = self.tokenizer.source
        ids = [[*source.encode(text, on_unknown=on_unknown), self.config.eos_id] for text in texts]
        for text, sequence in zip(texts, ids, strict=True):
            if len(sequence) > self.config.max_len:
                raise ValueError(
                    f"{text[:40]!r} has {len(sequence)} tokens with <eos>, more than max_len={self.config.max_len}"
                )
        return [self.tokenizer.decode(output) for output in self._generate_ids(ids, settings, batch_size, use_cache)]

    def _generate_ids(
        self, sources: Sequence[Sequence[int]], settings: GenerationSettings, batch_size: int, use_cache: bool
    ) -> list[list[int]]:
        config, device = self.config, self.target_embedding.weight.device
        special = Special(config.eos_id, (config.pad_id, config.bos_id, config.unk_id))
        outputs: list[list[int]] = [[] for _ in sources]
        order = sorted(range(len(sources)), key=lambda i: len(sources[i]))
        with _evaluating(self):
            for start in range(0, len(order), batch_size):
                chunk = order[start : start + batch_size]
                source = pad([sources[i] for i in chunk], config.pad_id).to(device)
                steps = _Steps(self, source, use_cache)
                begin = source.new_full((len(chunk), 1), config.bos_id)
                for i, output in zip(chunk, generate(steps, begin, special, settings), strict=True):
                    outputs[i] = output
        return outputs

    def _as_lists(self, inputs: Tensor | Sequence[Any]) -> list[list[int]]:
        """Sources as lists without padding; refuses empty ones."""
        if isinstance(inputs, Tensor):
            _check_ids("inputs", inputs, self.config.max_len)
            _check_values("inputs", inputs, self.config.source_vocab_size)
            inputs = inputs.tolist()
        lists = []
        for row, ids in enumerate(inputs):
            if isinstance(ids, (str, int)):
                raise TypeError(
                    f"inputs must be a text, texts or rows of token ids, got {type(ids).__name__} in row {row}"
                )
            ids = list(ids)
            while ids and ids[-1] == self.config.pad_id:
                ids.pop()
            if not ids:
                raise ValueError(
                    f"source {row} is empty; it needs at least one token that is not padding, such as <eos>"
                )
            lists.append(ids)
        return lists

    @torch.no_grad()
    def cross_attention(self, source: Tensor, target_in: Tensor) -> Tensor:
        """Attention weights of every target position over the source, in evaluation mode.

        Args:
            source: token ids ``[batch, source_len]``.
            target_in: token ids ``[batch, target_len]`` starting with ``<bos>``.

        Returns:
            ``[num_decoder_layers, batch, num_heads, target_len, source_len]``: row ``t`` is where the decoder looked
            when it chose the token after ``target_in[:, t]``; rows sum to 1, and padding has weight 0.
        """
        maps: list[Tensor] = []

        def ask(_module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
            return arguments, {**keywords, "need_weights": True, "average_attn_weights": False}

        def take(_module: nn.Module, _arguments: Any, output: tuple[Tensor, Tensor]) -> None:
            maps.append(output[1])

        handles = []
        for layer in self.transformer.decoder.layers:
            handles.append(layer.multihead_attn.register_forward_pre_hook(ask, with_kwargs=True))
            handles.append(layer.multihead_attn.register_forward_hook(take))
        try:
            with _evaluating(self):
                self.decode(target_in, self.encode(source), source == self.config.pad_id)
        finally:
            for handle in handles:
                handle.remove()
        return torch.stack(maps)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write config.json, model.safetensors and tokenizer.json into a folder, each replaced whole."""
        pretrained.save(folder, self.config, self, self.tokenizer)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> Seq2Seq:
        """The model that ``save_pretrained`` wrote, in evaluation mode.

        Raises:
            FileNotFoundError: a missing folder or file, named.
            ValueError: a damaged file, or files that do not belong together; the message names the file.
        """
        config = pretrained.load_config(folder)
        model = cls(config, pretrained.load_tokenizer(folder, config))
        pretrained.load_weights(folder, model)
        return model.eval()

    def _embedded(self, name: str, embedding: nn.Module, position: nn.Module, ids: Tensor, offset: int = 0) -> Tensor:
        """``position(sqrt(model_dim) * embedding(ids), offset)``; the ids are checked by whoever reads their rows."""
        try:
            return embed(embedding, position, ids, scale=math.sqrt(self.config.model_dim), offset=offset)
        except IndexError:
            _check_values(
                name, ids, self.config.source_vocab_size if name == "source" else self.config.target_vocab_size
            )
            raise

    def _project(self, hidden: Tensor) -> Tensor:
        return linear(hidden, self.target_embedding.weight, None)[0]


class _Steps:
    """Next-token scores of a Seq2Seq for a batch of sources, encoded once."""

    def __init__(self, model: Seq2Seq, source: Tensor, use_cache: bool) -> None:
        self.model = model
        self.memory = model.encode(source)
        self.padding = source == model.config.pad_id
        self.cache = fnn.KVCache() if use_cache else None

    def step(self, ids: Tensor) -> Tensor:
        new = ids if self.cache is None else ids[:, -1:]
        hidden = self.model.decode(new, self.memory, self.padding, cache=self.cache)
        return self.model._project(hidden[:, -1])

    def reorder(self, rows: Tensor, *, same_source: bool) -> None:
        if not same_source:
            self.memory, self.padding = self.memory[rows], self.padding[rows]
        if self.cache is not None:
            self.cache.reorder(rows, fixed=not same_source)


def _positional_encoding(config: Seq2SeqConfig) -> nn.Module:
    if config.positional_encoding == "sinusoidal":
        return fnn.SinusoidalPositionalEncoding(config.model_dim, config.max_len, config.dropout)
    if config.positional_encoding == "learned":
        return fnn.LearnedPositionalEncoding(config.model_dim, config.max_len, config.dropout)
    return NoPositions(config.dropout)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block, the modes of before after it."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _check_ids(name: str, ids: Tensor, max_len: int) -> None:
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name} must be int64 token ids, got {ids.dtype}")
    if ids.dim() != 2 or ids.shape[1] == 0:
        raise ValueError(f"{name} must be [batch, at least 1 token], got shape {tuple(ids.shape)}")
    if ids.shape[1] > max_len:
        raise ValueError(f"{name} has {ids.shape[1]} tokens, but only {max_len} positions are left of max_len")


def _check_values(name: str, ids: Tensor, vocab_size: int) -> None:
    # Reading the values would stall an accelerator, whose embedding kernel checks for itself.
    if ids.device.type == "cpu" and ids.numel():
        low, high = (int(value) for value in torch.aminmax(ids))
        if low < 0 or high >= vocab_size:
            raise ValueError(f"{name} has token ids {low} to {high}, expected 0 to {vocab_size - 1}")
