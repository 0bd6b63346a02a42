"""explain(): which backend serves each call, and why not another."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastattn
from fastattn.backends import BY_NAME
from fastattn.ops import _dispatch

pytestmark = pytest.mark.filterwarnings("ignore::fastattn.FallbackWarning")


def _model():
    torch.manual_seed(0)
    return nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 2, 32, batch_first=True), 2)


def _inputs():
    return torch.randn(1, 5, 16), torch.randn(1, 7, 16)


def test_stock_attention_is_pytorchs_and_says_what_to_do():
    explanation = fastattn.explain(_model(), *_inputs())
    assert [c.layer for c in explanation.calls] == [
        f"layers.{i}.{name}" for i in range(2) for name in ("self_attn", "multihead_attn")
    ]
    assert {c.served_by for c in explanation.calls} == {"PyTorch"}
    assert "fastattn.swap(model)" in str(explanation)


def test_swapped_attention_names_the_backend_and_the_reasons():
    model = _model()
    fastattn.swap(model)
    parameters = [p.detach().clone() for p in model.parameters()]
    explanation = fastattn.explain(model, *_inputs())
    forward = [c for c in explanation.calls if c.op == "attention"]
    assert [c.layer for c in forward] == [
        f"layers.{i}.{name}" for i in range(2) for name in ("self_attn", "multihead_attn")
    ]
    assert forward[1].shapes == "1x2x5x8 1x2x7x8 1x2x7x8 float32"
    assert sum(c.op == "attention_backward" for c in explanation.calls) == 4
    for call in explanation.calls:
        name = call.served_by.split()[0]
        assert {name, *call.reasons} == set(BY_NAME)
    assert all(p.grad is None and torch.equal(p, q) for p, q in zip(model.parameters(), parameters, strict=True))
    assert "layers.0-1.multihead_attn" in str(explanation)


def test_a_refusal_is_explained(monkeypatch):
    monkeypatch.setattr(BY_NAME["cpu"], "refuses", lambda op, call: ["it is asleep"], raising=False)
    model = _model()
    fastattn.swap(model)
    with torch.no_grad():
        explanation = fastattn.explain(model, *_inputs())
    attention = [c for c in explanation.calls if c.op == "attention"]
    assert {c.served_by for c in attention} == {"reference"}
    assert {c.reasons["cpu"] for c in attention} == {"it is asleep"}
    assert "cpu: it is asleep" in str(explanation)


def test_a_backend_that_was_asked_for():
    model = _model()
    fastattn.swap(model)
    with torch.no_grad(), fastattn.use_backend("reference"):
        explanation = fastattn.explain(model, *_inputs())
    assert {c.served_by for c in explanation.calls} == {"reference"}
    assert {c.reasons["cpu"] for c in explanation.calls if c.op == "attention"} <= {
        "reference was asked for",
        BY_NAME["cpu"].unavailable(),
    }


def test_functional_attention_before_and_after_activate():
    class Model(nn.Module):
        def forward(self, x):
            return F.scaled_dot_product_attention(x, x, x)

    x = torch.randn(1, 2, 5, 8)
    (before,) = fastattn.explain(Model(), x).calls
    assert before.op == "F.scaled_dot_product_attention"
    assert before.reasons == {"fastattn": "fastattn.activate() routes it"}
    with fastattn.activate():
        (after,) = fastattn.explain(Model(), x).calls
    assert after.op == "attention"


def test_observers_see_the_ops_of_their_block_only():
    seen = []
    x = torch.randn(1, 1, 3, 4)
    with _dispatch.observe(lambda op, call, backend: seen.append((op, fastattn.attention(x, x, x).shape))):
        fastattn.attention(x, x, x)
        with _dispatch.observe(None):
            fastattn.attention(x, x, x)
    fastattn.attention(x, x, x)
    assert seen == [("attention", (1, 1, 3, 4))]
