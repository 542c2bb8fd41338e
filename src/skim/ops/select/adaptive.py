"""The adaptive budget: of a top-k, the fewest keys that hold a given share of the softmax over all visible keys."""

import torch
from torch import Tensor

from skim.ops.workspace import chunks

WHOLE = 2**52  # shares are added as integers: one sum in whatever order, so one selection for any batch and chunk
BYTES = 80  # of scratch for a selected key
NONE = torch.iinfo(torch.int32).max


def narrow(
    selected: tuple[Tensor, Tensor, Tensor, Tensor],
    start: Tensor,
    end: Tensor,
    mass: float,
    min_budget: int,
    keep: tuple[int, int],
    workspace_mb: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A selection with scores, that is indices `[B, T, K]`, counts, scores and lse, and the same with fewer keys.

    `keep` is how many of the first and of the last visible keys are always kept. They come first, then the others by
    score, among equals the most recent. A row keeps the shortest beginning of this order that holds `mass`, all that is
    always kept, and `min_budget` keys. Where the shares are no numbers (a visible score is NaN or infinite) it keeps all
    K. Nothing waits for the host.
    """
    indices, _, scores, lse, start, end = (x.flatten(0, 1) for x in (*selected, start, end))
    results = [torch.empty_like(x) for x in selected[:3]]
    for rows in chunks(indices.shape[0], BYTES * indices.shape[1], workspace_mb):
        always = (indices[rows] < start[rows, None] + keep[0]) | (indices[rows] >= end[rows, None] - keep[1])
        part = _narrowed(indices[rows], scores[rows], lse[rows], always, round(mass * WHOLE), min_budget)
        for result, values in zip(results, part):
            result.flatten(0, 1)[rows] = values
    return results[0], results[1], results[2], selected[3]


def _narrowed(indices: Tensor, scores: Tensor, lse: Tensor, always: Tensor, wanted: int, min_budget: int) -> tuple[Tensor, Tensor, Tensor]:
    """indices `[n, K]`, counts `[n]` and scores `[n, K]` of rows that are to hold `wanted` / WHOLE."""
    indices, scores, always = indices.flip(1), scores.flip(1), always.flip(1)  # a stable sort then puts the most recent of equals first
    # Infinite scores become the largest finite ones: between NaN or padding and what is kept anyway. -0.0 becomes +0.0.
    ranked = scores.nan_to_num(nan=-torch.inf).add_(0.0).masked_fill_(always, torch.inf).masked_fill_(indices < 0, -torch.inf)
    ranked, order = ranked.sort(dim=1, descending=True, stable=True)
    indices, scores = indices.gather(1, order), scores.gather(1, order)
    share = ((scores - lse[:, None]).exp().nan_to_num(nan=0.0) * WHOLE).to(torch.int64)
    before = share.cumsum(1) - share
    place = torch.arange(indices.shape[1], device=indices.device)
    kept = ((before < wanted) | (place < min_budget) | (ranked == torch.inf)) & (indices >= 0)
    indices, order = indices.masked_fill(~kept, NONE).sort(dim=1)
    padding = indices == NONE
    return indices.masked_fill(padding, -1), kept.sum(1, dtype=torch.int32), scores.gather(1, order).masked_fill(padding, -torch.inf)
