"""The scoreboard: what `skim bench`, `retrofit.py`, `economics.py` and `hopper.py` measured against the targets, as benchmarks/targets.json.

    python benchmarks/score.py benchmarks/results/*.json

Later files win where two hold the same measurement. A target that none of the files measures stays as it is, or has no value yet.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCOREBOARD = Path(__file__).parent / "targets.json"
ROOT = Path(__file__).parent.parent
GATHER_ROOF = 7.9e12  # bytes a second of 1 KiB rows, that K4's targets are made of
ALONE_MS = 43.0  # what K4 takes at 80 % of it if every query gathers its keys by itself
Row = dict[str, Any]


@dataclass(frozen=True)
class Clause:
    """One measured number and what it should be.

    Attributes:
        name: of the clause, unique in its target.
        where: fields of the row that holds it.
        value: the number, of that row.
        sense: ">=" or "<=".
        goal: the number to reach; None where it is only reported.
    """

    name: str
    where: Row
    value: Callable[[Row], Any]
    sense: str = ">="
    goal: float | None = None

    def met(self, value: Any) -> bool:
        return self.goal is None or (value >= self.goal if self.sense == ">=" else value <= self.goal)


@dataclass(frozen=True)
class Target:
    id: str
    what: str
    goal: str
    unit: str
    clauses: tuple[Clause, ...]


def at(case: str, n: int, kind: str = "-", **more: Any) -> Row:
    return {"case": case, "n": n, "kind": kind, **more}


def ratio(row: Row) -> float:
    return row["ratio"]


def faster_than(baseline: str) -> Callable[[Row], float]:
    """How many times as fast as that baseline, which need not be the best."""
    return lambda row: row["baselines"][baseline]["ms"] / row["ms"]


def of_dense(row: Row) -> float:
    return row["ms"] / row["baseline_ms"]


def gathered(row: Row) -> float:
    return row["tbps"] * 1e12 / GATHER_ROOF


def selections_held(row: Row) -> float:
    """Scratch memory in units of one layer's selection of 2048 int32."""
    return row["scratch_mib"] / (row["n"] * 2048 * 4 / 2**20)


def summary(row: Row) -> Row:
    """What K12 reports."""
    counts = {name: operation["count"] for name, operation in row["operations"].items()}
    dense = row["baselines"][row["baseline"]]
    return {"operations": counts, "ms": row["ms"], "peak_mib": row["peak_mib"], "dense_ms": row["baseline_ms"], "dense_peak_mib": dense["peak_mib"]}


N, M = 131072, 32768
KERNELS = (
    Target(
        "K1",
        "whole DSA attention, 32/2 heads, d=128, K=2048, forward, against the best dense SDPA",
        "n=128k: random >= 2.3, overlapping >= 5; n=32k: overlapping >= 1.5",
        "times as fast",
        (
            Clause("random, 128k", at("K1", N, "random"), ratio, ">=", 2.3),
            Clause("overlapping, 128k", at("K1", N, "overlapping"), ratio, ">=", 5.0),
            Clause("overlapping, 32k", at("K1", M, "overlapping"), ratio, ">=", 1.5),
        ),
    ),
    Target(
        "K2",
        "forward and backward of K1 with the sparse alignment loss",
        "n=128k: random >= 1.5, overlapping >= 4",
        "times as fast",
        (
            Clause("random, 128k", at("K2", N, "random"), ratio, ">=", 1.5),
            Clause("overlapping, 128k", at("K2", N, "overlapping"), ratio, ">=", 4.0),
        ),
    ),
    Target(
        "K3",
        "decode, batch 32, 128k context, one query, CUDA graphs, against the best of dense SDPA and our own all-keys split-K",
        ">= 6",
        "times as fast",
        (Clause("graph, 128k", at("K3", N, "random", mode="graph"), ratio, ">=", 6.0),),
    ),
    Target(
        "K4",
        "attend forward alone, 32/2 heads, d=128, K=2048, 128k queries",
        "random: >= 80 % of the gather roof (7.9 TB/s); overlapping: >= 2.5 times faster than 43 ms, which that roof allows without sharing",
        "share of the roof; times as fast",
        (
            Clause("random, share of the roof", at("K4", N, "random"), gathered, ">=", 0.8),
            Clause("overlapping, against 43 ms", at("K4", N, "overlapping"), lambda row: ALONE_MS / row["ms"], ">=", 2.5),
        ),
    ),
    Target(
        "K5",
        "FP8 index scores, 4096 queries, J=64, E=128, 32k keys",
        ">= 900",
        "TFLOPS",
        (Clause("32k", at("H6", M), lambda row: row["tflops"], ">=", 900.0),),  # the same measurement
    ),
    Target(
        "K6",
        "top-2048 of 4096 rows of 128k float32, ascending, tie rule",
        "<= 2.2",
        "ms",
        (Clause("128k", at("K6", N), lambda row: row["ms"], "<=", 2.2),),
    ),
    Target(
        "K7",
        "dense alignment forward and backward, 9/3 heads, d=64, against the dense attention's own",
        "32k: <= 1.8 of dense; 8k: <= 1.4 ms a layer",
        "of dense; ms",
        (
            Clause("32k, of dense", at("K7", M), of_dense, "<=", 1.8),
            Clause("8k, ms", at("K7", 8192), lambda row: row["ms"], "<=", 1.4),
        ),
    ),
    Target(
        "K8",
        "training step's attention at n=128k, K=2048, one layer: memory beyond inputs and results; 32 checkpointed layers; select among 1M keys",
        "<= 2 GB the selection included; scratch of 32 layers <= 5 selections (one, its workspace and gradients; 32 if all were held); 1M keys work",
        "GB; selections; ms",
        (
            Clause("random, GB", at("K8", N, "random"), lambda row: row["scratch_mib"] * 2**20 / 1e9, "<=", 2.0),
            Clause("overlapping, GB", at("K8", N, "overlapping"), lambda row: row["scratch_mib"] * 2**20 / 1e9, "<=", 2.0),
            Clause("32 layers at 64k, selections", at("K8-layers", 65536, "random"), selections_held, "<=", 5.0),
            Clause("1M keys, ms", at("K8-million", 1 << 20, "overlapping"), lambda row: row["ms"]),
        ),
    ),
    Target(
        "K9",
        "CPU, 2 cores, select and attend against SDPA, SmolLM2 shapes, K=512, J=4, E=64, float32",
        "8k: >= 1; 32k: >= 2.5",
        "times as fast",
        tuple(
            Clause(f"{kind}, {n // 1024}k", at("K9", n, kind), ratio, ">=", goal)
            for n, goal in ((8192, 1.0), (M, 2.5))
            for kind in ("random", "overlapping")
        ),
    ),
    Target(
        "K10",
        "Qwen3-4B shape, random weights, 128k prompt through generate: time to the first token against dense; hooks at 1k tokens",
        ">= 2.2; <= 3 % more",
        "times as fast; share",
        (
            Clause("the model's own selections", at("K10", N, "random", part="prefill"), ratio, ">=", 2.2),
            Clause("overlapping selections", at("K10", N, "overlapping", part="prefill"), ratio, ">=", 2.2),
            Clause("hooks at 1k, overhead", at("K10", 1024, "random", part="hooks"), lambda row: row["overhead"], "<=", 0.03),
        ),
    ),
    Target(
        "K11",
        "the same, decode at 128k with a static cache and graphs, against the model as it was; beside it, over all keys by Skim's own attention",
        ">= 2.5",
        "times as fast",
        (
            Clause("the model as it was", at("K11", N, "random", part="decode"), faster_than("transformers"), ">=", 2.5),
            Clause("skim.attend_dense", at("K11", N, "random", part="decode"), faster_than("skim.attend_dense")),
        ),
    ),
    Target(
        "K12",
        "n=100k with K=1000 and n=150k with K=3000: operations, time and memory, DSA and dense",
        "reported; operations as the arithmetic says",
        "operations; ms; MiB",
        tuple(Clause(f"{kind}, {n // 1000}k", at("K12", n, kind), summary) for n in (100_000, 150_000) for kind in ("random", "overlapping")),
    ),
)


def points(row: Row) -> float:
    return abs(row["mass_points"])


def size(row: Row) -> float:
    return abs(row["percent"])


def over(row: Row) -> Row:
    """A perplexity over its reference with what is reported beside it."""
    return {name: row[name] for name in ("percent", "low", "high", "beyond_twice_budget") if name in row}


def field(name: str) -> Callable[[Row], Any]:
    return lambda row: row[name]


def retrofit(case: str, **more: Any) -> Row:
    """A row of what `retrofit.py --report` wrote."""
    return {"case": case, **more}


SPARSE = (512, 0.2), (256, 0.5), (128, 1.5)  # budget, percent of perplexity
RETROFIT = (
    Target(
        "R1",
        "perplexity after both stages over the dense control, held-out windows of 8192 tokens",
        "budget 512 / 256 / 128: <= +0.2 % / +0.5 % / +1.5 %",
        "%",
        (
            *(Clause(f"{k}", retrofit("R1", headline=True, budget=k), field("percent"), "<=", goal) for k, goal in SPARSE),
            *(Clause(f"{k}, with its interval and beyond 2 x budget", retrofit("R1", headline=True, budget=k), over) for k, _ in SPARSE),
        ),
    ),
    Target(
        "R2",
        "perplexity after the warm-up alone, budget 1024 / 512 / 256 / 128",
        "not above the oracle beyond the interval; below every other pattern",
        "%: lower end of the interval over the oracle; lower end of the closest other pattern's over DSA",
        tuple(
            clause
            for k in (1024, 512, 256, 128)
            for clause in (
                Clause(f"{k}, over the oracle", retrofit("R2", budget=k), lambda row: row["over_oracle"]["low"], "<=", 0.0),
                Clause(f"{k}, closest other", retrofit("R2", budget=k), field("closest_rule"), ">=", 0.0),
            )
        ),
    ),
    Target(
        "R3",
        "kept attention mass at 512 against the oracle's",
        ">= 99.3 %",
        "share",
        (Clause("512", retrofit("R3", budget=512), field("share"), ">=", 0.993),),
    ),
    Target(
        "R4",
        "retrieval where dense reading solves 60 %, budget 256",
        "not below dense beyond the interval",
        "share solved over dense: the least upper end of the tasks' intervals",
        (
            Clause("warm-up alone", retrofit("R4", after="warmup", budget=256), field("least_high"), ">=", 0.0),
            Clause("both stages", retrofit("R4", headline=True, budget=256), field("least_high"), ">=", 0.0),
        ),
    ),
    Target(
        "R5",
        "FP8 against bf16 scores",
        "perplexity within 0.1 %, mass within 0.1 point; overlap reported",
        "%; points; share",
        tuple(
            clause
            for k in (512, 256)
            for clause in (
                Clause(f"{k}, perplexity", retrofit("R5", budget=k), size, "<=", 0.1),
                Clause(f"{k}, mass", retrofit("R5", budget=k), points, "<=", 0.1),
                Clause(f"{k}, overlap", retrofit("R5", budget=k), field("overlap")),
            )
        ),
    ),
    Target(
        "R6",
        "a selection for every 4 layers, budget 512, both stages, perplexity over the dense control",
        "<= +0.5 %",
        "%",
        (Clause("512", retrofit("R6", layers=4, budget=512), field("percent"), "<=", 0.5),),
    ),
    Target(
        "R7",
        "adaptive against fixed budget at equal average keys, the best of three shares",
        "lower perplexity, or an honest table that it doesn't pay",
        "%",
        (Clause("perplexity over the fixed budget's", retrofit("R7", headline=True), over),),
    ),
    Target(
        "R8",
        "warm-up speed at 8192 tokens, one H100; time to the shipped quality",
        ">= 150k",
        "tokens/s; s",
        (
            Clause("tokens/s", retrofit("R8"), field("tokens_per_second"), ">=", 150_000.0),
            Clause("seconds", retrofit("R8"), field("seconds")),
        ),
    ),
    Target(
        "R9",
        "agreement with the untouched model on chats and texts of at most 512 tokens, against the dense control's",
        "KL and top-1 agreement not worse than the dense control's beyond the interval",
        "nats; share: the end of the paired interval that is nearest to the goal",
        tuple(
            clause
            for what in ("chat", "text")
            for clause in (
                Clause(f"{what}, KL", retrofit("R9", headline=True, what=what), lambda row: row["kl_over_control"]["low"], "<=", 0.0),
                Clause(f"{what}, top-1", retrofit("R9", headline=True, what=what), lambda row: row["top1_over_control"]["high"], ">=", 0.0),
            )
        ),
    ),
)
MILLION = 1 << 20
ECONOMICS = (
    Target(
        "D2",
        "prefill of one full-size DeepSeek-V3.2 attention layer at position 128k, cost of a token against dense expanded attention",
        ">= 4.5",
        "times as fast",
        (Clause("layer", at("D2", N, "layer"), ratio, ">=", 4.5), Clause("attention", at("D2", N, "attention"), ratio)),
    ),
    Target(
        "D3",
        "its decode at 128k, batch 32, against our attention over all keys",
        "attention >= 5, layer >= 4; dense at >= 60 % of the memory roof",
        "times as fast; share",
        (
            Clause("attention", at("D3", N, "attention", mode="graph"), ratio, ">=", 5.0),
            Clause("layer", at("D3", N, "layer", mode="graph"), ratio, ">=", 4.0),
            Clause("dense, share of the memory roof", at("D3", N, "attention", mode="graph"), field("baseline_memory_share"), ">=", 0.6),
            Clause("dense, share of the compute roof", at("D3", N, "attention", mode="graph"), field("baseline_compute_share")),
        ),
    ),
    Target(
        "D4",
        "its prefill of 8k tokens against transformers' own layer: time, and memory beyond inputs",
        ">= 20 times as fast; <= 1/20 of the memory",
        "times as fast; times less",
        (
            Clause("time", at("D4", 8192, "layer"), ratio, ">=", 20.0),
            Clause("memory", at("D4", 8192, "layer"), field("memory_ratio"), ">=", 20.0),
        ),
    ),
    Target(
        "D5",
        "1M tokens through it in chunks of 4096, one H100",
        "runs, <= 20 GB",
        "GB; ms",
        (
            Clause("most memory held", at("D5", MILLION, "whole"), field("held_gb"), "<=", 20.0),
            Clause("most memory reserved", at("D5", MILLION, "whole"), field("reserved_gb"), "<=", 20.0),
            Clause("ms", at("D5", MILLION, "whole"), field("ms")),
        ),
    ),
    Target(
        "D6",
        "its FP8 caches (656 and 132 bytes a token) against bf16 at 32k keys, Gaussian inputs",
        "output of the same selection <= 3e-2; no differing key beyond the FP8 bound of the k-th score; overlap >= 96 %",
        "relative error; keys; share",
        tuple(
            clause
            for kind in ("float32", "ue8m0")
            for clause in (
                Clause(f"{kind}, output error", at("D6", M, kind), field("output_error"), "<=", 3e-2),
                Clause(f"{kind}, keys beyond the bound", at("D6", M, kind), field("beyond_bound"), "<=", 0),
                Clause(f"{kind}, overlap", at("D6", M, kind), field("overlap"), ">=", 0.96),
            )
        ),
    ),
)
OF_THE_PEER = "times the peer's rate"
LENGTHS = (8192, M, N)
HOPPER = (
    Target(
        "H1",
        "MLA prefill, 4096 queries, K=2048, 128 heads, against the best hand-written kernel",
        ">= 1.05 at 8k, 32k and 128k keys",
        OF_THE_PEER,
        tuple(Clause(f"{n // 1024}k", at("H1", n, "random"), ratio, ">=", 1.05) for n in LENGTHS),
    ),
    Target(
        "H2",
        "the same with 64 heads",
        ">= 1.05 at 8k, 32k and 128k keys",
        OF_THE_PEER,
        tuple(Clause(f"{n // 1024}k", at("H2", n, "random"), ratio, ">=", 1.05) for n in LENGTHS),
    ),
    Target(
        "H3",
        "the same with 16 and 32 heads, which the peer pads to 64, 8k keys",
        ">= 1.5 with 16 heads, >= 1.2 with 32",
        OF_THE_PEER,
        tuple(
            Clause(f"{heads} heads, {kind}", at("H3", 8192, kind, heads=heads, impl="hopper"), ratio, ">=", goal)
            for heads, goal in ((16, 1.5), (32, 1.2))
            for kind in ("random", "overlapping")
        ),
    ),
    Target(
        "H4",
        "MLA decode from a paged cache in 656 bytes, 128 sequences of 32k keys, K=2048, 128 heads",
        ">= 1.15 with 1 and with 2 queries",
        OF_THE_PEER,
        tuple(Clause(f"queries: {queries}", at("H4", M, "fp8", queries=queries, impl="hopper"), ratio, ">=", 1.15) for queries in (1, 2)),
    ),
    Target(
        "H5",
        "the same with 16 heads, which the peer pads to 64",
        "the peer's 0.128 ms in <= 0.085",
        OF_THE_PEER,
        (Clause("queries: 1", at("H5", M, "fp8", queries=1, impl="hopper"), ratio, ">=", 0.128 / 0.085),),
    ),
    Target(
        "H6",
        "FP8 index scores, 4096 queries, J=64",
        ">= 1.05 at 8k, 32k and 128k keys",
        OF_THE_PEER,
        tuple(Clause(f"{n // 1024}k", at("H6", n), ratio, ">=", 1.05) for n in LENGTHS),
    ),
    Target(
        "H7",
        "top-2048 of 4096 rows of scores, ascending, exact ties",
        "the peer's 0.407 and 1.56 ms in <= 0.37 and 1.4",
        OF_THE_PEER,
        (Clause("32k", at("H7", M), ratio, ">=", 0.407 / 0.37), Clause("128k", at("H7", N), ratio, ">=", 1.56 / 1.4)),
    ),
    Target(
        "H8",
        "index scores and top-k, 4096 queries, 128k keys, no matrix of scores",
        "the peer's 10.3 ms in <= 9.2",
        OF_THE_PEER,
        (Clause("128k", at("H8", N), ratio, ">=", 10.3 / 9.2),),
    ),
    Target(
        "H9",
        "MLA backward, 4096 queries from the first token on, K=2048, 128 heads",
        "the peer's 30.2 ms in <= 15",
        OF_THE_PEER,
        (Clause("8k", at("H9", 8192), ratio, ">=", 30.2 / 15),),
    ),
)
TARGETS = KERNELS + RETROFIT + ECONOMICS + HOPPER


def unmeasured(target: Target) -> Row:
    nothing = dict.fromkeys(("device", "commit", "command", "result"))
    return {"id": target.id, "what": target.what, "goal": target.goal, "value": None, "unit": target.unit, "met": False, **nothing}


def score(target: Target, results: Iterable[tuple[str, Row]]) -> Row | None:
    """The target's entry by the last result that holds each of its clauses; None if none holds any.

    A target is met if every clause was measured and holds.
    """
    values: Row = {}
    sources: dict[str, tuple[str, Row]] = {}
    for path, result in results:
        for clause in target.clauses:
            rows = [row for row in result["rows"] if all(row.get(key) == wanted for key, wanted in clause.where.items())]
            if rows and "error" not in rows[-1] and not result["quick"]:
                values[clause.name] = clause.value(rows[-1])
                sources[clause.name] = path, result
    if not values:
        return None
    met = all(clause.name in values and clause.met(values[clause.name]) for clause in target.clauses)
    ordered = {clause.name: values.get(clause.name) for clause in target.clauses}
    value = ordered if len(ordered) > 1 else next(iter(values.values()))
    told = {key: ", ".join(dict.fromkeys(str(result[key]) for _, result in sources.values())) for key in ("device", "commit", "command")}
    paths = ", ".join(dict.fromkeys(path for path, _ in sources.values()))
    return {"id": target.id, "what": target.what, "goal": target.goal, "value": value, "unit": target.unit, "met": met, **told, "result": paths}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, help="files that `skim bench`, `retrofit.py`, `economics.py` or `hopper.py` wrote")
    parser.add_argument("--out", type=Path, default=SCOREBOARD)
    arguments = parser.parse_args()
    results = [(os.path.relpath(path.resolve(), ROOT), json.loads(path.read_text())) for path in arguments.results]
    results = [(path, result) for path, result in results if "quick" in result]  # other programs write results too
    before = json.loads(arguments.out.read_text()) if arguments.out.exists() else []
    entries = {entry["id"]: entry for entry in before}
    of_an_h100_last = sorted(results, key=lambda found: "H100" in found[1]["device"])  # Hopper's goals are an H100's, whatever an H200 reaches
    for target in TARGETS:
        entry = score(target, of_an_h100_last if target in HOPPER else results)
        if entry is None:
            entries.setdefault(target.id, unmeasured(target))
        else:
            entries[target.id] = entry
            print(f"{'met   ' if entry['met'] else 'MISSED'} {target.id:<4} {entry['value']} ({target.goal})", file=sys.stderr)
    temporary = arguments.out.with_suffix(".tmp")
    ordered = [entries.pop(target.id) for target in TARGETS]
    temporary.write_text(json.dumps([*ordered, *entries.values()], indent=2) + "\n")
    os.replace(temporary, arguments.out)


if __name__ == "__main__":
    main()
