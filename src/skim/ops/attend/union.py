"""Unions of neighbouring selections: what a tile of queries reads together, and which of its queries reads each key.

Neighbouring queries select mostly the same keys, so a program that serves a tile of r of them over the union of their
selections gathers a shared key once. The union is made through bitmaps, one a query: every index sets its bit, then the bits of
each key are read off all of them, in the order of the keys. A chunk of tiles at a time, in bounded memory, without the host.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from skim.ops.dispatch import processors
from skim.ops.workspace import chunks

WORDS = 256  # bitmap words, of 32 keys each, that a program reads at a time
SLOTS = 2048  # indices that a program marks at a time
PROGRAMS = 3  # a processor: their bitmaps stay in the L2 cache


@triton.jit
def ones_in(x):
    """How many bits of each int32 are set."""
    x -= (x >> 1) & 0x55555555
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    return (((x + (x >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24


@triton.jit
def unite(
    INDICES, BITMAP, KEYS, BITS, COUNTS, first, rows, T, K, S, words, capacity,
    R: tl.constexpr, TILE: tl.constexpr, SLOTS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """Write the first `capacity` keys of each union, ascending, with the bits of their queries; a program takes union after union.

    Its bitmap is zero before and after. It is read past the L1 cache, which knows nothing of atomics.
    """
    one = tl.full([SLOTS], 1, tl.int32)
    bitmap = BITMAP + tl.program_id(0).to(tl.int64) * TILE * words
    tiles_of_row = tl.cdiv(T, TILE)
    for union in range(tl.program_id(0), rows, tl.num_programs(0)):
        tile, selection = first + union // R, union % R
        b = (tile // tiles_of_row).to(tl.int64)
        t = tile % tiles_of_row * TILE
        last = tl.full([SLOTS], -1, tl.int32)
        for i in range(0, tl.minimum(TILE, T - t)):
            indices = INDICES + ((b * T + t + i) * R + selection) * K
            for at in range(0, K, SLOTS):
                slot = at + tl.arange(0, SLOTS)
                key = tl.load(indices + slot, mask=slot < K, other=-1)
                real = (key >= 0) & (key < S)
                key = tl.maximum(key, 0)
                tl.atomic_or(bitmap + i * words + key // 32, one << (key % 32), mask=real, sem="relaxed")
                last = tl.maximum(last, tl.where(real, key, -1))
        tl.debug_barrier()
        end = (tl.max(last, 0) + 32) // 32
        count = 0
        out = tl.full([], capacity, tl.int64) * union
        for begin in range(0, end, WORDS):
            word = begin + tl.arange(0, WORDS)
            if count <= capacity:
                marks = ()
                for query in tl.static_range(TILE):
                    marks += (tl.load(bitmap + query * words + word, mask=word < end, other=0, cache_modifier=".cg"),)
                read = marks[0]
                for query in tl.static_range(1, TILE):
                    read |= marks[query]
                number = ones_in(read)
                slot = count + tl.cumsum(number, 0) - number
                for _ in range(0, tl.max(number, 0)):  # far fewer than 32 where a selection is a small part of the keys
                    bit = read & -read
                    bits = tl.zeros([WORDS], tl.int32)
                    for query in tl.static_range(TILE):
                        bits |= ((marks[query] & bit) != 0).to(tl.int32) << query
                    more = (bit != 0) & (slot < capacity)
                    tl.store(KEYS + out + slot, word * 32 + ones_in(bit - 1), mask=more)
                    tl.store(BITS + out + slot, bits, mask=more)
                    read ^= bit
                    slot += 1
                count += tl.sum(number, 0)
            for query in tl.static_range(TILE):
                tl.store(bitmap + query * words + word, tl.zeros([WORDS], tl.int32), mask=word < end)
        tl.store(COUNTS + union, count)
        tl.debug_barrier()


def tiles_of(T: int, tile: int) -> int:
    """How many tiles of so many queries a row of T has."""
    return -(-T // tile)


def unions(indices: Tensor, S: int, tile: int, workspace_mb: int, most: int | None = None) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """The unions of each tile's selections, a chunk of tiles at a time; the tensors of one chunk are overwritten by the next.

    Args:
        indices: int32 `[B, T, R, K]`, contiguous, any order, -1 anywhere.
        S: number of keys.
        tile: r, a power of two of at most 32: tile n of the `B * ceil(T / r)` serves r neighbouring queries of a row.
        workspace_mb: how much bitmaps and unions may hold, MiB.
        most: a union of more keys than that is of no use: it is cut short, and its count is larger than `most`.

    Yields:
        the slice of tiles; keys int32 `[tiles, R, capacity]` ascending, bits int32 alike (bit i: query i of the tile
        reads that key), counts int32 `[tiles, R]`.
    """
    B, T, R, K = indices.shape
    tiles, words, capacity = B * tiles_of(T, tile), max(1, -(-S // 32)), min(tile * K, S, tile * K if most is None else most)
    programs = min(tiles * R, PROGRAMS * processors(indices.device), max(1, (workspace_mb << 19) // (4 * tile * words)))  # half of it at most
    parts = list(chunks(tiles, 8 * R * capacity, max(1, workspace_mb - (4 * programs * tile * words >> 20))))
    widest = max((part.stop - part.start for part in parts), default=0)
    bitmap = torch.zeros(programs, tile, words, dtype=torch.int32, device=indices.device)
    keys, bits = torch.empty(2, widest, R, capacity, dtype=torch.int32, device=indices.device)
    counts = torch.empty(widest, R, dtype=torch.int32, device=indices.device)
    for part in parts:
        n = part.stop - part.start
        slots = min(SLOTS, triton.next_power_of_2(K))
        sizes = part.start, n * R, T, K, S, words, capacity
        unite[(min(programs, n * R),)](indices, bitmap, keys, bits, counts, *sizes, R, tile, slots, WORDS, num_warps=8)
        yield part, keys[:n], bits[:n], counts[:n]
