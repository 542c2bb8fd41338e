"""Exact top-k of index scores as Triton kernels; candidates.py beside this file launches them.

A sample of a row's scores gives a threshold that its k best keys are above with room to spare; what is above it, a few
thousand candidates, is kept while the scores are made; the k best of these are the k best of all. That this holds is
checked, not hoped for: a row with too few or too many candidates is flagged, and done again from all of its scores. NaN is
never above a threshold, so a sampled row with fewer than k other scores has too few.

Keys are ordered by (rank, position), rank an int32 that grows with the score. Candidates are all the keys of a row from
some point of this order on, so ties need no second path: a plateau of equal scores is cut at a position. Segments hold
candidates in the order of their positions, and begin where two of them can be read at once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from skim.ops.score.triton import INTERPRETED, keys_of, load_interval, load_queries, score_tile, union
from skim.ops.select.lse import finite

FINITE = tl.constexpr(3.4028234663852886e38)
RANK_KEPT = tl.constexpr(0x7F800000)  # of keys kept whatever they score: that of +inf
RANK_NAN = tl.constexpr(-0x7F800001)
LOWEST = tl.constexpr(-0x80000000)
STEPS = tl.constexpr(8)  # guesses of a point, before bisection takes over


@triton.jit
def interval_of(START, END, row, S):
    """The keys that a row sees, from `start` to before `end`."""
    return tl.maximum(tl.load(START + row), 0), tl.minimum(tl.load(END + row), S)


@triton.jit
def rank_alone(scores):
    """`rank_of` where no key is kept anyway."""
    clamped = tl.minimum(tl.maximum(tl.where(scores == 0, 0.0, scores), -FINITE), FINITE)
    bits = clamped.to(tl.int32, bitcast=True)
    return tl.where(scores == scores, bits ^ ((bits >> 31) & 0x7FFFFFFF), RANK_NAN)


@triton.jit
def rank_of(scores, key, start, end, keep_first, keep_recent):
    """int32 that orders visible keys as (kept anyway, score descending, NaN) does; -0.0 as +0.0, infinite as largest finite."""
    return tl.where((key - start < keep_first) | (key >= end - keep_recent), RANK_KEPT, rank_alone(scores))


@triton.jit
def with_kept(scores, key, start, end, keep_first, keep_recent):
    """Scores, infinite where keys are kept whatever they score."""
    return tl.where((key - start < keep_first) | (key >= end - keep_recent), float("inf"), scores)


@triton.jit
def score_at(rank):
    """The float32 of a rank: the inverse of `rank_at`."""
    return (rank ^ ((rank >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def ordered(scores):
    """Scores, infinite ones as the largest finite, NaN as -inf: in the order of `rank_alone`."""
    return tl.where(scores == scores, tl.minimum(tl.maximum(scores, -FINITE), FINITE), float("-inf"))


@triton.jit
def rank_at(score):
    """The rank of an ordered score; that of -0.0 is one below that of 0.0."""
    bits = score.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def next_score(scores):
    """The next larger float32, of -0.0 the 0.0 that equals it: then nothing lies between, and no row is cut there."""
    return score_at(rank_at(scores) + 1)


@triton.jit
def reaching(values, rank):
    """How many values, ranks or ordered scores, have at least this rank; NaN has none."""
    if values.dtype == tl.int32:
        return tl.sum((values >= rank).to(tl.int32))
    elif INTERPRETED:
        return tl.sum((values >= score_at(rank)).to(tl.int32))
    else:  # the same: a comparison gives 0 or -1 at once, so that an addition takes two of them
        asm: tl.constexpr = "set.ge.s32.f32 $0, $1, $2;"
        return -tl.sum(tl.inline_asm_elementwise(asm, "=r,f,f", [values, score_at(rank)], dtype=tl.int32, is_pure=True, pack=1))


@triton.jit
def reaching_of_two(first, second, least):
    """How many of two scores are at least `least`: 0, 1 or 2."""
    if INTERPRETED:
        return (first >= least).to(tl.int32) + (second >= least).to(tl.int32)
    else:  # the same, in four instructions
        return tl.inline_asm_elementwise(
            """{ .reg .pred p; .reg .b32 n; setp.ge.f32 p, $1, $3; selp.b32 n, 1, 0, p;
            setp.ge.f32 p, $2, $3; @p add.s32 n, n, 1; mov.b32 $0, n; }""",
            "=r,f,f,f",
            [first, second, least],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )


@triton.jit
def greatest(values, wanted, most, low, high):
    """A rank in [low, high) that `wanted` to `most` of the values reach, if any has so many; else the greatest that `wanted` reach.

    At least `wanted` values reach low, and none reaches high. Values are int32, or scores as `ordered` gives them; NaN reaches nothing.
    """
    while low + 1 < high:
        middle = (low & high) + ((low ^ high) >> 1)
        count = reaching(values, middle)
        low = tl.where(count >= wanted, middle, low)
        high = tl.where(count > most, high, tl.where(count >= wanted, middle + 1, middle))
    return low


@triton.jit
def nearest(values, wanted, most, low, high, score, count, scale):
    """As `greatest`, of scores: about `count` of them reach `score`, and the logarithm of how many do falls by about one in `scale`.

    So each count says how far away the point is that `wanted` to `most` reach. Where that is no help, and after STEPS, by bisection.
    """
    step, count, goal = 0, count.to(tl.float32), (wanted + most) * 0.5
    while low + 1 < high:
        middle = (low & high) + ((low ^ high) >> 1)
        guess = rank_at(score + 2 * scale * (count - goal) / (count + goal))  # about the logarithm of their quotient
        middle = tl.where((guess > low) & (guess < high) & (step < STEPS), guess, middle)
        number = reaching(values, middle)
        low = tl.where(number >= wanted, middle, low)
        high = tl.where(number > most, high, tl.where(number >= wanted, middle + 1, middle))
        score, count, step = score_at(middle), number.to(tl.float32), step + 1
    return low


@triton.jit
def sampled_key(stratum, stride):
    """The key that is sampled of the keys stratum * stride, ...: any, so that no period of the keys meets the sample's."""
    x = stratum.to(tl.uint32) * 0x9E3779B1
    x = (x ^ (x >> 15)) * 0x85EBCA77
    x ^= x >> 13
    return stratum * stride + (x % stride.to(tl.uint32)).to(tl.int32)


@triton.jit
def scores_of(
    q, w, Q, W, K, K_SCALE, TABLE, key, real, stride_qt, stride_qj, stride_kb, stride_ks, stride_sb, stride_ss, t0, T, J, E,
    BN: tl.constexpr, BQ: tl.constexpr, BJ: tl.constexpr, BE: tl.constexpr, HEADS: tl.constexpr, PADDED: tl.constexpr, SCALED: tl.constexpr,
    PAGE: tl.constexpr, UNIT: tl.constexpr, LOADED: tl.constexpr,
):  # fmt: skip
    """Scores `[BN, BQ]`: made, or, where LOADED, read from Q `[T, S]`."""
    if LOADED:
        t = t0 + tl.arange(0, BQ)
        return tl.load(Q + (t.to(tl.int64) * stride_qt)[None, :] + key[:, None], mask=real[:, None] & (t < T)[None, :], other=0.0)
    else:
        return score_tile(
            q, w, Q, W, K, K_SCALE, TABLE, key, real, stride_qt, stride_qj, stride_kb, stride_ks, stride_sb, stride_ss, t0, T, J, E,
            BN, BQ, BJ, BE, HEADS, PADDED, SCALED, PAGE, UNIT,
        )  # fmt: skip


@triton.jit
def first_queries(Q, W, stride_qt, stride_qj, t0, T, J, E, BQ: tl.constexpr, BJ: tl.constexpr, BE: tl.constexpr, LOADED: tl.constexpr):
    if LOADED:
        return 0.0, 0.0
    else:
        return load_queries(Q, W, stride_qt, stride_qj, t0, T, J, E, 0, BQ, BJ, BE)


@triton.jit(do_not_specialize=["tile0", "row0", "stride"])
def sample_kernel(
    Q, W, K, K_SCALE, TABLE, START, END, SAMPLE, stride_qb, stride_qt, stride_qj, stride_kb, stride_ks, stride_sb, stride_ss,
    tile0, row0, T, S, J, E, few, stride, share,
    BN: tl.constexpr, BQ: tl.constexpr, BJ: tl.constexpr, BE: tl.constexpr, HEADS: tl.constexpr, PADDED: tl.constexpr, SCALED: tl.constexpr,
    PAGE: tl.constexpr, UNIT: tl.constexpr, LOADED: tl.constexpr, BM: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Scores of the sampled keys, SAMPLE `[rows, BM]`, of rows that see more than `few` keys. Grid: query tiles, shares of the sample.

    Strata that no query of a tile sees are left as they were.
    """
    tiles = tl.cdiv(T, BQ)
    tile = tile0 + tl.program_id(0)
    b, t0 = tile // tiles, tile % tiles * BQ
    t, n = t0 + tl.arange(0, BQ), tl.arange(0, BN)
    start, end = load_interval(START, END, b, t, T, S)
    low, high = union(start, end, end - start > few, S)
    first = tl.maximum(low // stride // BN * BN, tl.program_id(1) * share)
    last = tl.minimum(tl.cdiv(high, stride), (tl.program_id(1) + 1) * share)
    Q, W = Q + b.to(tl.int64) * stride_qb, W + b.to(tl.int64) * T * J
    K, K_SCALE, TABLE = keys_of(K, K_SCALE, TABLE, b, stride_kb, stride_sb, S, PAGE, UNIT)
    out = SAMPLE + (b.to(tl.int64) * T + t - row0)[None, :] * BM
    q, w = first_queries(Q, W, stride_qt, stride_qj, t0, T, J, E, BQ, BJ, BE, LOADED)
    for origin in tl.range(first, last, BN, num_stages=STAGES):
        stratum = origin + n
        key = sampled_key(stratum, stride)
        scores = scores_of(
            q, w, Q, W, K, K_SCALE, TABLE, key, key < high, stride_qt, stride_qj, stride_kb, stride_ks, stride_sb, stride_ss, t0, T, J, E,
            BN, BQ, BJ, BE, HEADS, PADDED, SCALED, PAGE, UNIT, LOADED,
        )  # fmt: skip
        tl.store(out + stratum[:, None], scores, mask=(stratum < last)[:, None] & (end > start)[None, :])


@triton.jit
def point_of(values, key, number, wanted, most, highest, start, end, position):
    """The point of the order, (score, position), that `wanted` to `most` of a sample reach; `position` where no plateau is cut.

    Values are scores, `number` of them, NaN where a key isn't seen; `highest` is the largest, and not -0.0.
    """
    known = tl.abs(values) < float("inf")
    mean = tl.sum(tl.where(known, values, 0.0)) / number
    scale = 0.8 * tl.sum(tl.where(known, tl.abs(values - mean), 0.0)) / number  # fits normal and exponential scores; about half reach the mean
    point = score_at(nearest(values, wanted, most, tl.full([], RANK_NAN, tl.int32), rank_at(highest) + 1, mean, number / 2, scale))
    above, equal = tl.sum((values > point).to(tl.int32)), tl.sum((values == point).to(tl.int32))
    if (above + equal > most) & (point > -FINITE) & (point < FINITE):  # a plateau, cut at a position
        position = greatest(tl.where(values == point, key, -1), wanted - above, most - above, start, end)
    return tl.minimum(tl.maximum(point, -FINITE), FINITE), position


@triton.jit(do_not_specialize=["row0", "stride"])
def threshold_kernel(
    SAMPLE, START, END, SCORE, POSITION, row0, S, budget, keep_first, keep_recent, few, stride, BM: tl.constexpr, KEEP: tl.constexpr
):  # fmt: skip
    """The point of the order from which on keys are candidates: the score and the position of about the right sampled key. Grid: rows.

    Where a row sees no more than `few` keys, or too few of them are sampled, all are candidates.
    """
    row = tl.program_id(0)
    start, end = interval_of(START + row0, END + row0, row, S)
    point, position = tl.full([], -FINITE, tl.float32), tl.full([], LOWEST, tl.int32)  # everything
    if end - start > few:
        stratum = tl.arange(0, BM)
        seen = (stratum * stride >= start) & (stratum * stride + stride <= end)  # whole strata, so that keys matter in plateaus only
        values = tl.load(SAMPLE + row.to(tl.int64) * BM + stratum, mask=seen, other=float("nan"))
        if KEEP:
            values = tl.where(seen, with_kept(values, sampled_key(stratum, stride), start, end, keep_first, keep_recent), float("nan"))
        number = tl.maximum(end // stride - tl.cdiv(start, stride), 0)
        # As many of the sample are expected among the k best; five standard deviations more are hardly ever.
        expected = budget * (number / (end - start).to(tl.float32))
        wanted = tl.ceil(expected + 5 * tl.sqrt(expected) + 4).to(tl.int32)
        most = wanted + wanted // 16  # the search may stop early
        if wanted <= number:
            key = sampled_key(stratum, stride)
            highest = tl.max(values) + 0.0  # -0.0 becomes 0.0
            point, position = point_of(values, key, number, wanted, most, highest, start, end, position)
    tl.store(SCORE + row, point)
    tl.store(POSITION + row, position)


@triton.jit
def entry_of(key, score):
    """A candidate: its score's bits and its position."""
    return (score.to(tl.int32, bitcast=True).to(tl.int64) << 32) | key


@triton.jit
def append_pairs(entries, slot, key, first, second, score, other, least):
    """Stores (key, score) if first >= least and (key + 1, other) if second is, one behind the other, from entries[slot] on."""
    if INTERPRETED:
        tl.store(entries + slot, entry_of(key, score), mask=first >= least)
        tl.store(entries + slot + (first >= least), entry_of(key + 1, other), mask=second >= least)
    else:  # the same by the threads that have them: tl.store passes them round so that neighbours are written at once, and none are
        tl.inline_asm_elementwise(
            """{ .reg .pred p; .reg .b64 a; .reg .b32 s, k; mov.b32 s, $2; add.s32 k, $3, 1; mad.wide.s32 a, s, 8, $1;
            setp.ge.f32 p, $4, $8; @p st.global.v2.b32 [a], {$3, $6}; @p add.s32 s, s, 1; mad.wide.s32 a, s, 8, $1;
            setp.ge.f32 p, $5, $8; @p st.global.v2.b32 [a], {k, $7}; mov.u32 $0, 0; }""",
            "=r,l,r,r,r,r,r,r,r",
            [entries.to(tl.int64, bitcast=True), slot, key, first, second, score, other, least],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def rows_of_keys(BN: tl.constexpr, WARPS: tl.constexpr):
    """Which of BN neighbouring keys stands in each row of a tile, `[BN]`.

    Matrix units give a thread the rows r, r + 8, r + 64, r + 72. In this order those are neighbouring keys, and those of a
    warp are 32 neighbouring keys: so most of a scan along the keys happens inside a thread.
    """
    REST: tl.constexpr = BN // (16 * WARPS)
    row = tl.arange(0, BN)
    return row // 16 % WARPS * (16 * REST) + row % 8 * (2 * REST) + row // (16 * WARPS) * 2 + row // 8 % 2


@triton.jit
def split_keys(x, BQ: tl.constexpr, REST: tl.constexpr, WARPS: tl.constexpr):
    """`[BN, BQ]`, keys as in `rows_of_keys`, as `[WARPS, 8, BQ, REST]` for the first and for the second of each pair of neighbours."""
    return tl.split(tl.permute(tl.reshape(x, [REST, WARPS, 2, 8, BQ]), [1, 3, 4, 0, 2]))


@triton.jit
def before_and_total(number, BQ: tl.constexpr, REST: tl.constexpr, WARPS: tl.constexpr):
    """How many keys are chosen before each pair, of which `number` `[WARPS, 8, BQ, REST]` are, in the same shape; and how many at all, `[BQ]`.

    Up to four counts, of at most 128 each, share an integer. BQ <= 16.
    """
    NEAR: tl.constexpr = min(4, BQ)
    shift = tl.arange(0, BQ // NEAR) * 8
    packed = tl.sum(tl.reshape(number, [WARPS, 8, BQ // NEAR, NEAR, REST]) << shift[None, None, :, None, None], 2)
    if REST == 2:
        early, late = tl.split(packed)
        group = tl.reshape(early + late, [WARPS * 8, NEAR])
        inside = early[:, :, :, None] * tl.arange(0, 2)
    else:
        group, inside = tl.reshape(packed, [WARPS * 8, NEAR]), tl.zeros_like(packed)
    inside += tl.reshape(tl.cumsum(group, 0) - group, [WARPS, 8, NEAR])[:, :, :, None]
    before = (inside[:, :, None] >> shift[None, None, :, None, None]) & 0xFF
    total = (tl.sum(group, 0)[None, :] >> shift[:, None]) & 0xFF
    return tl.reshape(before, [WARPS, 8, BQ, REST]), tl.reshape(total, [BQ])


@triton.jit(do_not_specialize=["tile0", "row0"])
def candidates_kernel(
    Q, W, K, K_SCALE, TABLE, START, END, SCORE, POSITION, ENTRIES, COUNTS, MAXIMA, SUMS,
    stride_qb, stride_qt, stride_qj, stride_kb, stride_ks, stride_sb, stride_ss,
    tile0, row0, T, S, J, E, budget, keep_first, keep_recent, split, segment,
    BN: tl.constexpr, BQ: tl.constexpr, BJ: tl.constexpr, BE: tl.constexpr, HEADS: tl.constexpr, PADDED: tl.constexpr, SCALED: tl.constexpr,
    PAGE: tl.constexpr, UNIT: tl.constexpr, LOADED: tl.constexpr, SAMPLED: tl.constexpr, ROW_WARPS: tl.constexpr,
    KEEP: tl.constexpr, WITH_SCORES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Appends what is above the thresholds to ENTRIES `[rows, splits, segment]`, (score's bits, position) as int64, and counts it in COUNTS
    `[rows, splits]`, which may exceed what is stored. With scores also the maximum and the sum of the exponentials of each split. Grid: query
    tiles, the last first (where visibility is causal it is the longest), and splits of the keys.
    """
    tiles = tl.cdiv(T, BQ)
    tile = tile0 + tl.num_programs(0) - 1 - tl.program_id(0)
    b, t0 = tile // tiles, tile % tiles * BQ
    t, n = t0 + tl.arange(0, BQ), tl.arange(0, BN)
    start, end = load_interval(START, END, b, t, T, S)
    if not WITH_SCORES:  # a row that keeps all it sees needs no scores
        short = end - start <= budget
        start, end = tl.where(short, 0, start), tl.where(short, 0, end)
    sees = end > start
    low, high = union(start, end, sees, S)
    low, high = tl.maximum(low // BN * BN, tl.program_id(1) * split), tl.minimum(high, (tl.program_id(1) + 1) * split)
    Q, W = Q + b.to(tl.int64) * stride_qb, W + b.to(tl.int64) * T * J
    K, K_SCALE, TABLE = keys_of(K, K_SCALE, TABLE, b, stride_kb, stride_sb, S, PAGE, UNIT)
    row = b.to(tl.int64) * T + t - row0
    if SAMPLED:
        point, position = tl.load(SCORE + row, mask=t < T, other=0.0), tl.load(POSITION + row, mask=t < T, other=0)
        point = tl.where(point == -FINITE, float("-inf"), point)
    else:
        point, position = tl.full([BQ], -FINITE, tl.float32), tl.full([BQ], LOWEST, tl.int32)
    position = position // BN * BN  # so that one comparison does: with `point` itself from this position on, with the next score before it
    point, above = tl.where(sees, point, float("nan")), tl.where(sees, next_score(point), float("nan"))  # nothing reaches NaN
    inner_low, inner_high = tl.max(tl.where(sees, start + keep_first, 0)), tl.min(tl.where(sees, end - keep_recent, S))  # seen by all
    entries = ENTRIES + (row * tl.num_programs(1) + tl.program_id(1)) * segment
    REST: tl.constexpr = BN // (16 * ROW_WARPS)  # pairs of neighbouring keys that a thread has of a query
    count = tl.zeros([BQ], tl.int32)
    maximum, total = tl.full([BQ], float("-inf"), tl.float32), tl.zeros([BQ], tl.float32)
    q, w = first_queries(Q, W, stride_qt, stride_qj, t0, T, J, E, BQ, BJ, BE, LOADED)
    for origin in tl.range(low, high, BN, num_stages=STAGES):
        origin = tl.multiple_of(origin, BN)
        key = origin + (n if LOADED else rows_of_keys(BN, ROW_WARPS))
        real = key < (S if LOADED else high)
        scores = scores_of(
            q, w, Q, W, K, K_SCALE, TABLE, key, real, stride_qt, stride_qj, stride_kb, stride_ks, stride_sb, stride_ss, t0, T, J, E,
            BN, BQ, BJ, BE, HEADS, PADDED, SCALED, PAGE, UNIT, LOADED,
        )  # fmt: skip
        key = key[:, None]
        ranked = scores if SAMPLED else tl.maximum(scores, -FINITE)  # where all are candidates NaN is one too
        if (origin < inner_low) | (origin + BN > inner_high):
            seen = (key >= start[None, :]) & (key < end[None, :])
            if KEEP:
                ranked = with_kept(ranked, key, start[None, :], end[None, :], keep_first, keep_recent)
            ranked = tl.where(seen, ranked, float("nan"))
        least = tl.where(origin >= position, point, above)
        full = tl.minimum(count, segment - BN - 2)  # a segment that is full is of no use
        if LOADED:
            chosen = (ranked >= least[None, :]).to(tl.int32)
            tl.store((entries + full)[None, :] + tl.cumsum(chosen, 0) - chosen, entry_of(key, scores), mask=chosen != 0)
            more = tl.sum(chosen, 0)
        else:
            first, second = split_keys(ranked, BQ, REST, ROW_WARPS)
            score, other = split_keys(scores, BQ, REST, ROW_WARPS) if KEEP or not SAMPLED else (first, second)
            of_first, _ = split_keys(tl.broadcast_to(key, [BN, BQ]), BQ, REST, ROW_WARPS)
            before, more = before_and_total(reaching_of_two(first, second, least[:, None]), BQ, REST, ROW_WARPS)
            append_pairs(entries[:, None], full[:, None] + before, of_first, first, second, score, other, least[:, None])
        count += more
        if WITH_SCORES:
            visible = tl.where((key >= start[None, :]) & (key < end[None, :]), scores, float("-inf"))
            larger = tl.maximum(maximum, tl.max(visible, 0))
            base = tl.where(tl.abs(larger) == float("inf"), 0.0, larger)
            total = total * tl.exp(maximum - base) + tl.sum(tl.exp(visible - base[None, :]), 0)
            maximum = larger
    place = row * tl.num_programs(1) + tl.program_id(1)
    tl.store(COUNTS + place, count, mask=t < T)
    behind = tl.minimum(count, segment - 2)[None, :] + tl.arange(0, 2)[:, None]  # candidates are read two at a time
    tl.store(entries[None, :] + behind, tl.zeros_like(behind).to(tl.int64), mask=(t < T)[None, :])
    if WITH_SCORES:
        tl.store(MAXIMA + place, maximum, mask=t < T)
        tl.store(SUMS + place, total, mask=t < T)


@triton.jit
def in_order(W: tl.constexpr, R: tl.constexpr, N: tl.constexpr, stride):
    """0, 1, ... for each of W warps, `[W, R, N]`: those of a warp begin `stride` behind those of the one before."""
    return (tl.arange(0, W) * stride)[:, None, None] + (tl.arange(0, R) * N)[None, :, None] + tl.arange(0, N)[None, None, :]


@triton.jit
def of_pairs(x, W: tl.constexpr, R: tl.constexpr):
    """`[W, R, 32]` as `[W, R, 64]`."""
    return tl.reshape(tl.broadcast_to(x[:, :, :, None], [W, R, 32, 2]), [W, R, 64])


@triton.jit
def split_pairs(x, W: tl.constexpr, R: tl.constexpr):
    """`[W, R, 64]` as the first and the second of each pair, `[W, R, 32]`."""
    return tl.split(tl.reshape(x, [W, R, 32, 2]))


@triton.jit
def before_pairs(number, W: tl.constexpr, R: tl.constexpr):
    """How many are chosen before each pair, of which `number` `[W, R, 32]` are, in the same shape; and how many at all.

    The counts of up to four of a thread's pairs share an integer, so that they need one scan.
    """
    NEAR: tl.constexpr = min(4, R)
    FAR: tl.constexpr = R // NEAR
    shift, far = tl.arange(0, NEAR) * 8, tl.arange(0, FAR)
    thread = tl.permute(tl.sum(tl.reshape(number, [W, FAR, NEAR, 32]) << shift[None, None, :, None], 2), [1, 0, 2])
    total = tl.broadcast_to(tl.sum(thread, 2, keep_dims=True), [FAR, W, 32])
    inside = tl.cumsum(thread, 2) - thread + total * 0x01010100  # and what the rows of 64 before have: 3 * 64 + 62 at most
    even = (total & 0x00FF00FF) + ((total >> 8) & 0x00FF00FF)
    rows = (even + (even >> 16)) & 0xFFFF
    first = tl.sum(tl.where((far[None, :] < far[:, None])[:, :, None, None], rows[None], 0), 1)
    warps = tl.max(tl.sum(rows, 0), 1)
    first += (tl.cumsum(warps, 0) - warps)[None, :, None]
    before = ((inside[:, None] >> shift[None, :, None, None]) & 0xFF) + first[:, None]
    return tl.permute(tl.reshape(before, [R, W, 32]), [1, 0, 2]), tl.sum(warps)


@triton.jit
def before_reaching(values, least, W: tl.constexpr, R: tl.constexpr):
    """`before_pairs` where the values `[W, R, 64]` that are at least `least` are chosen."""
    first, second = split_pairs(values, W, R)
    return before_pairs(reaching_of_two(first, second, least), W, R)


@triton.jit
def put_pairs(out, slot, values, least, items, W: tl.constexpr, R: tl.constexpr):
    """Stores int32 items `[W, R, 64]` where values >= least, those of a pair one behind the other, from out[slot] on."""
    first, second = split_pairs(values, W, R)
    item, other = split_pairs(items, W, R)
    if INTERPRETED:
        tl.store(out + slot, item, mask=first >= least)
        tl.store(out + slot + (first >= least), other, mask=second >= least)
    else:  # the same by the threads that have them, as in `append_pairs`
        tl.inline_asm_elementwise(
            """{ .reg .pred p; .reg .b64 a; .reg .b32 s; mov.b32 s, $2; mad.wide.u32 a, s, 4, $1;
            setp.ge.f32 p, $3, $7; @p st.global.b32 [a], $5; @p add.u32 s, s, 1; mad.wide.u32 a, s, 4, $1;
            setp.ge.f32 p, $4, $7; @p st.global.b32 [a], $6; mov.u32 $0, 0; }""",
            "=r,l,r,r,r,r,r,r",
            [out.to(tl.int64, bitcast=True), slot, first, second, item, other, least],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def keep_best(values, real, key, scores, INDICES, CHOSEN, wanted, W: tl.constexpr, R: tl.constexpr, WITH_SCORES: tl.constexpr):
    """The keys of the `wanted` best ordered scores `[W, R, 64]`, of those that are real, to INDICES, and their `scores` to CHOSEN."""
    low, high = tl.min(tl.where(real, values, float("inf"))), tl.max(tl.where(real, values, float("-inf")))
    values = tl.where(real, values, float("nan"))
    least = score_at(greatest(values, wanted, wanted, rank_at(low), rank_at(high) + 1))
    before, number = before_reaching(values, least, W, R)
    if number > wanted:  # the oldest of those at the threshold go
        equal = tl.where(values == least, values, float("nan"))
        equals, _ = before_reaching(equal, least, W, R)
        first, _ = split_pairs((equal == equal).to(tl.int32), W, R)
        place = of_pairs(equals, W, R) + of_pairs(first, W, R) * (tl.arange(0, 64) % 2)[None, None, :]
        values = tl.where((values == least) & (place < number - wanted), float("nan"), values)
        before, _ = before_reaching(values, least, W, R)
    put_pairs(INDICES, before, values, least, key, W, R)
    if WITH_SCORES:
        put_pairs(CHOSEN.to(tl.pointer_type(tl.int32), bitcast=True), before, values, least, scores.to(tl.int32, bitcast=True), W, R)


@triton.jit
def choose(
    ENTRIES, COUNTS, INDICES, CHOSEN, start, end, wanted, keep_first, keep_recent, segments, segment,
    BC: tl.constexpr, W: tl.constexpr, KEEP: tl.constexpr, WITH_SCORES: tl.constexpr,
):  # fmt: skip
    """The `wanted` best of the candidates of one row, which are at most BC where each of their segments begins at a pair."""
    R: tl.constexpr = BC // (W * 64)
    pair = in_order(W, R, 32, R * 32)
    gap, left, reached = tl.zeros_like(pair), tl.load(COUNTS) - 2 * pair, 0
    for j in range(1, segments):
        here = tl.cdiv(tl.load(COUNTS + j - 1), 2)
        reached += here
        gap += tl.where(pair >= reached, segment - 2 * here, 0)
        left = tl.where(pair >= reached, tl.load(COUNTS + j) - 2 * (pair - reached), left)
    near = (tl.arange(0, 64) % 2)[None, None, :]
    place = of_pairs(tl.where(left > 0, 2 * pair + gap, 0), W, R) + near  # the first pair again where there is none
    entry = tl.load(ENTRIES + tl.max_contiguous(tl.multiple_of(place, [1, 1, 2]), [1, 1, 2]))
    key, scores = entry.to(tl.int32), (entry >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    values = ordered(scores)
    if KEEP:
        values = with_kept(values, key, start, end, keep_first, keep_recent)
    keep_best(values, near < of_pairs(left, W, R), key, scores, INDICES, CHOSEN, wanted, W, R, WITH_SCORES)


@triton.jit
def pad(INDICES, CHOSEN, first, budget, WITH_SCORES: tl.constexpr):
    """-1 (and -inf) from slot `first` on."""
    for origin in range(first, budget, 1024):
        slot = origin + tl.arange(0, 1024)
        tl.store(INDICES + slot, -1, mask=slot < budget)
        if WITH_SCORES:
            tl.store(CHOSEN + slot, float("-inf"), mask=slot < budget)


@triton.jit
def open_row(START, END, SIZES, INDICES, CHOSEN, row, S, budget, WITH_SCORES: tl.constexpr):
    """Interval of a row, how many keys it sees, and how many it selects; writes the last, and what stands behind them in INDICES and CHOSEN."""
    start, end = interval_of(START, END, row, S)
    size = tl.maximum(end - start, 0)
    wanted = tl.minimum(size, budget)
    tl.store(SIZES + row, wanted)
    pad(INDICES, CHOSEN, wanted, budget, WITH_SCORES)
    return start, end, size, wanted


@triton.jit
def keep_all(INDICES, start, size):
    """The selection of a row that keeps all that it sees, `size` keys from `start` on."""
    for origin in range(0, size, 1024):
        slot = origin + tl.arange(0, 1024)
        tl.store(INDICES + slot, start + slot, mask=slot < size)


@triton.jit(do_not_specialize=["row0"])
def choose_kernel(
    ENTRIES, COUNTS, MAXIMA, SUMS, START, END, INDICES, SIZES, CHOSEN, LSE, FLAGS, row0, S, budget, keep_first, keep_recent, splits, segment,
    capacity, BC: tl.constexpr, W: tl.constexpr, KEEP: tl.constexpr, WITH_SCORES: tl.constexpr,
):  # fmt: skip
    """A row's selection from its candidates, or a flag where they aren't all there. Grid: rows."""
    row = tl.program_id(0).to(tl.int64)
    out = row0 + row
    ENTRIES, COUNTS, INDICES, CHOSEN = ENTRIES + row * splits * segment, COUNTS + row * splits, INDICES + out * budget, CHOSEN + out * budget
    start, end, size, wanted = open_row(START, END, SIZES, INDICES, CHOSEN, out, S, budget, WITH_SCORES)
    flag = 0
    if WITH_SCORES:
        largest = float("-inf")
        for j in range(splits):
            largest = tl.maximum(largest, tl.load(MAXIMA + row * splits + j))
        base = finite(largest)
        sums = 0.0
        for j in range(splits):
            maximum = tl.load(MAXIMA + row * splits + j)
            own = tl.where(tl.abs(maximum) == float("inf"), 0.0, maximum)
            sums += tl.load(SUMS + row * splits + j) * tl.exp(tl.where(maximum == float("-inf"), base, own) - base)
        tl.store(LSE + out, base + tl.log(sums))
    if (size <= budget) & (not WITH_SCORES):
        keep_all(INDICES, start, size)
    elif size > 0:
        total, slots = 0, 0
        for j in range(splits):
            count = tl.load(COUNTS + j)
            total += count
            slots += tl.cdiv(count, 2) * 2
        if (total < wanted) | (total > capacity) | (slots > BC):
            flag = 1
        elif slots <= BC // 2:
            choose(
                ENTRIES, COUNTS, INDICES, CHOSEN, start, end, wanted, keep_first, keep_recent, splits, segment, BC // 2, W, KEEP, WITH_SCORES
            )  # fmt: skip
        else:
            choose(ENTRIES, COUNTS, INDICES, CHOSEN, start, end, wanted, keep_first, keep_recent, splits, segment, BC, W, KEEP, WITH_SCORES)
    tl.store(FLAGS + row, flag)


@triton.jit
def count_reaching(SCORES, start, end, keep_first, keep_recent, point, BS: tl.constexpr):
    """How many keys of a row have a rank of at least `point`."""
    count = tl.zeros([BS], tl.int32)
    for origin in range(start, end, BS):
        key = origin + tl.arange(0, BS)
        rank = rank_of(tl.load(SCORES + key, mask=key < end, other=0.0), key, start, end, keep_first, keep_recent)
        count += ((rank >= point) & (key < end)).to(tl.int32)
    return tl.sum(count)


@triton.jit
def choose_of_all(SCORES, INDICES, CHOSEN, start, end, wanted, keep_first, keep_recent, BS: tl.constexpr, WITH_SCORES: tl.constexpr):
    """The `wanted` best keys of one row of scores in memory, exactly, by bisection over the ranks: some 32 passes."""
    point, high = tl.full([], RANK_NAN, tl.int32), tl.full([], RANK_KEPT + 1, tl.int32)
    while point + 1 < high:
        middle = (point & high) + ((point ^ high) >> 1)
        enough = count_reaching(SCORES, start, end, keep_first, keep_recent, middle, BS) >= wanted
        point, high = tl.where(enough, middle, point), tl.where(enough, high, middle)
    spare = count_reaching(SCORES, start, end, keep_first, keep_recent, point, BS) - wanted  # the oldest of those at the threshold
    place, equals = 0, 0
    for origin in range(start, end, BS):
        key = origin + tl.arange(0, BS)
        scores = tl.load(SCORES + key, mask=key < end, other=0.0)
        rank = tl.where(key < end, rank_of(scores, key, start, end, keep_first, keep_recent), LOWEST)
        equal = (rank == point).to(tl.int32)
        kept = (rank > point).to(tl.int32) + tl.where(equals + tl.cumsum(equal, 0) > spare, equal, 0)
        slot = place + tl.cumsum(kept, 0) - 1
        tl.store(INDICES + slot, key, mask=kept != 0)
        if WITH_SCORES:
            tl.store(CHOSEN + slot, scores, mask=kept != 0)
        place += tl.sum(kept)
        equals += tl.sum(equal)


@triton.jit(do_not_specialize=["tile0", "row0", "count"])
def exhaustive_kernel(
    Q, W, K, K_SCALE, TABLE, START, END, FLAGS, SCRATCH, INDICES, CHOSEN,
    stride_qb, stride_qt, stride_qj, stride_kb, stride_ks, stride_sb, stride_ss, tile0, row0, count, T, S, J, E, budget, keep_first, keep_recent,
    BN: tl.constexpr, BQ: tl.constexpr, BJ: tl.constexpr, BE: tl.constexpr, HEADS: tl.constexpr, PADDED: tl.constexpr, SCALED: tl.constexpr,
    PAGE: tl.constexpr, UNIT: tl.constexpr, LOADED: tl.constexpr, WITH_SCORES: tl.constexpr, BS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The flagged rows of `count` query tiles, from all their scores, which each program holds in its own SCRATCH `[BQ, S]`."""
    tiles = tl.cdiv(T, BQ)
    SCRATCH += tl.program_id(0).to(tl.int64) * BQ * S
    for tile in range(tile0 + tl.program_id(0), tile0 + count, tl.num_programs(0)):
        b, t0 = tile // tiles, tile % tiles * BQ
        query, n = tl.arange(0, BQ), tl.arange(0, BN)
        t, first = t0 + query, b.to(tl.int64) * T + t0  # the first row of the tile
        flagged = tl.load(FLAGS + first - row0 + query, mask=t < T, other=0) != 0
        if tl.max(flagged.to(tl.int32)) > 0:
            if not LOADED:
                start, end = load_interval(START, END, b, t, T, S)
                low, high = union(start, end, flagged, S)
                q_b, w_b = Q + b.to(tl.int64) * stride_qb, W + b.to(tl.int64) * T * J
                k_b, scale_b, table_b = keys_of(K, K_SCALE, TABLE, b, stride_kb, stride_sb, S, PAGE, UNIT)
                q, w = load_queries(q_b, w_b, stride_qt, stride_qj, t0, T, J, E, 0, BQ, BJ, BE)
                for origin in tl.range(low // BN * BN, high, BN, num_stages=STAGES):
                    key = origin + n
                    scores = score_tile(
                        q, w, q_b, w_b, k_b, scale_b, table_b, key, key < high, stride_qt, stride_qj, stride_kb, stride_ks, stride_sb, stride_ss,
                        t0, T, J, E, BN, BQ, BJ, BE, HEADS, PADDED, SCALED, PAGE, UNIT,
                    )  # fmt: skip
                    tl.store(SCRATCH + (query.to(tl.int64) * S)[None, :] + key[:, None], scores, mask=(key < high)[:, None] & flagged[None, :])
                tl.debug_barrier()  # other threads wrote the scores
            scores_row = Q + first * stride_qt if LOADED else SCRATCH
            for i in range(BQ):
                row = first + i
                if tl.load(FLAGS + row - row0, mask=t0 + i < T, other=0) != 0:
                    begin, stop = interval_of(START, END, row, S)
                    choose_of_all(
                        scores_row, INDICES + row * budget, CHOSEN + row * budget, begin, stop, tl.minimum(stop - begin, budget),
                        keep_first, keep_recent, BS, WITH_SCORES,
                    )  # fmt: skip
                scores_row += S  # where LOADED, BQ is 1
            tl.debug_barrier()  # before the next tile's scores
