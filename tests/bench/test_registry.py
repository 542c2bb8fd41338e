"""Every case runs, small; the arithmetic is checked by counting."""

import pytest
import torch

from skim.bench import registry
from skim.bench.registry import CASES, Setting
from skim.bench.runner import run

IDS = [f"K{i}" for i in (1, 2, 3, 4, 5, 6, 7, 8, 9, 12)]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", CASES)
def test_every_case_runs(name, device):
    case = CASES[name]
    rows = run([name], device=device, quick=True)["rows"]
    modes = 2 if case.graphs and device == "cuda" else 1
    assert [row["kind"] for row in rows] == [kind for kind in case.kinds for _ in range(modes)]
    for row in rows:
        assert "error" not in row, row
        assert row["ms"] > 0 and row["share"] >= 0 and row["n"] == case.quick and row["repetitions"] >= 3
        assert not row["baselines"] or row["ratio"] == pytest.approx(row["baseline_ms"] / row["ms"])
        assert all(found.get("ms", 1) >= row.get("baseline_ms", 0) for found in row["baselines"].values())


def test_the_scoreboard_is_complete_and_every_case_says_what_it_is():
    assert set(IDS) <= set(CASES)
    assert all(case.what.endswith(".") and len(case.what) > 20 for case in CASES.values())


def test_sets_of_inputs_differ():
    problem = CASES["K4"].build(Setting(64, "random", torch.device("cpu"), quick=True))
    assert len({x.selection.indices.sum().item() for x in problem.inputs}) == len(problem.inputs) == registry.SETS
    assert len({x.q.sum().item() for x in problem.inputs}) == registry.SETS


@pytest.mark.parametrize(("T", "S", "budget"), [(5, 5, 2), (5, 5, 9), (3, 10, 4), (3, 10, 9), (1, 7, 3), (4, 4, 4)])
def test_pairs_by_counting(T, S, budget):
    assert registry.selected_pairs(T, S, budget) == sum(min(budget, position + 1) for position in range(S - T, S))
    assert registry.visible_pairs(T, S) == sum(position + 1 for position in range(S - T, S))


def test_operations_of_the_examples():
    n, budget, heads = 100_000, 1000, registry.WIDE
    pairs = 1000 * 1001 // 2 + 99_000 * 1000
    attention = registry.attention_stage(heads, registry.selected_pairs(n, n, budget))
    assert attention.flops == 4 * 32 * 128 * pairs and attention.gathered == 2 * 2 * 2 * 128 * pairs
    indexer = registry.indexer_stage(heads, registry.visible_pairs(n, n), fp8=True)
    assert indexer.fp8_flops == 2 * 8 * 64 * (n * (n + 1) // 2) and indexer.flops == 0
    dense = registry.attention_stage(heads, registry.visible_pairs(n, n), "dense", "t")
    assert dense.flops == 4 * 32 * 128 * (n * (n + 1) // 2) and dense.gathered == 0
    assert (attention.formula, dense.formula) == ("4 H D sum_t min(K, t)", "4 H D sum_t t")
