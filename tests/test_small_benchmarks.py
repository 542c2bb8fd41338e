"""benchmarks/transfer.py and benchmarks/killed.py: they run, and measure what they say."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
if not BENCHMARKS.exists():
    pytest.skip("benchmarks are in the repository only", allow_module_level=True)


def script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


transfer, killed = script("transfer"), script("killed")


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(monkeypatch, module, *arguments):
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, arguments)])
    module.main()


def test_a_question_has_one_answer_in_a_document_and_another_elsewhere():
    words = transfer.texts(8, 256, seed=3)
    told = [dict(zip(document[::2].tolist(), document[1::2].tolist())) for document in words]
    for document, answers in zip(words, told):
        assert [answers[question] for question in document[::2].tolist()] == document[1::2].tolist()
    assert len({answers[0] for answers in told if 0 in answers}) > 1
    assert words.min() == 0 and words.max() < transfer.WORDS


def test_fresh_weights_are_as_much_larger_as_asked():
    layer = torch.nn.Module()
    layer.indexer = transfer.skim.modules.LightningIndexer(64, n_heads=2, head_dim=16, rope_dim=8)
    sizes = []
    for factor in (1.0, 4.0):
        torch.manual_seed(0)
        with transfer.fresh_weights(factor):
            transfer.stage.initialise({layer: 0.5})
        sizes.append(layer.indexer.wq_b.weight.detach().clone())
    torch.testing.assert_close(sizes[1], 4 * sizes[0])


def test_transfer_runs_and_says_everything(monkeypatch, tmp_path, capsys):
    name = "Qwen3, norms of queries and keys"
    monkeypatch.setattr(transfer, "MODELS", {name: transfer.MODELS[name]})
    monkeypatch.setattr(transfer, "SETTINGS", ((1.0, 1.0), (4.0, 0.25)))
    run(monkeypatch, transfer, "--quick", "--device", "cpu", "--json", tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["quick"] and found["command"] == "python benchmarks/transfer.py --json FILE" and "commit" in found
    assert [(row["rate"], row["init"]) for row in found["rows"]] == list(transfer.SETTINGS)
    for row in found["rows"]:
        assert row["share"] == row["kept_mass"]["dsa"] / row["kept_mass"]["oracle"] > 0
        expected = 1e-2 * row["rate"] * 0.345 * 576 / (row["input_rms"] * 64)
        assert row["matrices_lr"] == pytest.approx(expected)
    assert len(capsys.readouterr().out.splitlines()) == len(transfer.SETTINGS)


@pytest.mark.slow
def test_a_kill_leaves_whole_files_and_the_run_as_it_would_have_been(monkeypatch, tmp_path):
    monkeypatch.setattr(killed, "STEPS", {"warmup": 12, "sparse": 12})
    run(monkeypatch, killed, "--kills", 1, "--stages", "warmup", "--json", tmp_path / "found.json")
    (row,) = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert row["kills"] == len(row["at"]) == 1 and row["corrupt"] == row["differences"] == [] and row["final"]["kl"] > 0


def test_what_is_broken_or_another_is_named(tmp_path):
    for name, text in (("whole", "{"), ("out", "{}")):
        (tmp_path / name / "adapter").mkdir(parents=True)
        (tmp_path / name / "adapter" / "skim_config.json").write_text(text)
        (tmp_path / name / "run.json").write_text(json.dumps({"loss": [], "kl": [len(text)], "kept_mass": {}}))
    state = tmp_path / "out" / "checkpoints" / "step-00000002"
    state.mkdir(parents=True)
    torch.save({"run": {"step": 3}}, state / "state.pt")
    (tmp_path / "out" / ".writing-x").mkdir()
    assert killed.differences(tmp_path / "out", tmp_path / "whole") == ["kl", "adapter/skim_config.json", ".writing-x"]
    assert list(killed.corrupt(tmp_path / "out")) == ["checkpoints/step-00000002/state.pt: another step's"]
    (state / "state.pt").write_bytes((state / "state.pt").read_bytes()[:-100])
    assert [line.split(":")[0] for line in killed.corrupt(tmp_path / "out")] == ["checkpoints/step-00000002/state.pt"]
    assert [line.split(":")[0] for line in killed.corrupt(tmp_path / "whole")] == ["adapter/skim_config.json"]
