"""Exact top-k of index scores on NVIDIA GPUs from sm_80 on: plans and launches of rows.py, beside those of candidates.py.

The scores of many queries never reach memory. Those of few, as in decoding, are written, once, and sampled where they lie: steps that
wait for each other are what takes time there, and so there is one less. Each of many programs finds the candidates in a part of a row.
"""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from skim.ops.score import triton as score
from skim.ops.score.pages import length
from skim.ops.score.triton import PROGRAMS, Tile
from skim.ops.select.candidates import BUDGET, REGISTERS, STRATA, Prepared, sampling, select_many
from skim.ops.select.rows import PIECE, choose_parts_kernel, part_candidates_kernel, top_k_kernel

ROW_SAMPLE = 2048  # keys that a row of scores in memory is sampled at, at least
ROW_CAPACITY = 8192  # candidates that it may have, at most
ROW_WARPS = 8  # of the program of a row
FEW = 64  # rows, at most, whose scores go by way of memory, so that many programs share in choosing of each
PART = 4096  # keys of such a row that a program reads at once
PART_WARPS = 16, 32  # of the programs that find candidates, and of those that choose from them


def refusal(function: str, args: tuple) -> str | None:
    """Why these kernels can't run this call, or None."""
    if function == "top_k":
        scores, budget = args[0], args[3]
        keys = scores.shape[1]
        reason = None if scores.dtype == torch.float32 else f"Triton kernels select from float32 scores, not from {scores.dtype}"
    else:
        keys, budget = length(args[1], args[12]), args[7]
        reason = score.refusal(function, args)
    if reason is None and min(budget, keys) > BUDGET:
        reason = f"Triton kernels select up to {BUDGET} keys, got a budget of {budget}"
    # A tile of `_top_k_in_parts` is 2048 keys.
    if reason is None and sampling(min(budget, max(keys, 1)), max(keys, 1), 2048 if function == "top_k" else 128)[0] > STRATA:
        reason = f"Triton kernels sample up to {STRATA} keys of a row, and {keys} keys with a budget of {budget} need more"
    return reason


def select(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    q_scale: Tensor | None,
    k_scale: Tensor | None,
    start: Tensor,
    end: Tensor,
    budget: int,
    keep_first: int,
    keep_recent: int,
    with_scores: bool,
    workspace_mb: int,
    block_table: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """indices `[B, T, K]`, counts `[B, T]`, and with `with_scores` their scores `[B, T, K]` and the lse `[B, T]`."""
    (B, T), S = q.shape[:2], length(k, block_table)
    if _few(B * T, S, budget, workspace_mb):
        scores = score.index_scores(q, k, weights, q_scale, k_scale, start, end, workspace_mb, block_table)
        found = _select_few(scores.flatten(0, 1), start.flatten(), end.flatten(), budget, keep_first, keep_recent, with_scores)
        indices, counts, chosen, lse = (x.unflatten(0, (B, T)) if x.numel() else x for x in found)
        return indices, counts, chosen, lse
    prepared = Prepared.of(q, k, weights, q_scale, k_scale, block_table)
    return select_many(prepared, start, end, budget, keep_first, keep_recent, with_scores, workspace_mb)


def top_k(scores: Tensor, start: Tensor, end: Tensor, budget: int, workspace_mb: int = 512) -> tuple[Tensor, Tensor]:
    """The `budget` best of scores that are there already, in the order of `select`.

    Args:
        scores: float32 `[rows, S]`.
        start, end: int32 `[rows]`: the keys that a row may choose from.

    Returns:
        indices int32 `[rows, K]`, ascending with -1 behind, and counts int32 `[rows]`.
    """
    rows, S = scores.shape
    if _few(rows, S, budget, workspace_mb):
        indices, counts, _, _ = _select_few(scores, start, end, budget, 0, 0, False)
        return indices, counts
    samples, capacity = row_sampling(min(budget, S), S)
    if rows < PROGRAMS or capacity > ROW_CAPACITY:
        return _top_k_in_parts(scores, start, end, budget, workspace_mb)
    start, end = start.contiguous(), end.contiguous()
    indices, counts = scores.new_empty(rows, budget, dtype=torch.int32), scores.new_empty(rows, dtype=torch.int32)
    part = triton.cdiv(triton.cdiv(S, ROW_WARPS) + 512, 512) * 512
    segment = min(capacity, part) + 512 + 16 if samples else 16  # as in `select_many`
    places = min(rows, max(1, (workspace_mb << 20) // (ROW_WARPS * (8 * segment + 4) + 4)))  # rows take turns in them
    entries = torch.empty(places * ROW_WARPS * segment, dtype=torch.int64, device=scores.device)
    found = torch.empty(places * ROW_WARPS, dtype=torch.int32, device=scores.device)
    locks = torch.zeros(places, dtype=torch.int32, device=scores.device)
    top_k_kernel[(rows,)](
        scores, start, end, entries, found, locks, indices, counts, scores.stride(0), S, budget, triton.cdiv(S, max(samples, 1)), places, segment,
        BM=samples, BC=capacity, W=ROW_WARPS, SAMPLED=samples > 0, num_warps=ROW_WARPS, maxnreg=REGISTERS,
    )  # fmt: skip
    return indices, counts


def row_sampling(budget: int, S: int) -> tuple[int, int]:
    """(keys sampled, candidates that a row may have) for the best `budget` of S scores in memory; none are sampled if all may be candidates."""
    least = 256 * ROW_WARPS
    if S <= ROW_CAPACITY:
        return 0, max(least, triton.next_power_of_2(S))
    samples = ROW_SAMPLE
    while True:
        expected = budget * samples / S
        wanted = (expected + 4 * math.sqrt(PIECE.value * expected) + 4) * 17 / 16  # as in threshold_of
        likely = S / samples * (wanted + 4 * math.sqrt(PIECE.value * wanted)) + 512 + ROW_WARPS
        capacity = max(least, triton.next_power_of_2(max(budget, math.ceil(likely))))
        if capacity <= ROW_CAPACITY or samples >= 8192:
            return samples, capacity
        samples *= 2


def _parts(rows: int, S: int) -> tuple[int, int]:
    """(parts of a row of S scores, keys in one) if there are few rows."""
    part = triton.cdiv(triton.cdiv(S, max(1, PROGRAMS // rows)), PART) * PART
    return triton.cdiv(S, part), part


def _few(rows: int, S: int, budget: int, workspace_mb: int) -> bool:
    """Whether scores go by way of memory, so that many programs share in choosing of a row: where few rows are long."""
    if not 0 < rows <= FEW or S <= ROW_CAPACITY:
        return False
    (parts, part), (_, capacity) = _parts(rows, S), row_sampling(min(budget, S), S)
    return capacity <= 2 * BUDGET and rows * (4 * S + 8 * parts * (min(capacity, part) + PART)) <= workspace_mb << 20


def _select_few(
    scores: Tensor, start: Tensor, end: Tensor, budget: int, keep_first: int, keep_recent: int, with_scores: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """indices `[rows, K]`, counts `[rows]`, and with `with_scores` scores `[rows, K]` and the lse `[rows]`, of few rows of scores `[rows, S]`."""
    (rows, S), device = scores.shape, scores.device
    start, end = start.contiguous(), end.contiguous()
    parts, part = _parts(rows, S)
    samples, capacity = row_sampling(min(budget, S), S)
    segment = min(capacity, part) + PART
    values = torch.empty(rows * parts * segment, dtype=torch.float32, device=device)
    keys = torch.empty(rows * parts * segment, dtype=torch.int32, device=device)
    found = torch.empty(rows, parts, dtype=torch.int32, device=device)
    maxima, sums = (torch.empty((rows, parts) if with_scores else (0,), dtype=torch.float32, device=device) for _ in range(2))
    indices = torch.empty(rows, budget, dtype=torch.int32, device=device)
    counts = torch.empty(rows, dtype=torch.int32, device=device)
    chosen = torch.empty((rows, budget) if with_scores else (0,), dtype=torch.float32, device=device)
    lse = torch.empty(rows if with_scores else 0, dtype=torch.float32, device=device)
    finding, choosing = PART_WARPS[0], min(PART_WARPS[1], capacity // 256)
    keep = keep_first, keep_recent
    constants = {"BC": capacity, "KEEP": sum(keep) > 0, "WITH_SCORES": with_scores}
    part_candidates_kernel[(rows, parts)](
        scores, start, end, values, keys, found, maxima, sums, scores.stride(0), S, budget, *keep, triton.cdiv(S, samples), part, segment,
        BM=samples, BN=PART, **constants, num_warps=finding,
    )  # fmt: skip
    choose_parts_kernel[(rows,)](
        scores, start, end, values, keys, found, maxima, sums, indices, counts, chosen, lse, scores.stride(0), S, budget, *keep, parts, segment,
        PARTS=triton.next_power_of_2(parts), **constants, num_warps=choosing,
    )  # fmt: skip
    return indices, counts, chosen, lse


def _top_k_in_parts(scores: Tensor, start: Tensor, end: Tensor, budget: int, workspace_mb: int) -> tuple[Tensor, Tensor]:
    """Rows that are too few for a program each and too many or too short for `_select_few`, or have more candidates than one program holds."""
    rows, S = scores.shape
    tile = Tile(BN=2048, BQ=1, BJ=1, BE=16, HEADS=1, WARPS=4, stages=3)
    constants: dict[str, int | bool] = {"PADDED": False, "SCALED": False, "PAGE": 0, "UNIT": 1, "LOADED": True}
    strides = 0, scores.stride(0), 0, 0, 0, 0, 0
    prepared = Prepared((scores,) * 5, strides, (1, rows, S, 1, 1), tile, constants)
    indices, counts, _, _ = select_many(prepared, start[None], end[None], budget, 0, 0, False, workspace_mb)
    return indices[0], counts[0]
