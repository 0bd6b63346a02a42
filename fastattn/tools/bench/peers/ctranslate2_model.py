"""CTranslate2's generation with the weights of the benchmark's encoder-decoder."""

from __future__ import annotations

import importlib.util
import tempfile
from typing import Any

import torch
from torch import nn

from fastattn.models import Seq2Seq
from fastattn.nn import SinusoidalPositionalEncoding
from fastattn.tools.bench.peers.peer import Call, Peer
from fastattn.tools.bench.workload import ModelWorkload


class CTranslate2(Peer):
    """CTranslate2: greedy search of a pre-norm encoder-decoder in float32, with PyTorch's number of threads."""

    name = "CTranslate2"

    def unavailable(self) -> str | None:
        return "not installed: ctranslate2" if importlib.util.find_spec("ctranslate2") is None else None

    def model(self, work: ModelWorkload) -> Call | None:
        config = work.stock.config
        dtype = str(work.dtype).removeprefix("torch.")
        sinusoidal = isinstance(work.stock.source_position, SinusoidalPositionalEncoding)
        # After its last layer, a post-norm decoder of CTranslate2 has no norm; nn.Transformer's has.
        if work.target is not None or not config.norm_first or not sinusoidal:
            return None
        import ctranslate2

        if dtype not in ctranslate2.get_supported_compute_types("cpu"):
            return None
        with tempfile.TemporaryDirectory() as folder:
            _specification(work.stock).save(folder)
            translator = ctranslate2.Translator(
                folder, "cpu", compute_type=dtype, inter_threads=1, intra_threads=torch.get_num_threads()
            )
        source = [[str(token) for token in row] for row in work.source.tolist()]

        def generate() -> list[list[int]]:
            results = translator.translate_batch(source, beam_size=1, max_decoding_length=work.new_tokens)
            return [[int(token) for token in result.hypotheses[0]] for result in results]

        return generate


def _specification(stock: Seq2Seq) -> Any:
    """Returns the model as CTranslate2 describes one, ready to be saved; a token's name is its id."""
    from ctranslate2.specs import common_spec, transformer_spec

    config, transformer = stock.config, stock.transformer
    activation = {"relu": common_spec.Activation.RELU, "gelu": common_spec.Activation.GELU}[config.activation]
    layers = (config.num_encoder_layers, config.num_decoder_layers)
    spec = transformer_spec.TransformerSpec.from_config(layers, config.num_heads, activation=activation)

    for side, embedding, stack in (
        (spec.encoder, stock.source_embedding, transformer.encoder),
        (spec.decoder, stock.target_embedding, transformer.decoder),
    ):
        embeddings = side.embeddings[0] if isinstance(side.embeddings, list) else side.embeddings
        embeddings.weight = embedding.weight.detach()
        side.position_encodings.encodings = _positions(config.max_len, config.model_dim)
        _norm(side.layer_norm, stack.norm)
    for layer, stock_layer in zip(spec.encoder.layer, transformer.encoder.layers, strict=True):
        _self_attention(layer.self_attention, stock_layer.self_attn, stock_layer.norm1)
        _feed_forward(layer.ffn, stock_layer, stock_layer.norm2)
    for layer, stock_layer in zip(spec.decoder.layer, transformer.decoder.layers, strict=True):
        _self_attention(layer.self_attention, stock_layer.self_attn, stock_layer.norm1)
        _cross_attention(layer.attention, stock_layer.multihead_attn, stock_layer.norm2)
        _feed_forward(layer.ffn, stock_layer, stock_layer.norm3)
    spec.decoder.projection.weight = stock.target_embedding.weight.detach()

    spec.register_source_vocabulary([str(token) for token in range(config.source_vocab_size)])
    spec.register_target_vocabulary([str(token) for token in range(config.target_vocab_size)])
    spec.config.layer_norm_epsilon = config.layer_norm_eps
    spec.config.bos_token = spec.config.decoder_start_token = str(config.bos_id)
    spec.config.eos_token, spec.config.unk_token = str(config.eos_id), str(config.unk_id)
    spec.validate()
    spec.optimize()
    return spec


def _positions(max_len: int, model_dim: int) -> torch.Tensor:
    return SinusoidalPositionalEncoding(model_dim, max_len)(torch.zeros(max_len, model_dim))


def _norm(spec: Any, norm: nn.LayerNorm) -> None:
    spec.gamma, spec.beta = norm.weight.detach(), norm.bias.detach()


def _linear(spec: Any, weight: torch.Tensor, bias: torch.Tensor) -> None:
    spec.weight, spec.bias = weight.detach(), bias.detach()


def _self_attention(spec: Any, attention: nn.MultiheadAttention, norm: nn.LayerNorm) -> None:
    _linear(spec.linear[0], attention.in_proj_weight, attention.in_proj_bias)
    _linear(spec.linear[1], attention.out_proj.weight, attention.out_proj.bias)
    _norm(spec.layer_norm, norm)


def _cross_attention(spec: Any, attention: nn.MultiheadAttention, norm: nn.LayerNorm) -> None:
    queries = attention.embed_dim
    _linear(spec.linear[0], attention.in_proj_weight[:queries], attention.in_proj_bias[:queries])
    _linear(spec.linear[1], attention.in_proj_weight[queries:], attention.in_proj_bias[queries:])
    _linear(spec.linear[2], attention.out_proj.weight, attention.out_proj.bias)
    _norm(spec.layer_norm, norm)


def _feed_forward(spec: Any, layer: Any, norm: nn.LayerNorm) -> None:
    _linear(spec.linear_0, layer.linear1.weight, layer.linear1.bias)
    _linear(spec.linear_1, layer.linear2.weight, layer.linear2.bias)
    _norm(spec.layer_norm, norm)


CTRANSLATE2_PEERS: tuple[Peer, ...] = (CTranslate2(),)
