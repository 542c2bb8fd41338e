"""What windows say together: each figure against one computed by hand, from made-up losses and from a tiny model."""

import math

import pytest
import torch
from tiny_model import converted, text

import skim
from skim.evaluation import PATTERNS, Adaptive, Reading, equal_budget, evaluate, pair, paired_t, plot, readings, show, summarise


def reading(pattern: str, losses: list[float], budget: int | None = 4, mass: float | None = 0.5) -> Reading:
    return Reading(pattern, budget, torch.tensor(losses, dtype=torch.float64), mass, 3.0, 0.1)


def made_up(budget: int = 4) -> list[list[Reading]]:
    """Three windows of 600 tokens, on which dsa loses 1, 2 and 3 thousandths from position 300 on."""
    found = []
    for i in range(3):
        dense = [2.0 + 0.1 * i] * 600
        dsa = [loss + (0.001 * (i + 1) if t >= 300 else 0.0) for t, loss in enumerate(dense)]
        found.append([reading("dense", dense, None, None), reading("dsa", dsa, budget)])
    return found


def adapted() -> list[list[Reading]]:
    """The same three windows, on which an adaptive budget loses half as much."""
    halves = [torch.stack([reading.losses for reading in window]).mean(0).tolist() for window in made_up()]
    return [[*window, reading("dsa", half, Adaptive(0.9, 1, 16))] for window, half in zip(made_up(), halves)]


def test_perplexity_is_over_windows_and_dense_is_compared_with_nothing():
    dense, dsa = summarise(made_up(), 4)
    assert dense.perplexity == pytest.approx(math.exp(2.1)) and dense.windows == 3 and dense.over_dense is None
    assert dense.attention_mass == 1.0 and dsa.attention_mass == 0.5
    assert dsa.nll == pytest.approx([2.0005, 2.101, 2.2015])


def test_the_interval_pairs_windows_with_dense():
    _, dsa = summarise(made_up(), 4)
    half = 4.3027 * 0.0005 / math.sqrt(3)  # differences 0.0005, 0.001, 0.0015
    assert (dsa.over_dense.mean, dsa.over_dense.low, dsa.over_dense.high) == pytest.approx((0.001, 0.001 - half, 0.001 + half), rel=1e-3)


def test_positions_are_parted_where_they_double():
    _, dsa = summarise(made_up(), 4)
    assert [(part.start, part.stop) for part in dsa.by_position] == [(0, 256), (256, 512), (512, 600)]
    assert [part.over_dense.mean for part in dsa.by_position] == pytest.approx([0.0, 0.002 * (512 - 300) / 256, 0.002], abs=1e-12)
    assert dsa.beyond_twice_budget.start == 7  # the query at 7 sees eight keys, twice the budget
    assert summarise(made_up(301), 301)[1].beyond_twice_budget is None


def test_a_window_that_ends_before_a_part_has_no_say_in_it():
    found = [*made_up(), [reading("dense", [5.0] * 100, None, None), reading("dsa", [5.0] * 100)]]
    _, dsa = summarise(found, 4)
    assert [part.windows for part in dsa.by_position] == [4, 3, 3] and dsa.windows == 4


def test_windows_keep_what_pairs_them_with_another_run():
    found = [*made_up(), [reading("dense", [5.0] * 100, None, None), reading("dsa", [5.5] * 100)]]
    _, dsa = summarise(found, 4)
    assert [part.nll[3] for part in dsa.by_position] == [5.5, None, None] and dsa.beyond_twice_budget.nll[3] == 5.5
    assert dsa.by_position[1].nll[:2] == pytest.approx([2.0 + 0.001 * 212 / 256, 2.1 + 0.002 * 212 / 256])
    assert dsa.keys == [3.0] * 4


def test_another_models_losses_may_be_the_reference():
    control = [torch.full((600,), 1.9 + 0.1 * i, dtype=torch.float64) for i in range(3)]
    dense, dsa = summarise(made_up(), 4, reference=control)
    assert dense.over_dense.mean == pytest.approx(0.1) and dsa.over_dense.mean == pytest.approx(0.101)
    assert dsa.beyond_twice_budget.over_dense.mean == pytest.approx(0.1 + 0.002 * 300 / 593)
    assert dsa.over_dense == paired_t(dsa.nll, [float(one.mean()) for one in control])


def test_intervals_are_over_documents_where_there_are_enough():
    found = [window for i in range(3) for window in [made_up()[i]] * 4]  # each window four times over
    documents = [str(i) for i in range(3) for _ in range(4)]
    assert summarise(found, 4, documents=documents)[1].over_dense.high == pytest.approx(summarise(made_up(), 4)[1].over_dense.high)
    assert [summarise(found, 4, documents=of)[1].independent for of in (documents, ["a"] * 6 + ["b"] * 6, None)] == [3, 12, 12]


def test_without_dense_nothing_is_compared():
    (dsa,) = summarise([[window[1]] for window in made_up()], 4)
    assert dsa.over_dense is None and all(part.over_dense is None for part in dsa.by_position)


def test_several_budgets_in_one_run_are_what_each_is_alone():
    model, tokens = converted(), text(96)
    found = list(readings(model, tokens, [8, 24]))
    assert [(r.pattern, r.budget) for r in found] == [("dense", None), *((p, 8) for p in PATTERNS[1:]), *((p, 24) for p in PATTERNS[1:])]
    for budget in (8, 24):
        for alone, together in zip(evaluate(model, tokens, budget), summarise([found], budget)):
            assert alone.pattern == together.pattern
            assert alone.perplexity == pytest.approx(together.perplexity, rel=1e-12)
            assert alone.attention_mass == pytest.approx(together.attention_mass, rel=1e-6)
            assert alone.keys_per_query == together.keys_per_query


def test_an_adaptive_budget_reads_less_where_less_holds_the_mass():
    model, tokens = converted(), text(96)
    budgets = [Adaptive(0.5, 1, 48), Adaptive(0.9, 1, 48), Adaptive(0.5, 40, 48), 48]
    half, most, floor, fixed = readings(model, tokens, budgets, ["dsa"])
    assert half.keys_per_query < most.keys_per_query <= fixed.keys_per_query and half.keys_per_query < floor.keys_per_query
    assert floor.keys_per_query >= (96 * 40 - 40 * 39 / 2) / 96
    assert half.attention_mass < most.attention_mass <= fixed.attention_mass
    with skim.use(model, mode="sparse", budget=48, mass=0.5), torch.no_grad():
        loss = model(tokens, labels=tokens).loss
    assert float(half.losses.mean()) == pytest.approx(float(loss), rel=1e-5)
    with pytest.raises(ValueError, match="mass: expected None or a number above 0"):
        Adaptive(2.0, 1, 48)


def test_an_adaptive_budget_is_paired_with_the_fixed_one_of_equal_keys():
    model, adaptive = converted(), Adaptive(0.5, 2, 48)
    found = [list(readings(model, text(96, seed), [adaptive, 16], ["dense", "dsa"])) for seed in range(3)]
    keys = sum(reading.keys_per_query for window in found for reading in window if reading.budget == adaptive) / 3
    budget = equal_budget(keys, [96] * 3)
    for seed, window in enumerate(found):
        window += readings(model, text(96, seed), [budget], ["dsa"])
    both = pair(found, adaptive, budget)
    assert both.adaptive.keys_per_query == pytest.approx(keys) and 0 <= both.fixed.keys_per_query - keys < 1
    assert both.over_fixed.mean == pytest.approx(sum(both.adaptive.nll) / 3 - sum(both.fixed.nll) / 3)
    assert both.adaptive.over_dense is not None and both.to_dict()["budget"] == {"mass": 0.5, "min_budget": 2, "budget": 48}


def test_equal_budgets_by_hand():
    # windows of 4: budget 1 reads 1, 2 reads (1 + 2 + 2 + 2) / 4 = 1.75, 3 reads 2.25, 4 reads 2.5
    for keys, budget in ((0.5, 1), (1.0, 1), (1.01, 2), (1.75, 2), (2.2, 3), (2.5, 4)):
        assert equal_budget(keys, [4, 4]) == budget
    assert equal_budget(2.0, [4, 2]) == 4  # the most that they can read: 2.5 and 1.5


def test_the_mass_of_a_reused_selection_is_that_of_its_source():
    bare = converted(pattern="SR")  # the second layer has no indexer of its own
    full = converted()
    full.load_state_dict(bare.state_dict(), strict=False)
    found = []
    for model in (bare, full):
        with skim.use(model, pattern="SR"):
            found.append([row.attention_mass for row in evaluate(model, text(96), 16, ["dsa", "sinks", "oracle"])])
    assert found[0] == found[1]
    own = [row.attention_mass for row in evaluate(full, text(96), 16, ["dsa", "sinks", "oracle"])]
    assert own[1] == found[0][1] and own[2] > found[0][2]  # sinks are the same anywhere, an oracle knows its own layer best


def test_the_models_own_settings_stay_and_hold():
    model = converted(keep_first=2)
    with pytest.raises(ValueError, match="keep_first"):
        list(readings(model, text(40), [1], ["dsa"]))
    skim.use(model, mode="sparse", budget=9)
    before = model(text(40)).logits
    list(readings(model, text(40), [16, 4], ["dense", "dsa"]))
    assert torch.equal(model(text(40)).logits, before)


def test_tables_say_it(capsys):
    from rich.console import Console

    console = Console(width=200)
    rows = summarise(made_up(), 4)
    domains = [{"text": name, "tokens": 601, "rows": [row.to_dict() for row in rows]} for name in ("prose", "code")]
    for table in show.quality(4, rows, domains):
        console.print(table)
    printed = capsys.readouterr().out
    assert "+0.10% [-0.02%, +0.22%]" in printed and "256-512" in printed and "code" in printed and "Student's t over 3 windows" in printed
    for table in show.quality(4, summarise(made_up() * 2, 4, documents=["a", "b", "c"] * 2), domains):
        console.print(table)
    assert "Student's t over 3 documents (6 windows)" in capsys.readouterr().out
    console.print(show.adaptive([pair(adapted(), Adaptive(0.9, 1, 16), 4)]))
    printed = capsys.readouterr().out
    assert "0.9" in printed and "+0.10% [-0.02%, +0.22%]" in printed and "-0.05% [" in printed


def test_a_plot_of_quality_against_budget(tmp_path):
    pytest.importorskip("matplotlib")
    plot(tmp_path / "x.png", {budget: summarise(made_up(budget), budget) for budget in (4, 8)})
    alone = (tmp_path / "x.png").read_bytes()
    plot(tmp_path / "x.png", {4: summarise(made_up(), 4)}, pairs=[pair(adapted(), Adaptive(0.9, 1, 16), 4)])
    assert alone.startswith(b"\x89PNG") and len((tmp_path / "x.png").read_bytes()) > len(alone)
    with pytest.raises(ValueError, match="expected dense and at least one other pattern"):
        plot(tmp_path / "y.png", {4: summarise([[window[0]] for window in made_up()], 4)})
