"""Texts to read: those in the package, or files."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DEMO_TEXT = "persuasion"


def read_text(source: str) -> str:
    """A text in the package ("persuasion", "sqlite-fts5") or a UTF-8 file.

    Raises:
        ValueError: no such text or file, or one that is not UTF-8.
    """
    shipped = resources.files("skim") / "assets" / "texts"
    path = Path(source)
    if not path.is_file():
        inside = shipped / f"{source}.txt"
        if not inside.is_file():
            names = sorted(p.name[:-4] for p in shipped.iterdir() if p.name.endswith(".txt"))
            raise ValueError(f"text: expected a file or one of {', '.join(names)}, got {source!r}")
        return inside.read_text(encoding="utf-8")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"text: expected UTF-8 in {source!r}, got a byte that is not at offset {error.start}") from error


def first_tokens(tokenizer: Any, text: str, count: int) -> Tensor:
    """The first `count` tokens of `text`, `[1, T]` (fewer if it is shorter), without special tokens.

    Raises:
        ValueError: fewer than two tokens.
    """
    # A token is rarely longer than 16 characters: the tokenizer need not see a whole library.
    tokens = tokenizer(text[: 16 * count], add_special_tokens=False, return_tensors="pt").input_ids[:, :count]
    if tokens.shape[1] < 2:
        raise ValueError(f"text: expected at least two tokens, got {tokens.shape[1]}")
    return torch.as_tensor(tokens)
