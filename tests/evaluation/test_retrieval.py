"""Retrieval tasks: what the prompts hold, that a score is greedy decoding's, and models that can and can't do it."""

import math
import re
import types

import pytest
import torch
from tiny_model import converted

import skim
from skim.evaluation import PATTERNS, TASKS, Adaptive, plot, prompts, retrieve, show
from skim.evaluation import retrieval as module

DIGITS = re.compile(r"\d{5}")


class Letters:
    """A tokenizer with one token for each character."""

    bos_token_id = None
    known = {letter: i for i, letter in enumerate("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,:?\n")}

    def __call__(self, text, **_):
        return types.SimpleNamespace(input_ids=[self.known[letter] for letter in text])

    def convert_ids_to_tokens(self, ids):
        return [list(self.known)[i] for i in ids]

    def decode(self, ids):
        return "".join(self.convert_ids_to_tokens(ids))


class Words(Letters):
    """One with a token for what stands between spaces, known or not, behind a token that begins the text."""

    bos_token_id = 60

    def __call__(self, text, add_special_tokens=True, **_):
        own = [hash(word) % 50 for word in text.split()]
        return types.SimpleNamespace(input_ids=[60] * add_special_tokens + own)

    def convert_ids_to_tokens(self, ids):
        return ["\u2581word"] * len(ids)


LETTERS = Letters()


def parts(prompt) -> tuple[str, str]:
    """The text up to the answer, and the answer."""
    written = LETTERS.decode(prompt.tokens[0].tolist())
    return written[: -prompt.answer], written[-prompt.answer :]


@pytest.mark.parametrize("task", TASKS)
def test_prompts_are_as_long_as_asked_for_and_the_same_seed_makes_the_same(task):
    made, again, other = (prompts(LETTERS, task, 1500, depths=3, samples=2, seed=seed) for seed in (0, 0, 1))
    assert [prompt.depth for prompt in made] == [0.0, 0.0, 0.5, 0.5, 1.0, 1.0]
    assert all(prompt.tokens.shape == (1, 1500) for prompt in made)
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(made, again))
    assert not any(torch.equal(a.tokens, b.tokens) for a, b in zip(made, other))
    assert len({tuple(prompt.tokens[0].tolist()) for prompt in made}) == 6


def test_a_passkey_stands_at_its_depth_and_is_asked_for():
    for prompt in prompts(LETTERS, "passkey", 1500, depths=5, samples=2):
        before, answer = parts(prompt)
        (number,) = DIGITS.findall(answer)
        assert answer == f" {number}" and before.endswith("What is the pass key? The pass key is the number")
        body = before[before.index("remember it.") :]
        place = body.index(f"The pass key is the number {number}.") / (len(body) - 150)
        assert place == pytest.approx(prompt.depth, abs=0.1)


def test_the_filler_is_whole_sentences_wherever_something_is_hidden():
    (prompt,) = prompts(LETTERS, "passkey", 600, depths=1, samples=1, filler="One two three. Four five! Six?".replace("!", "."))
    before, _ = parts(prompt)
    assert re.search(
        r"(three|five|Six)[.?] The pass key is the number \d{5}\. Remember it: the pass key is the number \d{5}\. (One|Four|Six)", before
    )


def numbers_of(prompt) -> tuple[list[float], int]:
    """Where the numbers stand (0 the beginning of the text, 1 its end), and which of them the answer begins with."""
    before, answer = parts(prompt)
    body = before[before.index(".") : before.rindex("\n\n")]
    found = [(match.start() / len(body), match.group()) for match in DIGITS.finditer(body)]
    return [place for place, _ in found], [number for _, number in found].index(DIGITS.findall(answer)[0])


@pytest.mark.parametrize("task", ["multikey", "multivalue", "tracking"])
def test_all_numbers_stand_in_the_tenth_of_the_text_at_the_depth(task):
    for prompt in prompts(LETTERS, task, 8000, depths=3, samples=4):
        places, _ = numbers_of(prompt)
        low = 0.9 * prompt.depth
        assert len(places) == 4 and low - 0.05 < min(places) <= max(places) < low + 0.15


@pytest.mark.parametrize("task", ["multikey", "tracking"])
def test_the_answer_is_as_often_any_of_the_numbers_at_every_depth(task):
    made = prompts(LETTERS, task, 1500, depths=3, samples=160)
    for depth in (0.0, 0.5, 1.0):
        answers = [numbers_of(prompt)[1] for prompt in made if prompt.depth == depth]
        assert all(abs(answers.count(i) / len(answers) - 0.25) < 0.11 for i in range(4)), (depth, answers)  # three standard errors


def test_the_last_variables_of_the_chains_say_nothing_about_the_answer_either():
    ranks = []
    for prompt in prompts(LETTERS, "tracking", 1500, depths=3, samples=60):
        before, _ = parts(prompt)
        given = re.findall(r"The value of ([A-Z]{2}) is ([^.]+)\.", before)
        used = {value[-2:] for _, value in given}
        ends = [variable for variable, _ in given if variable not in used]
        ranks.append(ends.index(re.findall(r"As a number, the value of ([A-Z]{2}) is$", before)[0]))
    assert all(abs(ranks.count(i) / len(ranks) - 0.25) < 0.1 for i in range(4))


def test_one_of_several_keys_is_asked_for():
    for prompt in prompts(LETTERS, "multikey", 1500, depths=3, samples=3):
        before, answer = parts(prompt)
        codes = dict(re.findall(r"The code of the (\w+) is (\d{5})\.", before))
        (asked,) = re.findall(r"What is the code of the (\w+)\? The code of the \1 is$", before)
        assert len(codes) == 4 and answer == f" {codes[asked]}" and len(set(codes.values())) == 4


def test_all_values_of_a_key_are_asked_for_in_the_order_of_the_text():
    for prompt in prompts(LETTERS, "multivalue", 1500, depths=3, samples=2):
        before, answer = parts(prompt)
        numbers = re.findall(r"One of the codes of the \w+ is (\d{5})\.", before)
        assert len(numbers) == 4 and answer == " " + ", ".join(numbers)


def test_a_variable_is_tracked_through_its_chain():
    for prompt in prompts(LETTERS, "tracking", 2500, depths=5, samples=4):
        before, answer = parts(prompt)
        values, known = re.findall(r"The value of ([A-Z]{2}) is ([^.]+)\.", before), {}
        assert len(values) == 4 * 3
        for variable, value in values:  # one after the other: what a variable is given is known by then
            known[variable] = known[value[-2:]] if value.startswith("the value of") else value
        (asked,) = re.findall(r"As a number, the value of ([A-Z]{2}) is$", before)
        assert answer == f" {known[asked]}" and len(set(known.values())) == 4
        hops = dict(values)
        assert hops[hops[hops[asked][-2:]][-2:]] == known[asked]


def test_tokenizers_with_spaces_and_first_tokens_of_their_own():
    (prompt,) = prompts(Words(), "passkey", 100, depths=1, samples=1)
    assert prompt.tokens[0, 0] == 60 and 60 not in prompt.tokens[0, 1:] and prompt.answer == 1


def test_no_room_and_unknown_names_are_named():
    with pytest.raises(ValueError, match=r"lengths: expected at least \d+ tokens, which tracking needs, got 300"):
        prompts(LETTERS, "tracking", 300)
    with pytest.raises(ValueError, match="tasks: expected some of passkey, multikey, multivalue, tracking, got 'poetry'"):
        prompts(LETTERS, "poetry", 300)
    with pytest.raises(ValueError, match="filler: expected some text"):
        prompts(LETTERS, "passkey", 300, filler=" ")
    with pytest.raises(ValueError, match="samples: expected at least 1, got 0"):
        prompts(LETTERS, "passkey", 300, samples=0)
    with pytest.raises(ValueError, match="patterns: expected some of .*got 'dsaa'"):
        list(retrieve(converted(), LETTERS, [8], ["dsaa"]))


@pytest.fixture(scope="module")
def model():
    found = converted()
    found.resize_token_embeddings(len(Letters.known), mean_resizing=False)
    return found


@pytest.mark.parametrize(("pattern", "budget"), [("dense", None), ("dsa", 16)])
def test_an_answer_is_solved_if_greedy_decoding_writes_it(model, pattern, budget):
    (asked,) = prompts(LETTERS, "passkey", 300, depths=1, samples=1)
    reading = {"mode": "dense"} if budget is None else {"mode": "sparse", "budget": budget}
    question = asked.tokens[:, : -asked.answer]
    with skim.use(model, **reading), torch.no_grad():
        mask = torch.ones_like(question)
        written = model.generate(question, attention_mask=mask, max_new_tokens=asked.answer, do_sample=False, eos_token_id=None, pad_token_id=0)
        log_prob = model(written).logits[0, -asked.answer - 1 : -1].log_softmax(-1).max(-1).values.sum()
    wanted = module.Prompt("passkey", 0.5, written, asked.answer)
    found = module.read(model, wanted, pattern, budget)
    assert found.solved and found.log_prob == pytest.approx(float(log_prob), rel=1e-4)
    wrong = written.clone()
    wrong[0, -1] = (wrong[0, -1] + 1) % 60
    assert not module.read(model, module.Prompt("passkey", 0.5, wrong, asked.answer), pattern, budget).solved
    assert module.read(model, asked, pattern, budget).log_prob < found.log_prob


def test_each_pattern_answers_the_same_prompts_once(model):
    told = []
    forwards = []
    hook = model.register_forward_hook(lambda *_: forwards.append(1))
    rows = list(
        retrieve(
            model, LETTERS, [8, 16], ["dense", "dsa", "sinks"], ["passkey"], [300], depths=2, samples=2, report=lambda n, of: told.append((n, of))
        )
    )
    hook.remove()
    assert [(row.pattern, row.budget) for row in rows] == [("dense", None), ("dsa", 8), ("sinks", 8), ("dsa", 16), ("sinks", 16)]
    assert len(forwards) == 4 * 5 and told == [(i + 1, 20) for i in range(20)]
    dense, *others = rows
    assert dense.exact_over_dense is None and dense.counts is False and set(dense.by_depth) == {"0.00", "1.00"}
    for row in others:
        assert row.prompts == 4 and row.log_prob_over_dense.mean == pytest.approx(row.log_prob - dense.log_prob)


def test_an_adaptive_budget_is_asked_of_dsa_alone(model):
    tight, loose = Adaptive(0.2, 1, 64), Adaptive(0.9, 1, 64)
    rows = list(retrieve(model, LETTERS, [16, tight, loose], ["dense", "dsa", "sinks"], ["passkey"], [300], depths=1, samples=2))
    assert [(row.pattern, row.budget) for row in rows] == [("dense", None), ("dsa", 16), ("sinks", 16), ("dsa", tight), ("dsa", loose)]
    keys = [row.keys_per_query for row in rows]
    assert keys[0] == 150.5 and keys[1] == keys[2] == (300 * 16 - 16 * 15 / 2) / 300 and keys[3] < keys[4] <= 64
    assert rows[3].to_dict()["budget"] == {"mass": 0.2, "min_budget": 1, "budget": 64}


def test_a_task_that_dense_can_do_counts_and_is_drawn(monkeypatch, tmp_path, capsys):
    def half_forgets(model, prompt, pattern, budget):
        solved = pattern == "dense" or (pattern == "dsa" and prompt.depth > 0) or prompt.task == "tracking"
        return module.Answer(solved and not (pattern == "dense" and prompt.task == "tracking"), -1.0 if solved else -9.0, budget or 1500.0)

    monkeypatch.setattr(module, "read", half_forgets)
    rows = list(retrieve(None, LETTERS, [8, 16], PATTERNS[:3], ["passkey", "tracking"], [1500], depths=2, samples=10))
    dense, dsa, window = rows[:3]
    assert (dense.exact, dsa.exact, window.exact) == (1.0, 0.5, 0.0) and dense.counts and dsa.counts
    assert dsa.by_depth == {"0.00": 0.0, "1.00": 1.0}
    assert dsa.exact_over_dense.mean == -0.5 and dsa.exact_over_dense.high < 0 and dsa.log_prob_over_dense.mean == -4
    assert not any(row.counts for row in rows if row.task == "tracking")
    from rich.console import Console

    Console(width=200).print(show.retrieval(rows))
    lines = [[cell.strip() for cell in line.split("│")] for line in capsys.readouterr().out.splitlines()]
    counts = {(line[1], line[2], line[4]): line[10] for line in lines if len(line) > 10}
    assert counts["tracking", "dsa", "8"] == "no" and counts["passkey", "dsa", "8"] == "yes"
    assert any(line[7].startswith("-50% [") for line in lines if len(line) > 10)
    pytest.importorskip("matplotlib")
    plot(tmp_path / "x.png", {}, rows)
    assert (tmp_path / "x.png").stat().st_size > 1000 and math.isfinite(dsa.log_prob)
    with pytest.raises(ValueError, match="of tasks one that dense can do"):
        plot(tmp_path / "y.png", {}, [row for row in rows if row.task == "tracking"])
