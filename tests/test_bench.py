"""The benchmark: every answer is checked before it is timed, and what it writes says what it did."""

from __future__ import annotations

import re
import sys
import time
from collections import Counter

import pytest
import torch

from fastattn.backends.cpu import CpuBackend
from fastattn.backends.extension import kernels
from fastattn.models import Seq2SeqConfig
from fastattn.tools import measure
from fastattn.tools.bench import (
    attention,
    decode,
    families,
    feed_forward,
    limits,
    measuring,
    model,
    page,
    peers,
    report,
    runner,
    scaling,
    softmax,
)

pytestmark = pytest.mark.filterwarnings("ignore::fastattn.FallbackWarning", "ignore:enable_nested_tensor")


def _small_grid():
    return {
        "attention": {
            "rows": [
                {"name": name, "batch": 2, "heads": heads, "seq_len": [9, 9], "head_dim": 8, "causal": causal, **more}
                for name, heads, causal, more in (
                    ("plain", [2, 2], False, {}),
                    ("causal", [2, 2], True, {}),
                    ("gqa", [4, 2], True, {}),
                    ("lengths", [2, 2], False, {"key_lengths": True}),
                    ("window", [2, 2], True, {"window": 3}),
                    ("bias", [2, 2], False, {"bias": "learned"}),
                    ("dropout", [2, 2], False, {"dropout": 0.3}),
                )
            ]
        },
        "decode": {"rows": [{"name": "one", "batch": 1, "heads": [4, 2], "cache": 33, "head_dim": 8}]},
        "packed": {
            "rows": [
                {"name": "some", "lengths": [9, 4], "heads": [4, 2], "head_dim": 8, "causal": True},
                {
                    "name": "single",
                    "lengths": [9, 4],
                    "times": 2,
                    "queries": 1,
                    "heads": [4, 2],
                    "head_dim": 8,
                    "causal": True,
                },
            ]
        },
        "paged": {"rows": [{"name": "pages", "batch": 2, "heads": [4, 2], "cache": 33, "page_size": 8, "head_dim": 8}]},
        "softmax": {"rows": [[7, 33]]},
        "feed_forward": {"rows": [[5, 8, 16, "relu"], [5, 8, 16, "swiglu"]]},
        "linear_cross_entropy": {"rows": [[5, 8, 33]]},
        "rotary": {"rows": [[2, 4, 2, 7, 16]]},
        "embedding": {"rows": [[2, 5, 9, 16]]},
        "module": {"rows": [[2, 5, 16, 2]]},
        "model": {
            "generate": [{"batch": 2, "source": 5, "new_tokens": 4}],
            "train_step": [{"batch": 2, "source": 5, "target": 6}],
        },
        "threads": {"rows": [{"name": "ff", "shape": [5, 8, 16, "relu"]}]},
        "scaling": {
            "rows": [
                {"name": name, "seq_lens": [8, 16], "head_dim": 8, **more}
                for name, more in (
                    ("causal", {"causal": True}),
                    ("window", {"causal": True, "window": 3, "dense_up_to": 8}),
                    ("dropout", {"causal": True, "dropout": 0.3}),
                    ("relative-bias", {"causal": True}),
                    ("weights-entropy", {}),
                )
            ]
        },
        "overhead": families.grid()["overhead"],
    }


# Cases of each family on that grid, which tells a family that forgets some.
COUNTS = {
    "attention": 7 * 2,
    "decode": 1,
    "packed": 2 + 1,
    "paged": 1,
    "softmax": 4 * 2,
    "feed_forward": 2 * 2,
    "linear_cross_entropy": 2,
    "rotary": 2,
    "embedding": 2,
    "module": 3,
    "model": 3,
    "threads": 2,
    "scaling": 5 * 2,
    "overhead": 2 + 2 + 1 + 4 * 2 + 2 + 2 + 3,
}


@pytest.fixture
def small(monkeypatch):
    """The benchmark on a tiny grid, with a tiny model, in a few rounds."""
    tiny = _small_grid()
    sizes = {"model_dim": 16, "num_heads": 2, "ff_dim": 32, "num_encoder_layers": 2, "num_decoder_layers": 2}
    monkeypatch.setattr(families, "grid", lambda: tiny)
    monkeypatch.setattr(model, "BASE", Seq2SeqConfig(source_vocab_size=20, target_vocab_size=30, **sizes))
    monkeypatch.setattr(runner, "_BUDGET", 0.0)
    monkeypatch.setattr(limits, "_STREAMED", 1 << 16)
    monkeypatch.setattr(limits, "_STREAMED_PER_THREAD", 0)
    monkeypatch.setattr(limits, "_BUDGET", 0.0)
    # How much an op's calls hold is test_memory's matter, and here the tests' own.
    monkeypatch.setattr(measuring, "peak_memory", lambda call, device: 1000 if call() is not None else None)


def _own(lines):
    return [line for line in lines if "family" in line]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_family_is_checked_and_timed(dtype, small, tmp_path, capsys):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    assert runner.run(["all"], dtypes=[dtype], peer_names=["torch SDPA", "torch eager", "torch.nn"], out=tmp_path) == 0
    torch.set_num_threads(threads)
    first, *lines, last = page.read(tmp_path / runner.RESULTS)
    assert last["other_cores"] is None or last["other_cores"] >= 0
    assert first["environment"]["torch"] == str(torch.__version__)
    assert Counter(line["family"] for line in lines) == {
        **COUNTS,
        "softmax": COUNTS["softmax"] + (0 if CpuBackend().unavailable() else 2),
    }
    assert len({(line["family"], line["row"], line["direction"]) for line in lines}) == len(lines)
    for line in lines:
        assert "note" not in line
        # By a few tensors of a few elements nobody can tell dropout from an error.
        assert "left_out" not in line or "dropout" in line["row"]
        times = line["times_us"]
        assert all(0 < t["p20"] <= t["median"] <= t["p80"] for t in times.values())
        others = {name: t["median"] for name, t in times.items() if name != "fastattn"}
        if others:
            assert line["best_peer"] == min(others, key=others.get)
            assert line["ratio"] == pytest.approx(others[line["best_peer"]] / times["fastattn"]["median"])
        else:
            assert "ratio" not in line
            assert line["family"] == "scaling" or "left_out" in line
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 120
    for summary in report.summaries(lines):
        assert report.sentence(summary) in printed


@pytest.mark.parametrize(
    ("module", "name", "family"),
    [
        (attention, "attention", "attention"),
        (decode, "attention", "decode"),
        (feed_forward, "feed_forward", "feed_forward"),
        (scaling, "attention_weights", "scaling"),
    ],
)
def test_a_wrong_kernel_is_not_timed(module, name, family, small, monkeypatch, capsys):
    original = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *args, **kwargs: original(*args, **kwargs) * 1.001)
    row = ["weights-entropy"] if family == "scaling" else None
    assert runner.run([family], names=row, peer_names=[]) == 1
    printed = capsys.readouterr().out
    assert "WRONG" in printed
    assert "ratio to" not in printed


def test_a_wrong_gradient_is_not_timed(small, monkeypatch):
    original = softmax._OURS["softmax"]

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            out = original(x)
            ctx.save_for_backward(out)
            return out

        @staticmethod
        def backward(ctx, dout):
            return dout * ctx.saved_tensors[0]

    monkeypatch.setitem(softmax._OURS, "softmax", Wrong.apply)
    lines = [
        line
        for case in families.cases("softmax", torch.float32, None)
        for line in measuring.measure(case, torch.float32, FEW)
    ]
    notes = {(line["row"], line["direction"]): line.get("note") for line in lines}
    assert notes["softmax 7x33", "forward"] is None
    assert notes["softmax 7x33", "forward + backward"] == "WRONG"
    assert notes["log_softmax 7x33", "forward + backward"] is None


FEW = measuring.Settings(budget=0.0)


class _Peer(peers.Peer):
    name = "a peer"

    def __init__(self, decode):
        self.decode = decode


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda work: lambda: work.query * 0, "off by"),
        (lambda work: lambda: work.query[0], "of shape"),
        (lambda work: 1 / 0, "ZeroDivisionError"),
    ],
)
def test_a_peer_that_computes_something_else_is_left_out_and_said_so(call, reason, small):
    (case,) = families.cases("decode", torch.float32, None)
    (line,) = measuring.measure(case, torch.float32, measuring.Settings(chosen=[_Peer(call)], budget=0.0))
    assert reason in line["left_out"]["a peer"]
    assert list(line["times_us"]) == ["fastattn"]
    (line,) = measuring.measure(case, torch.float32, measuring.Settings(chosen=[_Peer(lambda work: None)], budget=0.0))
    assert "left_out" not in line


def test_backends_stand_side_by_side(small):
    (case,) = families.cases("decode", torch.float32, None)
    settings = measuring.Settings(backends=["auto", "reference"], budget=0.0)
    automatic, reference = measuring.measure(case, torch.float32, settings)
    assert reference["backend"] == "reference"
    assert reference["served_by"] == ["reference"]
    assert automatic["times_us"] != reference["times_us"]
    assert len(report.latest([automatic, reference])) == 2


def test_threads_are_put_back(small):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for case in families.cases("threads", torch.float32, None):
            assert list(case.others) == ["fastattn, 1 thread"]
            case.before["fastattn, 1 thread"]()
            assert torch.get_num_threads() == 1
            case.before["fastattn"]()
            assert torch.get_num_threads() == 2
            torch.set_num_threads(1)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_the_page_is_self_contained_and_drawn_from_the_lines_alone(small, tmp_path):
    pytest.importorskip("matplotlib")
    runner.run(["decode", "scaling"], peer_names=["torch SDPA"], out=tmp_path)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"""(src|href)=["'](?!data:)|@import|url\(""", text)
    pictures = {path.stem for path in tmp_path.glob("*.png")}
    assert {"ratio-decode", "scaling-time", "scaling-memory"} <= pictures
    assert text.count("<img") == len(pictures)
    for path in tmp_path.glob("*.png"):
        assert path.stat().st_size < 300_000
    lines = page.read(tmp_path / runner.RESULTS)
    for line in _own(lines):
        assert f">{line['row']}</td>" in text
    again = tmp_path / "again"
    again.mkdir()
    page.write(lines, again)
    assert (again / "report.html").read_text(encoding="utf-8") == text


def test_without_matplotlib_the_page_has_tables_and_says_so(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    runner.run(["decode"], peer_names=["torch SDPA"], out=tmp_path)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "matplotlib is not installed" in text
    assert "<table>" in text
    assert "<img" not in text
    assert not list(tmp_path.glob("*.png"))
    assert "matplotlib is not installed" in capsys.readouterr().out


def test_a_second_run_is_appended_and_the_last_row_counts(small, tmp_path):
    for _ in range(2):
        runner.run(["decode"], peer_names=[], out=tmp_path)
    lines = page.read(tmp_path / runner.RESULTS)
    assert len(_own(lines)) == 2
    assert report.latest(lines) == _own(lines)[1:]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"families": ["atention"]}, "'attention'"),
        ({"families": ["attention"], "names": ["shrt"]}, "shrt"),
        ({"backends": ["gpu"]}, "'cpu'"),
        ({"peer_names": ["torch"]}, "'torch SDPA'"),
        ({"device": "tpu"}, "'cuda'"),
        ({"device": "cuda:x"}, "'cuda'"),
        ({"device": "cuda"}, "no CUDA device"),
    ],
)
def test_what_is_refused_before_anything_runs(arguments, message, capsys):
    if arguments.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ValueError, match=message):
        runner.run(**arguments)
    assert capsys.readouterr().out == ""


def test_summaries():
    lines = [
        {"family": "f", "row": row, "direction": "d", "dtype": "float32", "ratio": ratio, "times_us": {}}
        for row, ratio in (("a", 8.0), ("b", 0.5), ("a", 2.0))
    ]
    (summary,) = report.summaries(lines)
    assert summary == report.Summary("f", "float32", "d", "auto", 2, 1.0, 0.5, "b")


def test_limits_are_rates_of_this_machine():
    if CpuBackend().unavailable():
        assert limits.measure() is None
        return
    found = limits.measure()
    # A core of the last 15 years does 1 to 400 GFLOP/s, and products on tiles are no slower than multiply-adds.
    assert 0.5 < found.float32 < 1e5
    assert found.bfloat16 >= 0.9 * found.float32
    assert 0.5 < found.read < 5e3
    assert 0.5 < found.copy < 5e3


@pytest.mark.parametrize("fit", [(255, 0), (256, 1)], ids=["odd length", "odd address"])
def test_memory_that_cannot_be_streamed_is_refused(fit):
    if CpuBackend().unavailable():
        pytest.skip("needs the kernels")
    count, offset = fit
    memory = limits._aligned(1024)[offset : offset + count]
    with pytest.raises(ValueError, match="256"):
        kernels().read_memory(memory)
    with pytest.raises(ValueError, match="256"):
        kernels().copy_memory(limits._aligned(256), memory)
    with pytest.raises(ValueError, match="nowhere"):
        kernels().copy_memory(limits._aligned(256), None)


def test_timing_in_turns_leaves_the_hopeless_out():
    slow = [0.0]

    def wait():
        slow[0] += 1
        time.sleep(0.01)

    quick, late = measure.time_in_turns([lambda: None, wait], budget=0.05, min_repeats=3, patience=4.0)
    assert late.repeats == 3
    assert slow[0] == 4
    assert quick.repeats > 50
    assert late.median > quick.median


def test_the_grid_has_every_family():
    assert set(families.FAMILIES) <= set(families.grid())
    assert families.rows("attention", device="cuda")[0][0] == "d64-full"
    assert "gpu" not in dict(families.rows("decode"))
    assert "gpu" in dict(families.rows("decode", device="cuda"))
