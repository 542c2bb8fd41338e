"""Attention over selected keys, and over all visible keys, as Triton kernels for NVIDIA GPUs from sm_80 on.

A program serves a tile of neighbouring queries with the heads of one key head as the rows of its matrix products, and
walks the keys that they read in blocks. What it walks is one of three things:

- ROWS: the selection of a single query (one query a tile);
- UNION: the union of the tile's selections (see union.py), with one bit a query and key that says who reads it;
- DENSE: the interval of keys that the tile sees.

UNION gathers a key once for all its neighbours, which is 5 times less where selections overlap as real ones do. Where
they don't it only multiplies the arithmetic, so a tile whose union is larger than half its selections together is left
to ROWS; programs decide that by themselves, without the host.

A NaN in a key that one query of a tile reads may reach its neighbours, and so may one between the intervals of a tile's
queries; keys that no query reads may hold anything otherwise.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from skim.ops.attend.union import tiles_of, unions
from skim.ops.dispatch import capability, processors, shared_memory

ROWS, UNION, DENSE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
LOG2E = tl.constexpr(1.4426950408889634)
UNION_MB = 256  # more makes nothing faster: a chunk fills the card
LARGEST_UNION = 0.5  # of a tile's selections together; beyond, sharing costs more arithmetic than it saves gathers

Gradients = tuple[Tensor, Tensor, Tensor, Tensor]


def refusal(function: str, args: tuple[Any, ...]) -> str | None:
    q = args[2] if function.endswith("backward") else args[0]
    if q.dtype == torch.float64:
        return "it computes in float32 at most, and the inputs are float64"
    if function in ("attend", "attend_dense") and args[5 if function == "attend" else 6] <= 0:
        return "it takes the largest score before it scales, and the scale is not positive"
    return None


@triton.jit
def _tile(COUNTS, first, T, tiles, limit, selection, R: tl.constexpr, SHARED_TILE: tl.constexpr, MODE: tl.constexpr):
    """The tile of a program, and whether another program serves it.

    A union of more than `limit` keys is left to ROWS, a program a query. SHARED_TILE > 0 in ROWS: the unions' tiles, numbered from
    `first` on in COUNTS, have so many queries.
    """
    pid = tl.program_id(0)
    if MODE == DENSE:
        tile, served = tiles - 1 - pid, False  # the longest first
    elif MODE == UNION:
        tile, served = first + pid, tl.load(COUNTS + pid * R + selection) > limit
    elif SHARED_TILE == 0:
        tile, served = pid, False
    else:
        own = pid // SHARED_TILE
        tiles_of_row = tl.cdiv(T, SHARED_TILE)
        t = (first + own) % tiles_of_row * SHARED_TILE + pid % SHARED_TILE
        tile, served = (first + own) // tiles_of_row * T + t, (t >= T) | (tl.load(COUNTS + own * R + selection) <= limit)
    return tile, served


@triton.jit
def _rows(tile, first_head, T, HEADS: tl.constexpr, TILE: tl.constexpr, BLOCK_H: tl.constexpr):
    """Of a tile: its row of the batch; and of each matrix row: query within the tile, query, head within its group, whether it is one."""
    row: tl.constexpr = TILE * BLOCK_H
    tiles_of_row = tl.cdiv(T, TILE)
    i = tl.arange(0, row) // BLOCK_H
    head = first_head + tl.arange(0, row) % BLOCK_H
    t = tile % tiles_of_row * TILE + i
    return (tile // tiles_of_row).to(tl.int64), i, t, head, (t < T) & (head < HEADS)


@triton.jit
def _load_keys(READS, at, end, BLOCK_K: tl.constexpr, MODE: tl.constexpr):
    """The keys at positions `at` to `at + BLOCK_K` of what a tile walks, -1 where there is none."""
    slot = at + tl.arange(0, BLOCK_K)
    if MODE == DENSE:
        key = tl.where(slot < end, slot, -1)
    else:
        key = tl.load(READS + slot, mask=slot < end, other=-1)
    return key


@triton.jit
def _readers(key, BITS, at, end, i, low, high, BLOCK_K: tl.constexpr, MODE: tl.constexpr):
    """Which matrix rows read which keys of a block."""
    if MODE == DENSE:
        slot = at + tl.arange(0, BLOCK_K)
        reads = (slot[None, :] >= low[:, None]) & (slot[None, :] < high[:, None])
    elif MODE == UNION:
        slot = at + tl.arange(0, BLOCK_K)
        bits = tl.load(BITS + slot, mask=slot < end, other=0)
        reads = (bits[None, :] & (1 << i)[:, None]) != 0
    else:
        reads = (key >= 0)[None, :]
    return reads


@triton.jit
def _channels(X, offset, real, stride, FIRST: tl.constexpr, BLOCK: tl.constexpr, SIZE: tl.constexpr):
    """Rows of X at `offset`, channels FIRST to FIRST + BLOCK (zero behind SIZE): `[rows, BLOCK]`."""
    c = FIRST + tl.arange(0, BLOCK)
    pointer = X + offset[:, None] * stride + c[None, :]
    if FIRST + BLOCK <= SIZE:
        return tl.load(pointer, mask=real[:, None], other=0.0)
    return tl.load(pointer, mask=real[:, None] & (c[None, :] < SIZE), other=0.0)


@triton.jit
def _dot(a, b, acc=None):
    """a @ b in float32: exact products for float32 inputs too."""
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def forward(
    Q, K, V, OUT, LSE, SINK, READS, BITS, COUNTS, START, END,
    first, scale, T, S, tiles, width, limit, rows,
    q_b, q_t, q_h, k_b, k_s, k_g, v_b, v_s, v_g,
    H: tl.constexpr, G: tl.constexpr, R: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, V_: tl.constexpr, V0: tl.constexpr,
    TILE: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, SPLITS: tl.constexpr,
    MODE: tl.constexpr, SHARED_TILE: tl.constexpr, HAS_SINK: tl.constexpr, VALUES_IN_KEYS: tl.constexpr,
):  # fmt: skip
    """out and lse of one tile, key head, block of its query heads and split of its keys: program (tile, heads, split).

    READS `[.., width]` holds what a tile walks (ROWS: indices, UNION: keys of the union, with BITS and COUNTS). With SPLITS > 1 out
    is float32 `[SPLITS, B * T, H, V]` and lse alike (`rows` = B * T * H apart), for `combine`.
    """
    HEADS: tl.constexpr = H // G
    blocks: tl.constexpr = (HEADS + BLOCK_H - 1) // BLOCK_H
    g = (tl.program_id(1) // blocks).to(tl.int64)
    selection = g // (G // R)
    split = tl.program_id(2)
    tile, served = _tile(COUNTS, first, T, tiles, limit, selection, R, SHARED_TILE, MODE)
    if served:
        return
    b, i, t, head, ok = _rows(tile, tl.program_id(1) % blocks * BLOCK_H, T, HEADS, TILE, BLOCK_H)
    low, high = t, t
    begin, end = 0, width
    if MODE == UNION:
        list_row = ((tile - first) * R + selection).to(tl.int64)
        end = tl.load(COUNTS + list_row)
    elif MODE == ROWS:
        list_row = tile.to(tl.int64) * R + selection
    else:
        low = tl.load(START + b * T + t, mask=t < T, other=S)
        high = tl.load(END + b * T + t, mask=t < T, other=0)
        seen = low < high
        begin = tl.maximum(tl.min(tl.where(seen, low, S)), 0)
        end = tl.minimum(tl.max(tl.where(seen, high, 0)), S)
        list_row = b
    if SPLITS > 1:
        share = tl.cdiv(tl.cdiv(tl.maximum(end - begin, 0), SPLITS), BLOCK_K) * BLOCK_K
        begin += split * share
        end = tl.minimum(end, begin + share)

    h = g * HEADS + head
    q_row = Q + b * q_b + t.to(tl.int64)[:, None] * q_t + h[:, None] * q_h
    c0 = tl.arange(0, D0)
    q0 = tl.load(q_row + c0[None, :], mask=ok[:, None] & (c0[None, :] < D), other=0.0)
    if D1 > 0:
        c1 = D0 + tl.arange(0, D1)
        q1 = tl.load(q_row + c1[None, :], mask=ok[:, None] & (c1[None, :] < D), other=0.0)
    keys = K + b * k_b + g * k_g
    values = V + b * v_b + g * v_g
    READS += list_row * width
    BITS += list_row * width

    largest = tl.full([TILE * BLOCK_H], -1e30, tl.float32)
    total = tl.zeros([TILE * BLOCK_H], tl.float32)
    acc = tl.zeros([TILE * BLOCK_H, V0], tl.float32)
    AHEAD: tl.constexpr = MODE == ROWS and D0 <= 256  # where registers are short they are worth more than the wait, measured
    if AHEAD:
        ahead = _load_keys(READS, begin, end, BLOCK_K, MODE)
    for at in tl.range(begin, end, BLOCK_K, num_stages=STAGES):
        if AHEAD:
            block = ahead
            ahead = _load_keys(READS, at + BLOCK_K, end, BLOCK_K, MODE)  # so that gathers needn't wait for it
        else:
            block = _load_keys(READS, at, end, BLOCK_K, MODE)
        real = block >= 0
        reads = _readers(block, BITS, at, end, i, low, high, BLOCK_K, MODE)
        key = tl.maximum(block, 0).to(tl.int64)
        k0 = _channels(keys, key, real, k_s, 0, D0, D)
        s = _dot(q0, tl.trans(k0))
        if D1 > 0:
            s = _dot(q1, tl.trans(_channels(keys, key, real, k_s, D0, D1, D)), s)
        s = tl.where(reads, s, float("-inf"))
        larger = tl.maximum(largest, tl.max(s, 1) * scale)  # scale > 0
        p = tl.exp2(s * scale - larger[:, None])
        rescale = tl.exp2(largest - larger)
        total = total * rescale + tl.sum(p, 1)
        largest = larger
        if VALUES_IN_KEYS:
            v = k0
        else:
            v = _channels(values, key, real, v_s, 0, V0, V_)
        acc = _dot(p.to(v.dtype), v, acc * rescale[:, None])

    empty = total == 0
    lse = tl.where(empty, float("-inf"), (largest + tl.log2(total)) / LOG2E)
    factor = tl.where(empty, 0.0, 1 / total)
    if HAS_SINK:
        sink = tl.load(SINK + h, mask=ok, other=0.0).to(tl.float32)
        factor = tl.where(empty, 0.0, factor / (1 + tl.exp2((sink - lse) * LOG2E)))
    row = (b * T + t) * H + h
    if SPLITS > 1:
        row += split.to(tl.int64) * rows
    c = tl.arange(0, V0)
    tl.store(LSE + row, lse, mask=ok)
    out = tl.where(empty[:, None], 0.0, acc * factor[:, None])  # what neighbours read, even NaN, stays with them
    tl.store(OUT + row[:, None] * V_ + c[None, :], out.to(OUT.dtype.element_ty), mask=ok[:, None] & (c[None, :] < V_))


@triton.jit
def combine(
    PARTS, PART_LSE, OUT, LSE, SINK, rows, H,
    V_: tl.constexpr, V0: tl.constexpr, SPLITS: tl.constexpr, WIDE: tl.constexpr, HAS_SINK: tl.constexpr,
):  # fmt: skip
    """Merge the SPLITS partial outputs of one query and head by their lse."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, WIDE)
    c = tl.arange(0, V0)
    lse = tl.load(PART_LSE + split * rows + row, mask=split < SPLITS, other=float("-inf"))
    largest = tl.maximum(tl.max(lse, 0), -1e30)
    weight = tl.exp2((lse - largest) * LOG2E)
    total = tl.sum(weight, 0)
    parts = tl.load(PARTS + (split[:, None] * rows + row) * V_ + c[None, :], mask=(split[:, None] < SPLITS) & (c[None, :] < V_), other=0.0)
    empty = total == 0
    merged = tl.where(empty, float("-inf"), largest + tl.log2(total) / LOG2E)
    factor = tl.where(empty, 0.0, 1 / total)
    if HAS_SINK:
        sink = tl.load(SINK + row % H).to(tl.float32)
        factor = tl.where(empty, 0.0, factor / (1 + tl.exp2((sink - merged) * LOG2E)))
    tl.store(LSE + row, merged)
    tl.store(OUT + row * V_ + c, (tl.sum(parts * weight[:, None], 0) * factor).to(OUT.dtype.element_ty), mask=c < V_)


@triton.jit
def prepare(
    OUT, GRAD, DLSE, LSE, SINK, FULL, SHIFT, DSINK, g_b, g_t, g_h, T, rows,
    H: tl.constexpr, V_: tl.constexpr, V0: tl.constexpr, BLOCK: tl.constexpr, HAS_SINK: tl.constexpr,
):  # fmt: skip
    """What the backward needs of each query and head.

    FULL: the lse with the sink, in base 2 (+inf for a row that reads nothing, so that its probabilities are zero).
    SHIFT: with P = exp(s - FULL) the gradient of a score is P * (grad . v + SHIFT). DSINK: its part of the sink's gradient.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = row < rows
    c = tl.arange(0, V0)
    lse = tl.load(LSE + row, mask=ok, other=float("-inf"))
    alive = lse > float("-inf")
    inside = alive[:, None] & (c[None, :] < V_)
    b, t, h = row // (T * H), row // H % T, row % H
    grad = tl.load(GRAD + (b * g_b + t * g_t + h * g_h)[:, None] + c[None, :], mask=inside, other=0.0).to(tl.float32)
    out = tl.load(OUT + row[:, None] * V_ + c[None, :], mask=inside, other=0.0).to(tl.float32)
    delta = tl.sum(grad * out, 1)
    dlse = tl.load(DLSE + row, mask=alive, other=0.0)
    if HAS_SINK:
        sink = tl.load(SINK + h, mask=ok, other=0.0).to(tl.float32)
        excess = tl.exp2(tl.minimum((sink - lse) * LOG2E, 126.0))  # the sink's weight beside the keys', finite
        tl.store(DSINK + row, tl.where(alive, -delta * excess / (1 + excess), 0.0), mask=ok)
        lse += tl.log2(1 + excess) / LOG2E
        dlse *= 1 + excess
    tl.store(FULL + row, tl.where(alive, lse * LOG2E, float("inf")), mask=ok)
    tl.store(SHIFT + row, tl.where(alive, dlse - delta, 0.0), mask=ok)


@triton.jit
def _add(X, offset, stride, real, x, factor, FIRST: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, FIXED: tl.constexpr):
    """Add x `[rows, BLOCK]` to rows of X at channel FIRST: as float32, or FIXED: as integers, whose sum is the same in any order."""
    c = FIRST + tl.arange(0, BLOCK)
    if FIXED:
        x = (x * factor).to(tl.int64)
    tl.atomic_add(X + offset[:, None] * stride + c[None, :], x, mask=real[:, None] & (c[None, :] < SIZE), sem="relaxed")


@triton.jit
def backward(
    Q, K, V, GRAD, FULL, SHIFT, DQ, DK, DV, FACTORS, READS, BITS, COUNTS, START, END,
    first, scale, T, S, tiles, width, limit,
    q_b, q_t, q_h, k_b, k_s, k_g, v_b, v_s, v_g, g_b, g_t, g_h,
    H: tl.constexpr, G: tl.constexpr, R: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, V_: tl.constexpr, V0: tl.constexpr,
    TILE: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    MODE: tl.constexpr, SHARED_TILE: tl.constexpr, VALUES_IN_KEYS: tl.constexpr, FIXED: tl.constexpr,
):  # fmt: skip
    """dq of one tile, key head and block of its query heads; and unless DENSE, its part of dk and dv added to `[B, S, G, ..]`."""
    HEADS: tl.constexpr = H // G
    blocks: tl.constexpr = (HEADS + BLOCK_H - 1) // BLOCK_H
    g = (tl.program_id(1) // blocks).to(tl.int64)
    selection = g // (G // R)
    tile, served = _tile(COUNTS, first, T, tiles, limit, selection, R, SHARED_TILE, MODE)
    if served:
        return
    b, i, t, head, ok = _rows(tile, tl.program_id(1) % blocks * BLOCK_H, T, HEADS, TILE, BLOCK_H)
    low, high = t, t
    begin, end = 0, width
    if MODE == UNION:
        list_row = ((tile - first) * R + selection).to(tl.int64)
        end = tl.load(COUNTS + list_row)
    elif MODE == ROWS:
        list_row = tile.to(tl.int64) * R + selection
    else:
        low = tl.load(START + b * T + t, mask=t < T, other=S)
        high = tl.load(END + b * T + t, mask=t < T, other=0)
        seen = low < high
        begin = tl.maximum(tl.min(tl.where(seen, low, S)), 0)
        end = tl.minimum(tl.max(tl.where(seen, high, 0)), S)
        list_row = b

    h = g * HEADS + head
    row = (b * T + t) * H + h
    full = tl.load(FULL + row, mask=ok, other=float("inf"))
    shift = tl.load(SHIFT + row, mask=ok, other=0.0)
    alive = full < float("inf")
    q_row = Q + b * q_b + t.to(tl.int64)[:, None] * q_t + h[:, None] * q_h
    c0 = tl.arange(0, D0)
    q0 = tl.load(q_row + c0[None, :], mask=alive[:, None] & (c0[None, :] < D), other=0.0)
    if D1 > 0:
        c1 = D0 + tl.arange(0, D1)
        q1 = tl.load(q_row + c1[None, :], mask=alive[:, None] & (c1[None, :] < D), other=0.0)
        dq1 = tl.zeros([TILE * BLOCK_H, D1], tl.float32)
    cv = tl.arange(0, V0)
    grad_row = GRAD + b * g_b + t.to(tl.int64)[:, None] * g_t + h[:, None] * g_h
    grad = tl.load(grad_row + cv[None, :], mask=alive[:, None] & (cv[None, :] < V_), other=0.0)
    keys = K + b * k_b + g * k_g
    values = V + b * v_b + g * v_g
    into_k = DK + (b * S * G + g) * D
    into_v = DV + (b * S * G + g) * V_
    k_factor, v_factor = 1.0, 1.0
    if FIXED:
        k_factor, v_factor = tl.load(FACTORS), tl.load(FACTORS + 1)
    READS += list_row * width
    BITS += list_row * width

    natural = scale / LOG2E
    dq0 = tl.zeros([TILE * BLOCK_H, D0], tl.float32)
    AHEAD: tl.constexpr = D0 <= 256
    if AHEAD:
        ahead = _load_keys(READS, begin, end, BLOCK_K, MODE)
    for at in tl.range(begin, end, BLOCK_K, num_stages=STAGES):
        if AHEAD:
            block = ahead
            ahead = _load_keys(READS, at + BLOCK_K, end, BLOCK_K, MODE)  # so that gathers needn't wait for it
        else:
            block = _load_keys(READS, at, end, BLOCK_K, MODE)
        real = block >= 0
        reads = _readers(block, BITS, at, end, i, low, high, BLOCK_K, MODE)
        key = tl.maximum(block, 0).to(tl.int64)
        k0 = _channels(keys, key, real, k_s, 0, D0, D)
        s = _dot(q0, tl.trans(k0))
        if D1 > 0:
            k1 = _channels(keys, key, real, k_s, D0, D1, D)
            s = _dot(q1, tl.trans(k1), s)
        p = tl.where(reads, tl.exp2(s * scale - full[:, None]), 0.0)
        if VALUES_IN_KEYS:
            v = k0
        else:
            v = _channels(values, key, real, v_s, 0, V0, V_)
        ds = (p * (_dot(grad, tl.trans(v)) + shift[:, None])).to(k0.dtype)
        dq0 = _dot(ds, k0, dq0)
        if D1 > 0:
            dq1 = _dot(ds, k1, dq1)
        if MODE != DENSE:
            p = p.to(grad.dtype)
            if VALUES_IN_KEYS:
                _add(into_k, key, G * D, real, _dot(tl.trans(ds), q0) * natural + _dot(tl.trans(p), grad), k_factor, 0, D, D0, FIXED)
            else:
                _add(into_v, key, G * V_, real, _dot(tl.trans(p), grad), v_factor, 0, V_, V0, FIXED)
                _add(into_k, key, G * D, real, _dot(tl.trans(ds), q0) * natural, k_factor, 0, D, D0, FIXED)
            if D1 > 0:
                _add(into_k, key, G * D, real, _dot(tl.trans(ds), q1) * natural, k_factor, D0, D, D1, FIXED)

    dq_row = DQ + row[:, None] * D
    tl.store(dq_row + c0[None, :], (dq0 * natural).to(DQ.dtype.element_ty), mask=ok[:, None] & (c0[None, :] < D))
    if D1 > 0:
        tl.store(dq_row + c1[None, :], (dq1 * natural).to(DQ.dtype.element_ty), mask=ok[:, None] & (c1[None, :] < D))


@triton.jit
def backward_keys(
    Q, K, V, GRAD, FULL, SHIFT, DK, DV, START, END, scale, T, S,
    q_b, q_t, q_h, k_b, k_s, k_g, v_b, v_s, v_g, g_b, g_t, g_h,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, V_: tl.constexpr, V0: tl.constexpr,
    TILE: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, VALUES_IN_KEYS: tl.constexpr,
):  # fmt: skip
    """dk and dv of a block of keys over all queries that see them, for attention over intervals: program (keys, key head, row of the batch)."""
    HEADS: tl.constexpr = H // G
    key = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    g, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    real = key < S
    offset = key.to(tl.int64)
    keys = K + b * k_b + g * k_g
    k0 = _channels(keys, offset, real, k_s, 0, D0, D)
    dk0 = tl.zeros([BLOCK_K, D0], tl.float32)
    if D1 > 0:
        k1 = _channels(keys, offset, real, k_s, D0, D1, D)
        dk1 = tl.zeros([BLOCK_K, D1], tl.float32)
    if VALUES_IN_KEYS:
        v = k0
    else:
        v = _channels(V + b * v_b + g * v_g, offset, real, v_s, 0, V0, V_)
        dv = tl.zeros([BLOCK_K, V0], tl.float32)
    c0, cv = tl.arange(0, D0), tl.arange(0, V0)
    natural = scale / LOG2E
    for tile in range(tl.cdiv(T, TILE)):
        for first_head in range(0, HEADS, BLOCK_H):
            _, i, t, head, ok = _rows(tile, first_head, T, HEADS, TILE, BLOCK_H)
            low = tl.load(START + b * T + t, mask=ok, other=S)
            high = tl.load(END + b * T + t, mask=ok, other=0)
            if (tl.max(high) > tl.program_id(0) * BLOCK_K) & (tl.min(low) < (tl.program_id(0) + 1) * BLOCK_K):
                h = g * HEADS + head
                row = (b * T + t) * H + h
                full = tl.load(FULL + row, mask=ok, other=float("inf"))
                shift = tl.load(SHIFT + row, mask=ok, other=0.0)
                alive = full < float("inf")
                q_row = Q + b * q_b + t.to(tl.int64)[:, None] * q_t + h[:, None] * q_h
                q0 = tl.load(q_row + c0[None, :], mask=alive[:, None] & (c0[None, :] < D), other=0.0)
                s = _dot(k0, tl.trans(q0))
                if D1 > 0:
                    c1 = D0 + tl.arange(0, D1)
                    q1 = tl.load(q_row + c1[None, :], mask=alive[:, None] & (c1[None, :] < D), other=0.0)
                    s = _dot(k1, tl.trans(q1), s)
                reads = real[:, None] & (key[:, None] >= low[None, :]) & (key[:, None] < high[None, :])
                p = tl.where(reads, tl.exp2(s * scale - full[None, :]), 0.0)
                grad_row = GRAD + b * g_b + t.to(tl.int64)[:, None] * g_t + h[:, None] * g_h
                grad = tl.load(grad_row + cv[None, :], mask=alive[:, None] & (cv[None, :] < V_), other=0.0)
                ds = tl.where(reads, p * (_dot(v, tl.trans(grad)) + shift[None, :]) * natural, 0.0).to(q0.dtype)
                if VALUES_IN_KEYS:
                    dk0 = _dot(p.to(q0.dtype), grad, dk0)
                else:
                    dv = _dot(p.to(q0.dtype), grad, dv)
                dk0 = _dot(ds, q0, dk0)
                if D1 > 0:
                    dk1 = _dot(ds, q1, dk1)
    row_k = DK + ((b * S + offset) * G + g)[:, None] * D
    tl.store(row_k + c0[None, :], dk0.to(DK.dtype.element_ty), mask=real[:, None] & (c0[None, :] < D))
    if D1 > 0:
        c1 = D0 + tl.arange(0, D1)
        tl.store(row_k + c1[None, :], dk1.to(DK.dtype.element_ty), mask=real[:, None] & (c1[None, :] < D))
    if not VALUES_IN_KEYS:
        row_v = DV + ((b * S + offset) * G + g)[:, None] * V_
        tl.store(row_v + cv[None, :], dv.to(DV.dtype.element_ty), mask=real[:, None] & (cv[None, :] < V_))


class _Plan(NamedTuple):
    """How a call is cut: constants of the kernels."""

    D0: int  # channels of queries and keys: a power of two, and what is left
    D1: int
    V0: int
    TILE: int
    BLOCK_H: int
    BLOCK_K: int
    STAGES: int
    warps: int
    registers: int | None  # a thread, where fewer than the compiler would take let two programs share a processor
    VALUES_IN_KEYS: bool


def _plan(q: Tensor, k: Tensor, v: Tensor | None, v_channels: int, tile: int, gradients: bool) -> _Plan:
    """Blocks of a call whose programs serve `tile` queries: as many keys at a time as shared memory and registers hold."""
    D, heads = q.shape[3], q.shape[2] // k.shape[2]
    D0 = max(16, 1 << (D.bit_length() - 1))
    D1 = 0 if D <= D0 else max(16, triton.next_power_of_2(D - D0))
    V0 = max(16, triton.next_power_of_2(v_channels))
    inside = v is None and v_channels == D0
    most = _most_rows(q, v_channels, gradients)
    block_h = min(triton.next_power_of_2(heads), most)
    block_h = max(block_h, 16 // tile)
    rows = tile * block_h
    item, depth = q.element_size(), D0 + D1 + (0 if inside else V0)
    resident = rows * (D0 + D1) * item
    stages, block_k = (2, 64) if item == 2 else (1, 32)
    hopper = capability(q.device) == 90  # its matrix units read shared memory, so registers hold more of everything else
    if gradients:
        # Beside the keys: queries and gradients of out, and probabilities on their way through shared memory.
        resident += rows * V0 * item
        block_k = 64 if hopper and rows == 128 else 32
    elif rows == 16:
        block_k *= 2
    limit = shared_memory(q.device)
    copies = 2 if inside or gradients else 1  # keys as they are and transposed, where no pipeline holds them
    while block_k > 16 and resident + (max(stages, copies) * depth + (2 if gradients else 1) * rows) * block_k * item > limit - 2048:
        if stages > 1 and block_k <= 32:
            stages -= 1
        else:
            block_k //= 2
    warps = 8 if rows == 128 or rows * max(D0 + D1, V0) >= 128 * 128 or D0 > 256 else 4
    registers = 128 if hopper and rows == 128 and not gradients else None
    return _Plan(D0, D1, V0, tile, block_h, block_k, stages, warps, registers, inside)


def _most_rows(q: Tensor, v_channels: int, gradients: bool = False) -> int:
    """Rows of a program's matrix products: more fill the matrix units better until registers run out."""
    wide = max(q.shape[3], v_channels)
    if wide > 256:
        rows = 32 if gradients or q.element_size() == 4 else 64
        return rows if shared_memory(q.device) > 128 << 10 else rows // 2
    if q.element_size() == 4:
        return 32
    return 128 if wide <= 128 else 64


def neighbours(q: Tensor, k: Tensor, v_channels: int, gradients: bool = False) -> int:
    """How many neighbouring queries share a union: 1 where the heads of one query fill a program by themselves."""
    heads = triton.next_power_of_2(q.shape[2] // k.shape[2])
    return max(1, min(_most_rows(q, v_channels, gradients) // heads, 32))


def _splits(programs: int, walk: int, block_k: int, device: torch.device) -> int:
    """Over how many programs a long walk is split where there are too few of them to fill the card."""
    return max(1, min(-(-2 * processors(device) // max(programs, 1)), walk // (4 * block_k), 64))


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(stride for x in tensors for stride in x.stride()[:3])


def _launch_forward(
    q: Tensor, k: Tensor, v: Tensor | None, sink: Tensor | None, out: Tensor, lse: Tensor, scale: float, plan: _Plan, mode: int, tiles: int,
    R: int = 1, reads: tuple[Tensor, ...] = (), interval: tuple[Tensor, ...] = (), first: int = 0, limit: int = 0, shared_tile: int = 0,
) -> None:  # fmt: skip
    B, T, H, D = q.shape
    S, G = k.shape[1:3]
    V = out.shape[3]
    values = k if v is None else v
    width = reads[0].shape[-1] if reads else 0
    list_, bits, counts = (*reads, *(q,) * (3 - len(reads)))
    start, end = interval or (q, q)
    heads = G * -(-(H // G) // plan.BLOCK_H)
    splits = 1
    if mode != UNION.value and not shared_tile:
        splits = _splits(tiles * heads, S if mode == DENSE.value else width, plan.BLOCK_K, q.device)
    into, into_lse = out, lse
    if splits > 1:
        into, into_lse = (torch.empty(splits, *x.shape, dtype=torch.float32, device=q.device) for x in (out, lse))
    grid = (tiles, heads, splits)
    forward[grid](
        q, k, values, into, into_lse, sink, list_, bits, counts, start, end,
        first, scale * LOG2E.value, T, S, tiles, width, limit, B * T * H, *_strides(q, k, values),
        H, G, R, D, plan.D0, plan.D1, V, plan.V0, plan.TILE, plan.BLOCK_H, plan.BLOCK_K, plan.STAGES, splits,
        mode, shared_tile, sink is not None and splits == 1, plan.VALUES_IN_KEYS, num_warps=plan.warps, maxnreg=plan.registers, enable_fp_fusion=True,
    )  # fmt: skip
    if splits > 1:
        wide = triton.next_power_of_2(splits)
        combine[(B * T * H,)](
            into, into_lse, out, lse, sink, B * T * H, H, V, plan.V0, splits, wide, sink is not None, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip


def _contiguous_channels(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(x if x is None or x.stride(-1) == 1 else x.contiguous() for x in tensors)


def attend(
    q: Tensor, k: Tensor, v: Tensor | None, indices: Tensor, v_channels: int, scale: float, sink: Tensor | None, workspace_mb: int
) -> tuple[Tensor, Tensor]:
    q, k, v, sink = _contiguous_channels(q, k, v, sink)  # type: ignore[assignment]
    B, T, H, _ = q.shape
    R, K = indices.shape[2:]
    out, lse = q.new_empty(B, T, H, v_channels), q.new_empty(B, T, H, dtype=torch.float32)
    if k.shape[1] == 0 or K == 0 or out.numel() == 0:
        return out.zero_(), lse.fill_(float("-inf"))
    indices = indices.to(torch.int32).contiguous()
    alone = _plan(q, k, v, v_channels, 1, False)
    tile = _shared_tile(q, k, v_channels, False)
    if tile == 1:
        _launch_forward(q, k, v, sink, out, lse, scale, alone, ROWS.value, B * T, R, (indices,))
        return out, lse
    plan = _plan(q, k, v, v_channels, tile, False)
    limit = int(LARGEST_UNION * tile * K)
    for part, keys, bits, counts in unions(indices, k.shape[1], tile, min(workspace_mb, UNION_MB), limit):
        n, first = part.stop - part.start, part.start
        _launch_forward(q, k, v, sink, out, lse, scale, plan, UNION.value, n, R, (keys, bits, counts), first=first, limit=limit)
        rest = ROWS.value, n * tile, R, (indices, bits, counts)
        _launch_forward(q, k, v, sink, out, lse, scale, alone, *rest, first=first, limit=limit, shared_tile=tile)
    return out, lse


def _shared_tile(q: Tensor, k: Tensor, v_channels: int, gradients: bool) -> int:
    """Queries a union, or 1 where there are too few of them to fill the card (decoding), or nothing to gain."""
    B, T = q.shape[:2]
    tile = neighbours(q, k, v_channels, gradients)
    return tile if tile <= T and B * T * k.shape[2] >= tile * processors(q.device) // 2 else 1


def attend_dense(
    q: Tensor, k: Tensor, v: Tensor | None, start: Tensor, end: Tensor, v_channels: int, scale: float, sink: Tensor | None, workspace_mb: int
) -> tuple[Tensor, Tensor]:
    q, k, v, sink = _contiguous_channels(q, k, v, sink)  # type: ignore[assignment]
    B, T, H, _ = q.shape
    out, lse = q.new_empty(B, T, H, v_channels), q.new_empty(B, T, H, dtype=torch.float32)
    if k.shape[1] == 0 or out.numel() == 0:
        return out.zero_(), lse.fill_(float("-inf"))
    plan = _plan(q, k, v, v_channels, _dense_tile(q, k, v_channels, False), False)
    interval = start.contiguous(), end.contiguous()
    _launch_forward(q, k, v, sink, out, lse, scale, plan, DENSE.value, B * tiles_of(T, plan.TILE), interval=interval)
    return out, lse


def _dense_tile(q: Tensor, k: Tensor, v_channels: int, gradients: bool) -> int:
    heads = triton.next_power_of_2(q.shape[2] // k.shape[2])
    return min(max(1, _most_rows(q, v_channels, gradients) // heads), triton.next_power_of_2(q.shape[1]))


class _Prepared(NamedTuple):
    """What every backward kernel reads."""

    grad: Tensor
    full: Tensor
    shift: Tensor
    dsink: Tensor


def _prepare(grad: Tensor, dlse: Tensor, out: Tensor, lse: Tensor, sink: Tensor | None) -> _Prepared:
    B, T, H, V = out.shape
    grad, sink = _contiguous_channels(grad, sink)  # type: ignore[assignment]
    full, shift = torch.empty(2, B, T, H, dtype=torch.float32, device=out.device)
    dsink = torch.empty(B, T, H if sink is not None else 0, dtype=torch.float32, device=out.device)
    V0 = max(16, triton.next_power_of_2(V))
    block = max(1, 4096 // V0)
    prepare[(triton.cdiv(B * T * H, block),)](
        out.contiguous(), grad, dlse.contiguous(), lse.contiguous(), sink, full, shift, dsink, *_strides(grad),
        T, B * T * H, H, V, V0, block, sink is not None, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    total = dsink.sum((0, 1)) if sink is None else dsink.sum((0, 1)).to(sink.dtype)
    return _Prepared(grad, full, shift, total)


def _factors(q: Tensor, v: Tensor, prepared: _Prepared, scale: float, shared: bool) -> Tensor:
    """Powers of two that turn the gradients of a key and of a value into integers: their largest possible sums become 2^62.

    shared: the keys' gradient holds the values' too.
    """

    def largest(x: Tensor) -> Tensor:
        return torch.linalg.vector_norm(x, float("inf"), dtype=torch.float32)

    rows = q.shape[1] * q.shape[2]
    grad = largest(prepared.grad)
    ds = grad * largest(v) * v.shape[3] + largest(prepared.shift)
    of_key, of_value = ds * largest(q) * abs(scale) * rows, grad * rows
    bounds = torch.stack((of_key + of_value if shared else of_key, of_value))
    exponent = (62 - bounds.log2()).floor().clamp(max=120)
    return torch.where(exponent.isfinite(), exponent, 24.0).exp2()


def _launch_backward(
    q: Tensor, k: Tensor, v: Tensor | None, p: _Prepared, dq: Tensor, dk: Tensor, dv: Tensor, factors: Tensor | None, scale: float, plan: _Plan,
    mode: int, tiles: int, R: int = 1, reads: tuple[Tensor, ...] = (), interval: tuple[Tensor, ...] = (), first: int = 0, limit: int = 0,
    shared_tile: int = 0,
) -> None:  # fmt: skip
    T, H, D = q.shape[1:]
    S, G = k.shape[1:3]
    values = k if v is None else v
    list_, bits, counts = (*reads, *(q,) * (3 - len(reads)))
    start, end = interval or (q, q)
    grid = (tiles, G * -(-(H // G) // plan.BLOCK_H))
    backward[grid](
        q, k, values, p.grad, p.full, p.shift, dq, dk, dv, factors, list_, bits, counts, start, end,
        first, scale * LOG2E.value, T, S, tiles, reads[0].shape[-1] if reads else 0, limit, *_strides(q, k, values, p.grad),
        H, G, R, D, plan.D0, plan.D1, p.grad.shape[3], plan.V0, plan.TILE, plan.BLOCK_H, plan.BLOCK_K, plan.STAGES,
        mode, shared_tile, plan.VALUES_IN_KEYS, factors is not None, num_warps=plan.warps, enable_fp_fusion=True,
    )  # fmt: skip


def attend_backward(
    grad: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    indices: Tensor,
    sink: Tensor | None,
    out: Tensor,
    lse: Tensor,
    v_channels: int,
    scale: float,
    workspace_mb: int,
) -> Gradients:
    """Gradients of q, k, v and sink (empty where there is none); k's holds the values' part where v is None."""
    q, k, v = _contiguous_channels(q, k, v)  # type: ignore[assignment]
    prepared = _prepare(grad, dlse, out, lse, sink)
    B, T = q.shape[:2]
    R, K = indices.shape[2:]
    dq = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    values = k[..., :v_channels] if v is None else v
    alone = _plan(q, k, v, v_channels, 1, True)
    exact = torch.are_deterministic_algorithms_enabled() and min(q.numel(), k.numel()) > 0
    factors = _factors(q, values, prepared, scale, alone.VALUES_IN_KEYS) if exact else None
    sums = torch.int64 if factors is not None else torch.float32
    dk = torch.zeros(k.shape, dtype=sums, device=k.device)
    dv = dk if alone.VALUES_IN_KEYS else torch.zeros(values.shape, dtype=sums, device=k.device)
    if k.shape[1] and K and q.numel():
        indices = indices.to(torch.int32).contiguous()
        tile = _shared_tile(q, k, v_channels, True)
        args = q, k, v, prepared, dq, dk, dv, factors, scale
        if tile == 1:
            _launch_backward(*args, alone, ROWS.value, B * T, R, (indices,))
        else:
            plan = _plan(q, k, v, v_channels, tile, True)
            limit = int(LARGEST_UNION * tile * K)
            for part, keys, bits, counts in unions(indices, k.shape[1], tile, min(workspace_mb, UNION_MB), limit):
                n, first = part.stop - part.start, part.start
                _launch_backward(*args, plan, UNION.value, n, R, (keys, bits, counts), first=first, limit=limit)
                _launch_backward(*args, alone, ROWS.value, n * tile, R, (indices, bits, counts), first=first, limit=limit, shared_tile=tile)
    if factors is not None:
        shared = dv is dk
        dk = dk / factors[0]
        dv = dk if shared else dv / factors[1]
    return _finish(dq, dk, dv, v, prepared)


def _finish(dq: Tensor, dk: Tensor, dv: Tensor, v: Tensor | None, prepared: _Prepared) -> Gradients:
    if v is not None:
        return dq, dk.to(dq.dtype), dv.to(dq.dtype), prepared.dsink
    if dv is not dk:
        dk[..., : dv.shape[3]] += dv
    return dq, dk.to(dq.dtype), dq.new_empty(0), prepared.dsink


def attend_dense_backward(
    grad: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    start: Tensor,
    end: Tensor,
    sink: Tensor | None,
    out: Tensor,
    lse: Tensor,
    v_channels: int,
    scale: float,
    workspace_mb: int,
) -> Gradients:
    """As `attend_backward`, over all visible keys."""
    q, k, v = _contiguous_channels(q, k, v)  # type: ignore[assignment]
    prepared = _prepare(grad, dlse, out, lse, sink)
    B, T, H, D = q.shape
    S, G = k.shape[1:3]
    start, end = start.contiguous(), end.contiguous()
    plan = _plan(q, k, v, v_channels, _dense_tile(q, k, v_channels, True), True)
    values = k[..., :v_channels] if v is None else v
    dq = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    dk = torch.zeros(k.shape, dtype=torch.float32 if v is None else k.dtype, device=k.device)
    dv = dk if plan.VALUES_IN_KEYS else torch.zeros(values.shape, dtype=dk.dtype, device=k.device)
    if S and q.numel():
        tiles = B * tiles_of(T, plan.TILE)
        _launch_backward(q, k, v, prepared, dq, dk, dv, None, scale, plan, DENSE.value, tiles, interval=(start, end))
        rows = 32 if plan.D0 + plan.V0 <= 512 else 16
        block_k = 64 if q.element_size() == 2 and plan.D0 + plan.V0 <= 256 else rows
        keys_plan = plan._replace(TILE=max(1, rows // plan.BLOCK_H), BLOCK_H=min(plan.BLOCK_H, rows), BLOCK_K=block_k)
        values = k if v is None else v
        backward_keys[(triton.cdiv(S, keys_plan.BLOCK_K), G, B)](
            q, k, values, prepared.grad, prepared.full, prepared.shift, dk, dv, start, end, scale * LOG2E.value, T, S,
            *_strides(q, k, values, prepared.grad),
            H, G, D, plan.D0, plan.D1, v_channels, plan.V0, keys_plan.TILE, keys_plan.BLOCK_H, keys_plan.BLOCK_K, plan.VALUES_IN_KEYS,
            num_warps=plan.warps, enable_fp_fusion=True,
        )  # fmt: skip
    return _finish(dq, dk, dv, v, prepared)
