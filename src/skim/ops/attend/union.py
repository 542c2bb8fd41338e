"""Unions of neighbouring selections: what a tile of queries reads together, and which of its queries reads each key.

Neighbouring queries select mostly the same keys, so a program that serves a tile of r of them over the union of their
selections gathers a shared key once. A program makes a union by way of shared memory: every index sets its query's bit of its
key there, then the keys that have one are read off in order. A chunk of tiles at a time, in bounded memory, without the host.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from skim.ops.dispatch import interpreted
from skim.ops.workspace import chunks

INTERPRETED = tl.constexpr(interpreted())
WARPS = 4  # of a program
MARKS = 1 << 15  # bytes of shared memory for the bits that say which queries read a key, of the 48 KB that a program has without asking
SLOTS = 2048  # indices that a program marks at a time


@triton.jit
def ones_in(x):
    """How many bits of each int32 are set."""
    x -= (x >> 1) & 0x55555555
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    return (((x + (x >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24


@triton.jit
def own_memory(CELLS, BYTES: tl.constexpr):
    """Shared memory beside Triton's own, which takes no computed addresses. In the interpreter it is CELLS, one for every two bytes."""
    if INTERPRETED:
        return CELLS
    else:
        asm: tl.constexpr = ".shared .align 16 .b8 own_memory[" + BYTES + "]; mov.u32 $0, own_memory;"
        return tl.inline_asm_elementwise(asm, "=r", [], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def behind(memory, size):
    """Where memory goes on behind so many bytes."""
    return memory + (size // 2 if INTERPRETED else size)


@triton.jit
def clear(memory, at):
    """Zeros to the words of 32 bits at the bytes `at`."""
    if INTERPRETED:
        tl.store(behind(memory, at), 0)
    else:
        asm: tl.constexpr = "st.shared.b32 [$1], 0; mov.u32 $0, 0;"
        tl.inline_asm_elementwise(asm, "=r,r", [behind(memory, at)], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def word_of(memory, at, TYPE: tl.constexpr):
    """The words of PTX's TYPE, of 32 or 16 bits, at the bytes `at`."""
    if INTERPRETED:
        return tl.load(behind(memory, at))
    else:
        asm: tl.constexpr = "ld.shared." + TYPE + " $0, [$1];"
        return tl.inline_asm_elementwise(asm, "=r,r", [behind(memory, at)], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def mark(read, marks, key, most, query, TILE: tl.constexpr):
    """Set the bit of each key in `read`, and that of the query, of the TILE that the key has, in `marks`; where 0 <= key < most."""
    if INTERPRETED:
        inside, bit, one = (key >= 0) & (key < most), key * TILE + query, tl.full(key.shape, 1, tl.int32)
        tl.atomic_or(behind(read, (key >> 5) * 4), one << (key & 31), mask=inside, sem="relaxed")
        tl.atomic_or(behind(marks, (bit >> 5) * 4), one << (bit & 31), mask=inside, sem="relaxed")
    else:
        tl.inline_asm_elementwise(
            """{ .reg .pred p; .reg .b32 a, b, m; setp.ge.u32 p, $3, $4; @p bra DONE;
            shr.u32 a, $3, 5; mad.lo.u32 a, a, 4, $1; and.b32 b, $3, 31; mov.b32 m, 1; shl.b32 m, m, b; red.shared.or.b32 [a], m;
            mad.lo.u32 b, $3, $6, $5; shr.u32 a, b, 5; mad.lo.u32 a, a, 4, $2; and.b32 b, b, 31; mov.b32 m, 1; shl.b32 m, m, b;
            red.shared.or.b32 [a], m; DONE: mov.u32 $0, 0; }""",
            "=r,r,r,r,r,r,r", [read, marks, key, most, query, TILE], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def list_bits(memory, at, bits, first):
    """Store `first` plus the place of each bit that is set, ascending, as words of 16 bits, from the bytes `at` on."""
    if INTERPRETED:
        for place in tl.static_range(32):
            bit = (bits >> place) & 1
            tl.store(behind(memory, at), first + place, mask=bit != 0)
            at += 2 * bit
    else:
        tl.inline_asm_elementwise(
            """{ .reg .pred p; .reg .b32 a, rest, x; .reg .b16 h; mov.b32 a, $1; mov.b32 rest, $2;
            NEXT: setp.eq.u32 p, rest, 0; @p bra DONE; brev.b32 x, rest; clz.b32 x, x; add.u32 x, x, $3; cvt.u16.u32 h, x;
            st.shared.b16 [a], h; add.u32 a, a, 2; sub.u32 x, rest, 1; and.b32 rest, rest, x; bra NEXT;
            DONE: mov.u32 $0, 0; }""",
            "=r,r,r,r", [behind(memory, at), bits, first], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def unite(
    INDICES, KEYS, BITS, COUNTS, CELLS, first, T, K, S, capacity,
    R: tl.constexpr, TILE: tl.constexpr, SLOTS: tl.constexpr, RANGE: tl.constexpr, THREADS: tl.constexpr, COPIED: tl.constexpr,
    BYTES: tl.constexpr,
):  # fmt: skip
    """Write the first `capacity` keys of a union, ascending, with the bits of their queries. Grid: unions.

    Of RANGE keys at a time shared memory holds a bit that says whether any query reads them, and TILE bits that say which do. Of
    32 * THREADS of those at a time it lists the ones that are read: so neighbouring threads write neighbouring keys.
    """
    STEP: tl.constexpr = 32 * THREADS
    read = own_memory(CELLS, BYTES)
    marks, listed = behind(read, RANGE // 8), behind(read, (1 + TILE) * RANGE // 8)
    tiles_of_row = tl.cdiv(T, TILE)
    union = tl.program_id(0)
    tile, selection = first + union // R, union % R
    b = (tile // tiles_of_row).to(tl.int64)
    t = tile % tiles_of_row * TILE
    out = tl.full([], capacity, tl.int64) * union
    thread = tl.arange(0, THREADS)
    low, end, count = 0, 1, 0
    while (low < end) & (count <= capacity):
        for word in range(0, (1 + TILE) * RANGE // 32, THREADS):
            clear(read, 4 * (word + thread))
        tl.debug_barrier()
        last = tl.full([SLOTS], -1, tl.int32)
        for i in range(0, tl.minimum(TILE, T - t)):
            indices = INDICES + ((b * T + t + i) * R + selection) * K
            for at in range(0, K, SLOTS):
                slot = at + tl.arange(0, SLOTS)
                key = tl.load(indices + slot, mask=slot < K, other=-1)
                last = tl.maximum(last, tl.where(key < S, key, -1))
                mark(read, marks, key - low, tl.minimum(S - low, RANGE), i, TILE)
        end = tl.max(last, 0) + 1
        tl.debug_barrier()
        for begin in range(0, tl.minimum(end - low, RANGE), STEP):
            chosen = word_of(read, begin // 8 + 4 * thread, "b32")
            number = ones_in(chosen)
            list_bits(listed, 2 * (tl.cumsum(number, 0) - number), chosen, 32 * thread)
            total = tl.sum(number, 0)
            tl.debug_barrier()
            for at in range(0, total, COPIED):
                slot = at + tl.arange(0, COPIED)
                key = begin + (word_of(listed, 2 * slot, "u16") & (STEP - 1))  # behind the last there may be anything
                bit = key * TILE
                bits = word_of(marks, (bit >> 5) * 4, "b32") >> (bit & 31)
                if TILE < 32:
                    bits &= (1 << TILE) - 1
                more = (slot < total) & (count + slot < capacity)
                tl.store(KEYS + out + count + slot, low + key, mask=more)
                tl.store(BITS + out + count + slot, bits, mask=more)
            count += total
            tl.debug_barrier()
        low += RANGE
    tl.store(COUNTS + union, count)


def tiles_of(T: int, tile: int) -> int:
    """How many tiles of so many queries a row of T has."""
    return -(-T // tile)


def unions(indices: Tensor, S: int, tile: int, workspace_mb: int, most: int | None = None) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """The unions of each tile's selections, a chunk of tiles at a time; the tensors of one chunk are overwritten by the next.

    Args:
        indices: int32 `[B, T, R, K]`, contiguous, any order, -1 anywhere.
        S: number of keys.
        tile: r, a power of two of at most 32: tile n of the `B * ceil(T / r)` serves r neighbouring queries of a row.
        workspace_mb: how much unions may hold, MiB.
        most: a union of more keys than that is of no use: it is cut short, and its count is larger than `most`.

    Yields:
        the slice of tiles; keys int32 `[tiles, R, capacity]` ascending, bits int32 alike (bit i: query i of the tile
        reads that key), counts int32 `[tiles, R]`.
    """
    B, T, R, K = indices.shape
    tiles, capacity, threads = B * tiles_of(T, tile), min(tile * K, S, tile * K if most is None else most), 32 * WARPS
    parts = list(chunks(tiles, 8 * R * capacity, workspace_mb))
    widest = max((part.stop - part.start for part in parts), default=0)
    keys, bits = torch.empty(2, widest, R, capacity, dtype=torch.int32, device=indices.device)
    counts = torch.empty(widest, R, dtype=torch.int32, device=indices.device)
    range_ = min(max(triton.next_power_of_2(S), 32 * threads), 8 * MARKS // max(tile, 8))
    memory = (1 + tile) * range_ // 8 + 64 * threads
    cells = keys.new_empty(memory // 2 if interpreted() else 0)
    for part in parts:
        n = part.stop - part.start
        sizes = part.start, T, K, S, capacity, R, tile, min(SLOTS, triton.next_power_of_2(K)), range_, threads, 2 * threads, str(memory)
        unite[(n * R,)](indices, keys, bits, counts, cells, *sizes, num_warps=WARPS)
        yield part, keys[:n], bits[:n], counts[:n]
