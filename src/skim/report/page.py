"""The page: one file that loads nothing, whatever stands in the text.

The text travels as JSON in a block that no browser executes, with every `<` escaped; the script writes it as text only.
The page's own policy allows its one script and its one style sheet, by their hashes, and no other source of anything.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from skim.report.collector import MISSED, WANTED, LayerRead, TextRead, cell_size
from skim.report.cost import Cost
from skim.report.encode import encode

BINS = 64  # positions of the text that kept mass is averaged over, at most


def write_page(
    path: str | os.PathLike[str],
    read: TextRead,
    pieces: Sequence[str],
    cost: Sequence[Cost],
    *,
    model: str,
    text: str,
    device: str,
    quality: dict[str, Any] | None = None,
) -> Path:
    """Write what a model read of a text as one HTML file.

    Args:
        path: of the file.
        read: what `collect` gave.
        pieces: the text of each token.
        cost: of dense reading and of DSA.
        model, text, device: their names.
        quality: what `quality_of` made of an evaluation, if there is one.

    Returns:
        Where it is.

    Raises:
        ImportError: the extra `report` is not installed.
        ValueError: a number of pieces that is not that of the tokens.
    """
    try:
        import jinja2
    except ImportError as error:
        raise ImportError("jinja2 is needed for the page: pip install 'skim-attention[report]'") from error
    if len(pieces) != len(read.visible):
        raise ValueError(f"pieces: expected {len(read.visible)}, one a token, got {len(pieces)}")
    template, script, style = (_asset(name) for name in ("page.html", "page.js", "page.css"))
    query = torch.arange(len(pieces))
    html = (
        jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
        .from_string(template)
        .render(
            model=model,
            text=text,
            device=device,
            version=metadata.version("skim-attention"),
            tokens=len(pieces),
            budget=read.budget,
            dense=read.stride == 1,
            layers=[encode(layer, query) for layer in read.layers],
            data=_json(_data(read, pieces, quality)),
            cost=[asdict(row) | {"pattern": _label(row.pattern)} for row in cost],
            cost_sentence=_cost_sentence(read),
            memory=all(row.peak_mib is not None for row in cost),
            quality=quality,
            script=script,
            style=style,
            script_hash=_hash(script),
            style_hash=_hash(style),
        )
    )
    return _write(Path(path), html)


def pieces(tokenizer: Any, text: str, count: int) -> list[str]:
    """The text of the first `count` tokens; joined they are the text. A character of several tokens is the first one's.

    Raises:
        ValueError: a tokenizer that doesn't say where its tokens are.
    """
    if not tokenizer.is_fast:
        raise ValueError(f"tokenizer: expected one that gives offsets (a fast one), got {type(tokenizer).__name__}")
    ends = [end for _, end in tokenizer(text, add_special_tokens=False, return_offsets_mapping=True).offset_mapping[:count]]
    return [text[min(before, end) : end] for before, end in zip([0, *ends], ends)]


def quality_of(evaluation: dict[str, Any]) -> dict[str, Any]:
    """Perplexity over dense by pattern and budget, from what `skim eval --json` wrote: a plot's lines, in percent, and a table's cells.

    Raises:
        ValueError: it has no perplexity over dense.
    """
    overall = [entry for entry in evaluation.get("overall", []) if any(row["over_dense"] for row in entry["rows"])]
    if not overall:
        raise ValueError("eval: expected what `skim eval --json` writes with the patterns dense and another, got no perplexity over dense")
    lines: dict[str, dict[int, tuple[float | None, ...]]] = {}
    for entry in overall:
        for row in entry["rows"]:
            if row["over_dense"] is not None:
                ends = (row["over_dense"][name] for name in ("mean", "low", "high"))
                lines.setdefault(row["pattern"], {})[entry["budget"]] = tuple(None if end is None else 100 * math.expm1(end) for end in ends)
    budgets = sorted({budget for points in lines.values() for budget in points})
    texts = ", ".join(dict.fromkeys(entry["text"] for entry in evaluation["results"]))
    about = f"{evaluation['model']} with {texts}, {overall[0]['windows']} window{'s' * (overall[0]['windows'] != 1)}"
    shown = [
        {
            "pattern": _label(pattern),
            "points": [[budget, *points[budget]] for budget in budgets if budget in points],
            "cells": [_cell(points.get(budget)) for budget in budgets],
        }
        for pattern, points in lines.items()
    ]
    return {"about": about, "budgets": budgets, "lines": shown}


def _asset(name: str) -> str:
    return (resources.files("skim") / "assets" / "report" / name).read_text(encoding="utf-8")


def _hash(source: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()


def _json(value: Any) -> str:
    """JSON that can stand in an HTML element: it holds neither `<` nor anything beyond ASCII."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _data(read: TextRead, pieces: Sequence[str], quality: dict[str, Any] | None) -> dict[str, Any]:
    layers = [_layer(layer, read) for layer in read.layers]
    kept = [value for layer in layers for value in layer["bins"][0] if value is not None]
    return {
        "pieces": list(pieces),
        "budget": read.budget,
        "stride": read.stride,
        "dense": read.stride == 1,
        "wanted": WANTED,
        "missed": MISSED,
        "cell": cell_size(len(pieces)),
        "first": len(pieces) * 3 // 4,
        "layers": layers,
        "least": min(kept, default=0.0) * 0.98,
        "agreement": [[_number(value) for value in row] for row in read.agreement.tolist()],
        "chance": _number(read.chance),
        "budgets": quality["budgets"] if quality else [],
        "quality": [{"pattern": line["pattern"], "points": line["points"]} for line in quality["lines"]] if quality else [],
    }


def _layer(layer: LayerRead, read: TextRead) -> dict[str, Any]:
    """What the page knows of a layer before it unpacks it: means over queries that see more keys than they may read."""
    longer = read.visible[:: read.stride] > read.budget
    edges = torch.linspace(0, len(longer), min(BINS, len(longer)) + 1).long().tolist()
    bins = [[_mean(row[a:b][longer[a:b]]) for a, b in zip(edges, edges[1:])] for row in layer.kept]
    means = [_mean(row[longer]) for row in layer.kept]
    return {"number": layer.layer, "reads": _mean(layer.counts), "kept": means, "bins": bins, "neighbours": _number(layer.neighbours)}


def _mean(values: Tensor) -> float | None:
    return _number(float(values.double().mean())) if values.numel() else None


def _number(value: float | None) -> float | None:
    """Four digits; None for what JSON has no number for."""
    return None if value is None or math.isnan(value) else float(f"{value:.4g}")


def _cost_sentence(read: TextRead) -> str:
    keys = float(torch.stack([layer.counts for layer in read.layers]).double().mean())
    seen = float(read.visible.double().mean())
    said = f"A query reads {keys:,.0f} keys of the {seen:,.0f} that it sees, on average ({keys / seen:.0%}). "
    said += "Before that the indexer scores all that it sees, with its few small heads."
    if read.full:
        said += f" Layers {', '.join(map(str, read.full))} read everything and are not shown."
    return said


def _label(pattern: str) -> str:
    return "DSA" if pattern == "dsa" else pattern


def _cell(point: tuple[float | None, ...] | None) -> str:
    if point is None:
        return "–"
    mean, low, high = point
    ends = "" if low is None or high is None else f" [{low:+.2f}, {high:+.2f}]"
    return f"{mean:+.2f} %{ends}"


def _write(path: Path, html: str) -> Path:
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".writing-") as temporary:
        written = Path(temporary) / path.name
        written.write_text(html, encoding="utf-8")
        os.replace(written, path)
    return path
