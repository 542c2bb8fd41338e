"""What a model read of a text: gathered layer by layer in one forward pass, with memory for T x K numbers of a layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from skim.evaluation.baselines import head_mean, row_chunks
from skim.huggingface import LayerInputs, use
from skim.huggingface.attention import by_indexer
from skim.huggingface.state import decoder_of, source_of, state_of
from skim.ops.attend.reference import by_key_head, dense_keys
from skim.selection import Selection

BEST = 16  # read keys that are named, by attention weight
PASSED = 4  # unread keys that the indexer ranks next
WANTED = 8  # keys that dense attention weighs most
MISSED = 4  # unread keys that dense attention weighs most
CELLS = 512  # of the map, along queries and along keys, at most
STRIDE = 4  # every so many queries' dense attention is looked at where not all of it is asked for
COMPARED = 256  # queries, spread over the text, whose selections are compared between layers


@dataclass(frozen=True)
class LayerRead:
    """What one layer read. U keys of each query are named: those that it weighed most, and the best that it passed over.

    Attributes:
        layer: its number in the model.
        keys: int32 `[T, U]`, ascending, right-padded with -1.
        read: bool `[T, U]`, whether the layer read the key.
        weights: float32 `[T, U]`: of a read key the head mean of the softmax over the keys read; of an unread one what it
            would be beside them and the other keys that the indexer ranks next, 0 where it is none of these.
        dense: float32 `[T, U]`, the head mean of the softmax over all visible keys, if it was asked for.
        kept: float32 `[3, N]`, how much of that softmax's mass DSA keeps, a window of as many keys, and the oracle, which takes
            as many of the best; N is T, or every fourth query.
        cells: float32 `[C, C]`, the share of the visible keys that is read, by groups of queries and of keys.
        neighbours: share of its keys that a query reads again from the query before, mean over the queries that see
            more keys than they read; None if none does.
        counts: int32 `[T]`, how many keys each query read.
    """

    layer: int
    keys: Tensor
    read: Tensor
    weights: Tensor
    dense: Tensor | None
    kept: Tensor
    cells: Tensor
    neighbours: float | None
    counts: Tensor


@dataclass(frozen=True)
class TextRead:
    """What a model read of one text.

    Attributes:
        budget: keys for each query.
        visible: int32 `[T]`, how many keys each query sees.
        layers: those that select, in order.
        full: numbers of the layers that read everything.
        agreement: float32 `[L, L]`, share of its keys that a query reads in another layer too, mean over queries that see
            more keys than the budget; NaN if none does.
        chance: what that share would be if both layers chose by lot.
        stride: `LayerRead.kept` is of each so many-th query.
    """

    budget: int
    visible: Tensor
    layers: list[LayerRead]
    full: list[int]
    agreement: Tensor
    chance: float
    stride: int


@torch.no_grad()
def collect(model: Any, tokens: Tensor, *, dense: bool = False) -> TextRead:
    """Read a text with DSA, once, and note what each layer read.

    Args:
        model: a converted model with trained indexers (`skim.load`), at the budget to be shown.
        tokens: `[1, T]` token numbers on the model's device, T >= 2.
        dense: also look at every query's dense attention: which keys it weighs most. This costs what dense attention costs.

    Raises:
        ValueError: the model was not converted, no layer of it selects, or `tokens` of another shape.
    """
    if tokens.dim() != 2 or tokens.shape[0] != 1 or tokens.shape[1] < 2:
        raise ValueError(f"tokens: expected [1, T] with T >= 2, got {tuple(tokens.shape)}")
    state = state_of(model)
    full = [layer for layer, letter in state.letters.items() if letter == "F"]
    if len(full) == len(state.letters):
        raise ValueError("model: expected a layer that selects, got pattern F in every layer")
    collector = _Collector(dict(state.letters), dense)
    with use(model, mode="sparse", selector=collector), _every_layer_asks(model):
        decoder_of(model)(tokens, use_cache=False)
    assert collector.visible is not None
    agreement, chance = _agreement(collector.compared, collector.visible.cpu(), state.config.budget)
    stride = 1 if dense else STRIDE
    return TextRead(state.config.budget, collector.visible.cpu(), collector.layers, full, agreement, chance, stride)


@contextmanager
def _every_layer_asks(model: Any) -> Iterator[None]:
    """Layers that reuse a selection ask the selector too, which gives them the one that they would reuse."""
    state = state_of(model)
    before, state.letters = state.letters, {layer: letter.replace("R", "S") for layer, letter in state.letters.items()}
    try:
        yield
    finally:
        state.letters = before


class _Collector:
    """A selector that reads with the model's own indexers and notes what they did."""

    def __init__(self, letters: dict[int, str], dense: bool) -> None:
        self.letters, self.dense = letters, dense
        self.choice: tuple[Selection, Selection] | None = None  # of the last S layer: what it reads, and a few keys more
        self.layers: list[LayerRead] = []
        self.compared: list[Tensor] = []
        self.visible: Tensor | None = None

    def __call__(self, inputs: LayerInputs, start: Tensor, end: Tensor) -> Selection:
        if self.choice is None or source_of(inputs.layer, self.letters) == inputs.layer:
            config = inputs.config
            more = replace(inputs, config=replace(config, budget=config.budget + PASSED, mass=None))
            self.choice = by_indexer(inputs, start, end), by_indexer(more, start, end)
        selection, wider = self.choice
        self.visible = (end - start)[0]
        self.layers.append(_layer_read(inputs, selection, wider, start, end, self.dense))
        T = start.shape[1]
        self.compared.append(selection.indices[0, :: max(1, T // COMPARED), 0].cpu())
        return selection


def _layer_read(inputs: LayerInputs, selection: Selection, wider: Selection, start: Tensor, end: Tensor, dense: bool) -> LayerRead:
    T, chosen, stride = start.shape[1], selection.indices[0, :, 0], 1 if dense else STRIDE
    parts, kept = [], []
    for _, rows in row_chunks(inputs, T):
        sampled = slice(rows.start + -rows.start % stride, rows.stop, stride)
        p = head_mean(inputs, 0, sampled, start, end)
        kept.append(_kept(p, chosen[sampled], end[0, sampled]))
        parts.append(_named(inputs, rows, chosen[rows], wider.indices[0, rows, 0], p if dense else None))
    keys, read, weights, wanted = (torch.cat(part).cpu() for part in zip(*parts))
    longer = (end - start)[0, 1:] > selection.counts[0, 1:, 0]
    again = contained(chosen[1:], chosen[:-1]).sum(1) / selection.counts[0, 1:, 0].clamp(min=1)
    neighbours = float(again[longer].mean()) if bool(longer.any()) else None
    cells = _cells(chosen, start[0], end[0]).cpu()
    counts = selection.counts[0, :, 0].cpu()
    return LayerRead(inputs.layer, keys, read, weights, wanted if dense else None, torch.cat(kept, 1).cpu(), cells, neighbours, counts)


def contained(a: Tensor, b: Tensor) -> Tensor:
    """bool `[n, A]`: which of a's keys `[n, A]` are among b's `[n, B]` of the same row; both ascending and padded with -1."""
    last = torch.iinfo(b.dtype).max
    ordered = b.masked_fill(b < 0, last).contiguous()
    at = torch.searchsorted(ordered, a.contiguous()).clamp(max=b.shape[1] - 1)
    return (ordered.gather(1, at) == a) & (a >= 0)


def _kept(p: Tensor, chosen: Tensor, end: Tensor) -> Tensor:
    """`[3, n]`: what the `chosen` keys `[n, K]`, as many recent ones and the as many best keep of dense attention p `[n, S]`."""
    count = (chosen >= 0).sum(1, keepdim=True)
    dsa = p.gather(1, chosen.clamp(min=0).long()).masked_fill_(chosen < 0, 0.0).sum(1)
    recent = torch.arange(p.shape[1], device=p.device) >= end[:, None] - count
    best = p.topk(min(chosen.shape[1], p.shape[1])).values.cumsum(1).gather(1, (count - 1).clamp(min=0))
    return torch.stack([dsa, (p * recent).sum(1), best[:, 0]])


def _named(inputs: LayerInputs, rows: slice, chosen: Tensor, wider: Tensor, p: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """keys, read, weights and dense of `LayerRead` for some queries; `p` `[n, S]` is their dense attention, if it is wanted."""
    n, S = chosen.shape[0], inputs.k.shape[1]
    read = contained(wider, chosen)
    weights = _weights(inputs, rows, wider, read)
    best = _best(wider, weights.masked_fill(~read, 0.0), BEST) + _best(wider, weights.masked_fill(read, 0.0), PASSED)
    is_read = _scatter(wider, read.to(torch.uint8), S).bool()
    if p is not None:
        position = torch.arange(S, device=p.device, dtype=torch.int32).expand(n, S)
        best += _best(position, p, WANTED) + _best(position, p.masked_fill(is_read, 0.0), MISSED)
    candidates = torch.cat(best, 1)
    named = _scatter(candidates, (candidates >= 0).to(torch.uint8), S).bool()
    keys = Selection.from_mask(named, candidates.shape[1]).indices
    at = keys.clamp(min=0).long()
    wanted = weights.new_zeros(n, S) if p is None else p
    found = [x.gather(1, at).masked_fill_(keys < 0, 0) for x in (is_read, _scatter(wider, weights, S), wanted)]
    return keys, found[0], found[1], found[2]


def _best(keys: Tensor, worth: Tensor, count: int) -> list[Tensor]:
    """The `count` keys `[n, count]` of most worth in each row, -1 where there is none of any."""
    found = worth.topk(min(count, worth.shape[1]))
    return [keys.gather(1, found.indices).masked_fill(found.values <= 0, -1)]


def _scatter(keys: Tensor, values: Tensor, S: int) -> Tensor:
    """values `[n, K]` at their keys, `[n, S]`; what is padded with -1 goes nowhere."""
    rows = values.new_zeros(keys.shape[0], S + 1)
    return rows.scatter_(1, torch.where(keys < 0, S, keys).long(), values)[:, :S]


def _weights(inputs: LayerInputs, rows: slice, wider: Tensor, read: Tensor) -> Tensor:
    """Head mean of the attention over `wider`'s keys `[n, K]`: of those `read` among themselves, of the others among all."""
    q, G, n = inputs.q[0, rows], inputs.k.shape[2], wider.shape[0]
    keys = dense_keys(inputs.k[0], 0, int(wider.max()) + 1)
    scores = ((by_key_head(q, G) * inputs.scale) @ keys.transpose(1, 2)).view(G, n, -1, keys.shape[1])
    at = wider.clamp(min=0).long()[None, :, None].expand(*scores.shape[:3], -1)
    scores = scores.gather(3, at)
    both = (scores.masked_fill(~mask[:, None], -torch.inf).softmax(-1).nan_to_num_(0.0).mean((0, 2)) for mask in (read, wider >= 0))
    among_read, among_all = both
    return torch.where(read, among_read, among_all)


def cell_size(T: int) -> int:
    """How many queries, and how many keys, a cell of the map holds."""
    return -(-T // CELLS)


def _cells(chosen: Tensor, start: Tensor, end: Tensor) -> Tensor:
    T, size = chosen.shape[0], cell_size(chosen.shape[0])
    C = -(-T // size)
    row = torch.arange(T, device=chosen.device) // size
    place = (row[:, None] * C + chosen // size)[chosen >= 0]
    read = torch.bincount(place, minlength=C * C).view(C, C)
    edges = torch.arange(C, device=chosen.device) * size
    seen = (end[:, None].clamp(max=T) - edges).clamp(0, size) - (start[:, None] - edges).clamp(0, size)
    visible = torch.zeros(C, C, dtype=seen.dtype, device=seen.device).index_add_(0, row, seen)
    return read / visible.clamp(min=1)


def _agreement(compared: list[Tensor], visible: Tensor, budget: int) -> tuple[Tensor, float]:
    """`TextRead.agreement` and `chance` of layers that read `compared`, keys `[n, K]` of queries spread over the text."""
    visible = visible[:: max(1, len(visible) // COMPARED)]
    rows = visible > budget
    result = torch.full((len(compared), len(compared)), torch.nan)
    if not bool(rows.any()):
        return result, 1.0
    sets = [keys[rows] for keys in compared]
    counts = torch.stack([(keys >= 0).sum(1) for keys in sets])
    for i, a in enumerate(sets):
        for j, b in enumerate(sets):
            result[i, j] = (contained(a, b).sum(1) / counts[i].clamp(min=1)).mean()
    return result, float((counts / visible[rows]).mean())
