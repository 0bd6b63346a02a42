"""README and docs quote no figure of speed that is not in a committed results file."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "benchmarks" / "quote.py"

pytestmark = pytest.mark.skipif(not SCRIPT.exists(), reason="not a checkout")


@pytest.fixture(scope="module")
def quote():
    spec = importlib.util.spec_from_file_location("quote", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["quote"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["quote"]


@pytest.fixture
def results(quote, tmp_path, monkeypatch):
    def line(row, dtype, ratio, **more):
        times = {"fastattn": {"median": 100.0}, "torch SDPA": {"median": 100.0 * ratio}}
        fixed = {"family": "attention", "direction": "forward", "best_peer": "torch SDPA", "unit": "GFLOP/s"}
        return {
            **fixed,
            "row": row,
            "dtype": dtype,
            "ratio": ratio,
            "times_us": times,
            "rate": 7.0,
            "error": 2e-7,
            **more,
        }

    lines = [
        {"environment": {}, "limits": {"read": 12.6}},
        line("long", "float32", 9.0),
        line("short", "float32", 1.5),
        line("long", "float32", 2.0, rate=9.0, share=0.5),  # a later run of the row counts
        line("short", "bfloat16", 3.0),
        line("long", "bfloat16", 4.0, backend="triton"),
    ]
    (tmp_path / "one.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "demo.txt").write_text("hello\n")
    monkeypatch.setattr(quote, "RESULTS", tmp_path)
    return tmp_path


def test_the_pages_quote_the_committed_results(quote):
    found = quote.pages()
    assert {"README.md", "architecture.md"} <= {page.name for page in found}
    for page in found:
        text = page.read_text(encoding="utf-8")
        assert quote.rewritten(text) == text, f"{page}: run `python benchmarks/quote.py`"
        assert quote.unsupported(text) == [], f"{page}: figures from nowhere"
    assert "<!-- quote: table family=attention -->" in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("ratio row=long", "2.00"),
        ("ratio row=long backend=triton", "4.00"),
        ("ratio family=attention dtype=float32", "1.50 to 2.00"),
        ('ratio row=s*|missing dtype=bfloat16 direction="forward"', "3.00"),
        ("mean dtype=float32", "1.73"),
        ("lowest family=attention", "1.50"),
        ("rate dtype=float32", "7 to 9 GFLOP/s"),
        ("share row=long", "50%"),
        ("error row=long", "2e-07"),
        ("time row=long", "100 us"),
        ('time row=long peer="torch SDPA"', "200 us"),
        ("peers family=attention", "torch SDPA (3)"),
        ("limit name=read", "13 GB/s"),
        ("file demo.txt", "```text\nhello\n```"),
        (
            "table family=attention",
            "| attention row | short | long |\n|---|---|---|\n"
            "| forward, float32 | 1.50 | 2.00 |\n| forward, bfloat16 | 3.00 |  |",
        ),
        (
            "summary dtype=float32",
            "| what | rows | geometric mean | lowest |\n|---|---|---|---|\n"
            "| attention, forward, float32 | 2 | 1.73 | 1.50 (short) |",
        ),
    ],
)
def test_what_can_be_quoted(asked, expected, quote, results):
    assert quote.quoted(asked) == expected


def test_a_page_is_brought_up_to_date(quote, results):
    page = "It is <!-- quote: ratio row=long -->1.23<!-- end --> x.\n<!-- quote: file demo.txt -->\nold\n<!-- end -->\n"
    new = quote.rewritten(page)
    assert new == page.replace("1.23", "2.00").replace("old", "```text\nhello\n```")
    assert quote.rewritten(new) == new


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ("ratio row=nobody", "no row"),
        ("speed row=long", "kind must be"),
        ("limit name=float32", "float32"),
        ("ratio row=long results=*.json", "0 files"),
        ("file nothing.txt", "nothing.txt"),
    ],
)
def test_a_quotation_of_nothing_is_refused(asked, reason, quote, results):
    with pytest.raises(ValueError, match="quote: " + asked.split()[0]) as error:
        quote.rewritten(f"<!-- quote: {asked} -->1.23<!-- end -->")
    assert reason in str(error.value)


def test_a_figure_from_nowhere_is_noticed(quote):
    page = "Takes 12 ms, or 3.5 GB/s, 2 x faster.\n```\n7 ms\n```\n## How fast\n1.25, torch 2.13.0\n## More\n0.5\n"
    assert quote.unsupported(page) == ["12 ms", "3.5 GB/s", "2 x faster", "1.25"]
    assert quote.unsupported("<!-- quote: ratio row=long -->1.25<!-- end --> and 12 words") == []


def test_the_command_says_what_differs_and_changes_it(quote, results, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(quote, "ROOT", tmp_path)
    monkeypatch.setattr(quote, "pages", lambda: [tmp_path / "README.md"])
    (tmp_path / "README.md").write_text("<!-- quote: ratio row=long -->1.23<!-- end -->")
    assert quote.main(["--check"]) == 1
    assert "README.md: differs" in capsys.readouterr().out
    assert quote.main([]) == 0
    assert quote.main(["--check"]) == 0
    assert "2.00" in (tmp_path / "README.md").read_text()
