"""What `skim train` does: load and convert, prepare the data, train."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from skim.config import Config
from skim.huggingface import load, load_model, use
from skim.huggingface.convert import attach
from skim.training.data import prepare
from skim.training.loop import train
from skim.training.recipe import Recipe


def run(
    stage: str,
    model_name: str,
    sources: Sequence[str],
    *,
    out: str | None = None,
    adapter: str | None = None,
    config: dict[str, Any],
    recipe: dict[str, Any],
    resume: bool = False,
    dry_run: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Train `model_name` on `sources`; see `train`.

    Args:
        out: None is skim-MODEL-STAGE here.
        adapter: indexers that the sparse stage begins with; None is what the warm-up left in its own default folder, or
            those that are shipped under the model's name.
        config: fields of `Config`; None for a default, in the sparse stage the adapter's.
        recipe: fields of `Recipe`; None for a default.
    """
    made = Recipe(stage, **{name: value for name, value in recipe.items() if value is not None})
    chosen = {name: value for name, value in config.items() if value is not None}
    first = Config(**chosen) if stage == "warmup" else None
    folder = Path(out or default_folder(model_name, stage))
    cuda = torch.cuda.is_available()
    bf16 = made.precision == "bf16" or (made.precision is None and cuda)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):  # bars of files that are converted
        model, tokenizer = load_model(model_name, dtype=torch.bfloat16 if bf16 else torch.float32)
    if first is not None:
        attach(model, first)
    else:
        load(model, adapter or _indexers(model_name))
        use(model, **chosen)
    if recipe.get("length") is None:
        longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or made.length
        made = replace(made, length=min(made.length, longest))
    rows = prepare(sources, tokenizer, made.length)
    about = {"model": model_name, "sources": [str(source) for source in sources]}
    return train(model, rows, made, out=folder, tokenizer=tokenizer, resume=resume, dry_run=dry_run, console=console, about=about)


def _indexers(model_name: str) -> str | Path:
    """Where trained indexers of a model are, if nobody says."""
    warmed = default_folder(model_name, "warmup") / "adapter"
    if warmed.is_dir():
        return warmed
    if Path(model_name).exists():  # a shipped adapter or a hub id has the model's name
        raise ValueError(f"adapter: expected trained indexers, got no --adapter and no {warmed} here; skim train warmup makes them")
    return model_name


def default_folder(model_name: str, stage: str) -> Path:
    """skim-MODEL-STAGE in the current folder."""
    return Path(f"skim-{Path(model_name).name.removesuffix('.gguf')}-{stage}")
