"""Exact top-k of index scores that are never written, on NVIDIA GPUs from sm_80 on: plans and launches of kernels.py.

Candidates are found by its Triton kernels, or by others that a `Finder` launches in their place.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import triton
from torch import Tensor

from skim.ops.score.pages import length
from skim.ops.score.triton import PROGRAMS, Tile, operands
from skim.ops.score.weights import head_weights
from skim.ops.select.kernels import candidates_kernel, choose_kernel, exhaustive_kernel, sample_kernel, threshold_kernel

REGISTERS = 80  # of a thread that chooses, at most, so that three programs of eight warps share a processor
BUDGET = 8192  # the candidates of a row lie in the registers of one program
STRATA = 32768  # keys that a row may have to be sampled at
SAMPLE = 4096  # keys that a row is sampled at, at most
CAPACITY = 1024  # candidates that a row may have, at least
ROOM = 1  # tiles of keys by which thresholds may be too low, because they are cut at tiles
FEW_KEYS = 4096  # rows of so many keys or fewer aren't sampled if there is room for all: sampling takes longer than choosing from more
SPLIT = 1024  # keys that a program walks, at least, where a row is split


def sampling(budget: int, S: int, BN: int) -> tuple[int, int, int, int]:
    """How the best `budget` of up to S keys are looked for, with tiles of BN: (strata, keys in one, few, candidates that a row may have).

    A row that sees `few` keys at most isn't sampled: all are candidates. Without strata no row is. `budget` is at most BUDGET.
    """
    strata = max(16, min(SAMPLE, triton.next_power_of_2(S) // 8, triton.next_power_of_2(triton.cdiv(64 * S, budget))))
    while True:
        stride = triton.cdiv(S, strata)
        expected = budget / stride
        wanted = (expected + 5 * math.sqrt(expected) + 4) * 17 / 16  # as in threshold_kernel
        few = math.ceil(stride * wanted)
        likely = stride * (wanted + 5 * math.sqrt(wanted)) + BN * ROOM
        capacity = triton.next_power_of_2(max(CAPACITY, budget, math.ceil(likely)))
        if capacity >= S and (S <= FEW_KEYS or 2 * few >= S):  # of longer ones a sample must spare half
            capacity = max(CAPACITY, triton.next_power_of_2(S))
            return 0, 1, capacity, capacity
        if capacity <= 2 * BUDGET:
            return strata, stride, min(few, capacity - 2), capacity  # the first segment of a row and its last leave gaps
        strata *= 2


class Finder(Protocol):
    """What samples and finds candidates in place of `sample_kernel` and `candidates_kernel`."""

    @property
    def splits(self) -> int:
        """Segments that a row's candidates lie in."""

    @property
    def split(self) -> int:
        """Keys of a segment, at most."""

    def sample(self) -> Tensor:
        """float32 `[rows, strata]`: what rows score the keys that they are sampled at."""

    def find(self, points: Tensor, positions: Tensor, entries: Tensor, counts: Tensor, maxima: Tensor, sums: Tensor, segment: int) -> None:
        """Finds the candidates. Nothing is in points and positions where no row is sampled."""


def selection(B: int, T: int, budget: int, with_scores: bool, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Memory for what `select` returns."""
    indices = torch.empty(B, T, budget, dtype=torch.int32, device=device)
    counts = torch.empty(B, T, dtype=torch.int32, device=device)
    chosen = torch.empty((B, T, budget) if with_scores else (0,), dtype=torch.float32, device=device)
    return indices, counts, chosen, torch.empty((B, T) if with_scores else (0,), dtype=torch.float32, device=device)


def segment_of(capacity: int, split: int, BN: int) -> int:
    """Candidates that a segment has room for: of `split` keys, with a tile and a pair more; a multiple of 16, so that pairs are aligned."""
    return min(capacity, split) + BN + 16


@dataclass(frozen=True)
class Prepared:
    """What scores are made of, as kernels read it.

    Attributes:
        inputs: queries, weights, keys, their scales and block table.
        strides: of queries, keys and scales.
        sizes: B, T, S, J, E.
    """

    inputs: tuple[Tensor, ...]
    strides: tuple[int, ...]
    sizes: tuple[int, int, int, int, int]
    tile: Tile
    constants: dict[str, int | bool]

    @classmethod
    def of(cls, q: Tensor, k: Tensor, weights: Tensor, q_scale: Tensor | None, k_scale: Tensor | None, block_table: Tensor | None = None) -> Prepared:
        (B, T, J, E), S = q.shape, length(k, block_table)
        w = head_weights(weights, q_scale, E).contiguous()
        q, keys = operands(q, k, k_scale, block_table)
        tile = Tile.of(q)
        constants: dict[str, int | bool] = {**keys.constants, "PADDED": J % tile.BJ != 0, "LOADED": False}
        return cls((q, w, *keys.pointers), (*q.stride()[:3], *keys.strides), (B, T, S, J, q.shape[3]), tile, constants)

    def rows(self, rows: slice) -> Prepared:
        """The same of some queries, of one row of the batch."""
        (q, w, *keys), (_, _, *others) = self.inputs, self.sizes
        return replace(self, inputs=(q[:, rows], w[:, rows], *keys), sizes=(1, rows.stop - rows.start, *others))


def select_many(
    prepared: Prepared,
    start: Tensor,
    end: Tensor,
    budget: int,
    keep_first: int,
    keep_recent: int,
    with_scores: bool,
    workspace_mb: int,
    finder: Finder | None = None,
    out: tuple[Tensor, ...] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `select`, where scores are never written.

    Args:
        prepared, start, end: what is scored, and the keys that each query may select from.
        finder: finds the candidates of all queries at once, whose memory the caller has seen to. Rows that are done again are scored by
            Triton: their best may differ from those by the finder's scores where these are within rounding.
        out: contiguous, where to write what is returned.
    """
    inputs, strides, tile, constants, (B, T, S, J, E) = prepared.inputs, prepared.strides, prepared.tile, prepared.constants, prepared.sizes
    device, rows = start.device, B * T
    start, end = start.contiguous(), end.contiguous()
    indices, counts, chosen, lse = out or selection(B, T, budget, with_scores, device)
    if S == 0:
        return indices.fill_(-1), counts.zero_(), chosen.fill_(-torch.inf), lse.fill_(-torch.inf)
    if rows == 0:
        return indices, counts, chosen, lse

    strata, stride, few, capacity = sampling(min(budget, S), S, tile.BN)
    BN, BQ = tile.BN, tile.BQ
    row_tiles = triton.cdiv(T, BQ)
    tiles = B * row_tiles
    if finder is None:
        splits = min(max(1, 2 * PROGRAMS // tiles), triton.cdiv(S, SPLIT))  # no more than fill the card in whole waves
        split = triton.cdiv(triton.cdiv(S, splits), BN) * BN
        splits = triton.cdiv(S, split)
    else:
        splits, split = finder.splits, finder.split
    segment = segment_of(capacity, split, BN)
    # One piece of memory holds the sample of a chunk of rows, then their candidates, then all scores of those that are done again.
    per_row = max(8 * splits * segment, 4 * strata)
    step = max(1, (workspace_mb << 20) // (BQ * (per_row + 16 * splits)))
    step = tiles if finder is not None else min(tiles, step // PROGRAMS * PROGRAMS or step)  # whole waves of programs
    held = min(rows, step * BQ)
    again, scratch = min(PROGRAMS, tiles), 0
    if strata and not constants["LOADED"]:
        room = (workspace_mb << 20) - (4 * strata * held if finder is not None else 0)  # whose sample has memory of its own
        again = max(1, min(again, room // (4 * BQ * S)))
        scratch = again * 4 * BQ * S
    memory = torch.empty(triton.cdiv(max(held * per_row, scratch), 8), dtype=torch.int64, device=device)
    points = torch.empty(held, dtype=torch.float32, device=device)
    positions, flags = (torch.empty(held, dtype=torch.int32, device=device) for _ in range(2))
    found = torch.empty(held, splits, dtype=torch.int32, device=device)
    maxima, sums = (torch.empty((held, splits) if with_scores else (0,), dtype=torch.float32, device=device) for _ in range(2))

    keep = keep_first, keep_recent
    shapes = {**tile.constants, **constants, "STAGES": tile.stages, "num_warps": tile.WARPS, "enable_fp_fusion": True}
    for tile0 in range(0, tiles, step):
        number = min(step, tiles - tile0)
        row0, last = (n // row_tiles * T + n % row_tiles * BQ for n in (tile0, tile0 + number))
        here = min(last, rows) - row0
        place = tile0, row0, T, S, J, E
        if strata:
            if finder is not None:
                sample = finder.sample()
            else:
                sample = memory.view(torch.float32)
                shares = min(max(1, PROGRAMS // number), triton.cdiv(strata, BN))
                share = triton.cdiv(triton.cdiv(strata, shares), BN) * BN
                sample_kernel[(number, triton.cdiv(strata, share))](
                    *inputs, start, end, sample, *strides, *place, few, stride, share, **shapes, BM=strata
                )
            threshold_kernel[(here,)](
                sample, start, end, points, positions, row0, S, budget, *keep, few, stride,
                BM=strata, KEEP=sum(keep) > 0, num_warps=min(16, max(1, strata // 1024)),
            )  # fmt: skip
        if finder is not None:
            finder.find(points, positions, memory, found, maxima, sums, segment)
        else:
            candidates_kernel[(number, splits)](
                *inputs, start, end, points, positions, memory, found, maxima, sums, *strides, *place, budget, *keep, split, segment,
                **shapes, SAMPLED=strata > 0, ROW_WARPS=min(tile.WARPS, tile.BN // 16), KEEP=sum(keep) > 0, WITH_SCORES=with_scores,
            )  # fmt: skip
        choosing = min(16, max(1, capacity // (1024 if here > PROGRAMS else 512)))
        choose_kernel[(here,)](
            memory, found, maxima, sums, start, end, indices, counts, chosen, lse, flags, row0, S, budget, *keep, splits, segment,
            capacity, BC=max(capacity, 128 * choosing), W=choosing, KEEP=sum(keep) > 0, WITH_SCORES=with_scores,
            num_warps=choosing, maxnreg=REGISTERS if choosing < 16 else 128,  # sixteen warps leave no room for a second program
        )  # fmt: skip
        if strata:
            exhaustive_kernel[(again,)](
                *inputs, start, end, flags, memory.view(torch.float32), indices, chosen, *strides, tile0, row0, number, T, S, J, E, budget, *keep,
                **shapes, WITH_SCORES=with_scores, BS=1024,
            )  # fmt: skip
    return indices, counts, chosen, lse
