"""What the windows of a text or of many say together: perplexity by pattern and by position, with paired intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from skim.evaluation.intervals import Interval, clusters, paired_t
from skim.evaluation.table import Adaptive, Budget, Reading, most

FIRST_EDGE = 256


@dataclass(frozen=True)
class Part:
    """The queries from position `start` to before `stop`, over the windows that reach `start`.

    Attributes:
        perplexity: exp of the mean over windows of the mean negative log-likelihood.
        over_dense: what the negative log-likelihood has more than the reference's, in nats; None for dense itself, or if there is none.
        windows: how many reach `start`.
        nll: mean negative log-likelihood of each window, to pair with another run's; None where it doesn't reach `start`.
    """

    start: int
    stop: int
    perplexity: float
    over_dense: Interval | None
    windows: int
    nll: list[float | None]


@dataclass(frozen=True)
class Quality:
    """One pattern's figures over several windows, each window weighing the same.

    Attributes:
        pattern: dense, dsa, window, sinks, blocks, random or oracle.
        perplexity, over_dense, windows: as in `Part`, over all positions.
        independent: how many documents, or with too few of them windows, the interval takes as independent.
        attention_mass, keys_per_query, seconds: means over the windows of what `Row` has.
        by_position: parts between doubling positions.
        beyond_twice_budget: the part where a query sees at least twice as many keys as it may read; None if none does.
        nll, keys: mean negative log-likelihood and mean keys that a query reads of each window, to pair with another run's.
    """

    pattern: str
    perplexity: float
    over_dense: Interval | None
    attention_mass: float | None
    keys_per_query: float
    seconds: float
    windows: int
    independent: int
    by_position: list[Part]
    beyond_twice_budget: Part | None
    nll: list[float]
    keys: list[float]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Pair:
    """An adaptive budget and the fixed one under which as many keys are read on average.

    Attributes:
        budget: the adaptive budget.
        adaptive, fixed: what DSA does with each; over all queries, of which both read everything where they see few keys.
        fixed_budget: the smallest under which no fewer keys are read.
        over_fixed: what the negative log-likelihood has more with the adaptive budget, in nats.
    """

    budget: Adaptive
    adaptive: Quality
    fixed_budget: int
    fixed: Quality
    over_fixed: Interval

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def summarise(
    found: Sequence[Sequence[Reading]], budget: Budget, *, documents: Sequence[str] | None = None, reference: Sequence[Tensor] | None = None
) -> list[Quality]:
    """The figures of each pattern at one budget.

    Args:
        found: for each window what `readings` gave, at any budgets.
        budget: which of them.
        documents: the document of each window, which intervals take into account (`paired_t`); None: each has its own.
        reference: losses of each window to compare with, another model's of the same tokens say; None is dense, if it was read.
    """
    documents = [str(i) for i in range(len(found))] if documents is None else documents
    of = [{reading.pattern: reading for reading in window if reading.budget in (budget, None)} for window in found]
    dense = [window["dense"].losses for window in of if "dense" in window]
    others = {pattern: reference or ([] if pattern == "dense" else dense) for pattern in of[0]}
    return [_quality([window[pattern] for window in of], others[pattern], most(budget), documents) for pattern in of[0]]


def pair(found: Sequence[Sequence[Reading]], budget: Adaptive, fixed_budget: int, documents: Sequence[str] | None = None) -> Pair:
    """An adaptive budget beside a fixed one, both of them read by DSA in `found`; arguments as in `summarise`."""
    adaptive, fixed = (next(row for row in summarise(found, of, documents=documents) if row.pattern == "dsa") for of in (budget, fixed_budget))
    return Pair(budget, adaptive, fixed_budget, fixed, paired_t(adaptive.nll, fixed.nll, documents))


def equal_budget(keys: float, sizes: Sequence[int]) -> int:
    """The smallest fixed budget under which the queries of causal windows of these sizes read `keys` keys or more on average.

    As `Quality.keys_per_query` does, this averages over a window's queries, then over windows.
    """

    def read(budget: int) -> float:
        return sum(b - b * (b - 1) / (2 * size) for size in sizes for b in [min(budget, size)]) / len(sizes)

    low, high = 1, max(sizes)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if read(middle) >= keys else (middle + 1, high)
    return low


def _quality(own: list[Reading], reference: Sequence[Tensor], budget: int, documents: Sequence[str]) -> Quality:
    losses = [reading.losses for reading in own]
    longest = max(len(one) for one in losses)
    if own[0].pattern == "dense":
        masses = [1.0 if len(one) >= budget else None for one in losses]
    else:
        masses = [reading.attention_mass for reading in own]
    kept = [mass for mass in masses if mass is not None]
    whole = _part(losses, reference, documents, 0, longest)
    edges = [0]
    while edges[-1] < longest:
        edges.append(min(longest, max(FIRST_EDGE, 2 * edges[-1])))
    keys = [reading.keys_per_query for reading in own]
    return Quality(
        own[0].pattern,
        whole.perplexity,
        whole.over_dense,
        sum(kept) / len(kept) if kept else None,
        sum(keys) / len(keys),
        sum(reading.seconds for reading in own) / len(own),
        len(own),
        len(set(clusters(documents))),
        [_part(losses, reference, documents, start, stop) for start, stop in zip(edges, edges[1:])],
        _part(losses, reference, documents, 2 * budget - 1, longest) if 2 * budget - 1 < longest else None,  # query t sees t + 1 keys
        [float(one.mean()) for one in losses],
        keys,
    )


def _part(losses: list[Tensor], reference: Sequence[Tensor], documents: Sequence[str], start: int, stop: int) -> Part:
    reaching = [i for i, one in enumerate(losses) if len(one) > start]
    values = [float(losses[i][start:stop].mean()) for i in reaching]
    over = None
    if reference:
        over = paired_t(values, [float(reference[i][start:stop].mean()) for i in reaching], [documents[i] for i in reaching])
    found = dict(zip(reaching, values))
    return Part(start, stop, math.exp(sum(values) / len(values)), over, len(values), [found.get(i) for i in range(len(losses))])
