"""Indexer alignment as Triton kernels for NVIDIA GPUs from sm_80 on: the loss and, with it, its gradients.

With `g = softmax(I) - p` and `u = g * [q_j . k > 0]`, the gradients are `dq_j = w_j * sum_s u k`, `dk = sum_tj u w_j q_j`, and
that of the weights is `q_j . sum_s u k`: it costs no pass of its own.

A program serves a tile of neighbouring queries and walks the keys that they see twice: once for the log-sum-exp of their
index scores, once for the loss and the gradients. What it walks is the interval of keys that the tile sees (dense) or the
union of its selections, with one bit a query and key (see attend/union.py).

Gradients of the keys are sums over queries. Over a union they are added up in memory. Over intervals that would be every key
once a tile, so a chunk of tiles leaves g in the workspace instead, and programs that own keys sum over its queries, always in
the same order.

Keys are the rows of every tile of scores, and column `head * TILE + query` is one head of one query: so the sums over
heads stay within a thread, and what is one number a query and key lies alike wherever it is used.

The head sum is divided by the number of heads, which is its L1 norm if `lse` is that of the keys aligned over.
A NaN in a key that one query of a tile sees may reach its neighbours; keys that no query sees may hold anything.
"""

from __future__ import annotations

from math import log, log2
from typing import Any, NamedTuple, Optional

import torch
import triton
import triton.language as tl
from torch import Tensor

from skim.ops.attend.triton import attend, attend_dense
from skim.ops.attend.union import tiles_of, unions
from skim.ops.dispatch import capability, interpreted, shared_memory
from skim.ops.workspace import chunks, unscaled

LOG2E = tl.constexpr(1.4426950408889634)
STAGES = tl.constexpr(2)  # of the loops that load keys

PARTS = 8  # sums over queries that are made side by side at most, so that many programs share few keys

LARGEST = 16384  # indexer heads times channels, each a power of two: what a program accumulates of one query

Gradients = tuple[Tensor, Tensor, Tensor, Tensor]


def refusal(function: str, args: tuple[Any, ...]) -> str | None:
    if any(x.dtype == torch.float64 for x in args[:5]):
        return "it computes in float32 at most, and inputs are float64"
    if args[10] is not None:
        return "it does not sum heads over a process group"
    if args[8] is None and args[9] <= 0:
        return "it makes the attention's lse by kernels that take a positive scale, and the scale is not"
    J, E = args[2].shape[2:]
    if triton.next_power_of_2(J) * triton.next_power_of_2(E) > LARGEST:
        return f"an indexer of {J} heads and {E} channels is too large for its tiles"
    return None


@triton.jit
def _block(KEYS, BITS, at, end, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """The keys at positions `at` to `at + BLOCK` of a union: the keys, which of them are real, and who sees them `[BLOCK, TILE]`."""
    slot = at + tl.arange(0, BLOCK)
    real = slot < end
    key = tl.load(KEYS + slot, mask=real, other=0)
    bits = tl.load(BITS + slot, mask=real, other=0)
    sees = ((bits[:, None] >> tl.arange(0, TILE)[None, :]) & 1) != 0
    return key.to(tl.int64), real, sees


@triton.jit
def _index_keys(K_INDEX, key, real, E: tl.constexpr, E_: tl.constexpr):
    """Index keys, zero where they are none: `[BLOCK, E_]`."""
    e = tl.arange(0, E_)
    return tl.load(K_INDEX + key[:, None] * E + e[None, :], mask=real[:, None] & (e[None, :] < E), other=0.0)


@triton.jit
def _head_sum(x, TILE: tl.constexpr):
    """Sum of x `[BLOCK, heads * TILE]` over the heads: `[BLOCK, TILE]`."""
    return tl.sum(tl.reshape(x, [x.shape[0], x.shape[1] // TILE, TILE]), 1)


@triton.jit
def _index_scores(dots, w, TILE: tl.constexpr):
    """Scores `[BLOCK, TILE]` from the products of every head `[BLOCK, J_ * TILE]`; a NaN stays one."""
    return _head_sum(tl.maximum(dots, 0.0, propagate_nan=tl.PropagateNan.ALL) * w[None, :], TILE)


@triton.jit
def _of_heads(dots, g, J_: tl.constexpr):
    """u `[BLOCK, J_ * TILE]` from the products of every head and g `[BLOCK, TILE]`."""
    u = tl.where(tl.reshape(dots, [g.shape[0], J_, g.shape[1]]) > 0, g[:, None, :], 0.0)
    return tl.reshape(u, [g.shape[0], J_ * g.shape[1]])


@triton.jit
def _columns(t, ok, part, H: tl.constexpr, G: tl.constexpr, HEADS: tl.constexpr):
    """Of one part of the heads: its key head, and the query, the query head, and whether there is one, of every column."""
    tile: tl.constexpr = t.shape[0]
    group: tl.constexpr = H // G
    parts: tl.constexpr = (group + HEADS - 1) // HEADS
    columns: tl.constexpr = HEADS * tile
    t = tl.reshape(tl.broadcast_to(t[None, :], [HEADS, tile]), [columns])
    ok = tl.reshape(tl.broadcast_to(ok[None, :], [HEADS, tile]), [columns])
    g = tl.full([], part // parts, tl.int64)
    head = part % parts * HEADS + tl.arange(0, columns) // tile
    return g, t, head + g * group, ok & (head < group)


@triton.jit
def _rows(X, row, ok, c, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Channels from `c` on of rows that begin at `row`, zero where there are none: `[rows, BLOCK_D]`."""
    d = c + tl.arange(0, BLOCK_D)
    return tl.load(X + row[:, None] + d[None, :], mask=ok[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def _target(
    Q, K, LSE, t, ok, key, real, scale, q_t, q_h, k_s, k_g,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Mean over the heads of the attention's softmax, `[BLOCK, TILE]`: HEADS query heads of one key head at a time."""
    tile: tl.constexpr = t.shape[0]
    p = tl.zeros([key.shape[0], tile], tl.float32)
    for part in tl.range(0, G * ((H // G + HEADS - 1) // HEADS), num_stages=STAGES):
        g, query, head, some = _columns(t, ok, part, H, G, HEADS)
        dots = tl.zeros([key.shape[0], HEADS * tile], tl.float32)
        for c in tl.range(0, D, BLOCK_D, num_stages=STAGES):
            k = _rows(K, key * k_s + g * k_g, real, c, D, BLOCK_D)
            q = _rows(Q, query * q_t + head * q_h, some, c, D, BLOCK_D)
            dots = tl.dot(k, tl.trans(q), dots, input_precision="ieee")
        lse = tl.load(LSE + query * H + head, mask=some, other=float("inf"))
        p += _head_sum(tl.exp2(dots * scale - lse[None, :]), tile)
    return p


@triton.jit
def _kept(Q, LSE, t, ok, q_t, q_h, H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, BLOCK_D: tl.constexpr):
    """What `_target` reads of all heads, part by part: queries, block by block, and lse."""
    q, lse = (), ()
    for part in tl.static_range(G * ((H // G + HEADS - 1) // HEADS)):
        g, query, head, some = _columns(t, ok, part, H, G, HEADS)
        for c in tl.static_range(0, D, BLOCK_D):
            q = q + (_rows(Q, query * q_t + head * q_h, some, c, D, BLOCK_D),)
        lse = lse + (tl.load(LSE + query * H + head, mask=some, other=float("inf")),)
    return q, lse


@triton.jit
def _target_of_kept(
    q, lse, K, key, real, scale, k_s, k_g,
    G: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr, BLOCK_D: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """As `_target`, of queries that stay on the chip: nothing but keys is loaded, those of the next block while this one is served."""
    blocks: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    p = tl.zeros([key.shape[0], TILE], tl.float32)
    for g in tl.static_range(G):
        k = ()
        for i in tl.static_range(blocks):
            k = k + (_rows(K, key * k_s + g * k_g, real, i * BLOCK_D, D, BLOCK_D),)
        for part in tl.static_range(g * PARTS, (g + 1) * PARTS):
            dots = tl.dot(k[0], tl.trans(q[part * blocks]), input_precision="ieee")
            for i in tl.static_range(1, blocks):
                dots = tl.dot(k[i], tl.trans(q[part * blocks + i]), dots, input_precision="ieee")
            p += _head_sum(tl.exp2(dots * scale - lse[part][None, :]), TILE)
    return p


@triton.jit
def sparse(
    Q, K, Q_INDEX, K_INDEX, W, LSE, SEEN, KEYS, BITS, COUNTS, LOSS, DQ, DK, UNIT, first, scale, T, S, tiles_of_row, capacity,
    q_b, q_t, q_h, k_b, k_s, k_g, i_b, i_t, i_j,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, J: tl.constexpr, E: tl.constexpr, J_: tl.constexpr, E_: tl.constexpr,
    TILE: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr, BLOCK_D: tl.constexpr, GAIN: tl.constexpr,
):  # fmt: skip
    """Of one union: LOSS in bits, DQ `sum_s u k`, and its part of DK, added up in float32 or as multiples of 1 / UNIT in int64.

    Exponents are of two: scale and LSE come times log2(e), LSE with log2(H) added, which makes the head sum a mean. W holds
    the index scores' factors, zero where a query sees nothing; GAIN scales u, for float16.
    """
    tile = first + tl.program_id(0)
    b = (tile // tiles_of_row).to(tl.int64)
    t = (tile % tiles_of_row * TILE + tl.arange(0, TILE)).to(tl.int64)
    ok = t < T
    row = tl.program_id(0).to(tl.int64)
    stop = tl.load(COUNTS + row)
    KEYS += row * capacity
    BITS += row * capacity
    Q += b * q_b
    K += b * k_b
    LSE += b * T * H
    K_INDEX += b * S * E

    # Column j * TILE + i is head j of query i.
    columns: tl.constexpr = J_ * TILE
    j = (tl.arange(0, columns) // TILE).to(tl.int64)
    t_of = (tile % tiles_of_row * TILE + tl.arange(0, columns) % TILE).to(tl.int64)
    some = (t_of < T) & (j < J)
    seen = some & (tl.load(SEEN + b * T + t_of, mask=some, other=0) != 0)  # what the others hold, even NaN, stays with them
    e = tl.arange(0, E_)
    q = tl.load(Q_INDEX + b * i_b + t_of[:, None] * i_t + j[:, None] * i_j + e[None, :], mask=seen[:, None] & (e[None, :] < E), other=0.0)
    w = tl.load(W + (b * T + t_of) * J + j, mask=some, other=0.0)
    w2 = w * LOG2E
    qt = tl.trans(q)

    largest = tl.full([BLOCK, TILE], -1e30, tl.float32)  # of each place in a block, merged in the end
    total = tl.zeros([BLOCK, TILE], tl.float32)
    for at in tl.range(0, stop, BLOCK, num_stages=STAGES):
        key, real, sees = _block(KEYS, BITS, at, stop, BLOCK, TILE)
        dots = tl.dot(_index_keys(K_INDEX, key, real, E, E_), qt, input_precision="ieee")
        scores = tl.where(sees, _index_scores(dots, w2, TILE), float("-inf"))
        rest = tl.exp2(-tl.abs(scores - largest))
        total = tl.where(scores > largest, total * rest + 1, total + rest)
        largest = tl.maximum(scores, largest)
    top = tl.max(largest, 0)
    index_lse = top + tl.log2(tl.sum(total * tl.exp2(largest - top[None, :]), 0))

    DK += b * S * E
    wq = (w[:, None] * q).to(q.dtype)
    dq = tl.zeros([E_, columns], tl.float32)
    loss = tl.zeros([BLOCK], tl.float32)
    for at in tl.range(0, stop, BLOCK):
        key, real, sees = _block(KEYS, BITS, at, stop, BLOCK, TILE)
        k = _index_keys(K_INDEX, key, real, E, E_)  # on its way while the target is made
        p = _target(Q, K, LSE, t, ok, key, real, scale, q_t, q_h, k_s, k_g, H, G, D, HEADS, BLOCK_D)
        dots = tl.dot(k, qt, input_precision="ieee")
        log_q = _index_scores(dots, w2, TILE) - index_lse[None, :]
        loss += tl.sum(tl.where(sees & (p != 0), p * (tl.log2(p) - log_q), 0.0), 1)
        g = tl.where(sees, tl.exp2(log_q) - p, 0.0) * GAIN
        u = _of_heads(dots, g, J_).to(k.dtype)
        dq = tl.dot(tl.trans(k), u, dq, input_precision="ieee")
        dk = tl.dot(u, wq, input_precision="ieee")
        if DK.dtype.element_ty == tl.int64:
            dk = tl.floor(dk * tl.load(UNIT) + 0.5).to(tl.int64)
        tl.atomic_add(DK + key[:, None] * E + e[None, :], dk, mask=real[:, None] & (e[None, :] < E), sem="relaxed")

    tl.store(LOSS + tile, tl.sum(loss))
    dq = tl.trans(dq)
    tl.store(DQ + ((b * T + t_of) * J + j)[:, None] * E + e[None, :], dq, mask=some[:, None] & (e[None, :] < E))


@triton.jit
def _log2(x, FAST: tl.constexpr):
    """FAST: the GPU's own instruction, off by 2^-22, where Triton's is a polynomial. The interpreter has only the latter."""
    if FAST:
        return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    return tl.log2(x)


@triton.jit
def _queries(START, STOP, tile, T, S, tiles_of_row, TILE: tl.constexpr, BLOCK: tl.constexpr):
    """Of a tile: row of the batch, queries, the interval that each sees, whether it sees anything, and from where to where to walk the keys."""
    b = (tile // tiles_of_row).to(tl.int64)
    t = (tile % tiles_of_row * TILE + tl.arange(0, TILE)).to(tl.int64)
    start = tl.load(START + b * T + t, mask=t < T, other=S)
    stop = tl.load(STOP + b * T + t, mask=t < T, other=0)
    seen = tl.maximum(start, 0) < stop
    low = tl.maximum(tl.min(tl.where(seen, start, S)), 0) // BLOCK * BLOCK
    return b, t, start, stop, seen, low, tl.max(tl.where(seen, stop, 0))


@triton.jit
def _index_queries(Q_INDEX, t, j, seen, i_t, i_j, E: tl.constexpr, E_: tl.constexpr):
    """Rows of the indexer's queries, zero where they see nothing (what those hold, even NaN, stays with them): `[rows, E_]`."""
    e = tl.arange(0, E_)
    return tl.load(Q_INDEX + (t * i_t + tl.cast(j, tl.int64) * i_j)[:, None] + e[None, :], mask=seen[:, None] & (e[None, :] < E), other=0.0)


@triton.jit
def dense(
    Q, K, Q_INDEX, K_INDEX, K_FINITE, W, LSE, START, STOP, LOSS, DQ, GAPS, first, scale, T, S, tiles_of_row,
    q_b, q_t, q_h, k_b, k_s, k_g, i_b, i_t, i_j,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, J: tl.constexpr, E: tl.constexpr, J_: tl.constexpr, E_: tl.constexpr,
    TILE: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr, BLOCK_D: tl.constexpr, KEPT: tl.constexpr, GAIN: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    """Of one tile of queries: LOSS in bits, DQ `sum_s u k`, and GAIN times g in GAPS, a row of S a query.

    Exponents and W are as in `sparse`. Only blocks that some query doesn't see whole are masked.
    """
    tile = first + tl.num_programs(0) - 1 - tl.program_id(0)  # the longest first
    b, t, start, stop, seen, low, high = _queries(START, STOP, tile, T, S, tiles_of_row, TILE, BLOCK)
    whole_from, whole_to = tl.max(tl.where(seen, start, 0)), tl.min(tl.where(seen, stop, S))
    Q += b * q_b
    K += b * k_b
    LSE += b * T * H
    W += b * T * J
    K_INDEX += b * S * E
    K_FINITE += b * S * E
    GAPS += ((tile - first) * TILE + tl.arange(0, TILE)).to(tl.int64)[None, :] * S

    # Column j * TILE + i is head j of query i.
    columns: tl.constexpr = J_ * TILE
    j = (tl.arange(0, columns) // TILE).to(tl.int64)
    t_of = tl.reshape(tl.broadcast_to(t[None, :], [J_, TILE]), [columns])
    some = (t_of < T) & (j < J)
    sees_any = tl.reshape(tl.broadcast_to(seen[None, :], [J_, TILE]), [columns]) & (j < J)
    qt = tl.trans(_index_queries(Q_INDEX + b * i_b, t_of, j, sees_any, i_t, i_j, E, E_))
    w = tl.load(W + t_of * J + j, mask=some, other=0.0) * LOG2E
    if KEPT:
        kept, lse = _kept(Q, LSE, t, seen, q_t, q_h, H, G, D, HEADS, BLOCK_D)

    largest = tl.full([BLOCK, TILE], -1e30, tl.float32)  # of each place in a block, merged in the end
    total = tl.zeros([BLOCK, TILE], tl.float32)
    for at in tl.range(low, high, BLOCK, num_stages=STAGES):
        slot = at + tl.arange(0, BLOCK)
        dots = tl.dot(_index_keys(K_INDEX, slot.to(tl.int64), slot < S, E, E_), qt, input_precision="ieee")
        scores = _index_scores(dots, w, TILE)
        if (at < whole_from) | (at + BLOCK > whole_to):
            scores = tl.where((slot[:, None] >= start[None, :]) & (slot[:, None] < stop[None, :]), scores, float("-inf"))
        rest = tl.exp2(-tl.abs(scores - largest))
        total = tl.where(scores > largest, total * rest + 1, total + rest)
        largest = tl.maximum(scores, largest)
    top = tl.max(largest, 0)
    index_lse = tl.where(seen, top + tl.log2(tl.sum(total * tl.exp2(largest - top[None, :]), 0)), 1e30)

    dq = tl.zeros([E_, columns], tl.float32)
    loss = tl.zeros([BLOCK], tl.float32)
    for at in tl.range(low, high, BLOCK, num_stages=STAGES):
        slot = at + tl.arange(0, BLOCK)
        key, real = slot.to(tl.int64), slot < S
        k = _index_keys(K_FINITE, key, real, E, E_)  # on its way while the target is made
        if KEPT:
            p = _target_of_kept(kept, lse, K, key, real, scale, k_s, k_g, G, D, TILE, BLOCK_D, (H // G + HEADS - 1) // HEADS)
        else:
            p = _target(Q, K, LSE, t, seen, key, real, scale, q_t, q_h, k_s, k_g, H, G, D, HEADS, BLOCK_D)
        dots = tl.dot(k, qt, input_precision="ieee")
        log_q = _index_scores(dots, w, TILE) - index_lse[None, :]
        if (at < whole_from) | (at + BLOCK > whole_to):
            sees = (slot[:, None] >= start[None, :]) & (slot[:, None] < stop[None, :])
            p = tl.where(sees, p, 0.0)
            log_q = tl.where(sees, log_q, -1e30)
        loss += tl.sum(tl.where(p != 0, p * (_log2(tl.maximum(p, 1e-30), FAST) - log_q), 0.0), 1)
        g = (tl.exp2(log_q) - p) * GAIN
        dq = tl.dot(tl.trans(k), _of_heads(dots, g, J_).to(k.dtype), dq, input_precision="ieee")
        tl.store(GAPS + key[:, None], g.to(GAPS.dtype.element_ty), mask=real[:, None] & (t < T)[None, :])

    tl.store(LOSS + tile, tl.sum(loss))
    e = tl.arange(0, E_)
    tl.store(DQ + ((b * T + t_of) * J + j)[:, None] * E + e[None, :], tl.trans(dq), mask=some[:, None] & (e[None, :] < E))


@triton.jit
def key_gradients(
    GAPS, Q_INDEX, K_FINITE, W, START, STOP, PARTS, first, last, T, S, tiles_of_row, across, i_b, i_t, i_j,
    J: tl.constexpr, E: tl.constexpr, E_: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, DEEP: tl.constexpr,
):  # fmt: skip
    """Add what the tiles from `first` to `last` give to BLOCK keys: `across` tiles of a batch row to each of the PARTS `[parts, B, S, E]`."""
    b = tl.program_id(2).to(tl.int64)
    part = tl.program_id(1).to(tl.int64)
    row = tl.program_id(2) * tiles_of_row
    low = tl.maximum(first, row) + tl.program_id(1) * across
    high = tl.minimum(tl.minimum(last, row + tiles_of_row), low + across)
    if low >= high:
        return
    nearest = tl.program_id(0) * BLOCK
    key = (nearest + tl.arange(0, BLOCK)).to(tl.int64)
    real = key < S
    k = _index_keys(K_FINITE + b * S * E, key, real, E, E_)
    dk = tl.zeros([BLOCK, E_], tl.float32)
    for tile in range(low, high):
        _, t, start, stop, seen, begin, end = _queries(START, STOP, tile, T, S, tiles_of_row, TILE, BLOCK)
        if (begin <= nearest) & (nearest < end):
            rows = ((tile - first) * TILE + tl.arange(0, TILE)).to(tl.int64)
            there = seen & (start < nearest + BLOCK) & (nearest < stop)  # what a query doesn't walk, nobody wrote
            g = tl.load(GAPS + rows[None, :] * S + key[:, None], mask=real[:, None] & there[None, :], other=0.0)
            for j in tl.range(0, J, num_stages=DEEP):
                q = _index_queries(Q_INDEX + b * i_b, t, j, seen, i_t, i_j, E, E_)
                w = tl.load(W + (b * T + t) * J + j, mask=seen, other=0.0)
                dots = tl.dot(k, tl.trans(q), input_precision="ieee")
                dk = tl.dot(tl.where(dots > 0, g * w[None, :], 0.0).to(q.dtype), q, dk, input_precision="ieee")
    e = tl.arange(0, E_)
    PARTS += ((part * tl.num_programs(2) + b) * S + key)[:, None] * E + e[None, :]
    inside = real[:, None] & (e[None, :] < E)
    tl.store(PARTS, tl.load(PARTS, mask=inside) + dk, mask=inside)


class Tiles(NamedTuple):
    """How a program is cut: queries, keys at a time, query heads and channels at a time, warps."""

    queries: int
    keys: int
    heads: int
    channels: int
    warps: int


def _exact(q: Tensor, q_index: Tensor) -> bool:
    """Whether products are of float32, without matrix units.

    Head sums then go over threads, each of which holds the result: fused with it, a thread's own product would be rounded last,
    and threads would write different bits of one number.
    """
    return max(q.itemsize, q_index.itemsize) == 4


def _tiles(q: Tensor, k: Tensor, q_index: Tensor) -> Tiles:
    """The largest tiles that fit the registers; their columns are the heads of all their queries, in the indexer and in the attention."""
    J, E = (triton.next_power_of_2(n) for n in q_index.shape[2:])
    hopper = capability(q.device) == 90  # its matrix units take operands from shared memory, the others' from registers
    exact = _exact(q, q_index)
    columns = 32 if exact else 128 if hopper and J >= 64 and E <= 128 else max(16, min(64, 8192 // E))
    queries = max(1, min(16, columns // J))
    heads = max(16 // queries, min(triton.next_power_of_2(q.shape[2] // k.shape[2]), columns // queries))
    warps = 8 if E * max(J, columns) > 4096 else 4
    return Tiles(queries, 64 if hopper and not exact else 32, heads, min(64, max(16, triton.next_power_of_2(q.shape[3]))), warps)


class Dense(NamedTuple):
    """How a call over intervals is cut."""

    tile: Tiles
    kept: bool  # queries stay in shared memory, beside keys that are on their way
    shared: int  # queries at a time where keys gather their gradients
    deep: int  # of the pipelines there


def _dense(q: Tensor, k: Tensor, q_index: Tensor) -> Dense:
    tile = _tiles(q, k, q_index)
    if _exact(q, q_index):
        return Dense(tile, False, 16, 1)
    return Dense(tile, capability(q.device) == 90 and _fits_twice(q, k, q_index, tile), 64, 2)


def _fits_twice(q: Tensor, k: Tensor, q_index: Tensor, tile: Tiles) -> bool:
    """Whether shared memory holds two programs that keep all their queries beside the keys that are on their way."""
    (H, D), G, (J, E) = q.shape[2:], k.shape[2], q_index.shape[2:]
    channels, parts = G * triton.cdiv(D, tile.channels) * tile.channels, triton.cdiv(H // G, tile.heads)
    attention = q.itemsize * channels * (parts * tile.heads * tile.queries + STAGES.value * tile.keys)
    index = q_index.itemsize * max(16, triton.next_power_of_2(E)) * (triton.next_power_of_2(J) * tile.queries + STAGES.value * tile.keys)
    return 2 * (attention + index) <= shared_memory(q.device) - 16384  # the rest is for what passes between threads


def align(
    q: Tensor,
    k: Tensor,
    q_index: Tensor,
    k_index: Tensor,
    weights: Tensor,
    start: Tensor,
    end: Tensor,
    indices: Optional[Tensor],
    lse: Optional[Tensor],
    scale: float,
    group: Optional[str],
    workspace_mb: int,
) -> Gradients:
    """loss (a scalar) and its gradients for q_index, k_index and weights."""
    (H, D), S, (J, E) = q.shape[2:], k.shape[1], q_index.shape[2:]
    if lse is None:
        values = min(16, D)  # as few as there may be: only the lse is wanted
        if indices is None:
            lse = attend_dense(q, k, None, start, end, values, scale, None, workspace_mb)[1]
        else:
            lse = attend(q, k, None, indices[:, :, None], values, scale, None, workspace_mb)[1]
    lse = (lse.float() * LOG2E.value + log2(H)).contiguous()
    end = end.clamp(max=S)  # keys behind the last would count as zeros
    seen = (end > start.clamp(min=0) if indices is None else indices.amax(-1) >= 0).contiguous()
    rows = seen.sum().clamp(min=1).float()
    start, end = start.contiguous(), end.contiguous()

    both = torch.promote_types(q_index.dtype, k_index.dtype)
    q, k, query = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, q_index.to(both)))
    keys = k_index.to(both).contiguous()
    weight_scale = J**-0.5 * E**-0.5
    w = torch.where(seen[..., None], weights.float() * weight_scale, 0.0).contiguous()
    gain = 2.0**15 if both == torch.float16 else 1.0  # most of softmax - p, which is at most 1, is too small for float16
    inputs = q, k, query, keys, w, lse
    if indices is None:
        loss, dq, dk = _over_intervals(*inputs, start, end, scale, gain, workspace_mb)
    else:
        loss, dq, dk = _over_unions(*inputs, seen, indices, scale, gain, workspace_mb)
    total = loss.sum() * log(2) / rows
    dq /= rows * gain
    dw = torch.where(seen[..., None], torch.linalg.vecdot(dq, query.float()) * weight_scale, 0.0)
    dq, dk = dq * w[..., None], dk / (rows * gain)
    return total, dq.to(unscaled(q_index.dtype)), dk.to(unscaled(k_index.dtype)), dw.to(unscaled(weights.dtype))


def _results(q_index: Tensor, tiles: int) -> tuple[Tensor, Tensor]:
    """Where the loss of each tile and `sum_s u k` `[B, T, J, E]` go."""
    return tuple(torch.empty(shape, dtype=torch.float32, device=q_index.device) for shape in (tiles, q_index.shape))  # type: ignore[return-value]


def _over_intervals(
    q: Tensor, k: Tensor, q_index: Tensor, k_index: Tensor, w: Tensor, lse: Tensor, start: Tensor, end: Tensor, scale: float, gain: float,
    workspace_mb: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Loss of each tile in bits, `sum_s u k`, and the keys' gradients times `rows * gain`."""
    (B, T, H, D), (S, G), (J, E) = q.shape, k.shape[1:3], q_index.shape[2:]
    cut = _dense(q, k, q_index)
    tile, more = cut.tile, cut.shared // cut.tile.queries
    tiles, all_tiles = tiles_of(T, cut.shared), B * tiles_of(T, cut.shared)
    loss, dq = _results(q_index, all_tiles * more)
    E_ = max(16, triton.next_power_of_2(E))
    parts, left = _sums(k_index, workspace_mb)
    finite = k_index.nan_to_num(0.0, 0.0, 0.0)  # an interval may hold keys that none of a tile's queries sees
    peak = w.abs().amax().clamp(min=2.0**-40) if gain != 1 and w.numel() else 1.0  # float16: without it g times gain and w might be infinite
    factors = w / peak if gain != 1 else w
    strides = q_index.stride()[:3]
    for part in chunks(all_tiles, cut.shared * S * k_index.itemsize, left):
        n = part.stop - part.start
        g = torch.empty(n * cut.shared, S, dtype=k_index.dtype, device=q.device)
        dense[(n * more,)](
            q, k, q_index, k_index, finite, w, lse, start, end, loss, dq, g, part.start * more, scale * LOG2E.value, T, S, tiles * more,
            *q.stride()[:3], *k.stride()[:3], *strides, H, G, D, J, E, triton.next_power_of_2(J), E_,
            tile.queries, tile.keys, tile.heads, tile.channels, cut.kept, gain, not interpreted(),
            num_warps=tile.warps, enable_fp_fusion=not _exact(q, q_index),
        )  # fmt: skip
        across = triton.cdiv(min(tiles, n), len(parts))
        key_gradients[(triton.cdiv(S, tile.keys), len(parts), B)](
            g, q_index, finite, factors, start, end, parts, part.start, part.stop, T, S, tiles, across, *strides,
            J, E, E_, cut.shared, tile.keys, cut.deep, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return loss, dq, parts.sum(0) * peak


def _over_unions(
    q: Tensor, k: Tensor, q_index: Tensor, k_index: Tensor, w: Tensor, lse: Tensor, seen: Tensor, indices: Tensor, scale: float, gain: float,
    workspace_mb: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As `_over_intervals`, of selections."""
    (B, T, H, D), (S, G), (J, E) = q.shape, k.shape[1:3], q_index.shape[2:]
    cut = _tiles(q, k, q_index)
    tiles = tiles_of(T, cut.queries)
    loss, dq = _results(q_index, B * tiles)
    unit = _unit(q_index, w, seen, gain) if torch.are_deterministic_algorithms_enabled() else None
    dk = torch.zeros(B, S, E, dtype=torch.float32 if unit is None else torch.int64, device=q.device)
    for part, selected, bits, counts in unions(indices[:, :, None].contiguous(), S, cut.queries, workspace_mb):
        sparse[(part.stop - part.start,)](
            q, k, q_index, k_index, w, lse, seen, selected, bits, counts, loss, dq, dk, unit,
            part.start, scale * LOG2E.value, T, S, tiles, selected.shape[-1], *q.stride()[:3], *k.stride()[:3], *q_index.stride()[:3],
            H, G, D, J, E, triton.next_power_of_2(J), max(16, triton.next_power_of_2(E)),
            cut.queries, cut.keys, cut.heads, cut.channels, gain, num_warps=cut.warps, enable_fp_fusion=not _exact(q, q_index),
        )  # fmt: skip
    return loss, dq, dk if unit is None else dk / unit + 0 * loss.sum()  # no integer is NaN


def _sums(keys: Tensor, workspace_mb: int) -> tuple[Tensor, int]:
    """Zeros `[parts, B, S, E]` for the keys' gradients, and how many MiB of the workspace are left: what all parts but one take is half at most."""
    size = 4 * keys.numel()
    more = min(PARTS - 1, (workspace_mb << 19) // max(1, size))
    return torch.zeros(1 + more, *keys.shape, dtype=torch.float32, device=keys.device), workspace_mb - (more * size >> 20)


def _unit(q: Tensor, w: Tensor, seen: Tensor, gain: float) -> Tensor:
    """A power of two that makes the keys' gradients, at most `gain * |w q|` a head and query, integers of 61 bits."""
    largest = torch.where(seen, w.abs().amax(-1) * q.abs().amax((-2, -1)), 0.0).amax() * (gain * w[0].numel())
    return torch.exp2(torch.floor(61 - torch.log2(largest.clamp(min=2.0**-40))))
