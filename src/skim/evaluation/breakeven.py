"""From which length on DSA is faster than dense attention on this machine: measured, one layer."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from skim.ops import attend, select
from skim.selection import Selection

LENGTHS = (1024, 4096, 16384, 65536)
QUERIES = 64


@dataclass(frozen=True)
class BreakEven:
    """Seconds that one query costs one layer behind so many keys, and the length of text from which DSA is faster.

    Attributes:
        lengths: numbers of keys.
        dense, sparse: seconds a query, one of each length.
        tokens: the length, by adding up the cost of all positions before it; None if not within the longest measured.
    """

    lengths: tuple[int, ...]
    dense: tuple[float, ...]
    sparse: tuple[float, ...]
    tokens: int | None


def break_even(
    heads: int, kv_heads: int, head_dim: int, index_heads: int, index_dim: int, budget: int, dtype: torch.dtype, device: torch.device
) -> BreakEven:
    """Time PyTorch's dense attention against scores, selection and attention of DSA, for the last queries of a text."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

    dense, sparse = [], []
    for S in LENGTHS:
        q, k, v = draw(1, QUERIES, heads, head_dim), draw(1, S, kv_heads, head_dim), draw(1, S, kv_heads, head_dim)
        q_index, k_index, weights = draw(1, QUERIES, index_heads, index_dim), draw(1, S, index_dim), draw(1, QUERIES, index_heads)

        def read_densely(q: torch.Tensor = q, k: torch.Tensor = k, v: torch.Tensor = v) -> None:
            # Without a mask, which would only slow it down: these last queries see nearly every key.
            torch.nn.functional.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), enable_gqa=True)

        def read_sparsely(
            q: torch.Tensor = q,
            k: torch.Tensor = k,
            v: torch.Tensor = v,
            index: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = (q_index, k_index, weights),
        ) -> None:
            selection = select(index[0], index[1], index[2], budget)
            assert isinstance(selection, Selection)
            attend(q, k, v, selection)

        dense.append(_seconds(read_densely, device) / QUERIES)
        sparse.append(_seconds(read_sparsely, device) / QUERIES)
    return BreakEven(LENGTHS, tuple(dense), tuple(sparse), _crossing(LENGTHS, dense, sparse))


def _seconds(function: Callable[[], None], device: torch.device) -> float:
    """The fastest of three runs behind one to warm up: what else a machine does only adds."""
    times = []
    for _ in range(4):
        began = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return min(times[1:])


def _crossing(lengths: Sequence[int], dense: Sequence[float], sparse: Sequence[float]) -> int | None:
    """The first length at which a text costs no more sparsely, the cost of a query linear between measured points."""
    positions = np.linspace(0, lengths[-1], 4096)
    gap = np.interp(positions, lengths, np.subtract(sparse, dense)).cumsum()
    cheaper = np.flatnonzero(gap <= 0)
    return int(positions[cheaper[0]]) if len(cheaper) else None
