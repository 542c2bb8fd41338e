"""Walks over keys: where they end with their selections, and, where they are too few to fill the card, splitting them and merging the parts."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from skim.ops.attend.kernels import LOG2E

MOST = 64  # parts of a walk
INDICES = tl.constexpr(1024)  # that a program of `last_reads` reads at a time
ENDS = 3  # what a part costs before its first and after its last block, in blocks


@triton.jit
def last_reads(READS, ENDS, width):
    """How many slots of a query's selection there are up to its last key."""
    row = tl.program_id(0).to(tl.int64)
    end = tl.zeros([INDICES], tl.int32)
    for at in range(0, width, INDICES):
        slot = at + tl.arange(0, INDICES)
        key = tl.load(READS + row * width + slot, mask=slot < width, other=-1)
        end = tl.where(key >= 0, slot + 1, end)
    tl.store(ENDS + row, tl.max(end, 0))


def ends_of(indices: Tensor) -> Tensor:
    """int32 `[rows]`: how many slots of each selection, contiguous int32 `[..., K]`, there are up to its last key."""
    ends = indices.new_empty(indices.shape[:-1].numel())
    last_reads[(ends.numel(),)](indices, ends, indices.shape[-1], num_warps=4, enable_fp_fusion=True)
    return ends


@triton.jit
def combine(
    PARTS, PART_LSE, OUT, LSE, SINK, rows, H,
    V_: tl.constexpr, V0: tl.constexpr, SPLITS: tl.constexpr, WIDE: tl.constexpr, HAS_SINK: tl.constexpr,
):  # fmt: skip
    """Merge the SPLITS partial outputs of one query and head by their lse."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, WIDE)
    c = tl.arange(0, V0)
    lse = tl.load(PART_LSE + split * rows + row, mask=split < SPLITS, other=float("-inf"))
    largest = tl.maximum(tl.max(lse, 0), -1e30)
    weight = tl.exp2((lse - largest) * LOG2E)
    total = tl.sum(weight, 0)
    parts = tl.load(PARTS + (split[:, None] * rows + row) * V_ + c[None, :], mask=(split[:, None] < SPLITS) & (c[None, :] < V_), other=0.0)
    empty = total == 0
    merged = tl.where(empty, float("-inf"), largest + tl.log2(total) / LOG2E)
    factor = tl.where(empty, 0.0, 1 / total)
    if HAS_SINK:
        sink = tl.load(SINK + row % H).to(tl.float32)
        factor = tl.where(empty, 0.0, factor / (1 + tl.exp2((sink - merged) * LOG2E)))
    tl.store(LSE + row, merged)
    tl.store(OUT + row * V_ + c, (tl.sum(parts * weight[:, None], 0) * factor).to(OUT.dtype.element_ty), mask=c < V_)


def parts_of(splits: int, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Where the parts of walks write: out and lse themselves, or float32 `[splits, ...]` of each for `merge`."""
    if splits == 1:
        return out, lse
    part, part_lse = (torch.empty(splits, *x.shape, dtype=torch.float32, device=x.device) for x in (out, lse))
    return part, part_lse


def merge(parts: Tensor, part_lse: Tensor, out: Tensor, lse: Tensor, sink: Tensor | None) -> None:
    """out `[B, T, H, V]` and lse `[B, T, H]` of partial ones, `[splits, B, T, H, ...]`."""
    (splits, *_), (H, V) = parts.shape, out.shape[2:]
    V0, wide = max(16, triton.next_power_of_2(V)), triton.next_power_of_2(splits)
    rows, warps = lse.numel(), 4 if wide * V0 <= 16384 else 8
    combine[(rows,)](parts, part_lse, out, lse, sink, rows, H, V, V0, splits, wide, sink is not None, num_warps=warps, enable_fp_fusion=True)


def best_splits(walks: int, blocks: int, programs: int, most: int) -> int:
    """Into how many parts, `most` at most, each of so many walks over `blocks` blocks of keys is split, where so many programs run at a time.

    The slowest program decides: its parts, each with its ends, and the merging of what is split.
    """

    def took(splits: int) -> int:
        return -(-walks * splits // programs) * (-(-blocks // splits) + ENDS) + (ENDS if splits > 1 else 0)

    return min(range(1, max(1, min(MOST, most, blocks)) + 1), key=took)
