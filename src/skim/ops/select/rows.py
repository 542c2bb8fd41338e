"""Exact top-k of scores in memory as Triton kernels; triton.py beside this file launches them, kernels.py says how candidates are found.

Samples are runs of neighbours where the scores lie. Many rows have a program each; of few rows many programs find the candidates in parts.
"""

from __future__ import annotations

import triton
import triton.language as tl

from skim.ops.score.triton import INTERPRETED
from skim.ops.select.kernels import (
    FINITE,
    LOWEST,
    RANK_KEPT,
    append_pairs,
    choose,
    choose_of_all,
    greatest,
    in_order,
    interval_of,
    keep_all,
    keep_best,
    next_score,
    of_pairs,
    open_row,
    ordered,
    point_of,
    rank_alone,
    rank_of,
    reaching_of_two,
    sampled_key,
    with_kept,
)
from skim.ops.select.lse import add_exponentials, finite, maximum_and_sum

PIECE = tl.constexpr(4)  # neighbouring scores in memory that are sampled together, in one load


@triton.jit
def threshold_of(SCORES, start, end, S, budget, keep_first, keep_recent, stride, BM: tl.constexpr, KEEP: tl.constexpr):
    """From which point of the order on keys of a row are candidates: (score, position), as in `threshold_kernel`."""
    key = (sampled_key(tl.arange(0, BM // PIECE), stride) * PIECE)[:, None] + tl.arange(0, PIECE)
    scores = tl.load(SCORES + key, mask=key < S, other=0.0)
    if KEEP:
        scores = with_kept(scores, key, start, end, keep_first, keep_recent)
    seen = (key >= start) & (key < end)
    values = ordered(scores)
    highest = tl.max(tl.where(seen, values, float("-inf"))) + 0.0  # -0.0 becomes 0.0
    values = tl.where(seen, values, float("nan"))
    number = tl.sum(seen.to(tl.int32))
    expected = budget * (number / (end - start).to(tl.float32))
    # Four standard deviations more where neighbours are all alike, and eleven where they have nothing to do with each other.
    wanted = tl.ceil(expected + 4 * tl.sqrt(expected * PIECE) + 4).to(tl.int32)
    most = wanted + wanted // 16
    point, position = tl.full([], -FINITE, tl.float32), start  # everything
    if wanted <= number:
        point, position = point_of(values, key, number, wanted, most, highest, start, end, position)
    return point, position


@triton.jit
def before_quads(number, W: tl.constexpr):
    """How many of its warp are chosen before each four, of which `number` `[W, 4, 32]` are, in the same shape; and how many at all, `[W, 32]`.

    The counts of a thread share an integer, so that they need one scan.
    """
    row = tl.arange(0, 4)
    shift = (row * 8)[:, None, None]
    thread = tl.sum(number << (row * 8)[None, :, None], 1)
    inside = ((tl.cumsum(thread, 1) - thread)[None] >> shift) & 0xFF
    rows = (tl.broadcast_to(tl.sum(thread, 1, keep_dims=True), [W, 32])[None] >> shift) & 0xFF
    first = tl.sum(tl.where((row[None, :] < row[:, None])[:, :, None, None], rows[None], 0), 1)
    return tl.permute(inside + first, [1, 0, 2]), tl.sum(rows, 0)


@triton.jit
def collect(SCORES, scores, ENTRIES, COUNTS, start, end, lowest, position, part, segment, S, W: tl.constexpr):
    """Each warp appends the candidates of its part of the keys to its segment of ENTRIES; COUNTS `[W]` may exceed what is stored.

    `scores` `[W, 4, 128]` are the first of each part. The next are on their way while these are compared.
    """
    warp = tl.arange(0, W)[:, None]
    above = next_score(lowest)
    count = tl.broadcast_to(warp * segment, [W, 32])
    room = count + segment - 512 - 2
    low, offset, quad = start // 512 * 512, in_order(W, 4, 128, part), 4 * in_order(W, 4, 32, part // 4)
    for origin in range(low, low + part, 512):
        origin = tl.multiple_of(origin, 512)
        key = origin + offset
        behind = tl.where(origin + 512 < low + part, S - 512, 0)
        ahead = tl.load(SCORES + key + 512, mask=key < behind, other=0.0, eviction_policy="evict_first")
        if (origin < start) | (origin + (W - 1) * part + 512 > end):
            scores = tl.where((key >= start) & (key < end), scores, float("nan"))
        least = tl.where(origin + warp * part >= position, lowest, above)[:, :, None]
        even, odd = tl.split(tl.reshape(scores, [W, 4, 32, 2, 2]))
        a, c = tl.split(even)
        b, d = tl.split(odd)
        pair = reaching_of_two(a, b, least)
        before, more = before_quads(pair + reaching_of_two(c, d, least), W)
        slot = tl.broadcast_to(tl.minimum(count, room)[:, None, :], [W, 4, 32]) + before  # what has no room is of no use
        append_pairs(ENTRIES, slot, origin + quad, a, b, a, b, least)
        append_pairs(ENTRIES, slot + pair, origin + quad + 2, c, d, c, d, least)
        count += more
        scores = ahead
    tl.store(COUNTS + tl.broadcast_to(warp, [W, 32]), count - warp * segment)
    behind = tl.minimum(tl.max(count, 1), tl.arange(0, W) * segment + segment - 2)[:, None] + tl.arange(0, 2)  # candidates are read two at a time
    tl.store(ENTRIES + behind, tl.zeros_like(behind).to(tl.int64))


@triton.jit
def choose_of_row(SCORES, INDICES, start, end, wanted, BC: tl.constexpr, W: tl.constexpr):
    """The `wanted` best of all scores of one row, which end within BC of a multiple of 16."""
    R: tl.constexpr = BC // (W * 64)
    place = start // 16 * 16 + of_pairs(2 * in_order(W, R, 32, R * 32), W, R) + (tl.arange(0, 64) % 2)[None, None, :]
    key = tl.max_contiguous(tl.multiple_of(place, [1, 1, 2]), [1, 1, 2])
    scores = tl.load(SCORES + key, mask=key < end, other=0.0)
    keep_best(ordered(scores), (key >= start) & (key < end), key, scores, INDICES, INDICES, wanted, W, R, False)


@triton.jit
def discard(ENTRIES, counts, segment, W: tl.constexpr):
    """Lets the cache forget a row's candidates, which else are written to memory in the end."""
    if not INTERPRETED:  # safe: segments begin at cache lines, and the next to use one writes before it reads
        warp = tl.arange(0, W)[:, None]
        lines = tl.cdiv(tl.minimum(counts + 2, segment), 16)[:, None]
        for first in range(0, tl.max(lines), 32):
            line = first + tl.arange(0, 32)[None, :]
            tl.inline_asm_elementwise(
                "{ .reg .pred p; setp.ne.s32 p, $2, 0; @p discard.global.L2 [$1], 128; mov.u32 $0, 0; }",
                "=r,l,r",
                [(ENTRIES + warp * segment + line * 16).to(tl.int64, bitcast=True), (line < lines).to(tl.int32)],
                dtype=tl.int32,
                is_pure=False,
                pack=1,
            )


@triton.jit(do_not_specialize=["stride", "places"])
def top_k_kernel(
    SCORES, START, END, ENTRIES, COUNTS, LOCKS, INDICES, SIZES, stride_row, S, budget, stride, places, segment,
    BM: tl.constexpr, BC: tl.constexpr, W: tl.constexpr, SAMPLED: tl.constexpr,
):  # fmt: skip
    """A row's selection, by way of its candidates where it has more than BC scores. Grid: rows.

    Rows take turns in the places of ENTRIES `[places, W, segment]` and COUNTS `[places, W]`; who is in one holds its lock, 0 at first.
    """
    row = tl.program_id(0).to(tl.int64)
    SCORES, INDICES = SCORES + row * stride_row, INDICES + row * budget
    start, end, size, wanted = open_row(START, END, SIZES, INDICES, INDICES, row, S, budget, False)
    span = end - start // 16 * 16
    if size <= budget:
        keep_all(INDICES, start, size)
    elif span <= BC:
        if SAMPLED and span <= BC // 2:
            choose_of_row(SCORES, INDICES, start, end, wanted, BC // 2, W)
        else:
            choose_of_row(SCORES, INDICES, start, end, wanted, BC, W)
    elif SAMPLED:
        place = row % places
        ENTRIES, COUNTS = ENTRIES + place * W * segment, COUNTS + place * W
        low = start // 512 * 512
        part = tl.cdiv(end - low, 512 * W) * 512
        key = low + in_order(W, 4, 128, part)
        scores = tl.load(SCORES + key, mask=key < S, other=0.0, eviction_policy="evict_first")  # on their way while the threshold is looked for
        point, position = threshold_of(SCORES, start, end, S, budget, 0, 0, stride, BM, False)
        while tl.atomic_cas(LOCKS + place, 0, 1, sem="acquire") != 0:  # until the row before has left
            pass
        position = low + tl.maximum(position - low, 0) // 512 * 512
        lowest = tl.where(point == -FINITE, float("-inf"), point)
        collect(SCORES, scores, ENTRIES, COUNTS, start, end, lowest, position, part, segment, S, W)
        tl.debug_barrier()  # other warps wrote candidates
        counts = tl.load(COUNTS + tl.arange(0, W))
        slots = tl.sum(tl.cdiv(counts, 2)) * 2
        if (tl.sum(counts) < wanted) | (slots > BC):
            choose_of_all(SCORES, INDICES, INDICES, start, end, wanted, 0, 0, 2048, False)
        elif slots <= BC // 2:
            choose(ENTRIES, COUNTS, INDICES, INDICES, start, end, wanted, 0, 0, W, segment, BC // 2, W, False, False)
        else:
            choose(ENTRIES, COUNTS, INDICES, INDICES, start, end, wanted, 0, 0, W, segment, BC, W, False, False)
        tl.debug_barrier()  # other warps read candidates
        discard(ENTRIES, counts, segment, W)
        tl.debug_barrier()
        tl.atomic_xchg(LOCKS + place, 0, sem="release")


@triton.jit
def before_each(chosen, W: tl.constexpr):
    """How many before each of four neighbours of each thread are chosen, `[W, 1, 128]` as `chosen`, and how many at all."""
    even, odd = tl.split(tl.reshape(chosen, [W, 32, 2, 2]))
    early, late = tl.split(even + odd)
    thread, two = early + late, tl.arange(0, 2)
    warps = tl.sum(thread, 1)
    inside = tl.cumsum(thread, 1) - thread + (tl.cumsum(warps, 0) - warps)[:, None]
    inside = inside[:, :, None, None] + early[:, :, None, None] * two[:, None] + even[:, :, :, None] * two
    return tl.reshape(inside, [W, 1, 128]), tl.sum(warps)


@triton.jit
def append_row(VALUES, KEYS, slot, scores, key, ranked, least):
    """Stores scores and keys where ranked >= least."""
    if INTERPRETED:
        tl.store(VALUES + slot, scores, mask=ranked >= least)
        tl.store(KEYS + slot, key, mask=ranked >= least)
    else:  # the same by the threads that have them, as in `append_pairs`
        tl.inline_asm_elementwise(
            """{ .reg .pred p; .reg .b64 a; setp.ge.f32 p, $6, $7; mad.wide.u32 a, $3, 4, $1; @p st.global.b32 [a], $4;
            mad.wide.u32 a, $3, 4, $2; @p st.global.b32 [a], $5; mov.u32 $0, 0; }""",
            "=r,l,l,r,r,r,r,r",
            [VALUES.to(tl.int64, bitcast=True), KEYS.to(tl.int64, bitcast=True), slot, scores, key, ranked, least],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def put(out, slot, values, mask):
    """tl.store of int32."""
    if INTERPRETED:
        tl.store(out + slot, values, mask=mask)
    else:  # the same by the threads that have them, as in `append_pairs`
        tl.inline_asm_elementwise(
            "{ .reg .pred p; .reg .b64 a; setp.ne.s32 p, $4, 0; mad.wide.u32 a, $2, 4, $1; @p st.global.b32 [a], $3; mov.u32 $0, 0; }",
            "=r,l,r,r,r",
            [out.to(tl.int64, bitcast=True), slot, values, mask.to(tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit(do_not_specialize=["stride"])
def part_candidates_kernel(
    SCORES, START, END, VALUES, KEYS, COUNTS, MAXIMA, SUMS, stride_row, S, budget, keep_first, keep_recent, stride, part, segment,
    BM: tl.constexpr, BC: tl.constexpr, BN: tl.constexpr, KEEP: tl.constexpr, WITH_SCORES: tl.constexpr,
):  # fmt: skip
    """The candidates of `part` keys of a row, VALUES and KEYS `[parts, segment]` and COUNTS `[parts]`. Grid: rows, parts.

    Each program finds its row's threshold itself: that takes less time than one more kernel. With scores also the maximum and the
    sum of the exponentials of each part.
    """
    ROWS: tl.constexpr = BN // 128
    row, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * part
    here = row * tl.num_programs(1) + tl.program_id(1)
    SCORES, VALUES, KEYS = SCORES + row * stride_row, VALUES + here * segment, KEYS + here * segment
    key = first + in_order(ROWS, 1, 128, 128)
    scores = tl.load(SCORES + key, mask=key < S, other=0.0)  # on their way while the threshold is looked for
    start, end = interval_of(START, END, row, S)
    if not WITH_SCORES:  # a row that keeps all it sees needs no candidates
        end = tl.where(end - start <= budget, 0, end)
    lowest, position = tl.full([], -FINITE, tl.float32), start  # everything
    if end - start > BC - 8:  # the first part that is seen and the last may leave gaps
        lowest, position = threshold_of(SCORES, start, end, S, budget, keep_first, keep_recent, stride, BM, KEEP)
    above, count = next_score(lowest), 0
    largest, sums = tl.full([ROWS, 1, 128], float("-inf"), tl.float32), tl.zeros([ROWS, 1, 128], tl.float32)
    last = tl.minimum(first + part, end)
    for origin in range(first, last, BN):
        ahead = tl.load(SCORES + key + BN, mask=key + BN < tl.where(origin + BN < last, S, 0), other=0.0)
        seen = (key >= start) & (key < end)
        ranked = tl.maximum(scores, -FINITE)  # NaN too
        if KEEP:
            ranked = with_kept(ranked, key, start, end, keep_first, keep_recent)
        ranked = tl.where(seen, ranked, float("-inf"))
        least = tl.where(key >= position, lowest, above)
        before, number = before_each((ranked >= least).to(tl.int32), ROWS)
        append_row(VALUES, KEYS, tl.minimum(count, segment - BN) + before, scores, key, ranked, least)  # a full segment is of no use
        count += number
        if WITH_SCORES:
            largest, sums = add_exponentials(largest, sums, tl.where(seen, scores, float("-inf")))
        scores, key = ahead, key + BN
    tl.store(COUNTS + here, count)
    if WITH_SCORES:
        maximum, total = maximum_and_sum(tl.reshape(largest, [BN]), tl.reshape(sums, [BN]))
        tl.store(MAXIMA + here, maximum)
        tl.store(SUMS + here, total)


@triton.jit
def part_of(quad, first, PARTS: tl.constexpr):
    """The last of the parts that begin, at `first` `[PARTS]`, no later than each quad."""
    part = tl.zeros_like(quad)
    for i in tl.static_range(9):  # bisection
        if PARTS >> i > 1:
            later = part + (PARTS >> i) // 2
            part = tl.where(tl.gather(first, later, 0) <= quad, later, part)
    return part


@triton.jit
def of_each(x, ROWS: tl.constexpr):
    """`[ROWS * 32]`, of quads, as `[ROWS, 1, 128]`."""
    return tl.reshape(tl.broadcast_to(tl.reshape(x, [ROWS, 1, 32])[:, :, :, None], [ROWS, 1, 32, 4]), [ROWS, 1, 128])


@triton.jit
def keep_best_of_parts(
    VALUES, KEYS, INDICES, CHOSEN, counts, start, end, wanted, keep_first, keep_recent, segment,
    BC: tl.constexpr, PARTS: tl.constexpr, KEEP: tl.constexpr, WITH_SCORES: tl.constexpr,
):  # fmt: skip
    """The `wanted` best of a row's candidates, `counts` `[PARTS]` of them, in at most BC slots; each part begins at a multiple of four."""
    ROWS: tl.constexpr = BC // 128
    quad, quads = tl.arange(0, BC // 4), tl.cdiv(counts, 4)
    first = tl.cumsum(quads, 0) - quads
    part = part_of(quad, first, PARTS)
    inside = 4 * (quad - tl.gather(first, part, 0))
    left = of_each(tl.gather(counts, part, 0) - inside, ROWS)
    near = tl.arange(0, 128)[None, None, :] % 4
    place = tl.max_contiguous(tl.multiple_of(of_each(part * segment + inside, ROWS) + near, [1, 1, 4]), [1, 1, 4])
    real = near < left
    scores = tl.load(VALUES + place, mask=real, other=0.0)
    key = tl.load(KEYS + place, mask=real, other=0)
    rank = rank_of(scores, key, start, end, keep_first, keep_recent) if KEEP else rank_alone(scores)
    rank = tl.where(real, rank, LOWEST)
    point = greatest(rank, wanted, wanted, tl.min(tl.where(real, rank, RANK_KEPT)), tl.max(rank) + 1)
    kept = (rank >= point).to(tl.int32)
    before, number = before_each(kept, ROWS)
    if number > wanted:  # the oldest of those at the threshold go
        equals, _ = before_each((rank == point).to(tl.int32), ROWS)
        kept = tl.where((rank > point) | (equals >= number - wanted), kept, 0)
        before -= tl.minimum(equals, number - wanted)
    put(INDICES, before, key, kept != 0)
    if WITH_SCORES:
        put(CHOSEN.to(tl.pointer_type(tl.int32), bitcast=True), before, scores.to(tl.int32, bitcast=True), kept != 0)


@triton.jit
def choose_parts_kernel(
    SCORES, START, END, VALUES, KEYS, COUNTS, MAXIMA, SUMS, INDICES, SIZES, CHOSEN, LSE, stride_row, S, budget, keep_first, keep_recent, parts,
    segment, BC: tl.constexpr, PARTS: tl.constexpr, KEEP: tl.constexpr, WITH_SCORES: tl.constexpr,
):  # fmt: skip
    """A row's selection from the candidates of its parts, or, where they aren't all there, from all its scores. Grid: rows."""
    row, part = tl.program_id(0).to(tl.int64), tl.arange(0, PARTS)
    counts = tl.load(COUNTS + row * parts + part, mask=part < parts, other=0)
    VALUES, KEYS = VALUES + row * parts * segment, KEYS + row * parts * segment
    INDICES, CHOSEN = INDICES + row * budget, CHOSEN + row * budget
    start, end, size, wanted = open_row(START, END, SIZES, INDICES, CHOSEN, row, S, budget, WITH_SCORES)
    if WITH_SCORES:
        maxima = tl.load(MAXIMA + row * parts + part, mask=part < parts, other=float("-inf"))
        maximum, total = maximum_and_sum(maxima, tl.load(SUMS + row * parts + part, mask=part < parts, other=0.0))
        tl.store(LSE + row, finite(maximum) + tl.log(total))
    if (size <= budget) & (not WITH_SCORES):
        keep_all(INDICES, start, size)
    elif size > 0:
        slots = 4 * tl.sum(tl.cdiv(counts, 4))
        if (tl.sum(counts) < wanted) | (slots > BC):
            choose_of_all(SCORES + row * stride_row, INDICES, CHOSEN, start, end, wanted, keep_first, keep_recent, 2048, WITH_SCORES)
        elif slots <= BC // 2:
            keep_best_of_parts(
                VALUES, KEYS, INDICES, CHOSEN, counts, start, end, wanted, keep_first, keep_recent, segment, BC // 2, PARTS,
                KEEP, WITH_SCORES,
            )  # fmt: skip
        else:
            keep_best_of_parts(
                VALUES, KEYS, INDICES, CHOSEN, counts, start, end, wanted, keep_first, keep_recent, segment, BC, PARTS,
                KEEP, WITH_SCORES,
            )  # fmt: skip
