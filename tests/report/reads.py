"""Texts that were read: by the tiny model, and large made-up ones."""

import torch

from skim.report import Cost, LayerRead, TextRead
from skim.report.collector import cell_size

COST = [Cost("dense", 40.0, 1.25, 12.5), Cost("dsa", 8.0, 1.5, 13.0)]


def made_up(T: int, layers: int, budget: int, dense: bool = True) -> TextRead:
    """A text of T tokens whose queries read mostly what is near, and the first token; every layer the same."""
    generator = torch.Generator().manual_seed(0)
    U, query = 26, torch.arange(T)[:, None]
    near = (torch.rand(T, U, generator=generator) ** 6 * (query + 1)).long()
    keys = torch.cat((torch.zeros(T, 1, dtype=torch.long), query - near), 1).clamp(min=0).sort(1).values
    keys[:, 1:][keys[:, 1:] == keys[:, :-1]] = T  # once each
    keys = keys.sort(1).values
    keys = keys.masked_fill(keys == T, -1).int()
    weights = (torch.rand(keys.shape, generator=generator) ** 2 / 8).masked_fill(keys < 0, 0.0)
    read = (torch.rand(keys.shape, generator=generator) < 0.8) & (keys >= 0)
    counts = (torch.arange(T) + 1).clamp(max=budget).int()
    C = -(-T // cell_size(T))
    distance = torch.arange(C)[:, None] - torch.arange(C)
    cells = ((1 - 3 * distance / C).clamp(min=0.05) * torch.rand(C, C, generator=generator).round(decimals=1)).tril()
    kept = 0.9 + 0.1 * torch.rand(3, T, generator=generator).round(decimals=1)
    near_weights = (weights * (1 + 0.1 * torch.rand(weights.shape, generator=generator))).clamp(max=1) if dense else None
    layer = LayerRead(0, keys, read, weights, near_weights, kept, cells, 0.8, counts)
    numbered = [LayerRead(**{**vars(layer), "layer": i}) for i in range(layers)]
    agreement = torch.full((layers, layers), 0.5).fill_diagonal_(1.0)
    return TextRead(budget, (torch.arange(T) + 1).int(), numbered, [], agreement, 0.1, 1)
