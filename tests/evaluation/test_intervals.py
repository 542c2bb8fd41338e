"""Paired intervals: against published figures, and by how often they hold the truth."""

import math

import pytest
import torch

from skim.evaluation import paired_shares, paired_t
from skim.evaluation.intervals import t_quantile


@pytest.mark.parametrize(("freedom", "expected"), [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262), (31, 2.040), (1000, 1.962)])
def test_quantiles_are_those_of_the_tables(freedom, expected):
    assert t_quantile(freedom) == pytest.approx(expected, rel=2e-3)


def test_an_interval_by_hand():
    # differences 1, 2, 3: mean 2, standard error sqrt(1 / 3), t of two degrees of freedom
    found = paired_t([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    assert (found.mean, found.low, found.high) == pytest.approx((2.0, 2 - 4.3027 / math.sqrt(3), 2 + 4.3027 / math.sqrt(3)), rel=1e-4)


def test_one_pair_has_no_spread():
    found = paired_t([3.0], [1.0])
    assert (found.mean, found.low, found.high) == (2.0, None, None)


def test_pairs_that_differ_alike_leave_no_doubt():
    found = paired_t([1.5, 2.5, 9.5], [1.0, 2.0, 9.0])
    assert (found.mean, found.low, found.high) == pytest.approx((0.5, 0.5, 0.5))


def test_the_t_interval_holds_the_truth_in_95_of_100_cases():
    draws = torch.randn(4000, 5) + 1.0
    held = [found.low < 1.0 < found.high for found in (paired_t(row, [0.0] * 5) for row in draws.tolist())]
    assert sum(held) / len(held) == pytest.approx(0.95, abs=0.015)


def test_windows_of_one_document_count_together():
    # differences 1, 3 in a, 2 in b, 6 in c: mean 3, sums of deviations -2, -1, 3, error sqrt(14 * 3 / 2) / 4
    found = paired_t([1.0, 3.0, 2.0, 6.0], [0.0] * 4, ["a", "a", "b", "c"])
    half = 4.3027 * math.sqrt(14 * 3 / 2) / 4
    assert (found.mean, found.low, found.high) == pytest.approx((3.0, 3 - half, 3 + half), rel=1e-4)
    assert paired_t([1.0, 3.0, 2.0, 6.0], [0.0] * 4, ["a", "b", "c", "d"]) == paired_t([1.0, 3.0, 2.0, 6.0], [0.0] * 4)


def test_too_few_documents_leave_the_windows_to_themselves():
    assert paired_t([1.0, 3.0, 2.0, 6.0], [0.0] * 4, ["a", "a", "b", "b"]) == paired_t([1.0, 3.0, 2.0, 6.0], [0.0] * 4)


def test_an_interval_over_documents_holds_the_truth_where_one_over_windows_does_not():
    draws = torch.randn(2000, 6, 1) + 0.5 * torch.randn(2000, 6, 4) + 1.0
    names = [document for document in "abcdef" for _ in range(4)]
    held = {}
    for documents in (None, names):
        found = [paired_t(row, [0.0] * 24, documents) for row in draws.flatten(1).tolist()]
        held[documents is None] = sum(one.low < 1.0 < one.high for one in found) / len(found)
    assert held[False] == pytest.approx(0.95, abs=0.02) and held[True] < 0.8


def test_shares_that_never_differ_still_have_an_interval():
    found = paired_shares([True] * 20, [True] * 20)
    assert found.mean == 0 and -0.15 < found.low < 0 < found.high < 0.15


def test_an_interval_of_shares_by_hand():
    # 10 prompts, 4 gained, 1 lost: (4.5 - 1.5) / 12 = 0.25, half 1.96 * sqrt(6 - 9 / 12) / 12
    own = [True] * 7 + [False] * 3
    dense = [False] * 4 + [True] * 3 + [True] + [False] * 2
    found = paired_shares(own, dense)
    half = 1.959964 * math.sqrt(6 - 9 / 12) / 12
    assert found.mean == pytest.approx(0.3)
    assert (found.low, found.high) == pytest.approx((0.25 - half, 0.25 + half))


def test_the_interval_of_shares_holds_the_truth_and_the_estimate():
    dense = torch.rand(2000, 40) < 0.8
    own = torch.where(torch.rand(2000, 40) < 0.15, ~dense, dense)  # share 0.8 * 0.85 + 0.2 * 0.15 = 0.71
    found = [paired_shares(a, b) for a, b in zip(own.tolist(), dense.tolist())]
    assert sum(f.low <= 0.71 - 0.8 <= f.high for f in found) / len(found) > 0.93
    assert all(f.low <= f.mean <= f.high for f in [*found, paired_shares([True] * 9, [False] * 9)])


def test_pairs_must_match():
    with pytest.raises(ValueError, match="as many as the reference has.*got 1 and 2"):
        paired_t([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="at least one, got 0 and 0"):
        paired_shares([], [])
