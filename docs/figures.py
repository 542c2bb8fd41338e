"""Fills the tables between the marks `<!-- figures: NAME -->` and `<!-- end -->` of README.md and docs/*.md from the
committed results, and draws the plots that they show. A figure that nobody types can't drift from its measurement.

    python docs/figures.py

tests/test_docs.py fails where a table or a plot is not what the results say.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS, TARGETS = ROOT / "benchmarks/results", ROOT / "benchmarks/targets.json"
PLOTS, DRAWN_FROM = ROOT / "docs/img", ROOT / "docs/img/plots.json"
MARK = re.compile(r"(?P<open><!-- figures: (?P<name>[\w-]+)(?: (?P<argument>[\w.-]+))? -->\n).*?(?P<close><!-- end -->)", re.DOTALL)

Result = dict[str, Any]


def results(holds: Callable[[Result], bool] = lambda result: True) -> dict[str, Result]:
    """The committed results by file name, those of which `holds`."""
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"))}
    return {name: result for name, result in found.items() if holds(result)}


def is_bench(result: Result) -> bool:
    """Whether `skim bench` wrote it."""
    return all("case" in row and "kind" in row for row in result.get("rows", [{}]))


def is_quality(result: Result) -> bool:
    """Whether benchmarks/train_smollm2.py wrote it."""
    return all("nll_over_dense" in row for row in result.get("rows", [{}]))


def several_lengths(result: Result) -> bool:
    """Whether it has something to plot against length."""
    lengths = {(row["case"], row["n"]) for row in result["rows"] if "baseline_ms" in row and "dense" in row.get("operations", ())}
    return len(lengths) > len({case for case, _ in lengths})


# ----------------------------------------------------------------------------------------------------------- tables


def table(header: list[str], rows: list[list[str]]) -> str:
    return "".join(f"| {' | '.join(row)} |\n" for row in [header, ["---"] * len(header), *rows])


def number(value: float | None) -> str:
    """Three significant digits."""
    if value is None:
        return ""
    digits = f"{value:.3g}"
    return digits if "e" not in digits else f"{value:,.0f}"


def tokens(n: int) -> str:
    return f"{n // 1024}k" if n % 1024 == 0 else f"{n:,}"


def sources() -> str:
    """Every result file: where it was measured, on which commit, and by which command."""
    rows = [
        [f"`{name}.json`", str(result.get("device", "")), f"`{str(result.get('commit', ''))[:7]}`", f"`{result['command']}`"]
        for name, result in results().items()
    ]
    return table(["file in `benchmarks/results`", "device", "commit", "command"], rows)


def bench() -> str:
    """A section for each result of `skim bench`: a plot if there is one, all rows, the command."""
    return "\n".join(_bench(name, result) for name, result in results(is_bench).items())


def _bench(name: str, result: Result) -> str:
    versions = ", ".join(f"{package} {version}" for package, version in result["versions"].items() if version)
    lines = [f"### {name}", "", f"{result['device']}; {versions}.", ""]
    if several_lengths(result):
        lines += [f"![Time against length, {name}](img/{name}.svg)", ""]
    return "\n".join([*lines, f"    {result['command']}", "", table(*_rows(result))])


def _rows(result: Result) -> tuple[list[str], list[list[str]]]:
    header = ["case", "selections", "n", "ms", "peak MiB", "compared with", "its ms", "times as fast"]
    rows = []
    for row in result["rows"]:
        case = " ".join(part for part in (row["case"], row.get("part"), "graph" if row.get("mode") == "graph" else None) if part)
        peak = "" if row.get("peak_mib") is None else f"{row['peak_mib']:,.0f}"
        ratio = row["baseline_ms"] / row["ms"] if "baseline_ms" in row else None
        measured = [number(row["ms"]), peak, row.get("baseline", ""), number(row.get("baseline_ms")), number(ratio)]
        rows.append([case, row["kind"], tokens(row["n"]), *([row["error"]] + [""] * 4 if "error" in row else measured)])
    return header, rows


def cases() -> str:
    """What each case of `skim bench` measures."""
    from skim.bench import describe

    return table(["case", "what"], [[name, what] for name, what in describe().items()])


def targets() -> str:
    """Every goal, met or not."""
    rows = []
    for target in json.loads(TARGETS.read_text(encoding="utf-8")):
        value = target["value"]
        measured = "; ".join(f"{name}: {number(part)}" for name, part in value.items()) if isinstance(value, dict) else number(value)
        met = "yes" if target["met"] else "no" if value is not None else "not measured"
        what = target["what"] if target["unit"] is None else f"{target['what']} ({target['unit']})"
        rows.append([target["id"], what, target["goal"], measured, met, target["device"] or ""])
    return table(["id", "what", "goal", "measured", "met", "device"], rows)


def quality(name: str | None = None) -> str:
    """A section for each result of quality: every pattern's loss over dense, the command. With a name that result's table alone."""
    if name is not None:
        return _quality_table(results()[name])
    return "\n".join(_quality(name, result) for name, result in results(is_quality).items())


def _quality(name: str, result: Result) -> str:
    about = f"Split {result['split']}, {result['rows'][0]['windows']} windows; {result['device']}."
    return "\n".join([f"### {name}", "", about, "", f"    {result['command']}", "", _quality_table(result)])


def _quality_table(result: Result) -> str:
    rows = [_quality_row(row) for row in sorted(result["rows"], key=lambda row: row["nll_over_dense"])]
    return table(["keys a query", "pattern", "perplexity", "loss over dense, nats (95 %)", "kept attention"], rows)


def _quality_row(row: Result) -> list[str]:
    dense = row["pattern"] == "dense"
    over = "0" if dense else f"+{row['nll_over_dense']:.4f} ± {row['nll_over_dense_ci95']:.4f}"
    label = {"dsa": "**DSA**", "sinks": "4 sinks + window", "oracle": "true top-k (oracle)"}.get(row["pattern"], row["pattern"])
    return ["all" if dense else str(row["budget"]), label, f"{row['perplexity']:.2f}", over, f"{100 * row['attention_mass']:.1f} %"]


SPEED = {  # rows of the short table: what, case, mode
    "forward: scores, selection, attention": ("K1", "eager"),
    "forward and backward, with the alignment loss": ("K2", "eager"),
    "forward, attention alone": ("K4", "eager"),
    "decoding, 32 rows, CUDA graphs": ("K3", "graph"),
    "CPU, 2 cores: selection and attention": ("K9", "eager"),
}


def speed(name: str) -> str:
    """The short table of one result of `skim bench`: milliseconds of dense attention and of DSA."""
    rows = []
    for what, (case, mode) in SPEED.items():
        found = [row for row in results()[name]["rows"] if (row["case"], row.get("mode")) == (case, mode) and "ratio" in row]
        for n in dict.fromkeys(row["n"] for row in found):
            by_kind = {row["kind"]: row for row in found if row["n"] == n}
            cells = [f"{number(row['ms'])} ({number(row['ratio'])})" if (row := by_kind.get(kind)) else "" for kind in ("overlapping", "random")]
            rows.append([what, tokens(n), number(min(row["baseline_ms"] for row in by_kind.values())), *cells])
    return table(["milliseconds", "n", "dense", "DSA, overlapping (times as fast)", "DSA, random (times as fast)"], rows)


TABLES: dict[str, Callable[..., str]] = {
    "sources": sources,
    "bench": bench,
    "cases": cases,
    "targets": targets,
    "quality": quality,
    "speed": speed,
}


def filled(text: str) -> str:
    """`text` with every table between marks made anew."""

    def fill(mark: re.Match[str]) -> str:
        made = TABLES[mark["name"]](*([mark["argument"]] if mark["argument"] else []))
        return f"{mark['open']}\n{made}\n{mark['close']}"

    return MARK.sub(fill, text)


def pages() -> Iterator[Path]:
    yield ROOT / "README.md"
    yield from sorted((ROOT / "docs").glob("*.md"))


# ------------------------------------------------------------------------------------------------------------ plots


def digest(result: Any) -> str:
    return hashlib.sha256(json.dumps(result, sort_keys=True).encode()).hexdigest()


def plotted() -> dict[str, str]:
    """Every plot by file name, with a digest of what it has to be drawn from."""
    found = {f"{name}.svg": digest(result) for name, result in results(lambda result: is_bench(result) and several_lengths(result)).items()}
    return {**found, "quality.svg": digest(results(is_quality))}


def draw(name: str, path: Path) -> None:
    """Draw one of `plotted`."""
    import matplotlib

    matplotlib.rcParams["svg.hashsalt"] = name  # the same file from the same data
    if name == "quality.svg":
        _draw_quality(path)
    else:
        from skim.bench import plot

        plot(results()[Path(name).stem], path)


def _draw_quality(path: Path) -> None:
    """Loss over dense of each pattern, domain by domain."""
    from matplotlib.figure import Figure

    found = results(is_quality)
    figure = Figure(figsize=(8, 2.6 * len(found)), layout="constrained")
    for axes, (name, result) in zip(figure.subplots(len(found), squeeze=False)[:, 0], found.items()):
        rows = [row for row in result["rows"] if row["pattern"] != "dense"]
        domains = list(rows[0]["nll_over_dense_by_domain"])
        for i, row in enumerate(rows):
            places = [at + 0.25 * (i - (len(rows) - 1) / 2) for at in range(len(domains) + 1)]
            heights = [row["nll_over_dense"], *(row["nll_over_dense_by_domain"][domain] for domain in domains)]
            axes.bar(places, heights, width=0.22, color=f"C{('dsa', 'oracle', 'sinks').index(row['pattern'])}", label=row["pattern"])
        axes.set_xticks(range(len(domains) + 1), ["all", *domains])
        axes.set(title=f"{name}: {rows[0]['budget']} keys a query", ylabel="loss over dense, nats")
        axes.grid(alpha=0.3, axis="y")
        axes.legend()
    figure.savefig(path)


def write(path: Path, create: Callable[[Path], Any]) -> None:
    """Have `create` write a file under a temporary name, then rename it."""
    temporary = path.with_name(f".writing-{path.name}")
    create(temporary)
    os.replace(temporary, path)


def main() -> None:
    drawn_from = json.loads(DRAWN_FROM.read_text()) if DRAWN_FROM.is_file() else {}
    wanted = plotted()
    PLOTS.mkdir(exist_ok=True)
    for name in wanted:
        if drawn_from.get(name) != wanted[name] or not (PLOTS / name).is_file():
            write(PLOTS / name, lambda path, name=name: draw(name, path))
    write(DRAWN_FROM, lambda path: path.write_text(json.dumps(wanted, indent=1) + "\n"))
    for page in pages():
        text = page.read_text(encoding="utf-8")
        if filled(text) != text:
            write(page, lambda path, text=text: path.write_text(filled(text), encoding="utf-8"))


if __name__ == "__main__":
    main()
