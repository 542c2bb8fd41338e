"""What reading a text costs, dense and with DSA: time, memory and perplexity, as measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from skim.evaluation import perplexity
from skim.huggingface import use
from skim.report.collector import TextRead


@dataclass(frozen=True)
class Cost:
    """What one way of reading took.

    Attributes:
        pattern: dense or dsa, or a baseline.
        keys_per_query: keys that a query reads, mean over queries and the layers that select.
        seconds: of the forward pass.
        perplexity: of the text.
        peak_mib: the most memory held beyond the model's, on a GPU; None elsewhere.
    """

    pattern: str
    keys_per_query: float
    seconds: float
    perplexity: float
    peak_mib: float | None = None


def measure(model: Any, tokens: Tensor, read: TextRead) -> list[Cost]:
    """One forward pass dense and one with DSA over `tokens` `[1, T]`, of which `read` is what `collect` gave."""
    dense = float(read.visible.double().mean())
    dsa = float(torch.stack([layer.counts for layer in read.layers]).double().mean())
    return [_measured(model, tokens, "dense", "dense", dense), _measured(model, tokens, "dsa", "sparse", dsa)]


def _measured(model: Any, tokens: Tensor, pattern: str, mode: str, keys_per_query: float) -> Cost:
    before = torch.cuda.memory_allocated(tokens.device) if tokens.is_cuda else 0
    if tokens.is_cuda:
        torch.cuda.reset_peak_memory_stats(tokens.device)
    with use(model, mode=mode):
        value, seconds = perplexity(model, tokens)
    peak = (torch.cuda.max_memory_allocated(tokens.device) - before) / 2**20 if tokens.is_cuda else None
    return Cost(pattern, keys_per_query, seconds, value, peak)
