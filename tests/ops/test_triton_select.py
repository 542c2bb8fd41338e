"""The selection by Triton, in its interpreter or on a GPU where there is one: against the reference on scores that both have bit for bit.

Small integers as inputs, and powers of two as factors, make every score exact. Thresholds and candidates are for long rows;
`sampled` makes short ones go the same way.
"""

import math

import pytest
import torch
from cases import KERNELS, exact_index_inputs, index_inputs, moved_to, normal, random_interval, triton
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_math import interval_mask
from torch import Tensor

from skim.ops import codec, select, visible
from skim.ops.select import candidates
from skim.ops.select import triton as kernels
from skim.selection import Selection


def whole_numbers(*shape, **options) -> tuple[Tensor, Tensor, Tensor]:
    """Index inputs with exact scores and ties everywhere; J = 4 and E = 16 or 4."""
    q, k, weights = (x.mul(1.5).round() for x in index_inputs(*shape, **options))
    return q, k, weights * 8


def compare(inputs, budget: int, **options) -> Selection:
    """The selection, having seen that it is the reference's."""
    mine, theirs = triton(select, *inputs, budget, **options), select(*inputs, budget, impl="reference", **options)
    if options.get("with_scores"):
        (mine, lse), (theirs, wanted) = mine, theirs
        torch.testing.assert_close(lse, wanted, rtol=1e-6, atol=1e-5)
        assert torch.equal(mine.scores, theirs.scores)
    assert torch.equal(mine.indices, theirs.indices) and torch.equal(mine.counts, theirs.counts)
    return mine


def everything(S: int, T: int = 1) -> dict[str, Tensor]:
    return {"start": torch.zeros(1, T, dtype=torch.int32), "end": torch.full((1, T), S, dtype=torch.int32)}


def pick(scores: Tensor, budget: int, **options) -> list[int]:
    """What one query that sees all the keys with exactly these scores keeps."""
    selection = compare(exact_index_inputs(scores), budget, **everything(scores.shape[0]), **options)
    return selection.indices.flatten()[: int(selection.counts)].tolist()


@pytest.fixture
def sampled(monkeypatch):
    """Rows of some hundred keys are sampled, have a threshold and little room for candidates."""
    monkeypatch.setattr(candidates, "SAMPLE", 64)
    monkeypatch.setattr(candidates, "CAPACITY", 32)
    monkeypatch.setattr(candidates, "ROOM", 0)
    monkeypatch.setattr(candidates, "PROGRAMS", 4)


@pytest.mark.parametrize("keep", [(0, 0), (2, 3)])
@pytest.mark.parametrize("shape", [(2, 5, 70, 4, 16), (1, 3, 300, 4, 4), (1, 6, 40, 16, 4)])
def test_any_interval(shape, keep):
    inputs = whole_numbers(*shape)
    start, end = random_interval(shape[0], shape[1], shape[2])
    compare(inputs, 7, start=start, end=end, keep_first=keep[0], keep_recent=keep[1])


@pytest.mark.parametrize("keep", [(0, 0), (2, 3)])
def test_any_interval_by_way_of_thresholds(sampled, flagged, keep):
    inputs = whole_numbers(1, 3, 900, 4, 4)
    start, end = random_interval(1, 3, 900)
    compare(inputs, 9, start=start, end=end, keep_first=keep[0], keep_recent=keep[1])
    assert flagged and sum(flagged) == 0


def test_random_scores_by_way_of_thresholds(sampled, flagged):
    scores = normal(2000)
    assert pick(scores, 20) == sorted(scores.topk(20).indices.tolist())
    assert flagged == [0]


@pytest.mark.parametrize("value", [0.0, 1.0, -3.5, -math.inf, math.nan])
@pytest.mark.parametrize("S", [100, 1500])
def test_equal_scores_are_a_sliding_window(sampled, value, S):
    scores = torch.full((S,), value)
    if math.isfinite(value):
        assert pick(scores, 12) == list(range(S - 12, S))
    else:
        key = torch.full((1, S, 1), math.inf if value == -math.inf else math.nan)
        inputs = torch.ones(1, 1, 1, 1), key, -torch.ones(1, 1, 1)
        assert compare(inputs, 12, **everything(S)).indices.flatten().tolist() == list(range(S - 12, S))


def test_a_plateau_of_zeros(sampled):
    scores = normal(1000).clamp(max=0)
    scores[::50] = 1.0
    assert len(pick(scores, 100)) == 100


def test_a_narrow_range(sampled):
    pick(1 + 1e-6 * normal(1500), 25)  # differs in the last bits, with ties
    pick((1 + 1e-3 * normal(1500)).bfloat16().float(), 33)


def test_nan_never_wins(sampled):
    nan = math.nan
    assert pick(torch.tensor([nan, -1.0, nan, -2.0, nan, -3.0]), 2) == [1, 3]
    assert pick(torch.tensor([nan, 1.0, nan, nan]), 3) == [1, 2, 3]
    scores = torch.full((600,), nan)
    scores[[3, 500]] = -1.0
    assert pick(scores, 4) == [3, 500, 598, 599]


def test_a_sampled_row_with_fewer_numbers_than_it_keeps_is_done_again(sampled, flagged):
    scores = torch.full((600,), math.nan)
    scores[[3, 300, 500]] = torch.tensor([-1.0, 2.0, -1.0])
    assert pick(scores, 3) == [3, 300, 500] and flagged == [0]
    assert pick(scores, 5) == [3, 300, 500, 598, 599] and flagged == [0, 1]


@pytest.mark.parametrize("S", [8, 900])
def test_infinite_scores_tie_with_the_largest_finite(sampled, S):
    key = torch.linspace(1, 2, S)
    key[[1, S - 3]], key[2] = math.inf, torch.finfo(torch.float32).max
    key = key.view(1, S, 1)
    for sign in (1.0, -1.0):
        compare((torch.ones(1, 1, 1, 1), key, torch.full((1, 1, 1), sign)), 2, **everything(S))


def test_minus_zero_equals_plus_zero():
    k = torch.zeros(1, 8, 4, dtype=torch.float8_e4m3fn), torch.tensor([[1.0, -1, 1, -1, 1, -1, 1, -1]])
    selection = compare((torch.ones(1, 1, 1, 4), k, torch.ones(1, 1, 1)), 3, **everything(8))
    assert selection.indices.flatten().tolist() == [5, 6, 7]


def test_first_and_recent_keys_are_kept_even_where_their_scores_are_nan(sampled):
    nan = math.nan
    assert pick(torch.tensor([nan, 1.0, 3.0, 2.0, nan]), 3, keep_first=1, keep_recent=1) == [0, 2, 4]
    scores = normal(800)
    scores[0] = scores[-1] = nan
    assert pick(scores, 5, keep_first=2, keep_recent=2)[:2] == [0, 1]
    assert pick(scores, 4, keep_first=2, keep_recent=2) == [0, 1, 798, 799]


def test_short_and_empty_rows():
    q, k, weights = whole_numbers(1, 6, 70, 4, 4)
    start = torch.tensor([[0, 4, 7, 70, 3, -5]], dtype=torch.int32)
    end = torch.tensor([[0, 4, 60, 70, 2, 90]], dtype=torch.int32)
    selection = compare((q, k, weights), 8, start=start, end=end, with_scores=True)
    assert selection.counts.flatten().tolist() == [0, 0, 8, 0, 0, 8]
    compare((q, k, weights), 100, start=start, end=end)
    compare((q, k, weights), 55, start=start, end=end, with_scores=True)


def test_no_queries_and_no_keys():
    q, k, weights = index_inputs(T=3, S=5)
    assert triton(select, q[:, :0], k, weights[:, :0], 2).indices.shape == (1, 0, 1, 2)
    assert triton(select, q, k[:, :0], weights, 2).counts.flatten().tolist() == [0, 0, 0]


def test_packed_sequences():
    start, end = visible(30, 30, cu_seqlens=torch.tensor([0, 12, 30]))
    compare(whole_numbers(1, 30, 30, 4, 4), 8, start=start, end=end, keep_first=1, keep_recent=1)


def test_five_axes_make_R_selections_over_the_same_keys():
    q, k, weights = (x.mul(1.5).round() for x in (normal(1, 5, 3, 4, 16), normal(1, 40, 16, seed=1), normal(1, 5, 3, 4, seed=2)))
    start, end = random_interval(1, 5, 40)
    assert compare((q, k, weights * 8), 5, start=start, end=end, with_scores=True).indices.shape == (1, 5, 3, 5)


def test_fp8_inputs():
    q, k, weights = whole_numbers(1, 5, 80, 4, 16)
    fp8 = codec.quantise(q, scale_format="ue8m0"), codec.quantise(k, scale_format="ue8m0"), weights
    compare(fp8, 20)
    compare((fp8[0], k, weights), 20)
    compare((q, fp8[1], weights), 20)


def test_one_query_whose_keys_are_split(monkeypatch, sampled, flagged):
    monkeypatch.setattr(candidates, "SPLIT", 64)
    inputs = whole_numbers(2, 1, 1000, 4, 4)
    selection = compare(inputs, 40, with_scores=True)
    monkeypatch.setattr(candidates, "PROGRAMS", 1)
    other = compare(inputs, 40, with_scores=True)
    assert torch.equal(selection.indices, other.indices) and torch.equal(selection.scores, other.scores)


@pytest.mark.parametrize("with_scores", [False, True])
def test_a_row_with_too_few_candidates_is_done_again(monkeypatch, sampled, flagged, with_scores):
    inputs = whole_numbers(1, 2, 1500, 4, 4)
    loud = inputs[1].abs() * 8
    where = sampled_positions(1500)
    keys = inputs[1].abs().clamp(min=1)
    keys[0, where] = loud[0, where] + 40  # the sample sees the best keys and no others
    q, weights = inputs[0].abs() + 1, inputs[2].abs() + 8
    compare((q, keys, weights), 60, **everything(1500, 2), with_scores=with_scores)
    assert flagged == [2]


@pytest.mark.parametrize("with_scores", [False, True])
def test_a_row_with_too_many_candidates_is_done_again(sampled, flagged, with_scores):
    inputs = whole_numbers(1, 2, 1500, 4, 4)
    keys = inputs[1].abs() + 40
    keys[0, sampled_positions(1500)] = 1.0  # the sample sees the worst keys and no others
    q, weights = inputs[0].abs() + 1, inputs[2].abs() + 8
    compare((q, keys, weights), 20, **everything(1500, 2), keep_first=2, keep_recent=1, with_scores=with_scores)
    assert flagged == [2]


def sampled_positions(S: int) -> Tensor:
    """The keys that a row of S is sampled at when there are 64 strata."""
    strata, stride, _, _ = candidates.sampling(1, S, 1)
    stratum = torch.arange(strata, dtype=torch.int64)
    x = stratum * 0x9E3779B1 & 0xFFFFFFFF
    x = (x ^ (x >> 15)) * 0x85EBCA77 & 0xFFFFFFFF
    key = stratum * stride + (x ^ (x >> 13)) % stride
    return key[key < S]


def test_the_same_bits_for_any_chunk_batch_split_and_workspace(monkeypatch, sampled):
    q, k, weights = index_inputs(2, 6, 300, J=5, E=24)
    start, end = (x.expand(2, 6) for x in visible(300, 6))
    whole, _ = triton(select, q, k, weights, 30, with_scores=True)
    for t in (0, 5):
        row = slice(1, 2), slice(t, t + 1)
        alone = triton(select, q[row], k[1:], weights[row], 30, start=start[row], end=end[row])
        assert torch.equal(alone.indices, whole.indices[row])
    monkeypatch.setattr(candidates, "SPLIT", 32)
    again, _ = triton(select, q, k, weights, 30, with_scores=True, workspace_mb=1)
    assert torch.equal(again.indices, whole.indices) and torch.equal(again.scores, whole.scores)


def test_unwritten_keys_change_nothing():
    q, k, weights = whole_numbers(1, 5, 100, 4, 4)
    start, end = visible(100, 5)
    padded = torch.cat((k, torch.full((1, 30, 4), torch.nan)), 1)
    mine = triton(select, q, padded, weights, 20, start=start, end=end, with_scores=True)[0]
    assert torch.equal(mine.indices, compare((q, k, weights), 20).indices) and bool(mine.scores.isfinite().all())


@pytest.mark.parametrize("S, budget", [(50, 7), (5000, 40)])
def test_top_k_of_scores_that_are_there(monkeypatch, S, budget):
    monkeypatch.setattr(candidates, "CAPACITY", 64)
    monkeypatch.setattr(candidates, "ROOM", 0)
    scores = normal(6, S).mul(20).round()
    scores[5] = 0.0
    start, end = (x[0] for x in random_interval(1, 6, S))
    start[0], end[0], start[1], end[1], start[5], end[5] = 0, S, 3, 3, 0, S
    indices, counts = moved_to("cpu", kernels.top_k(*moved_to(KERNELS, (scores, start, end)), budget))
    ranked = scores.masked_fill(~interval_mask(start, end, S), -torch.inf)
    order = ranked.flip(1).sort(dim=1, descending=True, stable=True).indices
    for row in range(6):
        count = int((end[row] - start[row]).clamp(0, budget))
        assert int(counts[row]) == count
        assert indices[row].tolist() == sorted((S - 1 - order[row, :count]).tolist()) + [-1] * (budget - count)


@pytest.mark.parametrize("wanted_of_all", [8, 128, 700])
@pytest.mark.parametrize("shape", ["normal", "exponential", "uniform", "heavy", "narrow", "tiny", "huge", "two humps", "infinite", "ties", "equal"])
def test_a_sample_has_a_threshold_that_as_many_reach_as_are_wanted(shape, wanted_of_all):
    n, x = 1024, normal(1024)
    scores = {
        "normal": x, "exponential": -x.abs().clamp(min=1e-6).log(), "uniform": torch.linspace(-1, 1, n), "heavy": x.pow(9), "narrow": 1 + 1e-4 * x,
        "tiny": x * 1e-40, "huge": x * 1e38, "two humps": x + 1e6 * (x > 1), "infinite": x.masked_fill(x > 0.5, math.inf), "ties": x.mul(2).round(),
        "equal": torch.zeros(n),
    }[shape]  # fmt: skip
    start, end = torch.zeros(1, dtype=torch.int32), torch.full((1,), n, dtype=torch.int32)
    point, position = torch.zeros(1), torch.zeros(1, dtype=torch.int32)
    inputs = moved_to(KERNELS, (scores, start, end, point, position))
    candidates.threshold_kernel[(1,)](*inputs, 0, n, wanted_of_all, 0, 0, 0, 1, BM=n, KEEP=False)
    point, position = moved_to("cpu", inputs[3:])
    scores = scores.clamp(max=torch.finfo(torch.float32).max)
    reached = int(((scores > point) | (scores == point) & (torch.arange(n) >= position)).sum())
    wanted = math.ceil(wanted_of_all + 5 * math.sqrt(wanted_of_all) + 4)
    assert wanted <= reached <= (wanted + wanted // 16 if shape != "infinite" else n)


def best(scores: Tensor, start: Tensor, end: Tensor, budget: int) -> list[list[int]]:
    """Per row the keys of the best scores, the last first among equals: infinite as the largest finite, NaN below all."""
    largest = torch.finfo(torch.float32).max
    ranked = scores.double().clamp(-largest, largest).nan_to_num(nan=-1e39)
    rows = []
    for row, low, high in zip(ranked, start.clamp(min=0).tolist(), end.clamp(max=scores.shape[1]).tolist(), strict=True):
        order = row[low:high].flip(0).sort(descending=True, stable=True).indices[:budget]
        rows.append(sorted((high - 1 - order).tolist()))
    return rows


@pytest.fixture
def short_rows(monkeypatch):
    """Rows of some thousand scores are sampled, and split into parts where there are few rows."""
    monkeypatch.setattr(kernels, "ROW_CAPACITY", 2048)
    monkeypatch.setattr(kernels, "ROW_SAMPLE", 512)
    monkeypatch.setattr(kernels, "PART", 1024)


@pytest.fixture(params=[(1, 0), (40, 64)], ids=["a program each", "in parts"])
def many_rows(request, monkeypatch, short_rows):
    """Few rows are many enough for a program each, or few enough for some programs each."""
    for name, value in zip(("PROGRAMS", "FEW"), request.param, strict=True):
        monkeypatch.setattr(kernels, name, value)


@pytest.mark.parametrize("S, budget", [(1500, 30), (9000, 60), (9001, 60)])
def test_top_k_of_many_rows(many_rows, S, budget):
    scores = normal(10, S)
    scores[1], scores[2], scores[3] = 0.0, -math.inf, math.nan
    scores[4].clamp_(max=0)
    scores[4, ::500] = 1.0
    scores[5] = 1 + 1e-6 * scores[5]
    scores[6] = scores[6].mul(3).round()
    scores[7] = torch.linspace(-1, 1, S)  # all candidates are neighbours
    scores[8, ::3] = math.nan
    start, end = torch.zeros(10, dtype=torch.int32), torch.full((10,), S, dtype=torch.int32)
    start[9], end[9] = 37, S - 5
    for low, high in ((start, end), (start + S // 2, end), (start - 3, torch.arange(10, dtype=torch.int32) * 40)):
        indices, counts = moved_to("cpu", kernels.top_k(*moved_to(KERNELS, (scores, low, high)), budget))
        wanted = best(scores, low, high, budget)
        assert counts.tolist() == [len(row) for row in wanted]
        assert indices.tolist() == [row + [-1] * (budget - len(row)) for row in wanted]


def test_many_rows_of_few_numbers_and_of_both_zeros(many_rows):
    S = 9000
    scores = torch.full((5, S), math.nan)
    scores[0, 7::150] = -math.inf  # as many as are kept
    scores[1, 7::160] = normal(57)
    scores[2, ::2] = -math.inf
    scores[3], scores[4] = -0.0, normal(S).clamp(max=0)
    scores[3, ::2] = 0.0
    start, end = torch.zeros(5, dtype=torch.int32), torch.full((5,), S, dtype=torch.int32)
    indices, _ = moved_to("cpu", kernels.top_k(*moved_to(KERNELS, (scores, start, end)), 60))
    assert indices.tolist() == best(scores, start, end, 60)


def test_many_rows_whose_sample_misleads(many_rows):
    S = 9000
    samples, capacity = kernels.row_sampling(60, S)
    assert 0 < samples < S and capacity == 2048
    stratum = torch.arange(samples // 4, dtype=torch.int64)
    x = stratum * 0x9E3779B1 & 0xFFFFFFFF
    x = (x ^ (x >> 15)) * 0x85EBCA77 & 0xFFFFFFFF
    stride = -(-S // samples)
    sampled = ((stratum * stride + (x ^ (x >> 13)) % stride)[:, None] * 4 + torch.arange(4)).flatten()
    sampled = sampled[sampled < S]
    scores = normal(2, S).abs()
    scores[0, sampled] += 10  # nothing else is among the best
    scores[1, sampled] -= 10  # all the rest are
    start, end = torch.zeros(2, dtype=torch.int32), torch.full((2,), S, dtype=torch.int32)
    indices, _ = moved_to("cpu", kernels.top_k(*moved_to(KERNELS, (scores, start, end)), 60))
    assert indices.tolist() == best(scores, start, end, 60)


def test_many_rows_that_take_turns_in_little_memory(many_rows):
    rows = 9 if KERNELS == "cpu" else 1000  # the interpreter runs one program after another
    scores, start, end = normal(rows, 9000), torch.zeros(rows, dtype=torch.int32), torch.full((rows,), 9000, dtype=torch.int32)
    whole, parts = (kernels.top_k(*moved_to(KERNELS, (scores, start, end)), 60, mb)[0] for mb in (512, 1))
    assert torch.equal(whole, parts)


@pytest.mark.parametrize("with_scores", [False, True])
@pytest.mark.parametrize("keep", [(0, 0), (10, 30)])
def test_few_queries_by_way_of_scores_in_memory(short_rows, keep, with_scores):
    inputs = whole_numbers(1, 4, 3001, 4, 4)
    assert kernels._few(4, 3001, 60, 512) and kernels._parts(4, 3001)[0] > 1
    start, end = random_interval(1, 4, 3001)
    start[0, 0], end[0, 0], start[0, 1], end[0, 1] = -5, 4000, 3, 3
    compare(inputs, 60, start=start, end=end, keep_first=keep[0], keep_recent=keep[1], with_scores=with_scores)


def test_few_queries_keep_keys_whose_scores_are_nan(short_rows):
    scores = normal(3000)
    scores[[0, 1, -1]], scores[[7, 8]] = math.nan, math.inf  # what is kept ties with nothing
    assert pick(scores, 3, keep_first=2, keep_recent=1) == [0, 1, 2999]
    assert pick(scores.nan_to_num(nan=math.nan, posinf=5.0), 4, keep_first=2, keep_recent=1) == [0, 1, 8, 2999]


def test_few_queries_select_the_same_bits_as_many(monkeypatch, short_rows):
    inputs = index_inputs(2, 3, 3000, J=5, E=24)
    interval = {name: x.expand(2, 3) for name, x in zip(("start", "end"), visible(3000, 3), strict=True)}
    few, _ = triton(select, *inputs, 40, with_scores=True, **interval)
    monkeypatch.setattr(kernels, "FEW", 0)
    many, _ = triton(select, *inputs, 40, with_scores=True, **interval)
    assert torch.equal(few.indices, many.indices) and torch.equal(few.scores, many.scores)


def test_few_queries_are_no_longer_few_where_their_scores_take_too_much_memory():
    assert kernels._few(64, 131_072, 2048, 512) and not kernels._few(65, 131_072, 2048, 512)
    assert kernels._few(1, 1 << 20, 2048, 64) and not kernels._few(16, 1 << 20, 2048, 64)


def test_what_it_cannot_run_it_refuses_by_name():
    with pytest.raises(ValueError, match="float32, not in float64"):
        triton(select, *index_inputs(dtype=torch.float64), 4)
    with pytest.raises(ValueError, match="up to 8192 keys, got a budget of 9000"):
        triton(select, *index_inputs(T=1, S=10000, E=1), 9000)


@pytest.mark.parametrize("budget", [1, 7, 64, 2048, 8192])
@pytest.mark.parametrize("S", [1000, 33_000, 131_072, 1 << 20])
def test_a_sample_leaves_room(budget, S):
    strata, stride, few, capacity = candidates.sampling(min(budget, S), S, 128)
    assert capacity <= 16384 and capacity >= max(few, min(budget, S))
    assert strata * stride >= S if strata else capacity >= S


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    B=st.integers(1, 2),
    T=st.integers(1, 4),
    S=st.integers(1, 90),
    heads=st.sampled_from([(4, 16), (1, 4), (4, 1)]),
    budget=st.integers(1, 12),
    keep=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    seed=st.integers(0, 1000),
)
def test_any_shape_and_any_visibility(B, T, S, heads, budget, keep, seed):
    start, end = random_interval(B, T, S, seed)
    keep = keep if sum(keep) <= budget else (0, 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(candidates, "SAMPLE", 16)
        patch.setattr(candidates, "CAPACITY", 16)
        patch.setattr(candidates, "ROOM", 0)
        patch.setattr(candidates, "SPLIT", 32)
        compare(whole_numbers(B, T, S, *heads, seed=seed), budget, start=start, end=end, keep_first=keep[0], keep_recent=keep[1])


def test_the_lse_of_very_low_scores_and_splits_that_see_nothing() -> None:
    q, k, weights = whole_numbers(1, 1, 4096, 4, 16)
    inputs = q.abs() + 1, k.abs() + 1, (weights.abs() + 8) * -256
    compare(inputs, 40, with_scores=True, start=torch.zeros(1, 1, dtype=torch.int32), end=torch.full((1, 1), 100, dtype=torch.int32))
