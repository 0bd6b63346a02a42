"""The benchmark: every answer is checked before it is timed, and what it writes says what it did."""

from __future__ import annotations

import json

import pytest
import torch

from fastattn.models import Seq2SeqConfig
from fastattn.tools.bench import decode, families, model, runner

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
        "softmax": {"rows": [[7, 33]]},
        "feed_forward": {"rows": [[5, 8, 16, "relu"], [5, 8, 16, "swiglu"]]},
        "module": {"rows": [[2, 5, 16, 2]]},
        "model": {
            "generate": [{"batch": 2, "source": 5, "new_tokens": 4}],
            "train_step": [{"batch": 2, "source": 5, "target": 6}],
        },
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bench_checks_and_times_every_family(dtype, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(families, "grid", _small_grid)
    small = {"model_dim": 16, "num_heads": 2, "ff_dim": 32, "num_encoder_layers": 2, "num_decoder_layers": 2}
    monkeypatch.setattr(model, "BASE", Seq2SeqConfig(source_vocab_size=20, target_vocab_size=30, **small))
    monkeypatch.setattr(
        runner, "time_in_turns", lambda calls, budget: [runner.Timing(call() is None, 0, 0, 1) for call in calls]
    )
    monkeypatch.setattr(runner.Result, "ratio", property(lambda self: 1.0))
    monkeypatch.setattr(runner.Result, "rate", property(lambda self: 1.0))
    out = tmp_path / "results.jsonl"
    assert runner.run(list(families.FAMILIES), None, [dtype], False, out) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert lines[0]["environment"]["torch"] == str(torch.__version__)
    rows = {(line["family"], line["row"], line["direction"]) for line in lines[1:]}
    assert len(rows) == len(lines) - 1 == 7 * 2 + 1 + 2 + 2 * 2 + 2 + 2
    assert ("attention", "bias", "forward + backward") in rows
    assert {("model", "generate-2x5x4", "greedy"), ("model", "train_step-2x5x6", "train step")} <= rows
    assert all("note" not in line for line in lines[1:])
    assert "ratio" in capsys.readouterr().out


def test_bench_times_no_wrong_answer(monkeypatch, capsys):
    monkeypatch.setattr(families, "grid", _small_grid)
    original = decode.attention
    monkeypatch.setattr(decode, "attention", lambda *args, **kwargs: original(*args, **kwargs) * 1.001)
    assert runner.run(["decode"], None, [torch.float32], False, None) == 1
    assert "WRONG" in capsys.readouterr().out


def test_the_grid_has_every_family():
    assert set(families.FAMILIES) <= set(families.grid())
