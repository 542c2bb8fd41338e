"""Selections on a GPU at the sizes of real texts: exact where rows are hard, from the pages of a cache, and in CUDA graphs."""

from __future__ import annotations

import pytest
import torch
from cases import exact_index_inputs, normal
from torch import Tensor

import skim
from skim.ops import codec

pytestmark = pytest.mark.gpu

S = 131072


def hard(name: str) -> Tensor:
    """Scores `[S]` at which fixed buffers of candidates overflow."""
    plateau = normal(S).clamp(max=0.5)
    rows = {"equal": torch.full((S,), 3.0), "zero": torch.zeros(S), "nan": torch.full((S,), torch.nan), "plateau": plateau}
    rows |= {"narrow": 1 + 1e-6 * normal(S), "bfloat16": (1 + 1e-3 * normal(S)).bfloat16().float(), "rising": torch.arange(S) / S}
    return rows[name]


def best(scores: Tensor, budget: int) -> Tensor:
    """The positions of the best, ascending; among equals the most recent."""
    order = scores.nan_to_num(nan=-torch.inf).flip(0).sort(descending=True, stable=True).indices
    return (scores.numel() - 1 - order[:budget]).sort().values.to(torch.int32)


def all_of(T: int, S: int) -> dict[str, Tensor]:
    return {name: torch.full((1, T), value, dtype=torch.int32, device="cuda") for name, value in (("start", 0), ("end", S))}


@pytest.mark.parametrize("T", (1, 300))  # a row that programs share, and rows that have one each
@pytest.mark.parametrize("name", ("equal", "zero", "nan", "plateau", "narrow", "bfloat16", "rising"))
def test_hard_rows_of_128k_keys_are_exact(name: str, T: int) -> None:
    inputs = [x.cuda() for x in exact_index_inputs(hard(name), T)]
    selection = skim.select(*inputs, 2048, **all_of(T, S))
    assert torch.equal(selection.indices[0, :, 0].cpu(), best(hard(name), 2048).expand(T, -1))


@pytest.mark.parametrize("name", ("equal", "zero", "nan", "plateau", "narrow", "bfloat16", "rising"))
def test_hard_rows_of_64_heads_are_exact(name: str) -> None:
    """Of FP8, which has no such scores: the keys' scales do."""
    T = 300
    q, k = (torch.zeros(1, *shape, 128, dtype=torch.float8_e4m3fn, device="cuda") for shape in ((T, 64), (S,)))
    q[:, :, 0, 0], k[..., 0] = 1, 1
    weights = torch.zeros(1, T, 64, device="cuda")
    weights[..., 0] = 1
    inputs = (q, torch.ones(1, T, 64, device="cuda")), (k, hard(name)[None].cuda()), weights
    scores = skim.ops.index_scores(*inputs, **all_of(T, S))[0, -1].cpu()
    selection = skim.select(*inputs, 2048, **all_of(T, S))
    assert torch.equal(selection.indices[0, :, 0].cpu(), best(scores, 2048).expand(T, -1))


@pytest.mark.parametrize("budget", (1, 8192))
def test_a_million_keys(budget: int) -> None:
    scores = normal(1 << 20)
    selection = skim.select(*(x.cuda() for x in exact_index_inputs(scores, 2)), budget, **all_of(2, 1 << 20))
    assert torch.equal(selection.indices[0, 1, 0].cpu(), best(scores, budget))


def cached(B: int, N: int, page: int = 64) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
    """FP8 keys `[B, N * page, 128]` in one piece, and the same in scattered pages with their block table."""
    keys = codec.quantise(torch.randn(B, N * page, 128, device="cuda"))
    place = torch.randperm(B * N, device="cuda")
    pool = torch.full((B * N + 3, page * 132), 0xFF, dtype=torch.uint8, device="cuda")  # NaN where nothing was written
    pool[place] = codec.pack_pages(*keys, page).flatten(0, 1)
    return keys, pool, place.to(torch.int32).view(B, N)


@pytest.mark.parametrize("J", (4, 64))
@pytest.mark.parametrize("T", (1, 2, 70))
def test_cached_bytes_select_as_keys_in_one_piece(T: int, J: int) -> None:
    keys, pool, table = cached(2, 40)
    end = (torch.arange(2400 - T, 2400, dtype=torch.int32, device="cuda") + 1).expand(2, T).contiguous()
    q, weights = codec.quantise(torch.randn(2, T, J, 128, device="cuda")), torch.randn(2, T, J, device="cuda")
    options = {"start": torch.zeros_like(end), "end": end, "keep_first": 1, "with_scores": True}
    wanted, _ = skim.select(q, keys, weights, 256, **options)
    for held, more in ((codec.pack(*keys), {}), (pool, {"block_table": table})):
        found, _ = skim.select(q, held, weights, 256, **options, **more)
        assert torch.equal(found.indices, wanted.indices) and torch.equal(found.scores, wanted.scores)


def test_decoding_from_pages_in_a_cuda_graph() -> None:
    _, pool, table = cached(2, 40)
    q_index, weights = codec.quantise(torch.randn(2, 1, 8, 128, device="cuda")), torch.randn(2, 1, 8, device="cuda")
    q, k, v = (torch.randn(2, size, heads, 64, device="cuda", dtype=torch.bfloat16) for size, heads in ((1, 8), (2560, 2), (2560, 2)))
    start, end = torch.zeros(2, 1, dtype=torch.int32, device="cuda"), torch.full((2, 1), 2000, dtype=torch.int32, device="cuda")

    def step() -> tuple[Tensor, Tensor]:
        selection = skim.select(q_index, pool, weights, 128, start=start, end=end, block_table=table)
        return selection.indices, skim.attend(q, k, v, selection)[0]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for length in (100, 1300, 2560):
        end.fill_(length)
        weights.normal_()
        q.normal_()
        graph.replay()
        for found, wanted in zip(captured, step(), strict=True):
            assert torch.equal(found, wanted)
