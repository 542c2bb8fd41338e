"""What the windows of a text or of many say together: perplexity by pattern and by position, with paired intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from skim.evaluation.intervals import Interval, paired_t
from skim.evaluation.table import Reading

FIRST_EDGE = 256


@dataclass(frozen=True)
class Part:
    """The queries from position `start` to before `stop`, over the windows that reach `start`.

    Attributes:
        perplexity: exp of the mean over windows of the mean negative log-likelihood.
        over_dense: what the negative log-likelihood has more than dense's, in nats; None for dense itself, or if it wasn't measured.
        windows: how many reach `start`.
    """

    start: int
    stop: int
    perplexity: float
    over_dense: Interval | None
    windows: int


@dataclass(frozen=True)
class Quality:
    """One pattern's figures over several windows, each window weighing the same.

    Attributes:
        pattern: dense, dsa, window, sinks, blocks, random or oracle.
        perplexity, over_dense, windows: as in `Part`, over all positions.
        attention_mass, keys_per_query, seconds: means over the windows of what `Row` has.
        by_position: parts between doubling positions.
        beyond_twice_budget: the part where a query sees at least twice as many keys as it may read; None if none does.
        nll: mean negative log-likelihood of each window, to pair with another run's.
    """

    pattern: str
    perplexity: float
    over_dense: Interval | None
    attention_mass: float | None
    keys_per_query: float
    seconds: float
    windows: int
    by_position: list[Part]
    beyond_twice_budget: Part | None
    nll: list[float]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def summarise(found: Sequence[Sequence[Reading]], budget: int) -> list[Quality]:
    """The figures of each pattern at one budget.

    Args:
        found: for each window what `readings` gave, at any budgets.
        budget: which of them.
    """
    of = [{reading.pattern: reading for reading in window if reading.budget in (budget, None)} for window in found]
    dense = [window["dense"].losses for window in of if "dense" in window]
    return [_quality([window[pattern] for window in of], [] if pattern == "dense" else dense, budget) for pattern in of[0]]


def _quality(own: list[Reading], reference: list[Tensor], budget: int) -> Quality:
    losses = [reading.losses for reading in own]
    longest = max(len(one) for one in losses)
    if own[0].pattern == "dense":
        masses = [1.0 if len(one) >= budget else None for one in losses]
    else:
        masses = [reading.attention_mass for reading in own]
    kept = [mass for mass in masses if mass is not None]
    whole = _part(losses, reference, 0, longest)
    edges = [0]
    while edges[-1] < longest:
        edges.append(min(longest, max(FIRST_EDGE, 2 * edges[-1])))
    return Quality(
        own[0].pattern,
        whole.perplexity,
        whole.over_dense,
        sum(kept) / len(kept) if kept else None,
        sum(reading.keys_per_query for reading in own) / len(own),
        sum(reading.seconds for reading in own) / len(own),
        len(own),
        [_part(losses, reference, start, stop) for start, stop in zip(edges, edges[1:])],
        _part(losses, reference, 2 * budget - 1, longest) if 2 * budget - 1 < longest else None,  # query t sees t + 1 keys
        [float(one.mean()) for one in losses],
    )


def _part(losses: list[Tensor], reference: list[Tensor], start: int, stop: int) -> Part:
    def means(of: list[Tensor]) -> list[float]:
        return [float(one[start:stop].mean()) for one in of if len(one) > start]

    values = means(losses)
    over = paired_t(values, means(reference)) if reference else None
    return Part(start, stop, math.exp(sum(values) / len(values)), over, len(values))
