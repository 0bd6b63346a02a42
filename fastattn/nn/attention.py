"""MultiheadAttention, a drop-in for ``torch.nn.MultiheadAttention``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.masks import Mask, Shape
from fastattn.nn._masks import attn_restriction, combine, padding_restriction, widen
from fastattn.ops import _dispatch
from fastattn.ops.attention import attend
from fastattn.reference.attention import attention_weights
from fastattn.spec.attention import attention_call


class MultiheadAttention(torch.nn.MultiheadAttention):
    """Attention with learned projections: ``out_proj(concat_h(attention(q_h, k_h, v_h)))``.

    Constructor, ``forward``, state_dict and initialisation are those of ``torch.nn.MultiheadAttention``, of which this
    is a subclass.

    Differs from PyTorch's: a query that may see no key gives ``out_proj.bias`` and weights 0, never NaN; ``is_causal``
    is a hint that never changes the answer; ``out_proj`` is called, so that hooks and adapters on it work; masks and
    dropout cost no [seq_len_q, seq_len_k] memory unless the weights are asked for; the weights come from the same
    softmax as the output.  Masks may also be ``fastattn.masks``.

    Source: Vaswani et al., "Attention Is All You Need", 2017, section 3.2.2.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | Mask | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | Mask | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attends.

        Args:
            query: [seq_len_q, batch, embed_dim], [batch, seq_len_q, embed_dim] with ``batch_first``, or [seq_len_q,
                embed_dim].
            key: [seq_len_k, batch, kdim], laid out like query.
            value: [seq_len_k, batch, vdim], laid out like query.
            key_padding_mask: [batch, seq_len_k], or [seq_len_k] unbatched; bool (True ignores the key) or float (added
                to the scores).
            need_weights: also returns the weights, which alone costs [seq_len_q, seq_len_k] memory.
            attn_mask: [seq_len_q, seq_len_k] or [batch * num_heads, seq_len_q, seq_len_k]; bool (True ignores) or float
                (added).
            average_attn_weights: the weights' mean over the heads rather than each head's.
            is_causal: a hint that ``attn_mask`` is the causal mask.  It is looked at before it is believed, and then
                costs nothing more.

        Returns:
            The output, laid out like query, and with ``need_weights`` the weights after dropout: [batch, seq_len_q,
            seq_len_k] or [batch, num_heads, seq_len_q, seq_len_k], else None.

        Raises:
            ValueError: shapes do not fit, or ``is_causal`` is given without a mask.
            TypeError: dtypes or devices do not fit.
        """
        _check_inputs(self, query, key, value)
        if is_causal and attn_mask is None:
            raise ValueError(
                "is_causal=True is a hint about attn_mask and needs one: "
                "pass Transformer.generate_square_subsequent_mask(seq_len) or fastattn.masks.Causal()"
            )
        batched = query.dim() == 3
        q, k, v = self._project(query, key, value)
        if batched:
            order = (0, 2, 1, 3) if self.batch_first else (1, 2, 0, 3)
            q, k, v = (t.permute(order) for t in (q, k, v))
        else:
            q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
            if isinstance(key_padding_mask, Tensor):
                key_padding_mask = key_padding_mask[None] if key_padding_mask.dim() == 1 else key_padding_mask

        shape = Shape(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
        k, v = self._append(k, v)
        restriction = combine(
            attn_restriction(attn_mask, is_causal, shape),
            padding_restriction(key_padding_mask, shape.batch, shape.seq_len_k),
        )
        restriction = widen(restriction, shape, 0, k.shape[2] - shape.seq_len_k, q.device)

        call = attention_call(
            q,
            k,
            v,
            mask=restriction.mask,
            bias=restriction.bias,
            dropout_p=self.dropout if self.training else 0.0,
            softmax_scale=None,
            softcap=None,
            sinks=None,
            generator=None,
            backend=_dispatch.resolve(None),
        )
        out, _ = attend(call)
        weights = None
        if need_weights:
            weights = attention_weights(call)
            if average_attn_weights:
                weights = weights.mean(dim=1)
        if not batched:
            out = out[0].transpose(0, 1)
            weights = None if weights is None else weights[0]
        else:
            out = out.transpose(1, 2) if self.batch_first else out.permute(2, 0, 1, 3)
        return self.out_proj(out.flatten(-2)), weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the projections, split into heads: [..., num_heads, head_dim], views of as few products as the inputs
        allow."""
        dim = self.embed_dim
        bias = self.in_proj_bias
        if self.in_proj_weight is None:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            biases = (None, None, None) if bias is None else bias.chunk(3)
            projected = tuple(F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))
        elif key is not value:
            biases = (None, None, None) if bias is None else bias.chunk(3)
            weights = self.in_proj_weight.chunk(3)
            projected = tuple(F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))
        elif query is key:
            projected = F.linear(query, self.in_proj_weight, bias).chunk(3, dim=-1)
        else:
            weight_q, weight_kv = self.in_proj_weight.split((dim, 2 * dim))
            bias_q, bias_kv = (None, None) if bias is None else bias.split((dim, 2 * dim))
            projected = (
                F.linear(query, weight_q, bias_q),
                *F.linear(key, weight_kv, bias_kv).chunk(2, dim=-1),
            )
        q, k, v = (t.unflatten(-1, (self.num_heads, self.head_dim)) for t in projected)
        return q, k, v

    def _append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Returns keys and values with those of ``add_bias_kv`` and ``add_zero_attn`` at the end."""
        if self.bias_k is not None and self.bias_v is not None:
            k, v = (
                torch.cat((t, _heads(bias, self.num_heads).to(t.dtype).expand(t.shape[0], -1, -1, -1)), dim=2)
                for t, bias in ((k, self.bias_k), (v, self.bias_v))
            )
        if self.add_zero_attn:
            k, v = (F.pad(t, (0, 0, 0, 1)) for t in (k, v))
        return k, v


def _heads(bias: Tensor, num_heads: int) -> Tensor:
    """Splits [1, 1, embed_dim] into [1, num_heads, 1, head_dim]."""
    return bias.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def _check_inputs(module: MultiheadAttention, query: Tensor, key: Tensor, value: Tensor) -> None:
    dims = query.dim()
    if dims not in (2, 3):
        raise ValueError(f"query must be [seq_len, embed_dim] or batched 3-D, got {list(query.shape)}")
    for name, tensor, features in (
        ("query", query, module.embed_dim),
        ("key", key, module.kdim),
        ("value", value, module.vdim),
    ):
        if tensor.dim() != dims:
            raise ValueError(f"{name} must be {dims}-D like query {list(query.shape)}, got {list(tensor.shape)}")
        if tensor.shape[-1] != features:
            raise ValueError(f"{name} must have {features} features, got {list(tensor.shape)}")
    if key.shape[:-1] != value.shape[:-1]:
        raise ValueError(f"key and value must agree but in features, got {list(key.shape)} and {list(value.shape)}")
    if dims == 3:
        at = 0 if module.batch_first else 1
        if key.shape[at] != query.shape[at]:
            layout = "[batch, seq_len, features]" if module.batch_first else "[seq_len, batch, features]"
            raise ValueError(
                f"query and key must have the same batch in {layout}, got {list(query.shape)} and {list(key.shape)}"
            )
