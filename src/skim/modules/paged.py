"""Latents and index keys of many sequences in pages of one pool, each sequence's found through its row of a block table.

Layouts are those of serving engines: a latent is a row of 576 channels or of 656 bytes (FlashMLA), a page of FP8 index keys
holds the values of all its tokens and then their scales (DeepGEMM; 132 bytes a token at 128 channels).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from skim.modules import latents
from skim.modules.indexer import LightningIndexer
from skim.ops import attend, codec, select
from skim.selection import Selection


class PagedLatents:
    """A pool of pages, for latents and for the index keys of the same tokens.

    Attributes:
        latents: `[P, page, C]`, or uint8 `[P, page, 656]`.
        index_keys: `[P, page, E]`, or uint8 `[P, page * (E + 4)]` where the indexer scores in FP8.

    Args:
        indexer: what makes the index keys; it says how they are held.
        pages: P, pages of the pool.
        channels: C of a latent, rotated ones included.
        page: tokens of a page.
        dtype: of latents and index keys that are not in FP8.
        latent_dtype: "bf16" holds latents in `dtype`, "fp8" in 656 bytes.
        device: of the pool.
    """

    def __init__(
        self,
        indexer: LightningIndexer,
        pages: int,
        channels: int,
        *,
        page: int = 64,
        dtype: torch.dtype = torch.bfloat16,
        latent_dtype: str = "bf16",
        device: torch.device | str | None = None,
    ) -> None:
        self.indexer, self.page, self.dtype, self.channels = indexer, page, dtype, channels
        self.fp8 = latent_dtype == "fp8"
        row = (latents.ROW, torch.uint8) if self.fp8 else (channels, dtype)
        self.latents = torch.zeros(pages, page, row[0], dtype=row[1], device=device)
        E = indexer.head_dim
        if indexer.score_dtype == "fp8":
            self.index_keys = torch.zeros(pages, page * (E + codec.SCALE_BYTES), dtype=torch.uint8, device=device)
        else:
            self.index_keys = torch.zeros(pages, page, E, dtype=dtype, device=device)

    def write(self, blocks: Tensor, first: int, new: Tensor, index_keys: Tensor) -> None:
        """Write latents `[B, T, C]` and index keys `[B, T, E]` of the tokens from `first` on, into the pages that `blocks` `[B, N]` names."""
        B, T, _ = new.shape
        position = torch.arange(first, first + T, device=new.device).expand(B, T)
        block, place = blocks.long().gather(1, position // self.page), position % self.page
        self.latents[block, place] = latents.pack(new, self.indexer.scale_format) if self.fp8 else new.to(self.dtype)
        held = self.indexer.cached(index_keys)
        if held.dtype != torch.uint8:
            self.index_keys[block, place] = held.to(self.dtype)
            return
        E = self.indexer.head_dim
        values, scales = self.index_keys.split((self.page * E, self.page * codec.SCALE_BYTES), dim=-1)
        values.unflatten(-1, (self.page, E))[block, place] = held[..., :E]
        scales.unflatten(-1, (self.page, codec.SCALE_BYTES))[block, place] = held[..., E:]

    def select(self, blocks: Tensor, q: Tensor, weights: Tensor, budget: int, *, start: Tensor, end: Tensor, **options: Any) -> Selection:
        """`skim.select` over the index keys of `blocks` `[B, N]`, which are read where they lie."""
        queries = self.indexer.quantised(q) if self.indexer.score_dtype == "fp8" else q
        selection = select(queries, self.index_keys, weights, budget, start=start, end=end, block_table=blocks.int(), **options)
        assert isinstance(selection, Selection)
        return selection

    def attend(self, blocks: Tensor, q: Tensor, selection: Selection, *, scale: float, v_channels: int) -> tuple[Tensor, Tensor]:
        """`skim.attend` over the latents of `blocks` `[B, N]`, which are read where they lie.

        Args:
            q: `[B, T, H, C]` absorbed queries.
            selection: positions in the sequences, R = 1.
        """
        pool = self.latents.flatten(0, 1).expand(q.shape[0], -1, -1)
        return attend(q, pool[:, :, None], selection=self._slots(blocks, selection), scale=scale, v_channels=v_channels)

    def _slots(self, blocks: Tensor, selection: Selection) -> Selection:
        """A selection of positions as one of slots in the pool."""
        indices = selection.indices
        position = indices.clamp(min=0).flatten(1).long()
        slot = blocks.long().gather(1, position // self.page) * self.page + position % self.page
        return Selection.from_indices(torch.where(indices < 0, -1, slot.view_as(indices)))
