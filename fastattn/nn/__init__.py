"""Modules: the same constructor, forward and state_dict keys as ``torch.nn``'s; each loads the other's checkpoints."""

from fastattn.nn.attention import MultiheadAttention
from fastattn.nn.transformer import (
    Transformer,
    TransformerDecoder,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerEncoderLayer,
)

__all__ = [
    "MultiheadAttention",
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
]
