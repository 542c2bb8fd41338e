"""`scores` and `of_keys` of latent_backward.py in Gluon, for 128 heads and multiples of them.

A task is a query, 128 of its heads and a block of 128 keys. A program, one a processor, serves task after task and takes their channels
in steps of 64, four of them in shared memory. One group of warps loads, two groups of four warps multiply:

- `scores_128`: `_gather` copies keys, 16 bytes at a time, zeros where there is none, and has the copy engine fetch queries and gradients.
  `_score` sums the products of 64 heads over all steps, and writes P and dS.
- `of_keys_128`: `_fetch`, a single warp, has the copy engine fetch the P and dS of a task, and gradients and queries in steps. `_sum_heads` holds
  P and dS of 64 keys in registers. The sums of a step are added to memory while the next is multiplied. The additions bind it, and are
  fastest where 16 threads add the 256 bytes that a key has of a step.

The groups hand over through barriers in shared memory, as in hopper.py. Steps are counted over all tasks of a program.
"""

from __future__ import annotations

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, fence_async_shared, mbarrier, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from skim.ops.dispatch import processors
from skim.ops.gluon import COPY, LOG2E, TILES, copy, fetch

HEADS, KEYS, STEP = gl.constexpr(128), gl.constexpr(128), gl.constexpr(64)  # of a task; channels of a step
ROWS = gl.constexpr(64)  # heads or keys of a group that multiplies
VALUES = gl.constexpr(512)  # channels of the latent that are the values too
STAGES = gl.constexpr(4)  # steps in shared memory
REGISTERS_SCORES = 208, 72  # a thread of the second group that multiplies and of the one that loads; the first takes what is left
REGISTERS_KEYS = 240, 24

SCORES = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16]))  # [ROWS, KEYS]
SUMS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))  # [ROWS, STEP]
WEIGHTS = gl.constexpr(gl.DotOperandLayout(0, SUMS.value, 2))
# As SCORES, but of four neighbouring threads each has eight keys in a row: 16 bytes of halves.
STORED = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 4], [8, 0], [0, 32], [0, 64]], [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [64, 128]
    )
)
# [ROWS, STEP]: 16 threads have the channels of a key, 16 bytes each.
ADDED = gl.constexpr(
    gl.DistributedLinearLayout([[0, 1], [0, 2], [2, 0], [4, 0], [8, 0]], [[0, 4], [0, 8], [0, 16], [0, 32], [1, 0]], [[16, 0], [32, 0]], [], [64, 64])
)


@gluon.jit
def _task(task, blocks, H: gl.constexpr):
    """Query within the chunk, first head, and where the block of keys begins: blocks turn with the queries, so that programs share short rows."""
    parts: gl.constexpr = H // HEADS
    row = task // (parts * blocks)
    return row, task % parts * HEADS, (task // parts % blocks + row) % blocks * KEYS


@gluon.jit
def _end(ENDS, first, task, tasks, blocks, H: gl.constexpr):
    """How many slots of its selection a task's query has; loaded a task ahead."""
    row, _, _ = _task(task, blocks, H)
    return gl.load(ENDS + first + row, mask=task < tasks, other=0)


@gluon.jit
def _keys(READS, query, at, width, N: gl.constexpr, layout: gl.constexpr):
    """N keys of a query's selection from slot `at` on, -1 where there is none."""
    slot = at + gl.arange(0, N, layout)
    return gl.load(READS + query.to(gl.int64) * width + slot, mask=slot < width, other=-1)


@gluon.jit
def _gather(
    Q, K, GRAD, READS, ENDS, first, tasks, blocks, T, width, k_b, k_s, keys, queries, grads, ready, free, H: gl.constexpr, D: gl.constexpr
):  # fmt: skip
    """Bring keys, queries and gradients, step after step."""
    size: gl.constexpr = HEADS * STEP * 2  # bytes
    step = 0
    end_ahead = _end(ENDS, first, gl.program_id(0), tasks, blocks, H)
    for task in range(gl.program_id(0), tasks, gl.num_programs(0)):
        end = end_ahead
        end_ahead = _end(ENDS, first, task + gl.num_programs(0), tasks, blocks, H)
        row, head, at = _task(task, blocks, H)
        query = first + row
        if at < end:
            key = _keys(READS, query, at, width, KEYS, gl.SliceLayout(1, COPY))
            real = gl.expand_dims(key >= 0, 1)
            source = gl.expand_dims(K + (query // T).to(gl.int64) * k_b + gl.maximum(key, 0).to(gl.int64) * k_s, 1)
            source = source + gl.expand_dims(gl.arange(0, STEP, gl.SliceLayout(0, COPY)), 0)
            head += query * H
            for channel in gl.static_range(0, D, STEP):
                stage = step % STAGES
                arrived = ready.index(stage)
                mbarrier.wait(free.index(stage), (step // STAGES & 1) ^ 1)
                mbarrier.expect(arrived, size * (2 if channel < VALUES else 1))
                fetch(Q, [head, channel], arrived, queries.index(stage))
                if channel < VALUES:
                    fetch(GRAD, [head, channel], arrived, grads.index(stage))
                copy(keys.index(stage), source + channel, mask=real)
                async_copy.mbarrier_arrive(arrived, increment_count=False)  # each thread, when its copies are there
                step += 1


@gluon.jit
def _score(
    FULL, SHIFT, READS, ENDS, P, DS, first, tasks, blocks, scale, width, wide, keys, queries, grads, ready, free,
    H: gl.constexpr, D: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """P and dS of half the heads of each task."""
    step = 0
    end_ahead = _end(ENDS, first, gl.program_id(0), tasks, blocks, H)
    for task in range(gl.program_id(0), tasks, gl.num_programs(0)):
        end = end_ahead
        end_ahead = _end(ENDS, first, task + gl.num_programs(0), tasks, blocks, H)
        row, head, at = _task(task, blocks, H)
        query = first + row
        head += GROUP * ROWS
        if at < end:
            place = query.to(gl.int64) * H + head + gl.arange(0, ROWS, gl.SliceLayout(1, SCORES))
            full, shift = gl.expand_dims(gl.load(FULL + place), 1), gl.expand_dims(gl.load(SHIFT + place), 1)
            real = gl.expand_dims(_keys(READS, query, at, width, KEYS, gl.SliceLayout(0, SCORES)) >= 0, 0)
            s = gl.zeros([ROWS, KEYS], gl.float32, SCORES)
            dp = gl.zeros([ROWS, KEYS], gl.float32, SCORES)
            for channel in gl.static_range(0, D, STEP):
                stage = step % STAGES
                mbarrier.wait(ready.index(stage), step // STAGES & 1)
                fence_async_shared()
                k = keys.index(stage).permute((1, 0))
                s = warpgroup_mma(queries.index(stage).slice(GROUP * ROWS, ROWS), k, s, use_acc=channel > 0, is_async=True)
                if channel < VALUES:
                    dp = warpgroup_mma(grads.index(stage).slice(GROUP * ROWS, ROWS), k, dp, use_acc=channel > 0, is_async=True)
                s, dp = warpgroup_mma_wait(0, deps=[s, dp])
                mbarrier.arrive(free.index(stage), count=1)
                step += 1
            p = gl.where(real, gl.exp2(s * scale - full), 0.0)
            ds = p * (dp + shift) * (scale / LOG2E)
            into = (row * H + head + gl.arange(0, ROWS, gl.SliceLayout(1, STORED))).to(gl.int64) * wide + at
            into = gl.expand_dims(into, 1) + gl.expand_dims(gl.arange(0, KEYS, gl.SliceLayout(0, STORED)), 0)
            gl.store(P + into, gl.convert_layout(p.to(P.dtype.element_ty), STORED))
            gl.store(DS + into, gl.convert_layout(ds.to(P.dtype.element_ty), STORED))


@gluon.jit(do_not_specialize=["first", "tasks", "blocks", "T"])
def scores_128(
    Q, K, GRAD, FULL, SHIFT, READS, ENDS, P, DS, first, tasks, blocks, scale, T, width, wide, k_b, k_s,
    H: gl.constexpr, D: gl.constexpr, REGISTERS_SCORE: gl.constexpr, REGISTERS_GATHER: gl.constexpr,
):  # fmt: skip
    """P and dS `[.., H, wide]` of queries from `first` on; Q and GRAD are descriptors of all their heads' rows."""
    dtype: gl.constexpr = P.dtype.element_ty
    keys = gl.allocate_shared_memory(dtype, [STAGES, KEYS, STEP], TILES)
    queries = gl.allocate_shared_memory(dtype, [STAGES, HEADS, STEP], TILES)
    grads = gl.allocate_shared_memory(dtype, [STAGES, HEADS, STEP], TILES)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=129)  # the threads of `_gather`, and what it expects of the copy engine
        mbarrier.init(free.index(stage), count=2)
    fence_async_shared()  # the copy engine arrives at them
    gl.warp_specialize(
        [
            (_score, (FULL, SHIFT, READS, ENDS, P, DS, first, tasks, blocks, scale, width, wide, keys, queries, grads, ready, free, H, D, 0)),
            (_score, (FULL, SHIFT, READS, ENDS, P, DS, first, tasks, blocks, scale, width, wide, keys, queries, grads, ready, free, H, D, 1)),
            (_gather, (Q, K, GRAD, READS, ENDS, first, tasks, blocks, T, width, k_b, k_s, keys, queries, grads, ready, free, H, D)),
        ],
        [4, 4],
        [REGISTERS_SCORE, REGISTERS_GATHER],
    )


@gluon.jit
def _fetch(
    Q, GRAD, P, DS, ENDS, first, tasks, blocks, weights, steps, weights_ready, ready, free, H: gl.constexpr, D: gl.constexpr
):  # fmt: skip
    """Bring P and dS of each task, 64 keys at a time, and gradients and queries, step after step."""
    size: gl.constexpr = HEADS * STEP * 2  # bytes
    step = 0
    end_ahead = _end(ENDS, first, gl.program_id(0), tasks, blocks, H)
    for task in range(gl.program_id(0), tasks, gl.num_programs(0)):
        end = end_ahead
        end_ahead = _end(ENDS, first, task + gl.num_programs(0), tasks, blocks, H)
        row, head, at = _task(task, blocks, H)
        if at < end:
            mbarrier.expect(weights_ready, 4 * size)  # who has freed a step of the task before has its P and dS in registers
            for group in gl.static_range(2):
                fetch(P, [row * H + head, at + group * ROWS], weights_ready, weights.index(2 * group))
                fetch(DS, [row * H + head, at + group * ROWS], weights_ready, weights.index(2 * group + 1))
            head += (first + row) * H
            for channel in gl.static_range(0, D, STEP):
                stage = step % STAGES
                arrived = ready.index(stage)
                mbarrier.wait(free.index(stage), (step // STAGES & 1) ^ 1)
                mbarrier.expect(arrived, size * (2 if channel < VALUES else 1))
                if channel < VALUES:
                    fetch(GRAD, [head, channel], arrived, steps.index(2 * stage))
                fetch(Q, [head, channel], arrived, steps.index(2 * stage + 1))
                step += 1


@gluon.jit
def _add(INTO, sums, real):
    gl.atomic_add(INTO, gl.convert_layout(sums, ADDED), mask=real, sem="relaxed")


@gluon.jit
def _sum_heads(
    READS, ENDS, DK, first, tasks, blocks, T, S, width, weights, steps, weights_ready, ready, free,
    H: gl.constexpr, D: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """Add the gradients of half the keys of each task."""
    block = 0
    step = 0
    end_ahead = _end(ENDS, first, gl.program_id(0), tasks, blocks, H)
    for task in range(gl.program_id(0), tasks, gl.num_programs(0)):
        end = end_ahead
        end_ahead = _end(ENDS, first, task + gl.num_programs(0), tasks, blocks, H)
        row, _, at = _task(task, blocks, H)
        query = first + row
        if at < end:
            key = _keys(READS, query, at + GROUP * ROWS, width, ROWS, gl.SliceLayout(1, ADDED))
            real = gl.expand_dims(key >= 0, 1)
            into = gl.expand_dims(DK + ((query // T).to(gl.int64) * S + gl.maximum(key, 0)) * D, 1)
            into = into + gl.expand_dims(gl.arange(0, STEP, gl.SliceLayout(0, ADDED)), 0)
            mbarrier.wait(weights_ready, block & 1)
            p = weights.index(2 * GROUP).permute((1, 0)).load(WEIGHTS)
            ds = weights.index(2 * GROUP + 1).permute((1, 0)).load(WEIGHTS)
            block += 1
            before = gl.zeros([ROWS, STEP], gl.float32, SUMS)
            for channel in gl.static_range(0, D, STEP):
                stage = step % STAGES
                mbarrier.wait(ready.index(stage), step // STAGES & 1)
                sums = gl.zeros([ROWS, STEP], gl.float32, SUMS)
                if channel < VALUES:
                    sums = warpgroup_mma(p, steps.index(2 * stage), sums, use_acc=False, is_async=True)
                sums = warpgroup_mma(ds, steps.index(2 * stage + 1), sums, use_acc=channel < VALUES, is_async=True)
                if channel > 0:
                    _add(into + (channel - STEP), before, real)
                before = warpgroup_mma_wait(0, deps=[sums])
                mbarrier.arrive(free.index(stage), count=1)
                step += 1
            _add(into + (D - STEP), before, real)


@gluon.jit(do_not_specialize=["first", "tasks", "blocks", "T"])
def of_keys_128(
    Q, GRAD, P, DS, READS, ENDS, DK, first, tasks, blocks, T, S, width,
    H: gl.constexpr, D: gl.constexpr, REGISTERS_SUM: gl.constexpr, REGISTERS_FETCH: gl.constexpr,
):  # fmt: skip
    """Add what queries from `first` on give to their keys' gradients to DK, float32 `[B, S, D]`; Q, GRAD, P and DS are descriptors."""
    weights = gl.allocate_shared_memory(P.dtype, [4, HEADS, ROWS], TILES)
    steps = gl.allocate_shared_memory(P.dtype, [2 * STAGES, HEADS, STEP], TILES)
    weights_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(weights_ready, count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(free.index(stage), count=2)
    fence_async_shared()  # the copy engine arrives at them
    gl.warp_specialize(
        [
            (_sum_heads, (
                READS, ENDS, DK, first, tasks, blocks, T, S, width, weights, steps, weights_ready, ready, free, H, D, 0,
            )),
            (_sum_heads, (
                READS, ENDS, DK, first, tasks, blocks, T, S, width, weights, steps, weights_ready, ready, free, H, D, 1,
            )),
            (_fetch, (Q, GRAD, P, DS, ENDS, first, tasks, blocks, weights, steps, weights_ready, ready, free, H, D)),
        ],
        [4, 1],
        [REGISTERS_SUM, REGISTERS_FETCH],
    )  # fmt: skip


def serves(q: Tensor, k: Tensor, grad: Tensor) -> bool:
    """Whether these kernels take inputs that latent_backward.py serves.

    They take multiples of 128 heads, and rows of keys that begin at multiples of 16 channels (of other strides Triton doesn't know that
    16 bytes lie in one piece).
    """
    aligned = not any(x.data_ptr() % 16 for x in (q, k, grad)) and not any(stride % 16 for stride in k.stride()[:2])
    return aligned and q.shape[2] % HEADS.value == 0


def descriptors(*tensors: Tensor) -> list[TensorDescriptor]:
    """Of contiguous tensors, whose rows the copy engine fetches in boxes of 128 heads and 64 columns."""
    return [TensorDescriptor.from_tensor(x.flatten(0, -2), [HEADS.value, STEP.value], TILES.value) for x in tensors]


def launch_scores(
    q: Tensor, k: Tensor, full: Tensor, shift: Tensor, indices: Tensor, ends: Tensor, p: Tensor, ds: Tensor, rows: list[TensorDescriptor],
    first: int, n: int, scale: float,
) -> None:  # fmt: skip
    """P and dS of n queries from `first` on; rows: descriptors of q, the output's gradient, p and ds."""
    T, H, D = q.shape[1:]
    K, wide = indices.shape[3], p.shape[2]
    blocks = wide // KEYS.value
    tasks = n * (H // HEADS.value) * blocks
    scores_128[(min(tasks, processors(q.device)),)](
        rows[0], k, rows[1], full, shift, indices, ends, p, ds, first, tasks, blocks, scale * LOG2E.value, T, K, wide, *k.stride()[:2], H, D,
        *REGISTERS_SCORES, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip


def launch_of_keys(q: Tensor, indices: Tensor, ends: Tensor, dk: Tensor, rows: list[TensorDescriptor], first: int, n: int) -> None:
    """Add what n queries from `first` on give to dk; rows as in `launch_scores`."""
    T, H, D = q.shape[1:]
    K = indices.shape[3]
    blocks = triton.cdiv(K, KEYS.value)
    tasks = n * (H // HEADS.value) * blocks
    of_keys_128[(min(tasks, processors(q.device)),)](
        *rows, indices, ends, dk, first, tasks, blocks, T, dk.shape[1], K, H, D, *REGISTERS_KEYS, num_warps=4, enable_fp_fusion=True
    )
