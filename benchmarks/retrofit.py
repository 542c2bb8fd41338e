"""The retrofit of SmolLM2-135M-Instruct from beginning to end: warm-up, sparse stage, dense control, every comparison.

    python benchmarks/corpus.py build
    python benchmarks/retrofit.py --corpus .corpus --out retrofit --report benchmarks/results/smollm2-retrofit.json
    python benchmarks/score.py benchmarks/results/*.json

The work is a list of jobs, the most important first (`--list`). A job's result is OUT/JOB.json, written when the job is
done; what it trained is in OUT/trained. A job whose result is there is not run again, so a run that was cut off goes on
with the same command. `--jobs 'warmup-*,patterns-512'` runs those alone, and first what they need.

Settings are chosen on the selection split. Held-out windows are read for the figures that are reported, by every job
but the searches for a learning rate. Budgets are shares of the window: 1024, 512, 256 and 128 of 8192 tokens; the sparse
stage trains at 256. The dense control is trained by the same loop on the same rows with every key read. A dense model that is
distilled from itself has no loss, so the control of the distilled model is the untouched one.
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import gc
import hashlib
import json
import math
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import skim
from skim.bench.runner import machine, write_json
from skim.evaluation import Interval, Reading, Window, agreement, equal_budget, paired_t, readings, retrieve
from skim.huggingface import LayerInputs, load_model
from skim.huggingface.attention import everything
from skim.huggingface.convert import attach
from skim.ops import codec
from skim.training import Recipe, Rows, train

Row = dict[str, Any]
Job = Callable[[], Row]

SEEDS = (0, 1, 2)
LOSSES = ("distill", "lm")
TRAININGS = (("sparse", "distill"), ("sparse", "lm"), ("dense", "lm"))
RATES = (5e-5, 1e-4, 2e-4)  # of the sparse stage and of the dense control alike
SHARES = (8, 16, 32, 64)  # budgets are the window over these
RULES = ("sinks", "window", "blocks")
WINDOWS_OF_A_DOMAIN = 10  # held-out windows that are read, so that no domain outweighs the others
WORKSPACE = 4096  # MiB on a GPU: the oracle's scores in few pieces, which wait less for the host
RANDOM_WINDOWS = 2  # drawing keys by lot is slow, and what it costs is no close call
RETRIEVAL_DEPTHS, RETRIEVAL_SAMPLES = 5, 10
RETRIEVAL_SHARES = (8, 4)  # prompts are the window over these
ADAPTIVE_MASSES = (0.85, 0.9, 0.95)  # between the window over 128 keys and the largest budget
INDEXER_STEPS = 300  # a sixth of the warm-up tells them apart
INDEXERS = ((4, 64), (1, 64), (2, 64), (8, 64), (4, 32), (4, 128))  # heads and channels
FIRST, FEW = 4, 128  # kept tokens of the ablation: the first 4, the last window / 128
ANSWER = 96  # tokens of an answer in a chat
EXCERPT = 192  # tokens of a text that a chat is about
SHORT = 512  # tokens of a short prompt at most
FIRST_EDGE = 256
QUESTIONS = (
    "What is the difference between a virus and a bacterium?",
    "Explain to a child why the sky is blue.",
    "Write a short poem about the sea in winter.",
    "How do I reverse a string in Python?",
    "Give me three tips for a job interview.",
    "What are the causes of inflation?",
    "Write a polite e-mail that asks a colleague to move a meeting to Friday.",
    "What is photosynthesis?",
    "Name the planets of the solar system in order.",
    "How many legs do three spiders have together?",
    "Translate into French: Where is the railway station?",
    "Suggest a simple dinner with rice, eggs and spinach.",
    "What is recursion? Give an example.",
    "Who wrote Hamlet, and what is it about?",
    "List the advantages and disadvantages of working from home.",
    "How does a bicycle stay upright?",
    "What should I pack for a weekend in the mountains?",
    "Explain the difference between a list and a tuple in Python.",
    "Write the beginning of a detective story.",
    "What is the capital of Australia, and why is it not Sydney?",
    "A shirt costs 20 dollars and is reduced by a quarter. What does it cost now?",
    "How can I fall asleep more easily?",
    "What does the command `git rebase` do?",
    "Summarise the story of Little Red Riding Hood in three sentences.",
)


class Lab:
    """The corpus, the model and the folder of results. Jobs are its methods.

    Args:
        corpus: what `corpus.py build` wrote.
        out: folder of results and of what is trained.
        model: what `skim.load_model` takes.
        warmup_steps, sparse_steps: None for the recipe's.

    Raises:
        ValueError: a split that is not what corpus.json says.
    """

    def __init__(self, corpus: Path, out: Path, model: str, warmup_steps: int | None = None, sparse_steps: int | None = None) -> None:
        self.corpus, self.out, self.model_name = corpus, out, model
        self.steps = {"warmup": warmup_steps, "sparse": sparse_steps}
        self.described = json.loads((corpus / "corpus.json").read_text())
        self.window: int = self.described["window"]
        self.budgets = [self.window // share for share in SHARES]
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.splits = {split: self._checked(split) for split in ("train", "selection", "heldout")}
        self.jobs = self._jobs()

    def _checked(self, split: str) -> np.ndarray:
        """Tokens `[windows, window]` of a split."""
        described = self.described["splits"][split]
        data = (self.corpus / described["file"]).read_bytes()
        if hashlib.sha256(data).hexdigest() != described["sha256"]:
            raise ValueError(f"corpus: expected the {split} split that corpus.json describes, got another; build it again")
        return np.frombuffer(data, self.described["dtype"]).reshape(described["windows"], self.window)

    # ------------------------------------------------------------------------------------------------- what jobs need

    @cached_property
    def base(self) -> tuple[Any, Any]:
        """The untouched model and its tokenizer."""
        return load_model(self.model_name, dtype=torch.bfloat16 if self.device.type == "cuda" else torch.float32, device=self.device)

    @cached_property
    def rows(self) -> Rows:
        """The train split as the cache of packed rows that training reads; each window counts as a document."""
        folder, tokens = self.out / "rows", self.splits["train"]
        if not folder.is_dir():
            with tempfile.TemporaryDirectory(dir=self.out) as temporary:
                made = Path(temporary) / "rows"
                made.mkdir()
                tokens.tofile(made / "tokens.bin")
                np.save(made / "starts.npy", np.arange(0, tokens.size, self.window))
                key = self.described["splits"]["train"]["sha256"][:16]
                described = {"key": key, "tokens": tokens.size, "documents": len(tokens), "dtype": tokens.dtype.name, "masked": False}
                (made / "data.json").write_text(json.dumps(described))
                made.rename(folder)
        return Rows(folder, self.window)

    def places(self, split: str) -> list[tuple[int, str, str]]:
        """(number, domain, document) of the windows of a split that are read: all, but of no held-out domain more than its share."""
        described = self.described["splits"][split]
        documents = [described["documents"][document] for document, _ in described["order"]]
        found = []
        for domain in dict.fromkeys(document["domain"] for document in documents):
            own = [i for i, document in enumerate(documents) if document["domain"] == domain]
            most = min(len(own), WINDOWS_OF_A_DOMAIN) if split == "heldout" else len(own)
            chosen = [own[i] for i in np.linspace(0, len(own) - 1, most).round().astype(int)]
            found += [(i, domain, documents[i]["name"]) for i in chosen]
        return found

    def windows(self, split: str) -> list[Window]:
        """Those of `places`, on the model's device."""
        tokens = self.splits[split].astype(np.int64)
        return [Window(domain, torch.tensor(tokens[i], device=self.device)[None], name) for i, domain, name in self.places(split)]

    def recipe(self, stage: str, **choices: Any) -> Recipe:
        """The default recipe of a stage with these changes."""
        steps = self.steps[stage]
        return Recipe(stage=stage, length=self.window, **({"steps": steps} | choices))

    def trained(self, name: str, model: Callable[[], Any], recipe: Recipe) -> Path:
        """The folder of a training run, which goes on from its last checkpoint, or is done already."""
        folder = self.out / "trained" / name
        if not (folder / "run.json").exists():
            train(model(), self.rows, recipe, out=folder, tokenizer=self.base[1], resume=True)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # 2 GB each where all parameters train
        return folder

    def warm(self, seed: int = 0, pattern: str = "S", heads: int = 4, channels: int = 64, steps: int | None = None) -> Path:
        """The folder of a warm-up."""

        def model() -> Any:
            made = copy.deepcopy(self.base[0])
            attach(made, skim.Config(budget=self.budgets[2], pattern=pattern, index_n_heads=heads, index_head_dim=channels))
            return made

        changes = {} if steps is None else {"steps": steps}
        name = f"warmup-{seed}-{pattern}-{heads}x{channels}" + ("" if steps is None else f"-{steps}")
        return self.trained(name, model, self.recipe("warmup", seed=seed, **changes))

    def continued(self, kind: str, loss: str, rate: float, seed: int = 0, pattern: str = "S") -> Path:
        """The folder of a sparse stage behind the warm-up of the same seed, or of the dense control.

        The control reads every key, so its indexers touch nothing of it and are left as they are.
        """

        def model() -> Any:
            made = skim.load(copy.deepcopy(self.base[0]), self.warm(seed, pattern) / "adapter")
            if kind == "dense":
                skim.use(made, selector=everything)
            return made

        choices = {"seed": seed, "loss": loss, "lr": rate, "train_indexer": kind == "sparse"}
        recipe = self.recipe("sparse", **choices, save_every=1_000_000)  # a checkpoint of all parameters takes its time
        return self.trained(f"{kind}-{loss}-{rate:g}-{seed}-{pattern}", model, recipe)

    def read(self, folder: Path) -> Any:
        """The model that a training run left, with its indexers."""
        whole = folder / "model"
        base = load_model(whole, dtype=self.base[0].dtype, device=self.device)[0] if whole.is_dir() else copy.deepcopy(self.base[0])
        made = skim.load(base, folder / "adapter")
        if self.device.type == "cuda":
            skim.use(made, workspace_mb=WORKSPACE)
        return made

    def best(self, kind: str, loss: str) -> float:
        """The smallest learning rate whose loss on the selection split is behind the best by no more than one standard error of the difference.

        The rule of Breiman et al. (Classification and Regression Trees, 1984): what differs by less is chance, and small steps keep more of
        what the model learned.
        """
        losses = {rate: np.array(self.result(search(kind, loss, rate))["rows"][0]["nll"]) for rate in RATES}
        over = {rate: nll - min(losses.values(), key=np.mean) for rate, nll in losses.items()}
        return min(rate for rate, more in over.items() if more.mean() <= more.std(ddof=1) / len(more) ** 0.5)

    def result(self, name: str) -> Row:
        """A job's result; the job is run if it was not yet."""
        file = self.out / f"{name}.json"
        if not file.exists():
            began = time.perf_counter()
            found = self.jobs[name]()
            gc.collect()
            seconds = time.perf_counter() - began
            write_json(file, {"job": name, **machine(self.device), "seconds": seconds, **found})
            print(f"{name:<28} {seconds:7.1f} s  {brief(found)}", flush=True)
        return json.loads(file.read_text())

    # ----------------------------------------------------------------------------------------------------------- jobs

    def _jobs(self) -> dict[str, Job]:
        """The jobs by name, the most important first."""
        most, wide, middle, narrow = self.budgets
        jobs: dict[str, Job] = {"warmup-0": partial(self.warmup, 0), f"patterns-{wide}": partial(self.patterns, wide)}
        jobs["untouched"] = self.untouched
        for kind, loss in TRAININGS:
            jobs |= {search(kind, loss, rate): partial(self.search, kind, loss, rate) for rate in RATES}
            jobs[f"heldout-{kind}-{loss}-0"] = partial(self.heldout, kind, loss, 0)
        jobs |= {f"patterns-{middle}": partial(self.patterns, middle), "scores": self.scores, "prompts": self.prompts}
        jobs |= {f"agreement-{loss}": partial(self.agreement, loss) for loss in LOSSES}
        jobs |= {f"retrieval-{what}": partial(self.retrieval, what) for what in (*LOSSES, "warmup")}
        jobs |= {"adaptive": self.adaptive, "reuse-4": partial(self.reuse, 4)}
        for seed in SEEDS[1:]:
            jobs |= {f"warmup-{seed}": partial(self.warmup, seed), f"heldout-warmup-{seed}": partial(self.heldout_warmup, seed)}
        for kind, loss in TRAININGS:
            jobs |= {f"heldout-{kind}-{loss}-{seed}": partial(self.heldout, kind, loss, seed) for seed in SEEDS[1:]}
        jobs |= {f"patterns-{budget}": partial(self.patterns, budget) for budget in (narrow, most)}
        jobs |= {"settings": self.settings, "reuse-2": partial(self.reuse, 2)}
        jobs |= {f"indexer-{heads}x{channels}": partial(self.indexer, heads, channels) for heads, channels in INDEXERS}
        return jobs | {"random": self.random}

    def warmup(self, seed: int) -> Row:
        """The warm-up of a seed: how fast it is, and what its curve says."""
        return {"training": training(self.warm(seed))}

    def patterns(self, budget: int) -> Row:
        """Every way of reading at one budget, after the warm-up alone."""
        return self.measured(self.warm(), [budget], ("dense", "dsa", "oracle", *RULES))

    def random(self) -> Row:
        """Keys drawn by lot."""
        model = self.read(self.warm())
        windows = self.windows("heldout")[:: len(self.windows("heldout")) // RANDOM_WINDOWS][:RANDOM_WINDOWS]
        return {"rows": measure(model, windows, [self.budgets[2]], ("dense", "random"))} | places(windows)

    def untouched(self) -> Row:
        """The model as it is, on the selection split; `patterns` jobs have it on the held-out one."""
        model, windows = copy.deepcopy(self.base[0]), self.windows("selection")
        attach(model, skim.Config(budget=self.budgets[2]))
        rows = measure(model, windows, [], ("dense",))
        return {"selection": float(np.mean(rows[0]["nll"])), "rows": rows} | places(windows)

    def search(self, kind: str, loss: str, rate: float) -> Row:
        """One learning rate of the sparse stage or of the dense control, measured on the selection split."""
        folder, windows = self.continued(kind, loss, rate), self.windows("selection")
        rows = measure(self.read(folder), windows, [self.budgets[2]], ("dsa",) if kind == "sparse" else ("dense",))
        return {"training": training(folder), "selection": float(np.mean(rows[0]["nll"])), "rows": rows} | places(windows)

    def heldout(self, kind: str, loss: str, seed: int) -> Row:
        """The sparse stage or the dense control at the rate that the search found, one model for all budgets."""
        rate = self.best(kind, loss)
        folder = self.continued(kind, loss, rate, seed)
        return {"lr": rate, "training": training(folder)} | self.measured(folder, self.budgets[1:], ("dense", "dsa"))

    def heldout_warmup(self, seed: int) -> Row:
        """The warm-up of another seed at every budget."""
        return self.measured(self.warm(seed), self.budgets, ("dense", "dsa"))

    def reuse(self, layers: int) -> Row:
        """A selection for every so many layers, in both stages, by the loss and rate of the headline."""
        pattern = "S" + "R" * (layers - 1)
        loss = self.headline()
        warm, folder = self.warm(0, pattern), self.continued("sparse", loss, self.best("sparse", loss), 0, pattern)
        budgets = self.budgets[1:]
        found = self.measured(folder, budgets, ("dense", "dsa"))
        return {"loss": loss, "pattern": pattern, "warmup": self.measured(warm, budgets, ("dsa",))["rows"]} | found

    def scores(self) -> Row:
        """FP8 scores beside those in the model's dtype: quality, and how many keys the two choose alike."""
        model = self.read(self.warm())
        found = self.measured(self.warm(), self.budgets[1:3], ("dense", "dsa"))
        with skim.use(model, score_dtype="fp8"):
            fp8 = measure(model, self.windows("heldout"), self.budgets[1:3], ("dsa",))
        overlap = {}
        for budget in self.budgets[1:3]:
            shared = Overlap(budget)
            with skim.use(model, selector=shared), torch.no_grad():
                for window in first_of_each_domain(self.windows("heldout")):
                    model.base_model(window.tokens, use_cache=False)
            overlap[str(budget)] = shared.mean()
        return found | {"fp8": fp8, "overlap": overlap}

    def settings(self) -> Row:
        """What can be changed without training: kept tokens, and hybrids of dense, selecting and reusing layers."""
        model, windows, budget, rows = self.read(self.warm()), self.windows("heldout"), self.budgets[2], list[Row]()
        recent = self.window // FEW
        changes = [{"keep_first": first, "keep_recent": last} for first, last in ((FIRST, 0), (0, recent), (FIRST, recent))]
        changes += [{"pattern": pattern} for pattern in ("FSSS", "SSSF", "SR", "SRRR")]
        for change in changes:
            with skim.use(model, budget=budget, **change):
                rows.append({**measure(model, windows, [budget], ("dsa",))[0], "change": change})
        return {"rows": rows} | places(windows)

    def indexer(self, heads: int, channels: int) -> Row:
        """Indexers of another size, after the first part of a warm-up."""
        whole = self.recipe("warmup").resolved(chat=False, accelerated=True).steps
        folder = self.warm(heads=heads, channels=channels, steps=min(INDEXER_STEPS, whole or INDEXER_STEPS))
        return {"training": training(folder)} | self.measured(folder, self.budgets[1:], ("dsa",))

    def adaptive(self) -> Row:
        """The fewest keys that hold a share of the indexers' softmax, beside a fixed budget of as many keys on average."""
        model, windows, pairs = self.read(self.warm()), self.windows("heldout"), []
        dense = measure(model, windows, [], ("dense",))
        for mass in ADAPTIVE_MASSES:
            with skim.use(model, budget=self.budgets[0], mass=mass, min_budget=self.window // FEW):
                own = measure(model, windows, [self.budgets[0]], ("dsa",))[0]
            fixed = measure(model, windows, [equal_budget(own["keys"], [self.window])], ("dsa",))[0]
            pairs.append({"mass": mass, "adaptive": own, "fixed": fixed})
        return {"rows": dense, "pairs": pairs} | places(windows)

    def retrieval(self, what: str) -> Row:
        """Finding what was read, after the warm-up or after the sparse stage under a loss.

        Dense reading is asked everything, then every budget is asked what it can do.
        """
        model = self.read(self.warm() if what == "warmup" else self.continued("sparse", what, self.best("sparse", what)))
        ask = partial(retrieve, model, self.base[1], self.budgets[1:], depths=RETRIEVAL_DEPTHS, samples=RETRIEVAL_SAMPLES)
        dense = list(ask(patterns=("dense",), lengths=[self.window // share for share in RETRIEVAL_SHARES]))
        able = [(one.task, one.length) for one in dense if one.counts]
        found = [one for task, length in able for one in ask(patterns=("dense", "dsa"), tasks=(task,), lengths=(length,))]
        return {"dense": [one.to_dict() for one in dense], "retrieval": [one.to_dict() for one in found if one.pattern != "dense"]}

    def prompts(self) -> Row:
        """Chats that the untouched model answered itself, and short texts, as tokens."""
        model, tokenizer = self.base
        windows = self.windows("heldout")
        asked = [*QUESTIONS, *(f"Summarise this text:\n\n{tokenizer.decode(w.tokens[0, :EXCERPT])}" for w in windows)]
        turns = [tokenizer.apply_chat_template([{"role": "user", "content": x}], tokenize=False, add_generation_prompt=True) for x in asked]
        chats = [tokenizer(turn, add_special_tokens=False).input_ids for turn in turns]
        texts = [w.tokens[0, :SHORT].tolist() for w in windows]
        return {"chats": [{"tokens": tokens, "answer": n} for tokens, n in answers(model, chats)], "texts": texts}

    def agreement(self, loss: str) -> Row:
        """How far the sparse model and the dense control that went on learning are from the untouched one on chats and short texts."""
        asked, budget = self.result("prompts"), self.budgets[2]
        prompts = {"chat": [(one["tokens"], one["answer"]) for one in asked["chats"]], "text": [(one, len(one) - 1) for one in asked["texts"]]}
        found: dict[str, Row] = {}
        for kind, of in (("sparse", loss), ("dense", "lm")):
            model = self.read(self.continued(kind, of, self.best(kind, of)))
            with skim.use(model, mode=kind, budget=budget):
                for what, asked_of in prompts.items():
                    rows, last = [torch.tensor([tokens]) for tokens, _ in asked_of], [count for _, count in asked_of]
                    near = agreement(model, self.base[0], rows, last)
                    found.setdefault(kind, {})[what] = {"kl": near.kl_by_row, "top1": near.top1_by_row}
        return {"budget": budget, **found}

    def headline(self) -> str:
        """The loss of the sparse stage that costs least over its own dense control on the selection split."""
        least: dict[tuple[str, str], float] = {}
        for kind, loss in TRAININGS:
            files = [self.out / f"{search(kind, loss, rate)}.json" for rate in RATES]
            if all(file.exists() for file in files):
                least[kind, loss] = self.result(search(kind, loss, self.best(kind, loss)))["selection"]
        if (file := self.out / "untouched.json").exists():
            least["dense", "distill"] = json.loads(file.read_text())["selection"]
        cost = {loss: least["sparse", loss] - least["dense", loss] for loss in LOSSES if {("sparse", loss), ("dense", loss)} <= least.keys()}
        return min(cost, key=lambda loss: cost[loss]) if cost else LOSSES[0]

    def measured(self, folder: Path, budgets: Sequence[int], patterns: Sequence[str]) -> Row:
        """What a trained model makes of the held-out windows."""
        windows = self.windows("heldout")
        return {"rows": measure(self.read(folder), windows, budgets, patterns)} | places(windows)


# ------------------------------------------------------------------------------------------------------- measurements


def control(loss: str, seed: int, budget: int) -> str:
    """The name of the job that read the held-out windows densely with the control of a loss; that of "distill" is the untouched model."""
    return f"patterns-{budget}" if loss == "distill" else f"heldout-dense-{loss}-{seed}"


def search(kind: str, loss: str, rate: float) -> str:
    """The name of the job that tries a learning rate."""
    return f"{kind}-{loss}-{rate:g}"


def training(folder: Path) -> Row:
    """What a run's own report says of it, without its curves."""
    run = json.loads((folder / "run.json").read_text())
    curves = ("loss", "kl", "input_rms")
    told = {name: value for name, value in run.items() if name not in curves}
    told["base"] = {**run["base"], "id": Path(run["base"]["id"]).name}  # a path is of one machine
    ends = {f"last_{name}": float(np.mean(run[name][-20:])) for name in ("loss", "kl") if run[name]}
    return told | ends


def measure(model: Any, windows: Sequence[Window], budgets: Sequence[int], patterns: Sequence[str]) -> list[Row]:
    """What each pattern makes of all windows at each budget."""
    found = [list(readings(model, w.tokens, budgets or [1], patterns)) for w in windows]
    return [summary([of[i] for of in found], budgets) for i in range(len(found[0]))]


def summary(own: Sequence[Reading], budgets: Sequence[int]) -> Row:
    """One pattern at one budget: a number for each window, to be paired with others.

    `beyond`: budget -> mean loss of each window where a query sees at least twice as many keys.
    """
    size = len(own[0].losses)
    edges = [0, *(FIRST_EDGE << i for i in range(64) if FIRST_EDGE << i < size), size]
    losses = torch.stack([reading.losses for reading in own])
    masses = [reading.attention_mass for reading in own]
    return {
        "pattern": own[0].pattern,
        "budget": own[0].budget,
        "nll": losses.mean(1).tolist(),
        "beyond": {str(b): losses[:, 2 * b - 1 :].mean(1).tolist() for b in budgets if own[0].budget in (None, b) and 2 * b <= size},
        "by_position": [{"start": a, "stop": b, "nll": losses[:, a:b].mean(1).tolist()} for a, b in zip(edges, edges[1:])],
        "kept_mass": None if None in masses else masses,
        "keys": float(np.mean([reading.keys_per_query for reading in own])),
        "seconds": float(np.mean([reading.seconds for reading in own])),
    }


class Overlap:
    """A selector that chooses by scores in the model's dtype and notes which of its keys FP8 scores choose too."""

    def __init__(self, budget: int) -> None:
        self.budget, self.shares = budget, list[float]()

    def __call__(self, inputs: LayerInputs, start: Tensor, end: Tensor) -> skim.Selection:
        index = inputs.index
        assert index is not None
        q, k = (codec.quantise(codec.hadamard(x)) for x in (index.q, index.k))
        chosen, other = (skim.select(*qk, index.weights, self.budget, start=start, end=end) for qk in ((index.q, index.k), (q, k)))
        assert isinstance(chosen, skim.Selection) and isinstance(other, skim.Selection)
        long = (end - start > self.budget)[..., None]
        keys = torch.zeros(*chosen.counts.shape, index.k.shape[1], dtype=torch.bool, device=start.device)
        keys.scatter_(-1, other.indices.clamp(min=0).long(), True)  # rows that see enough keys have no padding
        found = keys.gather(-1, chosen.indices.clamp(min=0).long()).float().mean(-1)
        self.shares.append(float(found[long].mean()))
        return chosen

    def mean(self) -> float:
        return float(np.mean(self.shares))


def places(windows: Iterable[Window]) -> Row:
    """Where windows are from."""
    return {"domains": [w.domain for w in windows], "documents": [w.document for w in windows]}


def first_of_each_domain(windows: Iterable[Window]) -> list[Window]:
    found: dict[str, Window] = {}
    for window in windows:
        found.setdefault(window.domain, window)
    return list(found.values())


@torch.no_grad()
def answers(model: Any, prompts: Sequence[list[int]]) -> list[tuple[list[int], int]]:
    """Each prompt with the model's greedy answer behind it, and how many tokens that has."""
    stop = model.generation_config.eos_token_id
    stops = stop if isinstance(stop, list) else [stop]
    longest = max(map(len, prompts))
    padded = torch.tensor([stops[:1] * (longest - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    made = model.generate(padded, attention_mask=mask, do_sample=False, max_new_tokens=ANSWER, pad_token_id=stops[0])
    found = []
    for prompt, answer in zip(prompts, made[:, longest:].tolist()):
        end = next((i + 1 for i, token in enumerate(answer) if token in stops), len(answer))
        found.append((prompt + answer[:end], end))
    return found


# ------------------------------------------------------------------------------------------------------------- report


class Report:
    """The rows of the issue's table out of the results that there are; see `score.py` for the targets."""

    def __init__(self, lab: Lab) -> None:
        self.lab, self.headline = lab, lab.headline()
        self.documents = [document for _, _, document in lab.places("heldout")]
        self.results = {name: json.loads(f.read_text()) for name in lab.jobs if (f := lab.out / f"{name}.json").exists()}

    def whole(self) -> Row:
        """What is committed."""
        if not self.results:
            raise ValueError(f"out: expected results of jobs, got none in {str(self.lab.out)!r}")
        rows = [row for make in (self.r1, self.r2, self.r4, self.r5, self.r6, self.r7, self.r8, self.r9) for row in make()]
        said = {key: self._all(key) for key in ("device", "driver", "commit")}
        versions = next(iter(self.results.values()))["versions"]
        command = "python benchmarks/retrofit.py --corpus .corpus --out retrofit --report FILE"
        splits = {name: {key: of[key] for key in ("sha256", "windows", "windows_by_domain")} for name, of in self.lab.described["splits"].items()}
        about = {"window": self.lab.window, "headline": self.headline, "splits": splits, "model": Path(self.lab.model_name).name}
        return {**said, "versions": versions, "command": command, "quick": False, **about, "rows": rows, "jobs": self.jobs()}

    def _percent(self, values: Sequence[float] | np.ndarray, reference: Sequence[float] | np.ndarray) -> Row:
        """`percent` of figures of the held-out windows."""
        return percent(values, reference, self.documents)

    def _all(self, key: str) -> str:
        return ", ".join(dict.fromkeys(str(result[key]) for result in self.results.values()))

    def jobs(self) -> list[Row]:
        """Every job: its time, its training, and what it measured over dense reading of the same weights."""
        told = []
        for name, result in self.results.items():
            rows = [*result.get("rows", []), *result.get("warmup", []), *result.get("fp8", [])]
            dense = next((row for row in rows if row["pattern"] == "dense"), None)
            tables = [self._table(row, dense, result) for row in rows]
            kept = {key: result[key] for key in ("training", "lr", "loss", "selection", "dense", "retrieval", "overlap") if key in result}
            told.append({"job": name, "seconds": result["seconds"], **kept, "table": tables})
        return told

    def _table(self, row: Row, dense: Row | None, result: Row) -> Row:
        mean = {"perplexity": math.exp(np.mean(row["nll"])), "windows": len(row["nll"]), "keys": row["keys"], "seconds": row["seconds"]}
        mean["kept_mass"] = row["kept_mass"] and float(np.mean(row["kept_mass"]))
        mean["by_position"] = [{**part, "nll": float(np.mean(part["nll"]))} for part in row["by_position"]]
        over = {}
        if dense is not None and row is not dense:
            difference = np.subtract(row["nll"], dense["nll"])
            over = {"over_dense": percent(row["nll"], dense["nll"], result["documents"])}
            of = np.array(result["domains"])
            over["by_domain"] = {domain: 100 * math.expm1(difference[of == domain].mean()) for domain in dict.fromkeys(result["domains"])}
        return {"pattern": row["pattern"], "budget": row["budget"], **({"change": row["change"]} if "change" in row else {}), **mean, **over}

    def _row(self, job: str, pattern: str, budget: int | None = None, within: str = "rows") -> Row:
        return next(row for row in self.results[job][within] if row["pattern"] == pattern and row["budget"] == budget)

    def _over_control(self, loss: str, budget: int, seeds: Sequence[int], beyond: bool) -> Row:
        """The sparse model over the dense control of its seed, in percent of perplexity, the mean of the seeds in each window."""

        def mean(kind: str, pattern: str, at: int | None) -> np.ndarray:
            rows = [self._row(control(loss, seed, budget) if kind == "dense" else f"heldout-{kind}-{loss}-{seed}", pattern, at) for seed in seeds]
            return np.mean([row["beyond"][str(budget)] if beyond else row["nll"] for row in rows], axis=0)

        return self._percent(mean("sparse", "dsa", budget), mean("dense", "dense", None))

    def r1(self) -> list[Row]:
        """Both stages over the dense control."""
        found = []
        for loss in LOSSES:
            for budget in self.lab.budgets[1:]:
                seeds = [seed for seed in SEEDS if {f"heldout-sparse-{loss}-{seed}", control(loss, seed, budget)} <= self.results.keys()]
                if not seeds:
                    continue
                own = self._over_control(loss, budget, seeds, beyond=False)
                single = [self._over_control(loss, budget, [seed], beyond=False)["percent"] for seed in seeds]
                beyond = self._over_control(loss, budget, seeds, beyond=True)
                about = {"case": "R1", "loss": loss, "headline": loss == self.headline, "budget": budget}
                found.append({**about, **own, "by_seed": single, "beyond_twice_budget": beyond, "seeds": len(seeds)})
        return found

    def r2(self) -> list[Row]:
        """The warm-up alone beside the oracle and the rules, and R3: the mass that it keeps of the oracle's."""
        found = []
        for budget in self.lab.budgets:
            name = f"patterns-{budget}"
            if name in self.results:
                rows = {pattern: self._row(name, pattern, budget) for pattern in ("dsa", "oracle", *RULES)}
                dense, own = self._row(name, "dense"), rows["dsa"]
                others = {pattern: self._percent(rows[pattern]["nll"], own["nll"]) for pattern in RULES}
                over = {pattern: self._percent(row["nll"], dense["nll"]) for pattern, row in rows.items()}
                about = {
                    "budget": budget,
                    "over_dense": over,
                    "over_oracle": self._percent(own["nll"], rows["oracle"]["nll"]),
                    "rules_over_dsa": others,
                }
                found.append({"case": "R2", **about, "closest_rule": min(others.values(), key=lambda o: o["low"])["low"]})
                if own["kept_mass"] and rows["oracle"]["kept_mass"]:
                    kept = {"kept_mass": float(np.mean(own["kept_mass"])), "oracle_mass": float(np.mean(rows["oracle"]["kept_mass"]))}
                    found.append({"case": "R3", "budget": budget, **kept, "share": kept["kept_mass"] / kept["oracle_mass"]})
        return found

    def r4(self) -> list[Row]:
        """Retrieval: the tasks and lengths that dense reading solves, and how far DSA is below it where it is furthest."""
        found = []
        for what in ("warmup", *LOSSES):
            name = f"retrieval-{what}"
            for budget in self.lab.budgets[1:] if name in self.results else []:
                own = [one for one in self.results[name]["retrieval"] if one["budget"] == budget and one["counts"]]
                if own:
                    tasks = [{key: one[key] for key in ("task", "length", "exact", "exact_over_dense")} for one in own]
                    least = min(one["exact_over_dense"]["high"] for one in own)
                    about = {"case": "R4", "after": what, "headline": what == self.headline, "budget": budget}
                    found.append({**about, "tasks": tasks, "least_high": least})
        return found

    def r5(self) -> list[Row]:
        """FP8 scores over those in the model's dtype."""
        found = []
        for budget in self.lab.budgets[1:3] if "scores" in self.results else []:
            own, other = self._row("scores", "dsa", budget, "fp8"), self._row("scores", "dsa", budget)
            mass = 100 * float(np.mean(own["kept_mass"]) - np.mean(other["kept_mass"]))
            overlap = self.results["scores"]["overlap"][str(budget)]
            found.append({"case": "R5", "budget": budget, **self._percent(own["nll"], other["nll"]), "mass_points": mass, "overlap": overlap})
        return found

    def r6(self) -> list[Row]:
        """A selection for several layers, over the dense control."""
        found = []
        for layers in (4, 2):
            result = self.results.get(f"reuse-{layers}")
            for budget in self.lab.budgets[1:] if result else []:
                if (beside := control(result["loss"], 0, budget)) not in self.results:
                    continue
                dense = self._row(beside, "dense")
                own = self._row(f"reuse-{layers}", "dsa", budget)
                beyond = self._percent(own["beyond"][str(budget)], dense["beyond"][str(budget)])
                about = {"case": "R6", "layers": layers, "budget": budget}
                found.append({**about, **self._percent(own["nll"], dense["nll"]), "beyond_twice_budget": beyond})
        return found

    def r7(self) -> list[Row]:
        """The adaptive budget over the fixed one of as many keys."""
        found = []
        for pair in self.results.get("adaptive", {}).get("pairs", []):
            own, fixed = pair["adaptive"], pair["fixed"]
            about = {"mass": pair["mass"], "keys": own["keys"], "fixed_budget": fixed["budget"], "fixed_keys": fixed["keys"]}
            found.append({"case": "R7", **about, **self._percent(own["nll"], fixed["nll"])})
        return [{**row, "headline": row is min(found, key=lambda r: r["percent"])} for row in found]

    def r8(self) -> list[Row]:
        """Speed of the warm-up."""
        done = [self.results[f"warmup-{seed}"]["training"] for seed in SEEDS if f"warmup-{seed}" in self.results]
        names = ("tokens_per_second", "seconds", "tokens", "peak_gib")
        return [{"case": "R8", **{name: float(np.median([run[name] for run in done])) for name in names}, "runs": len(done)}] if done else []

    def r9(self) -> list[Row]:
        """What the sparse stage took from the untouched model, beside what the same steps on the same text took from the dense control."""
        found = []
        for loss in LOSSES:
            result = self.results.get(f"agreement-{loss}", {})
            for what in ("chat", "text") if result else ():
                sparse, dense = result["sparse"][what], result["dense"][what]
                means = {f"{kind}_{name}": float(np.mean(of[name])) for kind, of in (("sparse", sparse), ("dense", dense)) for name in ("kl", "top1")}
                paired = {name: paired_t(sparse[name], dense[name]).to_dict() for name in ("kl", "top1")}
                about = {"case": "R9", "loss": loss, "headline": loss == self.headline, "what": what, "prompts": len(sparse["kl"])}
                found.append({**about, **means, "kl_over_control": paired["kl"], "top1_over_control": paired["top1"]})
        return found


def percent(values: Sequence[float] | np.ndarray, reference: Sequence[float] | np.ndarray, documents: Sequence[str]) -> Row:
    """Perplexity over another in percent with its paired 95 % interval, from mean losses of the same windows."""
    over: Interval = paired_t(list(values), list(reference), documents)
    ends = {"percent": over.mean, "low": over.low, "high": over.high}
    return {name: None if x is None else 100 * math.expm1(x) for name, x in ends.items()}


# ------------------------------------------------------------------------------------------------------------ running


def brief(found: Row) -> str:
    """A result in a line: speed of its training, perplexities, times."""
    told = [f"{found['training']['tokens_per_second']:,.0f} tokens/s"] if "training" in found else []
    for row in found.get("rows", [])[:10]:
        name = row["pattern"] + (f"@{row['budget']}" if row["budget"] else "")
        told.append(f"{name} {math.exp(np.mean(row['nll'])):.3f} ({row['seconds'] * 1e3:.0f} ms)")
    return "  ".join(told)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, default=Path(".corpus"), help="what `corpus.py build` wrote (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("retrofit"), help="results and what is trained (default: %(default)s)")
    parser.add_argument("--model", default="smollm2-135m", help="name, folder or .gguf file (default: %(default)s)")
    parser.add_argument("--jobs", default="*", help="names or patterns of jobs, with commas between (default: all)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no job after so many")
    parser.add_argument("--warmup-steps", type=int, help="default: the recipe's")
    parser.add_argument("--sparse-steps", type=int, help="default: the recipe's")
    parser.add_argument("--report", type=Path, help="write here what all results say together, at the end")
    parser.add_argument("--list", action="store_true", help="print the jobs, and stop")
    args = parser.parse_args()
    if not args.list:
        args.out.mkdir(parents=True, exist_ok=True)
    lab = Lab(args.corpus, args.out, args.model, args.warmup_steps, args.sparse_steps)
    wanted = [pattern for pattern in args.jobs.split(",") if pattern]
    for pattern in wanted:
        if not fnmatch.filter(lab.jobs, pattern):
            parser.error(f"--jobs: expected some of {', '.join(lab.jobs)}, got {pattern!r}")
    began, failed = time.perf_counter(), []
    for name in [job for pattern in wanted for job in fnmatch.filter(lab.jobs, pattern)]:
        if args.list:
            print(name)
        elif time.perf_counter() - began > 60 * args.minutes:
            print(f"{name:<28} not begun: {args.minutes:g} minutes are over", flush=True)
        else:
            try:
                lab.result(name)
            except Exception:  # the other jobs may still be worth their time
                traceback.print_exc()
                failed.append(name)
    if args.report and not args.list:
        write_json(args.report, Report(lab).whole())
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
