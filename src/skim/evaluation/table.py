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
from skim.huggingface.state import Selector, source_of, state_of
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


@dataclass(frozen=True)
class Reading:
    """What one pattern made of one text.

    Attributes:
        pattern: one of `PATTERNS`.
        budget: keys for each query; None for dense.
        losses: `[T - 1]` float64, negative log-likelihood of each token behind the first.
        attention_mass, keys_per_query, seconds: as in `Row`; the mass of dense is None.
    """

    pattern: str
    budget: int | None
    losses: Tensor
    attention_mass: float | None
    keys_per_query: float
    seconds: float


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
    for reading in readings(model, tokens, [budget], patterns, cache):
        mass = dense_mass(budget, tokens) if reading.pattern == "dense" else reading.attention_mass
        yield Row(reading.pattern, math.exp(float(reading.losses.mean())), mass, reading.keys_per_query, reading.seconds)


def readings(model: Any, tokens: Tensor, budgets: Sequence[int], patterns: Sequence[str] = PATTERNS, cache: Any = None) -> Iterator[Reading]:
    """What each pattern makes of `tokens`, budget after budget; dense, which has none, once.

    Arguments and errors are those of `evaluate`.
    """
    check_patterns(patterns)
    if tokens.dim() != 2 or tokens.shape[0] != 1 or tokens.shape[1] < 2:
        raise ValueError(f"tokens: expected [1, T] with T >= 2, got {tuple(tokens.shape)}")
    selectors = {(name, budget): selector_of(name, budget) for budget in budgets for name in patterns if name != "dense"}
    masses = Masses(selectors, state_of(model).letters)
    if selectors:
        with use(model, selector=masses):
            token_losses(model, tokens)
    for name, budget in dict.fromkeys((name, None if name == "dense" else budget) for budget in budgets for name in patterns):
        if budget is None:
            with use(model, mode="dense"):
                losses, seconds = token_losses(model, tokens)
            yield Reading(name, None, losses, None, (tokens.shape[1] + 1) / 2, seconds)
        else:
            counted = Counter(selectors[name, budget])
            with use(model, budget=budget, mode="sparse", selector=counted):
                losses, seconds = token_losses(model, tokens, cache if name == "dsa" else None)
            yield Reading(name, budget, losses, masses.mean(name, budget), counted.mean(), seconds)


def check_patterns(patterns: Sequence[str]) -> None:
    unknown = sorted(set(patterns) - set(PATTERNS))
    if unknown:
        raise ValueError(f"patterns: expected some of {', '.join(PATTERNS)}, got {unknown[0]!r}")


def selector_of(pattern: str, budget: int) -> Selector:
    """The selector of a pattern other than dense."""
    if pattern != "dsa":
        return BASELINES[pattern](budget)

    def select(inputs: LayerInputs, start: Tensor, end: Tensor) -> Selection:
        return by_indexer(replace(inputs, config=replace(inputs.config, budget=budget)), start, end)

    return select


def dense_mass(budget: int, tokens: Tensor) -> float | None:
    """What dense reading keeps of its own attention, where any query sees more keys than the budget."""
    return 1.0 if budget < tokens.shape[1] else None


def perplexity(model: Any, tokens: Tensor, cache: Any = None) -> tuple[float, float]:
    """Perplexity of `tokens` `[1, T]`, and the seconds of the forward pass, which fills `cache` if there is one."""
    losses, seconds = token_losses(model, tokens, cache)
    return math.exp(float(losses.mean())), seconds


@torch.no_grad()
def token_losses(model: Any, tokens: Tensor, cache: Any = None) -> tuple[Tensor, float]:
    """Negative log-likelihood of each token of `[1, T]` behind the first, `[T - 1]` float64; seconds as in `perplexity`."""
    began = time.perf_counter()
    logits = model(tokens, past_key_values=cache, use_cache=cache is not None).logits
    if tokens.is_cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    parts = zip(logits[0, :-1].split(512), tokens[0, 1:].split(512))
    losses = [torch.nn.functional.cross_entropy(part.float(), target, reduction="none").double().cpu() for part, target in parts]
    return torch.cat(losses), seconds


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
    """A selector that reads everything and notes how much of the attention's mass other selectors would keep.

    Args:
        selectors: (name, budget) -> selector.
        letters: the model's pattern; an R layer keeps what its source selects.
    """

    def __init__(self, selectors: dict[tuple[str, int], Selector], letters: dict[int, str]) -> None:
        self.selectors, self.letters = selectors, letters
        self.choices: dict[tuple[str, int], Selection | None] = {}  # of the last S layer
        self.kept: dict[tuple[str, int], list[float]] = {key: [] for key in selectors}

    def __call__(self, inputs: LayerInputs, start: Tensor, end: Tensor) -> None:
        part, start, end = some_queries(inputs, start, end, MASS_STRIDE)
        if source_of(inputs.layer, self.letters) == inputs.layer:
            longest = int((end - start).max())
            self.choices = {key: selector(part, start, end) for key, selector in self.selectors.items() if key[1] < longest}
        sums = dict.fromkeys(self.choices, 0.0)
        if not sums:
            return
        for b, rows in row_chunks(part, start.shape[1]):
            p = head_mean(part, b, rows, start, end)
            for (name, budget), choice in self.choices.items():
                assert choice is not None
                indices = choice.indices[b, rows, 0]
                kept = p.gather(1, indices.clamp(min=0).long()).masked_fill_(indices < 0, 0.0).sum(1)
                sums[name, budget] += float(kept[(end - start)[b, rows] > budget].sum())
        for key, total in sums.items():
            self.kept[key].append(total / int((end - start > key[1]).sum()))

    def mean(self, name: str, budget: int) -> float | None:
        layers = self.kept[name, budget]
        return sum(layers) / len(layers) if layers else None


def some_queries(inputs: LayerInputs, start: Tensor, end: Tensor, stride: int) -> tuple[LayerInputs, Tensor, Tensor]:
    """Every `stride`-th query of a layer's inputs, with its visibility; all keys stay."""
    index = inputs.index
    if index is not None:
        index = IndexTensors(index.q[:, ::stride], index.k, index.weights[:, ::stride])
    return replace(inputs, q=inputs.q[:, ::stride], index=index), start[:, ::stride].contiguous(), end[:, ::stride].contiguous()
