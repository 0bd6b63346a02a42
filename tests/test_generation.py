"""Generation against a search written out by hand, and cached against uncached."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from fastattn.models import GenerationSettings, Seq2Seq, Seq2SeqConfig
from fastattn.models.generation import Special, _draw, generate

pytestmark = pytest.mark.filterwarnings("ignore:.*reference backend")

SPECIAL = Special(eos=2, banned=(0, 1, 3))


class Table:
    """A decoder whose next-token scores are a fixed random function of source and prefix."""

    def __init__(self, num_sources, vocab=7, seed=0):
        self.sources, self.vocab, self.seed = list(range(num_sources)), vocab, seed

    def scores(self, source, prefix):
        generator = torch.Generator().manual_seed(hash((self.seed, source, *prefix)) % 2**31)
        return (2.0 * torch.randn(self.vocab, generator=generator)).log_softmax(-1)

    def step(self, ids):
        assert len(ids) % len(self.sources) == 0
        return torch.stack([self.scores(s, row) for s, row in zip(self.sources, ids.tolist(), strict=True)])

    def reorder(self, rows, *, same_source):
        new = [self.sources[row] for row in rows.tolist()]
        assert new == self.sources or not same_source
        self.sources = new

    def best(self, source, longest, penalty):
        """The best sequence that ends within ``longest`` tokens, by trying them all."""
        tokens = [t for t in range(self.vocab) if t not in (*SPECIAL.banned, SPECIAL.eos)]
        candidates = []
        for length in range(longest):
            for body in itertools.product(tokens, repeat=length):
                path = (*body, SPECIAL.eos)
                total = sum(self.scores(source, (1, *path[:i]))[t].item() for i, t in enumerate(path))
                candidates.append((total / len(path) ** penalty, list(body)))
        return max(candidates)[1]


def begin(batch):
    return torch.ones(batch, 1, dtype=torch.int64)


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0])
def test_a_wide_beam_finds_the_best_sequence(penalty):
    # 3 tokens and the end: 3^4 prefixes, so 100 beams prune nothing.
    settings = GenerationSettings("beam", max_new_tokens=4, num_beams=100, length_penalty=penalty)
    found = generate(Table(6), begin(6), SPECIAL, settings)
    assert found == [Table(6).best(source, 4, penalty) for source in range(6)]


@pytest.mark.parametrize("longest", [1, 5, 20])
def test_one_beam_is_greedy(longest):
    greedy = generate(Table(20), begin(20), SPECIAL, GenerationSettings(max_new_tokens=longest))
    beam = generate(Table(20), begin(20), SPECIAL, GenerationSettings("beam", max_new_tokens=longest, num_beams=1))
    assert greedy == beam
    assert any(greedy)
    table = Table(20)
    for source, output in enumerate(greedy):
        prefix = [1]
        for _ in range(longest):
            scores = table.scores(source, prefix)
            scores[list(SPECIAL.banned)] = -math.inf
            if int(scores.argmax()) == SPECIAL.eos:
                break
            prefix.append(int(scores.argmax()))
        assert output == prefix[1:]


@pytest.mark.parametrize("num_beams", [2, 3, 8])
def test_batched_beams_equal_single_ones(num_beams):
    settings = GenerationSettings("beam", max_new_tokens=12, num_beams=num_beams)
    together = generate(Table(8), begin(8), SPECIAL, settings)
    for source, output in enumerate(together):
        alone = Table(1)
        alone.sources = [source]
        assert generate(alone, begin(1), SPECIAL, settings) == [output]


def test_sampling_follows_the_distribution():
    torch.manual_seed(0)
    scores = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().repeat(40_000, 1)

    def frequencies(**settings):
        drawn = _draw(scores.clone(), GenerationSettings("sample", **settings))
        return torch.bincount(drawn, minlength=4) / len(drawn)

    near = {"rtol": 0, "atol": 0.01}  # 4 standard deviations of 40,000 draws
    torch.testing.assert_close(frequencies(), torch.tensor([0.5, 0.3, 0.15, 0.05]), **near)
    torch.testing.assert_close(frequencies(top_k=2), torch.tensor([0.625, 0.375, 0.0, 0.0]), **near)
    torch.testing.assert_close(frequencies(top_p=0.8), torch.tensor([0.625, 0.375, 0.0, 0.0]), **near)
    torch.testing.assert_close(frequencies(top_p=0.81)[2:], torch.tensor([0.15 / 0.95, 0.0]), **near)
    torch.testing.assert_close(frequencies(top_p=1e-9), torch.tensor([1.0, 0.0, 0.0, 0.0]), **near)
    squared = torch.tensor([0.25, 0.09, 0.0225, 0.0025])
    torch.testing.assert_close(frequencies(temperature=0.5), squared / squared.sum(), **near)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strategy": "best"}, "strategy must be"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"strategy": "beam", "num_beams": 0}, "num_beams must be at least 1"),
        ({"strategy": "beam", "length_penalty": math.nan}, "length_penalty must be finite"),
        ({"strategy": "sample", "temperature": 0.0}, "temperature must be a positive number"),
        ({"strategy": "sample", "top_k": -1}, "top_k must be at least 0"),
        ({"strategy": "sample", "top_p": 0.0}, "top_p must be in"),
        ({"strategy": "greedy", "num_beams": 4}, 'num_beams=4 is for strategy="beam"'),
        ({"strategy": "beam", "top_p": 0.5}, 'top_p=0.5 is for strategy="sample"'),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        GenerationSettings(**settings)


def model(seed=0, **changes):
    """A small random model whose outputs vary and do end."""
    torch.manual_seed(seed)
    shape = {
        "model_dim": 16,
        "num_heads": 2,
        "ff_dim": 24,
        "num_encoder_layers": 2,
        "num_decoder_layers": 2,
        "max_len": 24,
    }
    made = Seq2Seq(Seq2SeqConfig(12, 11, **{**shape, **changes})).eval()
    with torch.no_grad():  # fresh weights give near-uniform scores whatever the source; spread them
        made.target_embedding.weight.mul_(3.0)
        for name, parameter in made.transformer.named_parameters():
            if "attn" in name:
                parameter.mul_(3.0)
    return made


def sources(batch=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 9, (batch,), generator=generator).tolist()
    return [torch.randint(4, 12, (n,), generator=generator).tolist() for n in lengths]


@pytest.mark.parametrize(
    "changes",
    [{"seed": 1}, {"seed": 3, "positional_encoding": "learned", "norm_first": False}],
    ids=["pre", "post"],
)
@pytest.mark.parametrize(
    "settings",
    [{}, {"strategy": "beam", "num_beams": 3}, {"strategy": "sample", "temperature": 0.7, "top_k": 5}],
    ids=["greedy", "beam", "sample"],
)
def test_cached_equals_uncached(changes, settings):
    made = model(**changes)

    def run(use_cache):
        extra = {"generator": torch.Generator().manual_seed(3)} if settings.get("strategy") == "sample" else {}
        return made.generate(sources(), use_cache=use_cache, **settings, **extra)

    cached = run(True)
    assert cached == run(False)
    assert len({len(output) for output in cached}) > 1  # rows left the batch at different times


@pytest.mark.parametrize("settings", [{}, {"strategy": "beam", "num_beams": 3}], ids=["greedy", "beam"])
def test_padding_and_batching_change_nothing(settings):
    made = model(seed=1)
    alone = [made.generate([ids], **settings)[0] for ids in sources()]
    assert made.generate(sources(), **settings) == alone
    assert made.generate(sources(), batch_size=2, **settings) == alone
    padded = torch.tensor([ids + [0] * (12 - len(ids)) for ids in sources()])
    assert made.generate(padded, **settings) == alone


def test_the_source_is_encoded_once_and_the_mode_is_kept():
    made = model().train()
    calls = []
    made.transformer.encoder.register_forward_hook(lambda *_: calls.append(1))
    first = made.generate(sources())
    assert len(calls) == 1
    assert made.training
    assert made.transformer.decoder.layers[0].self_attn.training
    assert made.generate(sources()) == first  # no dropout while generating


def test_sampling_repeats_with_its_generator():
    made = model()
    draws = [
        made.generate(sources(), strategy="sample", generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    ]
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.parametrize("strategy", ["greedy", "beam"])
def test_length_is_bounded_and_special_tokens_never_appear(strategy):
    made = model(seed=2)
    for longest in (1, 3):
        outputs = made.generate(sources(), strategy=strategy, max_new_tokens=longest)
        assert all(len(output) <= longest for output in outputs)
        assert not {0, 1, 2, 3} & {token for output in outputs for token in output}


def test_bad_inputs_are_refused():
    made = model()
    for inputs, message in (
        ([[4], []], "source 1 is empty"),
        ([[0, 0]], "source 0 is empty"),
        (torch.zeros(2, 0, dtype=torch.int64), "at least 1 token"),
        ([[4] * 25], "25 tokens"),
        ([[4, 12]], "expected 0 to 11"),
        ([[-1]], "token ids -1 to -1"),
        ("text", "no tokenizer"),
    ):
        with pytest.raises(ValueError, match=message):
            made.generate(inputs)
    with pytest.raises(TypeError, match="int64 token ids, got"):
        made.generate(torch.zeros(1, 2))
    with pytest.raises(TypeError, match="got int in row 0"):
        made.generate([4, 5])
    with pytest.raises(ValueError, match="max_new_tokens must be at most 23"):
        made.generate([[4]], max_new_tokens=24)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        made.generate([[4]], batch_size=0)
    assert made.generate([]) == []
    assert made.generate(torch.zeros(0, 3, dtype=torch.int64)) == []
