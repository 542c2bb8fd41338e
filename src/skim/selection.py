"""Selection: which keys each query reads. The only thing that passes between an indexer and an attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)  # tensors do not compare to one bool
class Selection:
    """The keys that each query reads.

    Attributes:
        indices: int32 `[B, T, R, K]`, positions in the key tensor, ascending, right-padded with -1. `R` divides the
            number of key/value heads: 1 in DSA (all heads read the same keys), G where each head group has its own.
        counts: int32 `[B, T, R]`, how many entries of each row are real.
        scores: float32 `[B, T, R, K]` index scores of the selected keys (-inf on padding), if they were asked for.
    """

    indices: Tensor
    counts: Tensor
    scores: Tensor | None = None

    @property
    def budget(self) -> int:
        """K, the width of a row."""
        return self.indices.shape[-1]

    def check(self, keys: int) -> None:
        """Raise ValueError unless every invariant of a selection over `keys` keys holds.

        Costs passes over the indices and, on an accelerator, a synchronisation: for tests and debugging.
        """
        if self.indices.dtype != torch.int32 or self.indices.dim() != 4:
            raise ValueError(f"indices: expected int32 [B, T, R, K], got {self.indices.dtype} {tuple(self.indices.shape)}")
        if self.counts.dtype != torch.int32 or self.counts.shape != self.indices.shape[:-1]:
            raise ValueError(f"counts: expected int32 {tuple(self.indices.shape[:-1])}, got {self.counts.dtype} {tuple(self.counts.shape)}")
        slot = torch.arange(self.budget, device=self.indices.device)
        real = slot < self.counts[..., None]
        if not bool((self.indices[~real] == -1).all()):
            raise ValueError("indices: expected -1 behind the first `counts` entries of each row")
        if not bool(((self.indices >= 0) & (self.indices < keys))[real].all()):
            raise ValueError(f"indices: expected positions in [0, {keys}) among the first `counts` entries of each row")
        rising = self.indices[..., 1:] > self.indices[..., :-1]
        if not bool((rising | ~real[..., 1:]).all()):
            raise ValueError("indices: expected strictly ascending rows (no key twice)")

    @classmethod
    def from_mask(cls, mask: Tensor, budget: int) -> Selection:
        """Selection of the True keys of a bool mask `[B, T, R, S]` that holds at most `budget` of them in a row."""
        return cls(*_rows_of(mask, budget))

    @classmethod
    def from_indices(cls, indices: Tensor) -> Selection:
        """Selection of integer indices `[B, T, R, K]` in any order, with -1 anywhere."""
        last = torch.iinfo(torch.int32).max
        ordered = indices.to(torch.int32).masked_fill(indices < 0, last).sort(dim=-1).values
        counts = (ordered != last).sum(-1, dtype=torch.int32)
        return cls(ordered.masked_fill(ordered == last, -1), counts)


def _rows_of(mask: Tensor, budget: int) -> tuple[Tensor, Tensor]:
    """The True positions of each row of `mask` [..., S]: ascending int32 [..., budget] with -1 behind, and their counts."""
    counts = mask.sum(-1, dtype=torch.int32)
    flat = mask.reshape(-1, mask.shape[-1])
    row, position = flat.nonzero(as_tuple=True)
    first = counts.reshape(-1).cumsum(0) - counts.reshape(-1)
    slot = torch.arange(row.shape[0], device=mask.device) - first[row]
    indices = torch.full((flat.shape[0], budget), -1, dtype=torch.int32, device=mask.device)
    indices[row, slot] = position.to(torch.int32)
    return indices.view(*mask.shape[:-1], budget), counts
