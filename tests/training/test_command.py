"""`skim train`, run as a user runs it."""

import json
from functools import partial

import pytest
import transformers
from command_line import run
from tiny_model import sharp_llama, text
from tiny_training import chat_tokenizer, write_texts

import skim
from skim.training import command


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A working folder with a model and texts, and a function that runs `skim ARGUMENTS` there and gives its exit code."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    sharp_llama().save_pretrained("model")
    chat_tokenizer().save_pretrained("model")
    write_texts(tmp_path / "texts")

    return partial(run, monkeypatch)


def test_both_stages_one_after_the_other(tiny, tmp_path, capsys):
    small = ["--length", "96", "--budget", "16", "--steps", "4"]
    assert tiny("train", "warmup", "model", "--data", "texts", *small, "--heads", "2", "--head-dim", "16", "--json", "-") == 0
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    assert report["model"] == "model" and report["sources"] == ["texts"] and report["config"]["index_n_heads"] == 2
    assert "16 keys, the budget" in printed.err and "GiB of memory" in printed.err and "tokens/s" in printed.err and "KL by fifths" in printed.err
    assert tiny("train", "sparse", "model", "--data", "texts", "--length", "96", "--steps", "2", "--checkpointing", "--json", "run.json") == 0
    report = json.loads((tmp_path / "run.json").read_text())
    assert report["recipe"]["loss"] == "distill" and report["config"]["budget"] == 16, "a chat model; the adapter's budget"
    assert report == json.loads((tmp_path / "skim-model-sparse" / "run.json").read_text())
    model = skim.load(transformers.AutoModelForCausalLM.from_pretrained("skim-model-sparse/model"), "skim-model-sparse/adapter")
    assert model(text(64)).logits.isfinite().all()
    assert tiny("train", "warmup", "model", "--data", "texts", *small) == 1, "the folder is there"
    assert "--resume" in capsys.readouterr().err


def test_a_dry_run_writes_no_folder(tiny, tmp_path, capsys):
    assert tiny("train", "warmup", "model", "--data", "texts", "--budget", "16", "--length", "96", "--dry-run") == 0
    assert "1,800 steps of 96 tokens" in capsys.readouterr().out
    assert not (tmp_path / "skim-model-warmup").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("warmup", "model", "--data", "missing.txt"), 1, "data: expected .txt, .md"),
        (("warmup", "model", "--data", "texts", "--length", "96"), 1, "data: expected queries that see more than the budget of 512 keys"),
        (("warmup", "model", "--data", "texts", "--precision", "fp8"), 1, "precision: expected None, 'bf16' or 'fp32', got 'fp8'"),
        (("warmup", "model", "--data", "texts", "--steps", "0"), 2, "steps"),
        (("warmup", "model"), 2, "data"),
        (("sparse", "model", "--data", "texts"), 1, "adapter: expected trained indexers, got no --adapter and no skim-model-warmup/adapter"),
        (("sparse", "model", "--data", "texts", "--loss", "mse"), 1, "loss: expected None, 'lm' or 'distill', got 'mse'"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(tiny, capsys, arguments, code, message):
    assert tiny("train", *arguments) == code
    assert message in capsys.readouterr().err


def test_rows_are_as_long_as_the_model_can_read_and_8192_at_most(tiny, monkeypatch):
    lengths = []

    def prepare(sources, tokenizer, length):
        lengths.append(length)
        raise ValueError("enough")

    monkeypatch.setattr(command, "prepare", prepare)
    for more in ([], ["--length", "64"], ["--length", "600"]):
        assert tiny("train", "warmup", "model", "--data", "texts", *more) == 1
    assert lengths == [512, 64, 600]
