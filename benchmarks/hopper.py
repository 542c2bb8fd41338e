"""Times Skim's operators on an H100 beside what hand-written CUDA reached there, and variants of the attention kernel.

    python benchmarks/hopper.py --json benchmarks/results/h100-hopper.json
    python benchmarks/hopper.py --only H1 H2 variants

Nothing is timed before it was compared with another implementation; relative errors are printed. The peers' rates are
those of an H100 whose bf16 8192^3 product ran at 716 TFLOPS, scaled by the rate of the same product in this run. What
each variant should gain, and what it did, is in benchmarks/log.md. Results are written after each part.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, fence_async_shared, mbarrier, warpgroup_mma, warpgroup_mma_wait

import skim
from skim.bench.measure import measure
from skim.bench.runner import machine
from skim.bench.selections import selection
from skim.ops.codec import quantise
from skim.ops.dispatch import processors

shipped = import_module("skim.ops.attend.hopper")
copy, _row = shipped.copy, shipped._row
LOG2E, ROWS, KEYS, STAGES, VALUES, ROPE, HALF, GROUP = (
    getattr(shipped, name) for name in ("LOG2E", "ROWS", "KEYS", "STAGES", "VALUES", "ROPE", "HALF", "GROUP")
)
SUMS, SCORES, COPY, LINES, TILES = (getattr(shipped, name) for name in ("SUMS", "SCORES", "COPY", "LINES", "TILES"))
# As SUMS, but a thread holds 8 neighbouring channels of a row instead of 2: what it stores is 16 bytes.
WIDE = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 4], [8, 0], [0, 32], [0, 64], [0, 128]], [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [64, 256]
    )
)
GROWTH = gl.constexpr(8.0)  # of a row's largest score, in powers of two, that its sums bear before they are rescaled


@dataclass(frozen=True)
class Variant:
    """Switches of the kernel below; with all off it is the shipped one."""

    persistent: bool = False  # a program a processor; the next queries are loaded under the last products of the ones before
    early: bool = False  # the factors of rescaling are handed over before the probabilities are made
    lazy: bool = False  # sums are rescaled only where a row's largest score has grown by more than GROWTH
    halves: bool = False  # left and right half of a block of keys become ready and free on their own
    over: bool = False  # probabilities lie over the block's rotated channels, which nobody needs any more, instead of in one buffer
    lag: bool = False  # the right half is summed under the softmax of the next block; needs `over`
    one_copy: bool = False  # a copy of 256 channels instead of 4 of 64, so without barriers between them
    wide: bool = False  # outputs change hands between four threads and are stored 16 bytes at a time


VARIANTS = {
    "base": Variant(),
    "persistent": Variant(persistent=True),
    "early": Variant(early=True),
    "lazy": Variant(lazy=True),
    "halves": Variant(halves=True),
    "one copy": Variant(one_copy=True),
    "over": Variant(over=True),
    "over, wide": Variant(over=True, wide=True),  # the change of hands takes 4 KiB, which are there only without a buffer of probabilities
    "lag": Variant(lag=True, over=True, halves=True),
    "persistent, over, one copy": Variant(persistent=True, over=True, one_copy=True),
    "persistent, over, one copy, wide": Variant(persistent=True, over=True, one_copy=True, wide=True),
    "persistent, over, one copy, wide, early": Variant(persistent=True, over=True, one_copy=True, wide=True, early=True),
    "persistent, over, one copy, wide, early, halves": Variant(persistent=True, over=True, one_copy=True, wide=True, early=True, halves=True),
    "persistent, over, one copy, wide, lag": Variant(persistent=True, over=True, one_copy=True, wide=True, lag=True, halves=True),
    "persistent, over, one copy, wide, lag, lazy": Variant(True, False, True, True, True, True, True, True),
}


@gluon.jit
def _copies(into, source, FIRST: gl.constexpr, real, V: gl.constexpr):
    """Copy the channels FIRST to FIRST + HALF of the rows at `source` `[KEYS, 1]`."""
    if V.one_copy:
        channel = gl.expand_dims(gl.arange(0, HALF, gl.SliceLayout(0, COPY)), 0)
        copy(into.slice(FIRST, HALF, dim=1), source + FIRST + channel, mask=real)
    else:
        channel = gl.expand_dims(gl.arange(0, GROUP, gl.SliceLayout(0, COPY)), 0)
        for group in gl.static_range(HALF // GROUP):
            copy(into.slice(FIRST + group * GROUP, GROUP, dim=1), source + (FIRST + group * GROUP) + channel, mask=real)


@gluon.jit
def _gather(K_, k_s, S, READS, width, tiles, BLOCKS, keys, rope, readers, ready, ready_right, free, free_right, DR: gl.constexpr, V: gl.constexpr):
    slot = gl.arange(0, KEYS, gl.SliceLayout(1, COPY))
    done = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        reads = READS + (tile // BLOCKS).to(gl.int64) * width
        for at in range(0, width, KEYS):
            stage, phase = done % STAGES, (done // STAGES & 1) ^ 1
            key = gl.load(reads + at + slot, mask=at + slot < width, other=-1)
            real = (key >= 0) & (key < S)
            source = K_ + gl.expand_dims(gl.where(real, key, 0).to(gl.int64) * k_s, 1)
            bits = real.to(gl.int32)
            real = gl.expand_dims(real, 1)
            into = keys.index(stage)
            mbarrier.wait(free.index(stage), phase)
            _copies(into, source, 0, real, V)
            readers.index(stage).store(bits)
            if V.halves:
                async_copy.mbarrier_arrive(ready.index(stage), increment_count=False)
                mbarrier.arrive(ready.index(stage), count=1)
                mbarrier.wait(free_right.index(stage), phase)
            _copies(into, source, HALF, real, V)
            if DR > 0:
                channel = gl.expand_dims(gl.arange(0, GROUP, gl.SliceLayout(0, COPY)), 0)
                copy(rope.index(stage), source + VALUES + channel, mask=real)
            if V.halves:
                async_copy.mbarrier_arrive(ready_right.index(stage), increment_count=False)
            else:
                async_copy.mbarrier_arrive(ready.index(stage), increment_count=False)
                mbarrier.arrive(ready.index(stage), count=1)
            done += 1


@gluon.jit
def _scores(
    OUT, LSE, scale, width, tiles, q, q_rope, keys, rope, readers, p, rescale, factors,
    queries, ready, ready_right, free, factors_ready, p_ready, p_free, scored, finished, DR: gl.constexpr, V: gl.constexpr,
):  # fmt: skip
    of_scores: gl.constexpr = gl.SliceLayout(1, SCORES)
    of_sums: gl.constexpr = gl.SliceLayout(1, SUMS)
    done, number = 0, 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        largest = gl.full([ROWS], -1e30, gl.float32, of_scores)
        total = gl.zeros([ROWS], gl.float32, of_scores)
        acc = gl.zeros([ROWS, HALF], gl.float32, SUMS)
        mbarrier.wait(queries, number & 1)
        for _ in range(0, width, KEYS):
            stage, phase = done % STAGES, done // STAGES & 1
            mbarrier.wait(ready.index(stage), phase)
            fence_async_shared()
            k = keys.index(stage)
            s = gl.zeros([ROWS, KEYS], gl.float32, SCORES)
            if V.halves:
                s = warpgroup_mma(q.slice(0, HALF, dim=1), k.slice(0, HALF, dim=1).permute((1, 0)), s, use_acc=False, is_async=True)
                mbarrier.wait(ready_right.index(stage), phase)
                fence_async_shared()
                s = warpgroup_mma(q.slice(HALF, HALF, dim=1), k.slice(HALF, HALF, dim=1).permute((1, 0)), s, is_async=True)
            else:
                s = warpgroup_mma(q, k.permute((1, 0)), s, use_acc=False, is_async=True)
            if DR > 0:
                s = warpgroup_mma(q_rope, rope.index(stage).permute((1, 0)), s, is_async=True)
            s = warpgroup_mma_wait(0, deps=[s])
            if V.lag:
                mbarrier.arrive(scored.index((done + number) % 2), count=1)
            bits = gl.expand_dims(readers.index(stage).load(gl.SliceLayout(0, SCORES)), 0)
            s = gl.where(bits != 0, s * scale, float("-inf"))
            larger = gl.maximum(largest, gl.max(s, 1))
            if V.lazy:
                larger = gl.where(larger > largest + GROWTH, larger, largest)
            alpha = gl.exp2(largest - larger)
            largest = larger
            if V.early:
                if not V.over:
                    mbarrier.wait(p_free, done & 1 ^ 1)
                rescale.index(stage).store(alpha)
                mbarrier.arrive(factors_ready.index(stage), count=1)
            weight = gl.exp2(s - gl.expand_dims(largest, 1))
            total = total * alpha + gl.sum(weight, 1)
            weight = weight.to(keys.dtype)
            if not V.early:
                if not V.over:
                    mbarrier.wait(p_free, done & 1 ^ 1)
                rescale.index(stage).store(alpha)
            if V.over:
                rope.index(stage).store(weight)
            else:
                p.store(weight)
            fence_async_shared()
            mbarrier.arrive(p_ready.index(stage), count=1)
            if V.lazy:
                if gl.min(alpha, 0) < 1:
                    acc = acc * gl.expand_dims(gl.convert_layout(alpha, of_sums), 1)
            else:
                acc = acc * gl.expand_dims(gl.convert_layout(alpha, of_sums), 1)
            left = gl.convert_layout(weight, gl.DotOperandLayout(0, SUMS, 2))
            acc = warpgroup_mma(left, k.slice(0, HALF, dim=1), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(free.index(stage), count=1)
            done += 1
        if V.lag:
            mbarrier.arrive(scored.index((done + number) % 2), count=1)  # nothing is scored beside the last block's right half
        empty = total == 0
        lse = gl.where(empty, float("-inf"), (largest + gl.log2(total)) / LOG2E)
        factor = gl.where(empty, 0.0, 1 / total)
        factors.store(factor)
        mbarrier.arrive(finished, count=1)
        row = tile.to(gl.int64) * ROWS
        gl.store(LSE + row + gl.arange(0, ROWS, of_scores), lse)
        _store_half(OUT + row * VALUES, acc, gl.convert_layout(factor, of_sums), V)
        number += 1  # noqa: SIM113  kernels have no enumerate


@gluon.jit
def _load_queries(Q, tile, q, q_rope, queries, DR: gl.constexpr):
    row = tile.to(gl.int64) * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, COPY))
    source = Q + gl.expand_dims(row * (VALUES + DR), 1) + gl.expand_dims(gl.arange(0, GROUP, gl.SliceLayout(0, COPY)), 0)
    for group in gl.static_range(VALUES // GROUP):
        copy(q.slice(group * GROUP, GROUP, dim=1), source + group * GROUP)
    if DR > 0:
        copy(q_rope, source + VALUES)
    async_copy.mbarrier_arrive(queries, increment_count=False)


@gluon.jit
def _right_half(
    Q, OUT, width, tiles, q, q_rope, keys, rope, p, rescale, factors, queries, free, factors_ready, p_ready, p_free, scored, finished,
    DR: gl.constexpr, V: gl.constexpr,
):  # fmt: skip
    of_sums: gl.constexpr = gl.SliceLayout(1, SUMS)
    done, number = 0, 0
    _load_queries(Q, gl.program_id(0), q, q_rope, queries, DR)
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        acc = gl.zeros([ROWS, HALF], gl.float32, SUMS)
        for _ in range(0, width, KEYS):
            stage, phase = done % STAGES, done // STAGES & 1
            if V.early:
                mbarrier.wait(factors_ready.index(stage), phase)
            else:
                mbarrier.wait(p_ready.index(stage), phase)
            alpha = rescale.index(stage).load(of_sums)
            if V.lazy:
                if gl.min(alpha, 0) < 1:
                    acc = acc * gl.expand_dims(alpha, 1)
            else:
                acc = acc * gl.expand_dims(alpha, 1)
            if V.early:
                mbarrier.wait(p_ready.index(stage), phase)
            if V.lag:
                after = done + number + 1  # the next block: a tile ends with one more
                mbarrier.wait(scored.index(after % 2), after // 2 & 1)
            fence_async_shared()
            right = keys.index(stage).slice(HALF, HALF, dim=1)
            if V.over:
                acc = warpgroup_mma(rope.index(stage), right, acc, is_async=True)
            else:
                acc = warpgroup_mma(p, right, acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[acc])
            if not V.over:
                mbarrier.arrive(p_free, count=1)
            mbarrier.arrive(free.index(stage), count=1)
            done += 1
        mbarrier.wait(finished, number & 1)
        factor = factors.load(of_sums)
        if tile + gl.num_programs(0) < tiles:
            _load_queries(Q, tile + gl.num_programs(0), q, q_rope, queries, DR)
        _store_half(OUT + tile.to(gl.int64) * ROWS * VALUES + HALF, acc, factor, V)
        number += 1  # noqa: SIM113  kernels have no enumerate


@gluon.jit
def _store_half(OUT, acc, factor, V: gl.constexpr):
    layout: gl.constexpr = WIDE if V.wide else SUMS
    row, channel = gl.arange(0, ROWS, gl.SliceLayout(1, layout)), gl.arange(0, HALF, gl.SliceLayout(0, layout))
    out = (acc * gl.expand_dims(factor, 1)).to(OUT.dtype.element_ty)
    gl.store(OUT + gl.expand_dims(row * VALUES, 1) + gl.expand_dims(channel, 0), gl.convert_layout(out, layout))


@gluon.jit
def forward(Q, K_, OUT, LSE, READS, scale, S, width, tiles, k_s, DR: gl.constexpr, BLOCKS: gl.constexpr, V: gl.constexpr):
    """As the shipped kernel, for whole blocks of 64 heads and contiguous tensors; program n serves the tiles n, n + programs, ..."""
    dtype: gl.constexpr = Q.dtype.element_ty
    q = gl.allocate_shared_memory(dtype, [ROWS, VALUES], TILES)
    keys = gl.allocate_shared_memory(dtype, [STAGES, KEYS, VALUES], TILES)
    q_rope, rope = q, keys
    if DR > 0:
        q_rope = gl.allocate_shared_memory(dtype, [ROWS, DR], TILES)
        rope = gl.allocate_shared_memory(dtype, [STAGES, KEYS, DR], TILES)
    p = q
    if not V.over:
        p = gl.allocate_shared_memory(dtype, [ROWS, KEYS], TILES)
    readers = gl.allocate_shared_memory(gl.int32, [STAGES, KEYS], LINES)
    rescale = gl.allocate_shared_memory(gl.float32, [STAGES, ROWS], LINES)
    factors = gl.allocate_shared_memory(gl.float32, [ROWS], LINES)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    ready_right = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free_right = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    factors_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    p_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    queries = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    p_free = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    scored = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    finished = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=129)
        mbarrier.init(ready_right.index(stage), count=128)
        mbarrier.init(free.index(stage), count=1 if V.halves else 2)
        mbarrier.init(free_right.index(stage), count=1)
        mbarrier.init(factors_ready.index(stage), count=1)
        mbarrier.init(p_ready.index(stage), count=1)
        mbarrier.init(scored.index(stage), count=1)
    mbarrier.init(queries, count=128)
    mbarrier.init(p_free, count=1)
    mbarrier.init(finished, count=1)
    right = free
    if V.halves:
        right = free_right
    gl.warp_specialize(
        [
            (_scores, (
                OUT, LSE, scale, width, tiles, q, q_rope, keys, rope, readers, p, rescale, factors,
                queries, ready, ready_right, free, factors_ready, p_ready, p_free, scored, finished, DR, V,
            )),
            (_right_half, (
                Q, OUT, width, tiles, q, q_rope, keys, rope, p, rescale, factors,
                queries, right, factors_ready, p_ready, p_free, scored, finished, DR, V,
            )),
            (_gather, (K_, k_s, S, READS, width, tiles, BLOCKS, keys, rope, readers, ready, ready_right, free, right, DR, V)),
        ],
        [4, 4],
        [168, 80],
    )  # fmt: skip


MATMUL = 716e12  # operations a second where the peers were measured
T, K, D, V = 4096, 2048, 576, 512
NEAR, MIDDLE, FAR = 8192, 32768, 131072
PEERS = {  # the best of each: operations a second, or seconds
    "H1": {NEAR: 597e12, MIDDLE: 546e12, FAR: 491e12},
    "H2": {NEAR: 591e12, MIDDLE: 531e12, FAR: 392e12},
    "H3": {16: 148e12, 32: 295e12},
    "H6": {NEAR: 1003e12, MIDDLE: 1003e12, FAR: 992e12},
    "H7": {MIDDLE: 0.407e-3, FAR: 1.56e-3},
    "H8": {FAR: 10.3e-3},
    "H9": {NEAR: 30.2e-3},
}
DEVICE = torch.device("cuda")
SCALE = D**-0.5


def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, device=DEVICE, dtype=dtype)


def random_rows(rows: int, keys: int, budget: int) -> Tensor:
    """int32 `[rows, budget]`: different keys in a random order."""
    return torch.rand(rows, keys, device=DEVICE).topk(budget).indices.to(torch.int32)


def causal_rows(rows: int, budget: int) -> Tensor:
    """int32 `[rows, budget]`: as many random keys of those up to its own as a row may have, -1 behind."""
    position = torch.arange(rows, device=DEVICE)
    value, index = torch.rand(rows, rows, device=DEVICE).masked_fill_(position > position[:, None], -1.0).topk(budget)
    return index.to(torch.int32).masked_fill(value < 0, -1)


def error(found: Tensor, wanted: Tensor) -> float:
    finite = wanted.isfinite()
    if not torch.equal(found.isfinite(), finite):
        return math.inf
    return float((found[finite].double() - wanted[finite]).norm() / wanted[finite].norm())


def latents(heads: int, keys: int, channels: int, queries: int = T) -> tuple[Tensor, Tensor]:
    return draw(1, queries, heads, channels), draw(1, keys, 1, channels)


def run_variant(variant: Variant, q: Tensor, k: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    _, queries, heads, channels = q.shape
    out, lse = q.new_empty(1, queries, heads, V), q.new_empty(1, queries, heads, dtype=torch.float32)
    tiles = queries * heads // ROWS.value
    programs = min(processors(q.device), tiles) if variant.persistent else tiles
    sizes = SCALE * LOG2E.value, k.shape[1], indices.shape[-1], tiles, k.stride(1)
    forward[(programs,)](q, k, out, lse, indices, *sizes, channels - V, heads // ROWS.value, variant, num_warps=4, enable_fp_fusion=True)
    return out, lse


def run_shipped(q: Tensor, k: Tensor, indices: Tensor, sink: Tensor | None = None, impl: str = "hopper") -> tuple[Tensor, Tensor]:
    return skim.attend(q, k, indices=indices[None, :, None], v_channels=V, scale=SCALE, sink=sink, impl=impl)


def checked(name: str, run: Callable[..., tuple[Tensor, Tensor]], heads: int, channels: int, sink: Tensor | None = None) -> None:
    """Compare with the reference in float64: -1 anywhere, empty rows, NaN in keys that nobody reads; three times, bitwise the same."""
    queries, keys, budget = 320, 3000, 500
    q, k = latents(heads, keys + 100, channels, queries)
    k[:, keys:] = math.nan
    indices = random_rows(queries, keys, budget)
    indices[torch.rand(indices.shape, device=DEVICE) < 0.2] = -1
    indices[::5] = -1
    more = () if sink is None else (sink,)
    found = [run(q, k, indices, *more) for _ in range(3)]
    clean = k.nan_to_num(0.0).double()
    wanted = run_shipped(q.double(), clean, indices, None if sink is None else sink.double(), impl="reference")
    errors = [error(x, y) for x, y in zip(found[0], wanted)]
    same = all(torch.equal(x, y) for again in found[1:] for x, y in zip(found[0], again))
    print(f"  {name}, {heads} heads, {channels} channels: out {errors[0]:.1e}, lse {errors[1]:.1e}{'' if same else ', NOT REPEATABLE'}", flush=True)
    if not same or errors[0] > 4e-3 or errors[1] > 1e-5:
        raise ValueError(f"{name}: expected the reference's results within 4e-3 and 1e-5, got {errors}")


def matmul_rate() -> float:
    """Operations a second of a bf16 8192^3 product."""
    pairs = [(draw(8192, 8192), draw(8192, 8192)) for _ in range(3)]
    return 2 * 8192**3 / measure(lambda x: x[0] @ x[1], pairs, DEVICE, seconds=0.3).ms * 1e3


def row(id_: str, case: str, run: Callable[[Any], Any], inputs: Sequence[Any], flops: float | None, peer: float | None) -> dict[str, Any]:
    """A timed row. peer: operations a second where flops are given, else seconds."""
    ms = measure(run, inputs, DEVICE, seconds=0.25).ms
    return {"id": id_, "case": case, "ms": ms, "tflops": flops and flops / ms / 1e9, "peer": peer, "flops": flops}


def attention_flops(heads: int, pairs: float = T * K) -> float:
    return 2 * pairs * heads * (D + V)


def prefill(id_: str, heads: int) -> Iterator[dict[str, Any]]:
    checked("shipped", run_shipped, heads, D, draw(heads, dtype=torch.float32))
    checked("shipped", run_shipped, heads, V)
    for keys in (NEAR, MIDDLE, FAR):
        q, k = latents(heads, keys, D)
        rows = [random_rows(T, keys, K) for _ in range(4)]
        for order, sets in (("random", rows), ("ascending", [x.sort(-1).values for x in rows])):
            yield row(id_, f"{order} {keys >> 10}k", lambda x: run_shipped(q, k, x), sets, attention_flops(heads), PEERS[id_][keys])  # noqa: B023


def few_heads() -> Iterator[dict[str, Any]]:
    for heads in (16, 32):
        checked("shipped", run_shipped, heads, D, draw(heads, dtype=torch.float32))
        q, k = latents(heads, NEAR, D)
        for kind in ("random", "overlapping"):
            if kind == "random":
                sets = [random_rows(T, NEAR, K) for _ in range(3)]
            else:
                sets = [selection(kind, T, NEAR, K, device=DEVICE, seed=seed).indices[0, :, 0].contiguous() for seed in range(3)]
            for impl in ("hopper", "triton"):
                run = lambda x: run_shipped(q, k, x, impl=impl)  # noqa: B023, E731
                yield row("H3", f"{heads} heads, {kind}, {impl}", run, sets, attention_flops(heads), PEERS["H3"][heads])


def index_tensors(queries: int, keys: int) -> tuple[Any, Any, Tensor]:
    return quantise(draw(1, queries, 64, 128)), quantise(draw(1, keys, 128)), draw(1, queries, 64, dtype=torch.float32)


def scores() -> Iterator[dict[str, Any]]:
    small = index_tensors(40, 3000)
    found, wanted = (skim.ops.index_scores(*small, impl=impl) for impl in ("auto", "reference"))
    print(f"  index scores: {error(found, wanted.double()):.1e}", flush=True)
    for keys in (NEAR, MIDDLE, FAR):
        inputs = [index_tensors(T, keys) for _ in range(3)]
        flops = 2.0 * T * (keys - (T - 1) / 2) * 64 * 128
        yield row("H6", f"{keys >> 10}k", lambda x: skim.ops.index_scores(*x), inputs, flops, PEERS["H6"][keys])


def top_k() -> Iterator[dict[str, Any]]:
    select = import_module("skim.ops.select.triton")
    for keys in (MIDDLE, FAR):
        inputs = [draw(T, keys, dtype=torch.float32) for _ in range(2)]
        interval = torch.zeros(T, dtype=torch.int32, device=DEVICE), torch.full((T,), keys, dtype=torch.int32, device=DEVICE)
        found = select.top_k(inputs[0], *interval, K)[0]
        same = torch.equal(found[:64].long(), inputs[0][:64].topk(K).indices.sort(-1).values)
        print(f"  top-k of {keys >> 10}k: {'the same keys as' if same else 'OTHER KEYS than'} torch.topk", flush=True)
        yield row("H7", f"{keys >> 10}k", lambda x: select.top_k(x, *interval, K), inputs, None, PEERS["H7"][keys])  # noqa: B023


def selecting() -> Iterator[dict[str, Any]]:
    inputs = [index_tensors(T, FAR) for _ in range(2)]
    run = lambda x: skim.select(*x, K)  # noqa: E731
    yield row("H8", "128k", run, inputs, None, PEERS["H8"][FAR])


def training() -> Iterator[dict[str, Any]]:
    q, k = latents(128, NEAR, D)
    sets = []
    for _ in range(3):
        leaves = q.clone().requires_grad_(), k.clone().requires_grad_()
        out, lse = skim.attend(*leaves, indices=causal_rows(T, K)[None, :, None], v_channels=V, scale=SCALE)
        sets.append((out, leaves, torch.randn_like(out)))
    pairs = sum(min(t + 1, K) for t in range(T))
    flops = 2.0 * pairs * 128 * (3 * D + 2 * V)
    result = row("H9", "8k", lambda x: torch.autograd.grad(x[0], x[1], x[2], retain_graph=True), sets, None, PEERS["H9"][NEAR])
    yield {**result, "tflops": flops / result["ms"] / 1e9}


def variants() -> Iterator[dict[str, Any]]:
    for name, variant in VARIANTS.items():
        checked(name, lambda *x: run_variant(variant, *x), 128, D)  # noqa: B023
    for heads, keys in ((128, NEAR), (128, FAR), (64, MIDDLE)):
        q, k = latents(heads, keys, D)
        sets = [random_rows(T, keys, K) for _ in range(4)]
        peer = PEERS["H1" if heads == 128 else "H2"][keys]
        case = f"{heads} heads, {keys >> 10}k"
        yield row("variants", f"{case}: shipped", lambda x: run_shipped(q, k, x), sets, attention_flops(heads), peer)  # noqa: B023
        for name, variant in VARIANTS.items():
            yield row("variants", f"{case}: {name}", lambda x: run_variant(variant, q, k, x), sets, attention_flops(heads), peer)  # noqa: B023


PARTS: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
    "H1": lambda: prefill("H1", 128),
    "H2": lambda: prefill("H2", 64),
    "H3": few_heads,
    "H6": scores,
    "H7": top_k,
    "H8": selecting,
    "H9": training,
    "variants": variants,
}


def shown(found: dict[str, Any], rate: float) -> str:
    rated = f"{found['tflops']:.0f} TFLOPS, " if found["tflops"] else ""
    return f"{found['id']} {found['case']}: {found['ms']:.3f} ms, {rated}{found['ratio']:.3f} of the peer's rate at {rate / 1e12:.0f} TFLOPS"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write results here")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    args = parser.parse_args()
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        sys.exit("expected an NVIDIA GPU of sm_90")
    torch.manual_seed(0)
    result: dict[str, Any] = {**machine(DEVICE), "peers": "one H100, bf16 8192^3 at 716 TFLOPS", "parts": {}}
    for part in args.only:
        rate = matmul_rate()
        rows = []
        for found in PARTS[part]():
            slower = MATMUL / rate  # than where the peers were measured
            peer = found.pop("peer")
            flops = found.pop("flops")
            found["ratio"] = found["tflops"] * 1e12 / (peer / slower) if flops else peer * slower / (found["ms"] / 1e3)
            rows.append(found)
            print(shown(found, rate), flush=True)
        result["parts"][part] = {"matmul_tflops": [rate / 1e12, matmul_rate() / 1e12], "rows": rows}
        if args.json:
            write(args.json, result)
        torch.cuda.empty_cache()


def write(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(result, indent=1) + "\n")
    part.replace(path)


if __name__ == "__main__":
    main()
