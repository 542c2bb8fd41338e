"""Launches every kernel at small sizes, and sees what compute-sanitizer says of it.

    python benchmarks/sanitize.py --json benchmarks/results/h100-sanitizer.json

runs itself with `--run` for each case, first as it is, which compiles the kernels, and then under each of compute-sanitizer's
tools, as many at the same time as there are cores:

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python benchmarks/sanitize.py --run --cases aligned

Without PyTorch's caching allocator each tensor is an allocation of its own, so that a step outside of it is seen, and memory
that nothing wrote is not another tensor's. PyTorch's kernels are checked like Skim's, because initcheck must see them write;
what is reported of them is listed and does not count. What is reported of a kernel in KNOWN is listed as explained; anything
else is an error. Without a GPU `--run` launches what Triton's interpreter can (TRITON_INTERPRET=1), in float32.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import skim
from skim.bench.gather import ROWS, WIDTH, gather
from skim.bench.runner import machine, write_json
from skim.ops import codec, dispatch

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
MARK = "launched: "
VERDICTS = CLEAN, EXPLAINED, NOT_CLEAN = "clean", "explained", "NOT CLEAN"
LIMIT = 900  # seconds that a tool may take for a case
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GPU = DEVICE.type == "cuda"
DTYPES = (torch.float16, torch.bfloat16, torch.float32) if GPU else (torch.float32,)  # the interpreter gets bfloat16 wrong
OPTIONS = {"impl": "triton"}

# Of a tool and a kernel: why what the tool reports of it is no error.
TASKS = (
    "Triton hands its groups of warps their tasks in words of shared memory, between barriers of the whole program that have a name of their "
    "own, which racecheck doesn't follow; it reports nothing else of this kernel"
)
ARRIVALS = (
    "its groups of warps hand shared memory over by barriers at which one thread arrives for its group, each time right behind a barrier "
    "of that group (tests/ops/{}), and Triton hands them their tasks likewise: racecheck doesn't connect the two"
)
KNOWN = {
    ("racecheck", "attend.hopper.forward"): ARRIVALS.format("test_compiled_hopper.py"),
    ("racecheck", "attend.hopper_union.forward_unions"): TASKS,
    ("racecheck", "attend.hopper_backward.scores_128"): TASKS,
    ("racecheck", "attend.hopper_backward.of_keys_128"): TASKS,
    ("racecheck", "score.hopper.forward"): ARRIVALS.format("test_hopper_score.py"),
    ("racecheck", "select.hopper_candidates.find"): TASKS,
}

attention, latent, hopper, hopper_backward, hopper_union, unions, selecting, ranking = (
    import_module(f"skim.ops.{name}")
    for name in (
        "attend.triton",
        "attend.latent_backward",
        "attend.hopper",
        "attend.hopper_backward",
        "attend.hopper_union",
        "attend.union",
        "select.candidates",
        "select.triton",
    )
)


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def leaves(*shapes: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    return [draw(*shape, dtype=dtype).requires_grad_() for shape in shapes]


def interval(B: int, T: int, S: int) -> dict[str, Tensor]:
    """Every query sees all keys but the first two."""
    return {name: torch.full((B, T), value, dtype=torch.int32, device=DEVICE) for name, value in (("start", 2), ("end", S))}


def random_indices(B: int, T: int, K: int, S: int, alike: bool) -> Tensor:
    """int32 `[B, T, 1, K]` with empty rows; `alike` rows share one selection."""
    order = torch.rand(B, 1 if alike else T, 1, S, device=DEVICE).argsort(-1)[..., :K].to(torch.int32).repeat(1, T if alike else 1, 1, 1)
    return order.index_fill(1, torch.arange(0, T, 7, device=DEVICE), -1)


def backward(*outputs: Tensor) -> None:
    sum(x.float().sum() for x in outputs).backward()  # type: ignore[union-attr]


def processors(count: int) -> contextlib.ExitStack:
    """A card of so many processors: of few, queries share unions; of many, keys are split."""
    stack = contextlib.ExitStack()
    for module in (attention, hopper, hopper_backward, hopper_union):
        stack.enter_context(mock.patch.object(module, "processors", lambda device: count))
    return stack


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # else initcheck would find nothing
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def codecs() -> None:
    x = draw(2, 9, 4, 32, dtype=DTYPES[-1])
    angles = draw(2, 9, 8), draw(2, 9, 8)
    for scale_format in ("float32", "ue8m0"):
        codec.dequantise(*codec.quantise(x, scale_format=scale_format, **OPTIONS), **OPTIONS)
        codec.quantise(x, scale_format=scale_format, spread=True, **OPTIONS)
    codec.hadamard(x, **OPTIONS)
    for layout, held in (("half", None), ("interleaved", "ue8m0")):
        codec.rotate(x, *angles, layout=layout, **OPTIONS)
        codec.index_keys(draw(3, 2, 9, 32, dtype=x.dtype), draw(3, 32), draw(3, 32), 1e-6, *angles, layout=layout, scale_format=held, **OPTIONS)


def in_pages(keys: Tensor, page: int) -> tuple[Tensor, Tensor]:
    """A pool of FP8 pages in reverse order, and the block table of keys `[B, S, E]`."""
    pages = codec.pack_pages(*codec.quantise(keys), page).flatten(0, 1).flip(0).contiguous()
    table = torch.arange(len(pages) - 1, -1, -1, dtype=torch.int32, device=DEVICE)
    return pages, table.view(len(keys), -1)


def scores() -> None:
    T, S = (21, 300) if GPU else (5, 90)
    for J, E in ((4, 64), (3, 48), (64, 128)) if GPU else ((3, 48),):
        for dtype in DTYPES:
            index = draw(2, T, J, E, dtype=dtype), draw(2, S, E, dtype=dtype), draw(2, T, J)
            skim.ops.index_scores(*index, **OPTIONS)
        q, weights = codec.quantise(index[0]), index[2]
        pages, table = in_pages(index[1], 16)
        for keys, more in ((codec.quantise(index[1]), {}), (codec.pack(*codec.quantise(index[1])), {}), (pages, {"block_table": table})):
            skim.ops.index_scores(q, keys, weights, **interval(2, T, S), **more, **OPTIONS)  # type: ignore[arg-type]
    backward(skim.ops.index_scores(*leaves((1, 20, 4, 32), (1, 40, 32), (1, 20, 4), dtype=DTYPES[0]), **OPTIONS).clamp(min=-1e3))


def selections() -> None:
    """Rows that are sampled and rows that are not, kept whole, split over programs, done again, narrowed, and in pages."""
    T, S, K = (21, 900, 30) if GPU else (1, 400, 9)
    small = {"SAMPLE": 64, "CAPACITY": 32, "ROOM": 0, "PROGRAMS": 4, "SPLIT": 64}  # short rows then go the way of long ones
    for dtype in DTYPES:
        q, keys, weights = draw(2, T, 4, 32, dtype=dtype), draw(2, S, 32, dtype=dtype), draw(2, T, 4)
        kept = {"keep_first": 2, "keep_recent": 3, "with_scores": True}
        with mock.patch.multiple(selecting, **small):
            skim.select(q, keys, weights, K, mass=0.5, **kept, **OPTIONS)  # type: ignore[arg-type]
        if GPU:
            skim.select(q, keys, weights, 900, **OPTIONS)
            skim.select(q, keys, weights, 60, **OPTIONS)
    q8, keys8 = codec.quantise(q), codec.quantise(keys)
    pages, table = in_pages(keys, 16)
    with mock.patch.multiple(selecting, **small):
        for held, more in ((pages, {"block_table": table}), (keys8, {}), (codec.pack(*keys8), {}))[: 3 if GPU else 1]:
            some = tuple(x[:, -1:].contiguous() for x in q8)
            skim.select(some, held, weights[:, -1:].contiguous(), K, **interval(2, 1, S), **more, **OPTIONS)  # type: ignore[arg-type]
        skim.select(q[:, :1], torch.full_like(keys, torch.nan), weights[:, :1].contiguous(), K, **OPTIONS)


def ranked() -> None:
    """Scores that are there already: at the sizes of real rows on a GPU."""
    S, K = (30_000, 100) if GPU else (1_000, 20)
    rows = draw(3, S).mul(4).round()  # plateaus
    bounds = (x[0] for x in interval(1, 3, S).values())
    start, end = bounds
    for few in (0, ranking.FEW):  # with FEW, several programs share in choosing of a long row
        with mock.patch.multiple(selecting, CAPACITY=64, ROOM=0), mock.patch.object(ranking, "FEW", few):
            ranking.top_k(rows, start, end, K)
            ranking.top_k(torch.full_like(rows, torch.nan), start, end, K)  # flagged, so done again
        with mock.patch.multiple(ranking, PROGRAMS=2, FEW=few):  # a program a row, and turns in the memory for candidates
            for n, keys in ((3, 900), (40 if GPU else 9, 9_000)):
                ranking.top_k(draw(n, keys).mul(4).round(), *(x[0] for x in interval(1, n, keys).values()), 20, 1)


def attended(shape: tuple[int, int, int], T: int, S: int, K: int, *, alike: bool, mla: bool = False) -> None:
    """Forward and backward over selections, a sink among them: `[H, G, D]`, T queries of K of S keys."""
    H, G, D = shape
    for dtype in DTYPES:
        indices = random_indices(2, T, K, S, alike)
        q, k, v = leaves((2, T, H, D), (2, S, G, D), (2, S, G, D), dtype=dtype)
        sink = draw(H).requires_grad_()
        values: dict[str, Any] = {"v_channels": D // 2} if mla else {"v": v}
        backward(*skim.attend(q, k, indices=indices, sink=sink, **values, **OPTIONS))


def shared() -> None:
    """Neighbours that share unions."""
    T, S, K = (40, 90, 20) if GPU else (16, 24, 4)
    with processors(1):
        for alike in (False, True) if GPU else (False,):
            attended((12, 3, 64) if GPU else (4, 2, 16), T, S, K, alike=alike)
            if GPU:
                with deterministic():
                    attended((6, 2, 16), T, S, K, alike=alike)


def alone() -> None:
    """A query at a time, one key after the other or split over programs."""
    with processors(10_000):
        attended((4, 2, 96) if GPU else (2, 1, 16), 3, 90, 40 if GPU else 8, alike=False)
        attended((16, 1, 64) if GPU else (2, 1, 16), 2, 1500 if GPU else 560, 1000 if GPU else 520, alike=False, mla=True)
        with deterministic():
            attended((4, 2, 32) if GPU else (2, 1, 16), 3, 90, 40 if GPU else 8, alike=False)


def dense() -> None:
    for count in (1, 10_000):
        with processors(count):
            T, S, H, G = (40 if count == 1 else 2, 600, 6, 2) if GPU else (9 if count == 1 else 1, 20 if count == 1 else 140, 2, 1)
            for dtype in DTYPES:
                backward(*skim.attend_dense(*leaves((1, T, H, 32), (1, S, G, 32), (1, S, G, 32), dtype=dtype), **OPTIONS))
            with deterministic():
                backward(*skim.attend_dense(*leaves((1, T, H, 32), (1, S, 1, 32), dtype=DTYPES[-1]), v_channels=16, **OPTIONS))


def latents_of(S: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`[1, S, 576]`, and the same in the 656 bytes of the FP8 cache."""
    x = draw(1, S, 576)
    values, scale = codec.quantise(x[..., :512].unflatten(-1, (4, 128)))
    return x.to(dtype), codec.pack_latent(values.flatten(-2), scale, x[..., 512:].to(torch.bfloat16))


def latents() -> None:
    T, S, H = (34, 200, 64) if GPU else (2, 40, 4)
    indices = random_indices(1, T, 30, S, alike=False)
    for dtype in DTYPES[:2]:
        for held in latents_of(S, dtype):
            skim.attend(draw(1, T, H, 576, dtype=dtype), held[:, :, None], indices=indices, v_channels=512, scale=0.05, **OPTIONS)


def latent_gradients() -> None:
    """The backward of sm_90, of 128 heads in Gluon; Triton's interpreter, which multiplies float32 alone, is to serve that."""
    T, S = (20, 400) if GPU else (2, 40)
    serves = latent.serves if GPU else lambda q, *args: True
    with mock.patch.object(latent, "serves", serves), processors(4):
        for H, dtype in product((64, 128) if GPU else (64,), DTYPES[:2]):
            q, k = leaves((1, T, H, 576), (1, S, 1, 576), dtype=dtype)
            indices = random_indices(1, T, 300 if GPU else 30, S, alike=False)
            backward(*skim.attend(q, k, indices=indices, v_channels=512, scale=0.05, **OPTIONS))


def gluon_scores() -> None:
    """The kernels of sm_90: scores, and selection by them."""
    q, weights = codec.quantise(draw(1, 300, 64, 128)), draw(1, 300, 64)
    keys, scales = codec.quantise(draw(1, 900, 128))
    skim.ops.index_scores(q, (keys, scales), weights, impl="hopper")
    scales[:, 40:] = torch.nan
    for few in (0, selecting.FEW_KEYS):  # sampled, some done again, and not
        with mock.patch.multiple(selecting, CAPACITY=64, ROOM=0, FEW_KEYS=few):
            skim.select(q, (keys, scales), weights, 100, impl="hopper")
            skim.select(q, (keys, scales), weights, 100, keep_first=3, keep_recent=2, with_scores=True, impl="hopper")


def gluon_attention() -> None:
    """The kernel of sm_90, whose tasks share unions, are many a program, or have walks that are split."""
    for H, sink, T, count in ((128, None, 40, 4), (16, draw(16), 40, 4), (20, None, 40, 4), (128, draw(128), 2, 132), (16, None, 2, 132)):
        q, indices = draw(1, T, H, 576, dtype=torch.bfloat16), random_indices(1, T, 500, 600, alike=False)
        with processors(count):
            for held in latents_of(600, q.dtype):
                options: dict[str, Any] = {"v_channels": 512, "scale": 0.05, "sink": sink, "impl": "hopper"}
                skim.attend(q, held[:, :, None], indices=indices, **options)
                skim.attend_dense(q, held[:, :, None], **options)


def aligned() -> None:
    """Queries that see the same keys, and, deterministic, causal ones, of which some don't see blocks that their neighbours see."""
    T, S, H, G = (40, 80, 9, 3) if GPU else (6, 20, 4, 2)
    for dtype in DTYPES:
        q, keys = draw(1, T, H, 64, dtype=dtype), draw(1, S, G, 64, dtype=dtype)
        chosen = skim.Selection.from_indices(random_indices(1, T, 10, S, alike=False))
        for selection in (None, chosen):
            index = leaves((1, T, 4, 32), (1, S, 32), (1, T, 4), dtype=dtype)
            backward(skim.align(q, keys, *index, selection=selection, **interval(1, T, S), **OPTIONS))
            with deterministic():
                backward(skim.align(q, keys, *index, selection=selection, **OPTIONS))


def gathered() -> None:
    gather(draw(50, WIDTH, dtype=DTYPES[0]), torch.randint(0, 50, (2, ROWS), dtype=torch.int32, device=DEVICE))


CASES: tuple[Callable[[], None], ...] = (
    codecs,
    scores,
    selections,
    ranked,
    shared,
    alone,
    dense,
    latents,
    latent_gradients,
    gluon_scores,
    gluon_attention,
    aligned,
    gathered,
)


@contextlib.contextmanager
def watched() -> Iterator[set[str]]:
    """Within it the names of launched kernels are collected, as "attend.kernels.forward"."""
    names: set[str] = set()
    kind = next(base for base in type(unions.unite).__mro__ if "__getitem__" in vars(base))
    launch = kind.__getitem__

    def launched(kernel: Any, grid: Any) -> Any:
        names.add(f"{kernel.fn.__module__.removeprefix('skim.').removeprefix('ops.')}.{kernel.fn.__name__}")
        return launch(kernel, grid)

    with mock.patch.object(kind, "__getitem__", launched):
        yield names


def run(cases: list[str]) -> None:
    """Launch the kernels of these cases, or of all, and print their names behind MARK."""
    torch.manual_seed(0)
    without = not dispatch.gluon(DEVICE)
    with watched() as names:
        for case in CASES:
            if (cases and case.__name__ not in cases) or (case in (gluon_scores, gluon_attention) and without):
                continue
            began = time.perf_counter()
            case()
            if GPU:
                torch.cuda.synchronize()
            print(f"{case.__name__}: {time.perf_counter() - began:.1f} s", flush=True)
    print(MARK + " ".join(sorted(names)))


def reports(output: str) -> Counter[str]:
    """How many errors or hazards of each kernel compute-sanitizer's output names; "" is what it names no kernel for."""
    found: Counter[str] = Counter()
    begin = r"^========= (?=(?:Error|Warning|Invalid|Misaligned|Uninitialized|Barrier|Program hit|Out-of|Divergent|Missing|Unsupported)\b)"
    for block in re.split(begin, output, flags=re.M)[1:]:
        place = re.search(r"\bat (?:0x[0-9a-f]+ in )?(.+?)\+0x[0-9a-f]+", block)
        found[re.split(r"[(<]", place[1])[0].split()[-1] if place else ""] += 1
    return found


def summary(tool: str, output: str, code: int) -> dict[str, Any]:
    """Errors by kernel, what is explained, and what is of others and does not count; clean if all was launched and there is none of the first two."""
    launched = re.search(f"^{MARK}(.*)$", output, flags=re.M)
    ours: dict[str, list[str]] = {}
    for name in launched[1].split() if launched else ():
        ours.setdefault(name.rpartition(".")[2], []).append(name)
    errors: dict[str, int] = {}
    explained: dict[str, int] = {}
    others: dict[str, int] = {}
    for name, count in reports(output).items():
        known = name in ours and all((tool, kernel) in KNOWN for kernel in ours[name])
        (explained if known else errors if name in ours or not name else others)[name] = count
    ended = launched is not None and (code == 0 or bool(explained or others))
    verdict = NOT_CLEAN if errors or not ended else EXPLAINED if explained else CLEAN
    said = output[-4000:] if verdict == NOT_CLEAN else ""
    return {"verdict": verdict, "exit": code, "errors": errors, "explained": explained, "of_others": others, "output": said}


def check(commands: dict[tuple[str, str], list[str]], environment: dict[str, str]) -> dict[str, Any]:
    """Run the command of each tool and case, many at the same time; what each tool says of all cases."""

    def one(place: tuple[str, str]) -> dict[str, Any]:
        began = time.perf_counter()
        try:
            ended = subprocess.run(
                commands[place], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=LIMIT, check=False
            )
            found = summary(place[0], ended.stdout, ended.returncode)
        except subprocess.TimeoutExpired as error:
            found = summary(place[0], (error.stdout or b"").decode(), -1)
        found["seconds"] = round(time.perf_counter() - began, 1)
        print(f"{' '.join(place)}: {found['verdict']}, {found['seconds']} s", flush=True)
        return found

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        of_place = dict(zip(commands, threads.map(one, commands)))
    results: dict[str, Any] = {}
    for tool in dict.fromkeys(tool for tool, _ in commands):
        of_case = {case: found for (own, case), found in of_place.items() if own == tool}
        verdict = max((found["verdict"] for found in of_case.values()), key=VERDICTS.index)
        kinds = ("errors", "explained", "of_others")
        counts = {kind: dict(sum((Counter(found[kind]) for found in of_case.values()), Counter[str]())) for kind in kinds}
        results[tool] = {"verdict": verdict, **counts, "cases": of_case}
    return results


def compiled(command: list[str], cases: list[str]) -> list[str]:
    """The names of the kernels of these cases, which run as they are, so that all are compiled.

    Raises:
        SystemExit: one doesn't run.
    """
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        ended = list(threads.map(lambda case: subprocess.run([*command, case], capture_output=True, text=True, check=False), cases))
    for case, run in zip(cases, ended):
        if run.returncode:
            sys.exit(f"{case}, without compute-sanitizer:\n{run.stdout}{run.stderr}")
    return sorted({name for run in ended for name in run.stdout.rpartition(MARK)[2].split()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", action="store_true", help="only launch the kernels")
    parser.add_argument("--cases", nargs="+", choices=[case.__name__ for case in CASES], default=[], help="all if not given")
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=TOOLS)
    parser.add_argument("--json", type=Path, help="write results here")
    args = parser.parse_args()
    if args.run:
        return run(args.cases)
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if sanitizer is None or not GPU:
        sys.exit("expected an NVIDIA GPU and compute-sanitizer, which comes with the CUDA toolkit")
    command, cases = [sys.executable, __file__, "--run", "--cases"], args.cases or [case.__name__ for case in CASES]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    launched = compiled(command, cases)
    # PyTorch asks the driver what may fail, and handles it: only what kernels do is an error.
    options = ["--error-exitcode", "1", "--report-api-errors", "no", "--show-backtrace", "no", "--print-limit", "1000"]
    commands = {(tool, case): [sanitizer, "--tool", tool, *options, *command, case] for tool in args.tools for case in cases}
    results = check(commands, environment)
    version = subprocess.run([sanitizer, "--version"], capture_output=True, text=True, check=True).stdout.strip().splitlines()[-1]
    for tool, result in results.items():
        print(f"{tool}: {result['verdict']}, errors: {result['errors']}, explained: {result['explained']}, of others: {result['of_others']}")
    known = {f"{tool} {kernel}": why for (tool, kernel), why in KNOWN.items()}
    print("".join(f"{place}: {why}\n" for place, why in known.items()), end="")
    if args.json:
        write_json(args.json, {**machine(DEVICE), "sanitizer": version, "kernels": launched, "known": known, "tools": results})
    sys.exit(any(result["verdict"] == NOT_CLEAN for result in results.values()))


if __name__ == "__main__":
    main()
