"""Texts to read, in the package and out of it."""

import pytest

from skim.evaluation.texts import first_tokens, read_text


def test_texts_in_the_package_are_long_clean_prose():
    novel = read_text("persuasion")
    assert len(novel) > 60_000 and "Anne" in novel and "<" not in novel and "Gutenberg" not in novel


def test_a_file_is_read_as_utf8(tmp_path):
    (tmp_path / "a.txt").write_text("naïve", encoding="utf-8")
    assert read_text(str(tmp_path / "a.txt")) == "naïve"


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ValueError, match="expected a file or one of persuasion, sqlite-fts5, got 'nothing'"):
        read_text("nothing")
    (tmp_path / "b.txt").write_bytes(b"abc\xff")
    with pytest.raises(ValueError, match="expected UTF-8 in .*offset 3"):
        read_text(str(tmp_path / "b.txt"))


def test_an_empty_text_is_refused():
    class Tokenizer:
        def __call__(self, text, **_):
            import torch

            return type("Encoding", (), {"input_ids": torch.zeros(1, len(text), dtype=torch.long)})

    assert first_tokens(Tokenizer(), "abcdef", 4).shape == (1, 4)
    with pytest.raises(ValueError, match="at least two tokens, got 0"):
        first_tokens(Tokenizer(), "", 4)
