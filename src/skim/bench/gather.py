"""How fast a GPU reads rows by their numbers: the roof of attention that gathers its keys. Needs Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

WIDTH = 512  # bf16 channels: rows of 1 KiB
ROWS = 2048  # that a program reads
BLOCK = 16


def gather(x: Tensor, indices: Tensor) -> Tensor:
    """Sum of the rows of x `[S, 512]` that each row of indices int32 `[P, 2048]` names: `[P, 512]` in float32."""
    out = torch.empty(indices.shape[0], WIDTH, dtype=torch.float32, device=x.device)
    _sum_rows[(indices.shape[0],)](x, indices, out, WIDTH=WIDTH, ROWS=ROWS, BLOCK=BLOCK)
    return out


@triton.jit
def _sum_rows(x_ptr, indices_ptr, out_ptr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    program = tl.program_id(0)
    channel = tl.arange(0, WIDTH)
    total = tl.zeros((BLOCK, WIDTH), dtype=tl.float32)
    for first in range(0, ROWS, BLOCK):
        row = tl.load(indices_ptr + program * ROWS + first + tl.arange(0, BLOCK)).to(tl.int64)
        total += tl.load(x_ptr + row[:, None] * WIDTH + channel[None, :]).to(tl.float32)
    tl.store(out_ptr + program * WIDTH + channel, tl.sum(total, 0))
