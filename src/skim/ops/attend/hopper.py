"""Attention over selected latents on sm_90 in Gluon: queries and keys of 576 or 512 channels, values the first 512 of the keys.

A task is 64 rows: 64 heads of one query, or all heads of as many neighbouring queries as fit, which then read the union
of their selections (see union.py), a bit a query and key saying who reads it. A program, one a processor, serves task
after task. It walks the keys of each in blocks of 64, two of them in shared memory, with three groups of four warps:

- `_scores` multiplies the queries with a block, makes the probabilities, and takes the left half of the output;
- `_right_half` loads the queries, the next task's before it stores the output of the last, and multiplies the probabilities
  with the right half of the block's values;
- `_gather` copies the keys of the next block, 16 bytes at a time, zeros where there is none, so that keys nobody reads
  may hold anything. It does not stop between tasks.

The probabilities lie where the rotated channels of their block were, which nobody needs once it is scored. The groups hand
over through barriers in shared memory. A barrier's n-th wait is for phase n % 2; who waits for something to become free
waits for the phase before, which a new barrier has behind it. Blocks are counted over all tasks of a program.
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
ROWS, KEYS, STAGES = gl.constexpr(64), gl.constexpr(64), gl.constexpr(2)  # of a task; of a block; blocks in shared memory
VALUES, ROPE = gl.constexpr(512), gl.constexpr(64)  # channels of the latent, which are the values too; those that may follow
HALF = gl.constexpr(256)  # channels that a group of warps sums, and that a copy takes
HEADS = 16  # fewer are padded to as many rows
REGISTERS = 168, 80  # a thread of `_right_half` and of `_gather`; `_scores` takes what is left
UNION_MB = 256  # more makes nothing faster: a chunk fills the card

# Triton renamed the copy after 3.6.
copy = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared

SUMS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16]))  # [ROWS, HALF]
SCORES = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))  # [ROWS, KEYS]
# As SUMS, but a thread holds 8 neighbouring channels of a row instead of 2: what it stores is 16 bytes.
WIDE = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 4], [8, 0], [0, 32], [0, 64], [0, 128]], [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [64, 256]
    )
)
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
        return f"{plan.TILE} neighbouring queries of {H} heads share a task, and there are {T}"
    if 2 * B * tiles_of(T, plan.TILE) * plan.BLOCKS < processors(q.device):
        return "it doesn't split a selection, and tasks of so few queries leave most of the GPU idle"
    return None


class _Plan(NamedTuple):
    """How many queries and heads the rows of a task are, and how many tasks share the heads of a query."""

    TILE: int
    BLOCK_H: int
    BLOCKS: int


def _plan(H: int) -> _Plan:
    block = min(max(triton.next_power_of_2(H), HEADS), ROWS.value)
    return _Plan(ROWS.value // block, block, -(-H // block))


@gluon.jit
def _place(task, first, T, TILE: gl.constexpr, BLOCK_H: gl.constexpr, BLOCKS: gl.constexpr):
    """Row of the batch, first query and first head. Tasks of one tile follow each other: they run together and find their keys in L2."""
    tile = first + task // BLOCKS
    tiles_of_row = gl.cdiv(T, TILE)
    return (tile // tiles_of_row).to(gl.int64), tile % tiles_of_row * TILE, task % BLOCKS * BLOCK_H


@gluon.jit
def _count(COUNTS, task, width, TILE: gl.constexpr, BLOCKS: gl.constexpr):
    """How many keys a task reads."""
    n = width
    if TILE > 1:
        n = gl.load(COUNTS + task // BLOCKS)
    return n


@gluon.jit
def _row(first_query, first_head, T, H: gl.constexpr, BLOCK_H: gl.constexpr, layout: gl.constexpr):
    """Of each matrix row: query within the tile, query, head, and whether there is such a row."""
    row = gl.arange(0, ROWS, layout)
    i = row // BLOCK_H
    t, head = first_query + i, first_head + row % BLOCK_H
    return i, t, head, (t < T) & (head < H)


@gluon.jit
def _copy_rows(into, rope, source, ok, DR: gl.constexpr):
    """Copy the channels of rows that begin at `source` `[rows, 1]`; zeros where not `ok`."""
    channel = gl.expand_dims(gl.arange(0, HALF, gl.SliceLayout(0, COPY)), 0)
    for half in gl.static_range(VALUES // HALF):
        copy(into.slice(half * HALF, HALF, dim=1), source + half * HALF + channel, mask=ok)
    if DR > 0:
        channel = gl.expand_dims(gl.arange(0, DR, gl.SliceLayout(0, COPY)), 0)
        copy(rope, source + VALUES + channel, mask=ok)


@gluon.jit
def _gather(
    K, k_b, k_s, S, READS, BITS, COUNTS, first, tasks, width, T, keys, rope, readers, ready, free,
    DR: gl.constexpr, TILE: gl.constexpr, BLOCK_H: gl.constexpr, BLOCKS: gl.constexpr,
):  # fmt: skip
    """Copy block after block of the keys in READS, with the bits of who reads them."""
    slot = gl.arange(0, KEYS, gl.SliceLayout(1, COPY))
    block = 0
    for task in range(gl.program_id(0), tasks, gl.num_programs(0)):
        b, _, _ = _place(task, first, T, TILE, BLOCK_H, BLOCKS)
        reads = (task // BLOCKS).to(gl.int64) * width
        n = _count(COUNTS, task, width, TILE, BLOCKS)
        for begin in range(0, n, KEYS):
            stage = block % STAGES
            at = begin + slot
            key = gl.load(READS + reads + at, mask=at < n, other=-1)
            real = (key >= 0) & (key < S)
            if TILE > 1:
                bits = gl.load(BITS + reads + at, mask=at < n, other=0)
                bits = gl.where(real, bits, 0)
            else:
                bits = real.to(gl.int32)
            source = K + b * k_b + gl.where(real, key, 0).to(gl.int64) * k_s
            mbarrier.wait(free.index(stage), (block // STAGES & 1) ^ 1)
            _copy_rows(keys.index(stage), rope.index(stage), gl.expand_dims(source, 1), gl.expand_dims(real, 1), DR)
            readers.index(stage).store(bits)
            async_copy.mbarrier_arrive(ready.index(stage), increment_count=False)  # each thread, when its copies are there
            mbarrier.arrive(ready.index(stage), count=1)
            block += 1


@gluon.jit
def _scores(
    OUT, LSE, SINK, COUNTS, first, tasks, width, T, scale, q, q_rope, keys, rope, p, readers, rescale, factors,
    queries, ready, free, p_ready, done,
    H: gl.constexpr, DR: gl.constexpr, TILE: gl.constexpr, BLOCK_H: gl.constexpr, BLOCKS: gl.constexpr, HAS_SINK: gl.constexpr,
):  # fmt: skip
    """Scores, probabilities, lse and the left half of the output."""
    of_scores: gl.constexpr = gl.SliceLayout(1, SCORES)
    of_sums: gl.constexpr = gl.SliceLayout(1, SUMS)
    block, phase = 0, 0
    for task in range(gl.program_id(0), tasks, gl.num_programs(0)):
        b, first_query, first_head = _place(task, first, T, TILE, BLOCK_H, BLOCKS)
        i, t, head, ok = _row(first_query, first_head, T, H, BLOCK_H, of_scores)
        largest = gl.full([ROWS], -1e30, gl.float32, of_scores)
        total = gl.zeros([ROWS], gl.float32, of_scores)
        acc = gl.zeros([ROWS, HALF], gl.float32, SUMS)
        mbarrier.wait(queries, phase)
        for _ in range(0, _count(COUNTS, task, width, TILE, BLOCKS), KEYS):
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
            rescale.index(stage).store(alpha)
            p.index(stage).store(weight)
            fence_async_shared()
            mbarrier.arrive(p_ready.index(stage), count=1)
            acc = acc * gl.expand_dims(gl.convert_layout(alpha, of_sums), 1)
            left = gl.convert_layout(weight, gl.DotOperandLayout(0, SUMS, 2))
            acc = warpgroup_mma(left, k.slice(0, HALF, dim=1), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(free.index(stage), count=1)
            block += 1
        empty = total == 0
        lse = gl.where(empty, float("-inf"), (largest + gl.log2(total)) / LOG2E)
        factor = gl.where(empty, 0.0, 1 / total)
        if HAS_SINK:
            sink = gl.load(SINK + head, mask=ok, other=0.0).to(gl.float32)
            factor = gl.where(empty, 0.0, factor / (1 + gl.exp2((sink - lse) * LOG2E)))
        factors.store(factor)
        mbarrier.arrive(done, count=1)
        gl.store(LSE + b * T * H + t * H + head, lse, mask=ok)
        _store_half(OUT + b * T * H * VALUES, acc, gl.convert_layout(factor, of_sums), first_query, first_head, T, H, BLOCK_H)
        phase ^= 1


@gluon.jit
def _right_half(
    Q, q_b, q_t, q_h, OUT, COUNTS, first, tasks, width, T, q, q_rope, keys, p, rescale, factors, queries, free, p_ready, done,
    H: gl.constexpr, DR: gl.constexpr, TILE: gl.constexpr, BLOCK_H: gl.constexpr, BLOCKS: gl.constexpr,
):  # fmt: skip
    """Load the queries; the right half of the output."""
    of_sums: gl.constexpr = gl.SliceLayout(1, SUMS)
    b, first_query, first_head = _place(gl.program_id(0), first, T, TILE, BLOCK_H, BLOCKS)
    _load_queries(Q + b * q_b, q_t, q_h, first_query, first_head, T, q, q_rope, queries, H, DR, BLOCK_H)
    block, phase = 0, 0
    for task in range(gl.program_id(0), tasks, gl.num_programs(0)):
        acc = gl.zeros([ROWS, HALF], gl.float32, SUMS)
        for _ in range(0, _count(COUNTS, task, width, TILE, BLOCKS), KEYS):
            stage = block % STAGES
            mbarrier.wait(p_ready.index(stage), block // STAGES & 1)
            fence_async_shared()
            acc = acc * gl.expand_dims(rescale.index(stage).load(of_sums), 1)
            acc = warpgroup_mma(p.index(stage), keys.index(stage).slice(HALF, HALF, dim=1), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(free.index(stage), count=1)
            block += 1
        mbarrier.wait(done, phase)
        factor = factors.load(of_sums)  # before the next queries, with which `_scores` comes to write the next factors
        after = task + gl.num_programs(0)
        if after < tasks:
            b, first_query, first_head = _place(after, first, T, TILE, BLOCK_H, BLOCKS)
            _load_queries(Q + b * q_b, q_t, q_h, first_query, first_head, T, q, q_rope, queries, H, DR, BLOCK_H)
        b, first_query, first_head = _place(task, first, T, TILE, BLOCK_H, BLOCKS)
        _store_half(OUT + b * T * H * VALUES + HALF, acc, factor, first_query, first_head, T, H, BLOCK_H)
        phase ^= 1


@gluon.jit
def _load_queries(Q, q_t, q_h, first_query, first_head, T, q, q_rope, queries, H: gl.constexpr, DR: gl.constexpr, BLOCK_H: gl.constexpr):
    """Q is of one row of the batch."""
    _, t, head, ok = _row(first_query, first_head, T, H, BLOCK_H, gl.SliceLayout(1, COPY))
    source = Q + t.to(gl.int64) * q_t + head.to(gl.int64) * q_h
    _copy_rows(q, q_rope, gl.expand_dims(source, 1), gl.expand_dims(ok, 1), DR)
    async_copy.mbarrier_arrive(queries, increment_count=False)


@gluon.jit
def _store_half(OUT, acc, factor, first_query, first_head, T, H: gl.constexpr, BLOCK_H: gl.constexpr):
    """OUT is of one row of the batch."""
    factor = gl.expand_dims(factor, 1)
    out = gl.where(factor == 0, 0.0, acc * factor)  # what neighbours read, even NaN, stays with them
    _, t, head, ok = _row(first_query, first_head, T, H, BLOCK_H, gl.SliceLayout(1, WIDE))
    into = OUT + gl.expand_dims((t * H + head).to(gl.int64) * VALUES, 1) + gl.expand_dims(gl.arange(0, HALF, gl.SliceLayout(0, WIDE)), 0)
    gl.store(into, gl.convert_layout(out.to(OUT.dtype.element_ty), WIDE), mask=gl.expand_dims(ok, 1))


@gluon.jit
def forward(
    Q, K, OUT, LSE, SINK, READS, BITS, COUNTS, first, tasks, scale, T, S, width, q_b, q_t, q_h, k_b, k_s,
    H: gl.constexpr, DR: gl.constexpr, TILE: gl.constexpr, BLOCK_H: gl.constexpr, BLOCKS: gl.constexpr, HAS_SINK: gl.constexpr,
    REGISTERS_RIGHT: gl.constexpr, REGISTERS_GATHER: gl.constexpr,
):  # fmt: skip
    """out and lse: program n serves the tasks n, n + programs, ...; task m is block m % BLOCKS of the heads of tile first + m // BLOCKS.

    READS `[.., width]` holds the keys of each tile from `first` on: indices, or with TILE > 1 unions with BITS and COUNTS.
    """
    dtype: gl.constexpr = Q.dtype.element_ty
    q = gl.allocate_shared_memory(dtype, [ROWS, VALUES], TILES)
    keys = gl.allocate_shared_memory(dtype, [STAGES, KEYS, VALUES], TILES)
    p = gl.allocate_shared_memory(dtype, [STAGES, ROWS, KEYS], TILES)
    q_rope, rope = q, p  # as many bytes, and used one after the other
    if DR > 0:
        q_rope = gl.allocate_shared_memory(dtype, [ROWS, DR], TILES)
    readers = gl.allocate_shared_memory(gl.int32, [STAGES, KEYS], LINES)
    rescale = gl.allocate_shared_memory(gl.float32, [STAGES, ROWS], LINES)
    factors = gl.allocate_shared_memory(gl.float32, [ROWS], LINES)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    p_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    queries = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    done = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=129)  # the threads of `_gather`, and its bits
        mbarrier.init(free.index(stage), count=2)
        mbarrier.init(p_ready.index(stage), count=1)
    mbarrier.init(queries, count=128)
    mbarrier.init(done, count=1)
    gl.warp_specialize(
        [
            (_scores, (
                OUT, LSE, SINK, COUNTS, first, tasks, width, T, scale, q, q_rope, keys, rope, p, readers, rescale, factors,
                queries, ready, free, p_ready, done, H, DR, TILE, BLOCK_H, BLOCKS, HAS_SINK,
            )),
            (_right_half, (
                Q, q_b, q_t, q_h, OUT, COUNTS, first, tasks, width, T, q, q_rope, keys, p, rescale, factors,
                queries, free, p_ready, done, H, DR, TILE, BLOCK_H, BLOCKS,
            )),
            (_gather, (
                K, k_b, k_s, S, READS, BITS, COUNTS, first, tasks, width, T, keys, rope, readers, ready, free,
                DR, TILE, BLOCK_H, BLOCKS,
            )),
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
    tasks = tiles * plan.BLOCKS
    forward[(min(tasks, processors(q.device)),)](
        q, k, out, lse, None if sink is None else sink.contiguous(), *reads, first, tasks, scale * LOG2E.value, T, k.shape[1], reads[0].shape[-1],
        *_strides(q, 3), *_strides(k, 2), H, D - VALUES.value, *plan, sink is not None, *REGISTERS, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
