"""The training loop: teacher forcing that resumes to the bit; and ``fastattn train``."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import math
import pathlib
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastattn.models import Seq2Seq, Seq2SeqConfig, files, g2p
from fastattn.models.tokenizer import pad


class Interrupted(Exception):
    """The run was asked to stop; its state is saved."""


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    """How to train; the defaults are those of the checkpoint that fastattn ships.

    Args:
        epochs: passes over the training pairs.
        batch_size: pairs a step.
        learning_rate: the peak.
        warmup_steps: steps of linear rise to it.
        schedule: after the rise, ``"trapezoid"`` stays at the peak and falls to zero as 1 - sqrt over the last
            ``cooldown`` of the run, so that the length of a run can still be changed while it stays (Haegele et al.
            2024: as good as a cosine); ``"cosine"`` falls to zero over the rest; ``"inverse_sqrt"`` falls as
            sqrt(warmup_steps / step).
        cooldown: fraction of the steps in which a trapezoid falls.
        weight_decay: of AdamW, on matrices only.
        clip_norm: the largest gradient norm.
        seed: of initial weights, order of batches and dropout.
        save_seconds: time between checkpoints, in seconds; no result depends on it.
        validation_words: words pronounced after each epoch.

    Raises:
        ValueError: a value outside its range.
    """

    epochs: int = 20
    batch_size: int = 128
    learning_rate: float = 1e-3
    warmup_steps: int = 400
    schedule: str = "trapezoid"
    cooldown: float = 0.4
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    seed: int = 0
    save_seconds: float = 60.0
    validation_words: int = 1350

    def __post_init__(self) -> None:
        if self.schedule not in ("trapezoid", "cosine", "inverse_sqrt"):
            raise ValueError(f'schedule must be "trapezoid", "cosine" or "inverse_sqrt", got {self.schedule!r}')
        for name in ("epochs", "batch_size", "learning_rate", "warmup_steps", "clip_norm", "validation_words"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not 0.0 < self.cooldown <= 1.0:
            raise ValueError(f"cooldown must be in (0, 1], got {self.cooldown}")

    def rate(self, step: int, total_steps: int) -> float:
        """Learning rate of step 0, 1, ...: a function of the step alone, so there is no scheduler state to save."""
        rise = min(1.0, (step + 1) / self.warmup_steps)
        if self.schedule == "inverse_sqrt":
            return self.learning_rate * min(rise, math.sqrt(self.warmup_steps / (step + 1)))
        if self.schedule == "cosine":
            progress = max(0, step - self.warmup_steps) / max(1, total_steps - self.warmup_steps)
            return self.learning_rate * rise * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
        fall = max(1.0, self.cooldown * total_steps)
        progress = max(0.0, step - (total_steps - fall)) / fall
        return self.learning_rate * rise * (1.0 - math.sqrt(min(1.0, progress)))


class Pairs:
    """Token ids of (source, target) texts, in batches of similar length.

    Raises:
        ValueError: no pairs, or one longer than the model's ``max_len``.
    """

    def __init__(self, pairs: Sequence[tuple[str, str]], model: Seq2Seq) -> None:
        tokenizer, config = model.tokenizer, model.config
        if tokenizer is None:
            raise ValueError("training on texts needs a model with a tokenizer")
        if not pairs:
            raise ValueError("there are no pairs to train on")
        self.pad_id = config.pad_id
        self.sources = [[*tokenizer.source.encode(text, on_unknown="ignore"), config.eos_id] for text, _ in pairs]
        targets = [tokenizer.target.encode(text, on_unknown="ignore") for _, text in pairs]
        self.targets = [[config.bos_id, *ids, config.eos_id] for ids in targets]
        for pair, source, target in zip(pairs, self.sources, self.targets, strict=True):
            if len(source) > config.max_len or len(target) - 1 > config.max_len:  # the last token is never an input
                raise ValueError(f"{pair} is longer than max_len={config.max_len} tokens")

    def __len__(self) -> int:
        return len(self.sources)

    @property
    def fingerprint(self) -> str:
        """Their number, and the start of a SHA-256 of their tokens."""
        return f"{len(self)}/{hashlib.sha256(repr((self.sources, self.targets)).encode()).hexdigest()[:12]}"

    def batches(self, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
        """Every index once, about equal lengths together, batches in random order; depends on the arguments alone."""
        shuffle = random.Random(f"{seed}/{epoch}")
        order = list(range(len(self)))
        shuffle.shuffle(order)  # sorting is stable, so that equal lengths stay shuffled
        order.sort(key=lambda i: (len(self.sources[i]), len(self.targets[i])))
        batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        shuffle.shuffle(batches)
        return batches

    def tensors(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Padded source ``[batch, source_len]`` and target ``[batch, target_len]`` of these pairs."""
        sources, targets = [self.sources[i] for i in indices], [self.targets[i] for i in indices]
        return pad(sources, self.pad_id), pad(targets, self.pad_id)


class Trainer:
    """Trains a Seq2Seq on pairs of texts, with AdamW.

    The state of a run (weights, optimizer, random numbers, position in the data) is in ``out/training.pt``, replaced
    whole every ``save_seconds``, after each epoch and on an interruption; the one before is kept beside it.  A run that
    resumes from it ends with the same bits as one that was never interrupted.  ``out/model`` holds the model after the
    last epoch.

    Args:
        model: to be trained in place.
        pairs: (source, target) texts.
        out: folder of the run; made if missing.
        settings: how to train.
        validate: called with the model in evaluation mode after each epoch; returns what to print.
        say: prints a line.

    Raises:
        ValueError: no pairs, or a pair that is too long.
    """

    def __init__(
        self,
        model: Seq2Seq,
        pairs: Sequence[tuple[str, str]],
        out: pathlib.Path,
        settings: TrainSettings,
        *,
        validate: Callable[[Seq2Seq], str] | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        self.model, self.out, self.settings, self.validate, self.say = model, out, settings, validate, say
        self.data = Pairs(pairs, model)
        self.checkpoint = out / "training.pt"
        parameters = list(model.parameters())
        groups = [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": settings.weight_decay},
            {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.98), fused=True)
        self.epoch = self.batch = self.step = 0  # what has been done
        self.epoch_loss = 0.0  # sum over the batches of this epoch
        self.seconds = 0.0  # of training, over all sessions
        self.history: list[str] = []
        self._stop = False

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return math.ceil(len(self.data) / self.settings.batch_size) * self.settings.epochs

    def stop(self) -> None:
        """Ask ``run`` to save and raise ``Interrupted`` after the present step."""
        self._stop = True

    def save(self) -> None:
        """Write the checkpoint."""
        state = {name: getattr(self, name) for name in _POSITION}
        state |= {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        state |= {"rng": torch.get_rng_state(), "settings": dataclasses.asdict(self.settings), "run": self._identity()}
        self.out.mkdir(parents=True, exist_ok=True)
        files.save_checkpoint(self.checkpoint, state)

    def resume(self) -> bool:
        """Go on from the checkpoint, or from the one before it when it is damaged; False when there is none.

        Raises:
            ValueError: it belongs to another run (other data, model, tokenizer or settings), or every one is damaged.
        """
        candidates = [p for p in (self.checkpoint, files.previous_checkpoint(self.checkpoint)) if p.exists()]
        for path in candidates:
            try:
                state = files.load_checkpoint(path)
            except ValueError as error:
                # Out of the way, so that the next save does not put it in place of the good one.
                aside = path.replace(path.with_name(path.name + ".damaged"))
                self.say(f"warning: {error}; it is kept as {aside}")
                continue
            self._check_same_run(path, state)
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            torch.set_rng_state(state["rng"])
            for name in _POSITION:
                setattr(self, name, state[name])
            self.say(f"resuming {path} after {self.step:,} of {self.total_steps:,} steps")
            return True
        if candidates:
            raise ValueError(f"every checkpoint in {self.out} was damaged; start again with --restart")
        return False

    def _identity(self) -> dict[str, Any]:
        """What must not change between the sessions of one run."""
        config = dataclasses.asdict(self.model.config)
        del config["metadata"]
        return {**config, "pairs": self.data.fingerprint}

    def _check_same_run(self, path: pathlib.Path, state: dict[str, Any]) -> None:
        ours = {**self._identity(), **dataclasses.asdict(self.settings)}
        theirs = {**state["run"], **state["settings"]}
        free = {"save_seconds", "validation_words"}
        if self.settings.schedule == "inverse_sqrt":
            free.add("epochs")  # the rate does not know where the end is
        if self.settings.schedule == "trapezoid":
            # Nor does a trapezoid until it falls, under the old end and under the new.
            first_end = self.total_steps // self.settings.epochs * min(ours["epochs"], theirs["epochs"])
            if state["step"] <= (1.0 - self.settings.cooldown) * first_end:
                free.add("epochs")
        other = [name for name in ours if name not in free and theirs.get(name) != ours[name]]
        if other:
            shown = ", ".join(f"{name}={theirs.get(name)!r} (now {ours[name]!r})" for name in other)
            raise ValueError(f"{path} is of another run: {shown}; choose another folder, or start again with --restart")

    def run(self) -> None:
        """Train to the end, with a progress bar on stderr.

        Raises:
            Interrupted: ``stop`` was called; the state is saved.
            FloatingPointError: the loss is no longer finite; the checkpoints stay as they were.
        """
        from tqdm import tqdm

        self.model.train()
        done = self.epoch * len(self.data) + self.batch * self.settings.batch_size
        quiet = 0.5 if sys.stderr.isatty() else 30.0  # seconds between updates: a log file gets a line each
        bar = tqdm(total=len(self.data) * self.settings.epochs, initial=done, unit=" words", mininterval=quiet)
        with bar:
            while self.epoch < self.settings.epochs:
                self._run_epoch(bar)

    def _run_epoch(self, bar: Any) -> None:
        """The rest of the present epoch, its validation, and a checkpoint."""
        batches = self.data.batches(self.settings.batch_size, self.settings.seed, self.epoch)
        saved = started = time.monotonic()
        before = self.seconds
        while self.batch < len(batches):
            indices = batches[self.batch]
            self.epoch_loss += self._train_step(*self.data.tensors(indices))
            self.step, self.batch = self.step + 1, self.batch + 1
            bar.update(len(indices))
            bar.set_postfix(epoch=self.epoch + 1, loss=f"{self.epoch_loss / self.batch:.3f}", refresh=False)
            now = time.monotonic()
            self.seconds = before + now - started
            if self._stop or now - saved > self.settings.save_seconds:
                self.save()
                saved = time.monotonic()
            if self._stop:
                raise Interrupted
        line = f"epoch {self.epoch + 1}/{self.settings.epochs}: loss {self.epoch_loss / len(batches):.4f}"
        if self.validate is not None:
            self.model.eval()
            line += f", {self.validate(self.model)}"
            self.model.train()
        bar.clear()
        self.say(line)
        self.history = [*self.history, line]
        self.epoch, self.batch, self.epoch_loss = self.epoch + 1, 0, 0.0
        self.save()
        self.model.save_pretrained(self.out / "model")

    def _train_step(self, source: Tensor, target: Tensor) -> float:
        """One step of AdamW; returns the loss in nats a token."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.rate(self.step, self.total_steps)
        loss = self.model.loss(source, target)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip_norm)
        if not (math.isfinite(loss.item()) and math.isfinite(norm.item())):
            raise FloatingPointError(
                f"step {self.step:,} has loss {loss.item()} and gradient norm {norm.item()}; "
                f"the weights before it are in {self.checkpoint}; a lower learning rate may help"
            )
        self.optimizer.step()
        return loss.item()


_POSITION = ("epoch", "batch", "step", "epoch_loss", "seconds", "history")


@contextlib.contextmanager
def stopping_on_signals(trainer: Trainer) -> Iterator[None]:
    """Let Ctrl-C and SIGTERM stop a run after its present step; a second one ends it at once."""

    def stop(number: int, _frame: Any) -> None:
        trainer.stop()
        signal.signal(number, previous[number])

    previous: dict[int, Any] = {n: signal.signal(n, stop) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``fastattn train``; the defaults give the model that fastattn ships."""
    defaults = TrainSettings()
    parser.add_argument("task", choices=["g2p"], help="g2p: spelling to pronunciation, on the CMU dictionary")
    parser.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path("g2p-run"), help="folder of the run (%(default)s)"
    )
    parser.add_argument("--restart", action="store_true", help="start again, over what is in the folder")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (PyTorch's choice)")
    parser.add_argument("--words", type=int, default=None, help="train on the first so many words only")
    model = parser.add_argument_group("model")
    for name, default in (("model-dim", 160), ("heads", 5), ("ff-dim", 512), ("layers", 3)):
        model.add_argument(f"--{name}", type=int, default=default, help="(%(default)s)")
    model.add_argument("--dropout", type=float, default=0.1, help="(%(default)s)")
    training = parser.add_argument_group("training")
    for field in dataclasses.fields(TrainSettings):
        default = getattr(defaults, field.name)
        flag = "--" + field.name.replace("_", "-")
        training.add_argument(flag, type=type(default), default=default, help="(%(default)s)")


def main(args: argparse.Namespace) -> int:
    """``fastattn train``: returns 0, or 130 when interrupted.

    Raises:
        ValueError: settings out of range, or a folder that holds another run.
    """
    settings = TrainSettings(**{field.name: getattr(args, field.name) for field in dataclasses.fields(TrainSettings)})
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    split = g2p.load_split()
    train_words = dict(list(split.train.items())[: args.words])
    if not train_words:
        raise ValueError(f"--words must leave at least one word, got {args.words}")
    tokenizer = g2p.train_tokenizer(split.train)
    torch.manual_seed(settings.seed)
    model = Seq2Seq(
        Seq2SeqConfig(
            source_vocab_size=tokenizer.source.vocab_size,
            target_vocab_size=tokenizer.target.vocab_size,
            model_dim=args.model_dim,
            num_heads=args.heads,
            ff_dim=args.ff_dim,
            num_encoder_layers=args.layers,
            num_decoder_layers=args.layers,
            dropout=args.dropout,
            max_len=64,  # the longest word and the longest pronunciation of the dictionary have 28
        ),
        tokenizer,
    )
    validation = _spread(split.validation, settings.validation_words)
    trainer = Trainer(
        model,
        g2p.pairs(train_words),
        args.out,
        settings,
        validate=lambda model: f"validation {g2p.evaluate(model, validation)}",
        say=lambda line: print(line, flush=True),
    )
    if args.restart or not trainer.resume():
        print(
            f"training {sum(p.numel() for p in model.parameters()):,} parameters on {len(trainer.data):,} pairs",
            flush=True,
        )
    with stopping_on_signals(trainer):
        try:
            trainer.run()
        except Interrupted:
            print(f"interrupted and saved after {trainer.step:,} steps; the same command goes on from there")
            return 130
    report(trainer, split.test)
    return 0


def report(trainer: Trainer, test: g2p.Pronunciations) -> None:
    """Measure the finished model on the held-out words, print it and store it in the model's metadata."""
    model = trainer.model.eval()
    greedy = g2p.evaluate(model, test)
    beam = g2p.evaluate(model, test, strategy="beam", num_beams=5)
    print(f"held-out words, greedy: {greedy}\nheld-out words, 5 beams: {beam}")
    model.config = model.config.replace(
        metadata={
            "task": "g2p",
            "data": "CMU Pronouncing Dictionary, stress removed",
            "settings": dataclasses.asdict(trainer.settings),
            "training_seconds": round(trainer.seconds),
            "held_out_words": greedy.num_words,
            "greedy": {"PER": round(greedy.phoneme, 2), "WER": round(greedy.word, 2)},
            "5 beams": {"PER": round(beam.phoneme, 2), "WER": round(beam.word, 2)},
        }
    )
    model.save_pretrained(trainer.out / "model")
    print(f"the model is in {trainer.out / 'model'}")


def _spread(words: g2p.Pronunciations, count: int) -> g2p.Pronunciations:
    """About ``count`` words, taken evenly from the dictionary."""
    every = max(1, len(words) // count)
    return dict(list(words.items())[::every])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="fastattn train")
    add_arguments(parser)
    raise SystemExit(main(parser.parse_args()))
