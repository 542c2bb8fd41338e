"""Time against length, DSA and dense, with the length from which on DSA is faster."""

from __future__ import annotations

import os
from typing import Any

from skim.bench.runner import break_even


def plot(result: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Draw the cases of `run`'s result whose attention was measured at several lengths beside dense attention.

    Raises:
        ImportError: the extra `report` is not installed.
        ValueError: no such case.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("matplotlib is needed for --plot: pip install 'skim-attention[report]'") from error
    curves = _curves(result["rows"])
    if not curves:
        raise ValueError("cases: expected one that is measured at several lengths beside dense attention (K1, say), got none to plot")
    names = list(dict.fromkeys(case for case, _ in curves))
    figure = Figure(figsize=(7, 4.5 * len(names)), layout="constrained")
    for axes, name in zip(figure.subplots(len(names), squeeze=False)[:, 0], names):
        kinds = {kind: rows for (case, kind), rows in curves.items() if case == name}
        for i, (kind, rows) in enumerate(kinds.items()):
            lengths, sparse, dense = ([row[key] for row in rows] for key in ("n", "ms", "baseline_ms"))
            if i == 0:
                axes.plot(lengths, dense, "o-", color="black", label="dense")
            axes.plot(lengths, sparse, "o-", color=f"C{i}", label=f"DSA, {kind} selections")
            even = break_even(lengths, sparse, dense)
            if even is not None:
                tokens = f"{even:,.0f} tokens{' or fewer' if even == lengths[0] else ''}"
                axes.axvline(even, color=f"C{i}", linestyle=":", label=f"faster from {tokens}")
        axes.set(title=f"{name} on {result['device']}", xlabel="tokens", ylabel="milliseconds", xscale="log", yscale="log")
        ticks = sorted({row["n"] for rows in kinds.values() for row in rows})
        axes.set_xticks(ticks, [f"{n // 1024}k" if n % 1024 == 0 else f"{n:,}" for n in ticks])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=150)


def _curves(rows: list[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Rows by case and kind, where there are several lengths of both."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        if "baseline_ms" in row and {"attention", "dense"} <= set(row.get("operations", ())) and row["mode"] == "eager":
            found.setdefault((row["case"], row["kind"]), []).append(row)
    return {key: sorted(group, key=lambda row: row["n"]) for key, group in found.items() if len(group) > 1}
