"""Can a model still find what it has read? Prompts made offline from a seed, dense and every pattern on the same ones.

    passkey     one number is hidden in the text and asked for
    multikey    four numbers under four names; one is asked for
    multivalue  four numbers under one name; all are asked for, in the order of the text
    tracking    four variables get numbers and two more each get the value of the one before; the last of a chain is asked for

All four numbers stand in one stretch of the text, a tenth of it, each at a place by lot: where a number stands says nothing
about whether it is the one. The later variables of a chain stand anywhere behind its number.

A prompt is as many tokens long as asked for, with the answer behind it, and is read once. It counts as solved if each
answer token is the most probable one given those before it, which is when greedy decoding writes the answer.
"""

from __future__ import annotations

import inspect
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from skim.evaluation.intervals import Interval, paired_shares, paired_t
from skim.evaluation.table import PATTERNS, Budget, Counter, Read, reads_of, selector_of, settings
from skim.huggingface import use

TASKS = ("passkey", "multikey", "multivalue", "tracking")
COUNTS_FROM = 0.6  # what the dense model can't do says nothing about reading sparsely
SENTENCES = "The road goes on. The river runs beside it. The hills are far away. The wind is cold. A bird sings and is gone."
# fmt: off
NAMES = (
    "anchor", "basket", "candle", "donkey", "engine", "feather", "garden", "hammer", "island", "jacket", "kettle", "ladder",
    "marble", "needle", "orange", "parrot", "quarry", "ribbon", "saddle", "tunnel", "umbrella", "violin", "window", "yellow",
)
# fmt: on
NEEDLES = 4
STRETCH = 0.1  # of the text
HOPS = 2


@dataclass(frozen=True)
class Prompt:
    """One question and its answer.

    Attributes:
        task: one of `TASKS`.
        depth: where in the text the numbers stand: 0 its beginning (the first tenth), 1 its end (the last).
        tokens: `[1, T]`, the answer at the end.
        answer: how many tokens the answer has.
    """

    task: str
    depth: float
    tokens: Tensor
    answer: int


@dataclass(frozen=True)
class Answer:
    """How a pattern did on a prompt: whether it is solved, the answer's log-probability, and the keys that a query read on average."""

    solved: bool
    log_prob: float
    keys: float


@dataclass(frozen=True)
class Retrieval:
    """One pattern's figures on the prompts of one task and length.

    Attributes:
        task, length: what was asked, in how many tokens.
        pattern: dense, dsa, window, sinks, blocks, random or oracle.
        budget: keys for each query, an `Adaptive` budget, or None for dense.
        keys_per_query: keys that a query reads, mean over queries and layers, then over prompts.
        prompts: how many.
        exact: share of them solved.
        log_prob: mean log-probability of the answer.
        exact_over_dense, log_prob_over_dense: paired differences; None for dense itself, or if it wasn't asked.
        by_depth: share solved at each depth.
        counts: whether dense solves at least 60 %; None if it wasn't asked.
    """

    task: str
    length: int
    pattern: str
    budget: Budget | None
    keys_per_query: float
    prompts: int
    exact: float
    log_prob: float
    exact_over_dense: Interval | None
    log_prob_over_dense: Interval | None
    by_depth: dict[str, float]
    counts: bool | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def retrieve(
    model: Any,
    tokenizer: Any,
    budgets: Sequence[Budget],
    patterns: Sequence[str] = PATTERNS,
    tasks: Sequence[str] = TASKS,
    lengths: Sequence[int] = (2048,),
    *,
    depths: int = 5,
    samples: int = 10,
    seed: int = 0,
    filler: str = SENTENCES,
    report: Callable[[int, int], object] = lambda done, total: None,
) -> Iterator[Retrieval]:
    """Ask a model, densely and with each pattern at each budget, the same prompts.

    Args:
        model: a model with trained indexers (`skim.load`).
        tokenizer: its tokenizer.
        budgets: keys for each query; at an `Adaptive` budget DSA alone is asked.
        patterns: which of `PATTERNS`; without dense nothing is compared.
        tasks: which of `TASKS`.
        lengths: tokens of a prompt with its answer.
        depths: so many, evenly from the beginning to the end of the text.
        samples: prompts of each task, length and depth.
        seed: the same seed makes the same prompts.
        filler: text between what is asked for.
        report: called with the number of forward passes done and their total.

    Raises:
        ValueError: an unknown pattern or task, or a length with no room for the needles.
    """
    reads = reads_of(budgets, patterns)
    choices: dict[str, Any] = {"depths": depths, "samples": samples, "seed": seed, "filler": filler}
    asked = [(task, length, prompts(tokenizer, task, length, **choices)) for task in tasks for length in lengths]
    done, total = 0, len(reads) * sum(len(of) for _, _, of in asked)
    for task, length, of in asked:
        answers: dict[Read, list[Answer]] = {read: [] for read in reads}
        for prompt in of:
            for name, budget in reads:
                answers[name, budget].append(read(model, prompt, name, budget))
                done += 1
                report(done, total)
        yield from _summaries(task, length, of, answers)


def prompts(tokenizer: Any, task: str, length: int, *, depths: int = 5, samples: int = 10, seed: int = 0, filler: str = SENTENCES) -> list[Prompt]:
    """The prompts of a task at a length: `samples` at each of `depths` depths. Arguments and errors are those of `retrieve`."""
    if task not in TASKS:
        raise ValueError(f"tasks: expected some of {', '.join(TASKS)}, got {task!r}")
    if depths < 1 or samples < 1:
        raise ValueError(f"{'depths' if depths < 1 else 'samples'}: expected at least 1, got {depths if depths < 1 else samples}")
    words = _Words(tokenizer, filler, length)
    where = [i / (depths - 1) for i in range(depths)] if depths > 1 else [0.5]
    return [_prompt(words, task, length, depth, random.Random(f"{seed} {task} {length} {depth} {i}")) for depth in where for i in range(samples)]


class _Words:
    """Text as tokens: a filler's sentences, and whatever is asked to be encoded."""

    def __init__(self, tokenizer: Any, filler: str, length: int) -> None:
        self.tokenizer = tokenizer
        # Some tokenizers put a space before whatever they encode.
        self.space = "" if tokenizer.convert_ids_to_tokens(self.encode("a"))[0].startswith("\u2581") else " "
        # A token is rarely longer than 16 characters: the tokenizer need not see a whole library.
        sentences = [s for s in re.split(r"(?<=[.!?])\s+", filler[: 64 * length]) if s.strip()]
        if not sentences:
            raise ValueError("filler: expected some text, got none")
        self.sentences = [self.encode(self.space + " ".join(s.split())) for s in sentences]
        start = tokenizer("a").input_ids[:1]
        self.start = start if start == [tokenizer.bos_token_id] else []

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)


def _prompt(words: _Words, task: str, length: int, depth: float, rng: random.Random) -> Prompt:
    opening, needles, question, reply = _ask(task, depth, rng)
    first, last, answer = words.start + words.encode(opening), words.encode("\n\n" + question), words.encode(words.space + reply)
    placed = [(where, words.encode(words.space + text)) for where, text in needles]
    room = length - len(first) - len(last) - len(answer) - sum(len(tokens) for _, tokens in placed)
    if room < 0:
        raise ValueError(f"lengths: expected at least {length - room} tokens, which {task} needs, got {length}")
    tokens = first + _hidden(words.sentences, placed, room, rng) + last + answer
    return Prompt(task, depth, torch.tensor([tokens]), len(answer))


def _hidden(sentences: list[list[int]], placed: list[tuple[float, list[int]]], room: int, rng: random.Random) -> list[int]:
    """`room` tokens of filler from a sentence by lot on, each needle where a sentence ends next behind its place."""
    at, used, found, waiting = rng.randrange(len(sentences)), 0, list[int](), list(placed)
    while used < room:
        while waiting and waiting[0][0] * room <= used:
            found += waiting.pop(0)[1]
        sentence = sentences[at % len(sentences)][: room - used]
        found += sentence
        used, at = used + len(sentence), at + 1
    return found + [token for _, needle in waiting for token in needle]


def _ask(task: str, depth: float, rng: random.Random) -> tuple[str, list[tuple[float, str]], str, str]:
    """Opening, (place, text) of what is hidden in the order of the text, question up to the answer, answer."""
    numbers = [str(n) for n in rng.sample(range(10000, 100000), NEEDLES)]
    names = rng.sample(NAMES, NEEDLES)
    if task == "passkey":
        # Without "the number" small models go on with "a": that would test their manners.
        hidden = [(depth, f"The pass key is the number {numbers[0]}. Remember it: the pass key is the number {numbers[0]}.")]
        opening = "Somewhere in this text a pass key is hidden. Find it and remember it."
        return opening, hidden, "What is the pass key? The pass key is the number", numbers[0]
    places = [depth * (1 - STRETCH) + STRETCH * rng.random() for _ in range(NEEDLES)]
    if task == "multikey":
        hidden = sorted((place, f"The code of the {name} is {number}.") for place, name, number in zip(places, names, numbers))
        opening = "In this text the codes of some things are hidden. Remember them."
        return opening, hidden, f"What is the code of the {names[0]}? The code of the {names[0]} is", numbers[0]
    if task == "multivalue":
        hidden = [(place, f"One of the codes of the {names[0]} is {number}.") for place, number in zip(sorted(places), numbers)]
        opening = f"In this text the {NEEDLES} codes of a thing are hidden. Remember them."
        return opening, hidden, f"What are the codes of the {names[0]}, in the order of the text? They are", ", ".join(numbers)
    variables = rng.sample([f"{a}{b}" for a in "ABCDEFGHJKLMNPQRSTUVWXYZ" for b in "ABCDEFGHJKLMNPQRSTUVWXYZ"], NEEDLES * (HOPS + 1))
    chains = [variables[i::NEEDLES] for i in range(NEEDLES)]
    hidden = []
    for start, chain, number in zip(places, chains, numbers):
        along = [start, *sorted(start + (1 - start) * rng.random() for _ in range(HOPS))]
        values = [number, *(f"the value of {variable}" for variable in chain)]
        hidden += [(place, f"The value of {variable} is {value}.") for place, variable, value in zip(along, chain, values)]
    hidden.sort(key=lambda one: one[0])  # stable: a chain at the very end stays in its order
    opening = "In this text variables get values, some that of another variable. Keep track of them."
    return opening, hidden, f"Which number is the value of {chains[0][-1]}? As a number, the value of {chains[0][-1]} is", numbers[0]


@torch.no_grad()
def read(model: Any, prompt: Prompt, pattern: str, budget: Budget | None) -> Answer:
    """Read a prompt once and score its answer; `budget` None is for dense."""
    tokens, n = prompt.tokens.to(model.device), prompt.answer
    few = {"logits_to_keep": n + 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    counted = None if budget is None else Counter(selector_of(pattern, budget))
    with use(model, mode="dense") if budget is None else use(model, mode="sparse", selector=counted, **settings(budget)):
        logits = model(tokens, use_cache=False, **few).logits[0, -n - 1 : -1].float()
    target = tokens[0, -n:]
    log_prob = logits.log_softmax(-1).gather(1, target[:, None]).double().sum()
    keys = (tokens.shape[1] + 1) / 2 if counted is None else counted.mean()
    return Answer(bool((logits.argmax(-1) == target).all()), float(log_prob), keys)


def _summaries(task: str, length: int, of: list[Prompt], answers: dict[Read, list[Answer]]) -> Iterator[Retrieval]:
    dense = answers.get(("dense", None))
    for (name, budget), own in answers.items():
        exact_over = log_prob_over = counts = None
        if dense is not None and own is not dense:
            exact_over = paired_shares([a.solved for a in own], [a.solved for a in dense])
            log_prob_over = paired_t([a.log_prob for a in own], [a.log_prob for a in dense])
        if dense is not None:
            counts = sum(a.solved for a in dense) >= COUNTS_FROM * len(dense)
        at: dict[str, list[bool]] = {}
        for prompt, a in zip(of, own):
            at.setdefault(f"{prompt.depth:.2f}", []).append(a.solved)
        by_depth = {depth: sum(solved) / len(solved) for depth, solved in at.items()}
        keys, exact, log_prob = (sum(values) / len(own) for values in zip(*((a.keys, a.solved, a.log_prob) for a in own)))
        yield Retrieval(task, length, name, budget, keys, len(own), exact, log_prob, exact_over, log_prob_over, by_depth, counts)
