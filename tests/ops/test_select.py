import math

import numpy as np
import pytest
import torch
from cases import deterministic, exact_index_inputs, index_inputs, normal, random_interval
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_math import chosen, error, interval_mask
from torch import Tensor

from skim.ops import codec, index_scores, select, visible
from skim.selection import Selection

pytestmark = pytest.mark.usefixtures("both_on_the_cpu")


def rows_of(selection: Selection) -> list[list[int]]:
    """The selected positions of every row, in order of B, T, R."""
    rows = selection.indices.flatten(0, 2).tolist()
    return [row[:count] for row, count in zip(rows, selection.counts.flatten().tolist(), strict=True)]


def everything(S: int, T: int = 1) -> dict[str, Tensor]:
    """start and end of queries that see all the keys."""
    return {"start": torch.zeros(1, T, dtype=torch.int32), "end": torch.full((1, T), S, dtype=torch.int32)}


def pick(scores: Tensor, budget: int, **options) -> list[int]:
    """What one query that sees all the keys with exactly these scores keeps."""
    return rows_of(select(*exact_index_inputs(scores), budget, **everything(scores.shape[0]), **options))[0]


def same(one: Selection, other: Selection) -> bool:
    equal = torch.equal(one.indices, other.indices) and torch.equal(one.counts, other.counts)
    return equal and (one.scores is None or torch.equal(one.scores, other.scores))


def along_queries(parts: list[Selection]) -> Selection:
    return Selection(torch.cat([p.indices for p in parts], 1), torch.cat([p.counts for p in parts], 1))


def assert_exact(inputs, budget: int, start: Tensor, end: Tensor, keep_first: int = 0, keep_recent: int = 0) -> None:
    """The selection is that of a sort of the scores, row by row."""
    selection = select(*inputs, budget, start=start, end=end, keep_first=keep_first, keep_recent=keep_recent)
    scores = index_scores(*inputs, start=start, end=end)
    B, T, S = scores.shape
    selection.check(S)
    assert selection.indices.shape == (B, T, 1, budget)
    expected = [
        chosen(scores[b, t], int(start[b, t]), int(end[b, t]), budget, keep_first, keep_recent) if end[b, t] > start[b, t] else []
        for b in range(B)
        for t in range(T)
    ]
    assert rows_of(selection) == expected


def test_by_hand():
    # causal over 4 keys, budget 2; scores of the keys are 3, 1, 2, 1 in every row
    selection = select(*exact_index_inputs(torch.tensor([3.0, 1.0, 2.0, 1.0]), T=4), 2)
    assert selection.indices[0, :, 0].tolist() == [[0, -1], [0, 1], [0, 2], [0, 2]]
    assert selection.counts[0, :, 0].tolist() == [1, 2, 2, 2]
    assert selection.indices.dtype == selection.counts.dtype == torch.int32
    assert selection.scores is None


def test_ties_go_to_the_most_recent():
    assert pick(torch.tensor([5.0, 1.0, 1.0, 1.0, 0.0]), 3) == [0, 2, 3]
    assert pick(torch.tensor([1.0, 1.0, 2.0, 1.0, 2.0, 1.0]), 4) == [2, 3, 4, 5]


def test_trap_09_a_plateau_of_zero_scores_is_a_sliding_window():
    q, k, weights = index_inputs(T=12, S=12)
    selection = select(torch.zeros_like(q), k, weights, 4)
    assert rows_of(selection) == [list(range(max(0, t - 3), t + 1)) for t in range(12)]


def test_trap_09_relu_plateaus_tie_in_real_scores_too():
    q, k, weights = index_inputs(T=40, S=90, J=1, E=4)  # one head: half of the scores are exactly 0
    start, end = visible(90, 40)
    scores = index_scores(q, k, weights)
    assert int((scores == 0).sum()) > 500
    assert_exact((q, k, weights), 60, start, end)


@pytest.mark.parametrize("budget", [1, 500, 2048])
def test_trap_09b_narrow_range_scores_at_128k_keys(budget):
    # one binade, thousands of exact ties: a coarse radix pass would lose winners here
    scores = (1 + 1e-3 * normal(131072, seed=budget)).bfloat16().float() if budget == 500 else 1 + 1e-3 * normal(131072, seed=budget)
    position = np.arange(131072)
    best = np.lexsort((-position, -scores.numpy()))[:budget]
    assert pick(scores, budget) == sorted(best.tolist())


@pytest.mark.parametrize("value", [0.0, 1.0, -3.5])
def test_trap_09b_all_equal_rows_at_128k_keys(value):
    assert pick(torch.full((131072,), value), 1000) == list(range(130072, 131072))


def test_trap_08_early_rows_are_padded_with_minus_one():
    selection = select(*index_inputs(T=9, S=9), 5)
    assert selection.counts[0, :, 0].tolist() == [1, 2, 3, 4, 5, 5, 5, 5, 5]
    assert selection.indices[0, :5, 0].tolist() == [[0, -1, -1, -1, -1], [0, 1, -1, -1, -1], [0, 1, 2, -1, -1], [0, 1, 2, 3, -1], [0, 1, 2, 3, 4]]
    assert bool((selection.indices[0, :, 0] <= torch.arange(9)[:, None]).all())  # never a future key


def test_minus_zero_equals_plus_zero():
    # A key scale of -1 turns the zero score of its key into -0.0; by value all tie and recency decides.
    k = torch.zeros(1, 8, 4, dtype=torch.float8_e4m3fn), torch.tensor([[1.0, -1, 1, -1, 1, -1, 1, -1]])
    q, weights = torch.ones(1, 1, 1, 4), torch.ones(1, 1, 1)
    scores = index_scores(q, k, weights, **everything(8))
    assert torch.signbit(scores).tolist() == [[[False, True] * 4]]
    assert rows_of(select(q, k, weights, 3, **everything(8))) == [[5, 6, 7]]


def test_nan_never_wins():
    nan = math.nan
    assert pick(torch.tensor([nan, -1.0, nan, -2.0, nan, -3.0]), 2) == [1, 3]
    assert pick(torch.tensor([nan, -1e38, -3e38, nan]), 2) == [1, 2]
    # only when nothing else is left, and then by recency
    assert pick(torch.tensor([nan, 1.0, nan, nan]), 3) == [1, 2, 3]


@pytest.mark.parametrize("sign, expected", [(1.0, [2, 5]), (-1.0, [3, 4])])
def test_infinite_scores_are_ordered_like_any_other(sign, expected):
    # J = E = 1: scores are sign * relu(k)
    k = torch.tensor([1.0, 3.0, torch.inf, 0.0, -1.0, torch.inf]).view(1, 6, 1)
    assert rows_of(select(torch.ones(1, 1, 1, 1), k, torch.full((1, 1, 1), sign), 2, **everything(6))) == [expected]


def test_minus_infinity_beats_only_nan():
    k = torch.tensor([torch.inf, torch.nan, torch.inf, torch.nan]).view(1, 4, 1)
    assert rows_of(select(torch.ones(1, 1, 1, 1), k, -torch.ones(1, 1, 1), 2, **everything(4))) == [[0, 2]]


def test_first_and_recent_keys_count_against_the_budget():
    scores = torch.tensor([0.0, 0, 9, 8, 7, 0, 0, 0])
    assert pick(scores, 4, keep_first=1) == [0, 2, 3, 4]
    assert pick(scores, 4, keep_recent=2) == [2, 3, 6, 7]
    assert pick(scores, 4, keep_first=1, keep_recent=2) == [0, 2, 6, 7]
    assert pick(scores, 4, keep_first=2, keep_recent=2) == [0, 1, 6, 7]
    assert pick(scores, 4, keep_first=4) == [0, 1, 2, 3]


def test_first_and_recent_keys_are_kept_even_where_their_scores_are_nan():
    nan = math.nan
    assert pick(torch.tensor([nan, 1.0, 3.0, 2.0, nan]), 3, keep_first=1, keep_recent=1) == [0, 2, 4]


def test_first_and_recent_are_those_that_the_row_sees():
    # packed: the second sequence begins at key 6
    inputs = exact_index_inputs(torch.tensor([9.0] * 6 + [0, 5, 4, 0, 0, 1, 0]), T=13)
    start, end = visible(13, 13, cu_seqlens=torch.tensor([0, 6, 13]))
    selection = select(*inputs, 3, start=start, end=end, keep_first=1, keep_recent=1)
    assert rows_of(selection)[6:] == [[6], [6, 7], [6, 7, 8], [6, 7, 9], [6, 7, 10], [6, 7, 11], [6, 7, 12]]


def test_first_and_recent_may_overlap_in_short_rows():
    selection = select(*index_inputs(T=8, S=8), 6, keep_first=3, keep_recent=3)
    assert selection.counts.flatten().tolist() == [1, 2, 3, 4, 5, 6, 6, 6]
    assert rows_of(selection)[7] == [0, 1, 2, 5, 6, 7]


def test_a_row_that_sees_no_more_than_the_budget_keeps_all_even_nan():
    q, k, weights = index_inputs(T=6, S=6)
    k[:, 2] = torch.nan
    assert rows_of(select(q, k, weights, 6)) == [list(range(t + 1)) for t in range(6)]
    assert rows_of(select(q, k, weights, 5))[:5] == [list(range(t + 1)) for t in range(5)]


def test_a_budget_above_the_number_of_keys_keeps_all():
    selection = select(*index_inputs(T=3, S=3), 100)
    assert selection.budget == 100
    assert rows_of(selection) == [[0], [0, 1], [0, 1, 2]]


def test_rows_that_see_nothing_are_empty():
    start = torch.tensor([[0, 4, 7, 70, 3]], dtype=torch.int32)
    end = torch.tensor([[0, 4, 60, 70, 2]], dtype=torch.int32)
    selection, lse = select(*index_inputs(T=5), 8, start=start, end=end, with_scores=True)
    assert selection.counts.flatten().tolist() == [0, 0, 8, 0, 0]
    assert bool((selection.indices[0, [0, 1, 3, 4]] == -1).all())
    assert lse.isinf().flatten().tolist() == [True, True, False, True, True]


def test_no_queries_and_no_keys():
    q, k, weights = index_inputs(T=3, S=5)
    assert select(q[:, :0], k, weights[:, :0], 2).indices.shape == (1, 0, 1, 2)
    assert select(q, k[:, :0], weights, 2).counts.flatten().tolist() == [0, 0, 0]


@pytest.mark.parametrize("keep", [(0, 0), (2, 3)])
@pytest.mark.parametrize(
    "inputs",
    [
        index_inputs(2, 33, 70),
        index_inputs(1, 20, 700, J=3, E=5),
        index_inputs(1, 33, 50, J=17, dtype=torch.bfloat16),
        index_inputs(1, 33, 50, J=1, E=1, dtype=torch.float16),
        index_inputs(1, 9, 50, dtype=torch.float64),
    ],
    ids=["fp32", "long", "bf16", "fp16", "fp64"],
)
def test_exact_top_k_of_any_interval(inputs, keep):
    B, T, S = inputs[0].shape[0], inputs[0].shape[1], inputs[1].shape[1]
    assert_exact(inputs, 7, *random_interval(B, T, S), *keep)


def test_the_selection_is_that_of_the_true_scores():
    q, k, weights = index_inputs(T=1, S=4096, J=8, E=64)
    truth = torch.einsum("tje,se->tjs", q[0].double(), k[0].double()).relu().mul(weights[0, :, :, None].double()).sum(1)
    assert rows_of(select(q, k, weights, 256)) == [sorted(truth[0].topk(256).indices.tolist())]


@pytest.mark.parametrize("scale_format", ["float32", "ue8m0"])
def test_fp8_inputs_are_selected_by_their_fp8_scores(scale_format):
    q, k, weights = index_inputs(2, 33, 300, E=32)
    fp8 = codec.quantise(q, scale_format=scale_format), codec.quantise(k, scale_format=scale_format), weights
    start, end = visible(300, 33)
    assert_exact(fp8, 40, start.expand(2, 33), end.expand(2, 33))
    one, other = (set(rows_of(select(*x, 40))[-1]) for x in (fp8, (q, k, weights)))
    assert 30 < len(one & other) <= 40


@pytest.mark.parametrize("fp8", [False, True])
def test_five_axes_make_R_selections_over_the_same_keys(fp8):
    q, k, weights = normal(2, 9, 3, 4, 16), normal(2, 40, 16, seed=1), normal(2, 9, 3, 4, seed=2)
    start, end = random_interval(2, 9, 40)
    quantise = codec.quantise if fp8 else lambda x: x
    together, lse = select(quantise(q), quantise(k), weights, 5, start=start, end=end, with_scores=True)
    together.check(40)
    assert together.indices.shape == (2, 9, 3, 5) and lse.shape == (2, 9, 3)
    for r in range(3):
        alone, alone_lse = select(quantise(q[:, :, r]), quantise(k), weights[:, :, r], 5, start=start, end=end, with_scores=True)
        assert same(alone, Selection(*(x[:, :, r : r + 1] for x in (together.indices, together.counts, together.scores))))
        torch.testing.assert_close(alone_lse[..., 0], lse[..., r])


def test_with_scores_gives_the_scores_of_the_selected_and_the_lse_of_the_visible():
    inputs = index_inputs(2, 33, 70)
    start, end = random_interval(2, 33, 70)
    selection, lse = select(*inputs, 9, start=start, end=end, with_scores=True)
    assert same(
        Selection(selection.indices, selection.counts),
        Selection(*[getattr(select(*inputs, 9, start=start, end=end), x) for x in ("indices", "counts")]),
    )
    scores = index_scores(*inputs, start=start, end=end)
    real = selection.indices >= 0
    expected = scores[:, :, None].gather(-1, selection.indices.clamp(min=0).long()).masked_fill(~real, -torch.inf)
    assert torch.equal(selection.scores, expected)
    assert lse.dtype == torch.float32 and error(lse[..., 0], scores.double().logsumexp(-1)) < 1e-6


def test_the_scores_of_kept_first_and_recent_keys_are_their_own():
    selection, _ = select(*exact_index_inputs(torch.tensor([1.0, 5, 4, 3, 2])), 3, keep_first=1, keep_recent=1, with_scores=True)
    assert selection.indices.flatten().tolist() == [0, 1, 4] and selection.scores.flatten().tolist() == [1.0, 5.0, 2.0]


@pytest.mark.parametrize("J, E, budget", [(1, 8, 20), (5, 24, 33), (8, 64, 300)])
def test_the_same_bits_for_any_chunk_batch_split_and_thread_count(J, E, budget):
    q, k, weights = index_inputs(2, 70, 1300, J, E)
    start, end = (x.expand(2, 70) for x in visible(1300, 70))
    whole, _ = select(q, k, weights, budget, with_scores=True)
    plain = Selection(whole.indices, whole.counts)

    def part(first, last, b=slice(None)):
        rows = b, slice(first, last)
        return select(q[rows], k[b], weights[rows], budget, start=start[rows], end=end[rows])

    for step in (1, 16, 23):
        assert same(along_queries([part(first, min(first + step, 70)) for first in range(0, 70, step)]), plain)
    chunked = [select(q[:, a:z], k[:, : 1230 + z], weights[:, a:z], budget) for a, z in ((0, 19), (19, 50), (50, 70))]  # as a cache grows
    assert same(along_queries(chunked), plain)
    rows = [part(0, 70, slice(b, b + 1)) for b in range(2)]
    assert torch.equal(torch.cat([r.indices for r in rows]), plain.indices)
    for workspace_mb in (1, 2, 100):
        assert same(select(q, k, weights, budget, with_scores=True, workspace_mb=workspace_mb)[0], whole)
    torch.set_num_threads(2)
    assert same(select(q, k, weights, budget), plain)
    with deterministic():
        assert same(select(q, k, weights, budget), plain)


@pytest.mark.parametrize("shift", [1, 100, 512])
def test_keys_before_the_visible_ones_shift_the_selection_and_nothing_else(shift):
    q, k, weights = index_inputs(1, 20, 600, J=2, E=3)
    start, end = visible(600, 20)
    alone = select(q, k, weights, 50)
    moved = select(q, torch.cat((normal(1, shift, 3, seed=7), k), 1), weights, 50, start=start + shift, end=end + shift)
    assert torch.equal(moved.indices - shift, alone.indices)


def test_keys_behind_the_visible_ones_change_nothing():
    q, k, weights = index_inputs(1, 20, 600)
    padded = torch.cat((k, torch.full((1, 30, 16), torch.nan)), 1)  # unwritten slots of a static cache
    start, end = visible(600, 20)
    assert same(select(q, padded, weights, 50, start=start, end=end), select(q, k, weights, 50))


def test_trap_21_packed_sequences_select_as_if_alone():
    q, k, weights = index_inputs(1, 60, 60)
    start, end = visible(60, 60, cu_seqlens=torch.tensor([0, 25, 60]))
    packed = select(q, k, weights, 8, start=start, end=end)
    for a, z in ((0, 25), (25, 60)):
        alone = select(q[:, a:z], k[:, a:z], weights[:, a:z], 8)
        assert [[s - a for s in row] for row in rows_of(packed)[a:z]] == rows_of(alone)


def test_strides_are_free():
    q, k, weights = index_inputs(2, 33, 70)
    strided = q.transpose(1, 2).contiguous().transpose(1, 2), torch.stack((k, -k), 2)[:, :, 0], weights.mT.contiguous().mT
    assert not any(x.is_contiguous() for x in strided)
    assert same(select(*strided, 9), select(q, k, weights, 9))


def test_the_selection_depends_on_no_common_scale_of_the_weights():
    q, k, weights = index_inputs(2, 33, 70)
    assert same(select(q, k, weights * 4, 9), select(q, k, weights, 9))


def test_autocast_does_not_touch_the_selection():
    q, k, weights = index_inputs(2, 33, 300)
    with torch.autocast("cpu", torch.bfloat16):
        inside = select(q, k, weights, 40, with_scores=True)[0]
    assert same(inside, select(q, k, weights, 40, with_scores=True)[0])


def test_trap_18_nothing_has_a_gradient():
    q, k, weights = (x.requires_grad_() for x in index_inputs())
    selection, lse = select(q, k, weights, 4, with_scores=True)
    assert not selection.scores.requires_grad and not lse.requires_grad


def exact_shares(shares: list[float]) -> Tensor:
    """Scores whose softmax is `shares`, of which exact ties stay exact."""
    return torch.tensor(shares, dtype=torch.float64).log().float()


def test_mass_keeps_the_fewest_keys_that_hold_it():
    scores = exact_shares([0.1, 0.4, 0.05, 0.3, 0.15])
    for mass, kept in ((0.39, [1]), (0.41, [1, 3]), (0.69, [1, 3]), (0.71, [1, 3, 4]), (0.94, [0, 1, 3, 4]), (0.96, [0, 1, 2, 3, 4])):
        assert pick(scores, 5, mass=mass) == kept
    assert pick(scores, 2, mass=0.9) == [1, 3], "never more than the budget"
    assert pick(scores, 4, mass=0.1, min_budget=3) == [1, 3, 4], "never fewer than the least"
    assert pick(scores, 5, mass=1) == [0, 1, 2, 3, 4]


def test_mass_is_of_all_visible_keys_and_of_scores_with_their_factors():
    q, k, weights = exact_index_inputs(exact_shares([0.5, 0.25, 0.125, 0.125]))
    assert rows_of(select(q, k, weights, 3, mass=0.7, **everything(4))) == [[0, 1]]
    assert rows_of(select(q, k, weights * 9, 3, mass=0.7, **everything(4))) == [[0]], "the softmax of larger scores is sharper"
    assert rows_of(select(q, k, weights, 3, mass=0.5, start=torch.tensor([[1]], dtype=torch.int32), end=torch.tensor([[4]], dtype=torch.int32))) == [
        [1]
    ]
    assert rows_of(select(q, k, weights, 3, mass=0.6, start=torch.tensor([[1]], dtype=torch.int32), end=torch.tensor([[4]], dtype=torch.int32))) == [
        [1, 3]
    ], "of the two that tie the most recent"


def test_mass_counts_first_and_recent_keys_before_all_others():
    scores = exact_shares([0.05, 0.5, 0.3, 0.1, 0.05])
    assert pick(scores, 5, mass=0.09, keep_first=1, keep_recent=1) == [0, 4], "kept though others hold more"
    assert pick(scores, 5, mass=0.59, keep_first=1, keep_recent=1) == [0, 1, 4], "what they hold counts"
    assert pick(scores, 3, mass=0.99, keep_first=1, keep_recent=1) == [0, 1, 4]


def test_mass_narrows_rows_that_see_no_more_than_the_budget_but_not_below_the_least():
    selection = select(*exact_index_inputs(exact_shares([0.7, 0.1, 0.1, 0.1]), T=4), 4, mass=0.5, min_budget=2)
    assert rows_of(selection) == [[0], [0, 1], [0, 2], [0, 3]]
    selection.check(4)


def test_mass_takes_minus_zero_for_plus_zero():
    k = torch.zeros(1, 8, 4, dtype=torch.float8_e4m3fn), torch.tensor([[1.0, -1, 1, -1, 1, -1, 1, -1]])
    assert rows_of(select(torch.ones(1, 1, 1, 4), k, torch.ones(1, 1, 1), 6, mass=0.3, **everything(8))) == [[5, 6, 7]]


def test_shares_that_are_no_numbers_narrow_nothing():
    nan = math.nan
    assert pick(torch.tensor([9.0, nan, 0.0, 1.0]), 3, mass=0.1) == [0, 2, 3]
    assert pick(torch.tensor([nan, 9.0, nan, nan]), 3, mass=0.1) == [1, 2, 3]
    k = torch.tensor([1.0, torch.inf, 0.0, torch.inf]).view(1, 4, 1)
    assert rows_of(select(torch.ones(1, 1, 1, 1), k, torch.ones(1, 1, 1), 3, mass=0.1, **everything(4))) == [[0, 1, 3]]


def test_mass_with_scores_gives_those_of_the_keys_that_are_left():
    inputs = index_inputs(2, 33, 70)
    start, end = random_interval(2, 33, 70)
    options = {"start": start, "end": end, "mass": 0.6, "min_budget": 3}
    selection, lse = select(*inputs, 20, with_scores=True, **options)
    selection.check(70)
    assert same(Selection(selection.indices, selection.counts), select(*inputs, 20, **options))
    scores = index_scores(*inputs, start=start, end=end)
    real = selection.indices >= 0
    assert torch.equal(selection.scores, scores[:, :, None].gather(-1, selection.indices.clamp(min=0).long()).masked_fill(~real, -torch.inf))
    assert error(lse[..., 0], scores.double().logsumexp(-1)) < 1e-6
    assert 3 < float(selection.counts.float().mean()) < 18


def test_mass_selects_the_same_for_any_chunk_batch_and_split():
    q, k, weights = index_inputs(2, 70, 1300, 5, 24)
    start, end = (x.expand(2, 70) for x in visible(1300, 70))
    options = {"mass": 0.3, "min_budget": 4, "keep_first": 1}
    whole = select(q, k, weights, 300, **options)
    assert len(set(whole.counts.flatten().tolist())) > 5

    def part(first, last, b=slice(None)):
        rows = b, slice(first, last)
        return select(q[rows], k[b], weights[rows], 300, start=start[rows], end=end[rows], **options)

    for step in (1, 16, 23):
        assert same(along_queries([part(first, min(first + step, 70)) for first in range(0, 70, step)]), whole)
    assert torch.equal(torch.cat([part(0, 70, slice(b, b + 1)).indices for b in range(2)]), whole.indices)
    for workspace_mb in (1, 100):
        assert same(select(q, k, weights, 300, workspace_mb=workspace_mb, **options), whole)
    with deterministic(), torch.autocast("cpu", torch.bfloat16):
        assert same(select(q, k, weights, 300, **options), whole)


def test_the_lse_has_the_same_bits_for_any_chunk_and_split():
    q, k, weights = index_inputs(2, 70, 1300, 5, 24)
    start, end = (x.expand(2, 70) for x in visible(1300, 70))
    whole = select(q, k, weights, 9, with_scores=True)[1]
    for step in (1, 16, 23):
        rows = [slice(first, first + step) for first in range(0, 70, step)]
        parts = [select(q[:, r], k, weights[:, r], 9, start=start[:, r], end=end[:, r], with_scores=True)[1] for r in rows]
        assert torch.equal(torch.cat(parts, 1), whole)
    assert torch.equal(select(q, k, weights, 9, with_scores=True, workspace_mb=1)[1], whole)


def test_mass_with_R_selections_and_fp8():
    q, k, weights = normal(2, 9, 3, 4, 16), normal(2, 40, 16, seed=1), normal(2, 9, 3, 4, seed=2)
    options = {"mass": 0.4, "min_budget": 2, "keep_recent": 1}
    together = select(codec.quantise(q), codec.quantise(k), weights, 15, **options)
    together.check(40)
    for r in range(3):
        alone = select(codec.quantise(q[:, :, r]), codec.quantise(k), weights[:, :, r], 15, **options)
        assert same(alone, Selection(together.indices[:, :, r : r + 1], together.counts[:, :, r : r + 1]))


def test_mass_compiles_into_one_graph():
    def step(q, k, weights):
        return select(q, k, weights, 9, mass=0.6).indices

    inputs = index_inputs(2, 33, 70)
    assert torch.equal(torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)(*inputs), step(*inputs))


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    T=st.integers(1, 20),
    S=st.integers(1, 40),
    budget=st.integers(1, 40),
    least=st.integers(1, 6),
    mass=st.floats(0.01, 1.0),
    keep=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    coarse=st.booleans(),
    sharp=st.sampled_from([0.1, 1.0, 10.0]),
    seed=st.integers(0, 1000),
)
def test_mass_by_its_definition(T, S, budget, least, mass, keep, dtype, coarse, sharp, seed):
    """Row by row in float64: the shortest beginning of the order that holds the share, give or take rounding."""
    q, k, weights = index_inputs(1, T, S, 3, 4, seed, dtype)
    if coarse:
        q, k, weights = (x.mul(1.5).round() for x in (q, k, weights))
    weights = weights * sharp
    start, end = random_interval(1, T, S, seed)
    keep = keep if sum(keep) <= budget else (0, 0)
    least = min(least, budget)
    options = {"keep_first": keep[0], "keep_recent": keep[1], "mass": mass, "min_budget": least}
    selection = select(q, k, weights, budget, start=start, end=end, **options)
    selection.check(S)
    scores = index_scores(q, k, weights, start=start, end=end)
    shares = scores.double().softmax(-1)
    for t, row in enumerate(rows_of(selection)):
        a, z = int(start[0, t]), int(end[0, t])
        orders = [chosen(scores[0, t], a, z, n, *keep) if z > a else [] for n in range(min(budget, z - a) + 1)]
        always = len({*range(a, z)[: keep[0]], *range(max(a, z - keep[1]), z)})

        def fewest(mass, orders=orders, always=always, t=t):
            enough = [n for n, kept in enumerate(orders) if float(shares[0, t, kept].sum()) >= mass and n >= max(always, min(least, len(orders) - 1))]
            return min(enough, default=len(orders) - 1)

        assert row == orders[len(row)]
        assert fewest(mass - 1e-5) <= len(row) <= fewest(mass + 1e-5)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    B=st.integers(1, 2),
    T=st.integers(1, 20),
    S=st.integers(1, 40),
    J=st.integers(1, 5),
    E=st.integers(1, 6),
    budget=st.integers(1, 12),
    keep=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    packed=st.booleans(),
    coarse=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_shape_and_any_visibility(B, T, S, J, E, budget, keep, dtype, packed, coarse, seed):
    inputs = index_inputs(B, T, S, J, E, seed, dtype)
    if coarse:  # small integers: ties everywhere
        inputs = tuple(x.mul(1.5).round() for x in inputs)
    if packed:
        cut = seed % (S + 1)
        start, end = (x.expand(B, T) for x in visible(S, T, cu_seqlens=torch.tensor([0, cut, S]), offset=max(0, S - T)))
    else:
        start, end = random_interval(B, T, S, seed)
    keep = keep if sum(keep) <= budget else (0, 0)
    assert_exact(inputs, budget, start, end, *keep)
    seen = interval_mask(start, end, S).sum(-1).clamp(max=budget)
    assert torch.equal(select(*inputs, budget, start=start, end=end).counts[..., 0].long(), seen)
