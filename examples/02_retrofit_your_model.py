"""Give a model that was trained dense DSA: train indexers on its own attention, then see what reading sparsely costs.

    python examples/02_retrofit_your_model.py                 # SmolLM2, a few steps on a CPU: under a minute, barely trained
    python examples/02_retrofit_your_model.py --model Qwen/Qwen3-0.6B --data texts/ --length 8192 --steps 900 --budget 512

The second is a real run, for a GPU: `texts/` holds documents longer than `--length`. docs/retrofit.md says more. The
command line does the same: `skim train warmup`, `skim train sparse`, `skim eval`.
"""

import argparse
import tempfile
from importlib import resources
from pathlib import Path

import torch

import skim
from skim.evaluation import evaluate
from skim.evaluation.texts import first_tokens, read_text
from skim.training import Recipe, prepare, train

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="smollm2-135m", help="smollm2-135m, a folder, a hub id or a .gguf file")
parser.add_argument("--data", default=str(resources.files("skim") / "assets/texts/sqlite-fts5.txt"), help="a text, a .jsonl file or a folder of them")
parser.add_argument("--text", default="persuasion", help="what the result is measured on: another text")
parser.add_argument("--length", type=int, default=256, help="tokens of a row")
parser.add_argument("--steps", type=int, default=12, help="optimizer steps")
parser.add_argument("--budget", type=int, default=32, help="keys that each query reads")
parser.add_argument("--out", help="a new folder for the indexers and the run; without it nothing stays")
options = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
model, tokenizer = skim.load_model(options.model, dtype=torch.bfloat16 if device == "cuda" else torch.float32, device=device)
skim.convert(model, skim.Config(budget=options.budget))  # new indexers: the model stays dense, and says so

rows = prepare(options.data, tokenizer, options.length)
recipe = Recipe(stage="warmup", steps=options.steps, length=options.length, ramp=min(20, options.steps // 4))
with tempfile.TemporaryDirectory() as temporary:
    out = Path(options.out or temporary) / "warmup"
    report = train(model, rows, recipe, out=out)  # the base is frozen: only the indexers learn, from its dense attention
    print(f"KL {report['kl'][0]:.2f} -> {report['kl'][-1]:.2f} in {report['steps']} steps; {report['audit']}")

tokens = first_tokens(tokenizer, read_text(options.text), 2 * options.length).to(device)
for row in evaluate(model, tokens, options.budget, ("dense", "dsa", "sinks", "window", "oracle")):
    kept = f"keeps {row.attention_mass:.0%} of the attention" if row.attention_mass is not None else ""
    print(f"{row.pattern:<8} perplexity {row.perplexity:8.2f}   {row.keys_per_query:5.0f} keys a query   {kept}")
