"""Train the indexers that Skim ships for SmolLM2-135M-Instruct, and measure them.

    python benchmarks/corpus.py build
    python benchmarks/train_smollm2.py --corpus .corpus --out smollm2-135m --json results.json

Warm-up only, the base frozen, on the train split of the corpus at 8192 tokens; a GPU of 16 GB is enough. `--split
selection` is for choosing settings, `--split heldout` is read once, for the figures of the model card.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

import skim
from skim.evaluation import evaluate
from skim.huggingface import load_model
from skim.training import Warmup, warmup


def windows(corpus: Path, split: str) -> np.ndarray:
    """Token windows `[n, 8192]` of a split."""
    return np.memmap(corpus / f"{split}.bin", dtype=np.uint16, mode="r").reshape(-1, 8192)


def domains(corpus: Path, split: str) -> list[str]:
    """The domain of each window of a split."""
    described = json.loads((corpus / "corpus.json").read_text())["splits"][split]
    return [described["documents"][document]["domain"] for document, _ in described["order"]]


def chosen(corpus: Path, split: str, one_per_document: bool) -> list[int]:
    """The windows of a split to measure on: all, or the first of each document."""
    order = json.loads((corpus / "corpus.json").read_text())["splits"][split]["order"]
    documents = [document for document, _ in order]
    return [i for i, document in enumerate(documents) if not one_per_document or document not in documents[:i]]


def measure(
    model: torch.nn.Module, corpus: Path, split: str, budgets: list[int], patterns: list[str], one_per_document: bool
) -> list[dict[str, object]]:
    """Perplexity over dense and kept mass of each pattern and budget, over all windows and by domain."""
    rows = []
    use = chosen(corpus, split, one_per_document)
    data, all_names = windows(corpus, split)[use], domains(corpus, split)
    names = [all_names[i] for i in use]
    for budget in budgets:
        losses: dict[str, list[float]] = defaultdict(list)
        masses: dict[str, list[float]] = defaultdict(list)
        for window in data:
            tokens = torch.as_tensor(window.astype(np.int64), device="cuda")[None]
            for row in evaluate(model, tokens, budget, patterns):
                losses[row.pattern].append(math.log(row.perplexity))
                masses[row.pattern].append(row.attention_mass or math.nan)
        for pattern in patterns:
            difference = np.array(losses[pattern]) - np.array(losses["dense"])
            by_domain = {name: float(np.mean([d for d, n in zip(difference, names) if n == name])) for name in sorted(set(names))}
            rows.append(
                {
                    "pattern": pattern,
                    "budget": budget,
                    "windows": len(data),
                    "perplexity": math.exp(np.mean(losses[pattern])),
                    "nll_over_dense": float(difference.mean()),
                    "nll_over_dense_ci95": float(1.96 * difference.std(ddof=1) / math.sqrt(len(data))),
                    "attention_mass": float(np.mean(masses[pattern])),
                    "nll_over_dense_by_domain": by_domain,
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    return rows


def commit() -> str | None:
    """The checkout's commit, or None outside one."""
    found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    return found.stdout.strip() or None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--steps", type=int, default=Warmup.steps)
    parser.add_argument("--lr", type=float, default=Warmup.lr)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rope-dim", type=int)
    parser.add_argument("--workspace-mb", type=int, default=4096, help="scratch memory of an operator")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--split", choices=("selection", "heldout"), default="selection")
    parser.add_argument("--one-per-document", action="store_true", help="measure on the first window of each document only")
    parser.add_argument("--budgets", type=int, nargs="+", default=[256])
    parser.add_argument("--patterns", nargs="+", default=["dense", "dsa", "oracle"])
    parser.add_argument("--evaluate-only", action="store_true", help="measure the adapter in --out instead of training one")
    args = parser.parse_args()

    model, _ = load_model(args.model, device="cuda")
    training: dict[str, object] = {}
    if args.evaluate_only:
        skim.load(model, args.out)
        skim.use(model, workspace_mb=args.workspace_mb)
    else:
        skim.convert(model, skim.Config(budget=256, index_n_heads=args.heads, rope_dim=args.rope_dim, workspace_mb=args.workspace_mb))
        recipe = Warmup(steps=args.steps, lr=args.lr, seed=args.seed)
        began = time.perf_counter()

        def report(step: int, loss: float) -> None:
            if step % 50 == 0 or step == recipe.steps - 1:
                speed = (step + 1) * 8192 / (time.perf_counter() - began)
                print(f"step {step} kl {loss:.4f} {speed:,.0f} tokens/s {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB", flush=True)

        data = [row.astype(np.int64) for row in windows(args.corpus, "train")]
        losses = warmup(model, data, recipe, report)
        seconds = time.perf_counter() - began
        skim.use(model, workspace_mb=None)
        skim.save(model, args.out)
        skim.use(model, workspace_mb=args.workspace_mb)
        training = {"steps": recipe.steps, "lr": recipe.lr, "seed": recipe.seed, "tokens": recipe.steps * 8192, "seconds": seconds}
        training["final_kl"] = float(np.mean(losses[-20:]))
    rows = measure(model, args.corpus, args.split, args.budgets, args.patterns, args.one_per_document)
    if args.json:
        result = {
            "command": "python benchmarks/train_smollm2.py " + " ".join(sys.argv[1:]),
            "commit": commit(),
            "device": torch.cuda.get_device_name(),
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "skim": skim.__version__},
            "split": args.split,
            "training": training,
            "rows": rows,
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
