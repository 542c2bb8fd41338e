"""Index scores in Triton: `I[t, s] = sum_j w[t, j] * J^-1/2 * E^-1/2 * ReLU(q[t, j] . k[s])`.

One tile, scores `[BN keys, BQ queries]`, is made by one matrix product of a shape that only the heads, the channels and
the dtype decide. So a token scores bitwise the same in a prefill, in a chunk of it and in a decoding step, here and in
the selection, which makes its scores by the same functions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from skim.ops.dispatch import capability, interpreted, shared_memory
from skim.ops.score.pages import in_one_piece, length
from skim.ops.score.weights import head_weights

PROGRAMS = 264  # as many as fill a large card twice: where there are fewer tiles of queries, the keys are split
CHANNELS = 512
INTERPRETED = tl.constexpr(interpreted())


@dataclass(frozen=True)
class Tile:
    """The shape in which scores are made: `BN` keys by `BQ` queries of `BJ` heads at a time, `HEADS` times; `BE` channels."""

    BN: int
    BQ: int
    BJ: int
    BE: int
    HEADS: int
    WARPS: int
    stages: int

    @classmethod
    def of(cls, q: Tensor) -> Tile:
        """The tile for queries `[B, T, J, E]`."""
        T, J, E = q.shape[1:]
        limit = shared_memory(q.device)
        BE = max(triton.next_power_of_2(E), 32 if q.itemsize == 1 else 16)
        wide = 90 <= capability(q.device) < 120  # matrix units that read both operands from shared memory
        BN, columns = (32, 32) if q.dtype == torch.float32 else (128, 128 if wide else 64)  # float32 has none: its products lie in registers
        blocks = 1 if columns >= J else 2  # further heads are loaded beside the first
        while q.itemsize * BE * (BN + blocks * columns) > limit - 2048:
            BN, columns = BN // 2, columns // 2
            blocks = 1 if columns >= J else 2
        BJ = min(columns, triton.next_power_of_2(J))
        # Fewer queries in the same order: a thread sums heads as before. Products narrower than 16 columns go another way.
        BQ = min(columns // BJ, 16 if T > 4 else max(4, 16 // BJ))
        # Keys that fit beside the queries: in half of the memory, so that two programs share a multiprocessor, and in all of it.
        fitting = [(part - 2048) // (q.itemsize * BE) - BQ * BJ for part in (limit // 2, limit)]
        stages = min(3, max(fitting[0] // BN, min(2, fitting[1] // BN))) if blocks == 1 else 1
        warps = 8 if q.itemsize * BE > 256 and columns == 128 else 4  # two programs of 4 share a multiprocessor, where memory suffices for two
        if q.dtype == torch.float32:  # four products a thread, so that it has pairs of heads: Triton sums heads of scattered threads wrongly
            warps = min(8, BN * BQ * BJ // 128)
        return cls(BN, BQ, BJ, BE, triton.cdiv(J, BJ), warps, stages)

    @property
    def constants(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in ("BN", "BQ", "BJ", "BE", "HEADS")}


@dataclass(frozen=True)
class Keys:
    """Index keys as the kernels read them: where they lie, in rows or in pages, in the dtype of the queries or in FP8."""

    k: Tensor
    scale: Tensor | None
    block_table: Tensor | None

    @property
    def pointers(self) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, scales and block table; what there is not is another tensor, which nothing reads."""
        return self.k, self.k if self.scale is None else self.scale, self.k if self.block_table is None else self.block_table

    @property
    def strides(self) -> tuple[int, ...]:
        """Of keys, in units, and of scales: from one batch row or page, and from one key, to the next."""
        return *(stride // self._unit for stride in self.k.stride()[:2]), *((0, 0) if self.scale is None else self.scale.stride())

    @property
    def constants(self) -> dict[str, int | bool]:
        """PAGE is 0 where keys lie in rows."""
        return {"SCALED": self.scale is not None, "PAGE": 0 if self.block_table is None else self.k.shape[1], "UNIT": self._unit}

    @property
    def _unit(self) -> int:
        """Rows of 132 bytes lie at multiples of four, which a compiler doesn't know of a stride in bytes: it would read byte by byte."""
        strides = self.k.stride()[:2]
        return 4 if self.k.itemsize == 1 and any(x % 16 for x in strides) and not any(x % 4 for x in strides) else 1


def operands(q: Tensor, k: Tensor, k_scale: Tensor | None, block_table: Tensor | None) -> tuple[Tensor, Keys]:
    """q in a dtype that the matrix units have, and the keys: in FP8, which kernels widen (exactly) if q isn't, or in q's dtype.

    Where many queries read the keys, both have a multiple of 16 channels, the last of them zeros: other rows are loaded channel by channel.
    """
    eight = torch.float8_e4m3fn
    has_eight = INTERPRETED or capability(q.device) >= 89
    if q.dtype == eight and (INTERPRETED or not has_eight or k.dtype != eight):
        q = q.to(k.dtype if k.dtype != eight else torch.float32 if INTERPRETED else torch.bfloat16)
    if q.dtype != k.dtype and not (k.dtype == eight and has_eight):
        dtype = q.dtype if k.dtype == eight else torch.promote_types(q.dtype, k.dtype)
        k, k_scale = in_one_piece(k, k_scale, block_table)
        q, k, block_table = q.to(dtype), k.to(dtype), None
    if q.shape[3] % 16 and q.shape[1] > 16:  # as many queries as a tile has at most: with more, each key is loaded more than once
        k, k_scale = in_one_piece(k, k_scale, block_table)
        q, k, block_table = pad(q, (0, -q.shape[3] % 16)), pad(k, (0, -k.shape[2] % 16)), None
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    return q, Keys(k, None if k_scale is None else k_scale.float(), block_table)


@triton.jit
def column_query(BQ: tl.constexpr, BJ: tl.constexpr):
    """Which query and which head stands in each column of the product, `[BQ * BJ]`.

    Matrix units leave a thread two neighbouring columns of each eight. In this order those are heads of one query and the
    threads beside it hold other queries, so that heads are summed inside a thread.
    """
    PAIR: tl.constexpr = min(2, BJ)
    NEAR: tl.constexpr = min(4, BQ)
    column = tl.arange(0, BQ * BJ)
    query = column // (NEAR * BJ) * NEAR + column // PAIR % NEAR
    head = column // (PAIR * NEAR) % (BJ // PAIR) * PAIR + column % PAIR
    return query, head


@triton.jit
def load_queries(Q, W, stride_t, stride_j, t0, T, J, E, block, BQ: tl.constexpr, BJ: tl.constexpr, BE: tl.constexpr):
    """A block of heads of the queries t0, t0 + 1, ...: `[BQ * BJ, BE]`, and their weights `[BQ * BJ]`; Q, W of one batch row."""
    query, head = column_query(BQ, BJ)
    t, j, e = (t0 + query).to(tl.int64), (block * BJ + head).to(tl.int64), tl.arange(0, BE)
    real = (t < T) & (j < J)
    q = tl.load(Q + (t * stride_t + j * stride_j)[:, None] + e[None, :], mask=real[:, None] & (e < E)[None, :], other=0.0)
    return q, tl.load(W + t * J + j, mask=real, other=0.0)


@triton.jit
def by_query(x, BN: tl.constexpr, BQ: tl.constexpr, BJ: tl.constexpr):
    """`[BN, BQ * BJ]`, in the order of `column_query`, as `[BN, BQ, BJ]`."""
    PAIR: tl.constexpr = min(2, BJ)
    NEAR: tl.constexpr = min(4, BQ)
    x = tl.permute(tl.reshape(x, [BN, BQ // NEAR, BJ // PAIR, NEAR, PAIR]), [0, 1, 3, 2, 4])
    return tl.reshape(x, [BN, BQ, BJ])


@triton.jit
def add_product(x, w, y, v):
    """x * w + y * v, and 1, the factor of a sum: so it's said which product is rounded, and no kernel's compiler chooses the other."""
    return tl.fma(y, v, x * w), tl.full([], 1.0, tl.float32)


@triton.jit
def sum_heads(q, w, k, head, J, BN: tl.constexpr, BQ: tl.constexpr, BJ: tl.constexpr, PADDED: tl.constexpr):
    """`sum_j w * ReLU(q . k)` over a block of heads: `[BN, BQ]`."""
    dots = tl.dot(k, tl.trans(q), input_precision="ieee")
    if q.dtype == tl.float8e4nv:  # these products are finite, so x + |x| is twice ReLU(x); additions run at twice the rate of maxima
        dots, w = dots + tl.abs(dots), 0.5 * w
    else:
        dots = tl.maximum(dots, 0.0, propagate_nan=tl.PropagateNan.ALL)
    if PADDED:  # infinite keys have NaN products with heads that aren't there
        dots = tl.where((head < J)[None, :], dots, 0.0)
    dots, w = by_query(dots, BN, BQ, BJ), by_query(tl.broadcast_to(w[None, :], [BN, BQ * BJ]), BN, BQ, BJ)
    if INTERPRETED or BJ == 1:  # an interpreter would add one number at a time; one product needs no sum
        return tl.sum(dots * w, 2)
    else:
        return tl.reduce((dots, w), 2, add_product)[0]


@triton.jit
def keys_of(K, K_SCALE, TABLE, b, stride_kb, stride_sb, S, PAGE: tl.constexpr, UNIT: tl.constexpr):
    """Pointers to the keys and scales of batch row b, or, where they lie in pages, to its row of the block table."""
    if PAGE > 0:
        return K, K_SCALE, TABLE + b.to(tl.int64) * (S // PAGE)
    else:
        return K + b.to(tl.int64) * (stride_kb * UNIT), K_SCALE + b.to(tl.int64) * stride_sb, TABLE


@triton.jit
def score_tile(
    q, w, Q, W, K, K_SCALE, TABLE, key, real, stride_qt, stride_qj, stride_kb, stride_ks, stride_sb, stride_ss, t0, T, J, E,
    BN: tl.constexpr, BQ: tl.constexpr, BJ: tl.constexpr, BE: tl.constexpr, HEADS: tl.constexpr, PADDED: tl.constexpr, SCALED: tl.constexpr,
    PAGE: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Scores of the keys `key` `[BN]`, where `real`, for the queries t0, t0 + 1, ...: `[BN, BQ]`.

    q, w are the queries' first block of heads, from `load_queries`; all pointers are of one batch row, those of the keys from `keys_of`.
    """
    e = tl.arange(0, BE)
    if PAGE > 0:
        page, slot = tl.load(TABLE + key // PAGE, mask=real, other=0).to(tl.int64), (key % PAGE).to(tl.int64)
        keys, scales = K + (page * (stride_kb * UNIT) + slot * (stride_ks * UNIT)), K_SCALE + (page * stride_sb + slot * stride_ss)
    else:
        keys, scales = K + key.to(tl.int64) * (stride_ks * UNIT), K_SCALE + key.to(tl.int64) * stride_ss
    k = tl.load(keys[:, None] + e[None, :], mask=real[:, None] & (e < E)[None, :], other=0.0)
    if k.dtype != q.dtype:  # FP8 keys of wider queries
        k = k.to(q.dtype)
    _, head = column_query(BQ, BJ)
    scores = sum_heads(q, w, k, head, J, BN, BQ, BJ, PADDED and HEADS == 1)
    for block in tl.static_range(1, HEADS):
        more_q, more_w = load_queries(Q, W, stride_qt, stride_qj, t0, T, J, E, block, BQ, BJ, BE)
        scores += sum_heads(more_q, more_w, k, block * BJ + head, J, BN, BQ, BJ, PADDED and block == HEADS - 1)
    if SCALED:
        scores *= tl.load(scales, mask=real, other=0.0)[:, None]
    return scores


@triton.jit
def load_interval(START, END, b, t, T, S):
    """Clamped start and end of the queries t, both 0 where there is no such query or it sees nothing."""
    start = tl.maximum(tl.load(START + b.to(tl.int64) * T + t, mask=t < T, other=0), 0)
    end = tl.minimum(tl.load(END + b.to(tl.int64) * T + t, mask=t < T, other=0), S)
    seen = end > start
    return tl.where(seen, start, 0), tl.where(seen, end, 0)


@triton.jit
def union(start, end, seen, S):
    """The smallest range of keys that holds every interval where `seen`; it ends at 0 if there is none."""
    return tl.min(tl.where(seen, start, S)), tl.max(tl.where(seen, end, 0))


@triton.jit
def forward_kernel(
    Q, W, K, K_SCALE, TABLE, START, END, OUT, stride_qb, stride_qt, stride_qj, stride_kb, stride_ks, stride_sb, stride_ss, T, S, J, E, split,
    BN: tl.constexpr, BQ: tl.constexpr, BJ: tl.constexpr, BE: tl.constexpr, HEADS: tl.constexpr, PADDED: tl.constexpr, SCALED: tl.constexpr,
    PAGE: tl.constexpr, UNIT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(T, BQ)
    b, t0 = tl.program_id(0) // tiles, tl.program_id(0) % tiles * BQ
    t, n = t0 + tl.arange(0, BQ), tl.arange(0, BN)
    start, end = load_interval(START, END, b, t, T, S)
    low, high = union(start, end, end > start, S)
    first, last = tl.program_id(1) * split, tl.minimum((tl.program_id(1) + 1) * split, S)
    begin = tl.minimum(tl.maximum(low // BN * BN, first), last)
    stop = tl.maximum(tl.minimum(high, last), begin)
    Q, W = Q + b.to(tl.int64) * stride_qb, W + b.to(tl.int64) * T * J
    K, K_SCALE, TABLE = keys_of(K, K_SCALE, TABLE, b, stride_kb, stride_sb, S, PAGE, UNIT)
    row = OUT + (b.to(tl.int64) * T + t)[None, :] * S
    q, w = load_queries(Q, W, stride_qt, stride_qj, t0, T, J, E, 0, BQ, BJ, BE)
    for origin in tl.range(begin, stop, BN, num_stages=STAGES):
        key = origin + n
        scores = score_tile(
            q, w, Q, W, K, K_SCALE, TABLE, key, key < high, stride_qt, stride_qj, stride_kb, stride_ks, stride_sb, stride_ss, t0, T, J, E,
            BN, BQ, BJ, BE, HEADS, PADDED, SCALED, PAGE, UNIT,
        )  # fmt: skip
        visible = (key[:, None] >= start[None, :]) & (key[:, None] < end[None, :])
        tl.store(row + key[:, None], tl.where(visible, scores, float("-inf")), mask=(key < last)[:, None] & (t < T)[None, :])
    hidden = tl.full([BN, BQ], float("-inf"), tl.float32)
    for origin in range(first, begin, BN):
        tl.store(row + (origin + n)[:, None], hidden, mask=(origin + n < begin)[:, None] & (t < T)[None, :])
    for origin in range(begin + tl.cdiv(stop - begin, BN) * BN, last, BN):
        tl.store(row + (origin + n)[:, None], hidden, mask=(origin + n < last)[:, None] & (t < T)[None, :])


@triton.jit
def pair_gradient(q, w, k, grad, head_real):
    """The heads' products with ReLU and the gradients of what is in it, both `[rows, BN]`; rows are heads of queries, grad is 0 where unseen."""
    dots = tl.maximum(tl.dot(q, tl.trans(k), input_precision="ieee"), 0.0)
    return dots, tl.where((dots > 0) & head_real[:, None], grad * w[:, None], 0.0)


@triton.jit
def load_gradient(GRAD, START, END, row, key, S, real):
    """grad `[rows, BN]` of the queries `row` (over all batch rows) and their keys, 0 where not seen."""
    start = tl.load(START + row, mask=real, other=0)[:, None]
    end = tl.load(END + row, mask=real, other=0)[:, None]
    seen = (key[None, :] >= start) & (key[None, :] < end) & (key < S)[None, :]
    return tl.load(GRAD + row[:, None] * S + key[None, :], mask=seen, other=0.0)


@triton.jit
def query_gradient_kernel(Q, K, W, GRAD, START, END, DQ, DW, T, S, J, E, BR: tl.constexpr, BN: tl.constexpr, BE: tl.constexpr):
    """dq and dw of BR rows, heads of queries; Q is `[B, T * J, E]`, all is contiguous float32."""
    row, b = tl.program_id(0) * BR + tl.arange(0, BR), tl.program_id(1).to(tl.int64)
    e, real = tl.arange(0, BE), row < T * J
    channel = real[:, None] & (e < E)[None, :]
    place = b * T * J + row
    q = tl.load(Q + place[:, None] * E + e[None, :], mask=channel, other=0.0)
    w = tl.load(W + place, mask=real, other=0.0)
    dq, dw = tl.zeros([BR, BE], tl.float32), tl.zeros([BR], tl.float32)
    for origin in range(0, S, BN):
        key = origin + tl.arange(0, BN)
        k = tl.load(K + (b * S + key)[:, None] * E + e[None, :], mask=(key < S)[:, None] & (e < E)[None, :], other=0.0)
        grad = load_gradient(GRAD, START, END, b * T + row // J, key, S, real)
        dots, inner = pair_gradient(q, w, k, grad, real)
        dq += tl.dot(inner, k, input_precision="ieee")
        dw += tl.sum(dots * grad, 1)
    tl.store(DQ + place[:, None] * E + e[None, :], dq, mask=channel)
    tl.store(DW + place, dw, mask=real)


@triton.jit
def key_gradient_kernel(Q, K, W, GRAD, START, END, DK, T, S, J, E, BR: tl.constexpr, BN: tl.constexpr, BE: tl.constexpr):
    """dk of BN keys, summed over queries and heads in one order."""
    key, b = tl.program_id(0) * BN + tl.arange(0, BN), tl.program_id(1).to(tl.int64)
    e = tl.arange(0, BE)
    channel = (key < S)[:, None] & (e < E)[None, :]
    k = tl.load(K + (b * S + key)[:, None] * E + e[None, :], mask=channel, other=0.0)
    dk = tl.zeros([BN, BE], tl.float32)
    for origin in range(0, T * J, BR):
        row = origin + tl.arange(0, BR)
        place, real = b * T * J + row, row < T * J
        q = tl.load(Q + place[:, None] * E + e[None, :], mask=real[:, None] & (e < E)[None, :], other=0.0)
        w = tl.load(W + place, mask=real, other=0.0)
        grad = load_gradient(GRAD, START, END, b * T + row // J, key, S, real)
        _, inner = pair_gradient(q, w, k, grad, real)
        dk += tl.dot(tl.trans(inner), q, input_precision="ieee")
    tl.store(DK + (b * S + key)[:, None] * E + e[None, :], dk, mask=channel)


def refusal(function: str, args: tuple) -> str | None:
    """Why these kernels can't run this call, or None."""
    tensors = [x for x in args if isinstance(x, Tensor)]
    if any(x.dtype == torch.float64 for x in tensors):
        return "Triton kernels compute in float32, not in float64"
    q = args[1] if function == "index_scores_backward" else args[0]
    return f"Triton kernels take up to {CHANNELS} index channels, got {q.shape[3]}" if q.shape[3] > CHANNELS else None


def index_scores(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    q_scale: Tensor | None,
    k_scale: Tensor | None,
    start: Tensor,
    end: Tensor,
    workspace_mb: int,
    block_table: Tensor | None = None,
) -> Tensor:
    (B, T, J, E), S = q.shape, length(k, block_table)
    scores = torch.empty(B, T, S, dtype=torch.float32, device=q.device)
    if scores.numel() == 0:
        return scores
    w = head_weights(weights, q_scale, E).contiguous()
    q, keys = operands(q, k, k_scale, block_table)
    tile = Tile.of(q)
    tiles = B * triton.cdiv(T, tile.BQ)
    at_once = PROGRAMS if tile.BQ * tile.BJ >= 128 else 2 * PROGRAMS  # a wide product leaves registers for two programs, others for four or more
    splits = max(1, at_once // tiles)
    split = triton.cdiv(triton.cdiv(S, splits), tile.BN) * tile.BN
    forward_kernel[(tiles, triton.cdiv(S, split))](
        q, w, *keys.pointers, start.contiguous(), end.contiguous(), scores, *q.stride()[:3], *keys.strides, T, S, J, q.shape[3], split,
        **tile.constants, **keys.constants, PADDED=J % tile.BJ != 0, STAGES=tile.stages, num_warps=tile.WARPS, enable_fp_fusion=True,
    )  # fmt: skip
    return scores


def index_scores_backward(
    grad: Tensor, q: Tensor, k: Tensor, weights: Tensor, start: Tensor, end: Tensor, workspace_mb: int
) -> tuple[Tensor, Tensor, Tensor]:
    (B, T, J, E), S = q.shape, k.shape[1]
    dq, dk, dw = (torch.zeros(x.shape, dtype=torch.float32, device=q.device) for x in (q, k, weights))
    if grad.numel():
        # Keys that nobody sees may hold NaN, and so may queries that see nothing.
        position = torch.arange(S, device=q.device)
        unseen = (position < start[..., None]) | (position >= end[..., None])
        idle = (unseen | (grad == 0)).all(2, keepdim=True)
        w = head_weights(weights, None, E).contiguous().masked_fill(idle, 0.0)
        flat = q.float().masked_fill(idle[..., None], 0.0).contiguous()
        keys = k.float().nan_to_num(0.0, 0.0, 0.0).contiguous()
        inputs = flat, keys, w, grad.contiguous(), start.contiguous(), end.contiguous()
        shape = {"BR": 32, "BN": 32, "BE": max(16, triton.next_power_of_2(E))}
        query_gradient_kernel[(triton.cdiv(T * J, 32), B)](*inputs, dq, dw, T, S, J, E, **shape, num_warps=4)
        key_gradient_kernel[(triton.cdiv(S, 32), B)](*inputs, dk, T, S, J, E, **shape, num_warps=4)
    return dq.to(q.dtype), dk.to(k.dtype), dw.mul_(J**-0.5 * E**-0.5).to(weights.dtype)
