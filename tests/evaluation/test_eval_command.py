"""`skim eval` and `skim export`, run as a user runs them on a tiny model."""

import json
import os
import subprocess
import sys

import pytest
import torch
import transformers
from command_line import run, write_tiny
from tiny_model import converted

import skim

SENTENCE = "the quick brown fox jumps over the lazy dog. "


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> tuple[str, str]:
    """Folders of a tiny model with a tokenizer of letters, and of an adapter for it."""
    model = converted()
    model.resize_token_embeddings(64, mean_resizing=False)
    return write_tiny(tmp_path_factory.mktemp("tiny"), "abcdefghijklmnopqrstuvwxyz0123456789TR .,?\n", unknown="#", model=model)


def test_eval_by_domain_with_intervals_several_budgets_and_a_plot(monkeypatch, capsys, tiny, tmp_path):
    pytest.importorskip("matplotlib")
    model, adapter = tiny
    (tmp_path / "prose").mkdir()
    for name in "ab":
        (tmp_path / "prose" / f"{name}.txt").write_text(f"{name} " + SENTENCE * 4)
    (tmp_path / "code.md").write_text("pass. " * 40)
    texts = ("--text", str(tmp_path / "prose"), "--text", str(tmp_path / "code.md"), "--tokens", "96", "--windows", "2")
    wanted = ("--budget", "8", "--budget", "16", "--pattern", "dense", "--pattern", "dsa", "--pattern", "sinks")
    outputs = ("--json", str(tmp_path / "x.json"), "--plot", str(tmp_path / "x.png"))
    assert run(monkeypatch, "eval", model, "--adapter", adapter, *texts, *wanted, *outputs) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "2 domains, budget 8" in printed and "by position, budget 16" in printed and "by domain, budget 8" in printed
    result = json.loads((tmp_path / "x.json").read_text())
    assert [(r["text"], r["budget"], r["windows"], r["tokens"]) for r in result["results"]] == [
        (text, budget, 2, 96) for text in (str(tmp_path / "prose"), str(tmp_path / "code.md")) for budget in (8, 16)
    ]
    assert "Student's t" in result["interval"]
    for overall, keys in zip(result["overall"], (8, 16)):
        dense, dsa, _ = overall["rows"]
        assert (overall["budget"], overall["windows"], dense["over_dense"]) == (keys, 4, None)
        assert dsa["over_dense"]["low"] < dsa["over_dense"]["mean"] < dsa["over_dense"]["high"]
        assert {"pattern", "perplexity", "attention_mass", "keys_per_query", "seconds", "by_position"} <= set(dsa) and len(dsa["nll"]) == 4
        assert dsa["beyond_twice_budget"]["start"] == 2 * keys - 1
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_eval_of_adaptive_budgets_and_against_another_model(monkeypatch, capsys, tiny, tmp_path):
    pytest.importorskip("matplotlib")
    model, adapter = tiny
    chats = tmp_path / "chats.jsonl"
    chats.write_text("".join(json.dumps({"text": f"{letter} {SENTENCE * 4}"}) + "\n" for letter in "abc"))
    wanted = ("--text", str(chats), "--tokens", "96", "--windows", "3", "--budget", "8", "--pattern", "dense", "--pattern", "dsa", "--against", model)
    outputs = ("--json", str(tmp_path / "x.json"), "--plot", str(tmp_path / "x.png"))
    masses = ("--mass", "0.5", "--mass", "0.8", "--min-budget", "2")
    assert run(monkeypatch, "eval", model, "--adapter", adapter, *wanted, *masses, *outputs) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "adaptive budget of 2 to 32 keys" in printed and "the same most probable next token" in printed
    result = json.loads((tmp_path / "x.json").read_text())
    assert [one["document"] for one in result["windows"]] == [f"{chats}:{number}" for number in (1, 2, 3)]
    for one, mass in zip(result["adaptive"], (0.5, 0.8), strict=True):
        assert one["budget"] == {"mass": mass, "min_budget": 2, "budget": 32}
        assert 0 <= one["fixed"]["keys_per_query"] - one["adaptive"]["keys_per_query"] < 1
        assert one["over_fixed"]["mean"] == pytest.approx(sum(one["adaptive"]["nll"]) / 3 - sum(one["fixed"]["nll"]) / 3)
    dense, dsa = result["agreement"]["rows"]
    assert (dense["pattern"], dense["top1"], dsa["budget"]) == ("dense", 1, 8) and 0 <= dense["kl"] < 1e-6 < dsa["kl"] and len(dsa["kl_by_row"]) == 3


def test_eval_of_tasks_reads_no_other_text(monkeypatch, capsys, tiny, tmp_path):
    model, adapter = tiny
    tasks = ("--tasks", "passkey,multikey", "--lengths", "500,600", "--depths", "2", "--samples", "1", "--seed", "3")
    wanted = ("--budget", "16", "--pattern", "dense", "--pattern", "dsa", "--json", "-")
    assert run(monkeypatch, "eval", model, "--adapter", adapter, *tasks, *wanted) == 0
    result = json.loads(capsys.readouterr().out)
    found = result["retrieval"]
    assert result["results"] == [] and "overall" not in result
    assert [(row["task"], row["length"], row["pattern"], row["prompts"]) for row in found["rows"]] == [
        (task, length, pattern, 2) for task in ("passkey", "multikey") for length in (500, 600) for pattern in ("dense", "dsa")
    ]
    assert (found["seed"], found["samples"], found["depths"], found["filler"]) == (3, 1, 2, None) and "Agresti" in found["interval"]


def test_eval_says_what_is_wrong(monkeypatch, capsys, tiny, tmp_path):
    (tmp_path / "short").mkdir()
    (tmp_path / "short" / "a.txt").write_text("too short")
    for arguments, said in (
        (("--tasks", "poetry"), "tasks: expected some of passkey"),
        (("--mass", "1.5"), "mass: expected None or a number above 0 and at most 1, got 1.5"),
        (("--mass", "0.5", "--min-budget", "2000"), "min_budget: expected an int from 1 to budget (1024), got 2000"),
        (("--tasks", "all", "--lengths", "2k"), "lengths: expected numbers of tokens such as 2048,4096, got '2k'"),
        (("--tasks", "passkey", "--lengths", "64"), "lengths: expected at least"),
        (("--text", str(tmp_path / "short")), "of at least 4096 tokens in"),
    ):
        assert run(monkeypatch, "eval", tiny[0], "--adapter", tiny[1], *arguments) == 1
        assert said in " ".join(capsys.readouterr().err.split())


def test_export_writes_a_folder_for_other_programs(monkeypatch, tiny, tmp_path):
    model, adapter = tiny
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    out = str(tmp_path / "out")
    assert run(monkeypatch, "export", model, adapter, out, "--budget", "8", "--dtype", "float32") == 0
    loaded = transformers.AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)  # asks for no trust: it is the family's own
    own, _ = skim.load_model(model, dtype=torch.float32)
    skim.use(skim.load(own, adapter), budget=8)
    tokens = tokenizer(SENTENCE, return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, own(tokens).logits)
    for arguments, code in (((model, adapter, out), 1), ((model, adapter, out + "2", "--dtype", "int8"), 1), ((model, adapter), 2)):
        assert run(monkeypatch, "export", *arguments) == code
    assert not os.path.exists(out + "2")


@pytest.mark.slow
def test_lm_eval_reads_an_exported_model_like_any_other(tiny, tmp_path):
    """Offline, on a task made here; in a process of its own, because lm_eval is heavy."""
    pytest.importorskip("lm_eval", reason="needs lm_eval (pip install lm-eval)")
    model, tokenizer = skim.load_model(tiny[0], dtype=torch.float32)
    skim.use(skim.load(model, tiny[1]), budget=8)
    skim.export(model, tmp_path / "out", tokenizer)
    rows = [{"question": (SENTENCE * 2).strip(), "answers": ["the fox", "the dog"], "right": i % 2} for i in range(4)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "foxes.yaml").write_text(
        f"task: foxes\ndataset_path: json\ndataset_kwargs:\n  data_files: {{test: {tmp_path / 'data.jsonl'}}}\ntest_split: test\n"
        "output_type: multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_choice: answers\ndoc_to_target: right\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    arguments = ["--model", "hf", "--model_args", f"pretrained={tmp_path / 'out'},trust_remote_code=True,dtype=float32", "--tasks", "foxes"]
    options = ["--include_path", str(tmp_path), "--device", "cpu", "--batch_size", "1", "--output_path", str(tmp_path / "found"), "--log_samples"]
    caches = {"HF_HOME": str(tmp_path / "home"), "HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-m", "lm_eval", *arguments, *options], capture_output=True, text=True, env={**os.environ, **caches})
    assert done.returncode == 0, done.stderr[-2000:]
    (samples,) = (tmp_path / "found").rglob("samples_foxes_*.jsonl")
    told = json.loads(samples.read_text().splitlines()[0])
    question, answer = (tokenizer(text, return_tensors="pt").input_ids for text in ((SENTENCE * 2).strip(), " the fox"))
    tokens = torch.cat((question, answer), 1)
    with torch.no_grad():
        logits = model(tokens).logits[0, question.shape[1] - 1 : -1].log_softmax(-1)
    expected = float(logits.gather(1, answer[0][:, None]).sum())
    assert float(told["filtered_resps"][0][0]) == pytest.approx(expected, rel=1e-4)
