"""Exact top-k of FP8 index scores on sm_90: scores of some queries to memory by the Gluon kernel, then the best of each row.

With many heads this kernel makes scores so much faster than `select` in Triton does, between finding candidates, that writing and
reading them costs less. So does copying keys together that lie in pages or in packed rows.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from skim.ops.dispatch import implementation
from skim.ops.score import hopper as score
from skim.ops.score.pages import in_one_piece, length
from skim.ops.select.lse import add_exponentials, finite, maximum_and_sum
from skim.ops.workspace import chunks

ROWS = 264  # queries at least, and a multiple of which are a chunk: whole waves of programs
WORK = 4096  # channels of all heads, at least: of fewer the scores' way through memory would take longer than making them
BUDGET, KEYS = 8192, 1 << 19  # at most, for the top-k
BLOCK = 4096  # scores that a program sums at once


def refusal(function: str, args: tuple[Any, ...]) -> str | None:
    """Why this implementation can't run this call, or None."""
    if function != "select":
        return "hopper selects by scores that it makes"
    q, k, budget, workspace_mb, block_table = args[0], args[1], args[7], args[11], args[12]
    (T, J, E), S = q.shape[1:], length(k, block_table)
    if min(T, (_for_scores(workspace_mb) << 20) // max(1, 4 * S)) < ROWS:
        return f"it takes {ROWS} queries at a time, at least, got {T} with {S} keys each and {workspace_mb} MiB"
    together = torch.empty(len(q), S, k.shape[2], dtype=k.dtype, device="meta")
    reason = score.refusal("index_scores", (q, together, *args[2:7], workspace_mb, None))
    if reason is None and J * E < WORK:
        reason = f"it selects by {WORK} channels of all heads at least, got {J} heads of {E}"
    if reason is None and (min(budget, S) > BUDGET or S > KEYS):
        reason = f"it selects up to {BUDGET} of {KEYS} keys, got a budget of {budget} and {S} keys"
    return reason


def _for_scores(workspace_mb: int) -> int:
    """MiB of the workspace that hold scores; the rest holds candidates."""
    return max(1, workspace_mb * 2 // 3)


def _keys(k: Tensor, k_scale: Tensor, block_table: Tensor | None, b: int) -> tuple[Tensor, Tensor]:
    """Keys `[1, S, E]` of one row of the batch, one behind the other from a multiple of 16 bytes on, and their scales `[1, S]`."""
    here = slice(b, b + 1)
    k, scale = in_one_piece(k, k_scale, block_table[here]) if block_table is not None else (k[here], k_scale[here])
    assert scale is not None
    return k if k.is_contiguous() and k.data_ptr() % 16 == 0 else k.clone(memory_format=torch.contiguous_format), scale


@triton.jit
def lse_kernel(SCORES, START, END, LSE, S, BLOCK: tl.constexpr):
    """Log-sum-exp of a row's scores from start to end. Grid: rows."""
    row = tl.program_id(0)
    SCORES += row.to(tl.int64) * S
    start, end = tl.maximum(tl.load(START + row), 0), tl.minimum(tl.load(END + row), S)
    largest, sums = tl.full([BLOCK], float("-inf"), tl.float32), tl.zeros([BLOCK], tl.float32)
    for origin in range(start // BLOCK * BLOCK, end, BLOCK):
        key = origin + tl.arange(0, BLOCK)
        scores = tl.load(SCORES + key, mask=(key >= start) & (key < end), other=float("-inf"))
        largest, sums = add_exponentials(largest, sums, scores)
    maximum, total = maximum_and_sum(largest, sums)
    tl.store(LSE + row, finite(maximum) + tl.log(total))


def _choose(
    scores: Tensor, start: Tensor, end: Tensor, budget: int, keep_first: int, keep_recent: int, workspace_mb: int, out: tuple[Tensor, Tensor]
) -> None:
    """indices `[n, K]` and counts `[n]`, in `out`, of rows of scores `[n, S]`, of which they see start to end - 1 `[n]`."""
    top_k = implementation("select", "triton", scores.device).top_k
    between = budget - keep_first - keep_recent
    if between == budget:
        top_k(scores, start, end, budget, workspace_mb, out)
        return
    slot = torch.arange(budget, dtype=torch.int32, device=scores.device)
    seen = (end - start).clamp(min=0)
    counts = seen.clamp(max=budget)
    first, last = start[:, None] + slot, end[:, None] - budget + slot
    indices = torch.where(slot < keep_first, first, last)
    if between:
        indices[:, keep_first : budget - keep_recent], _ = top_k(scores, start + keep_first, end - keep_recent, between, workspace_mb)
    everything = torch.where(slot < counts[:, None], first, -1)
    out[0].copy_(torch.where((seen > budget)[:, None], indices, everything))
    out[1].copy_(counts)


def select(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
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
    start, end = start.clamp(min=0), end.clamp(max=S)
    indices = torch.empty(B, T, budget, dtype=torch.int32, device=q.device)
    counts = torch.empty(B, T, dtype=torch.int32, device=q.device)
    chosen = torch.empty((B, T, budget) if with_scores else (0,), dtype=torch.float32, device=q.device)
    lse = torch.empty((B, T) if with_scores else (0,), dtype=torch.float32, device=q.device)
    if S == 0:
        return indices.fill_(-1), counts.zero_(), chosen.fill_(-torch.inf), lse.fill_(-torch.inf)
    memory = _for_scores(workspace_mb)
    rest = max(1, workspace_mb - memory)

    def work(b: int, rows: slice, k: Tensor, k_scale: Tensor) -> None:
        # A function, so that the scores of one chunk are gone before those of the next are there.
        here = slice(b, b + 1)
        interval = start[here, rows], end[here, rows]
        scores = score.index_scores(q[here, rows], k, weights[here, rows], q_scale[here, rows], k_scale, *interval, memory)[0]
        low, high = (x[0].contiguous() for x in interval)
        _choose(scores, low, high, budget, keep_first, keep_recent, rest, (indices[b, rows], counts[b, rows]))
        if with_scores:
            found = indices[b, rows]
            chosen[b, rows] = scores.gather(1, found.clamp(min=0).long()).masked_fill_(found < 0, -torch.inf)
            lse_kernel[(scores.shape[0],)](scores, low, high, lse[b, rows], S, BLOCK=BLOCK, num_warps=8)

    for b in range(B):
        keys = _keys(k, k_scale, block_table, b)
        for rows in chunks(T, 4 * S, memory, ROWS):
            work(b, rows, *keys)
    return indices, counts, chosen, lse
