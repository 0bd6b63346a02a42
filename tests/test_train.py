"""Training: resuming to the bit, whatever interrupts it, and never losing a run."""

from __future__ import annotations

import argparse
import math
import os
import signal

import pytest
import torch

from fastattn.models import Seq2Seq, Seq2SeqConfig, g2p
from fastattn.models.files import load_checkpoint, previous_checkpoint
from fastattn.tools import train
from fastattn.tools.train import Interrupted, Pairs, Trainer, TrainSettings

pytestmark = pytest.mark.filterwarnings("ignore:.*reference backend")

DICTIONARY = g2p.parse_dictionary(
    "\n".join(f"{a}{b}{c} {a.upper()} {b.upper()} {c.upper()}" for a in "bdgk" for b in "aeo" for c in "lmnrst")
)
SETTINGS = TrainSettings(epochs=2, batch_size=8, warmup_steps=4, save_seconds=1e9)


def trainer(out, settings=SETTINGS, said=None, **changes):
    """A fresh trainer, as a new process would make it."""
    tokenizer = g2p.train_tokenizer(DICTIONARY)
    torch.manual_seed(settings.seed)
    shape = {
        "model_dim": 8,
        "num_heads": 2,
        "ff_dim": 12,
        "num_encoder_layers": 1,
        "num_decoder_layers": 1,
        "max_len": 8,
    }
    config = Seq2SeqConfig(tokenizer.source.vocab_size, tokenizer.target.vocab_size, **{**shape, **changes})
    say = (lambda _: None) if said is None else said.append
    return Trainer(Seq2Seq(config, tokenizer), g2p.pairs(DICTIONARY), out, settings, say=say)


def assert_same(first, second):
    for name, tensor in first.model.state_dict().items():
        assert torch.equal(tensor, second.model.state_dict()[name]), name
    states = [t.optimizer.state_dict()["state"] for t in (first, second)]
    for index, state in states[0].items():
        for name, value in state.items():
            assert torch.equal(value, states[1][index][name]), (index, name)
    assert first.history == second.history
    assert first.step == second.step


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    made = trainer(tmp_path_factory.mktemp("whole"))
    made.run()
    return made


def failing_at(made, step, error=KeyError):
    """Let the step after ``step`` fail, as a crash would."""
    inner = made._train_step

    def train_step(*batch):
        if made.step == step:
            raise error
        return inner(*batch)

    made._train_step = train_step


@pytest.mark.parametrize("step", [1, 5, 9, 13, 17])  # 9 steps an epoch
def test_a_stopped_run_resumes_to_the_same_bits(tmp_path, uninterrupted, step):
    first = trainer(tmp_path)
    inner = first._train_step

    def train_step(*batch):
        if first.step == step - 1:
            first.stop()
        return inner(*batch)

    first._train_step = train_step
    with pytest.raises(Interrupted):
        first.run()
    assert first.step == step
    torch.manual_seed(999)  # another process has other random numbers
    torch.rand(100)
    second = trainer(tmp_path)
    assert second.resume()
    second.run()
    assert_same(uninterrupted, second)


def test_a_killed_run_loses_only_what_was_not_saved(tmp_path, uninterrupted):
    first = trainer(tmp_path, TrainSettings(epochs=2, batch_size=8, warmup_steps=4, save_seconds=0.0))
    failing_at(first, 12)
    with pytest.raises(KeyError):
        first.run()
    said = []
    second = trainer(tmp_path, said=said)  # save_seconds is free to differ
    assert second.resume()
    assert said == [f"resuming {tmp_path / 'training.pt'} after 12 of 18 steps"]
    second.run()
    assert_same(uninterrupted, second)


def damage(path, how):
    content = path.read_bytes()
    if how == "flipped":  # one bit inside a tensor: torch.load alone would not notice
        middle = len(content) // 2
        content = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    path.write_bytes(
        {"empty": b"", "half": content[: len(content) // 2], "foreign": b"PK\x03\x04 zip"}.get(how, content)
    )


@pytest.mark.parametrize("how", ["empty", "half", "flipped", "foreign"])
def test_a_damaged_checkpoint_never_loses_the_run(tmp_path, uninterrupted, how):
    first = trainer(tmp_path, TrainSettings(epochs=2, batch_size=8, warmup_steps=4, save_seconds=0.0))
    failing_at(first, 12)
    with pytest.raises(KeyError):
        first.run()
    path = tmp_path / "training.pt"
    damage(path, how)
    with pytest.raises(ValueError, match=r"training\.pt is (damaged|not a training checkpoint)"):
        load_checkpoint(path)
    said = []
    second = trainer(tmp_path, said=said)
    assert second.resume()
    assert "training.pt is" in said[0]
    assert not path.exists()  # the next save must not put it in place of the good one
    assert said[1] == f"resuming {previous_checkpoint(path)} after 11 of 18 steps"
    second.run()
    assert_same(uninterrupted, second)

    damage(path, how)
    damage(previous_checkpoint(path), how)
    with pytest.raises(ValueError, match=r"every checkpoint in .* was damaged"):
        trainer(tmp_path).resume()


def test_an_interrupted_write_leaves_the_checkpoint_whole(tmp_path, monkeypatch):
    made = trainer(tmp_path)
    made.save()
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        made.save()
    assert [p.name for p in tmp_path.iterdir()] == ["training.pt"]
    load_checkpoint(tmp_path / "training.pt")


def test_another_run_is_refused(tmp_path):
    made = trainer(tmp_path)
    made.save()
    for other, message in (
        (trainer(tmp_path, TrainSettings(epochs=2, batch_size=4, warmup_steps=4)), r"batch_size=8 \(now 4\)"),
        (trainer(tmp_path, ff_dim=16), r"ff_dim=12 \(now 16\)"),
    ):
        with pytest.raises(ValueError, match=f"of another run: {message}.*--restart"):
            other.resume()
    assert not trainer(tmp_path / "elsewhere").resume()


def test_a_trapezoid_may_change_its_length_before_it_falls(tmp_path):
    settings = {"batch_size": 8, "warmup_steps": 4, "cooldown": 0.5, "save_seconds": 1e9}
    whole = trainer(tmp_path / "whole", TrainSettings(epochs=2, **settings))
    whole.run()
    first = trainer(tmp_path / "parts", TrainSettings(epochs=3, **settings))
    failing_at(first, 9)
    with pytest.raises(KeyError):
        first.run()
    second = trainer(tmp_path / "parts", TrainSettings(epochs=2, **settings))
    assert second.resume()
    second.run()
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, second.model.state_dict()[name]), name
    with pytest.raises(ValueError, match=r"epochs=2 \(now 3\)"):  # by now it has fallen
        trainer(tmp_path / "parts", TrainSettings(epochs=3, **settings)).resume()


def test_a_loss_that_is_not_finite_stops_without_harm(tmp_path):
    made = trainer(tmp_path)
    made.save()
    before = (tmp_path / "training.pt").read_bytes()
    with torch.no_grad():
        made.model.target_embedding.weight.fill_(math.inf)
    with pytest.raises(FloatingPointError, match=r"step 0 has loss .*a lower learning rate"):
        made.run()
    assert (tmp_path / "training.pt").read_bytes() == before


def test_training_learns(tmp_path):
    made = trainer(tmp_path, TrainSettings(epochs=40, batch_size=8, warmup_steps=4, learning_rate=1e-2), dropout=0.0)
    made.run()
    assert g2p.evaluate(made.model.eval(), DICTIONARY).word < 20.0
    losses = [float(line.split("loss ")[1]) for line in made.history]
    assert losses[-1] < 0.5 * losses[0]


# ---- schedule and data


def test_rates():
    def rates(steps, total=100, **settings):
        return [TrainSettings(learning_rate=1.0, warmup_steps=10, **settings).rate(step, total) for step in steps]

    assert rates([0, 4, 9, 30, 59]) == pytest.approx([0.1, 0.5, 1.0, 1.0, 1.0])
    assert rates([60, 70, 100, 110]) == pytest.approx([1.0, 0.5, 0.0, 0.0])  # 1 - sqrt(1/4)
    assert rates([4, 10, 55, 100], schedule="cosine") == pytest.approx([0.5, 1.0, 0.5, 0.0])
    assert rates([4, 9, 39, 999], schedule="inverse_sqrt") == pytest.approx([0.5, 1.0, 0.5, 0.1])


@pytest.mark.parametrize(
    "bad",
    [{"schedule": "linear"}, {"epochs": 0}, {"learning_rate": -1.0}, {"cooldown": 0.0}, {"clip_norm": math.nan}],
    ids=str,
)
def test_bad_settings_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        TrainSettings(**bad)


def test_batches_hold_every_pair_once_and_depend_on_seed_and_epoch(tmp_path):
    made = trainer(tmp_path)
    pairs = [("b" * (1 + i % 5), "B " * (1 + i % 3)) for i in range(50)]
    data = Pairs(pairs, made.model)
    batches = data.batches(8, seed=0, epoch=0)
    assert sorted(i for batch in batches for i in batch) == list(range(50))
    assert [len(batch) for batch in sorted(batches, key=len)] == [2, 8, 8, 8, 8, 8, 8]
    assert batches == data.batches(8, 0, 0)
    assert batches != data.batches(8, 0, 1)
    assert batches != data.batches(8, 1, 0)
    spread = [max(len(pairs[i][0]) for i in batch) - min(len(pairs[i][0]) for i in batch) for batch in batches]
    assert max(spread) <= 1
    source, target = data.tensors([0, 4])
    assert source.tolist() == [[4, 2, 0, 0, 0, 0], [4, 4, 4, 4, 4, 2]] or source.shape == (2, 6)
    assert target[:, 0].tolist() == [1, 1]
    assert (target == 2).sum(1).tolist() == [1, 1]


def test_bad_data_is_refused(tmp_path):
    model = trainer(tmp_path).model
    with pytest.raises(ValueError, match="no pairs"):
        Pairs([], model)
    with pytest.raises(ValueError, match="longer than max_len=8"):
        Pairs([("b" * 8, "B")], model)
    with pytest.raises(ValueError, match="with a tokenizer"):
        Pairs([("b", "B")], Seq2Seq(model.config.replace(tokenizer_fingerprint=None)))


# ---- the command


def arguments(out, *more):
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    tiny = "--model-dim=8 --heads=2 --ff-dim=12 --layers=1 --epochs=2 --batch-size=8 --validation-words=5"
    return parser.parse_args(["g2p", "--out", str(out), *tiny.split(" "), *more])


@pytest.fixture
def small_task(monkeypatch):
    monkeypatch.setattr(g2p, "load_split", lambda: g2p.split_dictionary(DICTIONARY, 10, 10))


def test_the_command_trains_measures_and_saves(tmp_path, small_task, capfd):
    assert train.main(arguments(tmp_path)) == 0
    out, err = capfd.readouterr()
    assert "epoch 2/2: loss " in out
    assert "validation PER" in out
    assert "held-out words, 5 beams: PER" in out
    assert "words/s" in err
    assert "loss=" in err
    model = Seq2Seq.from_pretrained(tmp_path / "model")
    assert model.config.metadata["held_out_words"] == 10
    assert set(model.config.metadata["greedy"]) == {"PER", "WER"}
    assert g2p.pronounce(["bal"], model)

    assert train.main(arguments(tmp_path)) == 0  # complete: measures again, trains nothing
    assert "resuming" in capfd.readouterr().out


def test_ctrl_c_saves_and_the_same_command_goes_on(tmp_path, small_task, capfd, monkeypatch):
    assert train.main(arguments(tmp_path / "whole")) == 0
    inner, steps = Trainer._train_step, []

    def train_step(self, *batch):
        steps.append(1)
        if len(steps) == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return inner(self, *batch)

    monkeypatch.setattr(Trainer, "_train_step", train_step)
    before = signal.getsignal(signal.SIGINT)
    assert train.main(arguments(tmp_path / "parts")) == 130
    assert signal.getsignal(signal.SIGINT) is before
    assert "interrupted and saved after 4 steps" in capfd.readouterr().out
    assert train.main(arguments(tmp_path / "parts")) == 0
    whole, parts = (tmp_path / name / "model" / "model.safetensors" for name in ("whole", "parts"))
    assert whole.read_bytes() == parts.read_bytes()


def test_the_command_refuses_another_run_and_restarts_when_told(tmp_path, small_task):
    assert train.main(arguments(tmp_path, "--epochs", "1")) == 0
    with pytest.raises(ValueError, match=r"seed=0 \(now 1\)"):
        train.main(arguments(tmp_path, "--seed", "1"))
    assert train.main(arguments(tmp_path, "--seed", "1", "--restart")) == 0
    with pytest.raises(ValueError, match="at least one word"):
        train.main(arguments(tmp_path, "--words", "0"))
