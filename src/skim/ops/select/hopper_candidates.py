"""Candidates for the top-k of FP8 index scores on sm_90 in Gluon: scores are compared where they are made, and never written.

Programs, tasks and groups of warps are those of skim.ops.score.hopper, one batch row at a time. What a task's queries see of its
chunk of keys is parted into PARTS runs, one for each warp that scores, so that a warp appends what it finds to a segment of its own,
in the order of keys, and counts it by itself. A block holds the next PART keys of each run.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, fence_async_shared, mbarrier

from skim.ops.gluon import LINES, copy
from skim.ops.score.hopper import (
    KEYS,
    LINE,
    REGISTERS,
    ROWS,
    STAGES,
    begin_products,
    index_scores,
    load_queries,
    of_sums,
    queries_of,
    row_copy,
    shared_memory,
    task_of,
    tile_scores,
    turn_of,
    weights_of,
)
from skim.ops.select.kernels import FINITE

PARTS = gl.constexpr(8)  # warps that score
PART = gl.constexpr(32)  # keys of a block that one of them scores
PIECE = gl.constexpr(16)  # of these, in one product


@gluon.constexpr_function
def _keys(BQ):
    """Layout of `[ROWS, BQ]`, rows in the order of their keys."""
    return of_sums(BQ, 16, [1], [2, 4, 8])


@gluon.constexpr_function
def _pairs(BQ):
    """Layout of `[ROWS // 2, BQ]`, pairs of neighbouring keys as `_keys` leaves them to threads."""
    return of_sums(BQ, 8, [], [1, 2, 4])


@gluon.jit
def _task(turn, tiles, chunk, BQ: gl.constexpr):
    """First query and first key of this program's task of a round."""
    _, t0, origin = task_of(turn * gl.num_programs(0) + turn_of(turn), tiles, tiles, chunk, BQ)
    return t0, origin


@gluon.jit
def _interval(start, end, S, budget, WITH_SCORES: gl.constexpr):
    """What is scored for queries that see start to end: nothing where all that a query sees is kept, and its scores aren't asked for."""
    start, end = gl.maximum(start, 0), gl.minimum(end, S)
    if not WITH_SCORES:
        end = gl.where(end - start <= budget, start, end)
    return start, end


@gluon.jit
def _walk(start, end, origin, chunk, S):
    """From which key on queries with these intervals see keys of a chunk, even, and how many blocks hold what they see."""
    seen = end > start
    low = gl.maximum(gl.min(gl.where(seen, start, S), 0) // 2 * 2, origin)
    high = gl.minimum(gl.max(gl.where(seen, end, 0), 0), origin + chunk)
    return low, gl.cdiv(gl.maximum(high - low, 0), KEYS)


@gluon.jit
def _load(
    Q, W, Q_SCALE, K, SCALE, START, END, POINT, POSITION, s_s, turns, tiles, chunk, T, S, budget,
    q, w, q_scales, starts, ends, points, positions, keys, scales, asked, answered, ready, free,
    J: gl.constexpr, BQ: gl.constexpr, BJ: gl.constexpr, BE: gl.constexpr, SAMPLED: gl.constexpr, WITH_SCORES: gl.constexpr,
):  # fmt: skip
    """Copy queries and keys."""
    layout: gl.constexpr = row_copy(BE)
    row = gl.arange(0, PIECE, gl.SliceLayout(1, layout))
    key = row % 8 * 2 + row // 8
    place = gl.expand_dims(key * BE, 1) + gl.expand_dims(gl.arange(0, BE, gl.SliceLayout(0, layout)), 0)
    line = gl.arange(0, KEYS, LINE)
    half, piece, part, inside = line // (KEYS // 2), line // ROWS % 2, line // PIECE % 4, line % PIECE
    block = 0
    for turn in range(turns):
        t0, origin = _task(turn, tiles, chunk, BQ)
        buffer = turn % 2
        mbarrier.wait(answered.index(buffer), (turn // 2 & 1) ^ 1)
        load_queries(
            Q, W, Q_SCALE, START, END, t0, T,
            q.index(buffer), w.index(buffer), q_scales.index(buffer), starts.index(buffer), ends.index(buffer), J, BQ, BJ, BE,
        )  # fmt: skip
        if SAMPLED:
            t = t0 + gl.arange(0, BQ, LINE)
            copy(points.index(buffer), POINT + t, mask=t < T)
            copy(positions.index(buffer), POSITION + t, mask=t < T)
        async_copy.mbarrier_arrive(asked.index(buffer), increment_count=False)  # each thread, when its copies are there
        t = t0 + gl.arange(0, BQ, gl.SliceLayout(0, _pairs(BQ)))
        start, end = gl.load(START + t, mask=t < T, other=0), gl.load(END + t, mask=t < T, other=0)
        start, end = _interval(start, end, S, budget, WITH_SCORES)
        low, blocks = _walk(start, end, origin, chunk, S)
        run = blocks * PART
        of_line = low + (half * 4 + part) * run + piece * PIECE + inside
        for n in range(blocks):
            stage = block % STAGES
            mbarrier.wait(free.index(stage), (block // STAGES & 1) ^ 1)
            into = keys.index(stage)
            for p in gl.static_range(PARTS):
                for i in gl.static_range(PART // PIECE):
                    first = low + p * run + n * PART + i * PIECE
                    rows = into.slice((p // 4 * 2 + i) * ROWS + p % 4 * PIECE, PIECE)
                    copy(rows, K + gl.cast(first, gl.int64) * BE + place, mask=gl.expand_dims(key < S - first, 1))
            scaled = of_line + n * PART
            copy(scales.index(stage), SCALE + scaled.to(gl.int64) * s_s, mask=scaled < S)
            async_copy.mbarrier_arrive(ready.index(stage), increment_count=False)
            block += 1


@gluon.jit
def _in_key_order(scores, BQ: gl.constexpr):
    """Scores `[ROWS, BQ]` with their keys as they follow each other: a thread's two rows, 8 apart in a product, hold neighbours."""
    scores = gl.reshape(gl.permute(gl.reshape(scores, (4, 2, 8, BQ)), (0, 2, 1, 3)), (ROWS, BQ))
    return gl.convert_layout(scores, _keys(BQ))


@gluon.jit
def _count(first, second, least, query, earlier):
    """Of the pairs of scores of one query in one warp: how many scores before each pair reach `least`, and how many at all.

    Four lanes hold the same pair of keys, of four queries; `query` is the lane's. `earlier`: four bits for each earlier pair.
    """
    return gl.inline_asm_elementwise(
        """{ .reg .pred p; .reg .b32 a, b;
        setp.ge.f32 p, $2, $4; vote.sync.ballot.b32 a, p, -1; setp.ge.f32 p, $3, $4; vote.sync.ballot.b32 b, p, -1;
        shr.b32 a, a, $5; shr.b32 b, b, $5; and.b32 a, a, 0x11111111; and.b32 b, b, 0x11111111; mad.lo.s32 a, b, 2, a;
        popc.b32 $1, a; and.b32 a, a, $6; popc.b32 $0, a; }""",
        "=&r,=&r,f,f,f,r,r",
        [first, second, least, query, earlier],
        dtype=(gl.int32, gl.int32),
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _next_score(score):
    """As `next_score` of kernels.py."""
    bits = gl.cast(score, gl.int32, bitcast=True)
    rank = (bits ^ ((bits >> 31) & 0x7FFFFFFF)) + 1
    return gl.cast(rank ^ ((rank >> 31) & 0x7FFFFFFF), gl.float32, bitcast=True)


@gluon.jit
def _entry(key, score):
    """A candidate: its score's bits and its position."""
    bits = gl.cast(score, gl.int32, bitcast=True)
    return (gl.cast(bits, gl.int64) << 32) | gl.cast(gl.cast(key, gl.uint32, bitcast=True), gl.int64)


@gluon.jit
def _ranked(scores, key, start, end, stop, keep_first, keep_recent, SAMPLED: gl.constexpr, KEEP: gl.constexpr):
    """Scores as they are compared with the least of a candidate: NaN where a key isn't seen or not before `stop`, infinite where it is kept."""
    ranked = scores if SAMPLED else gl.maximum(scores, -FINITE)  # where all are candidates NaN is one too
    if KEEP:
        ranked = gl.where((key - start < keep_first) | (key >= end - keep_recent), float("inf"), ranked)
    return gl.where((key >= start) & (key < stop), ranked, float("nan"))


@gluon.jit
def _add_exponentials(largest, total, scores, seen):
    """Running maximum and sum of exponentials, of which `total` is relative to `largest`, and the scores that are seen."""
    scores = gl.where(seen, scores, float("-inf"))
    larger = gl.maximum(largest, scores)
    base = gl.where(gl.abs(larger) == float("inf"), 0.0, larger)
    return larger, total * gl.exp(largest - base) + gl.exp(scores - base)


@gluon.jit
def _of_segment(largest, total, BQ: gl.constexpr):
    """Maximum and sum of exponentials of a warp, from those of its threads, in each of them."""
    inside, sums = gl.reshape(largest, (4, 8, BQ)), gl.reshape(total, (4, 8, BQ))
    maximum = gl.maximum(inside, gl.expand_dims(gl.max(inside, 1), 1))
    base = gl.where(gl.abs(maximum) == float("inf"), 0.0, maximum)
    own = gl.where(inside == float("-inf"), base, gl.where(inside == float("inf"), 0.0, inside))  # a sum of NaN alone stays
    sums = sums * gl.exp(own - base)
    sums = gl.expand_dims(gl.sum(sums, 1), 1) + gl.zeros_like(sums)
    layout: gl.constexpr = _pairs(BQ)
    return gl.convert_layout(gl.reshape(maximum, (ROWS // 2, BQ)), layout), gl.convert_layout(gl.reshape(sums, (ROWS // 2, BQ)), layout)


@gluon.jit
def _compare(
    HALF: gl.constexpr, ENTRIES, COUNTS, MAXIMA, SUMS, segment, turns, tiles, chunk, T, S, budget, keep_first, keep_recent,
    q, w, q_scales, starts, ends, points, positions, keys, scales, asked, answered, ready, free,
    J: gl.constexpr, BQ: gl.constexpr, BJ: gl.constexpr, BE: gl.constexpr,
    SAMPLED: gl.constexpr, KEEP: gl.constexpr, WITH_SCORES: gl.constexpr,
):  # fmt: skip
    """Candidates of one half of each block of keys."""
    WIDTH: gl.constexpr = BQ * BJ // 2
    layout: gl.constexpr = _pairs(BQ)
    of_queries: gl.constexpr = gl.SliceLayout(0, layout)
    of_keys: gl.constexpr = gl.SliceLayout(1, _keys(BQ))
    pair = gl.expand_dims(gl.arange(0, ROWS // 2, gl.SliceLayout(1, layout)), 1)
    query = gl.expand_dims(gl.arange(0, BQ, of_queries), 0)
    part, within = HALF * 4 + pair // 8, pair % 8
    lane, before = query % 4 + within * 0, (1 << (within * 4 + query * 0)) - 1
    segments = gl.cdiv(S, chunk) * PARTS
    block = 0
    for turn in range(turns):
        t0, origin = _task(turn, tiles, chunk, BQ)
        buffer = turn % 2
        mbarrier.wait(asked.index(buffer), turn // 2 & 1)
        fence_async_shared()
        queries = q.index(buffer)
        first_w, second_w = weights_of(w.index(buffer), q_scales.index(buffer), J, BE, WIDTH)
        start, end = _interval(starts.index(buffer).load(of_queries), ends.index(buffer).load(of_queries), S, budget, WITH_SCORES)
        low, blocks = _walk(start, end, origin, chunk, S)
        real = (t0 + query < T) & (origin < S)
        start, end = gl.expand_dims(start, 0), gl.expand_dims(end, 0)
        stop = gl.where(real, gl.minimum(end, origin + chunk), 0)
        if SAMPLED:
            point, position = gl.expand_dims(points.index(buffer).load(of_queries), 0), gl.expand_dims(positions.index(buffer).load(of_queries), 0)
            above = _next_score(point)
            point = gl.where(point == -FINITE, float("-inf"), point)
        else:  # all are candidates
            point, position = gl.full([1, BQ], -FINITE, gl.float32, layout), gl.zeros([1, BQ], gl.int32, layout)
            above = point
        place = (t0 + query) * segments + origin // chunk * PARTS + part
        entries = ENTRIES + place.to(gl.int64) * segment
        own = low + part * (blocks * PART) + within * 2
        count = gl.zeros([ROWS // 2, BQ], gl.int32, layout)
        largest, total = gl.full([ROWS // 2, BQ], float("-inf"), gl.float32, layout), gl.zeros([ROWS // 2, BQ], gl.float32, layout)
        for n in range(blocks):
            stage = block % STAGES
            mbarrier.wait(ready.index(stage), block // STAGES & 1)
            fence_async_shared()
            k = keys.index(stage).slice(HALF * 2 * ROWS, 2 * ROWS)
            scale = scales.index(stage).slice(HALF * 2 * ROWS, 2 * ROWS)
            dots = begin_products(k, queries, WIDTH)
            for i in gl.static_range(2):
                factor = scale.slice(i * ROWS, ROWS).load(of_keys)
                found, dots = tile_scores(dots, k, queries, first_w, second_w, free.index(stage), i, BQ, BJ)
                found = _in_key_order(found, BQ) * gl.expand_dims(factor, 1)
                first, second = gl.split(gl.permute(gl.reshape(found, (ROWS // 2, 2, BQ)), (0, 2, 1)))
                first, second = gl.convert_layout(first, layout), gl.convert_layout(second, layout)
                key = own + (n * PART + i * PIECE)
                if WITH_SCORES:
                    largest, total = _add_exponentials(largest, total, first, (key >= start) & (key < stop))
                    largest, total = _add_exponentials(largest, total, second, (key + 1 >= start) & (key + 1 < stop))
                least = gl.where(key + 1 >= position, point, above)  # a plateau of equal scores is cut between pairs
                ranked = _ranked(first, key, start, end, stop, keep_first, keep_recent, SAMPLED, KEEP)
                other = _ranked(second, key + 1, start, end, stop, keep_first, keep_recent, SAMPLED, KEEP)
                earlier, more = _count(ranked, other, least, lane, before)
                slot = gl.minimum(count, segment - PIECE - 2) + earlier  # a segment that is full is of no use
                chosen = ranked >= least
                gl.store(entries + slot, _entry(key, first), mask=chosen)
                gl.store(entries + slot + chosen.to(gl.int32), _entry(key + 1, second), mask=other >= least)
                count += more
            block += 1
        gl.store(COUNTS + place, count, mask=real & (within == 0))
        behind = gl.minimum(count, segment - 2) + within  # candidates are read two at a time
        gl.store(entries + behind, gl.zeros([ROWS // 2, BQ], gl.int64, layout), mask=real & (within < 2))
        if WITH_SCORES:
            maximum, total = _of_segment(largest, total, BQ)
            gl.store(MAXIMA + place, maximum, mask=real & (within == 0))
            gl.store(SUMS + place, total, mask=real & (within == 0))
        mbarrier.arrive(answered.index(buffer), count=1)


@gluon.jit(do_not_specialize=["turns", "tiles", "chunk", "T"])
def find(
    Q, W, Q_SCALE, K, SCALE, START, END, POINT, POSITION, ENTRIES, COUNTS, MAXIMA, SUMS, segment, s_s, turns, tiles, chunk, T, S,
    budget, keep_first, keep_recent, J: gl.constexpr, BQ: gl.constexpr, BJ: gl.constexpr, BE: gl.constexpr,
    SAMPLED: gl.constexpr, KEEP: gl.constexpr, WITH_SCORES: gl.constexpr, REGISTERS_COMPARE: gl.constexpr, REGISTERS_LOAD: gl.constexpr,
):  # fmt: skip
    """What `candidates_kernel` of kernels.py finds: every program serves `turns` tasks, some of the last behind the keys."""
    q, w, q_scales, starts, ends, keys, scales, asked, answered, ready, free = shared_memory(BQ, BJ, BE, 128)
    points = gl.allocate_shared_memory(gl.float32, [2, BQ], LINES)
    positions = gl.allocate_shared_memory(gl.int32, [2, BQ], LINES)
    gl.warp_specialize(
        [
            (_compare, (
                0, ENTRIES, COUNTS, MAXIMA, SUMS, segment, turns, tiles, chunk, T, S, budget, keep_first, keep_recent,
                q, w, q_scales, starts, ends, points, positions, keys, scales, asked, answered, ready, free,
                J, BQ, BJ, BE, SAMPLED, KEEP, WITH_SCORES,
            )),
            (_compare, (
                1, ENTRIES, COUNTS, MAXIMA, SUMS, segment, turns, tiles, chunk, T, S, budget, keep_first, keep_recent,
                q, w, q_scales, starts, ends, points, positions, keys, scales, asked, answered, ready, free,
                J, BQ, BJ, BE, SAMPLED, KEEP, WITH_SCORES,
            )),
            (_load, (
                Q, W, Q_SCALE, K, SCALE, START, END, POINT, POSITION, s_s, turns, tiles, chunk, T, S, budget,
                q, w, q_scales, starts, ends, points, positions, keys, scales, asked, answered, ready, free,
                J, BQ, BJ, BE, SAMPLED, WITH_SCORES,
            )),
        ],
        [4, 4],
        [REGISTERS_COMPARE, REGISTERS_LOAD],
    )  # fmt: skip


@dataclass(frozen=True)
class Candidates:
    """The `Finder` of queries of one batch row.

    Attributes:
        q, weights, q_scale: contiguous `[T, J, E]`, float32 `[T, J]` twice.
        k, k_scale: `[S, E]`, float32 `[S]`.
        start, end: contiguous int32 `[T]`.
        sampled: keys `[1, strata, E]`, their scales, and which of them queries see, `[1, T]` twice; or nothing.
        chunk: keys of a task, a multiple of KEYS.
        programs: as many as run at a time.
    """

    q: Tensor
    weights: Tensor
    q_scale: Tensor
    k: Tensor
    k_scale: Tensor
    start: Tensor
    end: Tensor
    sampled: tuple[Tensor, ...]
    budget: int
    keep_first: int
    keep_recent: int
    with_scores: bool
    chunk: int
    programs: int

    @property
    def splits(self) -> int:
        return triton.cdiv(self.k.shape[0], self.chunk) * PARTS.value

    @property
    def split(self) -> int:
        return self.chunk // PARTS.value

    def sample(self) -> Tensor:
        keys, scale, first, last = self.sampled
        return index_scores(self.q[None], keys, self.weights[None], self.q_scale[None], scale, first, last, 0)[0]

    def find(self, points: Tensor, positions: Tensor, entries: Tensor, counts: Tensor, maxima: Tensor, sums: Tensor, segment: int) -> None:
        (T, J, E), S = self.q.shape, self.k.shape[0]
        BJ, BQ = triton.next_power_of_2(J), queries_of(J)
        tiles = triton.cdiv(T, BQ)
        tasks = tiles * triton.cdiv(S, self.chunk)
        programs = min(tasks, self.programs)
        find[(programs,)](
            self.q, self.weights, self.q_scale, self.k, self.k_scale, self.start, self.end,
            points, positions, entries, counts, maxima, sums, segment, self.k_scale.stride(0), triton.cdiv(tasks, programs), tiles, self.chunk, T, S,
            self.budget, self.keep_first, self.keep_recent, J, BQ, BJ, E,
            len(self.sampled) > 0, self.keep_first + self.keep_recent > 0, self.with_scores, *REGISTERS[BQ * BJ],
            num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
