"""The command run as a user runs it, and folders of a tiny model for it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import transformers
from tiny_model import converted
from tokenizers import Tokenizer, models, pre_tokenizers

import skim
from skim import cli


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Exit code of `skim ARGUMENTS`."""
    monkeypatch.setattr(sys, "argv", ["skim", *arguments])
    level = transformers.logging.get_verbosity()
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    transformers.logging.set_verbosity(level)
    return int(stopped.value.code or 0)


def write_tiny(folder: Path, letters: str, unknown: str = "?", model: Any = None) -> tuple[str, str]:
    """Folders of a tiny model with a tokenizer of these letters, and of an adapter for it."""
    model = converted() if model is None else model
    skim.save(model, folder / "adapter")
    skim.revert(model).save_pretrained(folder / "model")
    words = {letter: i for i, letter in enumerate(letters)}
    tokenizer = Tokenizer(models.WordLevel({**words, unknown: len(words)}, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=unknown).save_pretrained(folder / "model")
    return str(folder / "model"), str(folder / "adapter")
