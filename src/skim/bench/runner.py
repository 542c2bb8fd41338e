"""Runs cases and says what came out: a dictionary that is written as JSON, and lines for people."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import platform
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from skim.bench import shapes  # noqa: F401  its case is in the registry
from skim.bench.measure import measure
from skim.bench.registry import CASES, Case, Setting
from skim.bench.roofs import Roofs, measured_roofs
from skim.bench.selections import KINDS
from skim.ops import dispatch

# Cases of whole models: id -> (what, parts of `measure_model`)
MODELS = {
    "K10": (
        "Whole model in the Qwen3-4B shape, random weights, K=2048, 128k tokens through `generate`: time to the first token, "
        "and what the hooks cost at 1k tokens.",
        ("prefill", "hooks"),
    ),
    "K11": ("The same, decoding behind 128k tokens with a static cache and CUDA graphs.", ("decode",)),
}
MODEL, TOKENS = "qwen3-4b", 131072
QUICK_MODEL, QUICK_TOKENS = "qwen3-tiny", 64


def describe() -> dict[str, str]:
    """What each case measures, by id."""
    return {**{name: case.what for name, case in CASES.items()}, **{name: what for name, (what, _) in MODELS.items()}}


def run(
    cases: Sequence[str] = (),
    *,
    device: str | None = None,
    quick: bool = False,
    model: str | None = None,
    tokens: int | None = None,
    report: Callable[[str], Any] = lambda line: None,
) -> dict[str, Any]:
    """Measure cases.

    Args:
        cases: ids of the registry; none is all but those of whole models (or, with `model`, only that model).
        device: "cuda", "cuda:1", "cpu"; None is a GPU if there is one. On a CPU the cases for GPUs run at their quick size.
        quick: sizes for tests.
        model: measure this whole model too: a name in `skim.bench.models.SHAPES`, a folder, a hub id, a shipped model.
        tokens: its prompt's length; None is 131072.
        report: gets a line as each figure comes.

    Returns:
        device, driver, versions, commit, command, roofs and rows. A case that failed has a row with "error".

    Raises:
        ValueError: an unknown case, or a device that isn't here.
    """
    where = _device(device)
    unknown = sorted(set(cases) - set(describe()))
    if unknown:
        raise ValueError(f"cases: expected some of {', '.join(describe())}, got {unknown[0]!r}")
    if tokens is not None and (model is None or tokens < 16):
        raise ValueError(f"tokens: expected 16 or more, with a model, got {tokens}")
    names = list(cases) or ([] if model else list(CASES))
    rows: list[dict[str, Any]] = []
    result = {**machine(where), "quick": quick, "roofs": {}, "rows": rows}
    for name in names:
        for row in _whole_model(name, where, quick, report) if name in MODELS else _case(CASES[name], where, quick, result["roofs"]):
            rows.append({"case": name, **row})
            report(line(rows[-1]))
        compared = [row["per_operation"] for row in rows if row["case"] == name and "per_operation" in row]
        if compared:
            report(f"{name}: at worst {max(compared):.2f} of a tuned shape's time for an operation")
    if model:
        for row in _model_rows(model, tokens or TOKENS, where, quick, ("prefill", "hooks", "decode"), report):
            rows.append({"case": model, **row})
            report(line(rows[-1]))
    return result


def write_json(path: Path, result: Any) -> None:
    """A result as a file, under a temporary name first, so that no half of it is ever found."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(temporary, path)


def machine(device: torch.device) -> dict[str, Any]:
    """What figures depend on: hardware, versions, commit."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package, distribution in (("skim", "skim-attention"), *((name, name) for name in ("torch", "triton", "transformers", "numba"))):
        try:
            versions[package] = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            versions[package] = None
    versions["torch"] = torch.__version__  # says which CUDA it was built for
    gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if gpu else platform.processor() or platform.machine()
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if gpu else None
    changed = bool(_output("git", "status", "--porcelain", "--untracked-files=no"))
    commit = _output("git", "rev-parse", "HEAD")
    return {
        "device": name,
        "driver": driver.splitlines()[0] if driver else None,
        "versions": versions,
        "commit": f"{commit}+changes" if commit and changed else commit,
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def line(row: dict[str, Any]) -> str:
    """A row for people."""
    head = " ".join(str(row[key]) for key in ("case", "part", "kind", "mode") if row.get(key) not in (None, "-", "eager"))
    head = f"{head} n={row['n']}"
    if "error" in row:
        return f"{head}: {row['error']}"
    parts = [f"{row['ms']:.3f} ms"]
    if row.get("tflops"):
        parts.append(f"{row['tflops']:.3g} TFLOPS" if row["bound"] == "compute" else f"{row['tbps']:.3g} TB/s")
        parts.append(f"{row['share']:.0%} of the roofline")
    elif row.get("tbps"):
        parts += [f"{row['tbps']:.3g} TB/s", f"{row['share']:.0%} of the roofline"]
    if row.get("peak_mib") is not None:
        parts.append(f"peak {row['peak_mib']:,.0f} MiB")
    if row.get("baseline"):
        parts.append(f"{row['baseline']} {row['baseline_ms']:.3f} ms")
        if "per_operation" in row:
            parts.append(f"{row['per_operation']:.2f} of its time for an operation")
        else:
            parts.append(f"{row['overhead']:+.1%}" if "overhead" in row else f"{row['ratio']:.2f} times as fast")
    return f"{head}: {', '.join(parts)}"


def break_even(lengths: Sequence[int], sparse: Sequence[float], dense: Sequence[float]) -> float | None:
    """The length from which on sparse times stay below dense ones, by power laws between the measured points; None if they never do."""
    gaps = [torch.log(torch.tensor(a / b)).item() for a, b in zip(sparse, dense)]
    if gaps[-1] > 0:
        return None
    last = max((i for i, gap in enumerate(gaps) if gap > 0), default=None)
    if last is None:
        return float(lengths[0])
    part = gaps[last] / (gaps[last] - gaps[last + 1])
    return float(lengths[last] * (lengths[last + 1] / lengths[last]) ** part)


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device: expected cuda, cuda:N or cpu, got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected cuda, cuda:N or cpu, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device: expected one that is here, got {name!r} ({torch.cuda.device_count()} NVIDIA GPUs)")
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def _case(case: Case, where: torch.device, quick: bool, roofs: dict[str, Any]) -> Iterator[dict[str, Any]]:
    device = torch.device("cpu") if case.device == "cpu" else where
    small = quick or device.type != case.device
    if device.type not in roofs:
        with _threads(case.threads), _on(device):
            roofs[device.type] = asdict(measured_roofs(device, quick))
    for n in (case.quick,) if small else case.lengths:
        for kind in case.kinds:
            setting = Setting(n, kind, device, small)
            for mode in ("eager", "graph") if case.graphs and device.type == "cuda" else ("eager",):
                head = {"kind": kind, "n": n, "mode": mode, "on": device.type}
                with _threads(case.threads), _on(device):
                    yield {**head, **_attempt(lambda s=setting, m=mode: _measured(case, s, m, Roofs(**roofs[device.type])))}  # type: ignore[misc]
                _release()


def _measured(case: Case, s: Setting, mode: str, roofs: Roofs) -> dict[str, Any]:
    """A row: the operation and its baselines."""
    problem, graph = case.build(s), mode == "graph"
    seconds = 0.0 if s.quick else case.seconds
    took = measure(problem.run, problem.inputs, s.device, graph=graph, seconds=seconds)
    compared = {}
    for name, baseline in problem.baselines.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch's reasons why a kernel of its own can't run
            compared[name] = _attempt(lambda f=baseline: asdict(measure(f, problem.inputs, s.device, graph=graph, seconds=seconds)))  # type: ignore[misc]
        _release()
    flops = sum(stage.flops + stage.fp8_flops for stage in problem.stages)
    moved = sum(stage.moved + stage.gathered for stage in problem.stages)
    least = sum(stage.seconds(roofs) for stage in problem.stages)
    compute = sum(stage.flops / roofs.matmul + stage.fp8_flops / (roofs.fp8 or roofs.matmul) for stage in problem.stages)
    stages = [*problem.stages, *(stage for stage in (problem.dense, problem.tuned) if stage)]
    row = {
        **asdict(took),
        "tflops": flops / took.ms / 1e9,
        "tbps": moved / took.ms / 1e9,
        "bound": "compute" if compute > least / 2 else "memory",
        "share": least * 1e3 / took.ms,
        "operations": {stage.name: {"formula": stage.formula, "count": stage.flops + stage.fp8_flops} for stage in stages},
        "baselines": compared,
        "implementations": {operator: dispatch.choice(operator, s.device) for operator in dispatch.OPERATORS},
    }
    ran = {name: found["ms"] for name, found in compared.items() if "ms" in found}
    if ran:
        best = min(ran, key=lambda name: ran[name])
        row |= {"baseline": best, "baseline_ms": ran[best], "ratio": ran[best] / took.ms}
        if problem.tuned:
            row["per_operation"] = took.ms / flops / (ran[best] / problem.tuned.flops)
    return row


def _whole_model(name: str, where: torch.device, quick: bool, report: Callable[[str], Any]) -> Iterator[dict[str, Any]]:
    small = quick or where.type == "cpu"
    shape, tokens = (QUICK_MODEL, QUICK_TOKENS) if small else (MODEL, TOKENS)
    yield from _model_rows(shape, tokens, where, small, MODELS[name][1], report)


def _model_rows(
    name: str, tokens: int, where: torch.device, quick: bool, parts: tuple[str, ...], report: Callable[[str], Any]
) -> Iterator[dict[str, Any]]:
    try:
        from skim.bench.models import measure_model
    except ImportError as error:
        raise ImportError("transformers is needed to measure a whole model: pip install 'skim-attention[hf]'") from error
    for kind in KINDS:
        wanted = parts if kind == KINDS[0] else tuple(part for part in parts if part == "prefill")  # one query has no neighbours
        if wanted:
            try:
                for row in measure_model(name, Setting(tokens, kind, where, quick), wanted, report):
                    yield {"kind": kind, **row}
            except RuntimeError as error:  # out of memory, say
                yield {"kind": kind, "n": tokens, **_failed(error)}
        _release()


def _attempt(measured: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What was measured, or why it could not be: one case that fails doesn't take the others with it."""
    try:
        return measured()
    except Exception as error:  # whatever it is: compilers and kernels have errors of their own
        return _failed(error)


def _failed(error: Exception) -> dict[str, Any]:
    if os.environ.get("SKIM_TRACEBACK"):
        traceback.print_exception(error)
    return {"error": f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"}


def _release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """So many CPU threads, where a case says so."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@cache
def _output(*command: str) -> str | None:
    """What a command prints, run where the package lies; None if it can't be run."""
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
