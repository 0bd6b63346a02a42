"""record_attention(): the weights are the softmax of the scores, the model notices nothing, and the page is whole."""

from __future__ import annotations

import base64
import html.parser
import json
import math
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastattn
from fastattn.tools.activate import is_active

pytestmark = pytest.mark.filterwarnings("ignore::fastattn.FallbackWarning")

DIM, HEADS = 16, 2


def _encoder(layers=2, batch_first=True):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(DIM, HEADS, 32, batch_first=batch_first, dropout=0.2)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)


def _input(batch=2, length=5, dtype=torch.float32):
    return torch.randn(batch, length, DIM, generator=torch.Generator().manual_seed(1), dtype=dtype)


def _exact_weights(mha: nn.MultiheadAttention, query, key, hidden=None):
    """softmax(q k^T / sqrt(d)) in float64, from the module's own projections."""
    weight, bias = mha.in_proj_weight.detach().double(), mha.in_proj_bias.detach().double()
    q = F.linear(query.double(), weight[:DIM], bias[:DIM])
    k = F.linear(key.double(), weight[DIM : 2 * DIM], bias[DIM : 2 * DIM])
    q, k = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (q, k))
    scores = q @ k.transpose(-1, -2) / math.sqrt(DIM // HEADS)
    if hidden is not None:
        scores = scores.masked_fill(hidden, float("-inf"))
    return scores.softmax(dim=-1)


@pytest.mark.parametrize("make", [nn.MultiheadAttention, fastattn.nn.MultiheadAttention], ids=["torch", "fastattn"])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_weights_are_the_softmax(make, need_weights, training):
    torch.manual_seed(0)
    mha = make(DIM, HEADS, batch_first=True, dropout=0.5).train(training)
    x = _input()
    causal = torch.ones(5, 5, dtype=torch.bool).triu(1)
    with torch.set_grad_enabled(training), fastattn.record_attention(mha) as maps:
        mha(x, x, x, attn_mask=causal, need_weights=need_weights)
    assert maps.names == [""]
    torch.testing.assert_close(maps[""].double(), _exact_weights(mha, x, x, causal), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_returns_what_it_always_returns(training):
    model = _encoder().train(training)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for layer in model.layers:
        layer.self_attn.dropout = 0.0
    x, padding = _input(), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    types = [type(m) for m in model.modules()]
    with torch.no_grad():
        expected = model(x, src_key_padding_mask=padding)
        with fastattn.record_attention(model) as maps:
            out = model(x, src_key_padding_mask=padding)
    torch.testing.assert_close(out[~padding], expected[~padding], atol=1e-5, rtol=1e-5)
    assert maps.names == ["layers.0.self_attn", "layers.1.self_attn"]
    assert len(maps) == 2
    assert list(maps) == maps.names
    assert maps["layers.0.self_attn"].shape == (2, HEADS, 5, 5)
    assert (maps["layers.0.self_attn"][1, :, :, 3:] == 0).all()
    torch.testing.assert_close(maps["layers.1.self_attn"].sum(-1), torch.ones(2, HEADS, 5))
    assert [type(m) for m in model.modules()] == types
    assert not is_active()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_gradients_flow_while_recording():
    mha = nn.MultiheadAttention(DIM, HEADS, batch_first=True)
    x = _input().requires_grad_()
    with fastattn.record_attention(mha) as maps:
        mha(x, x, x, need_weights=False)[0].sum().backward()
    assert x.grad is not None
    assert not maps[""].requires_grad


def test_functional_attention_is_recorded_under_the_module_that_calls_it():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(8, 8)

        def forward(self, x):
            return self.proj(F.scaled_dot_product_attention(x, x, x, is_causal=True))

    model = nn.Sequential(Block(), Block())
    x = torch.randn(1, 2, 4, 8)
    with torch.no_grad(), fastattn.record_attention(model) as maps:
        model(x)
    assert maps.names == ["0", "1"]
    scores = x.double() @ x.double().transpose(-1, -2) / math.sqrt(8)
    expected = scores.masked_fill(torch.ones(4, 4, dtype=torch.bool).triu(1), float("-inf")).softmax(-1)
    torch.testing.assert_close(maps["0"].double(), expected, atol=1e-6, rtol=1e-6)


def test_a_generation_with_a_cache_is_one_map():
    torch.manual_seed(0)
    layer = nn.TransformerDecoderLayer(DIM, HEADS, 32, batch_first=True)
    decoder = nn.TransformerDecoder(layer, 1).eval()
    fastattn.swap(decoder)
    memory, target = _input(1, 6), _input(1, 4)
    with torch.no_grad():
        with fastattn.record_attention(decoder) as whole:
            decoder(target, memory, tgt_mask=nn.Transformer.generate_square_subsequent_mask(4), tgt_is_causal=True)
        cache = fastattn.nn.KVCache()
        with fastattn.record_attention(decoder) as steps:
            for t in range(4):
                decoder(target[:, t : t + 1], memory, cache=cache)
    for name in ("layers.0.self_attn", "layers.0.multihead_attn"):
        assert len(steps.calls(name)) == 4
        torch.testing.assert_close(steps[name], whole[name], atol=1e-5, rtol=1e-5)


def test_repeated_calls_keep_the_last():
    mha = nn.MultiheadAttention(DIM, HEADS, batch_first=True)
    first, second = _input(1, 5), _input(1, 7)
    with torch.no_grad(), fastattn.record_attention(mha) as maps:
        mha(first, first, first)
        mha(second, second, second)
    assert [c.weights.shape[-1] for c in maps.calls("")] == [5, 7]
    assert maps[""].shape[-1] == 7


def test_long_sequences_are_pooled():
    mha = nn.MultiheadAttention(DIM, HEADS, batch_first=True)
    x = _input(1, 1500)
    with torch.no_grad(), fastattn.record_attention(mha) as maps:
        mha(x, x, x, need_weights=False)
    found = maps.map("")
    assert found.pool_size == 6
    assert found.weights.shape == (1, HEADS, 250, 250)
    exact = _exact_weights(mha, x, x).unflatten(-1, (250, 6)).unflatten(-3, (250, 6)).mean(dim=(-1, -3))
    torch.testing.assert_close(found.weights.double(), exact, atol=1e-7, rtol=1e-4)


def test_half_precision_weights_are_float32():
    mha = nn.MultiheadAttention(DIM, HEADS, batch_first=True, dtype=torch.bfloat16)
    x = _input(dtype=torch.bfloat16)
    bias = torch.zeros(5, 5, dtype=torch.bfloat16)
    with torch.no_grad(), fastattn.record_attention(mha) as maps:
        mha(x, x, x, attn_mask=bias)
    assert maps[""].dtype == torch.float32
    torch.testing.assert_close(maps[""].sum(-1), torch.ones(2, HEADS, 5), atol=1e-5, rtol=0)


def test_everything_is_restored_after_an_error():
    model = _encoder()
    with pytest.raises(ValueError, match="features"), fastattn.record_attention(model):
        model(torch.randn(1, 5, DIM + 1))
    assert type(model.layers[0]) is nn.TransformerEncoderLayer
    assert not is_active()
    with fastattn.record_attention(model) as maps, torch.no_grad():
        model(_input())
    assert maps.names == ["layers.0.self_attn", "layers.1.self_attn"]


def _recorded():
    model = _encoder(layers=3).eval()
    with torch.no_grad(), fastattn.record_attention(model) as maps:
        model(_input())
    return maps


class _Page(html.parser.HTMLParser):
    """Collects the data, and whatever a page would load from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.data = ""
        self._in_data = False

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.loaded += [v for k, v in attrs if k in ("src", "href")]
        self._in_data = tag == "script" and attributes.get("id") == "data"

    def handle_data(self, data):
        if self._in_data:
            self.data += data
            self._in_data = False


def test_html_holds_the_weights_and_loads_nothing(tmp_path):
    maps = _recorded()
    tokens = ["a", "</script><b>", "$x", "ü", '"']
    path = maps.save_html(tmp_path / "maps.html", labels=(tokens, tokens), batch=1, title="A <title> & more")
    text = path.read_text(encoding="utf-8")
    assert "http" not in text
    page = _Page()
    page.feed(text)
    assert page.loaded == []
    data = json.loads(page.data)
    assert data["title"] == "A <title> & more"
    assert [layer["name"] for layer in data["layers"]] == maps.names
    layer = data["layers"][2]
    assert layer["rows"] == layer["columns"] == tokens
    stored = np.frombuffer(base64.b64decode(layer["weights"]), dtype="<u2").reshape(HEADS, 5, 5) / 65535
    np.testing.assert_allclose(stored, maps["layers.2.self_attn"][1].numpy(), atol=1e-5)


def test_labels_go_by_layer(tmp_path):
    maps = _recorded()
    maps.save_html(tmp_path / "maps.html", labels={"layers.0.*": (list("abcde"), list("vwxyz"))})
    page = _Page()
    page.feed((tmp_path / "maps.html").read_text(encoding="utf-8"))
    layers = json.loads(page.data)["layers"]
    assert layers[0]["rows"] == list("abcde")
    assert layers[0]["columns"] == list("vwxyz")
    assert layers[1]["rows"] == list("01234")


@pytest.mark.parametrize("layers", [None, "layers.0.*", ["layers.0.*", "layers.2.self_attn"]])
def test_png(tmp_path, layers):
    path = _recorded().save_png(tmp_path / "maps.png", layers=layers, labels=(list("abcde"),) * 2, title="x")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_png_without_matplotlib_says_how_to_get_it(tmp_path, monkeypatch):
    for name in [m for m in sys.modules if m.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "fastattn\[demo\]"'):
        _recorded().save_png(tmp_path / "maps.png")


def test_mistakes_say_what_is_there(tmp_path):
    maps = _recorded()
    with pytest.raises(KeyError, match=r"layers\.0\.self_attn"):
        maps["layers.9"]
    with pytest.raises(ValueError, match="5 rows, got 4 labels"):
        maps.save_html(tmp_path / "x.html", labels=(list("abcd"), list("abcde")))
    with pytest.raises(ValueError, match=r"batch must be in \[0, 2\), got 2"):
        maps.save_html(tmp_path / "x.html", batch=2)
    with pytest.raises(ValueError, match="no layer fits"):
        maps.save_png(tmp_path / "x.png", layers="decoder.*")
    with fastattn.record_attention(nn.Linear(2, 2)) as nothing:
        pass
    with pytest.raises(ValueError, match="no attention was recorded"):
        nothing.save_html(tmp_path / "x.html")
