"""Attention over selected latents on sm_90 in Gluon: queries and keys of 576 or 512 channels, values the first 512 of the keys.

A program serves 64 rows: 64 heads of one query, or all heads of as many neighbouring queries as fit, which then read the
union of their selections (see union.py), a bit a query and key saying who reads it. It walks its keys in blocks of 64,
two of them in shared memory, with three groups of four warps:

- `_scores` multiplies the queries with a block, makes the probabilities, and takes the left half of the output;
- `_right_half` loads the queries, then multiplies the probabilities with the right half of the block's values;
- `_gather` copies the keys of the next block, 16 bytes at a time, zeros where there is none, so that keys nobody reads
  may hold anything.

They hand over through barriers in shared memory. A barrier's n-th wait is for phase n % 2; who waits for something to
become free waits for the phase before, which a new barrier has behind it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, fence_async_shared, mbarrier, warpgroup_mma, warpgroup_mma_wait

from skim.ops.attend.union import tiles_of, unions
from skim.ops.dispatch import processors

LOG2E = gl.constexpr(1.4426950408889634)
ROWS, KEYS, STAGES = gl.constexpr(64), gl.constexpr(64), gl.constexpr(2)  # of a program; of a block; blocks in shared memory
VALUES, ROPE = gl.constexpr(512), gl.constexpr(64)  # channels of the latent, which are the values too; those that may follow
HALF, GROUP = gl.constexpr(256), gl.constexpr(64)  # channels that a group of warps sums; that a copy takes: 128 bytes, one swizzle
HEADS = 16  # fewer are padded to as many rows
REGISTERS = 168, 80  # a thread of `_right_half` and of `_gather`; `_scores` takes what is left
UNION_MB = 256  # more makes nothing faster: a chunk fills the card

# Triton renamed the copy after 3.6.
copy = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared

SUMS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16]))  # [ROWS, HALF]
SCORES = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))  # [ROWS, KEYS]
COPY = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))  # 16 bytes a thread, 128 a row
LINES = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
TILES = gl.constexpr(gl.NVMMASharedLayout(128, 16, 2))


def refusal(function: str, args: tuple[Any, ...]) -> str | None:
    if function != "attend":
        return "hopper has the forward of attend only"
    q, k, v, indices, v_channels, scale = args[:6]
    B, T, H, D = q.shape
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"it multiplies bfloat16 and float16, and the inputs are {str(q.dtype).removeprefix('torch.')}"
    if k.shape[2] != 1 or v is not None or v_channels != VALUES.value or D not in (VALUES.value, VALUES.value + ROPE.value):
        return "it reads latents: one key head of 512 or 576 channels, the first 512 of them the values"
    if scale <= 0:
        return "it takes the largest score before it scales, and the scale is not positive"
    for name, x in (("q", q), ("k", k)):
        if x.stride(-1) != 1 or x.data_ptr() % 16 or any(stride % 16 for stride, size in zip(x.stride()[:-1], x.shape) if size > 1):
            return f"it copies 16 bytes at a time, and rows of {name} don't begin at multiples of 16 channels"
    plan = _plan(H)
    if plan.TILE > T:
        return f"{plan.TILE} neighbouring queries of {H} heads share a program, and there are {T}"
    if 2 * plan.programs(B, T) < processors(q.device):
        return "it doesn't split a selection, and programs for so few queries leave most of the GPU idle"
    return None


class _Plan(NamedTuple):
    """How many queries and heads the rows of a program are, and how many programs share the heads of a query."""

    TILE: int
    BLOCK_H: int
    blocks: int

    def programs(self, B: int, T: int) -> int:
        return B * tiles_of(T, self.TILE) * self.blocks


def _plan(H: int) -> _Plan:
    block = min(max(triton.next_power_of_2(H), HEADS), ROWS.value)
    return _Plan(ROWS.value // block, block, -(-H // block))


@gluon.jit
def _row(first_query, first_head, T, H: gl.constexpr, BLOCK_H: gl.constexpr, layout: gl.constexpr):
    """Of each matrix row: query within the tile, query, head, and whether there is such a row."""
    row = gl.arange(0, ROWS, layout)
    i = row // BLOCK_H
    t, head = first_query + i, first_head + row % BLOCK_H
    return i, t, head, (t < T) & (head < H)


@gluon.jit
def _gather(K, k_s, S, READS, BITS, n, keys, rope, readers, ready, free, DR: gl.constexpr, TILE: gl.constexpr):
    """Copy block after block of the n keys in READS, with the bits of who reads them."""
    slot = gl.arange(0, KEYS, gl.SliceLayout(1, COPY))
    channel = gl.expand_dims(gl.arange(0, GROUP, gl.SliceLayout(0, COPY)), 0)
    for block in range(gl.cdiv(n, KEYS)):
        stage = block % STAGES
        at = block * KEYS + slot
        key = gl.load(READS + at, mask=at < n, other=-1)
        real = (key >= 0) & (key < S)
        if TILE > 1:
            bits = gl.load(BITS + at, mask=at < n, other=0)
            bits = gl.where(real, bits, 0)
        else:
            bits = real.to(gl.int32)
        source = K + gl.expand_dims(gl.where(real, key, 0).to(gl.int64) * k_s, 1) + channel
        real = gl.expand_dims(real, 1)
        mbarrier.wait(free.index(stage), (block // STAGES & 1) ^ 1)
        into = keys.index(stage)
        for group in gl.static_range(VALUES // GROUP):
            copy(into.slice(group * GROUP, GROUP, dim=1), source + group * GROUP, mask=real)
        if DR > 0:
            copy(rope.index(stage), source + VALUES, mask=real)
        readers.index(stage).store(bits)
        async_copy.mbarrier_arrive(ready.index(stage), increment_count=False)  # each thread, when its copies are there
        mbarrier.arrive(ready.index(stage), count=1)


@gluon.jit
def _scores(
    OUT, LSE, SINK, first_query, first_head, T, scale, n, q, q_rope, keys, rope, readers, p, rescale, factors,
    queries, ready, free, p_ready, p_free, done,
    H: gl.constexpr, BLOCK_H: gl.constexpr, DR: gl.constexpr, TILE: gl.constexpr, HAS_SINK: gl.constexpr,
):  # fmt: skip
    """Scores, probabilities, lse and the left half of the output; OUT, LSE are of one row of the batch."""
    of_scores: gl.constexpr = gl.SliceLayout(1, SCORES)
    of_sums: gl.constexpr = gl.SliceLayout(1, SUMS)
    i, t, head, ok = _row(first_query, first_head, T, H, BLOCK_H, of_scores)
    largest = gl.full([ROWS], -1e30, gl.float32, of_scores)
    total = gl.zeros([ROWS], gl.float32, of_scores)
    acc = gl.zeros([ROWS, HALF], gl.float32, SUMS)
    mbarrier.wait(queries, 0)
    for block in range(gl.cdiv(n, KEYS)):
        stage = block % STAGES
        mbarrier.wait(ready.index(stage), block // STAGES & 1)
        fence_async_shared()
        k = keys.index(stage)
        s = warpgroup_mma(q, k.permute((1, 0)), gl.zeros([ROWS, KEYS], gl.float32, SCORES), use_acc=False, is_async=True)
        if DR > 0:
            s = warpgroup_mma(q_rope, rope.index(stage).permute((1, 0)), s, is_async=True)
        s = warpgroup_mma_wait(0, deps=[s])
        bits = gl.expand_dims(readers.index(stage).load(gl.SliceLayout(0, SCORES)), 0)
        if TILE > 1:
            bits = bits >> gl.expand_dims(i, 1) & 1
        s = gl.where(bits != 0, s * scale, float("-inf"))
        larger = gl.maximum(largest, gl.max(s, 1))
        alpha = gl.exp2(largest - larger)
        largest = larger
        weight = gl.exp2(s - gl.expand_dims(largest, 1))
        total = total * alpha + gl.sum(weight, 1)
        weight = weight.to(p.dtype)
        mbarrier.wait(p_free, block & 1 ^ 1)
        rescale.store(alpha)
        p.store(weight)
        fence_async_shared()
        mbarrier.arrive(p_ready, count=1)
        acc = acc * gl.expand_dims(gl.convert_layout(alpha, of_sums), 1)
        left = gl.convert_layout(weight, gl.DotOperandLayout(0, SUMS, 2))
        acc = warpgroup_mma(left, k.slice(0, HALF, dim=1), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(free.index(stage), count=1)

    empty = total == 0
    lse = gl.where(empty, float("-inf"), (largest + gl.log2(total)) / LOG2E)
    factor = gl.where(empty, 0.0, 1 / total)
    if HAS_SINK:
        sink = gl.load(SINK + head, mask=ok, other=0.0).to(gl.float32)
        factor = gl.where(empty, 0.0, factor / (1 + gl.exp2((sink - lse) * LOG2E)))
    factors.store(factor)
    mbarrier.arrive(done, count=1)
    gl.store(LSE + t * H + head, lse, mask=ok)
    _store_half(OUT, acc, gl.convert_layout(factor, of_sums), first_query, first_head, T, H, BLOCK_H)


@gluon.jit
def _right_half(
    Q, q_t, q_h, OUT, first_query, first_head, T, n, q, q_rope, keys, p, rescale, factors, queries, free, p_ready, p_free, done,
    H: gl.constexpr, BLOCK_H: gl.constexpr, DR: gl.constexpr,
):  # fmt: skip
    """Load the queries; then the right half of the output. Q, OUT are of one row of the batch."""
    i, t, head, ok = _row(first_query, first_head, T, H, BLOCK_H, gl.SliceLayout(1, COPY))
    source = Q + gl.expand_dims(t.to(gl.int64) * q_t + head * q_h, 1) + gl.expand_dims(gl.arange(0, GROUP, gl.SliceLayout(0, COPY)), 0)
    ok = gl.expand_dims(ok, 1)
    for group in gl.static_range(VALUES // GROUP):
        copy(q.slice(group * GROUP, GROUP, dim=1), source + group * GROUP, mask=ok)
    if DR > 0:
        copy(q_rope, source + VALUES, mask=ok)
    async_copy.mbarrier_arrive(queries, increment_count=False)

    of_sums: gl.constexpr = gl.SliceLayout(1, SUMS)
    acc = gl.zeros([ROWS, HALF], gl.float32, SUMS)
    for block in range(gl.cdiv(n, KEYS)):
        stage = block % STAGES
        mbarrier.wait(p_ready, block & 1)
        fence_async_shared()
        acc = acc * gl.expand_dims(rescale.load(of_sums), 1)
        acc = warpgroup_mma(p, keys.index(stage).slice(HALF, HALF, dim=1), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(p_free, count=1)
        mbarrier.arrive(free.index(stage), count=1)
    mbarrier.wait(done, 0)
    _store_half(OUT + HALF, acc, factors.load(of_sums), first_query, first_head, T, H, BLOCK_H)


@gluon.jit
def _store_half(OUT, acc, factor, first_query, first_head, T, H: gl.constexpr, BLOCK_H: gl.constexpr):
    _, t, head, ok = _row(first_query, first_head, T, H, BLOCK_H, gl.SliceLayout(1, SUMS))
    into = OUT + gl.expand_dims((t * H + head).to(gl.int64) * VALUES, 1) + gl.expand_dims(gl.arange(0, HALF, gl.SliceLayout(0, SUMS)), 0)
    factor, ok = gl.expand_dims(factor, 1), gl.expand_dims(ok, 1)
    out = gl.where(factor == 0, 0.0, acc * factor)  # what neighbours read, even NaN, stays with them
    gl.store(into, out.to(OUT.dtype.element_ty), mask=ok)


@gluon.jit
def forward(
    Q, K, OUT, LSE, SINK, READS, BITS, COUNTS, first, scale, T, S, width, q_b, q_t, q_h, k_b, k_s,
    H: gl.constexpr, DR: gl.constexpr, TILE: gl.constexpr, BLOCK_H: gl.constexpr, BLOCKS: gl.constexpr, HAS_SINK: gl.constexpr,
    REGISTERS_RIGHT: gl.constexpr, REGISTERS_GATHER: gl.constexpr,
):  # fmt: skip
    """out and lse of one tile of queries and block of heads: program tile * BLOCKS + block, so that those of a query run together.

    READS `[.., width]` holds the keys of each tile from `first` on: indices, or with TILE > 1 unions with BITS and COUNTS.
    """
    number = gl.program_id(0) // BLOCKS
    tile = first + number
    tiles_of_row = gl.cdiv(T, TILE)
    b = (tile // tiles_of_row).to(gl.int64)
    first_query = tile % tiles_of_row * TILE
    first_head = gl.program_id(0) % BLOCKS * BLOCK_H
    READS += number.to(gl.int64) * width
    BITS += number.to(gl.int64) * width
    n = width
    if TILE > 1:
        n = gl.load(COUNTS + number)
    Q += b * q_b
    K += b * k_b
    OUT += b * T * H * VALUES
    LSE += b * T * H

    dtype: gl.constexpr = Q.dtype.element_ty
    q = gl.allocate_shared_memory(dtype, [ROWS, VALUES], TILES)
    keys = gl.allocate_shared_memory(dtype, [STAGES, KEYS, VALUES], TILES)
    q_rope, rope = q, keys
    if DR > 0:
        q_rope = gl.allocate_shared_memory(dtype, [ROWS, DR], TILES)
        rope = gl.allocate_shared_memory(dtype, [STAGES, KEYS, DR], TILES)
    readers = gl.allocate_shared_memory(gl.int32, [STAGES, KEYS], LINES)
    p = gl.allocate_shared_memory(dtype, [ROWS, KEYS], TILES)
    rescale = gl.allocate_shared_memory(gl.float32, [ROWS], LINES)
    factors = gl.allocate_shared_memory(gl.float32, [ROWS], LINES)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    queries = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    p_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    p_free = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    done = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=129)  # the threads of `_gather`, and its bits
        mbarrier.init(free.index(stage), count=2)
    mbarrier.init(queries, count=128)
    mbarrier.init(p_ready, count=1)
    mbarrier.init(p_free, count=1)
    mbarrier.init(done, count=1)
    gl.warp_specialize(
        [
            (_scores, (
                OUT, LSE, SINK, first_query, first_head, T, scale, n, q, q_rope, keys, rope, readers, p, rescale, factors,
                queries, ready, free, p_ready, p_free, done, H, BLOCK_H, DR, TILE, HAS_SINK,
            )),
            (_right_half, (
                Q, q_t, q_h, OUT, first_query, first_head, T, n, q, q_rope, keys, p, rescale, factors,
                queries, free, p_ready, p_free, done, H, BLOCK_H, DR,
            )),
            (_gather, (K, k_s, S, READS, BITS, n, keys, rope, readers, ready, free, DR, TILE)),
        ],
        [4, 4],
        [REGISTERS_RIGHT, REGISTERS_GATHER],
    )  # fmt: skip


def attend(
    q: Tensor, k: Tensor, v: Tensor | None, indices: Tensor, v_channels: int, scale: float, sink: Tensor | None, workspace_mb: int
) -> tuple[Tensor, Tensor]:
    B, T, H, D = q.shape
    S, K = k.shape[1], indices.shape[3]
    out, lse = q.new_empty(B, T, H, v_channels), q.new_empty(B, T, H, dtype=torch.float32)
    if S == 0 or K == 0 or out.numel() == 0:
        return out.zero_(), lse.fill_(float("-inf"))
    indices = indices.to(torch.int32).contiguous()
    plan = _plan(H)
    if plan.TILE == 1:
        _launch(q, k, sink, out, lse, scale, plan, B * T, 0, indices, indices, indices)
        return out, lse
    for part, keys, bits, counts in unions(indices, S, plan.TILE, min(workspace_mb, UNION_MB)):
        _launch(q, k, sink, out, lse, scale, plan, part.stop - part.start, part.start, keys, bits, counts)
    return out, lse


def _strides(x: Tensor, axes: int) -> tuple[int, ...]:
    """Of the first axes; 0 for an axis of one, whose stride may be no multiple of 16."""
    return tuple(0 if size == 1 else stride for size, stride in zip(x.shape[:axes], x.stride()))


def _launch(
    q: Tensor, k: Tensor, sink: Tensor | None, out: Tensor, lse: Tensor, scale: float, plan: _Plan, tiles: int, first: int, *reads: Tensor
) -> None:
    T, H, D = q.shape[1:]
    forward[(tiles * plan.blocks,)](
        q, k, out, lse, None if sink is None else sink.contiguous(), *reads, first, scale * LOG2E.value, T, k.shape[1], reads[0].shape[-1],
        *_strides(q, 3), *_strides(k, 2), H, D - VALUES.value, plan.TILE, plan.BLOCK_H, plan.blocks, sink is not None, *REGISTERS,
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
