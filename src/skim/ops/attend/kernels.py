"""Attention over selected keys, and over all visible keys, as Triton kernels; triton.py beside this file launches them.

A program serves a tile of neighbouring queries with the heads of one key head as the rows of its matrix products, and
walks the keys that they read in blocks. What it walks is one of three things:

- ROWS: the selection of a single query (one query a tile);
- UNION: the union of the tile's selections (see union.py), with one bit a query and key that says who reads it;
- DENSE: the interval of keys that the tile sees. The forward has a kernel of its own for it: neighbouring queries need not
  fill a power of two, and blocks that all rows see whole take no mask.

UNION gathers a key once for all its neighbours, which is 5 times less where selections overlap as real ones do. Where
they don't it only multiplies the arithmetic, so a tile whose union is larger than half its selections together is left
to ROWS; programs decide that by themselves, without the host.

Latents in 656 bytes (see packed.py) are gathered as bytes and dequantised in registers.

A NaN in a key that one query of a tile reads may reach its neighbours, and so may one between the intervals of a tile's
queries; keys that no query reads may hold anything otherwise.
"""

from __future__ import annotations

import triton
import triton.language as tl

ROWS, UNION, DENSE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
LOG2E = tl.constexpr(1.4426950408889634)


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
def _walk(COUNTS, START, END, tile, first, b, t, T, S, width, selection, R: tl.constexpr, MODE: tl.constexpr):
    """What a tile walks: the interval that each of its rows sees (DENSE), from where to where, and which list (ROWS, UNION)."""
    low, high = t, t
    begin, end = 0, width
    if MODE == UNION:
        list_row = ((tile - first) * R + selection).to(tl.int64)
        end = tl.load(COUNTS + list_row)
    elif MODE == ROWS:
        list_row = tile.to(tl.int64) * R + selection
    else:
        low = tl.load(START + b * T + t, mask=t < T, other=S)
        high = tl.minimum(tl.load(END + b * T + t, mask=t < T, other=0), S)  # keys behind the last would count as zeros
        seen = low < high
        begin = tl.maximum(tl.min(tl.where(seen, low, S)), 0)
        end = tl.max(tl.where(seen, high, 0))
        list_row = b
    return low, high, begin, end, list_row


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
        return tl.load(pointer, mask=real[:, None], other=0)
    return tl.load(pointer, mask=real[:, None] & (c[None, :] < SIZE), other=0)


@triton.jit
def _e4m3(code, CAST: tl.constexpr):
    """float32 of FP8 codes in uint8. CAST: by the instructions that there are from sm_89 on."""
    if CAST:
        return code.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    bits = code.to(tl.int32)
    size = ((bits & 0x7F) << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36  # the exponent's bias goes from 127 to 7
    size = tl.where((bits & 0x7F) == 0x7F, float("nan"), size)
    return (size.to(tl.int32, bitcast=True) | ((bits & 0x80) << 24)).to(tl.float32, bitcast=True)


@triton.jit
def _latents(K, SCALES, offset, real, stride, dtype: tl.constexpr, SIZE: tl.constexpr, SHARED: tl.constexpr, CAST: tl.constexpr):
    """The SIZE values of packed rows at `offset`, SHARED of which share a scale: `[rows, SIZE]`. `stride` is of bytes."""
    rows: tl.constexpr = offset.shape[0]
    x = _e4m3(_channels(K, offset, real, stride, 0, SIZE, SIZE), CAST)
    scale = _channels(SCALES, offset, real, stride // 4, 0, SIZE // SHARED, SIZE // SHARED)
    scaled = tl.reshape(x, (rows, SIZE // SHARED, SHARED)) * scale[:, :, None]
    return tl.reshape(scaled, (rows, SIZE)).to(dtype)


@triton.jit
def _dot(a, b, acc=None):
    """a @ b in float32: exact products for float32 inputs too."""
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _store(OUT, LSE, SINK, row, h, ok, largest, total, acc, V_: tl.constexpr, V0: tl.constexpr, HAS_SINK: tl.constexpr):
    """out and lse of rows whose scores have the maxima `largest`, the sums of exponentials `total` and of values `acc`."""
    empty = total == 0
    lse = tl.where(empty, float("-inf"), (largest + tl.log2(total)) / LOG2E)
    factor = tl.where(empty, 0.0, 1 / total)
    if HAS_SINK:
        sink = tl.load(SINK + h, mask=ok, other=0.0).to(tl.float32)
        factor = tl.where(empty, 0.0, factor / (1 + tl.exp2((sink - lse) * LOG2E)))
    c = tl.arange(0, V0)
    tl.store(LSE + row, lse, mask=ok)
    out = tl.where(empty[:, None], 0.0, acc * factor[:, None])  # what neighbours read, even NaN, stays with them
    tl.store(OUT + row[:, None] * V_ + c[None, :], out.to(OUT.dtype.element_ty), mask=ok[:, None] & (c[None, :] < V_))


@triton.jit
def forward(
    Q, K, V, SCALES, ROPE, OUT, LSE, SINK, READS, BITS, COUNTS,
    first, scale, T, S, tiles, width, limit, rows,
    q_b, q_t, q_h, k_b, k_s, k_g, v_b, v_s, v_g,
    H: tl.constexpr, G: tl.constexpr, R: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, V_: tl.constexpr, V0: tl.constexpr,
    TILE: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, SPLITS: tl.constexpr,
    MODE: tl.constexpr, SHARED_TILE: tl.constexpr, HAS_SINK: tl.constexpr, VALUES_IN_KEYS: tl.constexpr, SHARED_SCALE: tl.constexpr,
    CAST: tl.constexpr,
):  # fmt: skip
    """out and lse of one tile, key head, block of its query heads and split of its keys: program (tile, heads, split).

    READS `[.., width]` holds what a tile walks (ROWS: indices, UNION: keys of the union, with BITS and COUNTS). With SPLITS > 1 out
    is float32 `[SPLITS, B * T, H, V]` and lse alike (`rows` = B * T * H apart), for `combine`. SHARED_SCALE > 0: keys are packed latents
    (K their codes, k_b and k_s in bytes), so many channels with one scale.
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
    low, high, begin, end, list_row = _walk(COUNTS, None, None, tile, first, b, t, T, S, width, selection, R, MODE)
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
    if SHARED_SCALE > 0:
        SCALES += b * (k_b // 4)
        ROPE += b * (k_b // 2)
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
        if SHARED_SCALE > 0:
            k0 = _latents(keys, SCALES, key, real, k_s, q0.dtype, D0, SHARED_SCALE, CAST)
            k1 = _channels(ROPE, key, real, k_s // 2, 0, D1, D1).to(q0.dtype)
        else:
            k0 = _channels(keys, key, real, k_s, 0, D0, D)
            if D1 > 0:
                k1 = _channels(keys, key, real, k_s, D0, D1, D)
        s = _dot(q0, tl.trans(k0))
        if D1 > 0:
            s = _dot(q1, tl.trans(k1), s)
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

    row = (b * T + t) * H + h
    if SPLITS > 1:
        row += split.to(tl.int64) * rows
    _store(OUT, LSE, SINK, row, h, ok, largest, total, acc, V_, V0, HAS_SINK)


@triton.jit
def forward_dense(
    Q, K, V, SCALES, ROPE, OUT, LSE, SINK, START, END, scale, T, S, tiles, rows,
    q_b, q_t, q_h, k_b, k_s, k_g, v_b, v_s, v_g,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, V_: tl.constexpr, V0: tl.constexpr,
    TILE: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, SPLITS: tl.constexpr,
    HAS_SINK: tl.constexpr, VALUES_IN_KEYS: tl.constexpr, SHARED_SCALE: tl.constexpr, CAST: tl.constexpr,
):  # fmt: skip
    """As `forward`, over intervals: program (tile and key head, split). Matrix rows are pairs of query and head without gaps between queries.

    Only blocks that some row doesn't see whole are masked.
    """
    HEADS: tl.constexpr = H // G
    g = (tl.program_id(0) % G).to(tl.int64)
    tile = tiles - 1 - tl.program_id(0) // G  # the longest first
    split = tl.program_id(1)
    tiles_of_row = tl.cdiv(T * HEADS, TILE)
    b = (tile // tiles_of_row).to(tl.int64)
    pair = tile % tiles_of_row * TILE + tl.arange(0, TILE)
    t, h = pair // HEADS, g * HEADS + pair % HEADS
    ok = t < T
    low = tl.load(START + b * T + t, mask=ok, other=0)
    high = tl.minimum(tl.load(END + b * T + t, mask=ok, other=S), S)  # keys behind the last would count as zeros
    seen = ok & (low < high)
    begin = tl.maximum(tl.min(tl.where(seen, low, S)), 0)
    end = tl.max(tl.where(seen, high, 0))
    whole_from, whole_to = tl.max(low), tl.min(high)  # every row sees the keys between
    if SPLITS > 1:
        share = tl.cdiv(tl.cdiv(tl.maximum(end - begin, 0), SPLITS), BLOCK_K) * BLOCK_K
        begin += split * share
        end = tl.minimum(end, begin + share)

    q_row = Q + b * q_b + t.to(tl.int64)[:, None] * q_t + h[:, None] * q_h
    c0 = tl.arange(0, D0)
    q0 = tl.load(q_row + c0[None, :], mask=ok[:, None] & (c0[None, :] < D), other=0.0)
    if D1 > 0:
        c1 = D0 + tl.arange(0, D1)
        q1 = tl.load(q_row + c1[None, :], mask=ok[:, None] & (c1[None, :] < D), other=0.0)
    keys = K + b * k_b + g * k_g
    values = V + b * v_b + g * v_g
    if SHARED_SCALE > 0:
        SCALES += b * (k_b // 4)
        ROPE += b * (k_b // 2)

    largest = tl.full([TILE], -1e30, tl.float32)
    total = tl.zeros([TILE], tl.float32)
    acc = tl.zeros([TILE, V0], tl.float32)
    for at in tl.range(begin, end, BLOCK_K, num_stages=STAGES):
        slot = at + tl.arange(0, BLOCK_K)
        real = slot < end
        key = slot.to(tl.int64)
        if SHARED_SCALE > 0:
            k0 = _latents(keys, SCALES, key, real, k_s, q0.dtype, D0, SHARED_SCALE, CAST)
            k1 = _channels(ROPE, key, real, k_s // 2, 0, D1, D1).to(q0.dtype)
        else:
            k0 = _channels(keys, key, real, k_s, 0, D0, D)
            if D1 > 0:
                k1 = _channels(keys, key, real, k_s, D0, D1, D)
        s = _dot(q0, tl.trans(k0))
        if D1 > 0:
            s = _dot(q1, tl.trans(k1), s)
        if SHARED_SCALE > 0 or (at < whole_from) | (at + BLOCK_K > whole_to):  # packed keys leave no registers to choose
            s = tl.where((slot[None, :] >= low[:, None]) & (slot[None, :] < high[:, None]), s, float("-inf"))
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

    row = (b * T + t) * H + h
    if SPLITS > 1:
        row += split.to(tl.int64) * rows
    _store(OUT, LSE, SINK, row, h, ok, largest, total, acc, V_, V0, HAS_SINK)


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
    low, high, begin, end, list_row = _walk(COUNTS, START, END, tile, first, b, t, T, S, width, selection, R, MODE)

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
