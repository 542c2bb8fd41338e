"""The command, run as a user runs it: output for people, JSON for programs, exit codes."""

import json
import math
from importlib import import_module, util
from pathlib import Path

import pytest
import torch
from command_line import run, write_tiny

import skim
from skim import cli
from skim.ops import dispatch


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> tuple[str, str]:
    """Folders of a tiny model with a byte tokenizer, and of an adapter for it."""
    return write_tiny(tmp_path_factory.mktemp("tiny"), "abcdefghijklmnopqrstuvwxyz .,")


def test_doctor_names_versions_hardware_and_implementations(monkeypatch, capsys):
    assert run(monkeypatch, "doctor", "--json", "-") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["versions"]["skim"] == skim.__version__ and report["hardware"]["cores"] >= 1
    assert {place.split(" on ")[0] for place in report["operators"]} == set(dispatch.OPERATORS)
    assert report["operators"]["codec on cpu"] == "reference (codec has no numba implementation)"
    assert report["operators"]["select on cpu"] == dispatch.choice("select", torch.device("cpu"))
    assert "compiled and simulated" in report["kernels"]["not run on"]


def test_doctor_says_what_to_install(monkeypatch, capsys, request):
    find = util.find_spec
    monkeypatch.setattr(dispatch.util, "find_spec", lambda name, *rest: None if name == "numba" else find(name, *rest))
    dispatch._module.cache_clear()
    request.addfinalizer(dispatch._module.cache_clear)
    assert run(monkeypatch, "doctor", "--json", "-") == 0
    said = json.loads(capsys.readouterr().out)["operators"]["select on cpu"]
    assert said == "reference (numba is not installed: pip install 'skim-attention[cpu]')"


def test_doctor_says_why_a_gpu_does_not_take_the_fastest_kernels(monkeypatch, request):
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    request.addfinalizer(dispatch._module.cache_clear)
    dispatch._module.cache_clear()
    taken = {operator: cli._taken(operator, torch.device("cuda", 0)) for operator in ("attend", "score")}
    assert set(taken.values()) == {"triton (Gluon kernels here need an NVIDIA GPU of sm_90, this is sm_80)"}


def test_doctor_names_the_limits_that_kernels_have():
    pytest.importorskip("triton")
    said = cli.REFERENCE
    score, select, align = (import_module(f"skim.ops.{operator}.triton") for operator in ("score", "select", "align"))
    assert f"{score.CHANNELS} index channels" in said["score, select on a GPU"] and str(select.BUDGET) in said["score, select on a GPU"]
    assert str(align.LARGEST) in said["align on a GPU"]


@pytest.mark.slow
@pytest.mark.xdist_group("smollm2")
def test_demo_shows_that_dsa_beats_every_rule_on_a_real_model_and_text(monkeypatch, capsys, tmp_path):
    page = tmp_path / "page.html"
    assert run(monkeypatch, "demo", "--tokens", "512", "--budget", "64", "--json", str(tmp_path / "demo.json"), "--page", str(page)) == 0
    printed = capsys.readouterr().out
    assert f"open {page.as_uri()} in a browser" in printed and "What <bdi>smollm2-135m</bdi> read of <bdi>persuasion</bdi>" in page.read_text()
    assert "With DSA it goes on" in printed and "keys of the" in printed and "dense attention" in printed
    result = json.loads((tmp_path / "demo.json").read_text())
    assert (result["model"], result["tokens"], result["budget"]) == ("smollm2-135m", 512, 64)
    rows = {row["pattern"]: row for row in result["rows"]}
    assert list(rows) == ["dense", "dsa", "window", "sinks", "blocks", "random", "oracle"]
    for rule in ("window", "sinks", "blocks", "random"):
        assert rows["dsa"]["perplexity"] < rows[rule]["perplexity"] and rows["dsa"]["attention_mass"] > rows[rule]["attention_mass"]
    assert abs(math.log(rows["dsa"]["perplexity"] / rows["oracle"]["perplexity"])) < 0.03
    assert all(set(row) == {"pattern", "perplexity", "attention_mass", "keys_per_query", "seconds"} for row in result["rows"])


def test_eval_measures_any_model_adapter_texts_and_budgets(monkeypatch, capsys, tiny, tmp_path):
    model, adapter = tiny
    (tmp_path / "a.txt").write_text("the quick brown fox jumps over the lazy dog. " * 4)
    wanted = ("--text", str(tmp_path / "a.txt"), "--budget", "8", "--budget", "16", "--pattern", "dense", "--pattern", "dsa", "--tokens", "96")
    assert run(monkeypatch, "eval", model, "--adapter", adapter, *wanted, "--json", "-") == 0
    result = json.loads(capsys.readouterr().out)
    assert [(r["budget"], [row["pattern"] for row in r["rows"]]) for r in result["results"]] == [(8, ["dense", "dsa"]), (16, ["dense", "dsa"])]


def test_generate_writes_only_the_text_to_standard_output(monkeypatch, capsys, tiny):
    model, adapter = tiny
    assert run(monkeypatch, "generate", model, "the quick brown fox", "--adapter", adapter, "--budget", "4", "--max-new-tokens", "5") == 0
    written = capsys.readouterr()
    assert 0 < len(written.out.strip()) < 80 and "keys of the" in written.err
    assert run(monkeypatch, "generate", model, "the quick", "--adapter", adapter, "--dense", "--max-new-tokens", "3") == 0


def test_failures_end_in_one_line_and_exit_code_1(monkeypatch, capsys, tiny):
    for arguments, said in (
        (("eval", "no/such/model"), "no/such/model"),
        (("eval", tiny[0], "--adapter", "nothing"), "expected a folder, a shipped adapter (smollm2-135m) or a hub id"),
        (("eval", tiny[0], "--adapter", tiny[1], "--text", "nowhere.txt"), "expected a file or one of"),
        (("eval", tiny[0], "--adapter", tiny[1], "--pattern", "dsaa"), "patterns: expected some of"),
        (("doctor", "--json", "no/such/folder/x.json"), "no/such/folder"),
    ):
        assert run(monkeypatch, *arguments) == 1
        error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("skim: ")]
        assert len(error) == 1 and said in error[0]


def test_wrong_usage_is_exit_code_2(monkeypatch, capsys):
    assert run(monkeypatch, "demo", "--budget", "0") == 2
    assert run(monkeypatch, "nothing") == 2


def test_json_is_written_whole_or_not_at_all(monkeypatch, tmp_path):
    target = tmp_path / "x.json"
    target.write_text("old")
    monkeypatch.setattr(cli.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        cli._write_json(str(target), {"a": 1})
    assert target.read_text() == "old" and list(Path(tmp_path).iterdir()) == [target]
