"""verify(): the rule, on ops and on models, passes what is right and fails what is wrong."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastattn
from fastattn.tools import op_cases, verify_ops
from fastattn.tools.numerics import Errors, Figure, errors, figure, ulp, with_typical_errors

pytestmark = pytest.mark.filterwarnings("ignore::fastattn.FallbackWarning")


def test_errors():
    exact = torch.tensor([1.0, 2.0, float("-inf"), float("nan")], dtype=torch.float64)
    assert errors(torch.tensor([1.0, 2.5, float("-inf"), 7.0]), exact) == (0.5, 0.125)
    assert errors(torch.tensor([float("nan"), 2.0, float("-inf"), 7.0]), exact).max == float("inf")
    assert errors(torch.tensor([1.0, 2.0, 3.0, 7.0]), exact).max == float("inf")
    assert errors(torch.empty(0), torch.empty(0)) == (0.0, 0.0)


def test_ulp():
    assert ulp(torch.tensor([1.0, -3.0]), torch.float32) == 2.0**-22
    assert ulp(torch.tensor([0.75]), torch.bfloat16) == 2.0**-8
    assert ulp(torch.zeros(3), torch.float32) == 0.0
    assert ulp(torch.tensor([float("inf"), 1.0]), torch.float32) == 2.0**-23


def test_figure_passes_at_the_bound_and_fails_above():
    exact = torch.full((1000,), 1.0, dtype=torch.float64)
    eager = exact.float() + 1e-3
    assert figure("x", eager, eager, exact).ok
    assert figure("x", exact.float() + 1.4e-3, eager, exact).ok
    assert not figure("x", exact.float() + 1.6e-3, eager, exact).ok, "mean"
    assert figure("x", exact.float()[:99] + 1.6e-3, eager[:99], exact[:99]).ok, "too few for a mean"
    spike = exact.float()
    spike[0] += 2.1e-3
    assert not figure("x", spike, eager, exact).ok, "maximum"


def test_typical_errors_forgive_the_peers_luck_and_nothing_else():
    def one(ours, eager):
        return Figure("x", Errors(ours, ours / 4), Errors(eager, eager / 4), 2 * eager, 1.5 * eager / 4, 1.0)

    figures = [one(1e-6, 1e-6), one(1e-6, 1e-6), one(1.5e-6, 1e-7), one(3e-6, 1e-6), one(1e-5, 1e-7)]
    assert [f.ok for f in figures] == [True, True, False, False, False]
    assert [f.ok for f in with_typical_errors(figures)] == [True, True, True, False, False]
    assert with_typical_errors([]) == []


def test_figure_refuses_what_cannot_be_compared():
    x = torch.zeros(3)
    with pytest.raises(ValueError, match="one shape"):
        figure("x", x, torch.zeros(4), x.double())
    with pytest.raises(TypeError, match="bfloat16"):
        figure("x", x.bfloat16(), x, x.double())


def test_every_mask_meets_every_bias():
    found = {(c.mask, c.variant) for c in op_cases.attention_cases()}
    for mask in op_cases.MASKS:
        for bias in ("", "dense bias", "per-head bias", "alibi bias", "relative bias"):
            assert (mask, bias) in found


def _one_case(monkeypatch, broken=None):
    case = next(op_cases.attention_cases())
    if broken is not None:
        original = case.ours
        case = op_cases.OpCase(
            **{
                **vars(case),
                "ours": lambda t, backend: (
                    original(t, backend) if backend == "reference" else broken(original(t, backend))
                ),
            }
        )
    monkeypatch.setattr(verify_ops, "cases", lambda ops: iter([case]))


def test_ops_report(monkeypatch):
    _one_case(monkeypatch)
    seen = []
    report = verify_ops.verify_ops(dtypes=[torch.float32, torch.bfloat16], on_result=seen.append)
    assert report.ok
    assert tuple(seen) == report.results
    assert [(r.dtype, r.direction) for r in seen] == [
        (dtype, direction) for dtype in (torch.float32, torch.bfloat16) for direction in ("forward", "backward")
    ]
    assert {f.name for f in seen[1].figures} == {"dquery", "dkey", "dvalue"}
    text = str(report)
    assert "FAIL" not in text
    assert "0 rows fail" in text


@pytest.mark.parametrize(
    "broken",
    [
        lambda out: {**out, "out": out["out"] * (1 + 1e-5)},
        lambda out: {**out, "lse": out["lse"] + 1e-3},
        lambda out: {**out, "out": torch.where(out["out"] == out["out"].max(), float("nan"), out["out"])},
    ],
    ids=["scaled", "wrong lse", "NaN"],
)
def test_ops_report_fails_what_is_wrong(monkeypatch, broken):
    _one_case(monkeypatch, broken)
    report = verify_ops.verify_ops(dtypes=[torch.float32])
    assert not report.ok
    assert "FAIL" in report.table(only_failures=True)


def test_unknown_names():
    with pytest.raises(ValueError, match="'attention'"):
        verify_ops.verify_ops(ops=["attentoin"])


class _Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 16)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)
        self.head = nn.Linear(16, 3)

    def forward(self, ids, *, padding=None):
        hidden = self.encoder(self.embed(ids), src_key_padding_mask=padding)
        return {"logits": self.head(hidden[:, 0]), "hidden": hidden}


def _call():
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(11, (3, 9), generator=g)
    return ids, torch.arange(9)[None, :] >= torch.tensor([9, 4, 6])[:, None]


def test_model_report():
    torch.manual_seed(0)
    model = _Classifier()
    ids, padding = _call()
    report = fastattn.verify(model, ids, padding=padding)
    assert report.ok, str(report)
    assert report.peer == "PyTorch"
    names = {(r.kind, r.figure.name) for r in report.rows}
    assert ("output", "output['logits']") in names
    assert ("layer", "encoder.layers.1") in names
    assert ("gradient", "embed.weight") in names
    assert report.worst("output").ours.max < 1e-5
    assert model.training
    assert type(model.encoder) is nn.TransformerEncoder
    assert "pass" in str(report)


def test_a_swapped_model_gives_the_same_report():
    torch.manual_seed(0)
    model = _Classifier()
    ids, padding = _call()
    before = fastattn.verify(model, ids, padding=padding)
    fastattn.swap(model)
    assert fastattn.verify(model, ids, padding=padding) == before
    assert type(model.encoder) is fastattn.nn.TransformerEncoder


def test_model_report_fails_a_wrong_layer(monkeypatch):
    original = fastattn.nn.MultiheadAttention.forward

    def slightly_wrong(self, *args, **kwargs):
        out, weights = original(self, *args, **kwargs)
        return out * (1 + 1e-4), weights

    monkeypatch.setattr(fastattn.nn.MultiheadAttention, "forward", slightly_wrong)
    torch.manual_seed(0)
    report = fastattn.verify(_Classifier(), _call()[0])
    assert not report.ok
    assert "FAIL" in str(report)


def test_a_model_without_a_torch_twin_is_compared_with_the_reference():
    torch.manual_seed(0)
    model = nn.Sequential(fastattn.nn.FeedForward(16, 32), nn.TransformerEncoderLayer(16, 2, 32, batch_first=True))
    report = fastattn.verify(model, torch.randn(2, 5, 16))
    assert report.peer == "reference"
    assert report.ok, str(report)
    assert "reference's" in str(report)


def test_inputs_that_require_a_gradient_are_compared_too():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32)
    x = torch.randn(5, 2, 16, requires_grad=True)
    report = fastattn.verify(layer, x)
    assert ("gradient", "input 0") in {(r.kind, r.figure.name) for r in report.rows}
    assert x.grad is None
    outputs_only = fastattn.verify(layer, x, gradients=False)
    assert {r.kind for r in outputs_only.rows} == {"layer", "output"}


def test_a_failing_model_says_in_which_copy():
    class Picky(nn.Module):
        def forward(self, x):
            if x.dtype == torch.float64:
                raise RuntimeError("float32 only")
            return x

    with pytest.raises(RuntimeError, match="float32 only") as caught:
        fastattn.verify(Picky(), torch.randn(3, requires_grad=True))
    assert "float64" in caught.value.__notes__[0]
