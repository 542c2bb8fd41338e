"""Selection by the Gluon kernel's scores against the reference: simulated on a CPU, or on an sm_90 GPU; and what it refuses.

Small integers as inputs, and powers of two as factors, make every score exact.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cases import index_inputs, moved_to, random_interval
from torch import Tensor

kernels = pytest.importorskip("skim.ops.select.hopper", reason="Triton is not installed, or has no Gluon")

from test_compiled import SHARED, found  # noqa: E402
from test_hopper_score import DEVICE, REAL, simulated, simulated_without_a_card  # noqa: E402, F401

from skim.ops import codec, index_scores, select, visible  # noqa: E402
from skim.ops.score.triton import Tile  # noqa: E402
from skim.ops.select import candidates, reference  # noqa: E402
from skim.ops.select import hopper_candidates as finding  # noqa: E402

FIND = finding.find
SPILLED = 328  # bytes, with Triton 3.6 (none with 3.9): counters and addresses, beside the weights and the products of a warp group


def counted(first: Tensor, second: Tensor, least: Tensor, *lanes: Tensor) -> tuple[Tensor, Tensor]:
    """`_count` of the kernel, which asks the lanes of a warp: 8 pairs of each query."""
    number = ((first >= least).int() + (second >= least).int()).unflatten(0, (4, 8))
    return (number.cumsum(1) - number).flatten(0, 1).int(), number.sum(1, keepdim=True).expand_as(number).flatten(0, 1).int()


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few heads and queries are many enough, the workspace has room for eight queries, and three programs run at a time."""
    monkeypatch.setattr(kernels, "WORK", 1)
    monkeypatch.setattr(kernels, "ROWS", 8)
    monkeypatch.setattr(kernels, "_fitting", lambda *_: 8)
    monkeypatch.setattr(kernels, "processors", lambda device: 3)
    monkeypatch.setattr(candidates, "PROGRAMS", 1)
    if not REAL:
        find = simulated(FIND)
        find.replace("_count", counted)
        monkeypatch.setattr(finding, "find", find)


def whole_numbers(B: int = 1, T: int = 9, S: int = 300, J: int = 16, E: int = 64) -> tuple[Any, Any, Tensor]:
    """Index inputs in FP8 with exact scores and ties everywhere."""
    q, k, weights = (x.mul(1.5).round() for x in index_inputs(B, T, S, J, E))
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


@pytest.fixture
def sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of some hundred keys are sampled and have little room for candidates."""
    for name, value in (("SAMPLE", 64), ("CAPACITY", 32), ("FEW_KEYS", 0), ("ROOM", 0)):
        monkeypatch.setattr(candidates, name, value)


@pytest.mark.parametrize(("J", "E"), [(64, 128), (64, 64), (40, 64), (17, 64), (8, 128)])
def test_it_selects_by_the_bits_of_index_scores(J: int, E: int, sampled: None) -> None:
    q, k, weights = index_inputs(1, 18, 700, J, E)
    inputs = moved_to(DEVICE, (codec.quantise(q), codec.quantise(k), weights))
    start, end = moved_to(DEVICE, random_interval(1, 18, 700))
    scores = index_scores(*inputs, start=start, end=end, impl="hopper")[0].cpu()
    chosen, counts = reference.top_k(scores, start[0].cpu(), end[0].cpu(), 20, 32)
    selection = select(*inputs, 20, start=start, end=end, impl="hopper")
    assert torch.equal(selection.indices.cpu().view(18, 20), chosen) and torch.equal(selection.counts.cpu().view(18), counts)


@pytest.mark.parametrize("programs", (1, 2, 7, 40))
def test_the_same_for_any_number_of_programs(programs: int, sampled: None, flagged: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "processors", lambda device: programs)
    start, end = visible(2100, 9)
    start = start + torch.randint(0, 600, start.shape, dtype=torch.int32)
    compare(whole_numbers(S=2100), 40, start=start, end=end, with_scores=True)
    assert sum(flagged) == 0


def test_a_plateau_of_equal_scores_is_cut_at_a_position(sampled: None, flagged: list[int]) -> None:
    q, (k, scale), weights = whole_numbers(S=2500)
    k[:, 100:2400], scale[:, 100:2400] = k[:, :1], scale[:, :1]  # more than there is room for
    assert candidates.sampling(20, 2500, 128)[0] > 0 and candidates.sampling(20, 2500, 128)[3] < 2300
    compare((q, (k, scale), weights), 20, with_scores=True)
    assert sum(flagged) == 0


def test_best_keys_that_all_lie_together(sampled: None, flagged: list[int]) -> None:
    q, (k, scale), weights = whole_numbers(S=2048)
    scale[:, 900:960] *= 64
    compare((q, (k, scale), weights.abs()), 50, with_scores=True)
    assert sum(flagged) == 0


def test_nan_is_worse_than_any_score(sampled: None, flagged: list[int]) -> None:
    q, (k, scale), weights = whole_numbers(S=900)
    scale[:, 10:300] = torch.nan
    compare((q, (k, scale), weights), 30)
    scale[:, 310:] = torch.nan  # fewer others than are wanted
    compare((q, (k, scale), weights), 30)
    assert sum(flagged) == 9


def test_nan_in_what_is_seen_is_nan_in_its_lse(monkeypatch: pytest.MonkeyPatch) -> None:
    q, (k, scale), weights = whole_numbers(T=8)
    scale[:, :3] = torch.nan
    start = torch.tensor([[0, 0, 0, 0, 1, 2, 3, 3]], dtype=torch.int32)
    end = torch.tensor([[1, 2, 3, 300, 300, 40, 300, 4]], dtype=torch.int32)
    for few in (candidates.FEW_KEYS, 0):
        monkeypatch.setattr(candidates, "FEW_KEYS", few)
        selection, lse = moved_to(
            "cpu", select(*moved_to(DEVICE, (q, (k, scale), weights)), 5, start=start.to(DEVICE), end=end.to(DEVICE), impl="hopper", with_scores=True)
        )
        wanted, theirs = select(q, (k, scale), weights, 5, start=start, end=end, impl="reference", with_scores=True)
        assert torch.equal(selection.indices, wanted.indices) and torch.equal(lse.isnan(), theirs.isnan())
        torch.testing.assert_close(lse, theirs, equal_nan=True, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("loud", (True, False))
def test_a_row_whose_sample_misleads_is_done_again(loud: bool, sampled: None, flagged: list[int]) -> None:
    """The sample sees the best keys and no others, or the worst."""
    q, (k, scale), weights = whole_numbers(S=1500)
    q, weights = (q[0].float().abs().to(q[0].dtype), q[1]), weights.abs() + 8
    k = k.float().abs().clamp(min=8).to(k.dtype)
    strata, stride, _, _ = candidates.sampling(40, 1500, 32)
    where = sampled_keys(strata, stride, 1500)
    scale[:, where] = scale.max() * 64 if loud else scale.min() / 64
    compare((q, (k, scale), weights), 40, keep_first=2, with_scores=True)
    assert sum(flagged) == 9


def sampled_keys(strata: int, stride: int, S: int) -> Tensor:
    x = torch.arange(strata, dtype=torch.int64)
    mixed = x * 0x9E3779B1 & 0xFFFFFFFF
    mixed = (mixed ^ (mixed >> 15)) * 0x85EBCA77 & 0xFFFFFFFF
    key = x * stride + (mixed ^ (mixed >> 13)) % stride
    return key[key < S]


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
    with pytest.raises(ValueError, match="Triton kernels select up to 8192 keys, got a budget of 9000"):
        select(q, tuple(x.expand(1, 10_000, *x.shape[2:]).contiguous() for x in (k[:, :1], k_scale[:, :1])), weights, 9000, impl="hopper")
    with pytest.raises(ValueError, match="Triton kernels select up to 8192 keys, got a budget of 20000"):  # which no sampling serves
        select(q, tuple(x.expand(1, 1 << 17, *x.shape[2:]).contiguous() for x in (k[:, :1], k_scale[:, :1])), weights, 20_000, impl="hopper")
    monkeypatch.setattr(kernels, "WORK", 4096)
    with pytest.raises(ValueError, match="4096 channels of all heads at least, got 16 heads of 64"):
        select(q, (k, k_scale), weights, 5, impl="hopper")
    monkeypatch.setattr(kernels, "WORK", 1)
    monkeypatch.setattr(kernels, "_fitting", lambda *_: 7)
    with pytest.raises(ValueError, match="8 queries at a time, at least, and 1 MiB have no room for their candidates among 300 keys"):
        select(q, (k, k_scale), weights, 5, impl="hopper", workspace_mb=1)
    monkeypatch.setattr(kernels, "ROWS", 16)
    with pytest.raises(ValueError, match="16 queries at a time, at least, got 9"):
        select(q, (k, k_scale), weights, 5, impl="hopper")


def test_candidates_fit_into_the_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for S in (1, 300, 9000, 131_072, 1 << 20):
        sizes = kernels._sizes(S)
        assert all(size % finding.KEYS.value == 0 and size * kernels.CHUNKS >= S for size in sizes) and sizes[0] >= S
        tile = Tile(BN=128, BQ=2, BJ=64, BE=128, HEADS=1, WARPS=4, stages=3)
        strata, _, _, capacity = candidates.sampling(min(2048, S), S, tile.BN)
        for size in sizes:
            rows = kernels._fitting(strata, capacity, tile, S, 64, size)
            splits = -(-S // size) * finding.PARTS.value
            assert rows * (splits * 8 * candidates.segment_of(capacity, size // finding.PARTS.value, tile.BN) + 4 * strata) <= 64 << 20


@pytest.mark.slow
def test_compiled_for_sm_90(tmp_path: Path) -> None:
    compiled = [row for row in found(90, ("hopper_select",), tmp_path) if row["kernel"] == "find"]
    assert len(compiled) == 4
    for row in compiled:
        call = row["call"]
        # As the index scores: two groups multiply 2 x 64 keys with two halves of the heads, 32 channels at a time.
        assert row["products"] == {"m64n128k32" if call.startswith("64") else "m64n64k32": 2 * 2 * 2 * 4}, call
        assert row["spilled"] <= (SPILLED if call.startswith("64") else 0), call
        assert row["shared"] <= SHARED[90] << 10 and row["warps"] == 12, call
        assert row["handed_over"] == {"bar.sync": 4}, call  # of each of two groups one thread arrives: keys, queries
