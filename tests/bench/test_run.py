"""`skim bench`: what it writes, draws and says, and how it fails."""

import json
import sys

import pytest
import torch

from skim import cli
from skim.bench import describe, line, plot, run, runner
from skim.bench.registry import CASES, Case, Problem
from skim.bench.roofs import Roofs, Stage
from skim.bench.runner import break_even


def command(monkeypatch, *arguments: str) -> int:
    """Exit code of `skim bench ARGUMENTS`."""
    monkeypatch.setattr(sys, "argv", ["skim", "bench", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return int(stopped.value.code or 0)


@pytest.fixture
def doubling(monkeypatch):
    """A registry of one case at three lengths, which takes no time."""

    def build(s):
        stage = Stage("doubling", "n", flops=s.n)
        return Problem([torch.ones(s.n)] * 3, lambda x: x * 2, [stage], {"sum": lambda x: x + x, "broken": fail})

    def fail(x):
        raise RuntimeError("No available kernel\nand more")

    monkeypatch.setattr(runner, "measured_roofs", lambda device, quick: Roofs(1e12, None, 1e11, None, None))
    case = Case("double", "Doubling.", build, (64, 128, 256), 8, ("-",), device="cpu")
    monkeypatch.setattr(runner, "CASES", {"double": case})
    return build


def test_json_holds_what_figures_depend_on(monkeypatch, capsys, doubling):
    assert command(monkeypatch, "double", "--json", "-") == 0
    written = capsys.readouterr()
    result = json.loads(written.out)
    assert set(result) == {"device", "driver", "versions", "commit", "command", "quick", "roofs", "rows"}
    assert result["command"] == "skim bench double --json -" and result["versions"]["torch"] == torch.__version__
    assert [row["n"] for row in result["rows"]] == [64, 128, 256] and result["roofs"]["cpu"]["matmul"] == 1e12
    row = result["rows"][0]
    assert row["baselines"]["broken"] == {"error": "RuntimeError: No available kernel"} and row["baseline"] == "sum"
    assert row["operations"] == {"doubling": {"formula": "n", "count": 64}}
    assert "double n=64: " in written.err and "roofs of cpu" in written.err


def test_quick_takes_the_quick_size(doubling):
    assert [row["n"] for row in run(["double"], device="cpu", quick=True)["rows"]] == [8]


def test_cases_for_gpus_are_small_on_a_cpu(monkeypatch):
    monkeypatch.setattr(runner, "measured_roofs", lambda device, quick: Roofs(1e12, None, 1e11, None, None))
    rows = run(["K6"], device="cpu")["rows"]
    assert [row["n"] for row in rows] == [CASES["K6"].quick]


def test_a_case_that_fails_has_a_row_and_the_others_go_on(monkeypatch, capsys, doubling, tmp_path):
    def broken(s):
        if s.n == 128:
            raise ValueError("q: expected something else")
        return doubling(s)

    monkeypatch.setattr(runner, "CASES", {"double": Case("double", "Doubling.", broken, (64, 128, 256), 8, ("-",), device="cpu")})
    file = tmp_path / "x.json"
    assert command(monkeypatch, "double", "--json", str(file)) == 1
    written = capsys.readouterr()
    assert "skim: 1 measurements failed, of double" in written.err
    assert "double n=128: ValueError: q: expected something else" in written.out
    rows = json.loads(file.read_text())["rows"]
    assert ["error" in row for row in rows] == [False, True, False]


def test_list_names_every_case(monkeypatch, capsys):
    assert command(monkeypatch, "--list") == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in describe()) and {f"K{i}" for i in range(1, 13)} <= set(describe())


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("K99",), 1, "cases: expected some of K1, K2"),
        (("K6", "--device", "tpu"), 1, "device: expected cuda, cuda:N or cpu, got 'tpu'"),
        (("K6", "--device", "cuda:77"), 1, "device: expected one that is here, got 'cuda:77'"),
        (("K6", "--tokens", "64"), 1, "tokens: expected 16 or more, with a model, got 64"),
        (("K5", "--quick", "--device", "cpu", "--plot", "x.png"), 1, "cases: expected one that is measured at several lengths"),
        (("--model", "no/such/model", "--tokens", "64", "--device", "cpu"), 1, "got 'no/such/model'"),
        (("--tokens", "3"), 2, ""),
        (("--nothing",), 2, ""),
    ],
)
def test_failures(monkeypatch, capsys, arguments, code, said, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert command(monkeypatch, *arguments) == code
    error = [row for row in capsys.readouterr().err.splitlines() if row.startswith("skim: ")]
    assert code == 2 or (len(error) == 1 and said in error[0])


def test_the_break_even_length():
    assert break_even([1000, 2000, 4000], [4, 4, 4], [2, 4, 8]) == pytest.approx(2000)
    assert break_even([1000, 4000], [4, 4], [2, 8]) == pytest.approx(2000)
    assert break_even([1000, 4000], [4, 4], [5, 8]) == 1000
    assert break_even([1000, 4000], [4, 9], [5, 8]) is None


def rows(*lengths: int) -> list[dict]:
    found = []
    for kind, speed in (("random", 1.0), ("overlapping", 3.0)):
        for n in lengths:
            times = {"ms": n / speed, "baseline_ms": n * n / 8000, "ratio": n * speed / 8000}
            found.append({"case": "K1", "kind": kind, "n": n, "mode": "eager", "operations": {"attention": {}, "dense": {}}, **times})
    return found


def test_a_plot_is_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    plot({"device": "a card", "rows": rows(4096, 16384, 65536) + [{"case": "K5", "n": 4, "kind": "-", "ms": 1.0}]}, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_one_length_is_nothing_to_plot(tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match="several lengths"):
        plot({"device": "a card", "rows": rows(4096)}, tmp_path / "x.png")


def test_lines_for_people():
    row = {"case": "K1", "kind": "random", "n": 8, "mode": "graph", "ms": 2.0, "tflops": 100.0, "tbps": 1.5, "bound": "memory", "share": 0.5}
    assert line({**row, "peak_mib": 1234.0, "baseline": "sdpa", "baseline_ms": 4.0, "ratio": 2.0}) == (
        "K1 random graph n=8: 2.000 ms, 1.5 TB/s, 50% of the roofline, peak 1,234 MiB, sdpa 4.000 ms, 2.00 times as fast"
    )
    assert line({"case": "K5", "kind": "-", "n": 8, "mode": "eager", "error": "ValueError: no"}) == "K5 n=8: ValueError: no"
