"""Kills `skim train ... --resume` at random moments: is any file corrupt, and does the run end as one that nobody killed?

    python benchmarks/killed.py --json benchmarks/results/cpu-killed.json

A tiny Llama with random weights trains on a shipped text, in both stages. The process is killed (SIGKILL, which it can't
catch) at moments drawn over the time that a whole run takes, its start included, and the same command goes on. After each
kill every file in the folder is read. A run that reaches its end is compared with the one that was left alone: losses,
adapter and weights, bit for bit. Then another begins, until there were enough kills. Some ten minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from skim.bench.runner import machine, write_json
from skim.evaluation.texts import read_text
from skim.training import checkpoint

Row = dict[str, Any]

STEPS = {"warmup": 150, "sparse": 100}
LENGTH, BUDGET = 256, 32
SAVE_EVERY = 1  # step, so that many moments lie in the writing of a checkpoint


def write_model(folder: Path, text: str) -> None:
    """A Llama with random weights, and a tokenizer with a token for each character of the text."""
    letters = {letter: i for i, letter in enumerate(sorted(set(text)))}
    made = Tokenizer(models.WordLevel(letters, unk_token=" "))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=made).save_pretrained(folder)
    torch.manual_seed(0)
    shape = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.3,
    }
    LlamaForCausalLM(LlamaConfig(vocab_size=len(letters), max_position_embeddings=LENGTH, **shape)).save_pretrained(folder)


class Lab:
    """A model and a text in a folder, and the command that trains on them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        write_model(folder / "model", text := read_text("persuasion"))
        (folder / "text.txt").write_text(text, encoding="utf-8")

    def start(self, stage: str, out: Path) -> subprocess.Popen[bytes]:
        """The command as a user types it; what it prints is in a file beside `out`."""
        arguments = ["--data", "text.txt", "--out", str(out), "--length", str(LENGTH), "--steps", str(STEPS[stage])]
        arguments += ["--save-every", str(SAVE_EVERY), "--resume"]
        arguments += ["--budget", str(BUDGET)] if stage == "warmup" else ["--adapter", "warmup/adapter", "--loss", "lm"]
        own = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": str(self.folder / "cache")}
        command = [sys.executable, "-c", "from skim.cli import main; main()", "train", stage, "model", *arguments]
        with open(out.with_suffix(".log"), "wb") as log:
            return subprocess.Popen(command, cwd=self.folder, env={**os.environ, **own}, stdout=log, stderr=subprocess.STDOUT)

    def run(self, stage: str, out: Path, moment: float | None = None) -> tuple[bool, float]:
        """Train to the end, or until the process is killed after `moment` seconds: whether it ended by itself, and the seconds."""
        began, process = time.perf_counter(), self.start(stage, out)
        try:
            process.wait(moment)
        except subprocess.TimeoutExpired:
            process.kill()
        if process.wait() not in (0, -signal.SIGKILL):
            raise RuntimeError(out.with_suffix(".log").read_text(errors="replace"))
        return process.returncode == 0, time.perf_counter() - began


def corrupt(out: Path) -> Iterator[str]:
    """The files that can't be read, or that don't say what their name does."""
    for file in sorted(file for file in out.rglob("*") if file.is_file() and ".writing-" not in str(file)):
        try:
            if file.suffix == ".json":
                json.loads(file.read_text())
            elif file.suffix == ".safetensors":
                load_file(file)
            elif file.name == checkpoint.FILE and file.parent.name != f"step-{checkpoint.load(file.parent)['run']['step']:08d}":
                yield f"{file.relative_to(out)}: another step's"
        except Exception as error:  # whatever a reader says of a broken file
            yield f"{file.relative_to(out)}: {error}"


def differences(out: Path, whole: Path) -> list[str]:
    """What a run that was killed left otherwise than the one that wasn't."""
    found, expected = (json.loads((folder / "run.json").read_text()) for folder in (out, whole))
    curves = [name for name in ("loss", "kl", "kept_mass") if found[name] != expected[name]]
    weights = [str(file.relative_to(whole)) for file in whole.glob("[am]*/*") if file.read_bytes() != (out / file.relative_to(whole)).read_bytes()]
    return curves + weights + [file.name for file in out.rglob(".writing-*")]


def killed(lab: Lab, stage: str, kills: int, moments: random.Random) -> Row:
    """Kill a stage so many times, and say what was found."""
    whole = lab.folder / stage
    _, seconds = lab.run(stage, whole)
    at, steps, half, broken, other = list[float](), list[int](), 0, list[str](), list[str]()
    runs = 0
    out = lab.folder / f"{stage}-{runs}"
    while len(at) < kills:
        new, moment = not out.exists(), moments.uniform(0, seconds)
        ended, took = lab.run(stage, out, moment)
        if ended:
            seconds = took if new else seconds  # other work on the machine may be done
            other += differences(out, whole)
            runs += 1
            out = lab.folder / f"{stage}-{runs}"
            continue
        at.append(moment)
        steps.append(max((int(folder.name.removeprefix("step-")) for folder in checkpoint.steps(out)), default=0))
        half += any(True for _ in out.rglob(".writing-*"))
        broken += corrupt(out)
    lab.run(stage, out)
    other += differences(out, whole)
    report = json.loads((out / "run.json").read_text())
    final = {name: report[name][-1] for name in ("loss", "kl") if report[name]}
    about = {"stage": stage, "steps": STEPS[stage], "save_every": SAVE_EVERY, "seconds": seconds, "kills": len(at), "runs": runs + 1}
    return {**about, "at": at, "last_checkpoint": steps, "while_writing": half, "corrupt": broken, "differences": other, "final": final}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="of each stage (default: %(default)s)")
    parser.add_argument("--stages", nargs="+", choices=tuple(STEPS), default=list(STEPS))
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--json", type=Path, help="write what was found here")
    arguments = parser.parse_args()
    moments, rows = random.Random(arguments.seed), []
    with tempfile.TemporaryDirectory() as name:
        lab = Lab(Path(name))
        for stage in arguments.stages:
            rows.append(killed(lab, stage, arguments.kills, moments))
            print(json.dumps(rows[-1]), flush=True)
    result = {**machine(torch.device("cpu")), "command": "python benchmarks/killed.py --json FILE", "rows": rows}
    if arguments.json:
        write_json(arguments.json, result)
    if any(row["corrupt"] or row["differences"] for row in rows):
        sys.exit("a kill left something corrupt, or changed how the run ended")


if __name__ == "__main__":
    main()
