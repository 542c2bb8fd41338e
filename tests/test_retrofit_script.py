"""benchmarks/retrofit.py from end to end on a tiny model, and what it makes of known numbers."""

import hashlib
import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from skim.evaluation import retrieval
from skim.training.data import order

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from tiny_model import VOCABULARY, sharp_llama  # noqa: E402

BENCHMARKS = HERE.parent / "benchmarks"
if not BENCHMARKS.exists():
    pytest.skip("benchmarks are in the repository only", allow_module_level=True)


def script(name: str, folder: Path = BENCHMARKS) -> Any:
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


retrofit, score = script("retrofit"), script("score")
WINDOW = 256
HELD_OUT = ("novel", "manual", "novel")


def write_model(folder: Path) -> Path:
    words = {f"w{i}": i for i in range(VOCABULARY - 1)}
    made = Tokenizer(models.WordLevel({**words, "?": VOCABULARY - 1}, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="?")
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} . {% endfor %}assistant"
    tokenizer.save_pretrained(folder)
    sharp_llama().save_pretrained(folder)
    return folder


def write_corpus(folder: Path, window: int = WINDOW) -> Path:
    folder.mkdir()
    splits, numbers = {}, np.random.default_rng(0)
    for split, domains in (("train", ("manual",) * 4), ("selection", ("manual",) * 2), ("heldout", HELD_OUT)):
        data = numbers.integers(0, VOCABULARY, (len(domains), window)).astype(np.uint16).tobytes()
        (folder / f"{split}.bin").write_bytes(data)
        splits[split] = {
            "file": f"{split}.bin",
            "sha256": hashlib.sha256(data).hexdigest(),
            "windows": len(domains),
            "windows_by_domain": {},
            "documents": [{"domain": domain, "name": f"{domain}-{i}"} for i, domain in enumerate(domains)],
            "order": [[i, 0] for i in range(len(domains))],
        }
    (folder / "corpus.json").write_text(json.dumps({"window": window, "dtype": "uint16", "splits": splits}))
    return folder


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["retrofit.py", *arguments, "--warmup-steps", "3", "--sparse-steps", "2"])
    retrofit.main()


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrofit, "RATES", (1e-3,))
    monkeypatch.setattr(retrofit, "INDEXERS", ((2, 32),))
    monkeypatch.setattr(retrofit, "QUESTIONS", ("w1 w2 w3 ?", "w4 w5"))
    monkeypatch.setattr(retrofit, "ANSWER", 4)
    monkeypatch.setattr(retrofit, "RETRIEVAL_DEPTHS", 1)
    monkeypatch.setattr(retrofit, "RETRIEVAL_SAMPLES", 2)
    monkeypatch.setattr(retrofit, "RETRIEVAL_SHARES", (1,))
    monkeypatch.setattr(retrofit, "SEEDS", (0, 1))
    monkeypatch.setattr(retrieval, "COUNTS_FROM", 0.0)  # a model with random weights finds nothing
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def lab(tmp_path: Path) -> list[str]:
    """The arguments that name a tiny model, its corpus and an empty folder of results."""
    names = {"--model": write_model(tmp_path / "model"), "--corpus": write_corpus(tmp_path / "corpus"), "--out": tmp_path / "out"}
    return [str(word) for pair in names.items() for word in pair]


def written(folder: Path) -> dict[Path, int]:
    return {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()}


@pytest.mark.slow
def test_every_job_runs_and_the_report_fills_the_table(monkeypatch, lab, tmp_path, capsys):
    run(monkeypatch, *lab, "--report", str(tmp_path / "report.json"))
    out, jobs = tmp_path / "out", retrofit.Lab(tmp_path / "corpus", tmp_path / "out", "").jobs
    assert {file.stem for file in out.glob("*.json")} == set(jobs)
    assert not list(out.glob(".*")) and not list(out.glob("trained/*/checkpoints"))

    found = json.loads((tmp_path / "report.json").read_text())
    assert {row["case"] for row in found["rows"]} == {f"R{i}" for i in range(1, 10)}
    both = [row for row in found["rows"] if row["case"] == "R1"]
    assert {row["loss"] for row in both} == {"distill", "lm"} and {row["seeds"] for row in both} == {2}
    assert {job["job"] for job in found["jobs"]} == set(jobs)
    targets = {target.id: target for target in score.TARGETS}
    assert all(score.score(targets[name], [("report.json", found)]) is not None for name in ("R7", "R8", "R9"))  # others name budgets of 8192 tokens

    proof = script("proof", BENCHMARKS.parent / "docs")
    apart = "recipes_on_the_selection_split"  # which no job measures
    found[apart] = json.loads((BENCHMARKS / "results/smollm2-retrofit.json").read_text())[apart]
    for name, make in proof.TABLES.items():
        arguments = ["16"] if name == "domains" else []
        header, rows = make(found, *arguments)
        assert rows and all(len(row) == len(header) for row in rows), name
        assert make({"rows": [], "jobs": []}, *arguments) is None, name
    proof.draw(found, tmp_path / "proof.svg")

    before = written(out)
    capsys.readouterr()
    run(monkeypatch, *lab)
    assert capsys.readouterr().out == "" and written(out) == before


def test_the_dense_control_reads_every_key(monkeypatch, lab, tmp_path):
    run(monkeypatch, *lab, "--jobs", "dense-lm-0.001,sparse-lm-0.001")
    losses = {kind: json.loads((tmp_path / f"out/trained/{kind}-lm-0.001-0-S/run.json").read_text())["loss"] for kind in ("dense", "sparse")}
    rows = retrofit.Lab(tmp_path / "corpus", tmp_path / "out", "").rows
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokens = rows[order(len(rows), 0, 0)[0]]["input_ids"][None]
    with torch.no_grad():
        untouched = float(model(tokens, labels=tokens).loss)
    assert losses["dense"][0] == pytest.approx(untouched, abs=1e-4)
    assert abs(losses["sparse"][0] - untouched) > 1e-3


def test_a_job_that_fails_costs_no_other_and_no_training(monkeypatch, lab, tmp_path, capsys):
    def broken(*_: Any) -> None:
        raise RuntimeError("out of luck")

    with monkeypatch.context() as patch:
        patch.setattr(retrofit, "measure", broken)
        with pytest.raises(SystemExit, match="failed: patterns-16"):
            run(patch, *lab, "--jobs", "patterns-16,warmup-0")
    assert "out of luck" in capsys.readouterr().err
    before = written(tmp_path / "out")
    assert [file.stem for file in (tmp_path / "out").glob("*.json")] == ["warmup-0"]
    run(monkeypatch, *lab, "--jobs", "patterns-16,warmup-0")
    after = written(tmp_path / "out")
    assert before.items() <= after.items() and {file.name for file in after.keys() - before.keys()} == {"patterns-16.json"}


def test_no_job_begins_when_the_minutes_are_over(monkeypatch, lab, tmp_path, capsys):
    run(monkeypatch, *lab, "--jobs", "warmup-*", "--minutes", "-1")
    assert capsys.readouterr().out.count("not begun") == 2 and not list((tmp_path / "out").glob("*.json"))


@pytest.mark.slow
def test_killed_in_the_middle_of_a_training_run_it_goes_on(lab, tmp_path):
    short = write_corpus(tmp_path / "short", window=64)
    command = [sys.executable, str(BENCHMARKS / "retrofit.py"), *lab, "--corpus", str(short), "--jobs", "warmup-0", "--warmup-steps", "130"]
    trained = tmp_path / "out/trained/warmup-0-S-4x64"
    process = subprocess.Popen(command)
    while not list(trained.glob("checkpoints/step-*")):
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert not (trained / "run.json").exists()
    first = min((trained / "checkpoints").glob("step-*"))
    began = first.stat().st_mtime_ns
    subprocess.run(command, check=True)
    result = json.loads((tmp_path / "out/warmup-0.json").read_text())
    assert result["training"]["steps"] == 130 and began < (trained / "run.json").stat().st_mtime_ns
    assert not list(tmp_path.rglob(".writing-*"))


def test_another_corpus_than_it_says_is_refused(lab, tmp_path):
    (tmp_path / "corpus/heldout.bin").write_bytes(bytes(2 * WINDOW * len(HELD_OUT)))
    with pytest.raises(ValueError, match="heldout split"):
        retrofit.Lab(tmp_path / "corpus", tmp_path / "out", "")


def test_no_held_out_domain_outweighs_the_others(monkeypatch, lab, tmp_path):
    monkeypatch.setattr(retrofit, "WINDOWS_OF_A_DOMAIN", 1)
    made = retrofit.Lab(tmp_path / "corpus", tmp_path / "out", "")
    assert [(domain, document) for _, domain, document in made.places("heldout")] == [("novel", "novel-0"), ("manual", "manual-1")]


def test_equal_budget_is_what_a_fixed_one_reads_on_average():
    assert [retrofit.equal_budget(np.minimum(np.arange(1, 101), b).mean(), [100]) for b in (1, 17, 100)] == [1, 17, 100]


def test_percent_of_a_constant_difference():
    found = retrofit.percent([1.01, 2.01, 3.01, 4.01], [1.0, 2.0, 3.0, 4.0], ["a", "a", "b", "c"])
    assert found == {name: pytest.approx(100 * np.expm1(0.01)) for name in ("percent", "low", "high")}


class TwoSeeds:
    """Results of two seeds at budget 256: sparse reading costs a seed 0.01 and the other 0.03 over its own control."""

    window, budgets, jobs, model_name = 8192, [1024, 512, 256, 128], dict.fromkeys(("heldout",)), "m"

    def __init__(self, out: Path) -> None:
        self.out = out

    def headline(self) -> str:
        return "lm"

    def places(self, split: str) -> list[tuple[int, str, str]]:
        return [(i, "novel", f"document {i}") for i in range(4)]


def test_of_learning_rates_that_differ_by_chance_the_smallest_is_taken(monkeypatch, lab, tmp_path):
    monkeypatch.setattr(retrofit, "RATES", (1e-4, 2e-4, 4e-4))
    losses = {1e-4: [2.0, 3.0, 2.5], 2e-4: [1.2, 1.8, 1.4], 4e-4: [1.0, 1.9, 1.3]}
    found = retrofit.Lab(tmp_path / "corpus", tmp_path / "out", "")
    found.out.mkdir()
    for rate, nll in losses.items():
        (tmp_path / "out" / f"{retrofit.search('sparse', 'lm', rate)}.json").write_text(json.dumps({"rows": [{"nll": nll}]}))
    assert found.best("sparse", "lm") == 2e-4  # 0.07 nats behind the best, with a standard error of 0.09


def test_r1_pairs_each_seed_with_its_own_control(tmp_path):
    report = retrofit.Report(TwoSeeds(tmp_path))
    nll = np.array([1.0, 2.0, 3.0, 4.0])
    for seed, cost in ((0, 0.01), (1, 0.03)):
        dense = {"pattern": "dense", "budget": None, "nll": nll + seed, "beyond": {str(b): nll for b in (512, 256, 128)}}
        sparse = [{"pattern": "dsa", "budget": b, "nll": nll + seed + cost, "beyond": {str(b): nll + 2 * cost}} for b in (512, 256, 128)]
        report.results |= {f"heldout-dense-lm-{seed}": {"rows": [dense]}, f"heldout-sparse-lm-{seed}": {"rows": sparse}}
    rows = [row for row in report.r1() if row["budget"] == 256]
    assert len(rows) == 1 and rows[0]["headline"] and rows[0]["seeds"] == 2
    assert rows[0]["percent"] == pytest.approx(100 * np.expm1(0.02))
    assert rows[0]["by_seed"] == [pytest.approx(100 * np.expm1(cost)) for cost in (0.01, 0.03)]
    assert rows[0]["beyond_twice_budget"]["percent"] == pytest.approx(100 * np.expm1(0.04))
