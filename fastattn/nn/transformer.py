"""Encoder and decoder layers, their stacks and the whole Transformer: drop-ins for ``torch.nn``'s."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastattn.masks import Mask, Shape
from fastattn.nn import _nested
from fastattn.nn._blocks import add_feed_forward, add_norm, apply_dropout, feed_forward
from fastattn.nn._masks import Padding, attn_restriction
from fastattn.nn.attention import MultiheadAttention
from fastattn.nn.kv_cache import KVCache


class TransformerEncoderLayer(nn.TransformerEncoderLayer):
    """Self-attention and a feed-forward, each with a residual and a LayerNorm.

    Constructor, ``forward``, state_dict and initialisation are those of ``torch.nn.TransformerEncoderLayer``.

    Differs from PyTorch's: training and evaluation compute the same formula, so that float masks, GELU('tanh') and
    modules put in place of ``self_attn`` or ``linear1`` are right in both; rows without a visible key never give NaN.

    Source: Vaswani et al., "Attention Is All You Need", 2017, section 3.1; pre-norm: Xiong et al., "On Layer
    Normalization in the Transformer Architecture", 2020, figure 1.
    """

    @functools.wraps(nn.TransformerEncoderLayer.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _use_fastattn(self.self_attn)

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | Mask | None = None,
        src_key_padding_mask: Tensor | Mask | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Passes ``src`` through the layer.

        Args:
            src: [seq_len, batch, d_model], [batch, seq_len, d_model] with ``batch_first``, or [seq_len, d_model].
            src_mask: as ``attn_mask`` of :class:`MultiheadAttention`.
            src_key_padding_mask: as ``key_padding_mask`` of :class:`MultiheadAttention`.
            is_causal: a hint that ``src_mask`` is the causal mask.

        Returns:
            Like ``src``.

        Raises:
            ValueError: shapes do not fit.
            TypeError: dtypes or devices do not fit.
        """
        if src.is_nested:
            _nested.require_no_masks(src_mask=src_mask, src_key_padding_mask=src_key_padding_mask)
            padded, lengths = _nested.pad(src)
            out = self.forward(padded, None, _nested.key_lengths(lengths, src.device))
            return _nested.nest(out, lengths, src)
        masks: Any = (src_mask, src_key_padding_mask, is_causal)
        if self.norm_first:
            attended = self._sa_block(self.norm1(src), *masks)
            normed, x = add_norm(self.norm2, attended, src)
            return _add_ff_block(self, self.dropout2, normed, x)
        x, _ = add_norm(self.norm1, self._sa_block(src, *masks), src)
        return add_norm(self.norm2, self._ff_block(x), x)[0]

    def _sa_block(
        self,
        x: Tensor,
        attn_mask: Tensor | Mask | None,
        key_padding_mask: Tensor | Mask | None,
        is_causal: bool = False,
    ) -> Tensor:
        return apply_dropout(self.dropout1, _attend(self.self_attn, x, x, attn_mask, key_padding_mask, is_causal, None))

    def _ff_block(self, x: Tensor) -> Tensor:
        return apply_dropout(self.dropout2, feed_forward(self.linear1, self.activation, self.dropout, self.linear2, x))


def _add_ff_block(layer: Any, dropout: nn.Module, normed: Tensor, x: Tensor) -> Tensor:
    """Returns ``x + layer._ff_block(normed)``, in one call where the block is ours and ends with ``dropout``."""
    ours = (TransformerEncoderLayer._ff_block, TransformerDecoderLayer._ff_block)
    if getattr(layer._ff_block, "__func__", None) not in ours:
        return x + layer._ff_block(normed)
    return add_feed_forward(layer.linear1, layer.activation, layer.dropout, layer.linear2, dropout, normed, x)


class TransformerDecoderLayer(nn.TransformerDecoderLayer):
    """Self-attention, attention over an encoder's memory and a feed-forward, each with a residual and a LayerNorm.

    Constructor, ``forward``, state_dict and initialisation are those of ``torch.nn.TransformerDecoderLayer``.

    Differs from PyTorch's as :class:`TransformerEncoderLayer` does.

    Source: Vaswani et al., "Attention Is All You Need", 2017, section 3.1.
    """

    @functools.wraps(nn.TransformerDecoderLayer.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _use_fastattn(self.self_attn)
        _use_fastattn(self.multihead_attn)

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | Mask | None = None,
        memory_mask: Tensor | Mask | None = None,
        tgt_key_padding_mask: Tensor | Mask | None = None,
        memory_key_padding_mask: Tensor | Mask | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
        *,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Passes ``tgt`` through the layer.

        Args:
            tgt: [seq_len_q, batch, d_model], [batch, seq_len_q, d_model] with ``batch_first``, or [seq_len_q, d_model].
            memory: the encoder's output, [seq_len_k, batch, d_model], laid out like ``tgt``.
            tgt_mask: as ``attn_mask`` of :class:`MultiheadAttention`, for the self-attention.
            memory_mask: the same for the attention over ``memory``.
            tgt_key_padding_mask: as ``key_padding_mask`` of :class:`MultiheadAttention`, for the self-attention.
            memory_key_padding_mask: the same for the attention over ``memory``.
            tgt_is_causal: a hint that ``tgt_mask`` is the causal mask.
            memory_is_causal: a hint that ``memory_mask`` is the causal mask.
            cache: what earlier calls computed; ``tgt`` then holds the new positions alone.

        Returns:
            Like ``tgt``.

        Raises:
            ValueError: shapes do not fit.
            TypeError: dtypes or devices do not fit.
        """
        self_mask = (tgt_mask, tgt_key_padding_mask, tgt_is_causal, cache)
        cross_mask = (memory_mask, memory_key_padding_mask, memory_is_causal, cache)
        if self.norm_first:
            normed, x = add_norm(self.norm2, self._sa_block(self.norm1(tgt), *self_mask), tgt)
            normed, x = add_norm(self.norm3, self._mha_block(normed, memory, *cross_mask), x)
            return _add_ff_block(self, self.dropout3, normed, x)
        x, _ = add_norm(self.norm1, self._sa_block(tgt, *self_mask), tgt)
        x, _ = add_norm(self.norm2, self._mha_block(x, memory, *cross_mask), x)
        return add_norm(self.norm3, self._ff_block(x), x)[0]

    def _sa_block(
        self,
        x: Tensor,
        attn_mask: Tensor | Mask | None,
        key_padding_mask: Tensor | Mask | None,
        is_causal: bool = False,
        cache: KVCache | None = None,
    ) -> Tensor:
        return apply_dropout(
            self.dropout1, _attend(self.self_attn, x, x, attn_mask, key_padding_mask, is_causal, cache)
        )

    def _mha_block(
        self,
        x: Tensor,
        mem: Tensor,
        attn_mask: Tensor | Mask | None,
        key_padding_mask: Tensor | Mask | None,
        is_causal: bool = False,
        cache: KVCache | None = None,
    ) -> Tensor:
        return apply_dropout(
            self.dropout2, _attend(self.multihead_attn, x, mem, attn_mask, key_padding_mask, is_causal, cache)
        )

    def _ff_block(self, x: Tensor) -> Tensor:
        return apply_dropout(self.dropout3, feed_forward(self.linear1, self.activation, self.dropout, self.linear2, x))


class TransformerEncoder(nn.TransformerEncoder):
    """A stack of encoder layers, and a norm at its end if one is given.

    Constructor, ``forward``, state_dict and initialisation are those of ``torch.nn.TransformerEncoder``.

    Differs from PyTorch's: there is no nested path, so ``enable_nested_tensor`` and ``mask_check`` change nothing:
    padded positions get the same output in training and evaluation (PyTorch writes zeros there in evaluation alone).
    """

    def __init__(
        self,
        encoder_layer: nn.Module,
        num_layers: int,
        norm: nn.Module | None = None,
        enable_nested_tensor: bool = True,
        mask_check: bool = True,
    ) -> None:
        # False: PyTorch's constructor would warn about the path that this class does not have.
        layer: Any = encoder_layer
        super().__init__(layer, num_layers, norm, enable_nested_tensor=False, mask_check=mask_check)
        self.enable_nested_tensor = enable_nested_tensor

    def forward(
        self,
        src: Tensor,
        mask: Tensor | Mask | None = None,
        src_key_padding_mask: Tensor | Mask | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """Passes ``src`` through the layers.

        Args:
            src: [seq_len, batch, d_model], [batch, seq_len, d_model] with ``batch_first``, or [seq_len, d_model].
            mask: as ``attn_mask`` of :class:`MultiheadAttention`.
            src_key_padding_mask: as ``key_padding_mask`` of :class:`MultiheadAttention`.
            is_causal: a hint that ``mask`` is the causal mask; None looks.

        Returns:
            Like ``src``.
        """
        ours = all(type(layer) is TransformerEncoderLayer for layer in self.layers)
        mask, is_causal = _prepare_mask(mask, is_causal, ours)
        padding = _prepare_padding(src_key_padding_mask, ours)
        output = src
        for layer in self.layers:
            output = layer(output, src_mask=mask, is_causal=is_causal, src_key_padding_mask=padding)
        return output if self.norm is None else self.norm(output)


class TransformerDecoder(nn.TransformerDecoder):
    """A stack of decoder layers, and a norm at its end if one is given.

    Constructor, ``forward``, state_dict and initialisation are those of ``torch.nn.TransformerDecoder``.
    """

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | Mask | None = None,
        memory_mask: Tensor | Mask | None = None,
        tgt_key_padding_mask: Tensor | Mask | None = None,
        memory_key_padding_mask: Tensor | Mask | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
        *,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Passes ``tgt`` through the layers.

        Args:
            tgt: [seq_len_q, batch, d_model], [batch, seq_len_q, d_model] with ``batch_first``, or [seq_len_q, d_model].
            memory: the encoder's output, [seq_len_k, batch, d_model], laid out like ``tgt``.
            tgt_mask: as ``attn_mask`` of :class:`MultiheadAttention`, for the self-attention.
            memory_mask: the same for the attention over ``memory``.
            tgt_key_padding_mask: as ``key_padding_mask`` of :class:`MultiheadAttention`, for the self-attention.
            memory_key_padding_mask: the same for the attention over ``memory``.
            tgt_is_causal: a hint that ``tgt_mask`` is the causal mask; None looks.
            memory_is_causal: a hint that ``memory_mask`` is the causal mask.
            cache: what earlier calls computed; ``tgt`` then holds the new positions alone.

        Returns:
            Like ``tgt``.
        """
        # With a cache a mask may cover the new keys alone: the attention module knows which.
        ours = cache is None and all(type(layer) is TransformerDecoderLayer for layer in self.layers)
        tgt_mask, tgt_is_causal = _prepare_mask(tgt_mask, tgt_is_causal, ours)
        masks = {
            "tgt_mask": tgt_mask,
            "memory_mask": memory_mask,
            "tgt_key_padding_mask": _prepare_padding(tgt_key_padding_mask, ours),
            "memory_key_padding_mask": _prepare_padding(memory_key_padding_mask, ours),
            "tgt_is_causal": tgt_is_causal,
            "memory_is_causal": memory_is_causal,
        }
        # A layer of another make gets the keyword only where a cache is used.
        extra = {} if cache is None else {"cache": cache}
        output = tgt
        for layer in self.layers:
            output = layer(output, memory, **masks, **extra)
        return output if self.norm is None else self.norm(output)


class Transformer(nn.Transformer):
    """An encoder and a decoder.

    Constructor, ``forward``, state_dict and initialisation are those of ``torch.nn.Transformer``.

    Source: Vaswani et al., "Attention Is All You Need", 2017, figure 1.
    """

    def __init__(
        self,
        d_model: int = 512,
        nhead: int = 8,
        num_encoder_layers: int = 6,
        num_decoder_layers: int = 6,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = nn.functional.relu,
        custom_encoder: Any | None = None,
        custom_decoder: Any | None = None,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        def stack(layer_type: type, stack_type: type, num_layers: int) -> nn.Module:
            options = (
                dim_feedforward,
                dropout,
                activation,
                layer_norm_eps,
                batch_first,
                norm_first,
                bias,
                device,
                dtype,
            )
            layer = layer_type(d_model, nhead, *options)
            norm = nn.LayerNorm(d_model, eps=layer_norm_eps, bias=bias, device=device, dtype=dtype)
            return stack_type(layer, num_layers, norm)

        # In PyTorch's order, so that one seed gives both the same parameters.
        encoder = custom_encoder
        if encoder is None:
            encoder = stack(TransformerEncoderLayer, TransformerEncoder, num_encoder_layers)
        decoder = custom_decoder
        if decoder is None:
            decoder = stack(TransformerDecoderLayer, TransformerDecoder, num_decoder_layers)
        super().__init__(d_model, nhead, custom_encoder=encoder, custom_decoder=decoder, batch_first=batch_first)

    def forward(
        self,
        src: Tensor,
        tgt: Tensor,
        src_mask: Tensor | Mask | None = None,
        tgt_mask: Tensor | Mask | None = None,
        memory_mask: Tensor | Mask | None = None,
        src_key_padding_mask: Tensor | Mask | None = None,
        tgt_key_padding_mask: Tensor | Mask | None = None,
        memory_key_padding_mask: Tensor | Mask | None = None,
        src_is_causal: bool | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
        *,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Encodes ``src`` and decodes ``tgt`` over it.

        Args:
            src: [seq_len_k, batch, d_model], [batch, seq_len_k, d_model] with ``batch_first``, or [seq_len_k, d_model].
            tgt: [seq_len_q, batch, d_model], laid out like ``src``.
            src_mask: as ``mask`` of :class:`TransformerEncoder`.
            tgt_mask: as in :class:`TransformerDecoder`, like the others.
            memory_mask: for the attention of ``tgt`` over the encoder's output.
            src_key_padding_mask: as in :class:`TransformerEncoder`.
            tgt_key_padding_mask: as in :class:`TransformerDecoder`.
            memory_key_padding_mask: usually ``src_key_padding_mask`` again.
            src_is_causal: a hint that ``src_mask`` is the causal mask; None looks.
            tgt_is_causal: a hint that ``tgt_mask`` is the causal mask; None looks.
            memory_is_causal: a hint that ``memory_mask`` is the causal mask.
            cache: what earlier calls computed; ``tgt`` then holds the new positions alone, and ``src`` is encoded on
                the first call only.

        Returns:
            Like ``tgt``.

        Raises:
            ValueError: shapes do not fit.
            TypeError: dtypes or devices do not fit.
        """
        for name, tensor in (("src", src), ("tgt", tgt)):
            if tensor.shape[-1] != self.d_model:
                raise ValueError(f"{name} must have d_model = {self.d_model} features, got {list(tensor.shape)}")

        def encode() -> Tensor:
            return self.encoder(src, mask=src_mask, src_key_padding_mask=src_key_padding_mask, is_causal=src_is_causal)

        # A decoder of another make gets the keyword only where a cache is used.
        return self.decoder(
            tgt,
            encode() if cache is None else self._encode_once(encode, cache),
            tgt_mask=tgt_mask,
            memory_mask=memory_mask,
            tgt_key_padding_mask=tgt_key_padding_mask,
            memory_key_padding_mask=memory_key_padding_mask,
            tgt_is_causal=tgt_is_causal,
            memory_is_causal=memory_is_causal,
            **({} if cache is None else {"cache": cache}),
        )

    def _encode_once(self, encode: Callable[[], Tensor], cache: KVCache) -> Tensor:
        """Returns the encoder's output, from the cache on all steps but the first."""

        def batch_leading(memory: Tensor) -> Tensor:
            return memory if self.batch_first or memory.dim() == 2 else memory.transpose(0, 1)

        def project() -> tuple[Tensor, Tensor]:
            memory = batch_leading(encode())
            return memory, memory.new_empty(len(memory), 0)

        return batch_leading(cache.fixed(self, project)[0])


def _attend(
    module: nn.Module,
    x: Tensor,
    memory: Tensor,
    attn_mask: Tensor | Mask | None,
    key_padding_mask: Tensor | Mask | None,
    is_causal: bool,
    cache: KVCache | None,
) -> Tensor:
    extra = {} if cache is None else {"cache": cache}
    return module(
        x,
        memory,
        memory,
        attn_mask=attn_mask,
        key_padding_mask=key_padding_mask,
        is_causal=is_causal,
        need_weights=False,
        **extra,
    )[0]


def _use_fastattn(module: nn.MultiheadAttention) -> None:
    """Makes ``module`` a fastattn one: the same object, parameters and settings, another forward."""
    module.__class__ = MultiheadAttention


def _prepare_mask(mask: Tensor | Mask | None, is_causal: bool | None, ours: bool) -> tuple[Tensor | Mask | None, bool]:
    """Translates a mask once for all layers; layers that are not ``ours`` get it as it came."""
    if not ours or not isinstance(mask, Tensor) or mask.dim() != 2:
        return mask, bool(is_causal)
    restriction = attn_restriction(mask, is_causal, Shape(1, 1, *mask.shape))
    return (mask if restriction.mask is None else restriction.mask), False


def _prepare_padding(mask: Tensor | Mask | None, ours: bool) -> Tensor | Mask | None:
    if ours and isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.dim() == 2:
        return Padding(mask)
    return mask
