"""MultiheadAttention, a drop-in for ``torch.nn.MultiheadAttention``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.masks import Mask, Shape
from fastattn.nn import _nested
from fastattn.nn._blocks import apply_linear
from fastattn.nn._masks import restriction
from fastattn.nn.kv_cache import KVCache
from fastattn.ops import _dispatch
from fastattn.ops.attention import attend
from fastattn.ops.attention_weights import weigh
from fastattn.ops.attention_with_weights import attend_with_weights
from fastattn.ops.linear import linear
from fastattn.spec.attention import attention_call
from fastattn.spec.attention_weights import weights_call


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
        *,
        cache: KVCache | None = None,
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
            cache: what earlier calls of this module computed.  Self-attention (``query is key``) adds its keys to it
                and attends to all of them; a mask may then cover all keys or the new ones alone.  Other attention
                projects ``key`` and ``value`` on the first call and never looks at them again.

        Returns:
            The output, laid out like query, and with ``need_weights`` the weights after dropout: [batch, seq_len_q,
            seq_len_k] or [batch, num_heads, seq_len_q, seq_len_k], else None.

        Raises:
            ValueError: shapes do not fit, or ``is_causal`` is given without a mask.
            TypeError: dtypes or devices do not fit.
        """
        if query.is_nested or key.is_nested or value.is_nested:
            _nested.require_no_masks(attn_mask=attn_mask, key_padding_mask=key_padding_mask, cache=cache)
            return self._forward_nested(query, key, value, need_weights, average_attn_weights)
        if is_causal and attn_mask is None:
            raise ValueError(
                "is_causal=True is a hint about attn_mask and needs one: "
                "pass Transformer.generate_square_subsequent_mask(seq_len) or fastattn.masks.Causal()"
            )
        if isinstance(key_padding_mask, Tensor) and query.dim() == 2 and key_padding_mask.dim() == 1:
            key_padding_mask = key_padding_mask[None]

        q, k, v, num_new = self._project(query, key, value, cache)
        seq_len_k = k.shape[2]
        k, v = self._append(k, v)
        mask, bias = restriction(
            attn_mask,
            key_padding_mask,
            is_causal,
            Shape(q.shape[0], q.shape[1], q.shape[2], seq_len_k),
            num_new,
            k.shape[2] - seq_len_k,
            q.device,
        )
        call = attention_call(
            q,
            k,
            v,
            mask=mask,
            bias=bias,
            dropout_p=self.dropout if self.training else 0.0,
            backend=_dispatch.resolve(None),
        )
        weights: Tensor | None = None
        if need_weights and average_attn_weights:
            out, _, weights = attend_with_weights(call)
        else:
            out, lse = attend(call)
            if need_weights:
                weights, _ = weigh(weights_call(call, lse, "none", None, 1))
        if query.dim() == 2:
            out = out[0].transpose(0, 1)
            weights = None if weights is None else weights[0]
        else:
            out = out.transpose(1, 2) if self.batch_first else out.permute(2, 0, 1, 3)
        return apply_linear(self.out_proj, out.flatten(-2)), weights

    def _forward_nested(
        self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool, average_attn_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Attends within each of the sequences of nested tensors; the weights come back padded."""
        if not (query.is_nested and key.is_nested and value.is_nested and self.batch_first):
            raise ValueError("nested tensors need batch_first=True, and query, key and value all nested")
        q, lengths_q = _nested.pad(query)
        k, lengths_k = (q, lengths_q) if key is query else _nested.pad(key)
        v = k if value is key else _nested.pad(value)[0]
        mask = _nested.key_lengths(lengths_k, q.device)
        out, weights = self.forward(q, k, v, mask, need_weights, None, average_attn_weights)
        return _nested.nest(out, lengths_q, query), weights

    def _project(
        self, query: Tensor, key: Tensor, value: Tensor, cache: KVCache | None
    ) -> tuple[Tensor, Tensor, Tensor, int]:
        """Returns query, all keys and all values [batch, num_heads, seq_len, head_dim], and how many of the keys are
        new.

        Heads are views of the products, of which there are as few as the inputs allow.
        """
        if query is not key and cache is not None:
            # The encoder's output does not change from step to step, so neither do its keys and values.
            _check_query(self, query)
            q = self._heads(*self._linear(query, 0, 1))
            k, v = cache.fixed(self, lambda: self._project_memory(query, key, value))
            return q, k, v, k.shape[2]
        _check_inputs(self, query, key, value)
        if query is key and key is value and self.in_proj_weight is not None:
            q, k, v = (self._heads(t) for t in self._linear(query, 0, 3))
        else:
            q = self._heads(*self._linear(query, 0, 1))
            k, v = self._project_memory(query, key, value)
        num_new = k.shape[2]
        if cache is not None:
            k, v = cache.append(self, k, v)
        return q, k, v, num_new

    def _project_memory(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        _check_inputs(self, query, key, value)
        if key is value and self.in_proj_weight is not None:
            k, v = self._linear(key, 1, 3)
        else:
            (k,), (v,) = self._linear(key, 1, 2), self._linear(value, 2, 3)
        return self._heads(k), self._heads(v)

    def _linear(self, x: Tensor, first: int, last: int) -> tuple[Tensor, ...]:
        """Returns the projections ``first:last`` of (query, key, value), made by one product."""
        weight: Tensor | None = self.in_proj_weight
        bias: Tensor | None = self.in_proj_bias
        if last - first < 3:
            part = slice(first * self.embed_dim, last * self.embed_dim)
            bias = None if bias is None else bias[part]
            if weight is None:
                weight = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)[first]
            else:
                weight = weight[part]
        assert weight is not None
        return linear(x, weight, bias, last - first)

    def _heads(self, projected: Tensor) -> Tensor:
        """Splits the features into heads: a view [batch, num_heads, seq_len, head_dim]."""
        heads = projected.unflatten(-1, (self.num_heads, self.head_dim))
        if heads.dim() == 3:
            return heads.transpose(0, 1)[None]
        return heads.transpose(1, 2) if self.batch_first else heads.permute(1, 2, 0, 3)

    def _append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Returns keys and values with those of ``add_bias_kv`` and ``add_zero_attn`` at the end."""
        if self.bias_k is not None and self.bias_v is not None:
            k, v = (
                torch.cat((t, bias.to(t.dtype).view(1, self.num_heads, 1, -1).expand(t.shape[0], -1, -1, -1)), dim=2)
                for t, bias in ((k, self.bias_k), (v, self.bias_v))
            )
        if self.add_zero_attn:
            k, v = (F.pad(t, (0, 0, 0, 1)) for t in (k, v))
        return k, v


def _check_query(module: MultiheadAttention, query: Tensor) -> None:
    if query.dim() not in (2, 3) or query.shape[-1] != module.embed_dim:
        raise ValueError(
            f"query must be 2-D, or 3-D when batched, with embed_dim = {module.embed_dim} features, "
            f"got {list(query.shape)}"
        )


def _check_inputs(module: MultiheadAttention, query: Tensor, key: Tensor, value: Tensor) -> None:
    _check_query(module, query)
    for name, tensor, features in (("key", key, module.kdim), ("value", value, module.vdim)):
        if tensor.dim() != query.dim() or tensor.shape[-1] != features:
            raise ValueError(
                f"{name} must be {query.dim()}-D like query {list(query.shape)} with {features} features, "
                f"got {list(tensor.shape)}"
            )
    if key.shape[:-1] != value.shape[:-1]:
        raise ValueError(f"key and value must differ only in features, got {list(key.shape)} and {list(value.shape)}")
    batch_at = 0 if module.batch_first else 1
    if query.dim() == 3 and key.shape[batch_at] != query.shape[batch_at]:
        layout = "[batch, seq_len, features]" if module.batch_first else "[seq_len, batch, features]"
        raise ValueError(
            f"query and key must have the same batch in {layout}, got {list(query.shape)} and {list(key.shape)}"
        )
