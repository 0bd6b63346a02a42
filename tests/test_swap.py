"""swap(): the same objects and parameters, another forward; the same answers; and back."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

import fastattn
from fastattn.tools.exchange import OURS
from fastattn.tools.table import collapse

pytestmark = pytest.mark.filterwarnings("ignore::fastattn.FallbackWarning")

DIM = 16


def _transformer(**kwargs) -> nn.Transformer:
    torch.manual_seed(0)
    return nn.Transformer(DIM, 2, 1, 2, 32, batch_first=True, **kwargs)


def _batch(dtype=torch.float32):
    g = torch.Generator().manual_seed(1)
    return torch.randn(2, 7, DIM, generator=g, dtype=dtype), torch.randn(2, 5, DIM, generator=g, dtype=dtype)


MODELS = {
    "transformer": lambda: _transformer(),
    "encoder": lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(DIM, 2, 32, batch_first=True), 2),
    "decoder layer": lambda: nn.TransformerDecoderLayer(DIM, 2, 32, norm_first=True),
    "attention": lambda: nn.MultiheadAttention(DIM, 2, kdim=8, vdim=6, add_zero_attn=True),
    "in a model": lambda: nn.Sequential(nn.Linear(DIM, DIM), nn.TransformerEncoderLayer(DIM, 2, 32), nn.Linear(DIM, 3)),
}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
def test_every_object_parameter_and_key_stays(make):
    model = make()
    modules = dict(model.named_modules())
    parameters = dict(model.named_parameters())
    state = copy.deepcopy(model.state_dict())
    report = fastattn.swap(model)
    assert report.swapped
    assert dict(model.named_modules()) == modules
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any(type(m) in OURS for m in model.modules())
    report.undo()
    assert not any(type(m) in OURS.values() for m in model.modules())


def test_swapped_outputs_and_gradients_are_those_of_float64():
    model = _transformer(dropout=0.0)
    src, tgt = _batch()
    exact = copy.deepcopy(model).double()
    expected = exact(src.double(), tgt.double())
    expected.square().sum().backward()
    fastattn.swap(model)
    out = model(src, tgt)
    out.square().sum().backward()
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)
    for (name, p), q in zip(model.named_parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(p.grad.double(), q.grad, atol=1e-4, rtol=1e-4, msg=name)


def test_an_optimizer_made_before_trains_the_swapped_model():
    model, twin = _transformer(dropout=0.0), _transformer(dropout=0.0)
    optimizers = [torch.optim.SGD(m.parameters(), lr=1e-2, momentum=0.9) for m in (model, twin)]
    fastattn.swap(model)
    src, tgt = _batch()
    for _ in range(3):
        for m, optimizer in zip((model, twin), optimizers, strict=True):
            optimizer.zero_grad()
            m(src, tgt).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(model(src, tgt), twin(src, tgt), atol=1e-4, rtol=1e-4)


def test_mode_dtype_and_hooks_stay():
    model = _transformer().to(torch.bfloat16).eval()
    calls = []
    model.encoder.layers[0].self_attn.register_forward_hook(lambda *_: calls.append("attention"))
    model.encoder.layers[0].linear1.register_forward_hook(lambda *_: calls.append("linear1"))
    model.encoder.norm.register_forward_pre_hook(lambda *_: calls.append("norm"))
    fastattn.swap(model)
    assert not any(m.training for m in model.modules())
    with torch.no_grad():
        assert model(*_batch(torch.bfloat16)).dtype == torch.bfloat16
    assert calls == ["attention", "linear1", "norm"]


def test_evaluation_runs_the_swapped_code_and_float_masks_are_right():
    # torch's fast path would read the weights itself and take a float mask for a bool one.
    layer = nn.TransformerEncoderLayer(DIM, 2, 32, batch_first=True).eval()
    x = _batch()[0]
    mask = torch.linspace(-3, 3, 49).view(7, 7)
    slow = layer(x, src_mask=mask).detach()  # with a graph, so on the slow path
    fastattn.swap(layer)
    with torch.no_grad():
        torch.testing.assert_close(layer(x, src_mask=mask), slow, atol=1e-5, rtol=1e-5)


def test_swapping_twice_changes_nothing_more():
    model = _transformer()
    first = fastattn.swap(model)
    types = [type(m) for m in model.modules()]
    second = fastattn.swap(model)
    assert not second.swapped
    assert second.already == len(first.swapped)
    second.undo()
    assert [type(m) for m in model.modules()] == types
    first.undo()
    first.undo()
    assert type(model) is nn.Transformer


def test_only_this_instance_changes():
    one, other = _transformer(), _transformer()
    fastattn.swap(one)
    assert type(other) is nn.Transformer
    assert type(nn.Transformer(DIM, 2, 1, 1, 32, batch_first=True)) is nn.Transformer


def test_a_shared_module_is_swapped_once():
    shared = nn.MultiheadAttention(DIM, 2)
    model = nn.ModuleList([shared, shared])
    assert len(fastattn.swap(model).swapped) == 1


class _OwnAttention(nn.MultiheadAttention):
    def forward(self, query, key, value, **kwargs):
        return query, None


def test_what_is_left_alone_says_why():
    patched = nn.MultiheadAttention(DIM, 2)
    patched.forward = lambda query, key, value: (query, None)
    model = nn.ModuleDict(
        {
            "own": _OwnAttention(DIM, 2),
            "patched": patched,
            "complex": nn.MultiheadAttention(DIM, 2, dtype=torch.complex64),
            "derived": type("Derived", (fastattn.nn.MultiheadAttention,), {})(DIM, 2),
            "good": nn.MultiheadAttention(DIM, 2),
        }
    )
    report = fastattn.swap(model)
    reasons = {item.name: item.reason for item in report.left_alone}
    assert [s.name for s in report.swapped] == ["good"]
    assert set(reasons) == {"own", "patched", "complex"}
    assert report.already == 1
    assert "code of its own" in reasons["own"]
    assert "replaced on this very object" in reasons["patched"]
    assert "complex64" in reasons["complex"]
    x = torch.randn(3, 1, DIM)
    assert model["own"](x, x, x)[0] is x
    assert "code of its own" in str(report)


def test_a_swapped_model_can_be_copied_and_pickled():
    model = _transformer(dropout=0.0)
    fastattn.swap(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    src, tgt = _batch()
    expected = model(src, tgt)
    assert torch.equal(torch.load(buffer, weights_only=False)(src, tgt), expected)
    assert torch.equal(copy.deepcopy(model)(src, tgt), expected)


def test_compiled_code_notices_a_swap():
    torch._dynamo.reset()
    layer = nn.TransformerEncoderLayer(DIM, 2, 32, batch_first=True, dropout=0.0)
    x = _batch()[0]
    compiled = torch.compile(layer, backend="aot_eager")
    expected = compiled(x)
    report = fastattn.swap(layer)
    torch.testing.assert_close(compiled(x), expected)
    report.undo()
    torch.testing.assert_close(compiled(x), expected)
    torch._dynamo.reset()


def test_certificate(capsys):
    model = _transformer(dropout=0.1)
    src, tgt = _batch()
    before = torch.get_rng_state()
    state = copy.deepcopy(model.state_dict())
    report = fastattn.swap(model, {"src": src, "tgt": tgt})
    certificate = report.certificate
    assert certificate is not None
    assert certificate.ok
    assert [c.what for c in certificate.costs] == ["forward", "training step"]
    assert {r.kind for r in certificate.report.rows} == {"layer", "output", "gradient"}
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert model.training
    printed = capsys.readouterr().out
    for part in ("modules now run on fastattn", "decoder.layers.0-1.self_attn", "training step", "peak memory"):
        assert part in printed
    assert fastattn.swap(_transformer(), [src, tgt], verbose=False).certificate is not None
    assert capsys.readouterr().out == ""


def test_only_modules_can_be_swapped():
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got int"):
        fastattn.swap(3)


def test_collapse():
    assert collapse(["a.0.b1", "a.2.b1", "a.11.b1"]) == "a.0-11.b1"
    assert collapse(["a"]) == "a"
