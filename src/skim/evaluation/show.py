"""What was measured, as tables for people."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from rich.table import Table

from skim.evaluation.agreement import Agreement
from skim.evaluation.intervals import DOCUMENTS, Interval
from skim.evaluation.quality import Pair, Quality
from skim.evaluation.retrieval import Retrieval
from skim.evaluation.table import Adaptive

QUALITY_INTERVAL = (
    f"95 %, Student's t over documents, whose windows count together, or over windows where there are fewer than {DOCUMENTS} documents; "
    "differences of the mean negative log-likelihood to dense, paired by window"
)
RETRIEVAL_INTERVAL = "95 %, paired with dense by prompt: of exact matches after Agresti and Min, of log-probabilities Student's t"


def quality(budget: int, rows: Sequence[Quality], domains: Sequence[dict[str, Any]]) -> Iterator[Table]:
    """The tables of one budget: over all windows, by position, and by domain where there are several.

    Args:
        budget: keys for each query.
        rows: what `summarise` gave over all windows.
        domains: for each its "text", "tokens" and, as dictionaries, the "rows" that `summarise` gave over its windows.
    """
    about = f"{domains[0]['text']}, {domains[0]['tokens']} tokens" if len(domains) == 1 else f"{len(domains)} domains"
    table = _table(f"{about}, budget {budget}", ["pattern"], _caption("dense", rows[0]))
    for name in ("perplexity", "over dense", f"from {2 * budget:,} keys", "attention mass", "keys per query", "seconds"):
        table.add_column(name, justify="right")
    for row in rows:
        mass = "-" if row.attention_mass is None else f"{row.attention_mass:.1%}"
        beyond = "-" if row.beyond_twice_budget is None else _over(row.beyond_twice_budget.over_dense)
        figures = f"{row.perplexity:,.2f}", _over(row.over_dense), beyond, mass, f"{row.keys_per_query:,.0f}", f"{row.seconds:.1f}"
        table.add_row(row.pattern, *figures, style=_style(row.pattern))
    yield table
    compared = [row for row in rows if row.over_dense is not None]
    if not compared:
        return
    table = _table(f"perplexity over dense by position, budget {budget}", ["pattern"])
    for part in compared[0].by_position:
        table.add_column(f"{part.start:,}-{part.stop:,}", justify="right")
    for row in compared:
        table.add_row(row.pattern, *(_over(part.over_dense) for part in row.by_position), style=_style(row.pattern))
    yield table
    if len(domains) > 1:
        table = _table(f"perplexity over dense by domain, budget {budget}", ["domain"])
        for row in compared:
            table.add_column(row.pattern, justify="right")
        for domain in domains:
            over = {row["pattern"]: Interval(**row["over_dense"]) for row in domain["rows"] if row["over_dense"] is not None}
            table.add_row(domain["text"], *(_over(over[row.pattern]) for row in compared))
        yield table


def adaptive(pairs: Sequence[Pair]) -> Table:
    """The table of adaptive budgets beside fixed ones under which as many keys are read on average."""
    one = pairs[0]
    title = f"adaptive budget of {one.budget.min_budget:,} to {one.budget.budget:,} keys, and the fixed one of equal keys"
    table = _table(title, ["mass"], _caption("dense and over fixed", one.fixed))
    for name in ("keys per query", "adaptive over dense", "budget", "fixed over dense", "adaptive over fixed"):
        table.add_column(name, justify="right")
    for one in pairs:
        keys, fixed = f"{one.adaptive.keys_per_query:,.0f}", f"{one.fixed_budget:,}"
        table.add_row(f"{one.budget.mass:g}", keys, _over(one.adaptive.over_dense), fixed, _over(one.fixed.over_dense), _over(one.over_fixed))
    return table


def agreement(reference: str, rows: Sequence[tuple[str, str, int | None, Agreement]]) -> Table:
    """The table of text, pattern, budget and what `agreement` gave."""
    table = _table(f"against {reference}", ["text", "pattern"], "KL(reference || model) in nats; the same most probable next token")
    for name in ("budget", "KL", "same", "rows"):
        table.add_column(name, justify="right")
    for text, pattern, budget, found in rows:
        figures = "-" if budget is None else f"{budget:,}", f"{found.kl:.4g}", f"{found.top1:.1%}", str(len(found.kl_by_row))
        table.add_row(text, pattern, *figures, style=_style(pattern))
    return table


def retrieval(rows: Sequence[Retrieval]) -> Table:
    """The table of what `retrieve` gave."""
    caption = "Over dense: [95 % interval], paired by prompt. What dense itself finds in under 60 % doesn't count."
    table = _table("retrieval", ["task", "pattern"], caption)
    for name in ("tokens", "budget", "keys", "found", "over dense", "log p", "prompts", "counts"):
        table.add_column(name, justify="right")
    for row in rows:
        over = row.exact_over_dense
        difference = "-" if over is None else f"{over.mean:+.0%} [{over.low:+.0%}, {over.high:+.0%}]"
        budget = "-" if row.budget is None else f"mass {row.budget.mass:g}" if isinstance(row.budget, Adaptive) else f"{row.budget:,}"
        counts = "-" if row.counts is None else "yes" if row.counts else "no"
        asked = f"{row.length:,}", budget, f"{row.keys_per_query:,.0f}"
        figures = f"{row.exact:.0%}", difference, f"{row.log_prob:.2f}", str(row.prompts), counts
        table.add_row(row.task, row.pattern, *asked, *figures, style="dim" if row.counts is False else _style(row.pattern))
    return table


def _caption(other: str, row: Quality) -> str | None:
    """How the intervals of a table were made."""
    if row.windows == 1:
        return None
    over = f"{row.windows} windows" if row.independent == row.windows else f"{row.independent} documents ({row.windows} windows)"
    return f"Over {other}: [95 % interval], Student's t over {over}, paired"


def _table(title: str, names: list[str], caption: str | None = None) -> Table:
    table = Table(title=title, caption=caption)
    for name in names:
        table.add_column(name)
    return table


def _style(pattern: str) -> str | None:
    return "bold" if pattern == "dsa" else None


def _over(interval: Interval | None) -> str:
    """A difference in nats as one of perplexity, with its interval."""
    if interval is None:
        return "-"
    ends = "" if interval.low is None or interval.high is None else f" [{_percent(interval.low)}, {_percent(interval.high)}]"
    return f"{_percent(interval.mean)}{ends}"


def _percent(nats: float) -> str:
    return f"{math.expm1(nats):+.2%}" if nats < 1 else f"x {math.exp(min(nats, 700)):,.1f}"
