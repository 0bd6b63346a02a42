"""``fastattn demo``: a real encoder-decoder Transformer at work on fastattn's kernels, in under a minute."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from fastattn.models import Seq2Seq, g2p
from fastattn.tools import info, maps_png, seq2seq_maps
from fastattn.tools.measure import Timing
from fastattn.tools.swap import swap
from fastattn.tools.table import error, heading, megabytes, seconds, table, verdict
from fastattn.tools.verify import Certificate

_BATCH = 64


def run(words: Sequence[str], out: Path, model: Seq2Seq | None = None) -> int:
    """Prints and draws everything; returns 0, or 1 if fastattn breaks the numerics rule.

    Args:
        words: to pronounce; without any, ten that the model was not trained on.
        out: folder for the pictures; made if it is missing.
        model: by default the shipped one.

    Raises:
        ValueError: a word is empty, too long or has characters that the model never saw.
    """
    start = time.perf_counter()
    model = g2p.load_model() if model is None else model
    words = list(words) or list(g2p.EXAMPLES)
    # Before anything is printed: a word that cannot be pronounced must not cost a wait.
    said = g2p.pronounce(words, model)

    print(heading("1. What can run here") + "\n")
    print(info.backends_table())

    print("\n" + heading("2. Spelling to pronunciation, by an encoder-decoder Transformer on these kernels") + "\n")
    print(_pronunciations(said))
    print(_record(model))

    shown = max(said, key=lambda s: len(s.phonemes))
    print("\n" + heading(f"3. Which letters each phoneme of {shown.word!r} looked at") + "\n")
    for line in _draw(model, shown.word, out):
        print(f"  {line}")

    print("\n" + heading("4. The same weights in stock torch.nn.Transformer, and swapped to fastattn") + "\n")
    certificate = compare(model)
    print(comparison(certificate))
    print(f"\nDone in {time.perf_counter() - start:.0f} s.")
    return 0 if certificate.ok else 1


def _record(model: Seq2Seq) -> str:
    """Says how often the model is right on all words held out from it: the few shown are no measure."""
    metadata = model.config.metadata
    if "greedy" not in metadata:
        return ""
    right, words = 100.0 - metadata["greedy"]["WER"], metadata["held_out_words"]
    return f"  Over all {words:,} held-out words it is right for {right:.0f} %; the ten shown by default are hard ones."


def _pronunciations(said: Sequence[g2p.Pronunciation]) -> str:
    dictionary, held_out = g2p.load_dictionary(), g2p.load_split().test
    rows = []
    for s in said:
        word = s.word.lower()
        answers = dictionary.get(word, ())
        right = "" if not answers else "right" if str(s) in answers else "differs"
        known = "held out" if word in held_out else "seen in training" if answers else "not in the dictionary"
        rows.append([s.word, str(s), " or ".join(answers) or "-", right, known])
    checked = [r for r in rows if r[3]]
    text = table(("word", "the model says", "the dictionary says", "", ""), rows, left=(0, 1, 2, 3, 4))
    if checked:
        text += f"\n\n  {sum(r[3] == 'right' for r in checked)} of {len(checked)} as in the CMU Pronouncing Dictionary."
    return text


def _draw(model: Seq2Seq, word: str, out: Path) -> list[str]:
    """Writes the picture and the page, and returns what to say about them."""
    out.mkdir(parents=True, exist_ok=True)
    maps, labels, target = seq2seq_maps.record(model, word)
    name = "".join(c for c in word if c.isalnum()) or "word"
    title = f"{word} \u2192 {target}"
    page = maps.save_html(out / f"attention-{name}.html", labels=labels, title=title)
    lines = [f"page     {page}   (every layer and head; open it in a browser)"]
    cross = [n for n in maps.names if n.endswith("multihead_attn")]
    phonemes, letters = labels["*decoder*"]
    weights = torch.stack([maps[n][0].mean(dim=0) for n in cross]).mean(dim=0)  # [phonemes, letters]
    try:
        picture = out / f"attention-{name}.png"
        figure = maps_png.figure(1.4 + 0.42 * len(letters), 1.3 + 0.36 * len(phonemes))
        axis = figure.subplots()
        maps_png.draw(axis, weights, phonemes, letters, title, numbers=True)
        axis.set(xlabel="letter that is looked at", ylabel="phoneme that is chosen")
        figure.savefig(picture, dpi=150)
        lines.insert(0, f"picture  {picture}   (mean of {len(cross)} layers' heads)")
    except ModuleNotFoundError as missing:
        lines.append(str(missing))
    return lines


class Transcriber(nn.Module):
    """A stock ``torch.nn.Transformer`` with the weights of a Seq2Seq's; embedded tokens in, decoder states out."""

    def __init__(self, model: Seq2Seq) -> None:
        super().__init__()
        config = model.config
        self.transformer = nn.Transformer(
            d_model=config.model_dim,
            nhead=config.num_heads,
            num_encoder_layers=config.num_encoder_layers,
            num_decoder_layers=config.num_decoder_layers,
            dim_feedforward=config.ff_dim,
            dropout=config.dropout,
            activation=config.activation,
            layer_norm_eps=config.layer_norm_eps,
            batch_first=True,
            norm_first=config.norm_first,
        )
        self.transformer.load_state_dict(model.transformer.state_dict(), strict=True)

    def forward(self, source: Tensor, target: Tensor, padding: Tensor, causal: Tensor) -> Tensor:
        return self.transformer(
            source,
            target,
            tgt_mask=causal,
            src_key_padding_mask=padding,
            memory_key_padding_mask=padding,
            tgt_is_causal=True,
        )


@torch.no_grad()
def batch(model: Seq2Seq) -> tuple[Tensor, ...]:
    """Returns the arguments of a :class:`Transcriber` for a batch of held-out words and their pronunciations."""
    tokenizer, config = model.tokenizer, model.config
    assert tokenizer is not None
    words = list(g2p.load_split().test.items())[:_BATCH]
    source = tokenizer.encode_source([w for w, _ in words], on_unknown="ignore")
    target = tokenizer.encode_target([p[0] for _, p in words], on_unknown="ignore")[:, :-1]
    scale = config.model_dim**0.5
    was_training = model.training
    model.eval()
    embedded = (
        model.source_position(model.source_embedding(source) * scale),
        model.target_position(model.target_embedding(target) * scale),
    )
    model.train(was_training)
    causal = nn.Transformer.generate_square_subsequent_mask(target.shape[1], dtype=torch.bool)
    return (*embedded, source == config.pad_id, causal)


def compare(model: Seq2Seq) -> Certificate:
    """Returns errors, time and memory of the model's weights in stock PyTorch and in fastattn."""
    with warnings.catch_warnings():
        # PyTorch's about its own nested tensors, which its encoder would make of a padded batch.
        warnings.filterwarnings("ignore", message=".*nested.tensor", category=UserWarning)
        report = swap(Transcriber(model), batch(model), verbose=False)
    assert report.certificate is not None
    return report.certificate


def comparison(certificate: Certificate) -> str:
    """Returns the one table: worst error against float64, time and peak memory of each, forward and training step."""
    rows = []
    for cost, kind in zip(certificate.costs, ("output", "gradient"), strict=True):
        figure = certificate.report.worst(kind)
        assert figure is not None
        for name, errors, timing, memory in (
            ("PyTorch", figure.eager, cost.before, cost.memory_before),
            ("fastattn", figure.ours, cost.after, cost.memory_after),
        ):
            faster = f"{cost.speedup:.2f} x" if name == "fastattn" else ""
            rows.append(
                [cost.what if not faster else "", name, error(errors.max), _spread(timing), faster, megabytes(memory)]
            )
    text = table(
        ("", "", "worst error", "time (median, p20-p80)", "faster", "peak memory"), rows, left=(0, 1), indent=2
    )
    checked = len(certificate.report.rows)
    rule = f"{checked} outputs, layers and gradients against a float64 copy, all within twice PyTorch's own error"
    return f"{text}\n\n  {rule}: {verdict(certificate.ok)}"


def _spread(timing: Timing) -> str:
    return f"{seconds(timing.median)} ({seconds(timing.p20)} - {seconds(timing.p80)})"
