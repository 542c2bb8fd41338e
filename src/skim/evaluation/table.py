"""What a pattern costs in quality: perplexity and kept attention mass of one text, every pattern on the same weights."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from skim.evaluation.baselines import BASELINES, head_mean, row_chunks
from skim.huggingface import LayerInputs, use
from skim.huggingface.attention import by_indexer
from skim.huggingface.state import Selector
from skim.modules import IndexTensors
from skim.selection import Selection

PATTERNS = ("dense", "dsa", *BASELINES)
MASS_STRIDE = 4


@dataclass(frozen=True)
class Row:
    """One pattern's figures over one text.

    Attributes:
        pattern: dense, dsa, window, sinks, blocks, random or oracle.
        perplexity: exp of the mean negative log-likelihood of the tokens behind the first.
        attention_mass: share of the dense run's head-mean attention that the selection keeps, mean over layers and
            over the queries (every fourth) that see more keys than the budget; None where no query does.
        keys_per_query: keys that a query reads, mean over queries and layers.
        seconds: of the forward pass.
    """

    pattern: str
    perplexity: float
    attention_mass: float | None
    keys_per_query: float
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def evaluate(model: Any, tokens: Tensor, budget: int, patterns: Sequence[str] = PATTERNS, cache: Any = None) -> Iterator[Row]:
    """The rows of the table, one after the other: each pattern reads `tokens` with the same weights.

    Args:
        model: a model with trained indexers (`skim.load`).
        tokens: `[1, T]` token numbers on the model's device.
        budget: keys for each query.
        patterns: which of `PATTERNS`, in this order.
        cache: an empty transformers cache that the run with DSA fills, to go on from.

    Raises:
        ValueError: an unknown pattern, or fewer than two tokens.
    """
    unknown = sorted(set(patterns) - set(PATTERNS))
    if unknown:
        raise ValueError(f"patterns: expected some of {', '.join(PATTERNS)}, got {unknown[0]!r}")
    if tokens.dim() != 2 or tokens.shape[0] != 1 or tokens.shape[1] < 2:
        raise ValueError(f"tokens: expected [1, T] with T >= 2, got {tuple(tokens.shape)}")
    selectors = {name: by_indexer if name == "dsa" else BASELINES[name](budget) for name in patterns if name != "dense"}
    masses = Masses(selectors, budget)
    with use(model, budget=budget, selector=masses):
        perplexity(model, tokens)
    for name in patterns:
        if name == "dense":
            with use(model, mode="dense"):
                value, seconds = perplexity(model, tokens)
            T = tokens.shape[1]
            yield Row("dense", value, None if budget >= T else 1.0, (T + 1) / 2, seconds)
        else:
            counted = Counter(selectors[name])
            with use(model, budget=budget, mode="sparse", selector=counted):
                value, seconds = perplexity(model, tokens, cache if name == "dsa" else None)
            yield Row(name, value, masses.mean(name), counted.mean(), seconds)


@torch.no_grad()
def perplexity(model: Any, tokens: Tensor, cache: Any = None) -> tuple[float, float]:
    """Perplexity of `tokens` `[1, T]`, and the seconds of the forward pass, which fills `cache` if there is one."""
    began = time.perf_counter()
    logits = model(tokens, past_key_values=cache, use_cache=cache is not None).logits
    if tokens.is_cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    loss = torch.zeros((), dtype=torch.float64)
    for part, target in zip(logits[0, :-1].split(512), tokens[0, 1:].split(512)):
        loss += torch.nn.functional.cross_entropy(part.float(), target, reduction="sum").double().cpu()
    return math.exp(float(loss) / (tokens.shape[1] - 1)), seconds


class Counter:
    """A selector that also counts: the keys that are read, those visible, and the queries, over all layers."""

    def __init__(self, selector: Selector) -> None:
        self.selector, self.keys, self.visible, self.queries = selector, 0, 0, 0

    def __call__(self, inputs: LayerInputs, start: Tensor, end: Tensor) -> Selection | None:
        selection = self.selector(inputs, start, end)
        assert selection is not None
        self.keys += int(selection.counts.sum())
        self.visible += int((end - start).sum()) * selection.counts.shape[2]
        self.queries += selection.counts.numel()
        return selection

    def mean(self) -> float:
        return self.keys / max(1, self.queries)


class Masses:
    """A selector that reads everything and notes how much of the attention's mass each of other selectors would keep."""

    def __init__(self, selectors: dict[str, Selector], budget: int) -> None:
        self.selectors, self.budget = selectors, budget
        self.kept: dict[str, list[float]] = {name: [] for name in selectors}

    def __call__(self, inputs: LayerInputs, start: Tensor, end: Tensor) -> None:
        part, start, end = some_queries(inputs, start, end, MASS_STRIDE)
        long = (end - start) > self.budget
        if not bool(long.any()):
            return
        choices = {name: selector(part, start, end) for name, selector in self.selectors.items()}
        sums = dict.fromkeys(choices, 0.0)
        for b, rows in row_chunks(part, start.shape[1]):
            p = head_mean(part, b, rows, start, end)
            for name, choice in choices.items():
                assert choice is not None
                indices = choice.indices[b, rows, 0]
                kept = p.gather(1, indices.clamp(min=0).long()).masked_fill_(indices < 0, 0.0).sum(1)
                sums[name] += float((kept * long[b, rows]).sum())
        for name, total in sums.items():
            self.kept[name].append(total / int(long.sum()))

    def mean(self, name: str) -> float | None:
        layers = self.kept[name]
        return sum(layers) / len(layers) if layers else None


def some_queries(inputs: LayerInputs, start: Tensor, end: Tensor, stride: int) -> tuple[LayerInputs, Tensor, Tensor]:
    """Every `stride`-th query of a layer's inputs, with its visibility; all keys stay."""
    index = inputs.index
    if index is not None:
        index = IndexTensors(index.q[:, ::stride], index.k, index.weights[:, ::stride])
    return replace(inputs, q=inputs.q[:, ::stride], index=index), start[:, ::stride].contiguous(), end[:, ::stride].contiguous()
