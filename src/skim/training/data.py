"""Text to train on: read from its sources, tokenised once into a memory-mapped cache, cut into rows of one length."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

FORMAT = 1  # of the cache; a new number makes old caches be built again
TEXT, JSONL = (".txt", ".md", ".markdown"), (".jsonl",)
BATCH = 64  # documents that are tokenised together
IGNORED = -100  # the label that no loss counts


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Rows of `length` tokens, packed: documents lie one behind the other and a row ends wherever it is full.

    A row is `input_ids`, `position_ids` and `labels`, int64 `[length]`. Positions begin again with each document, which
    is how the attention keeps documents apart; a document that goes on in the next row begins again there too.
    `labels` is the token, or -100 at the first token of a document and, in chats, outside the assistant's turns.

    Args:
        folder: a cache that `tokenise` wrote.
        length: tokens of a row.

    Raises:
        ValueError: the cache holds less than one row.
    """

    def __init__(self, folder: str | os.PathLike[str], length: int) -> None:
        self.folder, self.length = Path(folder), length
        described = json.loads((self.folder / "data.json").read_text())
        self.key: str = described["key"]
        self.count: int = described["tokens"] // length
        self.starts = np.load(self.folder / "starts.npy", mmap_mode="r")
        if self.count == 0:
            raise ValueError(f"length: expected at most the {described['tokens']:,} tokens that the data has, got {length:,}; take more data or less")
        self.tokens = np.memmap(self.folder / "tokens.bin", dtype=described["dtype"], mode="r")
        self.mask = np.memmap(self.folder / "mask.bin", dtype=np.bool_, mode="r") if described["masked"] else None

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        if not 0 <= row < self.count:
            raise IndexError(f"row: expected 0 to {self.count - 1}, got {row}")
        begin, end = row * self.length, (row + 1) * self.length
        tokens = torch.from_numpy(self.tokens[begin:end].astype(np.int64))
        at = np.arange(begin, end)
        first = np.maximum(self.starts[np.searchsorted(self.starts, at, side="right") - 1], begin)
        positions = torch.from_numpy(at - first)
        counted = positions > 0
        if self.mask is not None:
            counted &= torch.from_numpy(np.array(self.mask[begin:end]))
        return {"input_ids": tokens, "position_ids": positions, "labels": torch.where(counted, tokens, IGNORED)}

    def with_length(self, length: int) -> Rows:
        """The same text in rows of another length."""
        return Rows(self.folder, length)

    def share_longer(self, budget: int) -> float:
        """Share of the tokens that see more than `budget` keys: where sparse and dense attention differ at all."""
        total = self.count * self.length
        bounds = np.union1d(self.starts[self.starts < total], np.arange(0, total, self.length))
        pieces = np.diff(np.append(bounds, total))
        return float(np.maximum(pieces - budget, 0).sum() / total)


def order(rows: int, seed: int, epoch: int) -> list[int]:
    """The order of an epoch's rows: another one in every epoch, the same again for the same seed."""
    return np.random.default_rng((seed, epoch)).permutation(rows).tolist()


def prepare(
    sources: str | os.PathLike[str] | Sequence[Any], tokenizer: Any, length: int, cache: str | os.PathLike[str] | None = None, split: str = "train"
) -> Rows:
    """Rows of `length` tokens from `sources`, tokenised now or taken from the cache.

    Args:
        sources: one or several of: a `.txt` or `.md` file (one document), a `.jsonl` file (a line is a document with
            "text", or a chat with "messages"), a folder of such files, a folder that `datasets` saved, the name of a
            dataset for `datasets.load_dataset`, or a `datasets.Dataset` with such a column.
        tokenizer: a transformers tokenizer; a fast one where there are chats.
        length: tokens of a row.
        cache: where caches are kept; None is `skim` in `$XDG_CACHE_HOME` or `~/.cache`.
        split: of a dataset that `datasets` loads.

    Raises:
        ValueError: no such source, a line that is neither a text nor a chat, or less text than one row; by name.
    """
    return Rows(tokenise(sources, tokenizer, cache, split), length)


def tokenise(
    sources: str | os.PathLike[str] | Sequence[Any], tokenizer: Any, cache: str | os.PathLike[str] | None = None, split: str = "train"
) -> Path:
    """The folder of the tokens of `sources`; see `prepare`. It is found again by the content of the sources and the tokenizer."""
    several = list(sources) if isinstance(sources, (list, tuple)) else [sources]
    if not several:
        raise ValueError("data: expected at least one source, got none")
    parts = [part for source in several for part in _parts(source, split)]
    key = _key(parts, tokenizer)
    caches = Path(cache) if cache is not None else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "skim"
    folder = caches / f"tokens-{key}"
    if folder.is_dir():
        return folder
    caches.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=caches, prefix=".writing-"))
    try:
        _write(temporary, parts, tokenizer, key)
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():  # another process was faster
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _parts(source: Any, split: str) -> list[Any]:
    """The files, or the one dataset, that a source stands for."""
    if not isinstance(source, (str, os.PathLike)):
        if not hasattr(source, "column_names"):
            raise ValueError(f"data: expected a path, a dataset's name or a datasets.Dataset, got {type(source).__name__}")
        return [source]
    path = Path(source)
    if path.is_file() and path.suffix in TEXT + JSONL:
        return [path]
    if path.is_dir():
        files: list[Any] = sorted(file for file in path.rglob("*") if file.suffix in TEXT + JSONL and file.is_file())
        if files and not _saved_by_datasets(path):
            return files
    elif path.is_file() or path.is_absolute():
        what = "a file of another kind" if path.is_file() else "nothing there"
        raise ValueError(f"data: expected {', '.join(TEXT + JSONL)}, a folder of them or a dataset, got {what}: {str(source)!r}")
    return [_dataset(path if path.is_dir() else str(source), split)]


def _saved_by_datasets(path: Path) -> bool:
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def _dataset(source: str | Path, split: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImportError("datasets is needed to read this source: pip install 'skim-attention[train]'") from error
    try:
        if isinstance(source, Path) and _saved_by_datasets(source):
            found = datasets.load_from_disk(str(source))
            return found[split] if isinstance(found, dict) else found
        return datasets.load_dataset(str(source), split=split)
    except Exception as error:
        expected = f"expected {', '.join(TEXT + JSONL)}, a folder of them, or what datasets can load"
        raise ValueError(f"data: {expected}, got {str(source)!r}: {str(error).splitlines()[0]}") from error


def _key(parts: list[Any], tokenizer: Any) -> str:
    digest = hashlib.sha256(f"{FORMAT}".encode())
    backend = getattr(tokenizer, "backend_tokenizer", None)
    what = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True) + type(tokenizer).__name__
    digest.update(what.encode())
    digest.update(str(tokenizer.chat_template).encode())
    for part in parts:
        if isinstance(part, Path):
            content = hashlib.sha256()
            with open(part, "rb") as file:
                while block := file.read(1 << 20):
                    content.update(block)
            digest.update(part.suffix.encode() + content.digest())
        else:
            digest.update(str(part._fingerprint).encode())
    return digest.hexdigest()[:16]


def _write(folder: Path, parts: list[Any], tokenizer: Any, key: str) -> None:
    """tokens.bin, starts.npy, mask.bin where there are chats, and data.json, in bounded memory."""
    dtype = np.dtype(np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32)
    starts, total, masked = [], 0, False
    with open(folder / "tokens.bin", "wb") as tokens_file, open(folder / "mask.bin", "wb") as mask_file:
        for tokens, mask in _tokenised(_documents(parts), tokenizer):
            if not tokens:
                continue
            starts.append(total)
            total += len(tokens)
            tokens_file.write(np.asarray(tokens, dtype=dtype).tobytes())
            mask_file.write(np.asarray([True] * len(tokens) if mask is None else mask, dtype=np.bool_).tobytes())
            masked |= mask is not None
    if not masked:
        (folder / "mask.bin").unlink()
    np.save(folder / "starts.npy", np.asarray(starts, dtype=np.int64))
    described = {"key": key, "tokens": total, "documents": len(starts), "dtype": dtype.name, "masked": masked}
    (folder / "data.json").write_text(json.dumps(described, indent=2) + "\n")


def _documents(parts: list[Any]) -> Iterator[str | list[dict[str, Any]]]:
    """Texts and chats, one after the other."""
    for part in parts:
        if not isinstance(part, Path):
            for number, row in enumerate(part):
                yield _document(row, f"row {number} of the dataset")
        elif part.suffix in TEXT:
            try:
                yield part.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"data: expected UTF-8, got {str(part)!r}: {error}") from error
        else:
            with open(part, encoding="utf-8") as file:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield _document(_parsed(line, part, number), f"line {number} of {part.name}")


def _parsed(line: str, part: Path, number: int) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise ValueError(f"data: expected JSON in line {number} of {part.name}, got {line[:40]!r}: {error}") from error


def _document(row: Any, where: str) -> str | list[dict[str, Any]]:
    found = row if isinstance(row, dict) else {}
    if isinstance(found.get("messages"), list) and found["messages"]:
        return found["messages"]
    if isinstance(found.get("text"), str):
        return found["text"]
    raise ValueError(f"data: expected 'text' or a list of 'messages' in {where}, got {sorted(found) if found else type(row).__name__}")


def _tokenised(documents: Iterator[str | list[dict[str, Any]]], tokenizer: Any) -> Iterator[tuple[list[int], list[bool] | None]]:
    """Token numbers of each document, and for chats which of them the assistant wrote."""
    texts: list[str] = []

    def done() -> Iterator[tuple[list[int], None]]:
        if texts:
            for tokens in tokenizer(texts, verbose=False)["input_ids"]:
                yield tokens, None
            texts.clear()

    for document in documents:
        if isinstance(document, str):
            texts.append(document)
            if len(texts) == BATCH:
                yield from done()
        else:
            yield from done()
            yield chat_tokens(document, tokenizer)
    yield from done()


def chat_tokens(messages: list[dict[str, Any]], tokenizer: Any) -> tuple[list[int], list[bool]]:
    """A chat in its template, and which tokens the assistant wrote, the end of its turn included.

    Raises:
        ValueError: no template, a slow tokenizer, or a template that writes earlier turns anew when later ones come.
    """
    if not tokenizer.chat_template:
        raise ValueError("data: expected a tokenizer with a chat template for 'messages', got one without")
    if not tokenizer.is_fast:
        raise ValueError(f"data: expected a fast tokenizer for 'messages', got {type(tokenizer).__name__}")
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    spans = []
    for i, message in enumerate(messages):
        if message.get("role") == "assistant":
            upto = tokenizer.apply_chat_template(messages[: i + 1], tokenize=False)
            before = (
                tokenizer.apply_chat_template(messages[:i], tokenize=False, add_generation_prompt=True) if i else _opening(messages, upto, tokenizer)
            )
            if not (text.startswith(before) and text.startswith(upto)):
                raise ValueError("data: expected a chat template that only adds to what came before, got one that writes earlier turns anew")
            spans.append((len(before), len(upto)))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    # Any character of the assistant's counts: its first word may be a token together with the space before it.
    mask = [any(begin < stop and at < end for begin, end in spans) for at, stop in encoded["offset_mapping"]]
    return encoded["input_ids"], mask


def _opening(messages: list[dict[str, Any]], text: str, tokenizer: Any) -> str:
    """What stands before the assistant's words in `text`, a chat that the assistant opens: templates refuse a chat of no turns."""
    prompted = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    prompt = prompted.removeprefix(text)
    return text[: text.find(prompt) + len(prompt)] if prompt in text else ""
