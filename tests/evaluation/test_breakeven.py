"""The break-even length: arithmetic on given costs, and one real measurement."""

import pytest
import torch

from skim.evaluation import breakeven


def test_costs_that_never_cross_have_no_break_even():
    assert breakeven._crossing((10, 100), (1.0, 2.0), (2.0, 3.0)) is None


def test_break_even_adds_up_what_was_lost_before():
    # dense s, sparse 50 + s / 2: a query costs the same at 100 keys, a text only at 200.
    lengths = tuple(range(0, 1001, 10))
    dense, sparse = [float(n) for n in lengths], [50 + n / 2 for n in lengths]
    assert breakeven._crossing(lengths, dense, sparse) == pytest.approx(200, abs=2)


def test_measurement_gives_positive_times(monkeypatch):
    monkeypatch.setattr(breakeven, "LENGTHS", (128, 256))
    found = breakeven.break_even(4, 2, 16, 2, 16, 32, torch.float32, torch.device("cpu"))
    assert all(t > 0 for t in found.dense + found.sparse) and found.lengths == (128, 256)
