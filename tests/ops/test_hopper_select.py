"""Selection by the Gluon kernel's scores against the reference: simulated on a CPU, or on an sm_90 GPU; and what it refuses.

Small integers as inputs, and powers of two as factors, make every score exact.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import index_inputs, moved_to, random_interval
from torch import Tensor

kernels = pytest.importorskip("skim.ops.select.hopper", reason="Triton is not installed, or has no Gluon")

from test_hopper_score import DEVICE, simulated_without_a_card  # noqa: E402, F401

from skim.ops import codec, select, visible  # noqa: E402
from skim.ops.select import triton as of_scores  # noqa: E402
from skim.ops.workspace import chunks  # noqa: E402


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few heads are many enough, chunks are of eight queries, and rows of some thousand scores are sampled."""
    monkeypatch.setattr(kernels, "WORK", 1)
    monkeypatch.setattr(kernels, "ROWS", 8)
    monkeypatch.setattr(kernels, "chunks", lambda rows, *_: chunks(rows, 1 << 20, 1, 8))
    monkeypatch.setattr(of_scores, "PROGRAMS", 1)
    monkeypatch.setattr(of_scores, "ROW_CAPACITY", 2048)
    monkeypatch.setattr(of_scores, "ROW_SAMPLE", 512)


def whole_numbers(B: int = 1, T: int = 9, S: int = 300) -> tuple[Any, Any, Tensor]:
    """Index inputs in FP8 with exact scores and ties everywhere."""
    q, k, weights = (x.mul(1.5).round() for x in index_inputs(B, T, S, 16, 64))
    return codec.quantise(q, scale_format="ue8m0"), codec.quantise(k, scale_format="ue8m0"), weights * 8


def compare(inputs: tuple[Any, ...], budget: int, **options: Any) -> None:
    moved = {name: moved_to(DEVICE, x) for name, x in options.items()}
    mine = moved_to("cpu", select(*moved_to(DEVICE, inputs), budget, impl="hopper", **moved))
    theirs = select(*inputs, budget, impl="reference", **options)
    if options.get("with_scores"):
        (mine, lse), (theirs, wanted) = mine, theirs
        torch.testing.assert_close(lse, wanted, rtol=1e-6, atol=1e-5)
        assert torch.equal(mine.scores, theirs.scores)
    assert torch.equal(mine.indices, theirs.indices) and torch.equal(mine.counts, theirs.counts)


@pytest.mark.parametrize("with_scores", (False, True))
@pytest.mark.parametrize("keep", [(0, 0), (2, 0), (0, 3), (4, 5), (9, 11)])
def test_any_interval(keep: tuple[int, int], with_scores: bool) -> None:
    start, end = random_interval(2, 9, 300)
    compare(whole_numbers(2), 20, start=start, end=end, keep_first=keep[0], keep_recent=keep[1], with_scores=with_scores)


def test_rows_that_see_nothing_or_little() -> None:
    start = torch.tensor([[0, 4, 7, 300, 3, -5, 290, 0]], dtype=torch.int32)
    end = torch.tensor([[0, 4, 60, 300, 2, 400, 300, 21]], dtype=torch.int32)
    for keep in ((0, 0), (6, 7)):
        compare(whole_numbers(T=8), 20, start=start, end=end, keep_first=keep[0], keep_recent=keep[1], with_scores=True)


def test_rows_that_are_sampled() -> None:
    start, end = visible(5000, 8)
    compare(whole_numbers(T=8, S=5000), 60, start=start, end=end, keep_first=3, with_scores=True)


def test_more_than_there_is() -> None:
    compare(whole_numbers(T=9, S=30), 50, with_scores=True)


def test_no_keys_at_all() -> None:
    nothing = torch.zeros(1, 9, dtype=torch.int32)
    compare(whole_numbers(T=9, S=0), 5, start=nothing, end=nothing, with_scores=True)


def test_cached_bytes_select_as_keys_in_one_piece() -> None:
    q, k, weights = whole_numbers(2, 8, 320)
    start, end = random_interval(2, 8, 320)
    pool = torch.full((12, 64 * 68), 0xFF, dtype=torch.uint8)  # NaN where nothing was written
    table = torch.randperm(12, dtype=torch.int32)[:10].view(2, 5)
    pool[table.flatten()] = codec.pack_pages(*k, 64).flatten(0, 1)
    compare((q, codec.pack(*k), weights), 20, start=start, end=end, with_scores=True)
    compare((q, pool, weights), 20, start=start, end=end, block_table=table, with_scores=True)


def test_a_share_of_the_softmax() -> None:
    q, k, weights = whole_numbers(T=8)
    compare((q, k, weights / 64), 40, mass=0.5, min_budget=2, with_scores=True)


def test_what_it_cannot_run_it_refuses_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    q, (k, k_scale), weights = moved_to(DEVICE, whole_numbers())
    monkeypatch.setattr(kernels, "ROWS", 8)
    with pytest.raises(ValueError, match="up to 8192 of 524288 keys, got a budget of 9000"):
        select(q, tuple(x.expand(1, 10_000, *x.shape[2:]).contiguous() for x in (k[:, :1], k_scale[:, :1])), weights, 9000, impl="hopper")
    monkeypatch.setattr(kernels, "WORK", 4096)
    with pytest.raises(ValueError, match="4096 channels of all heads at least, got 16 heads of 64"):
        select(q, (k, k_scale), weights, 5, impl="hopper")
    monkeypatch.setattr(kernels, "ROWS", 16)
    with pytest.raises(ValueError, match="16 queries at a time, at least, got 9"):
        select(q, (k, k_scale), weights, 5, impl="hopper")
