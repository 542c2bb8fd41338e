"""Index keys in pages of a pool: a block table puts those of each sequence in order."""

from typing import Optional

import torch
from torch import Tensor

from skim.ops.checks import expect_device, expect_shape, expect_tensor


def expect_block_table(block_table: Optional[Tensor], B: int, k: Tensor, end: Optional[Tensor]) -> Optional[Tensor]:
    """int32 `[B, N]` of pages of k `[P, page, E]`; what names none, where no query may see, becomes one that can be read."""
    if block_table is None:
        return None
    expect_shape("block_table", expect_tensor("block_table", block_table, "BN"), (B, block_table.shape[-1]), "BN")
    if block_table.dtype != torch.int32:
        raise TypeError(f"block_table: expected int32, got {block_table.dtype}")
    expect_device("block_table", block_table, k.device)
    if k.shape[0] == 0:
        raise ValueError("k_index: expected one page or more with block_table, got none")
    if end is None:
        raise ValueError("start, end: expected both with block_table (a sequence may end inside its last page), got none")
    return block_table.clamp(0, k.shape[0] - 1).contiguous()


def length(k: Tensor, block_table: Optional[Tensor]) -> int:
    """S of keys `[B, S, E]`, or of pages `[P, page, E]` of which a sequence has N."""
    return k.shape[1] if block_table is None else k.shape[1] * block_table.shape[1]


def in_one_piece(k: Tensor, k_scale: Optional[Tensor], block_table: Optional[Tensor]) -> tuple[Tensor, Optional[Tensor]]:
    """Keys `[B, S, E]` and their scales `[B, S]`, copied together if they lie in pages."""
    if block_table is None:
        return k, k_scale
    table = block_table.long()
    return k[table].flatten(1, 2), None if k_scale is None else k_scale[table].flatten(1, 2)
