"""fastattn: fused, exact attention for PyTorch.

Ops take tensors [batch, heads, seq_len, head_dim]; modules of ``fastattn.nn`` are drop-in for ``torch.nn``'s.
``fastattn.backends()`` says what can run here.
"""

from fastattn import biases, masks, nn
from fastattn.errors import FallbackWarning, UnsupportedError
from fastattn.ops._dispatch import backends, use_backend
from fastattn.ops.attention import attention, scaled_dot_product_attention
from fastattn.ops.attention_weights import attention_weights
from fastattn.ops.embedding import embedding
from fastattn.ops.feed_forward import feed_forward
from fastattn.ops.linear_cross_entropy import linear_cross_entropy
from fastattn.ops.norm import layer_norm, rms_norm
from fastattn.ops.paged_attention import paged_attention
from fastattn.ops.rotary_embedding import rotary_embedding
from fastattn.ops.softmax import log_softmax, softmax
from fastattn.ops.varlen_attention import varlen_attention
from fastattn.tools.activate import activate, deactivate
from fastattn.tools.explain import explain
from fastattn.tools.maps import record_attention
from fastattn.tools.swap import swap
from fastattn.tools.verify import verify

# ``fastattn.backends`` is the function; ``from fastattn.backends import ...`` still finds the package.

__version__ = "0.1.0"

__all__ = [
    "FallbackWarning",
    "UnsupportedError",
    "activate",
    "attention",
    "attention_weights",
    "backends",
    "biases",
    "deactivate",
    "embedding",
    "explain",
    "feed_forward",
    "layer_norm",
    "linear_cross_entropy",
    "log_softmax",
    "masks",
    "nn",
    "paged_attention",
    "record_attention",
    "rms_norm",
    "rotary_embedding",
    "scaled_dot_product_attention",
    "softmax",
    "swap",
    "use_backend",
    "varlen_attention",
    "verify",
]
