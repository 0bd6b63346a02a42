"""The command line: every command, its exit status, and what it says about mistakes."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys

import pytest
import torch

import fastattn
from fastattn import cli
from fastattn.backends.cpu import CpuBackend
from fastattn.models import Seq2Seq, Seq2SeqConfig, g2p
from fastattn.tools import demo, info, position_cases, row_cases, verify_cli, verify_ops
from fastattn.tools.bench.families import FAMILIES

pytestmark = pytest.mark.filterwarnings("ignore::fastattn.FallbackWarning", "ignore:enable_nested_tensor")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small random g2p model, saved."""
    torch.manual_seed(0)
    tokenizer = g2p.train_tokenizer(g2p.load_split().train)
    config = Seq2SeqConfig(
        source_vocab_size=tokenizer.source.vocab_size,
        target_vocab_size=tokenizer.target.vocab_size,
        model_dim=16,
        num_heads=2,
        ff_dim=32,
        num_encoder_layers=1,
        num_decoder_layers=1,
        max_len=40,
    )
    path = tmp_path_factory.mktemp("cli") / "model"
    Seq2Seq(config, tokenizer).save_pretrained(path)
    return path


@pytest.fixture
def model(folder):
    return Seq2Seq.from_pretrained(folder)


def test_the_module_runs_as_a_program():
    done = subprocess.run([sys.executable, "-m", "fastattn", "--version"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stdout == f"fastattn {fastattn.__version__}\n"


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    for command in ("info", "demo", "train", "generate", "bench", "verify", "maps"):
        assert command in text
        with pytest.raises(SystemExit) as stopped:
            cli.main([command, "--help"])
        assert stopped.value.code == 0
        if command == "bench":
            named = capsys.readouterr().out
            assert all(re.search(rf"\b{family}\b", named) for family in FAMILIES)


@pytest.mark.parametrize("arguments", [[], ["danse"], ["bench", "--dtype", "int8"], ["demo", "--threads", "0"]])
def test_what_argparse_refuses(arguments):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2


def test_info(capsys):
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    assert f"torch        {torch.__version__}" in text
    for name in fastattn.backends():
        assert name in text


def test_info_says_how_to_get_what_is_missing(monkeypatch):
    reason = "the extension fastattn._cpu is not built; install g++ and run: pip install -e ."
    monkeypatch.setattr(CpuBackend, "unavailable", lambda self: reason)
    assert reason in info.report()


def test_generate(folder, capsys, monkeypatch):
    assert cli.main(["generate", "--model", str(folder), "--max-new-tokens", "5", "cat", "dog"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    expected = Seq2Seq.from_pretrained(folder).generate(["cat", "dog"], max_new_tokens=5)
    assert lines == expected
    monkeypatch.setattr("sys.stdin", iter(["cat\n", "dog\n"]))
    assert cli.main(["generate", "--model", str(folder), "--max-new-tokens", "5"]) == 0
    assert capsys.readouterr().out.splitlines() == expected


def test_sampling_repeats_with_its_seed(folder, capsys):
    call = ["generate", "--model", str(folder), "--strategy", "sample", "--seed", "3", "--max-new-tokens", "6", "cat"]
    outputs = []
    for _ in range(2):
        assert cli.main(call) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]


def test_the_commit_is_that_of_the_package_or_unknown(tmp_path, monkeypatch):
    def git(*arguments):
        subprocess.run(["git", "-C", tmp_path, *arguments], check=True, capture_output=True)

    if shutil.which("git") is None:
        pytest.skip("needs git")
    package = tmp_path / "fastattn" / "__init__.py"
    package.parent.mkdir()
    package.write_text("")
    monkeypatch.setattr(fastattn, "__file__", str(package))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert info.commit() == "unknown"  # no checkout
    git("init")
    assert info.commit() == "unknown"  # somebody else's checkout
    git("add", ".")
    git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-m", "a")
    clean = info.commit()
    assert re.fullmatch("[0-9a-f]{12}", clean)
    package.write_text("# changed")
    assert info.commit() == clean + "-dirty"
    monkeypatch.setenv("PATH", "")
    assert info.commit() == "unknown"  # no git


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "--model", "no/such/folder", "cat"], "no/such/folder"),
        (["generate", "--num-beams", "0", "--strategy", "beam", "cat"], "num_beams"),
        (["maps", "", "--out", "x.html"], "empty"),
        (["maps", "123", "--out", "x.html"], "1"),
        (["maps", "cat", "--out", "no/such/folder/x.html"], "no/such/folder"),
        (["bench", "atention"], "'attention'"),
        (["bench", "attention", "--rows", "shrt"], "shrt"),
        (["verify", "ops", "--op", "atention"], "'attention'"),
        (["verify", "ops", "--backend", "gpu"], "'cpu'"),
    ],
)
def test_mistakes_are_one_line_and_status_2(arguments, message, folder, capsys, monkeypatch):
    monkeypatch.setattr(g2p, "load_model", lambda: Seq2Seq.from_pretrained(folder))
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith(f"fastattn {arguments[0]}: ")
    assert "Traceback" not in captured.err


def test_control_c_is_quiet(monkeypatch, capsys):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_info", interrupted)
    assert cli.main(["info"]) == cli.INTERRUPTED
    assert capsys.readouterr().err == "\ninterrupted\n"


def test_maps(folder, tmp_path, capsys):
    page, picture = tmp_path / "maps.html", tmp_path / "maps.png"
    assert cli.main(["maps", "cat", "--model", str(folder), "--out", str(page)]) == 0
    assert cli.main(["maps", "cat", "--model", str(folder), "--out", str(picture), "--layers", "*multihead*"]) == 0
    text = page.read_text(encoding="utf-8")
    assert "transformer.decoder.layers.0.multihead_attn" in text
    assert '"columns": ["c", "a", "t", "end"]' in text
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert str(page) in capsys.readouterr().out


def test_demo(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "_BATCH", 4)
    assert demo.run([], tmp_path, model) == 0
    text = capsys.readouterr().out
    for word in g2p.EXAMPLES:
        assert word in text
    for part in ("backend", "held out", "worst error", "peak memory", "training step", "pass", "Done in"):
        assert part in text
    assert len(list(tmp_path.glob("attention-*.png"))) == 1
    assert len(list(tmp_path.glob("attention-*.html"))) == 1


def test_demo_without_matplotlib_still_writes_the_page(model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    lines = demo._draw(model, "cat", tmp_path)
    assert 'pip install "fastattn[demo]"' in lines[-1]
    assert [p.suffix for p in tmp_path.iterdir()] == [".html"]


@pytest.mark.parametrize("word", ["", "route66", "x" * 60, "\u732b"])
def test_demo_refuses_odd_words_before_it_prints(word, model, tmp_path, capsys):
    with pytest.raises(ValueError, match=r"."):
        demo.run(["cat", word], tmp_path, model)
    assert capsys.readouterr().out == ""


def test_the_demos_stock_transformer_computes_what_the_model_does(model):
    model.eval()
    stock = demo.Transcriber(model).eval()
    source, target, padding, causal = demo.batch(model)
    words = list(g2p.load_split().test.items())[: demo._BATCH]
    ids = model.tokenizer.encode_source([w for w, _ in words], on_unknown="ignore")
    read = model.tokenizer.encode_target([p[0] for _, p in words], on_unknown="ignore")[:, :-1]
    # With a graph: PyTorch's inference path zeroes what is padded.
    expected = model.decode(read, model.encode(ids), ids == model.config.pad_id)
    torch.testing.assert_close(stock(source, target, padding, causal), expected, atol=1e-5, rtol=1e-5)


def test_verify_fails_with_status_1(monkeypatch, capsys, folder):
    calls = []

    def failing(**kwargs):
        calls.append(kwargs)
        row = verify_ops.OpResult(
            "attention",
            "none",
            "",
            torch.float32,
            "forward",
            (verify_ops.figure("out", torch.ones(4), torch.zeros(4), torch.zeros(4).double()),),
        )
        return verify_ops.OpReport((row,))

    monkeypatch.setattr(verify_cli, "verify_ops", failing)
    assert cli.main(["verify", "ops", "--dtype", "float32", "--failures"]) == 1
    assert calls[0]["dtypes"] == [torch.float32]
    assert "FAIL" in capsys.readouterr().out
    assert cli.main(["verify", "model", "--model", str(folder)]) == 0
    assert "against a float64 copy of itself: pass" in capsys.readouterr().out


@pytest.mark.parametrize("op", [*row_cases.FAMILIES, *position_cases.FAMILIES])
def test_row_cases_keep_the_rule(op):
    assert verify_ops.verify_ops(ops=[op], dtypes=[torch.bfloat16]).ok
    report = verify_ops.verify_ops(ops=[op], dtypes=[torch.float32])
    assert report.ok, report.table(only_failures=True)
    # The yardstick itself is near: an eager twin of another formula would pass anything.
    for result in report.results:
        for f in result.figures:
            assert f.eager.max < 1e-3, f"{result.op} {result.variant} {f.name}: eager is off by {f.eager.max}"


def test_row_cases_cover_every_feature():
    variants = {c.variant for c in row_cases.feed_forward_cases()}
    assert {
        "relu",
        "gelu",
        "gelu_tanh",
        "silu",
        "relu, gated",
        "silu, gated",
        "relu, no biases",
        "gelu, residual",
    } <= variants
