"""Which keys a query may read, as an interval per query: never a `[T, S]` mask."""

from __future__ import annotations

import torch
from torch import Tensor


def visible(
    S: int,
    T: int,
    *,
    cu_seqlens: Tensor | None = None,
    lengths: Tensor | None = None,
    offset: int | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal visibility: query `t` of row `b` may read keys `start[b, t] <= s < end[b, t]`.

    Query `t` stands at position `offset + t` of the keys. Where `offset` is None the queries end where the keys end, but
    never begin before key 0: with `lengths` a right-padded prompt (`T >= lengths`) starts at key 0, and a decoding step
    stands at the last valid key. Left padding is a larger `start`: `start.clamp(min=first)`.

    Args:
        S: number of keys, tokens.
        T: number of queries, tokens.
        cu_seqlens: int `[N + 1]` cumulative lengths of N sequences packed along the keys, from 0 to S; queries read
            only their own sequence.
        lengths: int `[B]` number of valid keys of each row; keys behind them are never visible.
        offset: int, or int `[B]`: position of the first query among the keys.

    Returns:
        start, end: int32 `[B, T]` (`B = 1` unless `lengths` or `offset` has rows). A row that sees nothing has
        `start == end`.

    Raises:
        ValueError: sizes below 0, `cu_seqlens` that does not run from 0 to S, or `cu_seqlens` with `lengths`.
    """
    if S < 0 or T < 0:
        raise ValueError(f"S, T: expected sizes >= 0, got {S}, {T}")
    if cu_seqlens is not None and lengths is not None:
        raise ValueError("lengths: expected None where cu_seqlens is given, got both")
    device = next((x.device for x in (cu_seqlens, lengths, offset) if isinstance(x, Tensor)), torch.device("cpu"))
    valid = torch.full((1,), S, device=device) if lengths is None else lengths.to(torch.int64)
    if valid.dim() != 1:
        raise ValueError(f"lengths: expected [B], got {tuple(valid.shape)}")
    first = (valid - T).clamp(min=0) if offset is None else torch.as_tensor(offset, device=device).reshape(-1)
    position = first[:, None] + torch.arange(T, device=device)
    end = torch.minimum(position + 1, valid[:, None]).clamp(min=0)
    start = torch.zeros_like(end)
    if cu_seqlens is not None:
        if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2:
            raise ValueError(f"cu_seqlens: expected [N + 1] with N >= 1, got {tuple(cu_seqlens.shape)}")
        if not torch.compiler.is_compiling() and (int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != S):
            raise ValueError(f"cu_seqlens: expected to run from 0 to S = {S}, got {int(cu_seqlens[0])} to {int(cu_seqlens[-1])}")
        bounds = cu_seqlens.to(torch.int64)
        sequence = torch.searchsorted(bounds, position.contiguous(), right=True) - 1
        start = bounds[sequence.clamp(0, bounds.numel() - 2)]
    return torch.minimum(start, end).to(torch.int32), end.to(torch.int32)
