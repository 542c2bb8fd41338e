"""Quality against budget, one line a pattern: perplexity over dense, fixed and adaptive budgets, and retrieval."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

from skim.evaluation.intervals import Interval
from skim.evaluation.quality import Pair, Quality
from skim.evaluation.retrieval import Retrieval
from skim.evaluation.table import PATTERNS, Adaptive

Lines = dict[str, list[tuple[float, float, float, float]]]  # pattern -> (keys, value, low, high)
ADAPTIVE = "dsa, adaptive"


def plot(
    path: str | os.PathLike[str], quality: dict[int, Sequence[Quality]], retrieval: Sequence[Retrieval] = (), pairs: Sequence[Pair] = ()
) -> None:
    """Draw what was measured, with its 95 % intervals, into an image file.

    Args:
        path: of the image; its ending says which kind.
        quality: budget -> what `summarise` gave.
        retrieval: what `retrieve` gave; tasks that dense can't do are left out.
        pairs: adaptive budgets and their equals (`pair`), drawn against the keys that a query reads on average.

    Raises:
        ImportError: the extra `report` is not installed.
        ValueError: nothing that could be drawn.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("matplotlib is needed for --plot: pip install 'skim-attention[report]'") from error
    panels = [lines for lines in (_perplexity(quality), _adaptive(quality, pairs), *_tasks(retrieval)) if lines[1]]
    if not panels:
        raise ValueError("plot: expected dense and at least one other pattern, and of tasks one that dense can do, got nothing to draw")
    figure = Figure(figsize=(7, 4.5 * len(panels)), layout="constrained")
    for axes, (title, lines, level) in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels):
        for pattern, points in lines.items():
            budgets, values, low, high = (list(column) for column in zip(*sorted(points)))
            errors = [[v - end for v, end in zip(values, low)], [end - v for v, end in zip(values, high)]]
            color = f"C{(*PATTERNS, ADAPTIVE).index(pattern)}"
            axes.errorbar(budgets, values, errors, marker="o", capsize=3, color=color, label=pattern.replace("dsa", "DSA"))
        axes.axhline(level, color="black", linestyle=":", label="dense")
        axes.set_xscale("log", base=2)
        axes.set(title=title, xlabel="keys that a query reads", ylabel="over dense, %" if level == 0 else "prompts solved")
        if level == 0:
            axes.set_yscale("symlog", linthresh=1.0)  # a good pattern costs parts of a percent, a bad one hundreds
        ticks = sorted({point[0] for points in lines.values() for point in points})
        axes.set_xticks(ticks, [f"{n:,.0f}" for n in ticks], rotation=30 if len(ticks) > 8 else 0)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=150)


def _perplexity(quality: dict[int, Sequence[Quality]]) -> tuple[str, Lines, float]:
    lines: Lines = {}
    for budget, rows in quality.items():
        for row in rows:
            if row.over_dense is not None:
                lines.setdefault(row.pattern, []).append((budget, *_percents(row.over_dense)))
    return "Perplexity", lines, 0.0


def _adaptive(quality: dict[int, Sequence[Quality]], pairs: Sequence[Pair]) -> tuple[str, Lines, float]:
    fixed = [row for rows in quality.values() for row in rows if row.pattern == "dsa"] + [one.fixed for one in pairs]
    of = {"dsa": fixed, ADAPTIVE: [one.adaptive for one in pairs]} if pairs else {}
    lines: Lines = {}
    for name, rows in of.items():
        for row in rows:
            if row.over_dense is not None:
                lines.setdefault(name, []).append((row.keys_per_query, *_percents(row.over_dense)))
    return "Perplexity, fixed and adaptive budget", lines, 0.0


def _percents(over: Interval) -> tuple[float, float, float]:
    """Mean and ends of a difference in nats as percent of perplexity."""
    value, low, high = (100 * math.expm1(over.mean if end is None else end) for end in (over.mean, over.low, over.high))
    return value, low, high


def _tasks(retrieval: Sequence[Retrieval]) -> list[tuple[str, Lines, float]]:
    panels = []
    for task, length in dict.fromkeys((row.task, row.length) for row in retrieval if row.counts):
        rows = [row for row in retrieval if (row.task, row.length) == (task, length)]
        dense = next(row.exact for row in rows if row.budget is None)
        lines: Lines = {}
        for row in rows:
            if row.budget is not None and row.exact_over_dense is not None:
                low, high = row.exact_over_dense.low, row.exact_over_dense.high
                assert low is not None and high is not None
                name = ADAPTIVE if isinstance(row.budget, Adaptive) else row.pattern
                lines.setdefault(name, []).append((row.keys_per_query, row.exact, dense + low, dense + high))
        panels.append((f"{task}, {length:,} tokens", lines, dense))
    return panels
