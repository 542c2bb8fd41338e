"""The two kinds of selections that benchmarks run on: what they are is part of every figure."""

import pytest
import torch

from skim.bench import selections
from skim.bench.selections import MEASURED_UNIONS, drift, index_inputs, selection, unions
from skim.ops import select

CPU = torch.device("cpu")
NEIGHBOURS, TEXTS = (2, 4, 8, 16), 6


def mean_unions(T: int, S: int, budget: int, heads: int = 8) -> dict[int, float]:
    """Of several texts: how much neighbours share differs from one to the next, as it does between layers."""
    sums = dict.fromkeys(NEIGHBOURS, 0.0)
    for seed in range(TEXTS):
        index = index_inputs("overlapping", T, S, budget, heads, 64, dtype=torch.float32, device=CPU, seed=seed)
        found = select(*index, budget)
        for neighbours in NEIGHBOURS:
            sums[neighbours] += unions(found, neighbours) / TEXTS
    return sums


@pytest.mark.parametrize(("heads", "budget"), [(8, 256), (8, 512), (8, 2048), (4, 512)])
def test_neighbours_overlap_as_those_of_trained_indexers(heads, budget):
    assert mean_unions(256, 8192, budget, heads) == pytest.approx(MEASURED_UNIONS[budget], rel=0.12)


@pytest.mark.parametrize(("S", "budget"), [(2048, 512), (16384, 2048)])
def test_the_overlap_stays_near_the_measured_one_at_other_lengths(S, budget):
    assert mean_unions(128, S, budget) == pytest.approx(MEASURED_UNIONS[budget], rel=0.25)


def test_random_selections_overlap_as_chance_gives():
    found = selection("random", 256, 4096, 512, device=CPU)
    for neighbours in (2, 8):
        by_chance = (1 - (1 - 512 / 4096) ** neighbours) * 4096 / 512
        assert unions(found, neighbours) == pytest.approx(by_chance, rel=0.05)


@pytest.mark.parametrize("kind", selections.KINDS)
def test_selections_are_causal_ascending_and_as_large_as_they_can_be(kind):
    found = selection(kind, 200, 200, 64, batch=2, device=CPU)
    found.check(200)
    position = torch.arange(200)
    assert torch.equal(found.counts, (position + 1).clamp(max=64).int().expand(2, 200)[..., None])
    assert bool((found.indices <= position[None, :, None, None]).all())


def test_seeds_differ_and_repeat():
    first, again, other = (selection("overlapping", 64, 512, 32, device=CPU, seed=seed).indices for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_unions_by_hand():
    indices = torch.tensor([[0, 1, 2], [1, 2, 5], [7, -1, -1], [7, 8, -1]], dtype=torch.int32)[None, :, None]
    made = selections.Selection.from_indices(indices)
    assert unions(made, 2) == (4 + 2) / 2 / 3
    assert unions(made, 1) == (3 + 3 + 1 + 2) / 4 / 3


def test_a_drift_equals_its_recursion():
    noise, decay = torch.randn(2, 150, 3, dtype=torch.float64), torch.linspace(0.5, 0.999, 150, dtype=torch.float64)
    x = [noise[:, 0]]
    for t in range(1, 150):
        x.append(decay[t] * x[-1] + (1 - decay[t] ** 2).sqrt() * noise[:, t])
    torch.testing.assert_close(drift(noise, decay), torch.stack(x, dim=1))


def test_an_unknown_kind_is_named():
    with pytest.raises(ValueError, match=r"kind: expected one of \('random', 'overlapping'\), got 'mixed'"):
        selection("mixed", 4, 8, 2, device=CPU)
