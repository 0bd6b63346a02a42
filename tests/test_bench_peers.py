"""The benchmark's peers: each computes what the workload says, and one that does not is reported and never timed."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from fastattn.models import Seq2SeqConfig
from fastattn.tools.bench import families, model, peers
from fastattn.tools.bench.peers.check import Check
from fastattn.tools.bench.peers.peer import Peer
from fastattn.tools.bench.workload import AttentionWorkload, DecodeWorkload, SoftmaxWorkload

pytestmark = pytest.mark.filterwarnings("ignore:enable_nested_tensor")

PRESENT = [peer for peer in peers.PEERS if peer.unavailable() is None]
QUICK = [peer for peer in PRESENT if not peer.slow_to_build]
ATTENTION = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"causal": True, "window": 5},
    "lengths": {"key_lengths": torch.tensor([7, 17])},
    "bias": {"bias": torch.randn(1, 4, 17, 17)},
    "dropout": {"dropout_p": 0.3},
}


def attention(dtype=torch.float32, heads=(4, 4), **more):
    generator = torch.Generator().manual_seed(3)
    shapes = [(2, heads[0], 17, 16), (2, heads[1], 17, 16), (2, heads[1], 17, 16), (2, heads[0], 17, 16)]
    query, key, value, dout = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    more = {name: v.to(dtype) if name == "bias" else v for name, v in more.items()}
    return AttentionWorkload(query, key, value, dout, **more)


def softmax(**more):
    return SoftmaxWorkload("softmax", torch.randn(5, 33), torch.randn(5, 33), **more)


@pytest.fixture
def small_model(monkeypatch):
    sizes = {"model_dim": 16, "num_heads": 2, "ff_dim": 32, "num_encoder_layers": 2, "num_decoder_layers": 2}
    monkeypatch.setattr(model, "BASE", Seq2SeqConfig(source_vocab_size=20, target_vocab_size=30, **sizes))


def workloads(family, row, dtype=torch.float32):
    return [case.workload for case in families.FAMILIES[family]("row", row, dtype, "cpu")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)], ids=["heads", "grouped"])
@pytest.mark.parametrize("kind", ATTENTION)
def test_every_peer_computes_attention(kind, heads, dtype):
    torch.manual_seed(7)  # dropout's draws
    offered = set()
    for backward in (False, True):
        found = peers.ready(attention(dtype, heads, backward=backward, **ATTENTION[kind]), QUICK)
        assert not found.failed
        offered |= set(found.calls)
    assert "torch SDPA" in offered


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)], ids=["heads", "grouped"])
def test_every_peer_decodes(heads, dtype):
    work = attention(dtype, heads)
    found = peers.ready(DecodeWorkload(work.query[:, :, :1].contiguous(), work.key, work.value), QUICK)
    assert not found.failed
    assert "torch SDPA" in found.calls


@pytest.mark.parametrize(
    ("family", "row", "peer"),
    [
        ("packed", {"lengths": [9, 4], "heads": [4, 2], "head_dim": 8, "causal": True}, "torch SDPA"),
        ("packed", {"lengths": [9, 4], "heads": [2, 2], "head_dim": 8, "causal": False}, "torch SDPA"),
        (
            "packed",
            {"lengths": [9], "times": 2, "queries": 1, "heads": [4, 2], "head_dim": 8, "causal": True},
            "torch SDPA",
        ),
        ("paged", {"batch": 2, "heads": [4, 2], "cache": 33, "page_size": 8, "head_dim": 8}, "torch SDPA"),
        ("softmax", [7, 33], "torch eager"),
        ("feed_forward", [5, 8, 16, "swiglu"], "torch eager"),
        ("module", [2, 5, 16, 2], "torch.nn"),
        ("model", {"task": "generate", "batch": 2, "source": 5, "new_tokens": 4}, "torch.nn"),
        ("model", {"task": "train_step", "batch": 3, "source": 5, "target": 6}, "torch.nn"),
    ],
    ids=lambda value: value.get("task", "") if isinstance(value, dict) else str(value),
)
def test_every_peer_computes_the_other_families(family, row, peer, small_model):
    for work in workloads(family, row):
        found = peers.ready(work, QUICK)
        assert not found.failed
        assert peer in found.calls


@pytest.mark.parametrize("peer", [peer for peer in PRESENT if peer.slow_to_build], ids=lambda peer: peer.name)
def test_compiled_peers_compute_attention(peer):
    found = peers.ready(attention(causal=True), [peer])
    assert list(found.calls) == [peer.name], found.failed


def test_ctranslate2_runs_the_same_model(small_model):
    pytest.importorskip("ctranslate2")
    (work,) = workloads("model", {"task": "generate", "batch": 8, "source": 6, "new_tokens": 5})
    generator = torch.Generator().manual_seed(5)
    special = [model.BASE.pad_id, model.BASE.bos_id, model.BASE.eos_id, model.BASE.unk_id]
    with torch.no_grad():
        for parameter in work.stock.parameters():  # every bias and every norm counts
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.4)
        work.stock.target_embedding.weight[special] = 0.0
    (peer,) = peers.chosen(["CTranslate2"])
    tokens = peer.call(work)()
    assert tokens == model.stock_call(work)()[:, 1:].tolist()
    assert len({token for row in tokens for token in row}) > 3


def test_switches_are_put_back():
    flash, fast = torch.backends.cuda.flash_sdp_enabled(), torch.backends.mha.get_fastpath_enabled()
    work = workloads("module", [2, 5, 16, 2])[0]
    assert not work.training
    for name, offered in (("torch SDPA (math)", attention()), ("torch.nn (fast path off)", work)):
        peers.ready(offered, peers.chosen([name])).calls[name]()
    assert torch.backends.cuda.flash_sdp_enabled() == flash
    assert torch.backends.mha.get_fastpath_enabled() == fast


class Strange(Peer):
    name = "strange"

    def __init__(self, answer):
        self.answer = answer

    def attention(self, work):
        return self.answer(work)


def test_a_peer_that_fails_or_is_wrong_is_reported_and_not_timed():
    def broken():
        raise RuntimeError("no such kernel\nand more")

    def unbuilt(work):
        raise OSError("cannot load")

    strange = {
        "failed: RuntimeError: no such kernel": lambda work: broken,
        "failed: OSError: cannot load": unbuilt,
        "wrong answer": lambda work: lambda: F.scaled_dot_product_attention(*work.tensors) * 1.001,
        "wrong answer: of shape": lambda work: lambda: work.query[:, :, 1:],
        "off by inf": lambda work: lambda: work.query * float("nan"),
    }
    for reason, answer in strange.items():
        found = peers.ready(attention(), [Strange(answer), *peers.chosen(["torch SDPA"])])
        assert list(found.calls) == ["torch SDPA"]
        assert reason in found.failed["strange"]
    assert peers.ready(attention(), [Strange(lambda work: None)]) == ({}, {}, {})


def test_what_a_peer_leaves_out_is_noticed():
    torch.manual_seed(7)  # dropout's draws
    work = attention(causal=True)
    assert Check(work).wrong(F.scaled_dot_product_attention(*work.tensors)) is not None
    assert Check(work).wrong(F.scaled_dot_product_attention(*work.tensors, is_causal=True)) is None
    work = attention(dropout_p=0.3)
    assert Check(work).wrong(F.scaled_dot_product_attention(*work.tensors)) is not None
    assert Check(work).wrong(F.scaled_dot_product_attention(*work.tensors, dropout_p=0.9)) is not None
    assert Check(work).wrong(F.scaled_dot_product_attention(*work.tensors, dropout_p=0.3)) is None
    work = softmax(backward=True)
    assert Check(work).wrong((work.dout,)) is not None
    # Another dtype's arithmetic is another computation.
    rounded = [t.bfloat16() for t in attention().tensors]
    assert Check(attention()).wrong(F.scaled_dot_product_attention(*rounded).float()) is not None


def test_wrong_tokens_are_noticed(small_model):
    (work,) = workloads("model", {"task": "generate", "batch": 2, "source": 5, "new_tokens": 4})
    right = torch.as_tensor(peers.ready(work, peers.chosen(["torch.nn"])).calls["torch.nn"]())
    assert Check(work).wrong(right) is None
    assert Check(work).wrong(right[:, 1:] - 1) is not None


def test_peers_are_chosen_by_name():
    assert [peer.name for peer in peers.chosen(["torch.nn", "torch SDPA"])] == ["torch.nn", "torch SDPA"]
    assert len({peer.name for peer in peers.PEERS}) == len(peers.PEERS)
    assert set(peers.chosen(quick=True)) < set(peers.chosen())
    with pytest.raises(ValueError, match="'torch SDPA'"):
        peers.chosen(["nobody"])


def test_who_is_not_installed_says_so(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    names = ["ONNX Runtime", "OpenVINO", "CTranslate2"]
    reasons = peers.absent(peers.chosen(names))
    assert list(reasons) == names
    assert all(reason.startswith("not installed: ") for reason in reasons.values())
    assert peers.ready(attention(), peers.chosen(names)) == ({}, {}, {})
