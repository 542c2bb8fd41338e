"""What a pattern costs in quality: perplexity and kept attention mass of one text, every pattern on the same weights."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from skim.config import Config
from skim.evaluation.baselines import BASELINES
from skim.huggingface import LayerInputs, use
from skim.huggingface.attention import by_indexer
from skim.huggingface.state import Selector, source_of, state_of
from skim.modules import IndexTensors
from skim.ops import attend, attend_dense
from skim.selection import Selection

PATTERNS = ("dense", "dsa", *BASELINES)
MASS_STRIDE = 4


@dataclass(frozen=True)
class Adaptive:
    """A budget that only DSA can have: the fewest keys that hold `mass` of the indexer's softmax, between `min_budget` and `budget`.

    Raises:
        ValueError: a value that `skim.Config` refuses.
    """

    mass: float
    min_budget: int
    budget: int

    def __post_init__(self) -> None:
        Config(mass=self.mass, min_budget=self.min_budget, budget=self.budget)


Budget = int | Adaptive
Read = tuple[str, "Budget | None"]  # a pattern and its budget; None for dense


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
        budget: keys for each query, an `Adaptive` budget, or None for dense.
        losses: `[T - 1]` float64, negative log-likelihood of each token behind the first.
        attention_mass, keys_per_query, seconds: as in `Row`; the mass of dense is None.
    """

    pattern: str
    budget: Budget | None
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


def readings(model: Any, tokens: Tensor, budgets: Sequence[Budget], patterns: Sequence[str] = PATTERNS, cache: Any = None) -> Iterator[Reading]:
    """What each pattern makes of `tokens`, budget after budget; dense, which has none, once, and DSA alone at an `Adaptive` one.

    Arguments and errors are those of `evaluate`.
    """
    reads = reads_of(budgets, patterns)
    if tokens.dim() != 2 or tokens.shape[0] != 1 or tokens.shape[1] < 2:
        raise ValueError(f"tokens: expected [1, T] with T >= 2, got {tuple(tokens.shape)}")
    selectors = {(name, budget): selector_of(name, budget) for name, budget in reads if budget is not None}
    masses = Masses({read: selector for read, selector in selectors.items() if most(read[1]) < tokens.shape[1]}, state_of(model).letters)
    if masses.selectors:
        with use(model, selector=masses), torch.no_grad():
            model.base_model(tokens, use_cache=False)
    for name, budget in reads:
        if budget is None:
            with use(model, mode="dense"):
                losses, seconds = token_losses(model, tokens)
            yield Reading(name, None, losses, None, (tokens.shape[1] + 1) / 2, seconds)
        else:
            counted = Counter(selectors[name, budget])
            with use(model, mode="sparse", selector=counted, **settings(budget)):
                losses, seconds = token_losses(model, tokens, cache if name == "dsa" else None)
            yield Reading(name, budget, losses, masses.mean((name, budget)), counted.mean(), seconds)


def reads_of(budgets: Sequence[Budget], patterns: Sequence[str]) -> list[Read]:
    """Each pattern at each budget, in this order: dense once, and DSA alone at an `Adaptive` budget.

    Raises:
        ValueError: an unknown pattern.
    """
    unknown = sorted(set(patterns) - set(PATTERNS))
    if unknown:
        raise ValueError(f"patterns: expected some of {', '.join(PATTERNS)}, got {unknown[0]!r}")
    each = [(name, budget) for budget in budgets for name in (("dsa",) if isinstance(budget, Adaptive) else patterns)]
    return list(dict.fromkeys((name, None if name == "dense" else budget) for name, budget in each))


def settings(budget: Budget) -> dict[str, Any]:
    """The fields of `skim.Config` that a budget is."""
    return asdict(budget) if isinstance(budget, Adaptive) else {"budget": budget}


def most(budget: Budget) -> int:
    """The keys that a query reads at most."""
    return budget.budget if isinstance(budget, Adaptive) else budget


def selector_of(pattern: str, budget: Budget) -> Selector:
    """The selector of a pattern other than dense. DSA's other settings are those in force."""
    if pattern != "dsa":
        return BASELINES[pattern](most(budget))

    def select(inputs: LayerInputs, start: Tensor, end: Tensor) -> Selection:
        return by_indexer(replace(inputs, config=replace(inputs.config, **settings(budget))), start, end)

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
    losses = [torch.nn.functional.cross_entropy(part.float(), target, reduction="none") for part, target in parts]
    return torch.cat(losses).double().cpu(), seconds


class Counter:
    """A selector that also counts: the keys that are read, those visible, and the queries, over all layers.

    The sums stay on the device until they are asked for, so that no layer waits for the host.
    """

    def __init__(self, selector: Selector) -> None:
        self.selector = selector
        self.sums: Tensor | None = None

    def __call__(self, inputs: LayerInputs, start: Tensor, end: Tensor) -> Selection | None:
        selection = self.selector(inputs, start, end)
        assert selection is not None
        counts = selection.counts
        visible = (end - start).sum() * counts.shape[2]
        found = torch.stack((counts.sum(), visible, torch.full_like(visible, counts.numel())))
        self.sums = found if self.sums is None else self.sums + found.to(self.sums.device)
        return selection

    def totals(self) -> tuple[int, int, int]:
        """Keys read, keys visible, queries."""
        keys, visible, queries = (0, 0, 0) if self.sums is None else self.sums.tolist()
        return keys, visible, queries

    def mean(self) -> float:
        """Keys that a query reads."""
        keys, _, queries = self.totals()
        return keys / max(1, queries)


class Masses:
    """A selector that reads everything and notes how much of the attention's mass other selectors would keep.

    A head's mass in a selection is exp(lse of the selected - lse of the visible), so no row of weights is ever made.

    Args:
        selectors: of each read but dense.
        letters: the model's pattern; an R layer keeps what its source selects.
    """

    def __init__(self, selectors: dict[Read, Selector], letters: dict[int, str]) -> None:
        self.selectors, self.letters = selectors, letters
        self.choices: dict[Read, Selection | None] = {}  # of the last S layer
        self.kept: dict[Read, list[Tensor]] = {read: [] for read in selectors}  # of each layer: sum over the queries, and how many

    def __call__(self, inputs: LayerInputs, start: Tensor, end: Tensor) -> None:
        part, start, end = some_queries(inputs, start, end, MASS_STRIDE)
        if source_of(inputs.layer, self.letters) == inputs.layer:
            self.choices = {read: selector(part, start, end) for read, selector in self.selectors.items()}
        options: dict[str, Any] = {"scale": part.scale, "workspace_mb": part.config.workspace_mb, "v_channels": part.q.shape[-1]}
        whole = attend_dense(part.q, part.k, start=start, end=end, **options)[1]
        for (name, budget), choice in self.choices.items():
            assert choice is not None and budget is not None
            kept = (attend(part.q, part.k, selection=choice, **options)[1] - whole).exp().mean(-1)
            long = end - start > most(budget)
            self.kept[name, budget].append(torch.stack((kept.masked_fill(~long, 0.0).sum(), long.sum())))

    def mean(self, read: Read) -> float | None:
        """Mean over the layers of the mean over the queries that see more keys than the budget; None where no query does."""
        layers = [total / count for total, count in (layer.tolist() for layer in self.kept.get(read, [])) if count]
        return sum(layers) / len(layers) if layers else None


def some_queries(inputs: LayerInputs, start: Tensor, end: Tensor, stride: int) -> tuple[LayerInputs, Tensor, Tensor]:
    """Every `stride`-th query of a layer's inputs, with its visibility; all keys stay."""
    index = inputs.index
    if index is not None:
        index = IndexTensors(index.q[:, ::stride], index.k, index.weights[:, ::stride])
    return replace(inputs, q=inputs.q[:, ::stride], index=index), start[:, ::stride].contiguous(), end[:, ::stride].contiguous()
