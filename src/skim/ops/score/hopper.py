"""Index scores of FP8 on sm_90 in Gluon: `I[t, s] = sum_j w[t, j] * J^-1/2 * E^-1/2 * ReLU(q[t, j] . k[s])`.

A task is a tile of neighbouring queries, which with all their heads are the 256 columns of a product, and a chunk of the keys.
A program, one a processor, serves task after task, the longest first, and then an equal part, of one or two tasks, of those that are
left behind whole rounds. It has three groups of four warps:

- two times `_score`: each takes one half of every block of 256 keys, multiplies 64 keys at a time with the queries, half of the
  heads after the other, and sums one half while the next is multiplied. While one group sums, the other multiplies;
- `_load` copies the queries of the next task, 16 bytes at a time, has the copy engine bring the keys of the next blocks, and writes -inf
  where no query sees.

A row of a product is a key, and a thread holds two rows. Heads stand in such an order that all of a query lie in one thread.
The groups hand over through barriers in shared memory: a barrier's n-th wait is for phase n % 2; who waits for something to become
free waits for the phase before, which a new barrier has behind it.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, fence_async_shared, mbarrier, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from skim.ops.dispatch import processors
from skim.ops.gluon import LINES, copy, fetch

ROWS = gl.constexpr(64)  # of a product
KEYS = gl.constexpr(256)  # of a block: two groups take two times ROWS
STAGES = gl.constexpr(4)  # blocks of keys in shared memory
HEADS = 64  # at most
WORK = 1024  # multiplications a score, at least: with fewer, writing scores bounds every kernel
CHUNK = 8192  # keys of a task, at most
BEGINNING = 160  # keys that a group could score while it begins a task
REGISTERS = {256: (232, 40), 128: (216, 72)}  # a thread of the second `_score` and of `_load`; the first takes what is left

LINE = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))
HIDDEN = gl.constexpr(gl.BlockedLayout([1, 4], [1, 32], [4, 1], [1, 0]))  # [BQ, KEYS], 16 bytes a thread


@gluon.constexpr_function
def _dots(width):
    """Layout of `[ROWS, width]`, what a product leaves."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, width, 32])


@gluon.constexpr_function
def of_sums(BQ, rows, of_thread, of_lanes):
    """Layout of `[4 * rows, BQ]`, each warp's rows behind each other: what sums of heads are left in, of rows of a thread and of its lanes."""
    queries = [[0, 4 << i] for i in range((BQ // 4).bit_length() - 1)]
    lanes = [[0, 1], [0, 2], *([n, 0] for n in of_lanes)]
    return gl.DistributedLinearLayout([*([n, 0] for n in of_thread), *queries], lanes, [[rows, 0], [2 * rows, 0]], [], [4 * rows, BQ])


@gluon.constexpr_function
def _scores(BQ):
    """Layout of `[ROWS, BQ]`, rows as a product leaves them."""
    return of_sums(BQ, 16, [8], [1, 2, 4])


@gluon.constexpr_function
def _tiles(BE):
    """Layout of rows of BE bytes in shared memory, for products."""
    return gl.NVMMASharedLayout(BE, 8, 2)


@gluon.constexpr_function
def row_copy(BE):
    """Who copies rows of BE bytes: 16 bytes a thread."""
    return gl.BlockedLayout([1, 16], [512 // BE, BE // 16], [4, 1], [1, 0])


def refusal(function: str, args: tuple[Any, ...]) -> str | None:
    """Why this kernel can't run this call, or None."""
    if function != "index_scores":
        return "hopper has forwards only"
    q, k, _, q_scale, k_scale, *_, block_table = args
    if q.dtype != torch.float8_e4m3fn or k.dtype != torch.float8_e4m3fn or q_scale is None or k_scale is None:
        return "it multiplies float8_e4m3fn queries and keys with their scales"
    if any(isinstance(x, Tensor) and x.dtype == torch.float64 for x in args):
        return "it computes in float32, not in float64"
    J, E = q.shape[2:]
    if J > HEADS or E not in (64, 128):
        return f"it takes up to {HEADS} heads of 64 or 128 channels, got {J} of {E}"
    if J * E < WORK:
        return f"it gains nothing where heads times channels are less than {WORK}, got {J} heads of {E}"
    if block_table is not None:
        return "it reads keys in rows, not in pages"
    if k.stride()[1:] != (E, 1) or k.data_ptr() % 16 or (k.stride(0) % E and k.shape[0] > 1):
        return "rows of k_index don't follow each other, or its batch rows begin at no multiple of 16 bytes, or no whole number of rows apart"
    if q.is_contiguous() and q.data_ptr() % 16:  # others are copied
        return "it copies 16 bytes at a time, and q_index begins at no multiple of 16 bytes"
    return None


def queries_of(J: int) -> int:
    """Neighbouring queries that with all their heads fill the columns: 128 with few heads, whose queries take registers of their own."""
    heads = triton.next_power_of_2(J)
    return (256 if heads == HEADS else 128) // heads


def _chunk(S: int, tiles: int, programs: int) -> int:
    """Keys of a task: of as many chunks as give each program one task at most, or of one chunk more, whichever ends first; CHUNK at most."""

    def cost(chunks: int) -> float:
        tasks, keys = tiles * chunks, S / chunks + BEGINNING
        return keys if tasks <= programs else tasks / programs * keys + BEGINNING

    best = min((max(n, triton.cdiv(S, CHUNK)) for n in (programs // tiles, programs // tiles + 1)), key=cost)
    return triton.cdiv(triton.cdiv(S, best), KEYS.value) * KEYS.value


@gluon.jit
def turn_of(turn):
    """Where this program stands in a round: rounds run forwards and backwards in turns, so that all programs have the same work."""
    program = gl.program_id(0)
    return gl.where(turn % 2 == 0, program, gl.num_programs(0) - 1 - program)


@gluon.jit
def task_of(task, tiles, row_tiles, chunk, BQ: gl.constexpr):
    """Row of the batch, first query and first key of a task.

    Tasks of one chunk follow each other: they find their keys in L2. The last queries, which see most, come first.
    """
    tile = tiles - 1 - task % tiles
    return (tile // row_tiles).to(gl.int64), tile % row_tiles * BQ, task // tiles * chunk


@gluon.jit
def _left(tasks):
    """Whole rounds, tasks left behind them, and which part of these is this program's first.

    A task has as many parts as there are programs, so each program serves as many parts as tasks are left.
    """
    programs = gl.num_programs(0)
    rounds, left = tasks // programs, tasks % programs
    return rounds, left, turn_of(rounds) * left


@gluon.jit
def _parts(tasks):
    """How many tasks and parts of tasks this program serves."""
    rounds, left, begin = _left(tasks)
    return rounds + gl.cdiv(begin % gl.num_programs(0) + left, gl.num_programs(0))


@gluon.jit
def _part(n, tasks):
    """This program's n-th task, and from which to which of its parts it serves it."""
    programs = gl.num_programs(0)
    rounds, left, begin = _left(tasks)
    beyond, share = n - rounds, begin % programs
    task = gl.where(beyond < 0, n * programs + turn_of(n), rounds * programs + begin // programs + beyond)
    low = gl.where(beyond == 0, share, 0)
    high = gl.where(beyond < 0, programs, gl.minimum(share + left - beyond * programs, programs))
    return task, low, high


@gluon.jit
def _walk(start, end, origin, chunk, S, low, high):
    """From which block to which queries with these intervals see keys of a part of a task; its blocks, from and to, none behind the last key.

    Parts, `low` to `high` of as many as there are programs, share what is seen of a task; what nobody sees is in the first and the last.
    """
    programs = gl.num_programs(0)
    seen = end > start
    least = gl.min(gl.where(seen, start, S), 0)
    most = gl.max(gl.where(seen, end, 0), 0)
    first, last = origin // KEYS, gl.cdiv(gl.minimum(origin + chunk, S), KEYS)
    begin = gl.minimum(gl.maximum(least // KEYS, first), last)
    blocks = gl.maximum(gl.minimum(gl.cdiv(most, KEYS), last) - begin, 0)
    stop, begin = begin + blocks * high // programs, begin + blocks * low // programs
    return begin, stop, gl.where(low == 0, first, begin), gl.where(high == programs, last, stop)


@gluon.jit
def _column(column, BQ: gl.constexpr, BJ: gl.constexpr):
    """Query and head of each column of the products.

    A product leaves a thread two neighbouring columns of each eight: heads of one query, and the threads beside it hold others.
    """
    WIDTH: gl.constexpr = BQ * BJ // 2
    HALF: gl.constexpr = BJ // 2
    inner = column % WIDTH
    eight = inner // 8
    return eight // (HALF // 2) * 4 + inner % 8 // 2, column // WIDTH * HALF + eight % (HALF // 2) * 2 + inner % 2


@gluon.jit
def _fill(OUT, begin, stop, t0, T, S, BQ: gl.constexpr):
    """-inf for blocks of keys that no query of the tile sees; OUT is of one row of the batch."""
    t = gl.expand_dims(t0 + gl.arange(0, BQ, gl.SliceLayout(1, HIDDEN)), 1)
    hidden = gl.full([BQ, KEYS], float("-inf"), gl.float32, HIDDEN)
    for block in range(begin, stop):
        key = gl.expand_dims(block * KEYS + gl.arange(0, KEYS, gl.SliceLayout(0, HIDDEN)), 0)
        gl.store(OUT + t.to(gl.int64) * S + key, hidden, mask=(t < T) & (key < S))


@gluon.jit
def load_queries(
    Q, W, Q_SCALE, START, END, t0, T, q, w, q_scales, starts, ends, J: gl.constexpr, BQ: gl.constexpr, BJ: gl.constexpr, BE: gl.constexpr
):  # fmt: skip
    """Copy queries, their weights, scales and intervals; zeros where there is no such query or head. Pointers are of one row of the batch."""
    layout: gl.constexpr = row_copy(BE)
    query, head = _column(gl.arange(0, BQ * BJ, gl.SliceLayout(1, layout)), BQ, BJ)
    source = t0.to(gl.int64) * (J * BE) + (query * J + head) * BE
    channel = gl.expand_dims(gl.arange(0, BE, gl.SliceLayout(0, layout)), 0)
    copy(q, Q + gl.expand_dims(source, 1) + channel, mask=gl.expand_dims((t0 + query < T) & (head < J), 1))
    query, head = _column(gl.arange(0, BQ * BJ, LINE), BQ, BJ)
    source, real = t0.to(gl.int64) * J + query * J + head, (t0 + query < T) & (head < J)
    copy(w, W + source, mask=real)
    copy(q_scales, Q_SCALE + source, mask=real)
    t = t0 + gl.arange(0, BQ, LINE)
    copy(starts, START + t, mask=t < T)
    copy(ends, END + t, mask=t < T)


@gluon.jit
def _load(
    Q, W, Q_SCALE, K, SCALE, START, END, OUT, k_b, s_b, s_s, tasks, tiles, row_tiles, chunk, T, S,
    q, w, q_scales, starts, ends, keys, scales, asked, answered, ready, free,
    J: gl.constexpr, BQ: gl.constexpr, BJ: gl.constexpr, BE: gl.constexpr,
):  # fmt: skip
    """Bring queries and keys."""
    line = gl.arange(0, KEYS, LINE)
    block = 0
    for n in range(_parts(tasks)):
        task, low, high = _part(n, tasks)
        b, t0, origin = task_of(task, tiles, row_tiles, chunk, BQ)
        buffer = n % 2
        mbarrier.wait(answered.index(buffer), (n // 2 & 1) ^ 1)
        load_queries(
            Q + b * T * (J * BE), W + b * T * J, Q_SCALE + b * T * J, START + b * T, END + b * T, t0, T,
            q.index(buffer), w.index(buffer), q_scales.index(buffer), starts.index(buffer), ends.index(buffer), J, BQ, BJ, BE,
        )  # fmt: skip
        async_copy.mbarrier_arrive(asked.index(buffer), increment_count=False)  # each thread, when its copies are there
        t = t0 + gl.arange(0, BQ, gl.SliceLayout(0, _scores(BQ)))
        start = gl.maximum(gl.load(START + b * T + t, mask=t < T, other=0), 0)
        end = gl.minimum(gl.load(END + b * T + t, mask=t < T, other=0), S)
        begin, stop, first, last = _walk(start, end, origin, chunk, S, low, high)
        row = b.to(gl.int32) * k_b
        for at in range(begin, stop):
            stage = block % STAGES
            arrived = ready.index(stage)
            place = at * KEYS + line
            mbarrier.wait(free.index(stage), (block // STAGES & 1) ^ 1)
            mbarrier.expect(arrived, KEYS * BE)
            fetch(K, [row + at * KEYS, 0], arrived, keys.index(stage))
            copy(scales.index(stage), SCALE + b * s_b + place.to(gl.int64) * s_s, mask=place < S)
            async_copy.mbarrier_arrive(arrived, increment_count=False)
            block += 1
        _fill(OUT + b * T * S, first, begin, t0, T, S, BQ)
        _fill(OUT + b * T * S, stop, last, t0, T, S, BQ)


@gluon.jit
def _multiply(k, i: gl.constexpr, q, HALF: gl.constexpr, WIDTH: gl.constexpr, into, adding):
    """Begin the products of the i-th ROWS of keys k `[.., BE]` with one half of the columns of q `[.., BE]`, in the registers of `into`."""
    return warpgroup_mma(k.slice(i * ROWS, ROWS), q.slice(HALF * WIDTH, WIDTH).permute((1, 0)), into, use_acc=adding, is_async=True)


@gluon.jit
def _sum_heads(dots, w, BQ: gl.constexpr, BJ: gl.constexpr):
    """`sum_j w * ReLU(q . k)` over one half of the heads: `[ROWS, BQ]`.

    These products are finite, so x + |x| is twice ReLU(x); additions run at twice the rate of maxima.
    """
    terms = (dots + gl.abs(dots)) * gl.expand_dims(w, 0)
    terms = gl.permute(gl.reshape(terms, (ROWS, BQ // 4, BJ // 4, 4, 2)), (0, 1, 3, 2, 4))
    total = gl.sum(gl.sum(terms, 3), 3)
    # Here and not later: a product that is to overwrite dots would be waited for.
    total = gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [total], dtype=gl.float32, is_pure=False, pack=1)
    return gl.reshape(total, (ROWS, BQ))


@gluon.jit
def weights_of(w, scales, J: gl.constexpr, BE: gl.constexpr, WIDTH: gl.constexpr):
    """What `ReLU(q . k)` of each column is multiplied with, in two halves; twice ReLU is what `_sum_heads` sums."""
    FACTOR: gl.constexpr = 0.5 * (J**-0.5 * BE**-0.5)
    layout: gl.constexpr = gl.SliceLayout(0, _dots(WIDTH))
    first = w.slice(0, WIDTH).load(layout) * scales.slice(0, WIDTH).load(layout) * FACTOR
    return first, w.slice(WIDTH, WIDTH).load(layout) * scales.slice(WIDTH, WIDTH).load(layout) * FACTOR


@gluon.jit
def begin_products(k, q, WIDTH: gl.constexpr):
    """Begin the products of the first of two times ROWS keys, for `tile_scores`."""
    zeros = gl.zeros([ROWS, WIDTH], gl.float32, _dots(WIDTH))
    return _multiply(k, 0, q, 0, WIDTH, zeros, False), _multiply(k, 0, q, 1, WIDTH, zeros, False)


@gluon.jit
def tile_scores(dots, k, q, first_w, second_w, free, i: gl.constexpr, BQ: gl.constexpr, BJ: gl.constexpr):
    """Scores `[ROWS, BQ]`, without the keys' scales, of the i-th ROWS keys of two, whose products are under way as `dots`.

    While one half of the heads is summed, products with the other, or of the next keys, go on. Says when keys are `free`.
    """
    WIDTH: gl.constexpr = BQ * BJ // 2
    # False, which the assembler doesn't know: it would take other registers for the next products, and have too few.
    adding = gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [0], dtype=gl.int32, is_pure=False, pack=1) != 0
    first, second = dots
    first = warpgroup_mma_wait(1, deps=[first])
    scores = _sum_heads(first, first_w, BQ, BJ)
    if i == 0:
        first = _multiply(k, 1, q, 0, WIDTH, first, adding)
    second = warpgroup_mma_wait(1 - i, deps=[second])
    if i == 1:
        mbarrier.arrive(free, count=1)
    scores += _sum_heads(second, second_w, BQ, BJ)
    if i == 0:
        second = _multiply(k, 1, q, 1, WIDTH, second, adding)
    return scores, (first, second)


@gluon.jit
def _store(OUT, scores, scale, origin, t0, start, end, T, S, BQ: gl.constexpr):
    """Scores `[ROWS, BQ]` of the keys from `origin` on; OUT is of one row of the batch."""
    layout: gl.constexpr = _scores(BQ)
    scores = gl.convert_layout(scores, layout) * gl.expand_dims(scale, 1)
    key = gl.expand_dims(origin + gl.arange(0, ROWS, gl.SliceLayout(1, layout)), 1)
    t = gl.expand_dims(t0 + gl.arange(0, BQ, gl.SliceLayout(0, layout)), 0)
    visible = (key >= gl.expand_dims(start, 0)) & (key < gl.expand_dims(end, 0))
    gl.store(OUT + t.to(gl.int64) * S + key, gl.where(visible, scores, float("-inf")), mask=(key < S) & (t < T))


@gluon.jit
def _score(
    HALF: gl.constexpr, OUT, tasks, tiles, row_tiles, chunk, T, S, q, w, q_scales, starts, ends, keys, scales, asked, answered, ready, free,
    J: gl.constexpr, BQ: gl.constexpr, BJ: gl.constexpr, BE: gl.constexpr,
):  # fmt: skip
    """Scores of one half of each block of keys."""
    WIDTH: gl.constexpr = BQ * BJ // 2
    of_queries: gl.constexpr = gl.SliceLayout(0, _scores(BQ))
    of_keys: gl.constexpr = gl.SliceLayout(1, _scores(BQ))
    block = 0
    for n in range(_parts(tasks)):
        task, low, high = _part(n, tasks)
        b, t0, origin = task_of(task, tiles, row_tiles, chunk, BQ)
        buffer = n % 2
        mbarrier.wait(asked.index(buffer), n // 2 & 1)
        fence_async_shared()
        queries = q.index(buffer)
        first_w, second_w = weights_of(w.index(buffer), q_scales.index(buffer), J, BE, WIDTH)
        start, end = gl.maximum(starts.index(buffer).load(of_queries), 0), gl.minimum(ends.index(buffer).load(of_queries), S)
        begin, stop, _, _ = _walk(start, end, origin, chunk, S, low, high)
        for at in range(begin, stop):
            stage = block % STAGES
            mbarrier.wait(ready.index(stage), block // STAGES & 1)
            k = keys.index(stage).slice(HALF * 2 * ROWS, 2 * ROWS)
            scale = scales.index(stage).slice(HALF * 2 * ROWS, 2 * ROWS)
            dots = begin_products(k, queries, WIDTH)
            for i in gl.static_range(2):
                factor = scale.slice(i * ROWS, ROWS).load(of_keys)
                scores, dots = tile_scores(dots, k, queries, first_w, second_w, free.index(stage), i, BQ, BJ)
                _store(OUT + b * T * S, scores, factor, at * KEYS + (HALF * 2 + i) * ROWS, t0, start, end, T, S, BQ)
            block += 1
        mbarrier.arrive(answered.index(buffer), count=1)


@gluon.jit
def shared_memory(BQ: gl.constexpr, BJ: gl.constexpr, BE: gl.constexpr, ARRIVALS: gl.constexpr):
    """Places for the queries of two tasks with their weights, scales and intervals, and for STAGES blocks of keys with their scales; barriers.

    `asked` and `ready` say that a task's queries and a block's keys are there, `answered` and `free` that both groups are done with them.
    ARRIVALS make a block ready: those of 128 threads that copy, and of the copy engine.
    """
    q = gl.allocate_shared_memory(gl.float8e4nv, [2, BQ * BJ, BE], _tiles(BE))
    keys = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, KEYS, BE], _tiles(BE))
    w = gl.allocate_shared_memory(gl.float32, [2, BQ * BJ], LINES)
    q_scales = gl.allocate_shared_memory(gl.float32, [2, BQ * BJ], LINES)
    starts = gl.allocate_shared_memory(gl.int32, [2, BQ], LINES)
    ends = gl.allocate_shared_memory(gl.int32, [2, BQ], LINES)
    scales = gl.allocate_shared_memory(gl.float32, [STAGES, KEYS], LINES)
    asked = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    answered = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(asked.index(i), count=128)
        mbarrier.init(answered.index(i), count=2)
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=ARRIVALS)
        mbarrier.init(free.index(stage), count=2)
    return q, w, q_scales, starts, ends, keys, scales, asked, answered, ready, free


@gluon.jit(do_not_specialize=["k_b", "tasks", "tiles", "row_tiles", "chunk", "T"])
def forward(
    Q, W, Q_SCALE, K, SCALE, START, END, OUT, k_b, s_b, s_s, tasks, tiles, row_tiles, chunk, T, S,
    J: gl.constexpr, BQ: gl.constexpr, BJ: gl.constexpr, BE: gl.constexpr, REGISTERS_SCORE: gl.constexpr, REGISTERS_LOAD: gl.constexpr,
):  # fmt: skip
    """Scores. K: boxes of KEYS rows. A chunk's tasks are the `tiles` of the queries."""
    q, w, q_scales, starts, ends, keys, scales, asked, answered, ready, free = shared_memory(BQ, BJ, BE, 129)
    fence_async_shared()  # the copy engine arrives at them
    gl.warp_specialize(
        [
            (_score, (
                0, OUT, tasks, tiles, row_tiles, chunk, T, S, q, w, q_scales, starts, ends, keys, scales, asked, answered, ready, free,
                J, BQ, BJ, BE,
            )),
            (_score, (
                1, OUT, tasks, tiles, row_tiles, chunk, T, S, q, w, q_scales, starts, ends, keys, scales, asked, answered, ready, free,
                J, BQ, BJ, BE,
            )),
            (_load, (
                Q, W, Q_SCALE, K, SCALE, START, END, OUT, k_b, s_b, s_s, tasks, tiles, row_tiles, chunk, T, S,
                q, w, q_scales, starts, ends, keys, scales, asked, answered, ready, free, J, BQ, BJ, BE,
            )),
        ],
        [4, 4],
        [REGISTERS_SCORE, REGISTERS_LOAD],
    )  # fmt: skip


def index_scores(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
    start: Tensor,
    end: Tensor,
    workspace_mb: int,
    block_table: Tensor | None = None,
) -> Tensor:
    (B, T, J, E), S, k_scale = q.shape, k.shape[1], k_scale.float()
    scores = torch.empty(B, T, S, dtype=torch.float32, device=q.device)
    if scores.numel() == 0:
        return scores
    BJ, BQ, programs = triton.next_power_of_2(J), queries_of(J), processors(q.device)
    row_tiles = triton.cdiv(T, BQ)
    chunk = _chunk(S, B * row_tiles, programs)
    tasks = B * row_tiles * triton.cdiv(S, chunk)
    apart = k.stride(0) // E if B > 1 else 0
    rows = TensorDescriptor.from_tensor(k.as_strided(((B - 1) * apart + S, E), (E, 1)), [KEYS.value, E], _tiles(E))
    forward[(min(tasks, programs),)](
        q.contiguous(), weights.float().contiguous(), q_scale.float().contiguous(), rows, k_scale, start.contiguous(), end.contiguous(), scores,
        apart, *k_scale.stride(), tasks, B * row_tiles, row_tiles, chunk, T, S,
        J, BQ, BJ, E, *REGISTERS[BQ * BJ], num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return scores
