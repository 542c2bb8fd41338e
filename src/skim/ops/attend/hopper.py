"""Attention over latents on sm_90 in Gluon: queries and keys of 576 or 512 channels, values the first 512 of the keys.

A task is 64 rows: 64 heads of one query, or all heads of as many neighbouring queries as fit. They read the query's selection,
the union of the neighbours' (see union.py), a bit a query and key saying who reads it, or the interval of keys that they see;
or, where there are few queries, a part of that (see walks.py). A program, one a processor, serves task after task. It walks
the keys of each in blocks of 64, two of them in shared memory, with three groups of four warps:

- `_scores` multiplies the queries with a block, makes the probabilities, and takes the left half of the output;
- `_right_half` loads the queries, the next task's before it stores the output of the last, and multiplies the probabilities
  with the right half of the block's values;
- `_gather` copies the keys of the next block, 16 bytes at a time, zeros where there is none, so that keys nobody reads
  may hold anything. It does not stop between tasks. For packed latents (see packed.py) `_unpack` takes its place, in
  eight warps: it copies their codes to where the right half of the block's channels goes, and dequantises them from there.

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

from skim.ops.attend import packed
from skim.ops.attend.union import tiles_of, unions
from skim.ops.attend.walks import best_splits, ends_of, merge, parts_of
from skim.ops.codec import LATENT_BLOCK
from skim.ops.dispatch import processors
from skim.ops.gluon import COPY, LINES, LOG2E, TILES, copy, lse_and_factor

ROWS, KEYS, STAGES = gl.constexpr(64), gl.constexpr(64), gl.constexpr(2)  # of a task; of a block; blocks in shared memory
VALUES, ROPE = gl.constexpr(512), gl.constexpr(64)  # channels of the latent, which are the values too; those that may follow
HALF = gl.constexpr(256)  # channels that a group of warps sums, and that a copy takes
SHARED = gl.constexpr(LATENT_BLOCK)  # channels of a packed latent with one scale
SCALES = gl.constexpr(packed.SCALES)  # of a packed latent, in the words behind its codes; its rotated channels follow
HEADS = 16  # fewer are padded to as many rows
REGISTERS = 168, 80  # a thread of `_right_half` and of `_gather`; `_scores` takes what is left
FEWER_REGISTERS = 160, 72  # where `_scores` holds queries, and of `_right_half` and of `_unpack`
HELD = 128  # channels of the queries in registers, beside the rotated ones, where tasks share keys: products wait for shared memory there
# On all processors. With fewer of queries, looking where their selections end takes longer than walking to the end of all slots; with fewer of
# tasks, loading queries into registers takes longer than it saves.
ROUNDS = 4
UNION_MB = 256  # more makes nothing faster: a chunk fills the card
PARTS_MB = 64  # of split walks; more would take longer to merge than splitting saves

# Triton renamed it after 3.6.
reinterpret = getattr(gl.shared_memory_descriptor, "reinterpret", None) or gl.shared_memory_descriptor._reinterpret

SUMS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16]))  # [ROWS, HALF]
NARROW = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16]))  # the same in programs of 16 warps, whose products get 128 registers
SCORES = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))  # [ROWS, KEYS]
# As SUMS, but a thread holds 8 neighbouring channels of a row instead of 2: what it stores is 16 bytes.
WIDE = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 4], [8, 0], [0, 32], [0, 64], [0, 128]], [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [64, 256]
    )
)
COPY_WORDS = gl.constexpr(gl.BlockedLayout([1, 4], [4, 8], [8, 1], [1, 0]))  # as COPY, in the warps of `_unpack`
WORDS = gl.constexpr(gl.BlockedLayout([1, 4], [8, 4], [8, 1], [1, 0]))  # 16 bytes a thread; what neighbours store of two rows lies in other banks
CODES = gl.constexpr(gl.SwizzledSharedLayout(16, 1, 2, [1, 0]))  # what neighbours with WORDS load of two rows lies in other banks
PLAIN = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
TILES_OF_WORDS = gl.constexpr(gl.NVMMASharedLayout(128, 32, 2))  # the bytes of TILES

# Of a word of four e4m3 codes and their scale: two words of two bfloat16 each, rounded once.
DEQUANTISE = gl.constexpr("""{
    .reg .b16 a, b, h<4>;
    .reg .b32 x, y;
    .reg .f32 f<4>;
    mov.b32 {a, b}, $2;
    cvt.rn.f16x2.e4m3x2 x, a;
    cvt.rn.f16x2.e4m3x2 y, b;
    mov.b32 {h0, h1}, x;
    mov.b32 {h2, h3}, y;
    cvt.f32.f16 f0, h0;
    cvt.f32.f16 f1, h1;
    cvt.f32.f16 f2, h2;
    cvt.f32.f16 f3, h3;
    mul.f32 f0, f0, $3;
    mul.f32 f1, f1, $3;
    mul.f32 f2, f2, $3;
    mul.f32 f3, f3, $3;
    cvt.rn.bf16x2.f32 $0, f1, f0;
    cvt.rn.bf16x2.f32 $1, f3, f2;
}""")


def refusal(function: str, args: tuple[Any, ...]) -> str | None:
    if function not in ("attend", "attend_dense"):
        return "hopper has forwards only"
    q, k, v, *reads, v_channels, scale = args[: 6 if function == "attend" else 7]
    D = q.shape[3]
    if packed.is_packed(k):
        if q.dtype != torch.bfloat16:
            return f"it copies the bfloat16 channels of packed latents, and the queries are {str(q.dtype).removeprefix('torch.')}"
    elif q.dtype not in (torch.bfloat16, torch.float16):
        return f"it multiplies bfloat16 and float16, and the inputs are {str(q.dtype).removeprefix('torch.')}"
    if k.shape[2] != 1 or v is not None or v_channels != VALUES.value or D not in (VALUES.value, VALUES.value + ROPE.value):
        return "it reads latents: one key head of 512 or 576 channels, the first 512 of them the values"
    if scale <= 0:
        return "it takes the largest score before it scales, and the scale is not positive"
    for name, x in (("q", q), ("k", k)):
        if x.stride(-1) != 1 or x.data_ptr() % 16 or any(stride % 16 for stride, size in zip(x.stride()[:-1], x.shape) if size > 1):
            unit = "bytes" if x.dtype == torch.uint8 else "channels"
            return f"it copies 16 bytes at a time, and rows of {name} don't begin at multiples of 16 {unit}"
    return None


class _Plan(NamedTuple):
    """How many queries and heads the rows of a task are, how many tasks share the heads of a query, and into how many parts a walk is split."""

    TILE: int
    BLOCK_H: int
    BLOCKS: int
    SPLITS: int


def _plan(q: Tensor, walk: int, workspace_mb: int) -> _Plan:
    """walk: how many keys a query reads at most. Neighbours share the rows of a task where that leaves tasks for half the card."""
    B, T, H, _ = q.shape
    block, programs = min(max(triton.next_power_of_2(H), HEADS), ROWS.value), processors(q.device)
    tile = ROWS.value // block
    if tile > T or 2 * B * tiles_of(T, tile) < programs:
        tile, block = 1, ROWS.value
    blocks = -(-H // block)
    most = (min(workspace_mb, PARTS_MB) << 20) // (4 * VALUES.value * B * T * H)
    return _Plan(tile, block, blocks, best_splits(B * tiles_of(T, tile) * blocks, -(-walk // KEYS.value), programs, most))


@gluon.jit
def _place(task, first, B, T, TILE: gl.constexpr, BLOCK_H: gl.constexpr, BLOCKS: gl.constexpr, SPLITS: gl.constexpr):
    """Row of the batch, first query, first head, and row of the output's `SPLITS * B`.

    Tasks of one tile follow each other: they run together and find their keys in L2.
    """
    part = task // BLOCKS
    tile = first + part // SPLITS
    tiles_of_row = gl.cdiv(T, TILE)
    b = (tile // tiles_of_row).to(gl.int64)
    return b, tile % tiles_of_row * TILE, task % BLOCKS * BLOCK_H, part % SPLITS * B + b


@gluon.jit
def _walk(
    READS, COUNTS, task, first, T, S, width,
    TILE: gl.constexpr, BLOCKS: gl.constexpr, SPLITS: gl.constexpr, DENSE: gl.constexpr,
):  # fmt: skip
    """From where to where a task walks its list of keys, or DENSE the keys themselves."""
    part = task // BLOCKS
    begin = task * 0
    end = begin + width
    if DENSE:
        tile = first + part // SPLITS
        tiles_of_row = gl.cdiv(T, TILE)
        t = tile // tiles_of_row * T + tile % tiles_of_row * TILE
        begin, end = begin + S, begin
        for i in gl.static_range(TILE):
            ok = tile % tiles_of_row * TILE + i < T
            low = gl.load(READS + t + i, mask=ok, other=0)
            high = gl.load(COUNTS + t + i, mask=ok, other=0)
            begin = gl.where((low < high) & (low < begin), low, begin)
            end = gl.where((low < high) & (high > end), high, end)
        begin = gl.where(begin < 0, 0, begin)
        end = gl.where(end > S, S, end)
    elif COUNTS is not None:
        end = gl.load(COUNTS + part // SPLITS)
    if SPLITS > 1:
        length = gl.where(end > begin, end - begin, 0)
        share = gl.cdiv(gl.cdiv(length, SPLITS), KEYS) * KEYS
        begin += part % SPLITS * share
        end = gl.where(begin + share < end, begin + share, end)
    return begin, end


@gluon.jit
def _row(first_query, first_head, T, H: gl.constexpr, BLOCK_H: gl.constexpr, layout: gl.constexpr):
    """Of each matrix row: query within the tile, query, head, and whether there is such a row."""
    row = gl.arange(0, ROWS, layout)
    i = row // BLOCK_H
    t, head = first_query + i, first_head + row % BLOCK_H
    return i, t, head, (t < T) & (head < H)


@gluon.jit
def _copy_rows(left, right, rope, source, ok, DR: gl.constexpr):
    """Copy the channels of rows that begin at `source` `[rows, 1]`; zeros where not `ok`."""
    channel = gl.expand_dims(gl.arange(0, HALF, gl.SliceLayout(0, COPY)), 0)
    copy(left, source + channel, mask=ok)
    copy(right, source + HALF + channel, mask=ok)
    if DR > 0:
        copy(rope, source + VALUES + gl.expand_dims(gl.arange(0, DR, gl.SliceLayout(0, COPY)), 0), mask=ok)


@gluon.jit
def _keys(READS, at, end, S, DENSE: gl.constexpr, layout: gl.constexpr):
    """The keys of a block of what a task walks, and which of them there are."""
    slot = at + gl.arange(0, KEYS, layout)
    key, real = slot, slot < end
    if not DENSE:
        key = gl.load(READS + slot, mask=real, other=-1)
        real = (key >= 0) & (key < S)
    return gl.where(real, key, 0).to(gl.int64), real


@gluon.jit
def _who(BITS, at, end, key, real, TILE: gl.constexpr, DENSE: gl.constexpr, layout: gl.constexpr):
    """What `_scores` has to know of a block's keys: DENSE which they are, of a union the bits of who reads them, else whether they are read."""
    who = real.to(gl.int32)
    if DENSE:
        who = gl.where(real, key.to(gl.int32), -1)
    elif TILE > 1:
        slot = at + gl.arange(0, KEYS, layout)
        who = gl.where(real, gl.load(BITS + slot, mask=slot < end, other=0), 0)
    return who


@gluon.jit
def _gather(
    K, k_b, k_s, S, READS, BITS, COUNTS, first, tasks, width, B, T, left, right, rope, readers, ready, free,
    DR: gl.constexpr, TILE: gl.constexpr, BLOCK_H: gl.constexpr, BLOCKS: gl.constexpr, SPLITS: gl.constexpr, DENSE: gl.constexpr,
):  # fmt: skip
    """Copy block after block of the keys in READS, with what says who reads them."""
    of_rows: gl.constexpr = gl.SliceLayout(1, COPY)
    block = 0
    for task in range(gl.program_id(0), tasks, gl.num_programs(0)):
        b, _, _, _ = _place(task, first, B, T, TILE, BLOCK_H, BLOCKS, SPLITS)
        begin, end = _walk(READS, COUNTS, task, first, T, S, width, TILE, BLOCKS, SPLITS, DENSE)
        list_ = (task // BLOCKS // SPLITS).to(gl.int64) * width
        for at in range(begin, end, KEYS):
            stage = block % STAGES
            key, real = _keys(READS + list_, at, end, S, DENSE, of_rows)
            who = _who(BITS + list_, at, end, key, real, TILE, DENSE, of_rows)
            mbarrier.wait(free.index(stage), (block // STAGES & 1) ^ 1)
            readers.index(stage).store(who)
            source = gl.expand_dims(K + b * k_b + key * k_s, 1)
            _copy_rows(left.index(stage), right.index(stage), rope.index(stage), source, gl.expand_dims(real, 1), DR)
            async_copy.mbarrier_arrive(ready.index(stage), increment_count=False)  # each thread, when its copies are there
            mbarrier.arrive(ready.index(stage), count=1)
            block += 1


@gluon.jit
def _unpack(
    K, k_b, k_s, S, READS, BITS, COUNTS, first, tasks, width, B, T, left, right, rope, scales, readers, copied, ready, free,
    TILE: gl.constexpr, BLOCK_H: gl.constexpr, BLOCKS: gl.constexpr, SPLITS: gl.constexpr, DENSE: gl.constexpr,
):  # fmt: skip
    """As `_gather`, of packed latents, and dequantise them. K is of words, k_b and k_s count bytes."""
    of_rows: gl.constexpr = gl.SliceLayout(1, COPY_WORDS)
    block = 0
    for task in range(gl.program_id(0), tasks, gl.num_programs(0)):
        b, _, _, _ = _place(task, first, B, T, TILE, BLOCK_H, BLOCKS, SPLITS)
        begin, end = _walk(READS, COUNTS, task, first, T, S, width, TILE, BLOCKS, SPLITS, DENSE)
        list_ = (task // BLOCKS // SPLITS).to(gl.int64) * width
        key, real = _keys(READS + list_, begin, end, S, DENSE, of_rows)
        for at in range(begin, end, KEYS):
            stage = block % STAGES
            who = _who(BITS + list_, at, end, key, real, TILE, DENSE, of_rows)
            mbarrier.wait(free.index(stage), (block // STAGES & 1) ^ 1)
            readers.index(stage).store(who)
            codes = _codes_of(right.index(stage))
            source = gl.expand_dims(K + b * (k_b // 4) + key * (k_s // 4), 1)
            _copy_packed(codes, scales.index(stage), _words_of(rope.index(stage), ROPE), source, gl.expand_dims(real, 1))
            async_copy.mbarrier_arrive(copied, increment_count=False)
            key, real = _keys(READS + list_, at + KEYS, end, S, DENSE, of_rows)  # of the next block, while the copies are on their way
            mbarrier.wait(copied, block & 1)
            _dequantise(_words_of(left.index(stage), HALF), codes, scales.index(stage), 0)
            _dequantise(_words_of(right.index(stage), HALF), codes, scales.index(stage), 1)
            fence_async_shared()
            mbarrier.arrive(ready.index(stage), count=1)
            block += 1


@gluon.jit
def _words_of(channels, C: gl.constexpr):
    """Shared memory `[KEYS, C]` of bfloat16 as words `[KEYS, C / 2]`."""
    return reinterpret(channels, gl.int32, (KEYS, C // 2), TILES_OF_WORDS)


@gluon.jit
def _codes_of(right):
    """Words of four codes each, `[KEYS, VALUES / 4]`, in the shared memory of the right half of their latents."""
    return reinterpret(right, gl.int32, (KEYS, VALUES // 4), CODES)


@gluon.jit
def _copy_words(into, source, ok, N: gl.constexpr):
    """Copy N words of each row from `source` `[KEYS, 1]` on; zeros where not `ok`."""
    copy(into, source + gl.expand_dims(gl.arange(0, N, gl.SliceLayout(0, COPY_WORDS)), 0), mask=ok)


@gluon.jit
def _copy_packed(codes, scales, rope, source, ok):
    """Copy packed latents that begin at `source` `[KEYS, 1]`."""
    _copy_words(codes, source, ok, VALUES // 4)
    _copy_words(scales, source + VALUES // 4, ok, SCALES)
    _copy_words(rope, source + VALUES // 4 + SCALES, ok, ROPE // 2)


@gluon.jit
def _dequantise(into, codes, scales, half: gl.constexpr):
    """A half of the latents, as words `[KEYS, HALF / 2]`. Its codes may lie in `into`: all are read before any of it is written."""
    parts: gl.constexpr = HALF // SHARED
    words = ()
    for part in gl.static_range(parts):
        words += (codes.slice((half * parts + part) * (SHARED // 4), SHARED // 4, dim=1).load(WORDS),)
    for part in gl.static_range(parts):
        scale = gl.cast(scales.slice(half * parts + part, 1, dim=1).load(WORDS), gl.float32, bitcast=True)
        into.slice(part * (SHARED // 2), SHARED // 2, dim=1).store(_latents(words[part], scale))


@gluon.jit
def _latents(words, scale):
    """`[KEYS, SHARED / 2]` words of two bfloat16 of the codes in words and their scale `[KEYS, 1]`."""
    low, high = gl.inline_asm_elementwise(DEQUANTISE, "=r,=r,r,f", [words, scale], (gl.int32, gl.int32), is_pure=True, pack=1)
    return gl.reshape(gl.join(low, high), (KEYS, SHARED // 2))


@gluon.jit
def _bring(
    K, k_b, k_s, S, READS, BITS, COUNTS, first, tasks, width, B, T, left, right, rope, scales, readers, copied, ready, free,
    DR: gl.constexpr, TILE: gl.constexpr, BLOCK_H: gl.constexpr, BLOCKS: gl.constexpr, SPLITS: gl.constexpr, DENSE: gl.constexpr,
    PACKED: gl.constexpr,
):  # fmt: skip
    if PACKED:
        _unpack(
            K, k_b, k_s, S, READS, BITS, COUNTS, first, tasks, width, B, T, left, right, rope, scales, readers, copied, ready, free,
            TILE, BLOCK_H, BLOCKS, SPLITS, DENSE,
        )  # fmt: skip
    else:
        _gather(
            K, k_b, k_s, S, READS, BITS, COUNTS, first, tasks, width, B, T, left, right, rope, readers, ready, free,
            DR, TILE, BLOCK_H, BLOCKS, SPLITS, DENSE,
        )  # fmt: skip


@gluon.jit
def _scores(
    OUT, LSE, SINK, READS, COUNTS, first, tasks, width, B, T, S, scale, q, q_rope, left, right, rope, p, readers, rescale, factors,
    queries, ready, free, p_ready, done,
    H: gl.constexpr, DR: gl.constexpr, TILE: gl.constexpr, BLOCK_H: gl.constexpr, BLOCKS: gl.constexpr, SPLITS: gl.constexpr,
    HAS_SINK: gl.constexpr, DENSE: gl.constexpr, HELD: gl.constexpr, sums: gl.constexpr,
):  # fmt: skip
    """Scores, probabilities, lse and the left half of the output. HELD channels of the queries, and the rotated ones, stay in registers."""
    operand: gl.constexpr = gl.DotOperandLayout(0, SCORES, 2)
    of_scores: gl.constexpr = gl.SliceLayout(1, SCORES)
    of_sums: gl.constexpr = gl.SliceLayout(1, sums)
    block, phase = 0, 0
    for task in range(gl.program_id(0), tasks, gl.num_programs(0)):
        b, first_query, first_head, into = _place(task, first, B, T, TILE, BLOCK_H, BLOCKS, SPLITS)
        begin, end = _walk(READS, COUNTS, task, first, T, S, width, TILE, BLOCKS, SPLITS, DENSE)
        i, t, head, ok = _row(first_query, first_head, T, H, BLOCK_H, of_scores)
        low, high = i, i
        if DENSE:
            low = gl.load(READS + b * T + t, mask=t < T, other=0)
            low = gl.where(low < 0, 0, low)
            high = gl.load(COUNTS + b * T + t, mask=t < T, other=0)
        largest = gl.full([ROWS], -1e30, gl.float32, of_scores)
        total = gl.zeros([ROWS], gl.float32, of_scores)
        acc = gl.zeros([ROWS, HALF], gl.float32, sums)
        mbarrier.wait(queries, phase)
        if HELD > 0:
            held, held_rope = q.slice(0, HELD, dim=1).load(operand), q_rope.load(operand)
        for _ in range(begin, end, KEYS):
            stage = block % STAGES
            mbarrier.wait(ready.index(stage), block // STAGES & 1)
            fence_async_shared()
            s = gl.zeros([ROWS, KEYS], gl.float32, SCORES)
            keys = left.index(stage).permute((1, 0))
            if HELD > 0:
                s = warpgroup_mma(held, keys.slice(0, HELD, dim=0), s, use_acc=False, is_async=True)
            s = warpgroup_mma(q.slice(HELD, HALF - HELD, dim=1), keys.slice(HELD, HALF - HELD, dim=0), s, use_acc=HELD > 0, is_async=True)
            s = warpgroup_mma(q.slice(HALF, HALF, dim=1), right.index(stage).permute((1, 0)), s, is_async=True)
            if DR > 0:
                s = warpgroup_mma(held_rope if HELD > 0 else q_rope, rope.index(stage).permute((1, 0)), s, is_async=True)
            s = warpgroup_mma_wait(0, deps=[s])
            who = gl.expand_dims(readers.index(stage).load(gl.SliceLayout(0, SCORES)), 0)
            if DENSE:
                reads = (who >= gl.expand_dims(low, 1)) & (who < gl.expand_dims(high, 1))
            elif TILE > 1:
                reads = (who >> gl.expand_dims(i, 1) & 1) != 0
            else:
                reads = who != 0
            s = gl.where(reads, s * scale, float("-inf"))
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
            acc = warpgroup_mma(gl.convert_layout(weight, gl.DotOperandLayout(0, sums, 2)), left.index(stage), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(free.index(stage), count=1)
            block += 1
        lse, factor = lse_and_factor(largest, total, SINK, head, ok, HAS_SINK)
        factors.store(factor)
        mbarrier.arrive(done, count=1)
        gl.store(LSE + into * T * H + t * H + head, lse, mask=ok)
        _store_half(OUT + into * T * H * VALUES, acc, gl.convert_layout(factor, of_sums), first_query, first_head, T, H, BLOCK_H, SPLITS, sums)
        phase ^= 1


@gluon.jit
def _right_half(
    Q, q_b, q_t, q_h, OUT, READS, COUNTS, first, tasks, width, B, T, S, q, q_rope, right, p, rescale, factors, queries, free, p_ready, done,
    H: gl.constexpr, DR: gl.constexpr, TILE: gl.constexpr, BLOCK_H: gl.constexpr, BLOCKS: gl.constexpr, SPLITS: gl.constexpr,
    DENSE: gl.constexpr, sums: gl.constexpr,
):  # fmt: skip
    """Load the queries; the right half of the output."""
    of_sums: gl.constexpr = gl.SliceLayout(1, sums)
    b, first_query, first_head, into = _place(gl.program_id(0), first, B, T, TILE, BLOCK_H, BLOCKS, SPLITS)
    _load_queries(Q + b * q_b, q_t, q_h, first_query, first_head, T, q, q_rope, queries, H, DR, BLOCK_H)
    block, phase = 0, 0
    for task in range(gl.program_id(0), tasks, gl.num_programs(0)):
        begin, end = _walk(READS, COUNTS, task, first, T, S, width, TILE, BLOCKS, SPLITS, DENSE)
        acc = gl.zeros([ROWS, HALF], gl.float32, sums)
        for _ in range(begin, end, KEYS):
            stage = block % STAGES
            mbarrier.wait(p_ready.index(stage), block // STAGES & 1)
            fence_async_shared()
            acc = acc * gl.expand_dims(rescale.index(stage).load(of_sums), 1)
            acc = warpgroup_mma(p.index(stage), right.index(stage), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(free.index(stage), count=1)
            block += 1
        mbarrier.wait(done, phase)
        factor = factors.load(of_sums)  # before the next queries, with which `_scores` comes to write the next factors
        after = task + gl.num_programs(0)
        if after < tasks:
            b, first_query, first_head, into = _place(after, first, B, T, TILE, BLOCK_H, BLOCKS, SPLITS)
            _load_queries(Q + b * q_b, q_t, q_h, first_query, first_head, T, q, q_rope, queries, H, DR, BLOCK_H)
        b, first_query, first_head, into = _place(task, first, B, T, TILE, BLOCK_H, BLOCKS, SPLITS)
        _store_half(OUT + into * T * H * VALUES + HALF, acc, factor, first_query, first_head, T, H, BLOCK_H, SPLITS, sums)
        phase ^= 1


@gluon.jit
def _load_queries(Q, q_t, q_h, first_query, first_head, T, q, q_rope, queries, H: gl.constexpr, DR: gl.constexpr, BLOCK_H: gl.constexpr):
    """Q is of one row of the batch."""
    _, t, head, ok = _row(first_query, first_head, T, H, BLOCK_H, gl.SliceLayout(1, COPY))
    source = Q + t.to(gl.int64) * q_t + head.to(gl.int64) * q_h
    _copy_rows(q.slice(0, HALF, dim=1), q.slice(HALF, HALF, dim=1), q_rope, gl.expand_dims(source, 1), gl.expand_dims(ok, 1), DR)
    async_copy.mbarrier_arrive(queries, increment_count=False)


@gluon.jit
def _store_half(OUT, acc, factor, first_query, first_head, T, H: gl.constexpr, BLOCK_H: gl.constexpr, SPLITS: gl.constexpr, sums: gl.constexpr):
    """OUT is of one row of the batch."""
    layout: gl.constexpr = sums if SPLITS > 1 else WIDE  # neighbours together store 32 bytes of a float32 row as it is
    factor = gl.expand_dims(factor, 1)
    out = gl.where(factor == 0, 0.0, acc * factor)  # what neighbours read, even NaN, stays with them
    _, t, head, ok = _row(first_query, first_head, T, H, BLOCK_H, gl.SliceLayout(1, layout))
    into = OUT + gl.expand_dims((t * H + head).to(gl.int64) * VALUES, 1) + gl.expand_dims(gl.arange(0, HALF, gl.SliceLayout(0, layout)), 0)
    gl.store(into, gl.convert_layout(out.to(OUT.dtype.element_ty), layout), mask=gl.expand_dims(ok, 1))


@gluon.jit
def forward(
    Q, K, OUT, LSE, SINK, READS, BITS, COUNTS, first, tasks, scale, B, T, S, width, q_b, q_t, q_h, k_b, k_s,
    H: gl.constexpr, DR: gl.constexpr, TILE: gl.constexpr, BLOCK_H: gl.constexpr, BLOCKS: gl.constexpr, SPLITS: gl.constexpr,
    HAS_SINK: gl.constexpr, DENSE: gl.constexpr, PACKED: gl.constexpr, HELD: gl.constexpr,
    REGISTERS_RIGHT: gl.constexpr, REGISTERS_GATHER: gl.constexpr,
):  # fmt: skip
    """out and lse: program n serves the tasks n, n + programs, ...

    Task m is block m % BLOCKS of the heads, of part m // BLOCKS % SPLITS of the walk, of tile first + m // BLOCKS // SPLITS. READS
    `[.., width]` holds the keys of each tile from `first` on: indices, or with TILE > 1 unions with BITS; of these the first COUNTS,
    or all. DENSE: READS and COUNTS `[B, T]` are where the keys that a query sees start and end. PACKED: K is of words of 4 bytes, k_b
    and k_s count bytes. With SPLITS > 1 out and lse are float32 `[SPLITS, B, T, H, ..]`.
    """
    dtype: gl.constexpr = Q.dtype.element_ty
    q = gl.allocate_shared_memory(dtype, [ROWS, VALUES], TILES)
    left = gl.allocate_shared_memory(dtype, [STAGES, KEYS, HALF], TILES)
    right = gl.allocate_shared_memory(dtype, [STAGES, KEYS, HALF], TILES)
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
    scales, copied = readers, done  # which only `_unpack` uses
    if PACKED:
        scales = gl.allocate_shared_memory(gl.int32, [STAGES, KEYS, SCALES], PLAIN)
        copied = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        mbarrier.init(copied, count=256)
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1 if PACKED else 129)  # `_unpack`; the threads of `_gather`, and its bits
        mbarrier.init(free.index(stage), count=2)
        mbarrier.init(p_ready.index(stage), count=1)
    mbarrier.init(queries, count=128)
    mbarrier.init(done, count=1)
    sums: gl.constexpr = NARROW if PACKED else SUMS
    gl.warp_specialize(
        [
            (_scores, (
                OUT, LSE, SINK, READS, COUNTS, first, tasks, width, B, T, S, scale, q, q_rope, left, right, rope, p, readers, rescale, factors,
                queries, ready, free, p_ready, done, H, DR, TILE, BLOCK_H, BLOCKS, SPLITS, HAS_SINK, DENSE, HELD, sums,
            )),
            (_right_half, (
                Q, q_b, q_t, q_h, OUT, READS, COUNTS, first, tasks, width, B, T, S, q, q_rope, right, p, rescale, factors,
                queries, free, p_ready, done, H, DR, TILE, BLOCK_H, BLOCKS, SPLITS, DENSE, sums,
            )),
            (_bring, (
                K, k_b, k_s, S, READS, BITS, COUNTS, first, tasks, width, B, T, left, right, rope, scales, readers, copied, ready, free,
                DR, TILE, BLOCK_H, BLOCKS, SPLITS, DENSE, PACKED,
            )),
        ],
        [4, 8 if PACKED else 4],
        [REGISTERS_RIGHT, REGISTERS_GATHER],
    )  # fmt: skip


def attend(
    q: Tensor, k: Tensor, v: Tensor | None, indices: Tensor, v_channels: int, scale: float, sink: Tensor | None, workspace_mb: int
) -> tuple[Tensor, Tensor]:
    K = indices.shape[3]
    out, lse, nothing = _outputs(q, k, v_channels)
    if K == 0 or nothing:
        return out.zero_(), lse.fill_(float("-inf"))
    indices, (B, T) = indices.to(torch.int32).contiguous(), q.shape[:2]
    plan = _plan(q, K, workspace_mb)
    if plan.TILE == 1:
        ends = ends_of(indices) if ROUNDS * processors(q.device) <= B * T else None
        _launch(q, k, sink, out, lse, scale, plan, B * T, 0, False, indices, indices, ends)
        return out, lse
    for part, keys, bits, counts in unions(indices, k.shape[1], plan.TILE, min(workspace_mb, UNION_MB)):
        _launch(q, k, sink, out, lse, scale, plan._replace(SPLITS=1), part.stop - part.start, part.start, False, keys, bits, counts)
    return out, lse


def attend_dense(
    q: Tensor, k: Tensor, v: Tensor | None, start: Tensor, end: Tensor, v_channels: int, scale: float, sink: Tensor | None, workspace_mb: int
) -> tuple[Tensor, Tensor]:
    out, lse, nothing = _outputs(q, k, v_channels)
    if nothing:
        return out.zero_(), lse.fill_(float("-inf"))
    start, end, (B, T) = start.contiguous(), end.contiguous(), q.shape[:2]
    plan = _plan(q, k.shape[1], workspace_mb)
    _launch(q, k, sink, out, lse, scale, plan, B * tiles_of(T, plan.TILE), 0, True, start, start, end)
    return out, lse


def _outputs(q: Tensor, k: Tensor, v_channels: int) -> tuple[Tensor, Tensor, bool]:
    """out and lse, and whether there is nothing to read or to write."""
    out, lse = q.new_empty(*q.shape[:3], v_channels), q.new_empty(q.shape[:3], dtype=torch.float32)
    return out, lse, k.shape[1] == 0 or out.numel() == 0


def _strides(x: Tensor, axes: int) -> tuple[int, ...]:
    """Of the first axes; 0 for an axis of one, whose stride may be no multiple of 16."""
    return tuple(0 if size == 1 else stride for size, stride in zip(x.shape[:axes], x.stride()))


def _launch(
    q: Tensor, k: Tensor, sink: Tensor | None, out: Tensor, lse: Tensor, scale: float, plan: _Plan, tiles: int, first: int, dense: bool,
    reads: Tensor, bits: Tensor, counts: Tensor | None,
) -> None:  # fmt: skip
    B, T, H, D = q.shape
    S, k_strides, packs = k.shape[1], _strides(k, 2), packed.is_packed(k)
    if packs:
        k = k.view(torch.int32)
    tasks = tiles * plan.BLOCKS * plan.SPLITS
    into, into_lse = parts_of(plan.SPLITS, out, lse)
    last = None if sink is None or plan.SPLITS > 1 else sink.contiguous()
    programs = processors(q.device)
    held = HELD if plan.BLOCKS > 1 and ROUNDS * programs <= tasks and VALUES.value < D and not (packs or dense) else 0
    registers = FEWER_REGISTERS if packs or held else REGISTERS
    forward[(min(tasks, programs),)](
        q, k, into, into_lse, last, reads, bits, counts, first, tasks, scale * LOG2E.value, B, T, S, reads.shape[-1],
        *_strides(q, 3), *k_strides, H, D - VALUES.value, *plan, last is not None, dense, packs, held,
        *registers, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    if plan.SPLITS > 1:
        merge(into, into_lse, out, lse, sink)
