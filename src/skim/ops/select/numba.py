"""Scores and exact top-k compiled for the CPU, a few queries at a time.

A score is made in one order whatever the number of queries, keys or threads: channels one after the other, each by one
fused multiply-add, then heads as in the reference. Where PyTorch's matrix products add channels in that order too (those
of MKL do, up to 128 channels), scores are bitwise the reference's.
"""

from math import gcd
from typing import Any, Optional

import numpy as np
import torch
from torch import Tensor

from skim.ops.jit import array, exp, in_threads, kernel, largest, scratch
from skim.ops.score.pages import in_one_piece
from skim.ops.score.weights import head_weights

KEYS = 256  # of a tile
PITCH = KEYS + 16  # floats between two channels of a tile: a power of two would send all channels to the same cache lines
CHANNELS = 4  # multiplied at a time
DOTS = 4  # rows of q (a query's head each) that are multiplied at a time
QUERIES = 128  # that share a tile while it is in the caches; a thread holds their scores
INFINITY = np.float32(np.inf)
LOWEST, HIGHEST = np.int32(-(2**31)), np.int32(2**31 - 1)


def refusal(function: str, args: tuple[Any, ...]) -> Optional[str]:
    """Why `function` can't run on `args`, or None."""
    if function == "top_k":
        return "numba has no top-k of scores that are there already"
    return "numba computes in float32 only, the inputs are float64" if torch.float64 in (args[0].dtype, args[1].dtype, args[2].dtype) else None


@kernel()
def _tile(k, first, tile):  # type: ignore[no-untyped-def]
    """The keys of k `[S, E]` from `first` on, channels before keys: tile `[channels, PITCH]`, zeros behind the last key and channel."""
    S, E = k.shape
    count = min(KEYS, S - first)
    if count < KEYS or tile.shape[0] > E:
        tile[:] = 0
    for s in range(count):
        for e in range(E):
            tile[e, s] = k[first + s, e]


@kernel(fastmath={"contract"})
def _multiply(q, row, tile, dots):  # type: ignore[no-untyped-def]
    """DOTS rows of q `[., channels]` from `row` on times a tile: dots `[DOTS, KEYS]`."""
    dots[:] = 0
    d0, d1, d2, d3 = dots[0], dots[1], dots[2], dots[3]
    for e in range(0, q.shape[1], CHANNELS):
        a0, a1, a2, a3 = q[row, e], q[row, e + 1], q[row, e + 2], q[row, e + 3]
        b0, b1, b2, b3 = q[row + 1, e], q[row + 1, e + 1], q[row + 1, e + 2], q[row + 1, e + 3]
        c0, c1, c2, c3 = q[row + 2, e], q[row + 2, e + 1], q[row + 2, e + 2], q[row + 2, e + 3]
        e0, e1, e2, e3 = q[row + 3, e], q[row + 3, e + 1], q[row + 3, e + 2], q[row + 3, e + 3]
        for s in range(KEYS):
            k0, k1, k2, k3 = tile[e, s], tile[e + 1, s], tile[e + 2, s], tile[e + 3, s]
            d0[s] = d0[s] + a0 * k0 + a1 * k1 + a2 * k2 + a3 * k3
            d1[s] = d1[s] + b0 * k0 + b1 * k1 + b2 * k2 + b3 * k3
            d2[s] = d2[s] + c0 * k0 + c1 * k1 + c2 * k2 + c3 * k3
            d3[s] = d3[s] + e0 * k0 + e1 * k1 + e2 * k2 + e3 * k3


@kernel()
def _add_head(dots, w, further, scores):  # type: ignore[no-untyped-def]
    """w * ReLU(dots), added to scores `[KEYS]` if it is a further head. Rounded where the reference rounds; ReLU keeps NaN."""
    if further:
        for s in range(KEYS):
            scores[s] += w * (np.float32(0) if dots[s] <= 0 else dots[s])
    else:
        for s in range(KEYS):
            scores[s] = w * (np.float32(0) if dots[s] <= 0 else dots[s])


@kernel()
def _score(q, w, k, first, last, tile, dots, scores):  # type: ignore[no-untyped-def]
    """Scores `[., n * KEYS]` of keys `first` to `last` of k `[S, E]` for queries with head weights w `[t, J]`, q `[t * J, channels]`."""
    n, J = w.shape
    for origin in range(first, last, KEYS):
        _tile(k, origin, tile)
        part = slice(origin - first, origin - first + KEYS)
        for row in range(0, q.shape[0], DOTS):
            _multiply(q, row, tile, dots)
            for i in range(DOTS):
                t, j = divmod(row + i, J)
                if t < n:
                    _add_head(dots[i], w[t, j], j > 0, scores[t, part])


@kernel()
def _rank(scores, keep_first, keep_recent, ranks):  # type: ignore[no-untyped-def]
    """Integers in the order of the scores: NaN lowest, -0.0 as +0.0, and what is kept anyway highest."""
    for s in range(scores.shape[0]):
        x = np.float32(scores[s] + np.float32(0))
        bits = np.float32(x).view(np.int32)
        ranks[s] = bits ^ ((bits >> 31) & HIGHEST) if x == x else LOWEST
    ranks[:keep_first] = HIGHEST
    ranks[ranks.shape[0] - keep_recent :] = HIGHEST


@kernel()
def _count(ranks, least):  # type: ignore[no-untyped-def]
    """How many ranks are at least `least`."""
    count = np.int32(0)
    for s in range(ranks.shape[0]):
        count = np.int32(count + (ranks[s] >= least))  # numba would make 64 bits of the sum, and vectors half as long
    return count


@kernel()
def _threshold(ranks, budget):  # type: ignore[no-untyped-def]
    """A rank that `budget` of more ranks reach, or if ties forbid it the largest that more do; and how many reach it."""
    least = most = ranks[0]
    for s in range(ranks.shape[0]):
        least, most = min(least, ranks[s]), max(most, ranks[s])
    low, high, reached = np.int64(least), np.int64(most), ranks.shape[0]
    while low < high and reached > budget:
        middle = low + (high - low + 1) // 2
        count = _count(ranks, np.int32(middle))
        if count >= budget:
            low, reached = middle, count
        else:
            high = middle - 1
    return np.int32(low), reached


@kernel()
def _keep(ranks, budget, start, indices):  # type: ignore[no-untyped-def]
    """The best `budget` of more ranks, which are those of the keys from `start` on: ascending indices."""
    threshold, reached = _threshold(ranks, budget)
    surplus = reached - budget  # of those that tie at the threshold, the earliest
    slot = 0
    for s in range(ranks.shape[0]):
        if ranks[s] >= threshold:
            if surplus > 0 and ranks[s] == threshold:
                surplus -= 1
            else:
                indices[slot] = start + s
                slot += 1


@kernel(fastmath={"reassoc"})
def _logsumexp(scores):  # type: ignore[no-untyped-def]
    most = largest(scores)
    shift = most if abs(most) < INFINITY else np.float32(0)
    total = np.float32(0)
    for s in range(scores.shape[0]):
        total += exp(scores[s] - shift)
    if most == INFINITY and total == total:
        return most
    return shift + np.log(total)


@kernel()
def _select(  # type: ignore[no-untyped-def]
    q, w, k, k_scale, start, end, keep_first, keep_recent, tile, dots, scores, ranks, indices, counts, chosen, lse
):
    """Selects for the n queries of start, end `[n]`; chosen and k_scale may have no rows.

    chosen and lse are -inf before.
    """
    n, budget = indices.shape
    with_scores = chosen.shape[0] > 0
    low, high = k.shape[0], 0
    for t in range(n):
        if end[t] - start[t] > (0 if with_scores else budget):  # only then it needs scores
            low, high = min(low, start[t]), max(high, end[t])
    _score(q, w, k, low, high, tile, dots, scores)
    for t in range(n):
        size = max(0, end[t] - start[t])
        counts[t] = min(size, budget)
        row = scores[t, start[t] - low : start[t] - low + size]
        if k_scale.shape[0] > 0 and (with_scores or size > budget):
            for s in range(size):
                row[s] *= k_scale[start[t] + s]
        if size <= budget:
            for s in range(size):
                indices[t, s] = start[t] + s
            indices[t, size:] = -1
        else:
            _rank(row, keep_first, keep_recent, ranks[:size])
            _keep(ranks[:size], budget, start[t], indices[t])
        if with_scores and size > 0:
            for slot in range(counts[t]):
                chosen[t, slot] = row[indices[t, slot] - start[t]]
            lse[t] = _logsumexp(row)


def _padded(x: Tensor, rows: int, channels: int) -> np.ndarray:
    """x `[B, ., C]` in float32, as many zero rows and channels behind as make multiples of `rows` and `channels`."""
    below, behind = -x.shape[1] % rows, -x.shape[2] % channels
    x = x.to(torch.float32)
    return array(torch.nn.functional.pad(x, (0, behind, 0, below)) if below or behind else x.contiguous())


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
    """As the reference: indices `[B, T, K]`, counts `[B, T]`, and with `with_scores` their scores `[B, T, K]` and the lse `[B, T]`."""
    B, T, J, E = q.shape
    k, k_scale = in_one_piece(k, k_scale, block_table)
    S = k.shape[1]
    indices = torch.empty(B, T, budget, dtype=torch.int32, device=q.device)
    counts = torch.empty(B, T, dtype=torch.int32, device=q.device)
    chosen = torch.full((B, T, budget) if with_scores else (0,), -torch.inf, dtype=torch.float32, device=q.device)
    lse = torch.full((B, T) if with_scores else (0,), -torch.inf, dtype=torch.float32, device=q.device)

    start, end = start.clamp(min=0).contiguous(), end.clamp(max=S).contiguous()
    rows, keys = _padded(q.flatten(1, 2), DOTS, CHANNELS), _padded(k, 1, 1)
    scales = np.empty((B, 0), np.float32) if k_scale is None else array(k_scale.to(torch.float32).contiguous())
    of_query = [_padded(head_weights(weights, q_scale, E), 1, 1), array(start), array(end)]
    found = [array(x) for x in (indices, counts)]
    with_them = [array(x) for x in (chosen, lse)]

    together = DOTS // gcd(J, DOTS)  # so many queries have a multiple of DOTS rows
    scored = end - start > (0 if with_scores else budget)  # who keeps all that it sees needs no scores
    width = int(end[scored].max() - start[scored].min()) if bool(scored.any()) else 0
    width = -(-width // KEYS) * KEYS
    fitting = (workspace_mb << 20) // (4 * max(1, width))  # rows of scores, or of ranks
    threads = min(torch.get_num_threads(), max(1, fitting // (together + 1)))
    step = max(together, min(QUERIES, fitting // threads - 1, B * T // threads) // together * together)
    shapes = (rows.shape[2], PITCH), (DOTS, KEYS), (min(step, T), width)
    own = [(*(scratch(*shape) for shape in shapes), scratch(width, dtype=torch.int32)) for _ in range(threads)]

    def part(thread: int, b: int, first: int) -> None:
        some, of_rows = slice(first, first + step), slice(first * J, -(-min(first + step, T) * J // DOTS) * DOTS)
        w, *interval = (x[b, some] for x in of_query)
        wanted = [x[b, some] for x in with_them] if with_scores else [with_them[0].reshape(0, budget), with_them[1]]
        results = *(x[b, some] for x in found), *wanted
        _select(rows[b, of_rows], w, keys[b], scales[b], *interval, keep_first, keep_recent, *own[thread], *results)

    in_threads(part, [(b, first) for first in reversed(range(0, T, step)) for b in range(B)], threads)  # the longest rows first
    return indices, counts, chosen, lse
