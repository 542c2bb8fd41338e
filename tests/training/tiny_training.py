"""Tokenizers and texts for tests of training: one token a letter."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

LETTERS = "abcdefghijklmnopqrstuvwxyz .,"


def tokenizer() -> Any:
    model = Tokenizer(models.WordLevel({**{letter: i for i, letter in enumerate(LETTERS)}, "?": len(LETTERS)}, unk_token="?"))
    model.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=model, eos_token="?")


def chat_tokenizer() -> Any:
    """Writes a turn as the first letter of its role, its content and a full stop."""
    made = tokenizer()
    made.chat_template = "{% for m in messages %}{{ m['role'][0] }}{{ m['content'] }}.{% endfor %}{% if add_generation_prompt %}a{% endif %}"
    return made


def write_texts(folder: Path, documents: int = 6, length: int = 300) -> Path:
    """A folder of texts that repeat their own words, so that attention has something to find."""
    folder.mkdir(parents=True, exist_ok=True)
    numbers = random.Random(0)
    for i in range(documents):
        words = ["".join(numbers.choices(LETTERS[:26], k=5)) for _ in range(8)]
        text = " ".join(numbers.choices(words, k=length // 6 + 1))
        (folder / f"{i}.txt").write_text(text[:length])
    return folder
