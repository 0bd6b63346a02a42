"""Seq2Seq against torch.nn.Transformer in float64; tokenizers; folders, whole and damaged; the g2p task."""

from __future__ import annotations

import copy
import json
import math
import pickle
import shutil
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastattn.models import Seq2Seq, Seq2SeqConfig, Seq2SeqTokenizer, Tokenizer, g2p

pytestmark = pytest.mark.filterwarnings("ignore:.*reference backend", "ignore:enable_nested_tensor")

WORDS = ["cat", "dog", "a", "hat's", "Zoë", "co-op"]


def tokenizer(kind="char"):
    return Seq2SeqTokenizer(
        Tokenizer.train(WORDS, kind=kind, fold_case=True), Tokenizer.train(["K AE T", "D AO G"], kind="word")
    )


def small(tok=None, **changes):
    tok = tokenizer() if tok is None else tok
    shape = {
        "model_dim": 16,
        "num_heads": 2,
        "ff_dim": 24,
        "num_encoder_layers": 2,
        "num_decoder_layers": 2,
        "max_len": 20,
    }
    torch.manual_seed(0)
    return Seq2Seq(Seq2SeqConfig(tok.source.vocab_size, tok.target.vocab_size, **{**shape, **changes}), tok).eval()


# ---- the model


def stock_logits(model, source, target_in):
    """The model's formula on torch.nn.Transformer in float64, row by row so that nothing is padded."""
    config = model.config
    activation = {"relu": F.relu, "gelu": F.gelu}[config.activation]
    shape = (config.model_dim, config.num_heads, config.num_encoder_layers, config.num_decoder_layers, config.ff_dim)
    stock = nn.Transformer(
        *shape, dropout=0.0, activation=activation, batch_first=True, norm_first=config.norm_first, dtype=torch.float64
    )
    stock.load_state_dict(model.transformer.state_dict())
    rows = []
    for s, t in zip(source, target_in, strict=True):
        s, t = s[s != config.pad_id], t[t != config.pad_id]
        embedded = []
        for ids, table in ((s, model.source_embedding), (t, model.target_embedding)):
            feature = torch.arange(config.model_dim)
            angle = torch.arange(len(ids))[:, None] / 10000.0 ** (2 * (feature // 2) / config.model_dim).double()
            position = torch.where(feature % 2 == 0, angle.sin(), angle.cos())
            embedded.append((table.weight.double()[ids] * math.sqrt(config.model_dim) + position)[None])
        causal = nn.Transformer.generate_square_subsequent_mask(len(t), dtype=torch.float64)
        hidden = stock(*embedded, tgt_mask=causal)  # training mode without dropout: the plain path
        rows.append(hidden[0] @ model.target_embedding.weight.double().T)
    return rows


def batch():
    source = torch.tensor([[4, 5, 6, 2], [7, 2, 0, 0]])
    target = torch.tensor([[1, 4, 5, 6, 2], [1, 7, 2, 0, 0]])
    return source, target


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_logits_loss_and_gradients_equal_stock_pytorch(norm_first, activation):
    model = small(norm_first=norm_first, activation=activation)
    source, target = batch()
    model.double()
    expected = stock_logits(model, source, target[:, :-1])
    logits = model(source, target[:, :-1])
    for row, wanted in zip(logits, expected, strict=True):
        torch.testing.assert_close(row[: len(wanted)], wanted, rtol=1e-9, atol=1e-9)
    labels = torch.cat([row[1:][row[1:] != 0] for row in target])
    parameters = list(model.parameters())
    for smoothing in (0.0, 0.1):
        wanted_loss = F.cross_entropy(
            torch.cat([r[: (t[1:] != 0).sum()] for r, t in zip(logits, target, strict=True)]),
            labels,
            label_smoothing=smoothing,
        )
        loss = model.loss(source, target, label_smoothing=smoothing)
        torch.testing.assert_close(loss, wanted_loss, rtol=1e-9, atol=1e-9)
        wanted_gradients = torch.autograd.grad(wanted_loss, parameters, retain_graph=True)
        for name, got, wanted in zip(
            dict(model.named_parameters()), torch.autograd.grad(loss, parameters), wanted_gradients, strict=True
        ):
            torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


def test_label_smoothing_is_for_training():
    model = small(dropout=0.0)
    source, target = batch()
    assert torch.equal(model.loss(source, target), model.loss(source, target, label_smoothing=0.0))
    smoothed = model.loss(source, target, label_smoothing=0.1)
    torch.testing.assert_close(model.train().loss(source, target), smoothed)
    assert smoothed != model.eval().loss(source, target)


def test_more_padding_changes_nothing():
    model = small().double()
    source, target = batch()
    wider = model(F.pad(source, (0, 5)), F.pad(target, (0, 3)))
    torch.testing.assert_close(wider[:, : target.shape[1]], model(source, target), rtol=1e-12, atol=1e-12)


def test_copies_and_compiled_models_give_the_same():
    model = small()
    source, target = batch()
    expected = model(source, target)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(source, target), expected)
        assert twin.generate("cat") == model.generate("cat")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(source, target), expected)


def test_embeddings_may_be_shared():
    tok = Seq2SeqTokenizer(Tokenizer.train(WORDS, kind="char"))
    model = small(tok, share_embeddings=True)
    assert model.source_embedding is model.target_embedding
    assert sum(1 for name in model.state_dict() if "embedding" in name) == 2  # two names, one tensor


def test_cross_attention_gives_every_layer_and_head():
    model = small()
    source, target = batch()
    maps = model.train().cross_attention(source, target[:, :-1])
    assert model.training
    assert maps.shape == (2, 2, 2, 4, 4)
    torch.testing.assert_close(maps.sum(-1), torch.ones(2, 2, 2, 4))
    assert torch.all(maps[:, 1, :, :, 2:] == 0)
    layer = model.eval().transformer.decoder.layers[0]
    assert not layer.multihead_attn._forward_hooks
    assert not layer.multihead_attn._forward_pre_hooks


def test_bad_ids_are_refused():
    model = small()
    source, target = batch()
    for bad, message in (
        (source + 100, "expected 0 to"),
        (source[0], r"must be \[batch"),
        (source.new_ones(1, 21), "21 tokens, but only 20"),
        (source[:, :0], "at least 1 token"),
    ):
        with pytest.raises(ValueError, match=message):
            model(bad, target)
    with pytest.raises(TypeError, match="int64"):
        model(source.float(), target)
    with pytest.raises(ValueError, match="at least 2"):
        model.loss(source, target[:, :1])


# ---- the configuration


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_dim": 0}, "model_dim must be a positive integer, got 0"),
        ({"num_heads": 3}, "multiple of num_heads=3, got 512"),
        ({"dropout": 1.0}, r"dropout must be a number in \[0, 1\), got 1.0"),
        ({"activation": "tanh"}, "activation must be one of"),
        ({"positional_encoding": "rotary"}, "positional_encoding must be one of"),
        ({"eos_id": 1}, "must differ"),
        ({"unk_id": 10}, r"in \[0, 10\)"),
        ({"max_len": 1}, "max_len must be at least 2"),
        ({"share_embeddings": True}, "equal vocabulary sizes"),
    ],
)
def test_bad_configurations_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Seq2SeqConfig(12, 10, **changes)


def test_configuration_types_and_json():
    with pytest.raises(TypeError, match="model_dim must be int, got str '512'"):
        Seq2SeqConfig(12, 10, model_dim="512")
    with pytest.raises(TypeError, match="model_dim must be int, got bool"):
        Seq2SeqConfig(12, 10, model_dim=True)
    config = Seq2SeqConfig(12, 10, metadata={"wer": 25.0}, dropout=0)
    assert Seq2SeqConfig.from_json(config.to_json()) == config
    for text, message in (
        ("{", "not valid JSON"),
        ("[]", "expected a JSON object, got list"),
        ('{"source_vocab_size": 9, "target_vocab_size": 9, "colour": 1}', r"unknown fields \['colour'\]"),
        ('{"source_vocab_size": 9}', r"missing fields \['target_vocab_size'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            Seq2SeqConfig.from_json(text)


# ---- tokenizers


@pytest.mark.parametrize("kind", ["bpe", "char", "word"])
def test_tokenizers_round_trip(kind):
    texts = ["the cat sat", "on the mat", "is <eos> text<eos>", "<eos>" * 50]
    made = Tokenizer.train(texts, kind=kind, vocab_size=400)
    assert made.definition == Tokenizer.train(texts, kind=kind, vocab_size=400).definition
    for text in texts[: 2 if kind == "word" else 4]:
        ids = made.encode(text, on_unknown="error")
        assert made.decode(ids) == text
        assert not {0, 1, 2, 3} & set(ids)  # a text never makes special tokens
        assert made.decode([1, *ids, 2, *ids, 0]) == text
    assert made.encode("") == []
    assert 2 not in made.encode("a <eos>", on_unknown="ignore")
    assert made.tokens([0, 1, 2, 3]) == ["<pad>", "<bos>", "<eos>", "<unk>"]


def test_bpe_never_meets_the_unknown_and_respects_its_size():
    made = Tokenizer.train(["abc abc"] * 3, kind="bpe", vocab_size=262)
    assert made.vocab_size <= 262
    assert made.decode(made.encode("日本 é", on_unknown="error")) == "日本 é"


def test_unknown_characters_are_named():
    made = tokenizer().source
    with pytest.warns(UserWarning, match="'c8t9' has pieces the tokenizer never saw: '8', '9'; each becomes <unk>"):
        assert made.encode("c8t9").count(3) == 2
    with pytest.raises(ValueError, match="never saw: '8'"):
        made.encode("8", on_unknown="error")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert made.encode("8", on_unknown="ignore") == [3]
        assert made.encode("ÇÀT") == made.encode("cat")
        assert made.encode("hat\u2019s") == made.encode("hat's")


def test_bad_tokenizers_are_refused():
    with pytest.raises(ValueError, match='kind must be "bpe"'):
        Tokenizer.train(WORDS, kind="letters")
    with pytest.raises(ValueError, match="vocab_size must exceed"):
        Tokenizer.train(WORDS, vocab_size=4)
    with pytest.raises(ValueError, match="not a tokenizer definition"):
        Tokenizer("{}")
    with pytest.raises(TypeError, match="text must be a str, got bytes"):
        tokenizer().source.encode(b"cat")
    with pytest.raises(ValueError, match="on_unknown must be"):
        tokenizer().source.encode("cat", on_unknown="drop")
    definition = json.loads(tokenizer().source.definition)
    definition["added_tokens"], definition["model"]["vocab"] = [], {"a": 0, "b": 1, "c": 2, "<unk>": 3}
    with pytest.raises(ValueError, match="token ids 0 to 3 must be"):
        Tokenizer(json.dumps(definition))


# ---- folders


@pytest.fixture
def folder(tmp_path):
    small().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("share", [False, True])
def test_a_folder_holds_the_whole_model(tmp_path, share):
    tok = Seq2SeqTokenizer(Tokenizer.train(WORDS, kind="char")) if share else tokenizer()
    model = small(tok, share_embeddings=share, metadata={"note": "é"})
    model.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    loaded = Seq2Seq.from_pretrained(tmp_path)
    assert loaded.config == model.config
    assert not loaded.training
    assert loaded.tokenizer.fingerprint == tok.fingerprint
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    words = ["cat", "dog", ""]
    assert loaded.generate(words) == model.generate(words)
    assert loaded.generate("cat") == model.generate(["cat"])[0]


def test_a_model_without_a_tokenizer_has_a_folder_too(tmp_path):
    model = small()
    bare = Seq2Seq(model.config.replace(tokenizer_fingerprint=None)).eval()
    bare.save_pretrained(tmp_path)
    loaded = Seq2Seq.from_pretrained(tmp_path)
    assert loaded.tokenizer is None
    assert loaded.generate([[4, 2]]) == bare.generate([[4, 2]])


def test_another_tokenizer_is_refused(folder, tmp_path):
    words = ["tac", "god", "b", "that's", "Zoë", "po-co"]  # other letters, other ids
    other = Seq2SeqTokenizer(Tokenizer.train(words, kind="char", fold_case=True), tokenizer().target)
    model = Seq2Seq.from_pretrained(folder)
    message = "not the tokenizer the model was trained with"
    with pytest.raises(ValueError, match=message):
        model.tokenizer = other
    with pytest.raises(ValueError, match=message):
        Seq2Seq(model.config, other)
    (folder / "tokenizer.json").write_text(other.to_json())
    with pytest.raises(ValueError, match=f"tokenizer.json: this is {message}"):
        Seq2Seq.from_pretrained(folder)
    model._tokenizer = other  # even behind the property's back
    with pytest.raises(ValueError, match=message):
        model.generate("cat")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_missing_files_are_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{name} is missing"):
        Seq2Seq.from_pretrained(folder)
    with pytest.raises(FileNotFoundError, match="no model folder"):
        Seq2Seq.from_pretrained(folder / "nowhere")


@pytest.mark.parametrize("keep", [0, 5, 100, 0.5, 0.99])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_truncated_files_are_named(folder, name, keep):
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: int(keep if keep in (0, 5, 100) else keep * len(content))])
    with pytest.raises(ValueError, match=name):
        Seq2Seq.from_pretrained(folder)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_noise_in_a_header_never_crashes(folder, name, seed):
    content = bytearray((folder / name).read_bytes())
    generator = torch.Generator().manual_seed(seed)
    for at in torch.randint(0, 200, (12,), generator=generator).tolist():
        content[at] = int(torch.randint(0, 256, (1,), generator=generator))
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=name):
        Seq2Seq.from_pretrained(folder)


def test_weights_of_another_shape_are_refused(folder, tmp_path):
    small(ff_dim=32, num_encoder_layers=1).save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "model.safetensors", folder)
    with pytest.raises(
        ValueError, match=r"model.safetensors does not fit config.json beside it: missing transformer.encoder.layers.1"
    ):
        Seq2Seq.from_pretrained(folder)
    small(ff_dim=32).save_pretrained(tmp_path / "third")
    shutil.copy(tmp_path / "third" / "model.safetensors", folder)
    with pytest.raises(ValueError, match=r"linear1.weight is \[32, 16\], expected \[24, 16\]"):
        Seq2Seq.from_pretrained(folder)


def test_saving_again_replaces_and_leaves_nothing_behind(folder):
    model = small()
    with torch.no_grad():
        model.target_embedding.weight.fill_(0.5)
    model.save_pretrained(folder)
    assert len(list(folder.iterdir())) == 3
    assert torch.all(Seq2Seq.from_pretrained(folder).target_embedding.weight == 0.5)


def test_what_cannot_be_saved_leaves_the_folder_as_it_was(folder):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    model = small(metadata={"device": torch.device("cpu")})
    with torch.no_grad():
        model.target_embedding.weight.fill_(0.5)
    with pytest.raises(TypeError, match="not JSON serializable"):
        model.save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_generate(dtype):
    model = small().to(dtype)
    source, target = batch()
    expected = small()(source, target)
    tolerance = {torch.bfloat16: 0.2, torch.float16: 0.02, torch.float64: 1e-5}[dtype]
    torch.testing.assert_close(model(source, target).float(), expected, rtol=0, atol=tolerance)
    assert model.generate(["cat", "dog"]) == model.generate(["cat", "dog"], use_cache=False)


# ---- text in, text out


def test_texts_unknown_empty_and_too_long():
    model = small()
    assert isinstance(model.generate(""), str)  # a source of <eos> alone
    with pytest.warns(UserWarning, match="never saw: '9'"):
        model.generate(["cat", "9"])
    with pytest.raises(ValueError, match="never saw: '9'"):
        model.generate("9", on_unknown="error")
    with pytest.raises(ValueError, match="'aaaaaaaaaaaaaaaaaaaa' has 21 tokens with <eos>, more than max_len=20"):
        model.generate("a" * 20)
    model.generate("a" * 19)


# ---- the g2p task


def test_dictionary_format():
    text = "cat K AE1 T\ncat(2) K AH0 T # rare\ncat(3) K AE0 T\n\n# comment\n'tis T IH1 Z\n"
    assert g2p.parse_dictionary(text) == {"cat": ("K AE T", "K AH T"), "'tis": ("T IH Z",)}
    with pytest.raises(ValueError, match="line 2: expected a word and its phonemes, got 'dog'"):
        g2p.parse_dictionary("cat K AE1 T\ndog\n")


def test_the_split_is_disjoint_whole_and_fixed():
    split, words = g2p.load_split(), g2p.load_dictionary()
    assert (len(split.validation), len(split.test)) == (2_700, 12_000)
    assert len(words) == 126_052
    assert {**split.train, **split.validation, **split.test} == words
    assert len(split.train) + len(split.validation) + len(split.test) == len(words)
    # What the shipped model was trained on must stay what it was: a change would leak held-out words.
    assert list(split.test)[:6] == HELD_OUT
    assert set(g2p.EXAMPLES) <= set(split.test)
    with pytest.raises(ValueError, match="cannot hold out 2"):
        g2p.split_dictionary({"a": ("AH",), "b": ("B",), "c": ("C",)}, 2, 2)


HELD_OUT = ["'course", "'round", "a.'s", "aachen", "abandonments", "abbe"]


@pytest.mark.parametrize(
    ("first", "second", "distance"),
    [
        ("", "", 0),
        ("A", "", 1),
        ("", "A B", 2),
        ("A B C", "A B C", 0),
        ("A B C", "A X C", 1),
        ("A B C D", "B C D E", 2),
    ],
)
def test_edit_distance(first, second, distance):
    assert g2p.edit_distance(first.split(), second.split()) == distance
    assert g2p.edit_distance(second.split(), first.split()) == distance


def test_error_rates_count_the_nearest_reference():
    references = {"a": ("A B C D", "X"), "b": ("B B",), "c": ("C",)}
    rates = g2p.error_rates({"a": "X", "b": "B C B", "c": "C"}, references)
    assert rates.word == pytest.approx(100 / 3)
    assert rates.phoneme == pytest.approx(100 * 1 / (1 + 2 + 1))
    assert str(rates) == "PER 25.00 %, WER 33.33 % on 3 words"
    with pytest.raises(ValueError, match="no reference pronunciation for"):
        g2p.error_rates({"z": "A"}, references)
    with pytest.raises(ValueError, match="no words"):
        g2p.error_rates({}, references)


def test_pronounce_refuses_what_it_cannot_say():
    model = small()
    for words, message in ((["cat", "c3po"], "'c3po' has pieces the tokenizer never saw: '3'"), ([""], "empty word")):
        with pytest.raises(ValueError, match=message):
            g2p.pronounce(words, model)
    with pytest.raises(TypeError, match="single string 'cat'"):
        g2p.pronounce("cat", model)
    with pytest.raises(TypeError, match="a word must be a str, got int"):
        g2p.pronounce([7], model)
    assert g2p.pronounce([], model) == []


def test_pronounce_gives_maps():
    said = g2p.pronounce(["Cat", "dog"], small(), attention=True, max_new_tokens=5)
    assert [p.word for p in said] == ["Cat", "dog"]
    assert said[0].letters == ("c", "a", "t", "<eos>")
    for p in said:
        assert p.attention.shape == (2, 2, len(p.phonemes) + 1, 4)
        torch.testing.assert_close(p.attention.sum(-1), torch.ones(p.attention.shape[:-1]))
