"""Modules: the same constructor, forward and state_dict keys as ``torch.nn``'s; each loads the other's checkpoints."""

from fastattn.nn.attention import MultiheadAttention
from fastattn.nn.feed_forward import FeedForward
from fastattn.nn.kv_cache import KVCache
from fastattn.nn.norm import LayerNorm, RMSNorm
from fastattn.nn.positional import LearnedPositionalEncoding, RotaryEmbedding, SinusoidalPositionalEncoding
from fastattn.nn.softmax import Softmax
from fastattn.nn.transformer import (
    Transformer,
    TransformerDecoder,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerEncoderLayer,
)

__all__ = [
    "FeedForward",
    "KVCache",
    "LayerNorm",
    "LearnedPositionalEncoding",
    "MultiheadAttention",
    "RMSNorm",
    "RotaryEmbedding",
    "SinusoidalPositionalEncoding",
    "Softmax",
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
]
