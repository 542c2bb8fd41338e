"""The tables of the retrofit's proof, and its plot, out of what `benchmarks/retrofit.py --report` wrote.

Each table is a header and rows, or None where no job has measured what it shows. `figures.py` puts them into the pages.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Result = dict[str, Any]
Table = tuple[list[str], list[list[str]]]
Lines = dict[str, list[tuple[float, float, float, float]]]  # name -> (keys, value, low, high)

NAMES = {"dsa": "DSA", "oracle": "true top-k (oracle)", "sinks": "4 sinks + window", "window": "window", "blocks": "blocks"}
STAGES = {"warmup": "the warm-up", "distill": "both stages, `distill`", "lm": "both stages, `lm`"}


def percent(value: float) -> str:
    return f"{value:+.2f} %" if abs(value) < 10 else f"{value:+,.0f} %"


def over(row: Result) -> str:
    """A difference in percent of perplexity, with its interval."""
    if row["low"] is None:
        return percent(row["percent"])
    return f"{percent(row['percent'])} ({' to '.join(percent(row[end]).removesuffix(' %') for end in ('low', 'high'))})"


def difference(row: Result, digits: int) -> str:
    """A difference with its interval."""
    mean, *ends = ("" if row[name] is None else f"{row[name]:+.{digits}f}" for name in ("mean", "low", "high"))
    return f"{mean} ({' to '.join(ends)})" if all(ends) else mean


def points(row: Result) -> str:
    """The interval of a difference of shares in points."""
    return " to ".join(f"{100 * row[end]:+.0f}" for end in ("low", "high"))


def share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


def of_case(result: Result, case: str, **more: Any) -> list[Result]:
    wanted = {"case": case, **more}
    return [row for row in result["rows"] if all(row.get(key) == value for key, value in wanted.items())]


def job(result: Result, name: str) -> Result | None:
    return next((one for one in result["jobs"] if one["job"] == name), None)


def filled(header: list[str], rows: list[list[str]]) -> Table | None:
    return (header, rows) if rows else None


def headline(result: Result) -> Table | None:
    """What the README shows: both stages, the warm-up alone, and the others, at each budget."""
    patterns = ("dsa", "oracle", "sinks", "blocks", "window")
    stages = {row["budget"]: over(row) for row in of_case(result, "R1", headline=True)}
    warm = {row["budget"]: row["over_dense"] for row in of_case(result, "R2")}
    rows = []
    for budget in sorted(stages.keys() | warm.keys(), reverse=True):
        cells = [over(warm[budget][pattern]) if budget in warm else "" for pattern in patterns]
        rows.append([str(budget), stages.get(budget, ""), *cells])
    return filled(["keys a query", "**DSA, both stages**", "**DSA, warm-up alone**", *(NAMES[pattern] for pattern in patterns[1:])], rows)


def stages(result: Result) -> Table | None:
    """R1."""
    rows = []
    for row in of_case(result, "R1"):
        loss = f"`{row['loss']}`" + (" (headline)" if row["headline"] else "")
        seeds = ", ".join(percent(value) for value in row["by_seed"])
        rows.append([loss, str(row["budget"]), over(row), over(row["beyond_twice_budget"]), seeds])
    return filled(["loss", "keys a query", "over the dense control", "where twice as many keys are visible", "by seed"], rows)


def patterns(result: Result) -> Table | None:
    """R2 and R3."""
    masses = {row["budget"]: row for row in of_case(result, "R3")}
    rows = []
    for row in sorted(of_case(result, "R2"), key=lambda row: -row["budget"]):
        mass = masses.get(row["budget"])
        kept = f"{share(mass['kept_mass'])}: {share(mass['share'])} of the oracle's" if mass else ""
        rows.append([str(row["budget"]), *(over(row["over_dense"][pattern]) for pattern in NAMES), over(row["over_oracle"]), kept])
    return filled(["keys a query", *NAMES.values(), "DSA over the oracle", "attention kept"], rows)


def domains(result: Result, budget: str) -> Table | None:
    """The loss over dense by domain and by position, after the warm-up alone."""
    found = job(result, f"patterns-{budget}")
    if found is None:
        return None
    dense = next(row for row in found["table"] if row["pattern"] == "dense")
    read = {row["pattern"]: row for row in found["table"] if row["pattern"] in NAMES}
    rows = [[domain, *(percent(row["by_domain"][domain]) for row in read.values())] for domain in next(iter(read.values()))["by_domain"]]
    for i, part in enumerate(dense["by_position"]):
        cells = [percent(100 * math.expm1(row["by_position"][i]["nll"] - part["nll"])) for row in read.values()]
        rows.append([f"positions {part['start']:,} to {part['stop']:,}", *cells])
    return filled([f"{budget} keys a query", *(NAMES[pattern] for pattern in read)], rows)


def retrieval(result: Result) -> Table | None:
    """R4: the tasks that dense reading solves."""
    found = of_case(result, "R4")
    budgets = sorted({row["budget"] for row in found}, reverse=True)
    cells = {(row["after"], task["task"], task["length"], row["budget"]): task for row in found for task in row["tasks"]}
    rows = []
    for after, task, length in dict.fromkeys(key[:3] for key in cells):
        own = {budget: cells[after, task, length, budget] for budget in budgets if (after, task, length, budget) in cells}
        some = next(iter(own.values()))
        solves = [f"{share(one['exact'])}: {points(one['exact_over_dense'])}" if (one := own.get(budget)) else "" for budget in budgets]
        rows.append([STAGES[after], f"{task}, {length:,} tokens", share(some["exact"] - some["exact_over_dense"]["mean"]), *solves])
    return filled(["after", "task", "dense", *(f"{budget} keys" for budget in budgets)], rows)


def solved(result: Result) -> Table | None:
    """What dense reading solves of every task: where it fails, no pattern can be judged."""
    found = {what: one for what in STAGES if (one := job(result, f"retrieval-{what}"))}
    tasks = dict.fromkeys((one["task"], one["length"]) for of in found.values() for one in of["dense"])
    cells = {(what, one["task"], one["length"]): one for what, of in found.items() for one in of["dense"]}
    rows = [
        [task, f"{length:,}", *(share(cells[what, task, length]["exact"]) if (what, task, length) in cells else "" for what in found)]
        for task, length in tasks
    ]
    return filled(["task", "tokens", *(f"dense reading after {STAGES[what]}" for what in found)], rows)


def scores(result: Result) -> Table | None:
    """R5."""
    rows = [[str(row["budget"]), over(row), f"{row['mass_points']:+.3f}", share(row["overlap"])] for row in of_case(result, "R5")]
    return filled(["keys a query", "perplexity, FP8 over bf16", "attention kept, points", "keys in common"], rows)


def reuse(result: Result) -> Table | None:
    """R6."""
    rows = [[str(row["layers"]), str(row["budget"]), over(row), over(row["beyond_twice_budget"])] for row in of_case(result, "R6")]
    return filled(["layers of a selection", "keys a query", "over the dense control", "where twice as many keys are visible"], rows)


def adaptive(result: Result) -> Table | None:
    """R7."""
    rows = []
    for row in of_case(result, "R7"):
        rows.append([share(row["mass"]), f"{row['keys']:.1f}", f"{row['fixed_keys']:.1f} (budget {row['fixed_budget']})", over(row)])
    return filled(["share of softmax(I)", "keys a query, mean", "fixed budget's", "perplexity over the fixed budget's"], rows)


def speed(result: Result) -> Table | None:
    """R8."""
    rows = []
    for row in of_case(result, "R8"):
        rows.append(
            [f"{row['tokens_per_second']:,.0f}", f"{row['tokens']:,.0f}", f"{row['seconds']:.0f}", f"{row['peak_gib']:.1f}", str(row["runs"])]
        )
    return filled(["tokens/s", "tokens", "seconds", "GiB", "runs (the median of)"], rows)


def agreement(result: Result) -> Table | None:
    """R9."""
    rows = []
    for row in of_case(result, "R9"):
        about = [f"`{row['loss']}`", f"{row['what']} ({row['prompts']})"]
        kl = [f"{row['sparse_kl']:.4f}", f"{row['dense_kl']:.4f}", difference(row["kl_over_control"], 4)]
        top = [share(row["sparse_top1"]), share(row["dense_top1"]), difference(row["top1_over_control"], 3)]
        rows.append([*about, *kl, *top])
    measures = [f"{name}, {kind}" for name in ("KL", "top-1") for kind in ("sparse", "dense control", "difference")]
    return filled(["loss", "prompts", *measures], rows)


def ablation(result: Result) -> Table | None:
    """Every other choice of indexer and pattern, after a warm-up alone, over the untouched model's dense reading."""
    dense = next((row for one in result["jobs"] if one["job"].startswith("patterns-") for row in one["table"] if row["pattern"] == "dense"), None)
    if dense is None:
        return None
    budgets = sorted({row["budget"] for row in result["rows"] if row["case"] in ("R1", "R2")}, reverse=True)
    rows = []
    for name, read in choices(result).items():
        cells = [percent(100 * (read[budget]["perplexity"] / dense["perplexity"] - 1)) if budget in read else "" for budget in budgets]
        masses = [share(read[budget]["kept_mass"]) if budget in read else "" for budget in budgets]
        rows.append([name, *(f"{cell} ({mass})" if mass else cell for cell, mass in zip(cells, masses))])
    return filled(["choice", *(f"{budget} keys" for budget in budgets)], rows)


def choices(result: Result) -> dict[str, dict[int, Result]]:
    """Name of a choice -> budget -> what DSA made of it."""
    jobs = {one["job"]: {row["budget"]: row for row in one["table"] if row["pattern"] == "dsa"} for one in result["jobs"] if "table" in one}
    default = "the default: 4 heads of 64 channels, every layer selects"
    found: dict[str, dict[int, Result]] = {default: {}}
    for name, read in jobs.items():
        if name.startswith("patterns-"):
            found[default] |= read
        elif name.startswith("heldout-warmup-"):
            found[f"the same from seed {name.removeprefix('heldout-warmup-')}"] = read
        elif name.startswith("indexer-"):
            heads, channels = name.removeprefix("indexer-").split("x")
            found[f"{heads} head{'s' * (heads != '1')} of {channels} channels, 300 steps"] = read
        elif name == "scores":  # its last row of a budget is of FP8 scores, and that of the next case is of the warm-up alone
            found["FP8 scores"] = read
        elif name.startswith("reuse-"):
            found[f"a selection for every {name.removeprefix('reuse-')} layers, trained so"] = read
    for row in (job(result, "settings") or {"table": []})["table"]:
        change = ", ".join(f"{name} {value}" for name, value in row["change"].items())
        found.setdefault(f"{change}, not trained for it".replace("_", " "), {})[row["budget"]] = row
    return {name: read for name, read in found.items() if read}


def search(result: Result) -> Table | None:
    """The learning rates that were tried, on the selection split."""
    rows = [
        [kind, f"`{loss}`", rate, f"{one['selection']:.4f}", f"{one['training']['tokens_per_second']:,.0f}"]
        for one in result["jobs"]
        if "selection" in one and "training" in one
        for kind, loss, rate in [one["job"].split("-", 2)]
    ]
    return filled(["model", "loss", "learning rate", "nats a token, selection split", "tokens/s of training"], rows)


def recipes(result: Result) -> Table | None:
    """Other recipes of both stages, on the selection split."""
    tried = result.get("recipes_on_the_selection_split", {"rows": []})["rows"]
    budgets = [name for name in (tried[0] if tried else ()) if name.startswith("dsa@")]
    rows = []
    for one in tried:
        changes = dict(one["changes"])
        stage = {"warmup": "warm-up", "sparse": "both"}[changes.pop("stage")]
        cells = [f"{percent(of['percent'])} ± {of['standard_error']:.2f}" for of in (one["dense"], *(one[name] for name in budgets))]
        told = ", ".join(f"{name} {value}".replace("_", " ") for name, value in changes.items())
        rows.append([stage, told or "as it is", *cells, share(one[budgets[0]]["kept_mass"])])
    return filled(["stages", "changed", "dense", *(f"{name.removeprefix('dsa@')} keys" for name in budgets), "attention kept"], rows)


TABLES: dict[str, Callable[..., Table | None]] = {
    "headline": headline,
    "stages": stages,
    "patterns": patterns,
    "domains": domains,
    "retrieval": retrieval,
    "solved": solved,
    "scores": scores,
    "reuse": reuse,
    "adaptive": adaptive,
    "speed": speed,
    "agreement": agreement,
    "ablation": ablation,
    "search": search,
    "recipes": recipes,
}


def draw(result: Result, path: Path) -> None:
    """Perplexity over dense against the budget: every pattern after the warm-up alone, and DSA after both stages."""
    from matplotlib.figure import Figure

    warm = sorted(of_case(result, "R2"), key=lambda row: row["budget"])
    lines: Lines = {name: [_point(row["budget"], row["over_dense"][pattern]) for row in warm] for pattern, name in NAMES.items()}
    trained: Lines = {"DSA, both stages, over the dense control": [_point(row["budget"], row) for row in of_case(result, "R1", headline=True)]}
    near = {"DSA, warm-up alone": lines["DSA"], NAMES["oracle"]: lines[NAMES["oracle"]]} | trained
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    for axes, title, drawn in zip(figure.subplots(1, 2), ("All patterns, the warm-up alone", "DSA and the oracle"), (lines, near)):
        _panel(axes, title, drawn)
    figure.axes[0].set_yscale("symlog", linthresh=1.0)  # a good pattern costs parts of a percent, a bad one hundreds
    figure.savefig(path)


def _point(budget: int, row: Result) -> tuple[float, float, float, float]:
    ends = [row["percent"] if row[end] is None else row[end] for end in ("low", "high")]
    return budget, row["percent"], *ends


def _panel(axes: Any, title: str, lines: Lines) -> None:
    drawn: Sequence[tuple[str, list[tuple[float, float, float, float]]]] = [(name, sorted(points)) for name, points in lines.items() if points]
    for i, (name, points) in enumerate(drawn):
        budgets, values, low, high = (list(column) for column in zip(*points))
        errors = [[v - end for v, end in zip(values, low)], [end - v for v, end in zip(values, high)]]
        axes.errorbar(budgets, values, errors, marker="o", capsize=3, color=f"C{i}", label=name)
    axes.axhline(0, color="black", linestyle=":", label="dense")
    axes.set_xscale("log", base=2)
    ticks = sorted({point[0] for _, points in drawn for point in points})
    axes.set_xticks(ticks, [f"{n:,}" for n in ticks])
    axes.minorticks_off()
    axes.set(title=title, xlabel="keys that a query reads", ylabel="perplexity over dense, %")
    axes.grid(alpha=0.3)
    axes.legend()
