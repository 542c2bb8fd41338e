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
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import proof

ROOT = Path(__file__).parent.parent
RESULTS, TARGETS = ROOT / "benchmarks/results", ROOT / "benchmarks/targets.json"
PLOTS, DRAWN_FROM = ROOT / "docs/img", ROOT / "docs/img/plots.json"
MARK = re.compile(r"(?P<open><!-- figures: (?P<name>[\w-]+)(?P<arguments>(?: [\w.-]+)*) -->\n).*?(?P<close><!-- end -->)", re.DOTALL)
GOOD = 0.7  # of a matmul's rate: what a good kernel of dense MLA decoding can be expected to reach

Result = dict[str, Any]


def results(holds: Callable[[Result], bool] = lambda result: True) -> dict[str, Result]:
    """The committed results by file name, those of which `holds`."""
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"))}
    return {name: result for name, result in found.items() if holds(result)}


def written_by(program: str) -> Callable[[Result], bool]:
    """Whether a result's command runs that program."""
    return lambda result: program in result["command"]


is_bench, is_proof = written_by("skim bench"), written_by("retrofit.py")


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
    return digits if "e" not in digits or abs(value) < 1 else f"{value:,.0f}"


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
    if "note" in result:
        lines += [f"Note: {result['note']}.", ""]
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
        times = [number(row["ms"]), peak, row.get("baseline", ""), number(row.get("baseline_ms")), number(ratio)]
        rows.append([case, row["kind"], tokens(row["n"]), *([row["error"]] + [""] * 4 if "error" in row else times)])
    return header, rows


def cases() -> str:
    """What each case of `skim bench` measures."""
    from skim.bench import describe

    return table(["case", "what"], [[name, what] for name, what in describe().items()])


def scoreboard() -> dict[str, Result]:
    """The entries of targets.json by id."""
    return {target["id"]: target for target in json.loads(TARGETS.read_text(encoding="utf-8"))}


def measured(target: Result) -> str:
    value = target["value"]
    if value is None:
        return "not measured yet"
    return _value(value)


def _value(value: Any) -> str:
    """A number, a perplexity with its interval, or several by name; what wasn't measured is left out."""
    if not isinstance(value, dict):
        return number(value)
    if "percent" in value:
        beyond = value.get("beyond_twice_budget")
        return proof.over(value) + (f", beyond {proof.over(beyond)}" if beyond else "")
    again = [name for name in value if f"{name}, with its interval and beyond 2 x budget" in value]
    return "; ".join(f"{name}: {_value(part)}" for name, part in value.items() if part is not None and name not in again)


def targets(letter: str = "") -> str:
    """Every goal whose id begins with that letter, met or not."""
    rows = []
    for target in scoreboard().values():
        met = "yes" if target["met"] else "no" if target["value"] is not None else ""
        what = target["what"] if target["unit"] is None else f"{target['what']} ({target['unit']})"
        rows.append([target["id"], what, target["goal"], measured(target), met, target["device"] or ""])
    return table(["id", "what", "goal", "measured", "met", "device"], [row for row in rows if row[0].startswith(letter)])


RETROFIT = "python benchmarks/retrofit.py --jobs"
CLAIMS: tuple[tuple[str, tuple[str, ...], str], ...] = (  # what is said of DSA, the goals that test it, the command for what isn't measured
    ("attention costs O(n·k) instead of O(n²)", ("K1", "K12"), "skim bench K12 --json FILE"),
    ("long prompts cost less", ("D2",), ""),
    ("long answers cost less", ("K3", "D3"), ""),
    ("a whole model reads long prompts faster", ("K10",), ""),
    ("caches in FP8 are good enough", ("D6",), ""),
    ('DSA "can be introduced via continued training" (DeepSeek-V3.2-Exp, section 2)', ("R1", "R2"), f"{RETROFIT} 'warmup-*,patterns-*,heldout-*'"),
    ("quality stays that of the dense model, by domain and position", ("R1",), f"{RETROFIT} 'heldout-*'"),
    ("the model doesn't lose what it learned", ("R9",), f"{RETROFIT} 'prompts,agreement-*'"),
    ("the indexer finds what the dense attention reads", ("R3",), f"{RETROFIT} 'patterns-*'"),
    ("the indexer can run in FP8", ("R5",), f"{RETROFIT} scores"),
    ("long-range retrieval survives the selection", ("R4",), f"{RETROFIT} 'retrieval-*'"),
    ("neighbouring layers can share a selection", ("R6",), f"{RETROFIT} 'reuse-*'"),
    ("quality falls where too few tokens are kept", ("R4", "R7"), f"{RETROFIT} 'retrieval-*,adaptive'"),
    ("the warm-up is cheap", ("R8",), f"{RETROFIT} warmup-0"),
)


def claims() -> str:
    """Each public claim, what was measured of it, and the command."""
    rows, board = [], scoreboard()
    for claim, ids, command in CLAIMS:
        found = [board[id] for id in ids]
        commands = dict.fromkeys(target["command"] or command for target in found)
        ours = "<br>".join(f"{target['id']}: {measured(target)}{'' if target['value'] is None else ' ' + shown(target)}" for target in found)
        rows.append([claim, ours, "<br>".join(f"`{each}`" for each in commands)])
    return table(["claim", "our number", "command"], rows)


def shown(target: Result) -> str:
    """The unit, and whether the goal was met."""
    return f"({target['unit']}; goal {'met' if target['met'] else 'missed'})"


def retrofit(name: str, *arguments: str) -> str:
    """A table of `proof.py`, of what benchmarks/retrofit.py reported."""
    found = results(is_proof)
    made = proof.TABLES[name](*found.values(), *arguments) if found else None
    return table(*made) if made else "Not measured yet.\n"


def retrofit_plot() -> str:
    """The plot of the proof, where there is something to draw."""
    return "".join(f"![Perplexity over dense against the budget, with 95 % intervals](img/{name}.svg)\n" for name in results(drawable))


def drawable(result: Result) -> bool:
    """Whether it is the proof and has patterns at a budget."""
    return is_proof(result) and bool(proof.of_case(result, "R2"))


def transfer(name: str) -> str:
    """What the warm-up's defaults and settings beside them make of other models: kept attention over the oracle's, and the loss."""
    found = results()[name]["rows"]
    settings = dict.fromkeys((row["rate"], row["init"]) for row in found)
    rows = []
    for model in dict.fromkeys(row["model"] for row in found):
        own = {(row["rate"], row["init"]): row for row in found if row["model"] == model}
        cells = [f"{100 * own[setting]['share']:.1f} %, {own[setting]['answer_loss']['dsa']:.3f}" for setting in settings]
        default = own[1.0, 1.0]
        losses = [f"{default['answer_loss'][pattern]:.3f}" for pattern in ("dense", "oracle", "window")]
        rows.append([model, str(default["width"]), f"{default['matrices_lr']:.4f}", *cells, *losses])
    names = [f"rate x {number(rate)}" if rate != 1 else f"weights x {number(init)}" if init != 1 else "**default**" for rate, init in settings]
    return table(["model", "channels", "default rate", *names, "dense", "oracle", "window"], rows)


def killed(name: str) -> str:
    """What was found after kills, and how the runs ended."""
    rows = []
    for row in results()[name]["rows"]:
        kept = f"{min(row['last_checkpoint'])} to {max(row['last_checkpoint'])} of {row['steps']}"
        wrong = [str(len(row[what])) for what in ("corrupt", "differences")]
        final = ", ".join(f"{what} {value:.6f}" for what, value in row["final"].items())
        rows.append([row["stage"], str(row["kills"]), kept, str(row["while_writing"]), str(row["runs"]), *wrong, final])
    header = ["stage", "kills", "steps that were safe", "kills while a checkpoint was written", "runs that ended"]
    return table([*header, "corrupt files", "differences from the run left alone", "both end with"], rows)


SPEED = {  # rows of the short table: what, case, mode
    "forward: scores, selection, attention": ("K1", "eager"),
    "forward and backward, with the alignment loss": ("K2", "eager"),
    "forward, attention alone": ("K4", "eager"),
    "decoding, 32 rows, CUDA graphs": ("K3", "graph"),
    "CPU, 2 cores: selection and attention": ("K9", "eager"),
}


def speed(*names: str) -> str:
    """The short table of some results of `skim bench`: milliseconds of dense attention and of DSA."""
    measured_rows = [row for name in names for row in results()[name]["rows"] if "ratio" in row]
    rows = []
    for what, (case, mode) in SPEED.items():
        found = [row for row in measured_rows if (row["case"], row.get("mode")) == (case, mode)]
        for n in sorted({row["n"] for row in found}):
            by_kind = {row["kind"]: row for row in found if row["n"] == n}
            cells = [f"{number(row['ms'])} ({number(row['ratio'])})" if (row := by_kind.get(kind)) else "" for kind in ("overlapping", "random")]
            rows.append([what, tokens(n), number(min(row["baseline_ms"] for row in by_kind.values())), *cells])
    return table(["milliseconds", "n", "dense", "DSA, overlapping (times as fast)", "DSA, random (times as fast)"], rows)


def positions(name: str, *only: str) -> str:
    """Prefill and decode of a layer by position, of a result of benchmarks/economics.py; at some positions if they are given."""
    steps = {"D2": "prefill", "D3": "decode"}
    found = [row for row in results()[name]["rows"] if row["case"] in steps and (not only or str(row["n"]) in only)]
    rows = []
    for row in sorted(found, key=lambda row: (row["case"], row["kind"])):
        times = [number(row[key]) for key in ("baseline_ms", "ms", "ratio")]
        money = [number(1000 * row[key]) for key in ("baseline_usd_per_million_tokens", "usd_per_million_tokens")]
        rows.append([steps[row["case"]], row["kind"], tokens(row["n"]), f"{row['tokens']:,}", *times, *money])
    header = ["step", "what", "position", "tokens", "dense, ms", "DSA, ms", "times as fast", "dense, USD per 10⁹ tokens", "DSA"]
    return table(header, rows)


def decoding(name: str) -> str:
    """How near the roofs dense decoding was, and what DSA would gain over a good kernel."""
    rows = []
    for row in results()[name]["rows"]:
        if row["case"] == "D3" and row["kind"] == "attention":
            memory, compute = row["baseline_memory_share"], row["baseline_compute_share"]
            rows.append(
                [tokens(row["n"]), f"{100 * memory:.0f} %", f"{100 * compute:.0f} %", number(row["ratio"]), number(row["ratio"] * compute / GOOD)]
            )
    rate = f"{100 * GOOD:.0f} %"
    return table(
        ["position", "dense: of the memory roof", "of the matmul's rate", "times as fast", f"the same, were dense at {rate} of the matmul"], rows
    )


def prompts(name: str) -> str:
    """D4 and D5 of a result of benchmarks/economics.py: a prompt at once beside transformers' layer, and one of a million tokens."""
    rows = []
    for row in results()[name]["rows"]:
        if row["case"] == "D4":
            theirs = [number(row["baseline_ms"]), f"{row['baseline_peak_mib']:,.0f}"]
            rows.append([f"a prompt of {tokens(row['n'])} tokens", number(row["ms"]), f"{row['peak_mib']:,.0f}", *theirs])
        if row["case"] == "D5":
            what = (
                f"a prompt of {tokens(row['n'])} tokens"
                if row["kind"] == "whole"
                else f"the {row['tokens']} tokens before position {tokens(row['n'])}"
            )
            rows.append([what, number(row["ms"]), f"{row['held_gb'] * 1e9 / 2**20:,.0f}", "", ""])
    return table(["the layer over", "ms", "MiB", "transformers' layer, ms", "MiB"], rows)


def rounding(name: str) -> str:
    """D6 of a result of benchmarks/economics.py: what FP8 caches change."""
    rows = [
        [
            row["kind"],
            f"{row['output_error']:.3f}",
            f"{100 * row['overlap']:.1f} %",
            str(row["beyond_bound"]),
            f"{row['output_error_own_selection']:.3f}",
        ]
        for row in results()[name]["rows"]
        if row["case"] == "D6"
    ]
    return table(["scales", "output, same keys", "keys in common", "keys beyond FP8's bound", "output, each with its own keys"], rows)


def hopper(name: str) -> str:
    """H1 to H9 of a result of benchmarks/hopper.py, beside the best hand-written kernel."""
    rows = []
    for row in results()[name]["rows"]:
        if row["case"] in HOPPER and row.get("impl", "hopper") == "hopper":
            what = [HOPPER[row["case"]], *(f"{row[key]} {key}" for key in ("heads", "queries") if key in row), row["kind"]]
            rate = row["tflops"] and number(row["tflops"])
            peer = row["ratio"] and f"{row['ratio']:.2f}"
            rows.append([row["case"], ", ".join(part for part in what if part != "-"), tokens(row["n"]), number(row["ms"]), rate or "", peer or ""])
    return table(["case", "what", "keys", "ms", "TFLOPS", "times the peer's rate"], rows)


HOPPER = {
    "H1": "prefill",
    "H2": "prefill",
    "H3": "prefill",
    "H4": "decode",
    "H5": "decode",
    "dense": "decode over all keys, 32 rows",
    "H6": "FP8 index scores",
    "H7": "top-2048",
    "H8": "index scores and top-2048",
    "H9": "backward",
}


def variants(name: str) -> str:
    """The kernel and its variants: TFLOPS, and times the peer's rate."""
    found = [row for row in results()[name]["rows"] if row["case"] == "variants" and row["ratio"]]
    columns = dict.fromkeys((row["heads"], row["n"]) for row in found)
    cells = {(row["variant"], (row["heads"], row["n"])): f"{number(row['tflops'])} ({row['ratio']:.2f})" for row in found}
    rows = [[variant, *(cells[variant, column] for column in columns)] for variant in dict.fromkeys(row["variant"] for row in found)]
    return table(["variant", *(f"{heads} heads, {tokens(n)} keys" for heads, n in columns)], rows)


TABLES: dict[str, Callable[..., str]] = {
    "sources": sources,
    "bench": bench,
    "cases": cases,
    "targets": targets,
    "claims": claims,
    "speed": speed,
    "positions": positions,
    "decoding": decoding,
    "prompts": prompts,
    "rounding": rounding,
    "hopper": hopper,
    "variants": variants,
    "retrofit": retrofit,
    "retrofit-plot": retrofit_plot,
    "transfer": transfer,
    "killed": killed,
}


def filled(text: str) -> str:
    """`text` with every table between marks made anew."""

    def fill(mark: re.Match[str]) -> str:
        made = TABLES[mark["name"]](*mark["arguments"].split())
        return f"{mark['open']}\n{made}\n{mark['close']}"

    return MARK.sub(fill, text)


def pages() -> Iterator[Path]:
    yield ROOT / "README.md"
    yield from sorted((ROOT / "docs").glob("*.md"))


# ------------------------------------------------------------------------------------------------------------ plots


def digest(result: Any) -> str:
    return hashlib.sha256(json.dumps(result, sort_keys=True).encode()).hexdigest()


def plotted() -> dict[str, str]:
    """Every plot by file name, with a digest of what it has to be drawn from; those that a benchmark drew itself are copied."""
    found = {f"{name}.svg": digest(result) for name, result in results(lambda result: is_bench(result) and several_lengths(result)).items()}
    drawn = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in RESULTS.glob("*.png")}
    proofs = {f"{name}.svg": digest(result["rows"]) for name, result in results(drawable).items()}
    return {**found, **drawn, **proofs}


def draw(name: str, path: Path) -> None:
    """Draw or copy one of `plotted`."""
    if (RESULTS / name).is_file():
        shutil.copyfile(RESULTS / name, path)
        return
    import matplotlib

    matplotlib.rcParams["svg.hashsalt"] = name  # the same file from the same data
    if Path(name).stem in results(drawable):
        proof.draw(results()[Path(name).stem], path)
    else:
        from skim.bench import plot

        plot(results()[Path(name).stem], path)


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
    for name in drawn_from.keys() - wanted.keys():
        (PLOTS / name).unlink(missing_ok=True)
    write(DRAWN_FROM, lambda path: path.write_text(json.dumps(wanted, indent=1) + "\n"))
    for page in pages():
        text = page.read_text(encoding="utf-8")
        if filled(text) != text:
            write(page, lambda path, text=text: path.write_text(filled(text), encoding="utf-8"))


if __name__ == "__main__":
    main()
