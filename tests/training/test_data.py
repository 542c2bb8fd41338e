"""Data: every source gives the same rows, caches are whole or not there, documents stay apart."""

import json

import numpy as np
import pytest
import torch
import transformers
from tiny_training import chat_tokenizer, tokenizer
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from skim.training import data
from skim.training.data import Rows, chat_tokens, order, prepare, tokenise

TEXTS = ["the cat sat on the mat", "a dog", "and so on and so forth until the end of it"]


def letters(tokens):
    return tokenizer().decode(tokens).replace(" ", "")


@pytest.fixture
def sources(tmp_path):
    """The same three texts as files and as jsonl."""
    folder = tmp_path / "texts"
    (folder / "deep").mkdir(parents=True)
    for name, text in zip(("a.txt", "b.md", "deep/c.txt"), TEXTS):
        (folder / name).write_text(text)
    (folder / "ignored.pdf").write_text("nothing")
    lines = tmp_path / "texts.jsonl"
    lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return folder, lines


def test_files_jsonl_and_datasets_give_the_same_rows(sources, tmp_path):
    datasets = pytest.importorskip("datasets")
    folder, lines = sources
    saved = tmp_path / "saved"
    made = datasets.Dataset.from_dict({"text": TEXTS})
    made.save_to_disk(str(saved))
    found = [prepare(source, tokenizer(), 16, tmp_path / "cache") for source in (folder, str(lines), [folder], made, saved)]
    assert len({len(rows) for rows in found}) == 1 and len(found[0]) == len("".join(TEXTS)) // 16
    for rows in found[1:]:
        for i in range(len(rows)):
            for name, value in rows[i].items():
                assert torch.equal(value, found[0][i][name])


def test_documents_begin_at_position_0_and_their_first_token_is_no_label(sources, tmp_path):
    rows = prepare(sources[1], tokenizer(), 16, tmp_path)
    text = "".join(TEXTS)
    starts = {0, len(TEXTS[0]), len(TEXTS[0] + TEXTS[1])}
    for i in range(len(rows)):
        row, at = rows[i], range(16 * i, 16 * i + 16)
        assert row["input_ids"].tolist() == tokenizer()(text[at[0] : at[-1] + 1])["input_ids"]
        expected = [n - max(s for s in starts | {at[0]} if s <= n) for n in at]
        assert row["position_ids"].tolist() == expected
        assert row["labels"].tolist() == [-100 if p == 0 else t for p, t in zip(expected, row["input_ids"].tolist())]


@pytest.mark.parametrize("length", [8, 16, 21])
@pytest.mark.parametrize("budget", [1, 5, 20])
def test_the_share_of_queries_beyond_the_budget_is_counted_exactly(sources, tmp_path, length, budget):
    rows = prepare(sources[1], tokenizer(), length, tmp_path)
    positions = torch.cat([rows[i]["position_ids"] for i in range(len(rows))])
    assert rows.share_longer(budget) == pytest.approx(float((positions + 1 > budget).float().mean()))


def test_the_cache_is_used_again_until_a_source_or_the_tokenizer_changes(sources, tmp_path, monkeypatch):
    folder, _ = sources
    first = tokenise(folder, tokenizer(), tmp_path / "cache")
    written = []
    write = data._write
    monkeypatch.setattr(data, "_write", lambda *args: (written.append(args), write(*args)))
    assert tokenise(folder, tokenizer(), tmp_path / "cache") == first and not written
    assert Rows(first, 8).key == Rows(first, 16).key
    other = tokenise(folder, chat_tokenizer(), tmp_path / "cache")
    (folder / "a.txt").write_text("something else")
    changed = tokenise(folder, tokenizer(), tmp_path / "cache")
    assert len({first, other, changed}) == 3 and len(written) == 2


def test_what_is_cut_off_leaves_nothing_behind(sources, tmp_path, monkeypatch):
    def fails(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(data.json, "dumps", fails)
        with pytest.raises(KeyboardInterrupt):
            tokenise(sources[0], tokenizer(), tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())
    assert len(prepare(sources[0], tokenizer(), 16, tmp_path / "cache"))


def test_large_vocabularies_are_kept_whole(sources, tmp_path):
    wide = tokenizer()
    wide.add_tokens([f"<{i}>" for i in range(70_000)])
    (tmp_path / "x.txt").write_text("a<69999>b")
    rows = prepare(tmp_path / "x.txt", wide, 3, tmp_path)
    assert rows.tokens.dtype == np.uint32
    assert rows[0]["input_ids"][1] == wide.convert_tokens_to_ids("<69999>") > 1 << 16


def test_a_chat_counts_what_the_assistant_wrote_with_the_end_of_its_turn():
    messages = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "good day"},
        {"role": "user", "content": "bye"},
        {"role": "assistant", "content": "so long"},
    ]
    tokens, mask = chat_tokens(messages, chat_tokenizer())
    assert letters(tokens) == "uhello.agoodday.ubye.asolong."
    assert letters([t for t, m in zip(tokens, mask) if m]) == "goodday.solong."


def test_a_chat_that_the_assistant_opens_counts_its_words_alone():
    tokens, mask = chat_tokens([{"role": "assistant", "content": "hello"}, {"role": "user", "content": "bye"}], chat_tokenizer())
    assert letters(tokens) == "ahello.ubye."
    assert letters([t for t, m in zip(tokens, mask) if m]) == "hello."


def test_the_first_word_counts_though_it_is_a_token_with_the_space_before_it():
    made = Tokenizer(models.WordLevel({"u:": 0, " hi": 1, " a:": 2, " yes": 3, "?": 4}, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?\S+"), "isolated")
    spaced = transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="?")
    turns = "{% for m in messages %}{{ ' ' if not loop.first }}{{ m['role'][0] }}: {{ m['content'] }}{% endfor %}"
    spaced.chat_template = turns + "{% if add_generation_prompt %} a: {% endif %}"
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    assert chat_tokens(chat, spaced) == ([0, 1, 2, 3], [False, False, False, True])


def test_chats_and_texts_in_one_file(tmp_path):
    lines = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}, {"text": "plain"}]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, lines)))
    rows = prepare(tmp_path / "x.jsonl", chat_tokenizer(), 14, tmp_path)
    labels = rows[0]["labels"].tolist()
    assert letters([t for t in labels if t >= 0]) == "yes.lain"
    assert len(rows[0]["input_ids"]) == len("uhi.ayes.plain")


def test_epochs_are_shuffled_anew_and_repeatably():
    assert sorted(order(50, 3, 0)) == list(range(50))
    assert order(50, 3, 0) == order(50, 3, 0)
    assert len({tuple(order(50, seed, epoch)) for seed in (3, 4) for epoch in (0, 1)}) == 4


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", '{"text": "a"}\n{"body": 1}', r"data: expected 'text' or a list of 'messages' in line 2 of x.jsonl, got \['body'\]"),
        ("x.jsonl", "[1]", "expected 'text' or a list of 'messages' in line 1 of x.jsonl, got list"),
        ("x.jsonl", "{", "data: expected JSON in line 1 of x.jsonl"),
        ("x.jsonl", '{"messages": [{"role": "user", "content": "a"}]}', "data: expected a tokenizer with a chat template"),
        ("x.txt", "short", r"length: expected at most the 5 tokens that the data has, got 16"),
        ("x.pdf", "", "got a file of another kind"),
        ("missing", None, "got nothing there"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        prepare(tmp_path / name, tokenizer(), 16, tmp_path / "cache")


def test_a_template_that_writes_earlier_turns_anew_is_refused():
    strange = chat_tokenizer()
    strange.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(ValueError, match="writes earlier turns anew"):
        chat_tokens([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}], strange)
    with pytest.raises(ValueError, match="data: expected a path"):
        prepare([3], tokenizer(), 16)
    with pytest.raises(ValueError, match="at least one source"):
        prepare([], tokenizer(), 16)
