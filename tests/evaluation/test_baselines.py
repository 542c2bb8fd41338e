"""The patterns that DSA is compared with, against literal selections and a brute-force reading of their rules."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import skim
from skim.evaluation import BASELINES, blocks, oracle, random, sinks, window
from skim.huggingface import LayerInputs


def inputs(S: int, T: int | None = None, heads: int = 2, channels: int = 8) -> LayerInputs:
    q, k = torch.randn(1, T or S, heads, channels), torch.randn(1, S, 1, channels)
    return LayerInputs(0, q, k, channels**-0.5, skim.Config(), None, None)


def rows(selection: skim.Selection) -> list[list[int]]:
    return [[i for i in row if i >= 0] for row in selection.indices[0, :, 0].tolist()]


def test_window_keeps_the_most_recent():
    assert rows(window(3)(inputs(5), *skim.visible(5, 5))) == [[0], [0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 4]]


def test_sinks_keep_the_first_and_the_most_recent():
    assert rows(sinks(3, first=1)(inputs(5), *skim.visible(5, 5))) == [[0], [0, 1], [0, 1, 2], [0, 2, 3], [0, 3, 4]]


def test_sinks_of_a_packed_row_are_its_own():
    start, end = skim.visible(8, 8, cu_seqlens=torch.tensor([0, 3, 8]))
    assert rows(sinks(3, first=1)(inputs(8), start, end))[7] == [3, 6, 7]


def test_blocks_are_whole_neighbours_with_the_first_and_the_own():
    chosen = rows(blocks(8)(inputs(32), *skim.visible(32, 32)))[31]  # blocks of 2
    assert chosen[:2] == [0, 1] and chosen[-2:] == [30, 31]
    assert all(i + 1 in chosen for i in chosen if i % 2 == 0)


def test_random_keeps_the_own_token_and_differs_between_layers():
    start, end = skim.visible(64, 64)
    first = inputs(64)
    again = LayerInputs(1, first.q, first.k, first.scale, first.config, None, None)
    a, b, c = (random(8)(x, start, end) for x in (first, first, again))
    assert all(row[-1] == t for t, row in enumerate(rows(a)))
    assert torch.equal(a.indices, b.indices) and not torch.equal(a.indices, c.indices)


def test_oracle_keeps_the_most_attended():
    x = inputs(24)
    scores = torch.einsum("thd,sd->ths", x.q[0], x.k[0, :, 0]) * x.scale
    p = scores.masked_fill(torch.ones(24, 24).triu(1).bool()[:, None], -torch.inf).softmax(-1).mean(1)
    best = p[23].topk(5).indices.sort().values.tolist()
    assert rows(oracle(5)(x, *skim.visible(24, 24)))[23] == best


@pytest.mark.parametrize("name", BASELINES)
@given(S=st.integers(1, 70), T=st.integers(1, 70), budget=st.integers(1, 40), first=st.integers(0, 20))
def test_every_pattern_keeps_visible_keys_within_the_budget(name, S, T, budget, first):
    T = min(S, T)
    start, end = skim.visible(S, T)
    start = torch.minimum(start + first, end)  # left padding, some rows see nothing
    selection = BASELINES[name](budget)(inputs(S, T), start, end)
    selection.check(S)
    real = selection.indices[:, :, 0] >= 0
    seen = (selection.indices[:, :, 0] >= start[..., None]) & (selection.indices[:, :, 0] < end[..., None])
    assert bool((seen | ~real).all())
    assert bool((selection.counts[:, :, 0] <= budget).all())
    if name != "blocks":
        assert torch.equal(selection.counts[:, :, 0], (end - start).clamp(max=budget))
