"""`skim show`, run as a user runs it on a tiny model."""

import json
import re

import pytest
from command_line import run, write_tiny
from test_page import EVALUATION

SENTENCE = "the quick brown fox jumps over the lazy dog.\n"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> tuple[str, str]:
    """Folders of a tiny model with a tokenizer of letters, and of an adapter for it."""
    return write_tiny(tmp_path_factory.mktemp("tiny"), "abcdefghijklmnopqrstuvwxyz .\n")


def data(page) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="page">(.*?)</script>', page.read_text(), re.DOTALL)[1])


def test_show_writes_a_page_of_any_model_adapter_and_text(monkeypatch, capsys, tiny, tmp_path):
    model, adapter = tiny
    (tmp_path / "fox.txt").write_text(SENTENCE * 4)
    (tmp_path / "eval.json").write_text(json.dumps(EVALUATION))
    page = tmp_path / "page.html"
    wanted = ("--text", str(tmp_path / "fox.txt"), "--tokens", "120", "--budget", "12", "--dense", "--eval", str(tmp_path / "eval.json"))
    assert run(monkeypatch, "show", model, "--adapter", adapter, *wanted, "--out", str(page)) == 0
    assert f"open {page.as_uri()} in a browser" in capsys.readouterr().out
    shown = data(page)
    assert "".join(shown["pieces"]) == (SENTENCE * 4)[:120] and (shown["budget"], shown["stride"], shown["dense"]) == (12, 1, True)
    assert [layer["number"] for layer in shown["layers"]] == [0, 1] and shown["quality"][0]["pattern"] == "DSA"
    html = page.read_text()
    assert html.count('<tr><th scope="row">dense</th>') == 1 and "fox.txt" in html and str(tmp_path) not in html


def test_show_reads_with_the_adapter_s_budget_and_looks_at_less_without_dense(monkeypatch, tiny, tmp_path):
    (tmp_path / "fox.txt").write_text(SENTENCE * 2)
    page = tmp_path / "page.html"
    assert run(monkeypatch, "show", tiny[0], "--adapter", tiny[1], "--text", str(tmp_path / "fox.txt"), "--out", str(page)) == 0
    shown = data(page)
    assert (shown["budget"], shown["stride"], shown["dense"]) == (16, 4, False)
    assert 'oracle">' not in page.read_text()


def test_failures_end_in_one_line(monkeypatch, capsys, tiny, tmp_path):
    (tmp_path / "bad.json").write_text("{}")
    base = ("show", tiny[0], "--adapter", tiny[1], "--tokens", "40", "--out", str(tmp_path / "page.html"))
    for arguments, said in (
        (("--text", "nowhere"), "expected a file or one of"),
        (("--eval", str(tmp_path / "bad.json")), "eval: expected what `skim eval --json` writes"),
        (("--eval", str(tmp_path / "none.json")), "none.json"),
    ):
        assert run(monkeypatch, *base, *arguments) == 1
        error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("skim: ")]
        assert len(error) == 1 and said in error[0]
    assert not (tmp_path / "page.html").exists()
