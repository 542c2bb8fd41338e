"""See which words a model reads: the strongest keys of one token in the terminal, and all of them on a page for the browser.

    python examples/04_watch_it_read.py                                     # SmolLM2 reads a novel, on a CPU
    python examples/04_watch_it_read.py --text my.txt --tokens 2048 --budget 128 --layer 20 --out page.html

`skim show` does the same from the command line, and more.
"""

import argparse

import torch

import skim
from skim.evaluation.texts import first_tokens, read_text
from skim.report import collect, measure, pieces, write_page

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--text", default="persuasion", help="a UTF-8 file, or a text in the package: persuasion, sqlite-fts5")
parser.add_argument("--tokens", type=int, default=924, help="how much of it; by default it ends inside a name that came before")
parser.add_argument("--budget", type=int, default=64, help="keys that each query reads")
parser.add_argument("--layer", type=int, default=17, help="whose keys are printed")
parser.add_argument("--out", default="what-it-read.html", help="the page")
options = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
model, tokenizer = skim.load_model("smollm2-135m", dtype=torch.bfloat16 if device == "cuda" else torch.float32, device=device)
skim.load(model, "smollm2-135m")
skim.use(model, budget=options.budget)

text = read_text(options.text)
tokens = first_tokens(tokenizer, text, options.tokens).to(device)
words = pieces(tokenizer, text, tokens.shape[1])
read = collect(model, tokens)

layer = next(layer for layer in read.layers if layer.layer == options.layer)
last = layer.read[-1]  # of the keys that are named for the last token, those that it read
strongest = sorted(zip(layer.weights[-1][last].tolist(), layer.keys[-1][last].tolist()), reverse=True)[:10]
print(f"In layer {layer.layer} the last token of ...{''.join(words[-6:])!r} reads {int(layer.counts[-1])} of {len(words)} keys, above all")
for weight, key in strongest:
    print(f"  {weight:6.1%}  {len(words) - 1 - key:5} tokens back: {''.join(words[max(0, key - 3) : key])!r} [{words[key]!r}]")

page = write_page(options.out, read, words, measure(model, tokens, read), model="smollm2-135m", text=options.text, device=device)
print(f"Everything else is on the page: {page.resolve().as_uri()}")
