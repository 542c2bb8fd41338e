"""What DSA is compared with: selectors that choose keys by a rule, at the same budget, in the same model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from skim.huggingface.state import LayerInputs, Selector
from skim.ops.attend.reference import by_key_head, dense_bytes, dense_keys
from skim.ops.dispatch import run
from skim.ops.score.reference import bounds, visible_mask
from skim.ops.workspace import chunks, workspace
from skim.selection import Selection

SINKS = 4
BLOCK = 64


def head_mean(inputs: LayerInputs, b: int, rows: slice, start: Tensor, end: Tensor) -> Tensor:
    """The model's own attention of some queries of row b, averaged over the heads: `[n, S]` float32."""
    S = inputs.k.shape[1]
    low, high = bounds(start[b, rows], end[b, rows], S)
    if low == high:
        return inputs.q.new_zeros(start[b, rows].shape[0], S, dtype=torch.float32)
    mask = visible_mask(start[b, rows], end[b, rows], low, high)
    p = _mean_softmax(inputs.q[b, rows], dense_keys(inputs.k[b], low, high), mask, inputs.scale)
    return torch.nn.functional.pad(p, (low, S - high))


def _mean_softmax(q: Tensor, keys: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Head mean of the softmax of q `[n, H, D]` over keys `[G, s, D]` under mask `[n, s]`: `[n, s]`, 0 in empty rows."""
    G, n = keys.shape[0], q.shape[0]
    scores = ((by_key_head(q, G) * scale) @ keys.transpose(1, 2)).view(G, n, -1, keys.shape[1])
    return scores.masked_fill_(~mask[None, :, None], -torch.inf).softmax(-1).mean((0, 2)).masked_fill_(~mask, 0.0)


def row_chunks(inputs: LayerInputs, T: int) -> list[tuple[int, slice]]:
    """(row of the batch, slice of its T queries) whose attention over all keys fits the workspace."""
    need = dense_bytes(inputs.q, inputs.k.shape[1])
    mb = workspace(inputs.config.workspace_mb, inputs.q.device)
    return [(b, rows) for b in range(inputs.q.shape[0]) for rows in chunks(T, need, mb)]


def _ranked(score: Callable[[LayerInputs, int, slice, Tensor, Tensor], Tensor], budget: int) -> Callable[[LayerInputs, Tensor, Tensor], Selection]:
    """The selector that keeps the `budget` best of `score`'s `[n, S]`, ties to the most recent."""

    def select(inputs: LayerInputs, start: Tensor, end: Tensor) -> Selection:
        parts = []
        for b, rows in row_chunks(inputs, start.shape[1]):
            scores, mb = score(inputs, b, rows, start, end), workspace(inputs.config.workspace_mb, start.device)
            visible = start[b, rows].contiguous(), end[b, rows].contiguous()
            parts.append(run("select", "top_k", "auto", start.device, scores.contiguous(), *visible, budget, mb))
        shape = (*start.shape, 1)
        indices, counts = (torch.cat(of) for of in zip(*parts))
        return Selection(indices.view(*shape, budget), counts.view(shape))

    return select


def window(budget: int) -> Selector:
    """The most recent `budget` tokens."""
    return sinks(budget, 0)


def sinks(budget: int, first: int = SINKS) -> Selector:
    """The first few tokens and the most recent ones (StreamingLLM, arXiv 2309.17453)."""

    def select(inputs: LayerInputs, start: Tensor, end: Tensor) -> Selection:
        slot = torch.arange(budget, dtype=torch.int32, device=start.device)
        size = (end - start).clamp(max=budget)[..., None]
        recent = torch.maximum(end[..., None] - budget + slot, start[..., None] + slot)
        indices = torch.where((slot < first) & (slot < size), start[..., None] + slot, recent)
        return Selection(indices.masked_fill(slot >= size, -1)[:, :, None], size.to(torch.int32))

    return select


def blocks(budget: int, block: int = BLOCK) -> Selector:
    """The best whole blocks of neighbouring keys by the attention to their mean key; the first and the own always.

    A block's worth is the head mean of the softmax over the blocks' mean keys (the scoring of MoBA, arXiv 2502.13189).
    """
    block = min(block, max(1, budget // 4))

    def select(inputs: LayerInputs, start: Tensor, end: Tensor) -> Selection:
        S = inputs.k.shape[1]
        count = -(-S // block)
        rows_of = torch.arange(count, dtype=torch.int32, device=start.device)
        padded = torch.nn.functional.pad(inputs.k.float(), (0, 0, 0, 0, 0, count * block - S))
        size = (S - rows_of * block).clamp(max=block)
        pooled = padded.unflatten(1, (count, block)).sum(2) / size[:, None, None]
        first, last = start // block, -(-end // block)  # blocks with a visible key

        def score(inputs: LayerInputs, b: int, rows: slice, first: Tensor, last: Tensor) -> Tensor:
            mask = visible_mask(first[b, rows], last[b, rows], 0, count)
            worth = _mean_softmax(inputs.q[b, rows], dense_keys(pooled[b], 0, count), mask, inputs.scale)
            for always in (first, last - 1):  # of a row that sees nothing, none is kept whatever its worth
                worth.scatter_(1, always[b, rows, None].clamp(0, count - 1).long(), torch.inf)
            return worth

        chosen = _ranked(score, max(1, budget // block))(inputs, first, last).indices[:, :, 0]
        keys = (chosen[..., None] * block + torch.arange(block, dtype=torch.int32, device=start.device)).flatten(2)
        hidden = (chosen[..., None] < 0).expand(*chosen.shape, block).flatten(2)
        hidden = hidden | (keys < start[..., None]) | (keys >= end[..., None])
        return Selection.from_indices(keys.masked_fill(hidden, -1)[:, :, None])

    return select


def random(budget: int, seed: int = 0) -> Selector:
    """The token itself and others by lot, anew in each layer."""

    def score(inputs: LayerInputs, b: int, rows: slice, start: Tensor, end: Tensor) -> Tensor:
        device = inputs.q.device
        generator = torch.Generator(device).manual_seed(hash((seed, inputs.layer, b, rows.start)) & 0xFFFFFFFF)
        lot = torch.rand(rows.stop - rows.start, inputs.k.shape[1], generator=generator, device=device)
        return lot.scatter_(1, (end[b, rows, None] - 1).clamp(min=0).long(), torch.inf)

    return _ranked(score, budget)


def oracle(budget: int) -> Selector:
    """The true top-k of the model's own attention, averaged over the heads: what an indexer is taught to find."""
    return _ranked(head_mean, budget)


BASELINES: dict[str, Callable[[int], Selector]] = {"window": window, "sinks": sinks, "blocks": blocks, "random": random, "oracle": oracle}
