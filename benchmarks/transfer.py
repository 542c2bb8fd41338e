"""Whether the warm-up's defaults carry over: small models trained from scratch, and their indexers by the default recipe.

    python benchmarks/transfer.py --json benchmarks/results/cpu-transfer.json

Three dense models learn texts that only attention to their content predicts. One is the yardstick, one is four times as
wide, one has norms of queries and keys (Qwen3). Each then gets indexers by the unchanged default recipe, on shorter rows
and in fewer steps, and by others whose rate or whose fresh weights are a quarter or four times of the recipe's. Some ten
minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any
from unittest import mock

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

import skim
from skim.bench.runner import machine, write_json
from skim.evaluation import readings
from skim.huggingface.convert import attach
from skim.training import Recipe, Rows, prepare, stage, train
from skim.training.recipe import index_rate

Row = dict[str, Any]

QUESTIONS, ANSWERS = 16, 8  # that there are, and to each of them
WORDS = QUESTIONS * (1 + ANSWERS)
HEAD_DIM, LAYERS = 32, 2
BATCH = 16  # documents in a step of a dense model
RATE, RAMP = 0.32, 50  # of a dense model: its rate times its width, and the steps over which it rises
SETTINGS = ((1.0, 1.0), (0.25, 1.0), (4.0, 1.0), (1.0, 0.25), (1.0, 4.0))  # factors of the rate and of the fresh weights
MODELS: dict[str, tuple[int, Any, Any]] = {
    "Llama": (64, LlamaConfig, LlamaForCausalLM),
    "Llama, four times as wide": (256, LlamaConfig, LlamaForCausalLM),
    "Qwen3, norms of queries and keys": (64, Qwen3Config, Qwen3ForCausalLM),
}


@dataclass(frozen=True)
class Plan:
    """How long everything is.

    Attributes:
        length: words of a document, which is a row.
        budget: keys that a query reads.
        dense_steps, steps: of a model from scratch, and of a warm-up.
        documents, held_out: that indexers are trained on, and that are measured.
    """

    length: int = 256
    budget: int = 16
    dense_steps: int = 300
    steps: int = 200
    documents: int = 400
    held_out: int = 32


QUICK = Plan(length=64, budget=8, dense_steps=2, steps=2, documents=2, held_out=2)


def texts(count: int, length: int, seed: int) -> np.ndarray:
    """Words `[count, length]`: questions by lot, each followed by its answer in that document, a word of the question's own.

    An answer can't be known when its question comes for the first time. Later it stands behind or is an earlier word, anywhere.
    """
    numbers = np.random.default_rng(seed)
    answers = QUESTIONS + np.arange(QUESTIONS) * ANSWERS + numbers.integers(0, ANSWERS, (count, QUESTIONS))
    asked = numbers.integers(0, QUESTIONS, (count, length // 2))
    return np.stack((asked, np.take_along_axis(answers, asked, 1)), -1).reshape(count, length)


def answer_loss(model: Any, words: np.ndarray) -> Tensor:
    """Mean negative log-likelihood of the answers."""
    tokens = torch.from_numpy(words).to(model.device)
    labels = tokens.clone()
    labels[:, ::2] = -100
    return model(tokens, labels=labels, use_cache=False).loss


def dense_model(name: str, plan: Plan, device: torch.device) -> Any:
    """A model that was trained from scratch."""
    width, config, family = MODELS[name]
    heads = width // HEAD_DIM
    torch.manual_seed(0)
    shape = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": LAYERS, "initializer_range": width**-0.5}
    attention = {"num_attention_heads": heads, "num_key_value_heads": heads // 2, "head_dim": HEAD_DIM}
    model = family(config(vocab_size=WORDS, max_position_embeddings=plan.length, **shape, **attention)).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE / width, betas=(0.9, 0.95), weight_decay=0.0)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / RAMP) * (1 - step / plan.dense_steps))
    for step in range(plan.dense_steps):
        answer_loss(model, texts(BATCH, plan.length, seed=1_000 + step)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
    return model.eval()


def rows(plan: Plan, folder: Path) -> Rows:
    """Documents as `skim train` reads them: one a line, tokenised into packed rows."""
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(WORDS)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    lines = (json.dumps({"text": " ".join(f"w{word}" for word in text)}) for text in texts(plan.documents, plan.length, seed=0))
    (folder / "texts.jsonl").write_text("\n".join(lines) + "\n")
    return prepare(folder / "texts.jsonl", PreTrainedTokenizerFast(tokenizer_object=words), plan.length, folder / "cache")


@contextlib.contextmanager
def fresh_weights(factor: float) -> Iterator[None]:
    """Within this fresh indexers have weights of that many times the recipe's size."""

    def initialise(rms: dict[nn.Module, float]) -> None:
        stage_initialise({layer: value / factor for layer, value in rms.items()})

    stage_initialise = stage.initialise
    with mock.patch.object(stage, "initialise", initialise):
        yield


def warmed(dense: Any, data: Rows, plan: Plan, rate: float, init: float, out: Path) -> tuple[Any, Row]:
    """A copy of the model with indexers behind the warm-up, and the report of the run."""
    model = copy.deepcopy(dense)
    attach(model, skim.Config(budget=plan.budget))
    peak = Recipe().resolved(chat=False, accelerated=False).index_lr
    assert peak is not None
    recipe = Recipe(steps=plan.steps, length=plan.length, index_lr=rate * peak)
    with fresh_weights(init):
        report = train(model, data, recipe, out=out)
    return model, report


def measured(model: Any, plan: Plan) -> Row:
    """Kept mass and loss of DSA and of the oracle on held-out documents."""
    words = torch.from_numpy(texts(plan.held_out, plan.length, seed=1)).to(model.device)
    found = [{one.pattern: one for one in readings(model, text[None], [plan.budget], ("dense", "dsa", "oracle", "window"))} for text in words]
    mass = {pattern: fmean(of[pattern].attention_mass for of in found) for pattern in ("dsa", "oracle", "window")}
    loss = {pattern: fmean(float(of[pattern].losses[::2].mean()) for of in found) for pattern in ("dense", "dsa", "oracle", "window")}
    return {"kept_mass": mass, "share": mass["dsa"] / mass["oracle"], "answer_loss": loss}


def run(plan: Plan, device: torch.device) -> Row:
    """A row for each model and setting."""
    found = []
    with tempfile.TemporaryDirectory() as name:
        data = rows(plan, Path(name))
        for model_name, (width, *_) in MODELS.items():
            dense = dense_model(model_name, plan, device)
            for number, (rate, init) in enumerate(SETTINGS):
                began = time.perf_counter()
                model, report = warmed(dense, data, plan, rate, init, Path(name) / f"{model_name}-{number}")
                rms = median(report["input_rms"])
                about = {"model": model_name, "width": width, "input_rms": rms, "rate": rate, "init": init}
                about["matrices_lr"] = index_rate(report["recipe"]["index_lr"], rms, width)
                found.append({**about, "kl": fmean(report["kl"][-10:]), **measured(model, plan), "seconds": time.perf_counter() - began})
                print(json.dumps(found[-1]), flush=True)
    about = {name: getattr(plan, name) for name in ("length", "budget", "dense_steps", "steps")}
    return {**machine(device), "command": "python benchmarks/transfer.py --json FILE", "plan": about, "rows": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="sizes too small to mean anything: does it run?")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    result = {**run(QUICK if arguments.quick else Plan(), torch.device(arguments.device)), "quick": arguments.quick}
    if arguments.json:
        write_json(arguments.json, result)


if __name__ == "__main__":
    main()
