"""The modules of torch.nn, ours: the same parameters, the same answers, and right where PyTorch's are not.

Long because every module is held against PyTorch's in each of its quirks, with one set of helpers.
"""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastattn.nn as fnn
from fastattn import masks
from fastattn.nn import _blocks, transformer
from fastattn.nn.kv_cache import KVCache

pytestmark = [
    pytest.mark.filterwarnings("ignore::fastattn.FallbackWarning"),
    pytest.mark.filterwarnings("ignore:.*enable_nested_tensor is True:UserWarning"),
]

BATCH, LEN, SOURCE, DIM, HEADS, FF = 3, 6, 7, 16, 4, 32
NAMES = ["MultiheadAttention", "TransformerEncoderLayer", "TransformerDecoderLayer"]
WIDE = torch.float64


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = WIDE) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def causal(size: int, dtype: torch.dtype = torch.bool) -> Tensor:
    return nn.Transformer.generate_square_subsequent_mask(size, dtype=dtype)


def padding(batch: int = BATCH, size: int = LEN) -> Tensor:
    """Row 0 whole, row 1 padded behind, row 2 in front and with a hole."""
    ignored = torch.zeros(batch, size, dtype=torch.bool)
    ignored[1, -2:] = True
    ignored[2, [0, 3]] = True
    return ignored


def multihead(module: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor, hidden: Tensor | None,
              added: Tensor | None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The textbook, batch first: softmax of explicit scores; ``hidden`` and ``added`` are [batch, heads, rows,
    columns]."""
    if module.in_proj_weight is None:
        weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    else:
        weights = module.in_proj_weight.chunk(3)
    biases = (None,) * 3 if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
    q, k, v = (F.linear(t, w, b) for t, w, b in zip((query, key, value), weights, biases, strict=True))
    if module.bias_k is not None:
        k, v = (torch.cat((t, b.expand(len(t), 1, -1)), 1) for t, b in ((k, module.bias_k), (v, module.bias_v)))
    if module.add_zero_attn:
        k, v = (F.pad(t, (0, 0, 0, 1)) for t in (k, v))
    q, k, v = (t.unflatten(-1, (module.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
    scores = q @ k.mT / q.shape[-1] ** 0.5
    extra = k.shape[2] - key.shape[1]
    if added is not None:
        scores = scores + F.pad(added, (0, extra))
    if hidden is not None:
        hidden = F.pad(hidden, (0, extra))
        # A softmax over nothing is NaN, and so are its gradients: such a row is overwritten instead.
        empty = hidden.all(-1, keepdim=True)
        scores = scores.masked_fill(hidden & ~empty, float("-inf"))
    weights = scores.softmax(-1)
    if hidden is not None:
        weights = weights.masked_fill(empty, 0.0)
    out = (weights @ v).transpose(1, 2).flatten(2)
    return F.linear(out, module.out_proj.weight, module.out_proj.bias), weights


def both(name: str, *args, **kwargs) -> tuple[nn.Module, nn.Module]:
    """PyTorch's module and ours, with the same parameters, in float64."""
    theirs = getattr(nn, name)(*args, **kwargs, dtype=WIDE)
    ours = getattr(fnn, name)(*args, **kwargs, dtype=WIDE)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def sizes(name: str) -> tuple[int, ...]:
    return (DIM, HEADS) if name == "MultiheadAttention" else (DIM, HEADS, FF)


@pytest.fixture(params=["fused", "not fused"])
def fusing(request, monkeypatch):
    """The layers fuse large norms and feed-forwards; here all of them or none."""
    least = 0 if request.param == "fused" else 1 << 60
    monkeypatch.setattr(_blocks, "_LEAST_NORM", least)
    monkeypatch.setattr(_blocks, "_LEAST_FEED_FORWARD", least)
    return request.param == "fused"


# ---------------------------------------------------------------------------------------------------------------------
# Parameters
# ---------------------------------------------------------------------------------------------------------------------

OPTIONS = {
    "MultiheadAttention": [{}, {"bias": False}, {"add_bias_kv": True}, {"kdim": 5, "vdim": 7}, {"add_zero_attn": True}],
    "TransformerEncoderLayer": [{}, {"bias": False}, {"activation": "gelu"}, {"norm_first": True, "batch_first": True}],
    "TransformerDecoderLayer": [{}, {"bias": False}, {"activation": nn.GELU()}, {"layer_norm_eps": 1e-3}],
    "Transformer": [{}, {"bias": False}, {"num_encoder_layers": 1, "dropout": 0.5}],
}
CASES = [(name, options) for name, each in OPTIONS.items() for options in each]


def arguments(name: str, options: dict) -> dict:
    if name == "Transformer":
        layers = {"num_encoder_layers": 2, "num_decoder_layers": 2, "dim_feedforward": FF}
        return {"d_model": DIM, "nhead": HEADS} | layers | options
    names = ("embed_dim", "num_heads") if name == "MultiheadAttention" else ("d_model", "nhead")
    return dict(zip(names, (DIM, HEADS), strict=True)) | options


@pytest.mark.parametrize(("name", "options"), CASES)
def test_parameters_are_those_of_torch(name, options):
    torch.manual_seed(1)
    theirs = getattr(nn, name)(**arguments(name, options))
    torch.manual_seed(1)
    ours = getattr(fnn, name)(**arguments(name, options))
    assert isinstance(ours, type(theirs))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [n for n, _ in ours.named_modules()] == [n for n, _ in theirs.named_modules()]
    for key, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], tensor), key
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)


def test_stacks_are_those_of_torch():
    ours = fnn.Transformer(DIM, HEADS, 2, 2, FF)
    assert isinstance(ours.encoder, fnn.TransformerEncoder)
    assert isinstance(ours.decoder, fnn.TransformerDecoder)
    assert all(type(layer) is fnn.TransformerEncoderLayer for layer in ours.encoder.layers)
    attentions = [m for m in ours.modules() if isinstance(m, nn.MultiheadAttention)]
    assert len(attentions) == 2 + 2 * 2
    assert all(type(m) is fnn.MultiheadAttention for m in attentions)


def test_a_literal_checkpoint_loads():
    """The keys of a published nn.TransformerEncoder with three layers (sceptr's), written out."""
    layer = [
        "self_attn.in_proj_weight", "self_attn.in_proj_bias", "self_attn.out_proj.weight", "self_attn.out_proj.bias",
        "linear1.weight", "linear1.bias", "linear2.weight", "linear2.bias",
        "norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias",
    ]  # fmt: skip
    model = fnn.TransformerEncoder(fnn.TransformerEncoderLayer(64, 8, 256, 0.1, "gelu", batch_first=True), 3)
    assert list(model.state_dict()) == [f"layers.{i}.{key}" for i in range(3) for key in layer]
    theirs = nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 8, 256, 0.1, "gelu", batch_first=True), 3).eval()
    model.load_state_dict({k: v.clone() for k, v in theirs.state_dict().items()}, strict=True)
    x = rand(2, 9, 64, dtype=torch.float32)
    torch.testing.assert_close(model.eval()(x), theirs(x), rtol=1e-5, atol=1e-5)


def test_bad_activation_is_refused():
    with pytest.raises(RuntimeError, match="relu/gelu"):
        fnn.TransformerEncoderLayer(DIM, HEADS, activation="tanh")


# ---------------------------------------------------------------------------------------------------------------------
# Attention against the textbook
# ---------------------------------------------------------------------------------------------------------------------

MASKS = {
    "none": None,
    "bool": lambda: rand(LEN, SOURCE, seed=3) > 0.7,
    "bool per head": lambda: rand(BATCH * HEADS, LEN, SOURCE, seed=4) > 0.7,
    "float": lambda: rand(LEN, SOURCE, seed=5),
    "float per head": lambda: rand(BATCH * HEADS, LEN, SOURCE, seed=6),
    "float -inf": lambda: torch.where(rand(LEN, SOURCE, seed=3) > 0.7, float("-inf"), rand(LEN, SOURCE, seed=8)),
    "empty row": lambda: torch.eye(LEN, SOURCE, dtype=torch.bool)[:, :1].expand(LEN, SOURCE),
}
PADDINGS = {"none": None, "bool": lambda: padding(BATCH, SOURCE), "float": lambda: rand(BATCH, SOURCE, seed=7)}
KINDS = {
    "plain": {},
    "separate": {"kdim": 5, "vdim": 7},
    "bias_kv": {"add_bias_kv": True},
    "zero_attn": {"add_zero_attn": True, "bias": False},
}


@pytest.mark.parametrize("padding_name", PADDINGS)
@pytest.mark.parametrize("mask_name", MASKS)
@pytest.mark.parametrize("kind", KINDS)
def test_attention_is_the_textbook(kind, mask_name, padding_name):
    module = fnn.MultiheadAttention(DIM, HEADS, batch_first=True, dtype=WIDE, **KINDS[kind])
    attn_mask, key_padding = (None if m is None else m() for m in (MASKS[mask_name], PADDINGS[padding_name]))
    inputs = [rand(BATCH, LEN, DIM), rand(BATCH, SOURCE, module.kdim, seed=1), rand(BATCH, SOURCE, module.vdim, seed=2)]
    inputs = [t.requires_grad_() for t in inputs]

    hidden, added = [], []
    for mask in (attn_mask, key_padding):
        if mask is not None:
            if mask is attn_mask:
                full = mask.expand(BATCH * HEADS, -1, -1).unflatten(0, (BATCH, HEADS))
            else:
                full = mask[:, None, None]
            (hidden if mask.dtype == torch.bool else added).append(full.expand(BATCH, HEADS, LEN, SOURCE))
    expected, weights = multihead(
        module, *inputs, torch.stack(hidden).any(0) if hidden else None, sum(added) if added else None
    )

    leaves = [*inputs, *module.parameters()]
    direction, by_weights = rand(*expected.shape, seed=8), rand(*weights.shape, seed=9)
    for average in (False, True):
        options = {"attn_mask": attn_mask, "key_padding_mask": key_padding, "average_attn_weights": average}
        out, found = module(*inputs, **options)
        towards = [direction, by_weights.mean(1) if average else by_weights]
        truth = torch.autograd.grad(
            [expected, weights.mean(1) if average else weights], leaves, towards, retain_graph=True
        )
        grads = torch.autograd.grad([out, found], leaves, towards)
        for grad, true in zip(grads, truth, strict=True):
            torch.testing.assert_close(grad, true)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(found, weights.mean(1) if average else weights)
        alone, nothing = module(*inputs, need_weights=False, **options)
        assert nothing is None
        torch.testing.assert_close(alone, expected)


@pytest.mark.parametrize("layout", ["batch first", "sequence first", "unbatched"])
@pytest.mark.parametrize("same", ["self", "memory", "three"])
def test_layouts_agree(layout, same):
    theirs, ours = both("MultiheadAttention", DIM, HEADS, batch_first=layout == "batch first")
    shape = {"batch first": (BATCH, LEN, DIM), "sequence first": (LEN, BATCH, DIM), "unbatched": (LEN, DIM)}[layout]
    x, y, z = (rand(*shape, seed=s) for s in range(3))
    args = {"self": (x, x, x), "memory": (x, y, y), "three": (x, y, z)}[same]
    ignored = padding()[1] if layout == "unbatched" else padding()
    per_head = rand(HEADS * (1 if layout == "unbatched" else BATCH), LEN, LEN, seed=4)
    for options in ({}, {"key_padding_mask": ignored}, {"attn_mask": per_head}, {"attn_mask": causal(LEN)}):
        for result, expected in zip(ours(*args, **options), theirs(*args, **options), strict=True):
            torch.testing.assert_close(result, expected)


def test_dropout_drops_the_weights_that_it_returns():
    module = fnn.MultiheadAttention(DIM, HEADS, dropout=0.5, batch_first=True, dtype=WIDE).train()
    x = rand(BATCH, 40, DIM).requires_grad_()
    out, weights = module(x, x, x, average_attn_weights=False)
    assert 0.4 < (weights == 0).double().mean() < 0.6
    value = F.linear(x, module.in_proj_weight[-DIM:], module.in_proj_bias[-DIM:])
    value = value.unflatten(-1, (HEADS, -1)).transpose(1, 2)
    torch.testing.assert_close(out, module.out_proj((weights @ value).transpose(1, 2).flatten(2)))
    # Kept weights are the undropped ones, doubled.
    kept = module.eval()(x, x, x, average_attn_weights=False)[1] * 2
    torch.testing.assert_close(weights, torch.where(weights == 0, 0.0, kept))
    # One seed, one answer; the mean is that of the same draw.
    module.train()
    torch.manual_seed(3)
    per_head = module(x, x, x, average_attn_weights=False)
    torch.manual_seed(3)
    mean = module(x, x, x)
    assert torch.equal(per_head[0], mean[0])
    torch.testing.assert_close(per_head[1].mean(1), mean[1])


# ---------------------------------------------------------------------------------------------------------------------
# Where PyTorch is wrong
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
def test_an_empty_row_is_zero(need_weights, grad):
    module = fnn.MultiheadAttention(DIM, HEADS, batch_first=True, dtype=WIDE).eval()
    nn.init.normal_(module.out_proj.bias)
    x = rand(BATCH, LEN, DIM).requires_grad_()
    ignored = torch.zeros(BATCH, LEN, dtype=torch.bool)
    ignored[1] = True
    with torch.set_grad_enabled(grad):
        out, weights = module(x, x, x, key_padding_mask=ignored, need_weights=need_weights)
    torch.testing.assert_close(out[1], module.out_proj.bias.expand(LEN, DIM))
    assert weights is None or not weights[1].any()
    if grad:
        (dx,) = torch.autograd.grad(out.sum(), x)
        assert not dx[1].any()
        assert dx[0].any()


def test_padding_keeps_what_is_masked_out():
    layer = fnn.TransformerEncoderLayer(DIM, HEADS, FF, 0.0, batch_first=True, dtype=WIDE)
    x = rand(BATCH, LEN, DIM)
    expected = layer(x, src_key_padding_mask=padding())
    x[padding()] = float("nan")
    result = layer(x, src_key_padding_mask=padding())
    torch.testing.assert_close(result[~padding()], expected[~padding()])


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("kind", ["plain", "bias_kv", "zero_attn"])
def test_a_wrong_hint_changes_nothing(kind, need_weights):
    module = fnn.MultiheadAttention(DIM, HEADS, dtype=WIDE, batch_first=True, **KINDS[kind])
    x = rand(BATCH, LEN, DIM)
    for mask in (causal(LEN), causal(LEN, WIDE), rand(LEN, LEN) > 0.5, causal(LEN).T.clone(), rand(LEN, LEN)):
        plain = module(x, x, x, attn_mask=mask, need_weights=need_weights)
        hinted = module(x, x, x, attn_mask=mask, need_weights=need_weights, is_causal=True)
        torch.testing.assert_close(hinted[0], plain[0], rtol=1e-12, atol=1e-12)


def test_a_causal_mask_becomes_a_band(monkeypatch):
    seen = []
    attend = fnn.attention.attend
    monkeypatch.setattr(fnn.attention, "attend", lambda call: seen.append(call) or attend(call))
    x = rand(BATCH, LEN, DIM)
    encoder = fnn.TransformerEncoder(fnn.TransformerEncoderLayer(DIM, HEADS, FF, batch_first=True, dtype=WIDE), 2)
    for mask in (causal(LEN), causal(LEN, WIDE), masks.Causal()):
        encoder(x, mask=mask, src_key_padding_mask=padding())
    decoder = fnn.TransformerDecoder(fnn.TransformerDecoderLayer(DIM, HEADS, FF, batch_first=True, dtype=WIDE), 2)
    decoder(x, x, tgt_mask=causal(LEN))
    banded = [c for c in seen if c.diag_hi == 0]
    assert len(seen) == 3 * 2 + 2 * 2
    assert len(banded) == 3 * 2 + 2
    assert all(c.dense_mask is None and c.bias is None for c in seen)
    # A learned mask gets its gradient, so it is not replaced.
    seen.clear()
    learned = causal(LEN, WIDE).requires_grad_()
    encoder(x, mask=learned).sum().backward()
    assert all(c.bias is not None for c in seen)
    assert learned.grad is not None


def test_masks_are_not_written_out(monkeypatch):
    """Bool masks of both kinds together stay [rows, columns] and [batch, columns]."""
    seen = []
    attend = fnn.attention.attend
    monkeypatch.setattr(fnn.attention, "attend", lambda call: seen.append(call) or attend(call))
    x = rand(BATCH, LEN, DIM)
    layer = fnn.TransformerEncoderLayer(DIM, HEADS, FF, batch_first=True, dtype=WIDE)
    layer(x, src_mask=rand(LEN, LEN, seed=2) > 1, src_key_padding_mask=padding())
    layer(x, src_mask=rand(LEN, LEN, seed=2), src_key_padding_mask=padding())
    for call in seen:
        for tensor in call:
            if isinstance(tensor, Tensor) and tensor.dtype in (torch.bool, torch.int32):
                assert tensor.numel() <= max(LEN * LEN, BATCH * LEN)
    assert seen[1].bias.shape == (1, 1, LEN, LEN)


def test_alibi_as_a_float_mask_is_right_in_evaluation():
    slopes = torch.arange(1, HEADS + 1, dtype=WIDE) / HEADS
    distance = (torch.arange(LEN)[:, None] - torch.arange(LEN)).abs()
    alibi = (-slopes[:, None, None] * distance).repeat(BATCH, 1, 1)
    theirs, ours = both("TransformerEncoderLayer", DIM, HEADS, FF, 0.0, batch_first=True)
    x = rand(BATCH, LEN, DIM)
    expected = theirs.train()(x, alibi)  # PyTorch's evaluation would take it for a bool mask
    with torch.no_grad():
        result, ignored = ours.eval()(x, alibi), ours(x)
    torch.testing.assert_close(result, expected)
    assert (result - ignored).abs().max() > 1e-2


@pytest.mark.usefixtures("fusing")
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_is_the_one_asked_for(approximate):
    theirs, ours = both("TransformerEncoderLayer", DIM, HEADS, FF, 0.0, nn.GELU(approximate), batch_first=True)
    x = rand(BATCH, LEN, DIM) * 3
    expected = theirs.train()(x)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.usefixtures("fusing")
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("name", ["self_attn", "linear1", "linear2", "norm1"])
def test_a_module_put_in_place_is_called(name, norm_first):
    class Loud(nn.Module):
        calls = 0

        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, *args, **kwargs):
            type(self).calls += 1
            return self.inner(*args, **kwargs)

    layer = fnn.TransformerEncoderLayer(DIM, HEADS, FF, batch_first=True, norm_first=norm_first, dtype=WIDE).eval()
    x = rand(BATCH, LEN, DIM)
    expected = layer(x)
    setattr(layer, name, Loud(getattr(layer, name)))
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected)
    assert Loud.calls == 1


@pytest.mark.usefixtures("fusing")
@pytest.mark.parametrize(
    "path", ["self_attn", "self_attn.out_proj", "linear1", "linear2", "norm1", "norm2", "dropout1", "dropout"]
)
@pytest.mark.parametrize("norm_first", [True, False])
def test_hooks_run(path, norm_first):
    layer = fnn.TransformerEncoderLayer(DIM, HEADS, FF, batch_first=True, norm_first=norm_first, dtype=WIDE).eval()
    x = rand(BATCH, LEN, DIM)
    plain = layer(x)
    seen = []
    module = layer.get_submodule(path)
    module.register_forward_hook(lambda m, args, out: seen.append("forward"))
    module.register_full_backward_hook(lambda m, din, dout: seen.append("backward"))
    out = layer(x.requires_grad_())
    out.sum().backward()
    assert sorted(seen) == ["backward", "forward"]
    torch.testing.assert_close(out, plain)


@pytest.mark.usefixtures("fusing")
def test_global_hooks_run():
    layer = fnn.TransformerEncoderLayer(DIM, HEADS, FF, batch_first=True, dtype=WIDE).eval()
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, args, out: seen.append(m))
    try:
        layer(rand(BATCH, LEN, DIM))
    finally:
        handle.remove()
    assert layer.linear1 in seen
    assert layer.norm2 in seen


@pytest.mark.usefixtures("fusing")
def test_parametrised_linears_are_called():
    layer = fnn.TransformerEncoderLayer(DIM, HEADS, FF, batch_first=True, dtype=WIDE).eval()
    x = rand(BATCH, LEN, DIM)
    before = layer(x)
    for linear in (layer.linear2, layer.self_attn.out_proj):
        nn.utils.parametrizations.weight_norm(linear)
    torch.testing.assert_close(layer(x), before)
    with torch.no_grad():
        layer.linear2.parametrizations.weight.original0.mul_(2)
    assert (layer(x) - before).abs().max() > 1e-2


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("name", ["TransformerEncoderLayer", "TransformerDecoderLayer"])
@pytest.mark.parametrize("activation", ["relu", nn.GELU("tanh"), F.silu, torch.tanh])
def test_layers_are_those_of_torch(name, norm_first, activation, fusing):
    theirs, ours = both(name, DIM, HEADS, FF, 0.0, activation, batch_first=True, norm_first=norm_first)
    inputs = [rand(BATCH, n, DIM, seed=n).requires_grad_() for n in ((LEN,) if "Encoder" in name else (LEN, SOURCE))]
    expected = theirs(*inputs)
    result = ours(*inputs)
    torch.testing.assert_close(result, expected)
    direction = rand(*expected.shape, seed=9)
    for found, true in zip(
        torch.autograd.grad(result, [*inputs, *ours.parameters()], direction),
        torch.autograd.grad(expected, [*inputs, *theirs.parameters()], direction),
        strict=True,
    ):
        torch.testing.assert_close(found, true)
    seen = []
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        for name, op in (("fused_feed_forward", _blocks.fused_feed_forward), ("layer_norm", _blocks.layer_norm)):
            patch.setattr(_blocks, name, lambda *a, _op=op, **k: seen.append(_op) or _op(*a, **k))
        torch.testing.assert_close(ours(*inputs), expected)
    assert bool(seen) == fusing


@pytest.mark.parametrize("name", ["TransformerEncoderLayer", "TransformerDecoderLayer"])
def test_a_layer_ends_in_one_call(name, monkeypatch):
    """Before its residual a layer that normalises first drops what the feed-forward and a dropout drop one by one."""
    monkeypatch.setattr(_blocks, "_fuses_feed_forward", lambda *_: True)
    layer = getattr(fnn, name)(128, HEADS, FF, 0.4, batch_first=True, norm_first=True)
    last = layer.dropout2 if "Encoder" in name else layer.dropout3
    x = rand(4, 40, 128).float()  # as many elements as the dropout's kernel takes
    torch.manual_seed(1)
    expected = x + _blocks.apply_dropout(
        last, _blocks.feed_forward(layer.linear1, layer.activation, layer.dropout, layer.linear2, x)
    )
    seen = []
    plain = _blocks.fused_feed_forward
    monkeypatch.setattr(_blocks, "fused_feed_forward", lambda *a, **k: seen.append(k) or plain(*a, **k))
    torch.manual_seed(1)
    torch.testing.assert_close(transformer._add_ff_block(layer, last, x, x), expected)
    assert seen[0]["residual"] is x
    assert seen[0]["output_dropout_p"] == 0.4
    layer._ff_block = torch.zeros_like  # what replaces the block is called
    assert torch.equal(transformer._add_ff_block(layer, last, x, x), x)
    inputs = (x,) if "Encoder" in name else (x, x)
    assert layer(*inputs).shape == x.shape
    assert len(seen) == 1


@pytest.mark.usefixtures("fusing")
def test_padded_positions_are_the_same_in_every_mode():
    layer = fnn.TransformerEncoderLayer(DIM, HEADS, FF, 0.0, batch_first=True, dtype=WIDE)
    encoder = fnn.TransformerEncoder(layer, 2, nn.LayerNorm(DIM, dtype=WIDE))
    x, ignored = rand(BATCH, LEN, DIM), padding()
    expected = encoder.train()(x, src_key_padding_mask=ignored)
    with torch.no_grad():
        torch.testing.assert_close(encoder.eval()(x, src_key_padding_mask=ignored), expected)


def test_layers_in_torchs_own_encoder():
    """PyTorch's stack hands its layers nested tensors in evaluation."""
    theirs, ours = both("TransformerEncoderLayer", DIM, HEADS, FF, 0.0, batch_first=True)
    ignored = torch.arange(LEN) >= torch.tensor([LEN, 4, 2])[:, None]
    x = rand(BATCH, LEN, DIM)
    for grad in (True, False):
        stacks = [nn.TransformerEncoder(layer, 2).eval() for layer in (theirs, ours)]
        with torch.set_grad_enabled(grad), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*nested tensors")
            expected, result = (stack(x, src_key_padding_mask=ignored) for stack in stacks)
        torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("need_weights", [True, False])
def test_nested_tensors(need_weights):
    theirs, ours = both("MultiheadAttention", DIM, HEADS, batch_first=True)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("ignore", message=".*nested tensors")
        x = torch.nested.nested_tensor([rand(n, DIM, seed=n) for n in (5, 2, 4)])
        result, weights = ours.eval()(x, x, x, need_weights=need_weights)
        expected, _ = theirs.eval()(x, x, x, need_weights=False)
    for a, b in zip(result.unbind(), expected.unbind(), strict=True):
        torch.testing.assert_close(a, b)
    assert (weights is not None) == need_weights


# ---------------------------------------------------------------------------------------------------------------------
# Caches
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("fusing")
@pytest.mark.parametrize("steps", [[1] * LEN, [2, 3, 1], [LEN], [4, 2]])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
def test_steps_with_a_cache_are_the_whole(norm_first, batch_first, steps):
    model = fnn.Transformer(DIM, HEADS, 2, 2, FF, batch_first=batch_first, norm_first=norm_first, dtype=WIDE).eval()
    time = 1 if batch_first else 0
    src, tgt = (rand(BATCH, n, DIM, seed=n).transpose(0, 1 - time) for n in (SOURCE, LEN))
    ignored = padding(BATCH, SOURCE)
    options = {"src_key_padding_mask": ignored, "memory_key_padding_mask": ignored}
    with torch.no_grad():
        expected = model(src, tgt, tgt_mask=causal(LEN), **options)
        for mask_of in (lambda n, seen: causal(n), lambda n, seen: causal(seen)[-n:], lambda n, seen: masks.Causal()):
            cache, outs, seen = KVCache(), [], 0
            for n in steps:
                seen += n
                new = tgt.narrow(time, seen - n, n)
                # After the first step nobody looks at the source again.
                source = src if seen == n else torch.full_like(src, float("nan"))
                outs.append(model(source, new, tgt_mask=mask_of(n, seen), **options, cache=cache))
            torch.testing.assert_close(torch.cat(outs, time), expected, rtol=1e-12, atol=1e-12)
            assert cache.length == LEN


def test_a_cache_with_padding_and_appended_keys():
    module = fnn.MultiheadAttention(
        DIM, HEADS, batch_first=True, add_bias_kv=True, add_zero_attn=True, dtype=WIDE
    ).eval()
    x, ignored = rand(BATCH, LEN, DIM), padding()
    with torch.no_grad():
        expected, weights = module(x, x, x, attn_mask=causal(LEN), key_padding_mask=ignored)
        cache = KVCache()
        for at in range(LEN):
            new = x[:, at : at + 1]
            out, row = module(new, new, new, key_padding_mask=ignored[:, : at + 1], cache=cache)
            torch.testing.assert_close(out, expected[:, at : at + 1])
            columns = [*range(at + 1), LEN, LEN + 1]
            torch.testing.assert_close(row, weights[:, at : at + 1, columns])


# ---------------------------------------------------------------------------------------------------------------------
# Copies, casts and compilers
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_copies_and_pickles(name):
    module = getattr(fnn, name)(*sizes(name), dtype=WIDE).eval()
    args = (rand(LEN, BATCH, DIM),) * {"MultiheadAttention": 3, "TransformerDecoderLayer": 2}.get(name, 1)
    expected = module(*args)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(other) is type(module)
        torch.testing.assert_close(other(*args), expected)


@pytest.mark.usefixtures("fusing")
def test_autocast():
    model = fnn.Transformer(DIM, HEADS, 1, 1, FF, 0.0, batch_first=True)
    attention = fnn.MultiheadAttention(DIM, HEADS, batch_first=True, add_bias_kv=True)
    x = rand(BATCH, LEN, DIM, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x, x, tgt_mask=causal(LEN), src_key_padding_mask=padding())
        attended, weights = attention(x, x, x, attn_mask=rand(LEN, LEN, dtype=torch.float32))
    assert attended.dtype == weights.dtype == torch.bfloat16
    out.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
    expected = model.double()(x.double(), x.double(), tgt_mask=causal(LEN), src_key_padding_mask=padding())
    torch.testing.assert_close(out.double(), expected, rtol=0.05, atol=0.05)


MODELS = {
    "encoder": lambda: fnn.TransformerEncoder(fnn.TransformerEncoderLayer(DIM, HEADS, FF, 0.0, batch_first=True), 1),
    "decoder": lambda: fnn.TransformerDecoder(fnn.TransformerDecoderLayer(DIM, HEADS, FF, 0.0, batch_first=True), 1),
    "attention": lambda: fnn.MultiheadAttention(DIM, HEADS, batch_first=True),
}


def call(name: str, model: nn.Module, x: Tensor, mask: Tensor, ignored: Tensor) -> Tensor:
    if name == "encoder":
        return model(x, mask, ignored)
    if name == "decoder":
        return model(x, x, tgt_mask=mask, memory_key_padding_mask=ignored)
    out, weights = model(x, x, x, attn_mask=mask, key_padding_mask=ignored, is_causal=True)
    return out + weights.sum()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_compiles_whole_with_masks_and_gradients(name, dtype):
    model = MODELS[name]()
    x, mask, ignored = rand(BATCH, LEN, DIM, dtype=torch.float32), causal(LEN, dtype), padding()
    compiled = torch.compile(lambda *a: call(name, model, *a), fullgraph=True, backend="aot_eager")
    result, expected = compiled(x, mask, ignored), call(name, model, x, mask, ignored)
    torch.testing.assert_close(result, expected)
    grads = [torch.autograd.grad(t.sum(), list(model.parameters()), allow_unused=True) for t in (result, expected)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_exports_with_masks(name):
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = MODELS[name]()

        def forward(self, x, mask, ignored):
            return call(name, self.model, x, mask, ignored)

    args = (rand(BATCH, LEN, DIM, dtype=torch.float32), causal(LEN, torch.float32), padding())
    whole = Whole()
    program = torch.export.export(whole, args)
    torch.testing.assert_close(program.module()(*args), whole(*args))


# ---------------------------------------------------------------------------------------------------------------------
# Wrong inputs
# ---------------------------------------------------------------------------------------------------------------------

X = rand(BATCH, LEN, DIM)


@pytest.mark.parametrize(
    ("args", "options", "error", "message"),
    [
        ((X[0, 0], X, X), {}, ValueError, "query must be 2-D, or 3-D"),
        ((X[..., 1:], X, X), {}, ValueError, "embed_dim = 16"),
        ((X, X[0], X[0]), {}, ValueError, "key must be 3-D"),
        ((X, X[..., 1:], X), {}, ValueError, "key must be 3-D .* with 16 features"),
        ((X, X, X[:, 1:]), {}, ValueError, "must differ only in features"),
        ((X, X[1:], X[1:]), {}, ValueError, "same batch"),
        ((X, X, X), {"attn_mask": causal(LEN + 1)}, ValueError, "attn_mask must have shape"),
        ((X, X, X), {"attn_mask": causal(LEN)[None]}, ValueError, "attn_mask must have shape"),
        ((X, X, X), {"attn_mask": causal(LEN).int()}, TypeError, "attn_mask must be bool"),
        ((X, X, X), {"attn_mask": [[True]]}, TypeError, "attn_mask must be a tensor"),
        ((X, X, X), {"key_padding_mask": padding()[:, 1:]}, ValueError, "key_padding_mask must have shape"),
        ((X, X, X), {"key_padding_mask": padding().long()}, TypeError, "key_padding_mask must be bool"),
        ((X, X, X), {"is_causal": True}, ValueError, "is_causal=True is a hint"),
    ],
)
def test_wrong_inputs(args, options, error, message):
    module = fnn.MultiheadAttention(DIM, HEADS, batch_first=True, dtype=WIDE)
    with pytest.raises(error, match=message):
        module(*args, **options)


def test_wrong_features_of_a_transformer():
    with pytest.raises(ValueError, match="src must have d_model = 16"):
        fnn.Transformer(DIM, HEADS, 1, 1, FF)(X[..., 1:], X)


@pytest.mark.parametrize("mask", [causal(LEN).int(), [[True]]])
def test_wrong_masks_of_a_stack(mask):
    encoder = fnn.TransformerEncoder(fnn.TransformerEncoderLayer(DIM, HEADS, FF, batch_first=True, dtype=WIDE), 1)
    with pytest.raises(TypeError, match="attn_mask must be"):
        encoder(X, mask)
    with pytest.raises(TypeError, match="key_padding_mask must be"):
        encoder(X, src_key_padding_mask=mask)
