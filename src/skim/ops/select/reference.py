"""Exact top-k of index scores in plain PyTorch, a chunk of queries at a time."""

from typing import Optional

import torch
from torch import Tensor

from skim.ops.score.pages import in_one_piece
from skim.ops.score.reference import TiledKeys, bounds, bytes_per_row, queries_per_tile, score_rows, visible_mask
from skim.ops.score.weights import head_weights
from skim.ops.workspace import accumulator, chunks
from skim.selection import Selection


def top(scores: Tensor, start: Tensor, end: Tensor, budget: int, keep_first: int, keep_recent: int, low: int) -> Tensor:
    """Which keys of scores `[n, s]` (of the keys low, low + 1, ...) rows that see `start` to `end - 1` `[n]` keep: bool.

    Order: score descending, position descending. The value of the k-th score is unique even where its position is not,
    so everything above it is kept, and of those equal to it the most recent.
    """
    seen = visible_mask(start, end, low, low + scores.shape[1])
    size = (end - start).clamp(min=0)
    ranked = scores.nan_to_num(nan=-torch.inf)  # infinite scores become the largest finite ones: between NaN and what is kept anyway
    if keep_first or keep_recent:
        position = torch.arange(low, low + scores.shape[1], dtype=start.dtype, device=start.device)
        ranked.masked_fill_((position < start[:, None] + keep_first) | (position >= end[:, None] - keep_recent), torch.inf)
    ranked.masked_fill_(~seen, -torch.inf)
    threshold = ranked.topk(min(budget, ranked.shape[1]), sorted=True).values[:, -1:]
    above = ranked > threshold
    equal = (ranked == threshold) & seen
    wanted = size.clamp(max=budget)[:, None] - above.sum(1, keepdim=True)
    if bool((equal.sum(1, keepdim=True) > wanted).any()):  # a tie at the threshold
        equal &= equal.flip(1).cumsum(1, dtype=torch.int32).flip(1) <= wanted
    return above.logical_or_(equal)


def top_k(scores: Tensor, start: Tensor, end: Tensor, budget: int, workspace_mb: int) -> tuple[Tensor, Tensor]:
    """indices int32 `[n, budget]`, ascending with -1 behind, and counts `[n]`, of what `top` keeps of float32 scores `[n, S]`."""
    chosen = Selection.from_mask(top(scores, start, end, budget, 0, 0, 0), budget)
    return chosen.indices, chosen.counts


def select(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    q_scale: Optional[Tensor],
    k_scale: Optional[Tensor],
    start: Tensor,
    end: Tensor,
    budget: int,
    keep_first: int,
    keep_recent: int,
    with_scores: bool,
    workspace_mb: int,
    block_table: Optional[Tensor] = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """indices `[B, T, K]`, counts `[B, T]`, and with `with_scores` their scores `[B, T, K]` and the lse `[B, T]`."""
    B, T, _, E = q.shape
    k, k_scale = in_one_piece(k, k_scale, block_table)
    S, dtype = k.shape[1], accumulator(q.dtype)
    w = head_weights(weights, q_scale, E)
    indices = torch.full((B, T, budget), -1, dtype=torch.int32, device=q.device)
    counts = torch.zeros(B, T, dtype=torch.int32, device=q.device)
    chosen = torch.full((B, T, budget) if with_scores else (0,), -torch.inf, dtype=dtype, device=q.device)
    lse = torch.full((B, T) if with_scores else (0,), -torch.inf, dtype=dtype, device=q.device)
    for b in range(B):
        keys = TiledKeys(k[b], None if k_scale is None else k_scale[b])
        # Beside the scores a row holds its ranked copy and some masks: about twelve more bytes a key.
        for rows in chunks(T, bytes_per_row(q, S) + 12 * S, workspace_mb, queries_per_tile(q.device)):
            first, last = start[b, rows].clamp(min=0), end[b, rows].clamp(max=S)
            low, high = bounds(first, last, S)
            if low == high:
                continue
            if not with_scores and bool((last - first <= budget).all()):
                mask = visible_mask(first, last, low, high)
            else:
                scores = score_rows(q[b, rows], keys, w[b, rows], low, high)
                mask = top(scores, first, last, budget, keep_first, keep_recent, low)
            part = Selection.from_mask(mask, budget)
            indices[b, rows] = torch.where(part.indices >= 0, part.indices + low, -1)
            counts[b, rows] = part.counts
            if with_scores:
                found = scores.gather(1, part.indices.clamp(min=0).long())
                chosen[b, rows] = found.masked_fill_(part.indices < 0, -torch.inf)
                # In float64, so that rounding hides in which order a chunk adds.
                lse[b, rows] = scores.masked_fill_(~visible_mask(first, last, low, high), -torch.inf).double().logsumexp(1).to(dtype)
    return indices, counts, chosen, lse
