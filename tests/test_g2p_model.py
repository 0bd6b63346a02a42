"""The shipped checkpoint: its size, what its metadata claims, and what it says."""

from __future__ import annotations

import importlib.resources

import pytest
import torch

from fastattn.models import Seq2Seq, g2p

pytestmark = pytest.mark.filterwarnings("ignore:.*reference backend")


@pytest.fixture(scope="module")
def folder():
    return importlib.resources.files("fastattn.data").joinpath("g2p")


def test_it_is_small_and_whole(folder):
    sizes = {
        name: len(folder.joinpath(name).read_bytes()) for name in ("config.json", "model.safetensors", "tokenizer.json")
    }
    assert sum(sizes.values()) <= 8_000_000
    model = g2p.load_model()
    assert not model.training
    assert all(p.dtype == torch.float32 and torch.isfinite(p).all() for p in model.parameters())


def test_its_tokenizer_is_that_of_the_training_words():
    assert g2p.load_model().tokenizer.fingerprint == g2p.train_tokenizer(g2p.load_split().train).fingerprint


@pytest.mark.parametrize(("name", "settings"), [("greedy", {}), ("5 beams", {"strategy": "beam", "num_beams": 5})])
def test_its_error_rates_are_those_it_claims(name, settings):
    # 600 of 12,000 words: the standard error of a WER near 28 % is 1.8 points, so 5 points is 2.8 of them.
    model, split = g2p.load_model(), g2p.load_split()
    words = dict(list(split.test.items())[::20])
    rates = g2p.evaluate(model, words, **settings)
    claimed = model.config.metadata[name]
    assert abs(rates.word - claimed["WER"]) < 5.0
    assert abs(rates.phoneme - claimed["PER"]) < 1.5
    assert claimed["WER"] < 30.0


def test_it_says_common_words():
    said = g2p.pronounce(["Hello", "world", "transformer", "naïve"], attention=True)
    dictionary = g2p.load_dictionary()
    assert str(said[0]) in dictionary["hello"]
    assert str(said[1]) in dictionary["world"]
    assert str(said[2]) in dictionary["transformer"]
    assert said[3].letters == ("n", "a", "i", "v", "e", "<eos>")
    for p in said:
        assert p.attention.shape == (3, 5, len(p.phonemes) + 1, len(p.letters))


def test_its_attention_follows_the_word():
    """Over many words, the mean position looked at moves right with the phonemes: alignment, learned unasked."""
    words = [word for word in g2p.load_split().test if word.isalpha() and 6 <= len(word) <= 10][::100]
    slopes = []
    for p in g2p.pronounce(words, attention=True):
        heads = p.attention[:, :, :-1, :-1].flatten(0, 1)  # [layers * heads, phonemes, letters]
        centre = (heads * torch.arange(heads.shape[-1])).sum(-1) / heads.sum(-1)
        step = torch.arange(heads.shape[1]).float()
        slopes.append(
            ((centre - centre.mean(-1, keepdim=True)) * (step - step.mean())).mean(-1) / step.var(correction=0)
        )
    assert torch.stack(slopes).mean(0).max() > 0.5  # letters a phoneme, in the best-aligned head


def test_generation_refuses_another_tokenizer():
    model = g2p.load_model()
    other = g2p.train_tokenizer({"cab": ("K AE B",)})
    with pytest.raises(ValueError, match="not the tokenizer the model was trained with"):
        Seq2Seq(model.config, other)
