"""Texts to read, in the package and out of it."""

import types

import pytest
import torch

from skim.evaluation.texts import first_tokens, read_text, windows


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


def letters(text, **_):
    """A tokenizer with one token for each character."""
    return types.SimpleNamespace(input_ids=torch.tensor([[ord(letter) for letter in text]], dtype=torch.long))


def written(found) -> list[str]:
    return ["".join(chr(i) for i in window.tokens[0]) for window in found]


def test_a_file_gives_windows_one_behind_the_other(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("abcdefghij")
    assert written(windows(letters, [str(file)], 4, 5)) == ["abcd", "efgh"]  # never a part of one at the end
    assert written(windows(letters, [str(file)], 4, 1)) == ["abcd"]
    assert written(windows(letters, [str(file)], 40, 2)) == ["abcdefghij"]  # a short text is read whole


def test_a_folders_files_give_their_windows_in_turn(tmp_path):
    for name, content in {"a.txt": "aaaAAA1", "deep/b.md": "bbb", "c.rst": "cccCCC", "d.txt": "dd", "e.png": "eeeeee"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    assert written(windows(letters, [str(tmp_path)], 3, 2)) == ["aaa", "ccc"]
    assert written(windows(letters, [str(tmp_path)], 3, 4)) == ["aaa", "ccc", "bbb", "AAA"]
    assert written(windows(letters, [str(tmp_path)], 3, 9)) == ["aaa", "ccc", "bbb", "AAA", "CCC"]
    with pytest.raises(ValueError, match=r"expected a file \(.txt, .md, .rst\) of at least 30 tokens in"):
        windows(letters, [str(tmp_path)], 30)


def test_a_window_knows_its_document(tmp_path):
    for name, content in {"a.txt": "aaaAAA", "b.txt": "bbb"}.items():
        (tmp_path / name).write_text(content)
    found = windows(letters, [str(tmp_path), str(tmp_path / "b.txt")], 3, 3)
    assert [window.document for window in found] == [str(tmp_path / name) for name in ("a.txt", "b.txt", "a.txt", "b.txt")]


class Chatting:
    """A tokenizer of letters with a chat template."""

    def __call__(self, text, **_):
        return letters(text)

    def apply_chat_template(self, messages, tokenize):
        return "".join(f"<{message['role']}>{message['content']}" for message in messages)


def test_a_line_is_a_document(tmp_path):
    file = tmp_path / "chats.jsonl"
    file.write_text('{"text": "abcdef"}\n\n{"messages": [{"role": "user", "content": "hi"}]}\n{"text": "never read"}\n')
    found = windows(Chatting(), [str(file)], 5, 2)
    assert written(found) == ["abcde", "<user"] and [window.document for window in found] == [f"{file}:1", f"{file}:3"]
    file.write_text('{"text": "abcdef"}\n{"title": "x"}\n')
    with pytest.raises(ValueError, match=r'text: expected "text" or "messages" in line 2 of .*title'):
        windows(Chatting(), [str(file)], 5, 2)


def test_each_source_is_a_domain(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name * 8)
    sources = [str(tmp_path / "b.txt"), str(tmp_path / "a.txt")]
    assert [window.domain for window in windows(letters, sources, 4, 2)] == [sources[0]] * 2 + [sources[1]] * 2
