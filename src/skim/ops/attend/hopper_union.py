"""Attention of grouped heads over unions of neighbouring selections on sm_90 in Gluon: keys and values of 64 or 128 channels.

A task is a tile of neighbouring queries with the heads of one key head: 128 rows, which read the union of the queries' selections,
a bit a query and key saying who reads it (see union.py). A program, one a processor, serves task after task. It walks the keys of
each in blocks of 128, three of them in shared memory, with three groups of four warps:

- two of `_rows`, each with half of the queries: scores, probabilities, outputs. The values of a block and the scores of the next are
  multiplied in one go, 1024 cycles of 128 channels; the other group makes its probabilities meanwhile, so that the matrix units always
  have work. Where the queries lay, outputs pass on their way to memory;
- `_gather` copies the keys and values of the blocks ahead, 16 bytes at a time, zeros where there is none.

The groups hand over through barriers in shared memory, as in hopper.py. Blocks are counted over all tasks of a program.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, fence_async_shared, mbarrier, warpgroup_mma, warpgroup_mma_wait

from skim.ops.dispatch import processors
from skim.ops.gluon import COPY, LINES, LOG2E, TILES, copy, lse_and_factor

ROWS, KEYS = gl.constexpr(64), gl.constexpr(128)  # of a group of warps; of a block
STAGES = 3  # blocks in shared memory
REGISTERS = 208, 96  # a thread of the second `_rows` and of `_gather`; the first takes what is left

SCORES = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16]))  # [ROWS, KEYS]
# The score where a bit of the key's readers is set, else -inf. Of `gl.where` LLVM keeps conditions that rows share, more than a thread has
# predicates for, and the assembler packs and unpacks them: a fifth of the instructions.
WHERE_READ = gl.constexpr("""{
.reg .pred reads;
.reg .b32 bit;
and.b32 bit, $2, $3;
setp.ne.b32 reads, bit, 0;
selp.f32 $0, $1, 0fFF800000, reads;
}""")


@gluon.jit
def _task(task, first, COUNTS, T, limit, G: gl.constexpr, R: gl.constexpr, TILE: gl.constexpr):
    """Row of the batch, first query, key head, row of the lists, and how many keys the union has: -1 where others serve it."""
    own, g = task // G, task % G
    tiles_of_row = gl.cdiv(T, TILE)
    row = own * R + g // (G // R)
    count = gl.load(COUNTS + row)
    return ((first + own) // tiles_of_row).to(gl.int64), (first + own) % tiles_of_row * TILE, g, row.to(gl.int64), gl.where(count > limit, -1, count)


@gluon.jit
def _key(READS, BITS, at, end, layout: gl.constexpr):
    """The keys of a block of a union, -1 where there is none, and who reads them."""
    slot = at + gl.arange(0, KEYS, layout)
    return gl.load(READS + slot, mask=slot < end, other=-1), gl.load(BITS + slot, mask=slot < end, other=0)


@gluon.jit
def _gather(
    K, V, k_b, k_s, k_g, v_b, v_s, v_g, READS, BITS, COUNTS, first, tasks, width, limit, T, keys, values, readers, ready, free,
    D: gl.constexpr, G: gl.constexpr, R: gl.constexpr, TILE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Copy block after block of keys and values, with who reads them."""
    of_rows: gl.constexpr = gl.SliceLayout(1, COPY)
    channel = gl.expand_dims(gl.arange(0, D, gl.SliceLayout(0, COPY)), 0)
    block = 0
    for task in range(gl.program_id(0), tasks, gl.num_programs(0)):
        b, _, g, row, end = _task(task, first, COUNTS, T, limit, G, R, TILE)
        k_row, v_row = K + b * k_b + g.to(gl.int64) * k_g, V + b * v_b + g.to(gl.int64) * v_g
        reads, bits = READS + row * width, BITS + row * width
        ahead, who_ahead = _key(reads, bits, 0, end, of_rows)
        for at in range(0, end, KEYS):
            stage = block % STAGES
            key, who = ahead, who_ahead
            ahead, who_ahead = _key(reads, bits, at + KEYS, end, of_rows)  # so that copies needn't wait for it
            real = gl.expand_dims(key >= 0, 1)
            key = gl.where(key < 0, 0, key).to(gl.int64)
            mbarrier.wait(free.index(stage), (block // STAGES & 1) ^ 1)
            readers.index(stage).store(who)
            copy(keys.index(stage), gl.expand_dims(k_row + key * k_s, 1) + channel, mask=real)
            copy(values.index(stage), gl.expand_dims(v_row + key * v_s, 1) + channel, mask=real)
            async_copy.mbarrier_arrive(ready.index(stage), increment_count=False)  # each thread, when its copies are there
            mbarrier.arrive(ready.index(stage), count=1)
            block += 1


@gluon.jit
def _row(first_query, g, T, HALF: gl.constexpr, H: gl.constexpr, G: gl.constexpr, BLOCK_H: gl.constexpr, layout: gl.constexpr):
    """Of each matrix row: query within the tile, query, head, and whether there is such a row."""
    row = HALF * ROWS + gl.arange(0, ROWS, layout)
    i, head = row // BLOCK_H, row % BLOCK_H
    return i, first_query + i, g * (H // G) + head, (first_query + i < T) & (head < H // G)


@gluon.jit
def _rows(
    Q, q_b, q_t, q_h, OUT, LSE, SINK, COUNTS, first, tasks, limit, T, scale, keys, values, queries, readers, ready, free,
    H: gl.constexpr, D: gl.constexpr, G: gl.constexpr, R: gl.constexpr, TILE: gl.constexpr, BLOCK_H: gl.constexpr, STAGES: gl.constexpr,
    HAS_SINK: gl.constexpr, HALF: gl.constexpr,
):  # fmt: skip
    """Out and lse of half the queries of each task."""
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    of_scores: gl.constexpr = gl.SliceLayout(1, SCORES)
    of_sums: gl.constexpr = gl.SliceLayout(1, SUMS)
    of_weights: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    block = 0
    for task in range(gl.program_id(0), tasks, gl.num_programs(0)):
        b, first_query, g, _, end = _task(task, first, COUNTS, T, limit, G, R, TILE)
        _, t, head, ok = _row(first_query, g, T, HALF, H, G, BLOCK_H, gl.SliceLayout(1, COPY))
        channel = gl.arange(0, D, gl.SliceLayout(0, COPY))
        source = gl.expand_dims(Q + b * q_b + t.to(gl.int64) * q_t + head.to(gl.int64) * q_h, 1) + gl.expand_dims(channel, 0)
        q = queries.index(HALF)
        q.store(gl.load(source, mask=gl.expand_dims(ok & (end > 0), 1), other=0.0))
        i, t, head, ok = _row(first_query, g, T, HALF, H, G, BLOCK_H, of_scores)
        reader = gl.expand_dims(1 << i, 1)
        largest = gl.full([ROWS], -1e30, gl.float32, of_scores)
        total = gl.zeros([ROWS], gl.float32, of_scores)
        acc = gl.zeros([ROWS, D], gl.float32, SUMS)
        weight = gl.zeros([ROWS, KEYS], q.dtype, of_weights)
        before = block % STAGES  # the first block has none: its own values times zero, NaN where they are infinite
        if end > 0:
            mbarrier.wait(ready.index(before), block // STAGES & 1)
        for at in range(0, end, KEYS):
            stage = block % STAGES
            fence_async_shared()
            acc = warpgroup_mma(weight, values.index(before), acc, is_async=True)
            s = warpgroup_mma(q, keys.index(stage).permute((1, 0)), gl.zeros([ROWS, KEYS], gl.float32, SCORES), use_acc=False, is_async=True)
            acc, weight, s = warpgroup_mma_wait(0, deps=[acc, weight, s])
            if at > 0:
                mbarrier.arrive(free.index(before), count=1)
            who = gl.expand_dims(readers.index(stage).load(gl.SliceLayout(0, SCORES)), 0)
            s = gl.inline_asm_elementwise(WHERE_READ, "=f,f,r,r", [s, who, reader], dtype=gl.float32, is_pure=True, pack=1)
            larger = gl.maximum(largest, gl.max(s, 1) * scale)  # scale > 0
            p = gl.exp2(s * scale - gl.expand_dims(larger, 1))
            alpha = gl.exp2(largest - larger)
            total = total * alpha + gl.sum(p, 1)
            largest = larger
            weight = gl.convert_layout(p.to(q.dtype), of_weights)
            acc = acc * gl.expand_dims(gl.convert_layout(alpha, of_sums), 1)
            before = stage
            block += 1
            if at + KEYS < end:
                mbarrier.wait(ready.index(block % STAGES), block // STAGES & 1)
        if end > 0:
            acc = warpgroup_mma(weight, values.index(before), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(free.index(before), count=1)
        lse, factor = lse_and_factor(largest, total, SINK, head, ok, HAS_SINK)
        ok = ok & (end >= 0)
        gl.store(LSE + (b * T + t) * H + head, lse, mask=ok)
        _store(OUT, q, acc, gl.convert_layout(factor, of_sums), b, first_query, g, end, T, HALF, H, D, G, BLOCK_H)


@gluon.jit
def _store(
    OUT, staging, acc, factor, b, first_query, g, end, T,
    HALF: gl.constexpr, H: gl.constexpr, D: gl.constexpr, G: gl.constexpr, BLOCK_H: gl.constexpr,
):  # fmt: skip
    factor = gl.expand_dims(factor, 1)
    out = gl.where(factor == 0, 0.0, acc * factor)  # what neighbours read, even NaN, stays with them
    staging.store(out.to(OUT.dtype.element_ty))  # read again with 8 neighbouring channels a thread, which are 16 bytes
    _, t, head, ok = _row(first_query, g, T, HALF, H, G, BLOCK_H, gl.SliceLayout(1, COPY))
    into = OUT + gl.expand_dims(((b * T + t) * H + head) * D, 1) + gl.expand_dims(gl.arange(0, D, gl.SliceLayout(0, COPY)), 0)
    gl.store(into, staging.load(COPY), mask=gl.expand_dims(ok & (end >= 0), 1))


@gluon.jit
def forward_unions(
    Q, K, V, OUT, LSE, SINK, READS, BITS, COUNTS, first, tasks, scale, T, width, limit, q_b, q_t, q_h, k_b, k_s, k_g, v_b, v_s, v_g,
    H: gl.constexpr, D: gl.constexpr, G: gl.constexpr, R: gl.constexpr, TILE: gl.constexpr, BLOCK_H: gl.constexpr, HAS_SINK: gl.constexpr,
    STAGES: gl.constexpr, REGISTERS_ROWS: gl.constexpr, REGISTERS_GATHER: gl.constexpr,
):  # fmt: skip
    """out and lse: program n serves the tasks n, n + programs, ...; task m is key head m % G of tile first + m // G.

    READS `[tiles, R, width]` holds the unions' keys, with BITS and COUNTS; those of more than `limit` keys are left out.
    """
    dtype: gl.constexpr = Q.dtype.element_ty
    keys = gl.allocate_shared_memory(dtype, [STAGES, KEYS, D], TILES)
    values = gl.allocate_shared_memory(dtype, [STAGES, KEYS, D], TILES)
    queries = gl.allocate_shared_memory(dtype, [2, ROWS, D], TILES)
    readers = gl.allocate_shared_memory(gl.int32, [STAGES, KEYS], LINES)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=129)  # the threads of `_gather`, and its bits
        mbarrier.init(free.index(stage), count=2)
    gl.warp_specialize(
        [
            (_rows, (
                Q, q_b, q_t, q_h, OUT, LSE, SINK, COUNTS, first, tasks, limit, T, scale, keys, values, queries, readers, ready, free,
                H, D, G, R, TILE, BLOCK_H, STAGES, HAS_SINK, 0,
            )),
            (_rows, (
                Q, q_b, q_t, q_h, OUT, LSE, SINK, COUNTS, first, tasks, limit, T, scale, keys, values, queries, readers, ready, free,
                H, D, G, R, TILE, BLOCK_H, STAGES, HAS_SINK, 1,
            )),
            (_gather, (
                K, V, k_b, k_s, k_g, v_b, v_s, v_g, READS, BITS, COUNTS, first, tasks, width, limit, T, keys, values, readers, ready, free,
                D, G, R, TILE, STAGES,
            )),
        ],
        [4, 4],
        [REGISTERS_ROWS, REGISTERS_GATHER],
    )  # fmt: skip


def serves(q: Tensor, k: Tensor, v: Tensor | None, v_channels: int, tile: int) -> bool:
    """Whether this kernel takes these inputs.

    It takes halves, as many channels of keys as of values, rows that begin at multiples of 16 channels (of other strides Triton doesn't
    know that 16 bytes lie in one piece), and heads that fill more than half of the rows that a query has.
    """
    if v is None or not q.dtype == k.dtype == v.dtype or q.dtype not in (torch.bfloat16, torch.float16):
        return False
    aligned = all(x.data_ptr() % 16 == 0 and not any(stride % 16 for stride in x.stride()[:-1]) for x in (k, v))
    full = q.shape[2] // k.shape[2] > ROWS.value // tile
    return aligned and full and q.shape[3] == v_channels and v_channels in (64, 128) and 2 <= tile <= 32  # a bit a query


def launch(
    q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, out: Tensor, lse: Tensor, scale: float, tile: int, first: int, limit: int,
    keys: Tensor, bits: Tensor, counts: Tensor,
) -> None:  # fmt: skip
    """out and lse of the tiles from `first` on whose unions, those of union.py, have at most `limit` keys."""
    _, T, H, D = q.shape
    G, R = k.shape[2], counts.shape[1]
    tasks = counts.shape[0] * G
    forward_unions[(min(tasks, processors(q.device)),)](
        q, k, v, out, lse, sink, keys, bits, counts, first, tasks, scale * LOG2E.value, T, keys.shape[-1], limit,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], H, D, G, R, tile, 2 * ROWS.value // tile, sink is not None,
        STAGES, *REGISTERS, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
