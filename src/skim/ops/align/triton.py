"""Indexer alignment as Triton kernels for NVIDIA GPUs from sm_80 on: the loss and, with it, its gradients.

A program serves a tile of neighbouring queries and walks the keys that they see twice: once for the log-sum-exp of their
index scores, once for the loss and the gradients. What it walks is the interval of keys that the tile sees (dense) or the
union of its selections, with one bit a query and key (see attend/union.py).

Gradients of the keys are sums over queries. Over a union they are added up in memory. Over intervals that would be every key
once a tile, so a chunk of tiles leaves `softmax(I) - p` in the workspace instead, and programs that own keys sum over its
queries, always in the same order.

Keys are the rows of every tile of scores, and column `head * TILE + query` is one head of one query: so the sums over
heads stay within a thread, and what is one number a query and key lies alike wherever it is used.

With `g = softmax(I) - p` and `u = g * [q_j . k > 0]`, the gradients are `dq_j = w_j * sum_s u k`, `dk = sum_tj u w_j q_j`, and
that of the weights is `q_j . sum_s u k`: it costs no pass of its own.

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
from skim.ops.dispatch import capability
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
def _block(KEYS, BITS, at, end, start, stop, BLOCK: tl.constexpr, TILE: tl.constexpr, SPARSE: tl.constexpr):
    """The keys at positions `at` to `at + BLOCK` of what a tile walks: the keys, which of them are real, and who sees them `[BLOCK, TILE]`."""
    slot = at + tl.arange(0, BLOCK)
    real = slot < end
    if SPARSE:
        key = tl.load(KEYS + slot, mask=real, other=0)
        bits = tl.load(BITS + slot, mask=real, other=0)
        sees = ((bits[:, None] >> tl.arange(0, TILE)[None, :]) & 1) != 0
    else:
        key = slot
        sees = (slot[:, None] >= start[None, :]) & (slot[:, None] < stop[None, :])
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
def _target(
    Q, K, LSE, t, ok, key, real, scale, q_t, q_h, k_s, k_g,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Mean over the heads of the attention's softmax, `[BLOCK, TILE]`: HEADS query heads of one key head at a time."""
    tile: tl.constexpr = t.shape[0]
    group: tl.constexpr = H // G
    parts: tl.constexpr = (group + HEADS - 1) // HEADS
    columns: tl.constexpr = HEADS * tile
    t = tl.reshape(tl.broadcast_to(t[None, :], [HEADS, tile]), [columns])
    ok = tl.reshape(tl.broadcast_to(ok[None, :], [HEADS, tile]), [columns])
    d = tl.arange(0, BLOCK_D)
    p = tl.zeros([BLOCK, tile], tl.float32)
    for part in tl.range(0, G * parts, num_stages=STAGES):
        g = tl.full([], part // parts, tl.int64)
        head = part % parts * HEADS + tl.arange(0, columns) // tile
        some = ok & (head < group)
        head += g * group
        dots = tl.zeros([BLOCK, columns], tl.float32)
        for c in tl.range(0, D, BLOCK_D, num_stages=STAGES):
            inside = (c + d < D)[None, :]
            k = tl.load(K + key[:, None] * k_s + g * k_g + (c + d)[None, :], mask=real[:, None] & inside, other=0.0)
            q = tl.load(Q + t[:, None] * q_t + head[:, None] * q_h + (c + d)[None, :], mask=some[:, None] & inside, other=0.0)
            dots = tl.dot(k, tl.trans(q), dots, input_precision="ieee")
        lse = tl.load(LSE + t * H + head, mask=some, other=float("inf"))
        p += _head_sum(tl.exp2(dots * scale - lse[None, :]), tile)
    return p


@triton.jit
def kernel(
    Q, K, Q_INDEX, K_INDEX, K_FINITE, W, LSE, START, STOP, SEEN, KEYS, BITS, COUNTS, LOSS, DQ, DK, UNIT,
    GAPS, first, scale, T, S, tiles_of_row, capacity,
    q_b, q_t, q_h, k_b, k_s, k_g, i_b, i_t, i_j,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, J: tl.constexpr, E: tl.constexpr, J_: tl.constexpr, E_: tl.constexpr,
    TILE: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr, BLOCK_D: tl.constexpr, GAIN: tl.constexpr, SPARSE: tl.constexpr,
):  # fmt: skip
    """Of one tile of queries: LOSS in bits, DQ `sum_s u k`, and what the keys' gradients need.

    Sparse: its part of DK, added up in float32 or as multiples of 1 / UNIT in int64. Dense: its g in GAPS, a row of S a query.

    Exponents are of two: scale and LSE come times log2(e), LSE with log2(H) added, which makes the head sum a mean. W holds
    the index scores' factors, zero where a query sees nothing; GAIN scales u, for float16.
    """
    tile = first + tl.num_programs(0) - 1 - tl.program_id(0)  # dense: the longest first
    b = (tile // tiles_of_row).to(tl.int64)
    t = (tile % tiles_of_row * TILE + tl.arange(0, TILE)).to(tl.int64)
    ok = t < T
    if SPARSE:
        row = (tile - first).to(tl.int64)
        start, stop = t, t
        low, high = 0, tl.load(COUNTS + row)
        KEYS += row * capacity
        BITS += row * capacity
    else:
        start = tl.load(START + b * T + t, mask=ok, other=S)
        stop = tl.load(STOP + b * T + t, mask=ok, other=0)
        low = tl.maximum(tl.min(tl.where(start < stop, start, S)), 0)
        high = tl.minimum(tl.max(tl.where(start < stop, stop, 0)), S)
    Q += b * q_b
    K += b * k_b
    LSE += b * T * H
    K_INDEX += b * S * E
    K_FINITE += b * S * E

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
    for at in tl.range(low, high, BLOCK, num_stages=STAGES):
        key, real, sees = _block(KEYS, BITS, at, high, start, stop, BLOCK, TILE, SPARSE)
        dots = tl.dot(_index_keys(K_INDEX, key, real, E, E_), qt, input_precision="ieee")
        scores = tl.where(sees, _index_scores(dots, w2, TILE), float("-inf"))
        rest = tl.exp2(-tl.abs(scores - largest))
        total = tl.where(scores > largest, total * rest + 1, total + rest)
        largest = tl.maximum(scores, largest)
    top = tl.max(largest, 0)
    index_lse = top + tl.log2(tl.sum(total * tl.exp2(largest - top[None, :]), 0))

    if SPARSE:
        DK += b * S * E
        wq = (w[:, None] * q).to(q.dtype)
    else:
        GAPS += ((tile - first) * TILE + tl.arange(0, TILE)).to(tl.int64)[None, :] * S
    dq = tl.zeros([E_, columns], tl.float32)
    loss = tl.zeros([BLOCK], tl.float32)
    for at in tl.range(low, high, BLOCK):
        key, real, sees = _block(KEYS, BITS, at, high, start, stop, BLOCK, TILE, SPARSE)
        k = _index_keys(K_FINITE, key, real, E, E_)  # on its way while the target is made
        p = _target(Q, K, LSE, t, ok, key, real, scale, q_t, q_h, k_s, k_g, H, G, D, HEADS, BLOCK_D, BLOCK)
        dots = tl.dot(k, qt, input_precision="ieee")
        log_q = _index_scores(dots, w2, TILE) - index_lse[None, :]
        loss += tl.sum(tl.where(sees & (p != 0), p * (tl.log2(p) - log_q), 0.0), 1)
        g = tl.where(sees, tl.exp2(log_q) - p, 0.0) * GAIN
        u = _of_heads(dots, g, J_).to(k.dtype)
        dq = tl.dot(tl.trans(k), u, dq, input_precision="ieee")
        if SPARSE:
            dk = tl.dot(u, wq, input_precision="ieee")
            if DK.dtype.element_ty == tl.int64:
                dk = tl.floor(dk * tl.load(UNIT) + 0.5).to(tl.int64)
            tl.atomic_add(DK + key[:, None] * E + e[None, :], dk, mask=real[:, None] & (e[None, :] < E), sem="relaxed")
        else:
            tl.store(GAPS + key[:, None], g.to(GAPS.dtype.element_ty), mask=real[:, None] & ok[None, :])

    tl.store(LOSS + tile, tl.sum(loss))
    dq = tl.trans(dq)
    tl.store(DQ + ((b * T + t_of) * J + j)[:, None] * E + e[None, :], dq, mask=some[:, None] & (e[None, :] < E))


@triton.jit
def key_gradients(
    GAPS, Q_INDEX, K_FINITE, W, START, STOP, SEEN, PARTS, first, last, T, S, tiles_of_row, across,
    i_b, i_t, i_j,
    J: tl.constexpr, E: tl.constexpr, J_: tl.constexpr, E_: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
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
    columns: tl.constexpr = J_ * TILE
    j = (tl.arange(0, columns) // TILE).to(tl.int64)
    e = tl.arange(0, E_)
    k = _index_keys(K_FINITE + b * S * E, key, real, E, E_)
    dk = tl.zeros([BLOCK, E_], tl.float32)
    for tile in range(low, high):
        t = (tile - row) * TILE + tl.arange(0, TILE)
        start = tl.load(START + b * T + t, mask=t < T, other=S)
        stop = tl.load(STOP + b * T + t, mask=t < T, other=0)
        if tl.max(((start < stop) & (start < nearest + BLOCK) & (stop > nearest)).to(tl.int32), 0) > 0:
            sees = real[:, None] & (key[:, None] >= start[None, :]) & (key[:, None] < stop[None, :])
            g = tl.load(GAPS + ((tile - first) * TILE + tl.arange(0, TILE)).to(tl.int64)[None, :] * S + key[:, None], mask=sees, other=0.0)
            t_of = ((tile - row) * TILE + tl.arange(0, columns) % TILE).to(tl.int64)
            some = (t_of < T) & (j < J)
            seen = some & (tl.load(SEEN + b * T + t_of, mask=some, other=0) != 0)
            q = tl.load(Q_INDEX + b * i_b + t_of[:, None] * i_t + j[:, None] * i_j + e[None, :], mask=seen[:, None] & (e[None, :] < E), other=0.0)
            w = tl.load(W + (b * T + t_of) * J + j, mask=some, other=0.0)
            dots = tl.dot(k, tl.trans(q), input_precision="ieee")
            dk = tl.dot(_of_heads(dots, g, J_).to(k.dtype), (w[:, None] * q).to(q.dtype), dk, input_precision="ieee")
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


def _tiles(q: Tensor, k: Tensor, q_index: Tensor) -> Tiles:
    """The largest tiles that fit the registers; their columns are the heads of all their queries, in the indexer and in the attention."""
    J, E = (triton.next_power_of_2(n) for n in q_index.shape[2:])
    hopper = capability(q.device) == 90  # its matrix units take operands from shared memory, the others' from registers
    exact = max(q.itemsize, q_index.itemsize) == 4  # products of float32, without matrix units
    columns = 32 if exact else 128 if hopper and J >= 64 and E <= 128 else max(16, min(64, 8192 // E))
    queries = max(1, min(16, columns // J))
    heads = max(16 // queries, min(triton.next_power_of_2(q.shape[2] // k.shape[2]), columns // queries))
    warps = 8 if E * max(J, columns) > 4096 else 4
    return Tiles(queries, 64 if hopper and not exact else 32, heads, min(64, max(16, triton.next_power_of_2(q.shape[3]))), warps)


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
    (B, T, H, D), (S, G), (J, E) = q.shape, k.shape[1:3], q_index.shape[2:]
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
    finite = keys.nan_to_num(0.0, 0.0, 0.0) if indices is None else keys  # an interval may hold keys that none of a tile's queries sees
    weight_scale = J**-0.5 * E**-0.5
    w = torch.where(seen[..., None], weights.float() * weight_scale, 0.0).contiguous()
    gain = 2.0**15 if both == torch.float16 else 1.0  # most of softmax - p, which is at most 1, is too small for float16
    tile = _tiles(q, k, query)
    tiles, all_tiles = tiles_of(T, tile.queries), B * tiles_of(T, tile.queries)
    loss = torch.empty(all_tiles, dtype=torch.float32, device=q.device)
    dq = torch.empty(B, T, J, E, dtype=torch.float32, device=q.device)
    padded = J, E, triton.next_power_of_2(J), max(16, triton.next_power_of_2(E))

    def launch(part: slice, dk: Optional[Tensor], unit: Optional[Tensor], gaps: Optional[Tensor], union: tuple[Optional[Tensor], ...]) -> None:
        kernel[(part.stop - part.start,)](
            q, k, query, keys, finite, w, lse, start, end, seen, *union, loss, dq, dk, unit, gaps,
            part.start, scale * LOG2E.value, T, S, tiles, 0 if union[0] is None else union[0].shape[-1],
            *q.stride()[:3], *k.stride()[:3], *query.stride()[:3], H, G, D, *padded,
            tile.queries, tile.keys, tile.heads, tile.channels, gain, union[0] is not None, num_warps=tile.warps, enable_fp_fusion=True,
        )  # fmt: skip

    if indices is None:
        parts, left = _sums(keys, workspace_mb)
        for part in chunks(all_tiles, tile.queries * S * keys.itemsize, left):
            gaps = torch.empty((part.stop - part.start) * tile.queries, S, dtype=both, device=q.device)
            launch(part, None, None, gaps, (None, None, None))
            across = triton.cdiv(min(tiles, part.stop - part.start), len(parts))
            key_gradients[(triton.cdiv(S, tile.keys), len(parts), B)](
                gaps, query, finite, w, start, end, seen, parts, part.start, part.stop, T, S, tiles, across,
                *query.stride()[:3], *padded, tile.queries, tile.keys, num_warps=tile.warps, enable_fp_fusion=True,
            )  # fmt: skip
        dk = parts.sum(0)
    else:
        unit = _unit(query, w, seen, gain) if torch.are_deterministic_algorithms_enabled() else None
        dk = torch.zeros(B, S, E, dtype=torch.float32 if unit is None else torch.int64, device=q.device)
        for part, selected, bits, counts in unions(indices[:, :, None].contiguous(), S, tile.queries, workspace_mb):
            launch(part, dk, unit, None, (selected, bits, counts))
        if unit is not None:
            dk = dk / unit + 0 * loss.sum()  # no integer is NaN
    total = loss.sum() * log(2) / rows
    dq /= rows * gain
    dw = torch.where(seen[..., None], torch.linalg.vecdot(dq, query.float()) * weight_scale, 0.0)
    dq, dk = dq * w[..., None], dk / (rows * gain)
    return total, dq.to(unscaled(q_index.dtype)), dk.to(unscaled(k_index.dtype)), dw.to(unscaled(weights.dtype))


def _sums(keys: Tensor, workspace_mb: int) -> tuple[Tensor, int]:
    """Zeros `[parts, B, S, E]` for the keys' gradients, and how many MiB of the workspace are left: what all parts but one take is half at most."""
    size = 4 * keys.numel()
    more = min(PARTS - 1, (workspace_mb << 19) // max(1, size))
    return torch.zeros(1 + more, *keys.shape, dtype=torch.float32, device=keys.device), workspace_mb - (more * size >> 20)


def _unit(q: Tensor, w: Tensor, seen: Tensor, gain: float) -> Tensor:
    """A power of two that makes the keys' gradients, at most `gain * |w q|` a head and query, integers of 61 bits."""
    largest = torch.where(seen, w.abs().amax(-1) * q.abs().amax((-2, -1)), 0.0).amax() * (gain * w[0].numel())
    return torch.exp2(torch.floor(61 - torch.log2(largest.clamp(min=2.0**-40))))
