"""Exact top-k of FP8 index scores on sm_90: `select` of Triton, whose candidates a Gluon kernel finds.

With many heads that kernel makes scores so much faster that copying keys together costs less, where they lie in pages or in packed rows.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from skim.ops.dispatch import implementation, processors
from skim.ops.score import hopper as score
from skim.ops.score.pages import in_one_piece, length
from skim.ops.score.triton import Tile
from skim.ops.select.candidates import Prepared, sampling, segment_of, select_many, selection
from skim.ops.select.hopper_candidates import KEYS, PARTS, Candidates
from skim.ops.select.kernels import sampled_key

ROWS = 264  # queries, at least
WORK = 4096  # channels of all heads, at least: of fewer Triton makes scores as fast
CHUNKS = 16  # that the keys are parted into, at most: the best of a row are chosen from several segments of each


def refusal(function: str, args: tuple[Any, ...]) -> str | None:
    """Why this implementation can't run this call, or None."""
    if function != "select":
        return "hopper selects by scores that it makes"
    q, k, budget, workspace_mb, block_table = args[0], args[1], args[7], args[11], args[12]
    (T, J, E), S = q.shape[1:], length(k, block_table)
    if T < ROWS:
        return f"it takes {ROWS} queries at a time, at least, got {T}"
    together = torch.empty(len(q), S, k.shape[2], dtype=k.dtype, device="meta")
    portable = implementation("select", "triton", q.device)
    reason = score.refusal("index_scores", (q, together, *args[2:7], workspace_mb, None)) or portable.refusal(function, args)
    if reason is None and J * E < WORK:
        reason = f"it selects by {WORK} channels of all heads at least, got {J} heads of {E}"
    if reason is None:
        tile = Tile.of(q)
        strata, _, _, capacity = _sampling(tile, S, budget)
        if _fitting(strata, capacity, tile, S, workspace_mb, _sizes(S)[0]) < ROWS:
            reason = f"it takes {ROWS} queries at a time, at least, and {workspace_mb} MiB have no room for their candidates among {S} keys"
    return reason


def _sizes(S: int) -> list[int]:
    """How many keys a task may have, most first."""
    return sorted({triton.cdiv(triton.cdiv(max(S, 1), n), KEYS.value) * KEYS.value for n in range(1, CHUNKS + 1)}, reverse=True)


def _sampling(tile: Tile, S: int, budget: int) -> tuple[int, int, int, int]:
    """As `sampling`, of no keys too."""
    return sampling(min(budget, max(S, 1)), max(S, 1), tile.BN)


def _fitting(strata: int, capacity: int, tile: Tile, S: int, workspace_mb: int, size: int) -> int:
    """How many queries the workspace has room for, where tasks have `size` keys."""
    segment = segment_of(capacity, size // PARTS.value, tile.BN)
    return (workspace_mb << 20) // (triton.cdiv(max(S, 1), size) * PARTS.value * (8 * segment + 16) + 4 * strata)


def _keys(k: Tensor, k_scale: Tensor, block_table: Tensor | None, b: int) -> tuple[Tensor, Tensor]:
    """Keys `[1, S, E]` of one row of the batch, one behind the other from a multiple of 16 bytes on, and their scales `[1, S]`."""
    here = slice(b, b + 1)
    k, scale = in_one_piece(k, k_scale, block_table[here]) if block_table is not None else (k[here], k_scale[here])
    assert scale is not None
    return k if k.is_contiguous() and k.data_ptr() % 16 == 0 else k.clone(memory_format=torch.contiguous_format), scale.float()


@triton.jit(do_not_specialize=["stride", "strata"])
def sampled_kernel(K, SCALE, START, END, SAMPLED, SAMPLED_SCALE, FIRST, LAST, stride_s, T, S, stride, strata, E: tl.constexpr, BN: tl.constexpr):
    """Sampled keys of one batch row, bytes `[strata, E]`, and their scales; of `[T]` queries that see start to end - 1, which of them each sees.

    Grid: enough for blocks of BN keys and of BN queries.
    """
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    key = tl.minimum(sampled_key(n, stride), S - 1)
    channel = tl.arange(0, E)[None, :]
    here = n < strata
    tl.store(SAMPLED + (n * E)[:, None] + channel, tl.load(K + (key.to(tl.int64) * E)[:, None] + channel, mask=here[:, None]), mask=here[:, None])
    tl.store(SAMPLED_SCALE + n, tl.load(SCALE + key.to(tl.int64) * stride_s, mask=here), mask=here)
    start, end = tl.load(START + n, mask=n < T, other=0), tl.load(END + n, mask=n < T, other=0)
    start, end = tl.minimum(tl.maximum(start, 0), S), tl.minimum(tl.maximum(end, 0), S)
    # One key of each stratum is sampled, and keys ascend with the strata.
    tl.store(FIRST + n, start // stride + (sampled_key(start // stride, stride) < start), mask=n < T)
    tl.store(LAST + n, end // stride + (sampled_key(end // stride, stride) < end), mask=n < T)


def _sample(k: Tensor, k_scale: Tensor, start: Tensor, end: Tensor, strata: int, stride: int) -> tuple[Tensor, ...]:
    """Sampled keys `[1, strata, E]` of k `[1, S, E]`, their scales, and which of them queries that see start to end - 1 `[1, T]` see."""
    (_, S, E), T = k.shape, start.shape[1]
    if strata == 0:
        return ()
    keys, scale = k.new_empty(1, strata, E), k_scale.new_empty(1, strata)
    first, last = torch.empty_like(start), torch.empty_like(end)
    sampled_kernel[(triton.cdiv(max(strata, T), 64),)](
        k.view(torch.uint8), k_scale, start, end, keys.view(torch.uint8), scale, first, last, k_scale.stride(1), T, S, stride, strata, E=E, BN=64
    )
    return keys, scale, first, last


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
    (B, T, J, _), S = q.shape, length(k, block_table)
    q, weights, q_scale = q.contiguous(), weights.float().contiguous(), q_scale.float().contiguous()
    start, end = start.contiguous(), end.contiguous()
    found = selection(B, T, budget, with_scores, q.device)
    queries, programs, sizes = score.queries_of(J), processors(q.device), _sizes(S)
    options = budget, keep_first, keep_recent, with_scores
    for b in range(B):
        row = slice(b, b + 1)
        keys, scale = _keys(k, k_scale, block_table, b)
        whole = Prepared.of(q[row], keys, weights[row], q_scale[row], scale)
        strata, stride, _, capacity = _sampling(whole.tile, S, budget)
        sampled = _sample(keys, scale, start[row], end[row], strata, stride)
        fitting = partial(_fitting, strata, capacity, whole.tile, S, workspace_mb)
        step, wave = fitting(sizes[0]), programs * queries
        step = step // wave * wave or step  # whole waves of programs
        for origin in range(0, T, step):
            rows = slice(origin, min(origin + step, T))
            number = rows.stop - origin
            tiles = triton.cdiv(number, queries)
            # What a program scores, about, and rounds of tasks in which it is idle.
            work = {size: triton.cdiv(tiles * triton.cdiv(S, size), programs) * (size + score.BEGINNING) for size in sizes}
            size = min((size for size in sizes if size == sizes[0] or fitting(size) >= number), key=work.__getitem__)
            here = *sampled[:2], *(x[:, rows] for x in sampled[2:])
            inputs = q[b, rows], weights[b, rows], q_scale[b, rows], keys[0], scale[0], start[b, rows], end[b, rows], here
            finder = Candidates(*inputs, *options, size, programs)
            out = tuple(x[row, rows] if x.numel() else x for x in found)
            select_many(whole.rows(rows), start[row, rows], end[row, rows], *options, workspace_mb, finder, out)
    return found
