"""The loop of both stages: a probe first, then steps and checkpoints, at the end a verdict and the adapter."""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import platform
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from skim.config import Config
from skim.huggingface import load, revert, save
from skim.huggingface.adapter import describe
from skim.huggingface.state import state_of
from skim.training import checkpoint
from skim.training.data import Rows, order
from skim.training.recipe import LORA_RANK, Recipe
from skim.training.stage import Batch, Metrics, Stage, audit, base_digest
from skim.training.variants import configurations
from skim.training.verdict import fifths, verdict

PROBE_STEPS = 3
LINES = 20  # that a run writes, with the kept mass at each
LEAST_SHARE = 0.25  # of queries that see more than the budget
LEAST_LENGTH = 512
# What a RuntimeError says where a driver, a library or the CPU's allocator finds no memory instead of PyTorch's own.
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "ALLOC_FAILED")
MAY_CHANGE = ("save_every", "tracker", "id", "revision")  # of recipe and base, when a run goes on


@dataclass
class Run:
    """Where a run stands; all of it is in its checkpoints, beside weights and optimizer."""

    step: int = 0
    seconds: float = 0.0
    loss: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    mass: dict[int, float] = field(default_factory=dict)
    layers: dict[int, float] = field(default_factory=dict)
    variants: dict[str, list[float]] = field(default_factory=dict)


def train(
    model: Any,
    data: Rows,
    recipe: Recipe | None = None,
    *,
    out: str | Path,
    tokenizer: Any = None,
    resume: bool = False,
    dry_run: bool = False,
    console: Console | None = None,
    about: dict[str, Any] | None = None,
    variants: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """Train a converted model: its indexers (`Recipe(stage="warmup")`), then all of it (`Recipe(stage="sparse")`).

    `out` gets `adapter/` (what `skim.load` takes), `run.json` (what is returned), `checkpoints/`, and after the sparse
    stage `model/` with the trained weights or `lora/`. The model is left trained and in sparse mode.

    Args:
        model: a converted model; for the sparse stage with trained indexers.
        data: of `skim.training.prepare`, in rows of `recipe.length`.
        recipe: None is the warm-up.
        out: a new folder.
        tokenizer: saved beside a trained model; its chat template decides between the losses of the sparse stage.
        resume: go on from the last checkpoint in `out`, if there is one.
        dry_run: stop after the probe.
        console: where progress is shown; None shows none.
        about: what else `run.json` is to say.
        variants: name -> fields of `Config` (index_n_heads, index_head_dim, rope_dim, rope_layout) that differ from the
            model's: further indexers that the warm-up trains on the same forward passes and teacher, each as if it were
            trained alone; `out/variants/NAME` is an adapter as `out/adapter` is.

    Returns:
        Everything known of the run, as in `run.json`; after a dry run the probe alone.

    Raises:
        ValueError: the data is no longer than the budget, `out` belongs to another run, or the run doesn't fit into
            memory: the nearest settings that do are named.
        RuntimeError: the base changed in the warm-up.
    """
    from accelerate import Accelerator

    out = Path(out)
    recipe = recipe or Recipe()
    if variants and recipe.stage != "warmup":
        raise ValueError("variants: expected none in the sparse stage, whose selections are of one indexer a layer")
    configs = configurations(state_of(model).config, variants or {})
    # The recipe says what is computed in and accumulated; variables that `accelerate launch` sets would do it a second time.
    accelerator = Accelerator(log_with=recipe.tracker, project_dir=str(out), mixed_precision="no")
    accelerator.gradient_accumulation_steps = 1
    if str(accelerator.distributed_type).split(".")[-1] not in ("NO", "MULTI_GPU", "MULTI_CPU"):
        raise ValueError(f"accelerate: expected one process or data parallelism, got {accelerator.distributed_type}")
    console = console if console is not None and accelerator.is_main_process else Console(quiet=True)
    chat = bool(getattr(tokenizer, "chat_template", None))
    recipe = recipe.resolved(chat=chat, accelerated=accelerator.device.type != "cpu")
    if data.length != recipe.length:
        raise ValueError(f"data: expected rows of recipe.length ({recipe.length}), got {data.length}")
    model.to(accelerator.device)
    report = {
        **(about or {}),
        "stage": recipe.stage,
        "recipe": asdict(recipe),
        "config": asdict(state_of(model).config),
        "variants": {name: {"config": asdict(config)} for name, config in configs.items()},
        "base": describe(model),
        **_surroundings(accelerator),
    }
    report["data"] = {"key": data.key, "rows": len(data), "tokens": len(data) * data.length, **_share(model, data, console)}
    found = _checkpoint(out, report, resume, dry_run)
    if accelerator.is_main_process and not dry_run:
        checkpoint.clean(out)
    with _repeatable(accelerator.device):
        digest = base_digest(model) if recipe.stage == "warmup" else ""
        if found is None:
            report["probe"] = _probe(model, data, recipe, accelerator, console, configs)
            if dry_run:
                return report
        else:
            report["probe"] = found["report"]["probe"]
        stage = Stage(model, recipe, accelerator, _first(data, recipe, accelerator), configs)
        run = Run()
        if found is not None:
            run = Run(**found["run"])
            _restore(stage, found)
            console.print(f"Going on after step {run.step}.")
        if recipe.tracker:
            accelerator.init_trackers("skim", config={k: v for k, v in asdict(recipe).items() if v is not None})
        _steps(stage, run, data, out, report, console)
        if recipe.stage == "warmup":
            audit(stage, digest)
            report["audit"] = "the base has no gradient and no optimizer state, and is bit for bit as it was"
        report |= _summary(stage, run)
        accelerator.wait_for_everyone()
        _save(stage, out, report, tokenizer, accelerator.is_main_process)
        console.print(_table(report))
        console.print(f"Written to {out}", highlight=False, soft_wrap=True)
        if recipe.tracker:
            accelerator.end_training()
        return report


def _share(model: Any, data: Rows, console: Console) -> dict[str, float]:
    """Share of the queries that see more keys than the budget; without any there is nothing to learn."""
    budget = state_of(model).config.budget
    share = data.share_longer(budget)
    console.print(
        f"{len(data):,} rows of {data.length:,} tokens; {share:.1%} of the queries see more than {budget:,} keys, the budget.",
        highlight=False,
        soft_wrap=True,
    )
    if share == 0:
        raise ValueError(
            f"data: expected queries that see more than the budget of {budget} keys, got none; "
            "take longer documents, longer rows (--length) or a smaller budget (--budget)"
        )
    if share < LEAST_SHARE:
        console.print(f"[yellow]Less than {LEAST_SHARE:.0%}: take longer documents, or a smaller --budget.[/yellow]", soft_wrap=True)
    return {"share_longer_than_budget": share}


def _batches(data: Rows, recipe: Recipe, accelerator: Any, step: int) -> list[Batch]:
    """The batches of a step: a function of the step, so that a run may go on anywhere."""
    made = []
    for i in range(recipe.accumulate):
        first = ((step * recipe.accumulate + i) * accelerator.num_processes + accelerator.process_index) * recipe.batch
        rows = [data[_order(len(data), recipe.seed, n // len(data))[n % len(data)]] for n in range(first, first + recipe.batch)]
        made.append({name: _moved(torch.stack([row[name] for row in rows]), accelerator.device) for name in rows[0]})
    return made


def _moved(value: Tensor, device: torch.device) -> Tensor:
    """value on the device; from pinned memory, so that nobody waits for the steps that are still to be computed."""
    return value.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else value.to(device)


def _first(data: Rows, recipe: Recipe, accelerator: Any) -> Batch:
    """The row that the indexers' inputs are measured on, the same one in every process."""
    return {name: value[None].to(accelerator.device) for name, value in data[_order(len(data), recipe.seed, 0)[0]].items()}


_orders: dict[tuple[int, int, int], list[int]] = {}


def _order(rows: int, seed: int, epoch: int) -> list[int]:
    """`order`, kept for the epochs in use."""
    key = rows, seed, epoch
    if key not in _orders:
        while len(_orders) >= 2:
            del _orders[next(iter(_orders))]
        _orders[key] = order(*key)
    return _orders[key]


# ------------------------------------------------------------------------------------------------------------ probe


@contextlib.contextmanager
def _repeatable(device: torch.device) -> Iterator[None]:
    """On a GPU sums are made in one order within this, so that a run that goes on from a checkpoint gives the same bits."""
    if device.type != "cuda":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first used
    fills: Any = torch.utils.deterministic  # else everything that is allocated would be filled with NaN first
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled(), fills.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    fills.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        fills.fill_uninitialized_memory = before[2]


def _probe(model: Any, data: Rows, recipe: Recipe, accelerator: Any, console: Console, configs: dict[str, Config]) -> dict[str, float]:
    """Memory and time of a run, from three steps that leave nothing behind.

    Raises:
        ValueError: it doesn't fit; the nearest settings that do are named.
    """
    assert recipe.steps is not None
    tried = _fits(model, data, recipe, accelerator, configs)
    if tried is None:
        where = f"the memory of {accelerator.device}"
        for flags, lighter in _lighter(recipe):
            if found := _fits(model, data.with_length(lighter.length), lighter, accelerator, configs):
                raise ValueError(f"memory: this run needs more than {where}; it fits with {flags} ({found[1]:.1f} GiB)")
        raise ValueError(f"memory: this run needs more than {where}, and so does every smaller setting")
    seconds, peak = tried
    hours = seconds * recipe.steps / 3600
    tokens = recipe.length * recipe.batch * recipe.accumulate * accelerator.num_processes
    line = f"{recipe.steps:,} steps of {tokens:,} tokens: {peak:.1f} GiB of memory at most, about {hours:.2g} hours."
    console.print(line, highlight=False, soft_wrap=True)
    return {"peak_gib": peak, "hours": hours, "seconds_per_step": seconds}


def _fits(model: Any, data: Rows, recipe: Recipe, accelerator: Any, configs: dict[str, Config]) -> tuple[float, float] | None:
    """`_try`, or None if memory ran out. What ran out is let go before this returns: an error in hand would hold its frames."""
    try:
        return _try(model, data, recipe, accelerator, configs)
    except (torch.OutOfMemoryError, MemoryError):
        pass
    except RuntimeError as error:
        if not any(sign in str(error) for sign in OUT_OF_MEMORY):
            raise
    if accelerator.device.type == "cuda":
        torch.cuda.empty_cache()
    return None


def _try(model: Any, data: Rows, recipe: Recipe, accelerator: Any, configs: dict[str, Config]) -> tuple[float, float]:
    """Seconds of a step and peak memory in GiB. The model's weights are put back."""
    cuda = accelerator.device.type == "cuda"
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    everything = recipe.stage == "sparse" and recipe.lora is None
    before = {name: p.detach().to("cpu", copy=True) for name, p in model.named_parameters() if everything or ".indexer." in name}
    stage, times = None, []
    try:
        stage = Stage(model, recipe, accelerator, _first(data, recipe, accelerator), configs)
        for step in range(PROBE_STEPS):
            began = time.perf_counter()
            batches = _batches(data, recipe, accelerator, step)
            stage.step(step, batches)
            if cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
        stage.kept_mass(batches[0])  # with memory of its own: a captured step keeps what it took
    finally:
        if stage is not None:
            stage.close()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in before:
                    parameter.copy_(before[name])
    return min(times), _peak(accelerator)  # the first step compiles and allocates


def _peak(accelerator: Any) -> float:
    """GiB: the accelerator's, or all that this process ever used."""
    if accelerator.device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / (2**30 if sys.platform == "darwin" else 2**20)


def _lighter(recipe: Recipe) -> Iterator[tuple[str, Recipe]]:
    """Settings that need less and less, with the flags that ask for them; what is computed stays the same as long as it can."""
    flags: list[str] = []
    if recipe.batch > 1:
        recipe = replace(recipe, batch=1, accumulate=recipe.accumulate * recipe.batch)
        flags = ["--batch 1", f"--accumulate {recipe.accumulate}"]
        yield " ".join(flags), recipe
    if recipe.stage == "sparse" and not recipe.checkpointing:
        recipe, flags = replace(recipe, checkpointing=True), [*flags, "--checkpointing"]
        yield " ".join(flags), recipe
    if recipe.stage == "sparse" and recipe.lora is None:
        recipe, flags = replace(recipe, lora=LORA_RANK), [*flags, f"--lora {LORA_RANK}"]
        yield " ".join(flags), recipe
    while recipe.length // 2 >= LEAST_LENGTH:
        recipe = replace(recipe, length=recipe.length // 2)
        yield " ".join([*flags, f"--length {recipe.length}"]), recipe


# ------------------------------------------------------------------------------------------------------------ steps


def _steps(stage: Stage, run: Run, data: Rows, out: Path, report: dict[str, Any], console: Console) -> None:
    """Train up to the last step, writing checkpoints, lines and what trackers want."""
    recipe, accelerator = stage.recipe, stage.accelerator
    assert recipe.steps is not None
    every = max(1, recipe.steps // LINES)
    waiting: list[Metrics] = []
    speed = recipe.length * recipe.batch * recipe.accumulate * accelerator.num_processes
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(recipe.stage, total=recipe.steps, completed=run.step)
        began, counted = time.perf_counter(), run.step
        for step in range(run.step, recipe.steps):
            batches = _batches(data, recipe, accelerator, step)
            waiting.append(stage.step(step, batches))
            run.step = step + 1
            progress.advance(task)
            line, keep = run.step % every == 0 or run.step == recipe.steps, run.step % recipe.save_every == 0 or run.step == recipe.steps
            if not (line or keep):
                continue
            _note(run, waiting)
            seconds = time.perf_counter() - began
            run.seconds += seconds
            if line:
                mass = stage.kept_mass(batches[0])
                if mass is not None:
                    run.mass[run.step] = mass
                values = _values(run, stage, speed * (run.step - counted) / seconds)
                console.print(
                    f"step {run.step:>5}  " + "  ".join(f"{name} {_shown(value)}" for name, value in values.items()), highlight=False, soft_wrap=True
                )
                if recipe.tracker:
                    accelerator.log(values, step=run.step)
            if keep and accelerator.is_main_process:
                checkpoint.save(out, run.step, _state(stage, run, report))
            began, counted = time.perf_counter(), run.step


def _note(run: Run, waiting: list[Metrics]) -> None:
    """Move the numbers of the last steps to the CPU."""
    for metrics in waiting:
        if metrics.loss is not None:
            run.loss.append(float(metrics.loss))
        if metrics.kl is not None:
            run.kl.append(float(metrics.kl))
            run.layers = {layer: float(value) for layer, value in metrics.layers.items()}
        for name, value in metrics.variants.items():
            run.variants.setdefault(name, []).append(float(value))
    waiting.clear()


def _values(run: Run, stage: Stage, speed: float) -> dict[str, float]:
    values = {"lr": stage.optimizer.param_groups[0]["lr"], "tokens/s": speed}
    found = {"loss": run.loss[-1:], "kl": run.kl[-1:], "kept mass": [run.mass[run.step]] if run.step in run.mass else []}
    return {name: value[0] for name, value in found.items() if value} | values


def _shown(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.4g}"


# ------------------------------------------------------------------------------------------------------ checkpoints


def _state(stage: Stage, run: Run, report: dict[str, Any]) -> dict[str, Any]:
    weights = {name: p.detach().cpu() for name, p in stage.trained().items()}
    return {"run": asdict(run), "weights": weights, "optimizer": stage.optimizer.state_dict(), "report": report}


def _restore(stage: Stage, found: dict[str, Any]) -> None:
    with torch.no_grad():
        for name, parameter in stage.trained().items():
            parameter.copy_(found["weights"][name])
    stage.optimizer.load_state_dict(found["optimizer"])


def _checkpoint(out: Path, report: dict[str, Any], resume: bool, dry_run: bool) -> dict[str, Any] | None:
    """The last checkpoint, if the run is to go on from it."""
    there = checkpoint.steps(out)
    if dry_run or not there:
        return None
    if not resume:
        raise ValueError(f"out: expected a new folder, or --resume to go on, got {str(out)!r} with checkpoints in it")
    found = checkpoint.load(there[-1])
    then, now = _identity(found["report"]), _identity(report)
    for name in {**now, **then}:
        if now.get(name) != then.get(name):
            raise ValueError(f"{name}: expected {then.get(name)!r}, with which the run in {str(out)!r} began, got {now.get(name)!r}")
    return found


def _identity(report: dict[str, Any]) -> dict[str, Any]:
    """What makes a run the same run: recipe, config, base weights, data and number of processes, by name."""
    parts = ("recipe", "config", "variants", "base", "data")
    named = {f"{part}.{name}": value for part in parts for name, value in report[part].items() if name not in MAY_CHANGE}
    return {**named, "processes": report["processes"]}


# -------------------------------------------------------------------------------------------------------------- end


def _surroundings(accelerator: Any) -> dict[str, Any]:
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("skim-attention", "torch", "transformers", "accelerate", "peft", "triton"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    device = torch.cuda.get_device_name(accelerator.device) if accelerator.device.type == "cuda" else platform.machine() or "cpu"
    return {"device": device, "processes": accelerator.num_processes, "versions": versions}


def _summary(stage: Stage, run: Run) -> dict[str, Any]:
    recipe = stage.recipe
    tokens = run.step * recipe.length * recipe.batch * recipe.accumulate * stage.accelerator.num_processes
    summary: dict[str, Any] = {"steps": run.step, "tokens": tokens, "seconds": run.seconds, "tokens_per_second": tokens / max(run.seconds, 1e-9)}
    summary["peak_gib"] = _peak(stage.accelerator)
    summary["input_rms"] = list(stage.rms.values())
    summary |= {"loss": run.loss, "kl": run.kl, "kept_mass": {str(step): value for step, value in run.mass.items()}}
    summary["kl_by_layer"] = {str(layer): value for layer, value in run.layers.items()}
    if run.kl:
        summary["verdict"] = verdict(run.kl, recipe.stage == "warmup")
    if stage.variants:
        curves = run.variants.items()
        summary["variants"] = {
            name: {"config": asdict(stage.variants.configs[name]), "kl": curve, "verdict": verdict(curve, True)} for name, curve in curves
        }
    return summary


def _save(stage: Stage, out: Path, report: dict[str, Any], tokenizer: Any, main: bool) -> None:
    """The adapter, and what else was trained; the model is itself again afterwards."""
    recipe = stage.recipe
    if recipe.lora is not None and main:
        with checkpoint.new_folder(out / "lora") as folder:
            stage.model.save_pretrained(folder)
    if main:
        stage.settle()
        with checkpoint.new_folder(out / "adapter") as folder:
            save(stage.model, folder)
        if stage.variants:
            for name in stage.variants.indexers:
                with checkpoint.new_folder(out / "variants" / name) as folder, stage.variants.installed(name):
                    save(stage.model, folder)
    model = stage.finish()
    if recipe.stage == "sparse" and recipe.lora is None and main:
        with checkpoint.new_folder(out / "model") as folder:
            revert(model)
            model.save_pretrained(folder)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
        load(model, out / "adapter")
    if main:
        checkpoint.write_json(out / "run.json", report)


def _table(report: dict[str, Any]) -> Table:
    """What the curve of the alignment loss says."""
    table = Table(title=f"{report['stage']}: {report.get('verdict', 'the indexers were frozen')}", show_header=False)
    rows: list[tuple[str, str]] = [
        ("steps, tokens", f"{report['steps']:,}, {report['tokens']:,}"),
        ("tokens/s", f"{report['tokens_per_second']:,.0f}"),
    ]
    if report["kl"]:
        rows.append(("KL by fifths of the run", " ".join(f"{value:.4f}" for value in fifths(report["kl"]))))
        worst = sorted(report["kl_by_layer"].items(), key=lambda item: -item[1])[:3]
        rows.append(("layers with the most", ", ".join(f"{layer} ({value:.3f})" for layer, value in worst)))
    for name, variant in report["variants"].items():
        rows.append((f"KL by fifths, {name}", " ".join(f"{value:.4f}" for value in fifths(variant["kl"]))))
    if report["loss"]:
        rows.append(("loss by fifths of the run", " ".join(f"{value:.4f}" for value in fifths(report["loss"]))))
    if report["kept_mass"]:
        rows.append(("attention mass kept", f"{list(report['kept_mass'].values())[-1]:.1%}"))
    for name, value in itertools.chain(rows, [("base", report["audit"])] if "audit" in report else []):
        table.add_row(name, value)
    return table
