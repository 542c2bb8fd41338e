"""Texts to read: those in the package, files, folders of files, or texts and chats in the lines of a file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DEMO_TEXT = "persuasion"
SUFFIXES = (".txt", ".md", ".rst")


@dataclass(frozen=True)
class Window:
    """Tokens `[1, T]` that a model reads at once, and the domain and the document (a file or a line of one) that they are from."""

    domain: str
    tokens: Tensor
    document: str | None = None


def windows(tokenizer: Any, sources: Sequence[str], size: int, count: int = 1) -> list[Window]:
    """Up to `count` windows of `size` tokens of each source, which is their domain; no window reaches over the end of a file.

    Args:
        tokenizer: of the model.
        sources: texts in the package, UTF-8 files, or folders, whose files (.txt, .md, .rst) give one window after the
            other in turn; or .jsonl files, whose lines ("text", or "messages" of a chat) give one window each.
        size: tokens in a window; a single file's first window may be shorter, and those of lines are as long as they are.
        count: windows of each source.

    Raises:
        ValueError: what can't be read, or a folder without a file long enough; by name.
    """
    found = []
    for source in sources:
        if Path(source).suffix == ".jsonl":
            found += [Window(source, tokens, f"{source}:{number}") for number, tokens in _lines(tokenizer, source, size, count)]
            continue
        folder = Path(source).is_dir()
        files = sorted(str(p) for p in Path(source).rglob("*") if p.suffix in SUFFIXES) if folder else [source]
        turns = [_pieces(tokenizer, file, size, count, whole_only=folder) for file in files]
        own: list[tuple[str, Tensor]] = []
        while turns and len(own) < count:
            pieces = [next(turn, None) for turn in turns[: count - len(own)]]
            own += [piece for piece in pieces if piece is not None]
            turns = turns[len(pieces) :] + [turn for turn, piece in zip(turns, pieces) if piece is not None]
        if not own:
            raise ValueError(f"text: expected a file ({', '.join(SUFFIXES)}) of at least {size} tokens in {source!r}, got none")
        found += [Window(source, tokens, file) for file, tokens in own]
    return found


def _lines(tokenizer: Any, source: str, size: int, count: int) -> Iterator[tuple[int, Tensor]]:
    """The first `count` lines of a .jsonl file, `[1, size]` at most, with their numbers."""
    lines = [(number, line) for number, line in enumerate(read_text(source).splitlines(), 1) if line.strip()]
    for number, line in lines[:count]:
        try:
            row = json.loads(line)
            text = row["text"] if "text" in row else tokenizer.apply_chat_template(row["messages"], tokenize=False)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f'text: expected "text" or "messages" in line {number} of {source!r}, got {line[:40]!r}: {error}') from error
        yield number, first_tokens(tokenizer, text, size)


def _pieces(tokenizer: Any, source: str, size: int, count: int, whole_only: bool) -> Iterator[tuple[str, Tensor]]:
    """A file's windows `[1, size]`, with its name; its first may be shorter unless `whole_only`."""
    text = read_text(source)
    if whole_only and len(text.encode()) < size:  # a token has a byte at least
        return
    tokens = first_tokens(tokenizer, text, size * count)
    for i, piece in enumerate(tokens.split(size, dim=1)):
        if piece.shape[1] == size or (i == 0 and not whole_only):
            yield source, piece


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
