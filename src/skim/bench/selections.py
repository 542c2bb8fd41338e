"""Index tensors, and selections made from them, of the two kinds that are always measured.

- "random": every query selects as if alone. Neighbouring queries share no more keys than chance gives them.
- "overlapping": neighbours share as many keys as those of trained indexers do (SmolLM2-135M, 8192 tokens). Index queries
  are a slowly drifting part, the text's topic, and a small part of each query's own: what leaves a selection by the
  second may come back, what leaves by the first does not.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from skim.ops import select, visible
from skim.selection import Selection

KINDS = ("random", "overlapping")

# |union of the selections of r neighbouring queries| / K, measured on trained indexers: budget -> {r: ratio}.
MEASURED_UNIONS = {
    256: {2: 1.25, 4: 1.6, 8: 2.1, 16: 2.7},
    512: {2: 1.2, 4: 1.5, 8: 1.9, 16: 2.5},
    2048: {2: 1.2, 4: 1.4, 8: 1.6, 16: 1.85},
}
# What gives these unions: budget -> (share of a query's own part, queries over which the rest drifts away), both for a
# selection whose threshold lies at hazard 1 (see `_hazard`).
DYNAMICS = {256: (0.2, 30.0), 512: (0.17, 38.0), 2048: (0.23, 600.0)}
BLOCK = 64  # queries whose drift is made by one matrix product


class IndexInputs(NamedTuple):
    """q `[B, T, J, E]`, k `[B, S, E]`, weights `[B, T, J]` in float32."""

    q: Tensor
    k: Tensor
    weights: Tensor


def index_inputs(
    kind: str, T: int, S: int, budget: int, heads: int, channels: int, *, batch: int = 1, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> IndexInputs:
    """Index tensors whose selections of `budget` keys are of this kind; the T queries stand at the end of the S keys."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    # Keys of one length: otherwise the long ones would be selected by every query.
    k = torch.nn.functional.normalize(normal(batch, S, channels), dim=-1) * channels**0.5
    width = heads * (channels + 1)
    parts = normal(batch, T, width)
    if kind == "overlapping":
        own, decay = _dynamics(torch.arange(S - T + 1, S + 1, device=device), budget)
        parts = own[:, None] * parts + (1 - own**2).sqrt()[:, None] * drift(normal(batch, T, width), decay)
    elif kind != "random":
        raise ValueError(f"kind: expected one of {KINDS}, got {kind!r}")
    q, weights = parts.split((heads * channels, heads), dim=-1)
    return IndexInputs(q.reshape(batch, T, heads, channels).to(dtype), k.to(dtype), weights.contiguous())


def selection(kind: str, T: int, S: int, budget: int, *, batch: int = 1, device: torch.device, seed: int = 0) -> Selection:
    """A causal selection of this kind: exactly min(budget, position + 1) keys for each of the last T of S positions."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    q, k, weights = index_inputs(kind, T, S, budget, 8, 64, batch=batch, dtype=dtype, device=device, seed=seed)
    start, end = visible(S, T)
    found = select(q, k, weights, budget, start=start.to(device).expand(batch, -1), end=end.to(device).expand(batch, -1))
    assert isinstance(found, Selection)
    return found


def drift(innovations: Tensor, decay: Tensor) -> Tensor:
    """x[t] = decay[t] x[t - 1] + (1 - decay[t]^2)^1/2 innovations[t], of variance one: `[B, T, n]`, decay `[T]`."""
    B, T, n = innovations.shape
    blocks = -(-T // BLOCK)
    padded = torch.nn.functional.pad(innovations, (0, 0, 0, blocks * BLOCK - T)).view(B, blocks, BLOCK, n)
    log_decay = torch.nn.functional.pad(decay.log(), (0, blocks * BLOCK - T)).view(blocks, BLOCK)
    total = log_decay.cumsum(1)
    # What is left at t of an innovation at i <= t; the first block's first innovation is the state itself.
    left = (total[:, :, None] - total[:, None, :]).tril().exp().tril()
    gain = (1 - (2 * log_decay).exp()).clamp(min=0).sqrt()
    gain[0, 0] = 1.0
    x = (left * gain[:, None]) @ padded
    for block in range(1, blocks):
        x[:, block] += total[block].exp()[:, None] * x[:, block - 1, -1:]
    return x.flatten(1, 2)[:, :T]


def unions(selection: Selection, neighbours: int) -> float:
    """Mean of |union of the selections of so many neighbouring queries| / K."""
    indices = selection.indices.flatten(0, 1)[:, 0].long()
    rows = len(indices) // neighbours * neighbours
    groups = indices[:rows].view(rows // neighbours, -1)
    ordered = groups.sort(-1).values
    new = (ordered[:, 1:] != ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    size = new.sum(-1) + (ordered[:, 0] >= 0)
    return float(size.float().mean()) / selection.budget


def _dynamics(visible_keys: Tensor, budget: int) -> tuple[Tensor, Tensor]:
    """Share of a query's own part, and decay of the drifting part from the query before: `[T]` each.

    Between the measured budgets logarithmically; below and above them as at the nearest.
    """
    budgets = sorted(DYNAMICS)
    below = max((b for b in budgets if b <= budget), default=budgets[0])
    above = min((b for b in budgets if b >= budget), default=budgets[-1])
    part = 0.0 if above == below else math.log(budget / below) / math.log(above / below)
    own, queries = (DYNAMICS[below][i] ** (1 - part) * DYNAMICS[above][i] ** part for i in (0, 1))
    hazard = _hazard((budget / visible_keys).clamp(max=0.9))
    return (own / hazard).clamp(max=1.0), torch.exp(-1 / (queries * hazard**2))


def _hazard(selected: Tensor) -> Tensor:
    """How steeply a normal distribution falls where this share of it lies above: the smaller the share, the more of it changes with the scores."""
    threshold = -torch.special.ndtri(selected.double())
    return ((-(threshold**2) / 2).exp() / (2 * math.pi) ** 0.5 / selected).float()
