"""How time and memory are measured: always the same way, for an operation and for what it is compared with."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from skim.selection import Selection

AHEAD = 4_000_000  # cycles by which launches may run ahead of the GPU, some 2 ms
FLUSH_BYTES = 256 << 20  # more than any cache holds
SECONDS = 1.0  # measured repetitions last about so long together
REPETITIONS = 3, 100  # at least and at most
WARM_UPS = 10  # at most; fewer once two in a row take the same time


@dataclass(frozen=True)
class Measured:
    """Median time of one call in milliseconds, and on a GPU its memory in MiB.

    Attributes:
        ms: median over the repetitions.
        repetitions: how many there were.
        peak_mib: the most memory held at once beyond the inputs.
        scratch_mib: the most held at once beyond the inputs and the results.
    """

    ms: float
    repetitions: int
    peak_mib: float | None
    scratch_mib: float | None


def measure(run: Callable[[Any], Any], inputs: Sequence[Any], device: torch.device, *, graph: bool = False, seconds: float = SECONDS) -> Measured:
    """Median time of `run(x)`, x another of `inputs` each time.

    Caches are flushed before each repetition. A result's memory is overwritten after it was used, so that nothing can
    look right by being left over from the repetition before. On a GPU it is the GPU's time: while a repetition's kernels
    are launched, the GPU still waits in another, as it does in a model that keeps it busy.

    Args:
        run: the operation; takes one of `inputs`, returns tensors.
        inputs: sets of inputs that differ.
        device: where they are.
        graph: run it as CUDA graphs, one for each set of inputs.
        seconds: about how long to repeat.

    Raises:
        ValueError: a result holds NaN.
    """
    peak, scratch = _memory(run, inputs[0], device)
    calls = [_captured(run, x) for x in inputs] if graph else [lambda x=x: run(x) for x in inputs]  # type: ignore[misc]
    clock = _cuda_seconds if device.type == "cuda" else _cpu_seconds
    flush = torch.empty(FLUSH_BYTES if device.type == "cuda" else 0, dtype=torch.uint8, device=device)

    def once(i: int) -> float:
        flush.zero_()
        took, result = clock(calls[i % len(calls)])
        poison(result)
        return took

    before = once(0)
    for i in range(1, WARM_UPS):
        now = once(i)
        if i >= len(calls) - 1 and abs(now - before) <= 0.05 * before:
            break
        if now > 0.2 * seconds:  # long ones are warm after the first
            break
        before = now
    low, high = REPETITIONS
    times: list[float] = []
    while len(times) < low or (len(times) < high and sum(times) < seconds):
        times.append(once(len(times)))
    return Measured(statistics.median(times) * 1e3, len(times), peak, scratch)


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in a result."""
    if isinstance(value, Tensor):
        yield value.detach()
    elif isinstance(value, Selection):
        yield from tensors((value.indices, value.counts, value.scores))
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from tensors(part)


def poison(result: Any) -> None:
    """Overwrite a result's memory, which the next call may get, with what no result holds: NaN, or -1 in every bit."""
    for x in tensors(result):
        if x.is_floating_point() and x.element_size() > 1:
            x.fill_(float("nan"))
        else:
            x.view(torch.uint8).fill_(255)


def _memory(run: Callable[[Any], Any], x: Any, device: torch.device) -> tuple[float | None, float | None]:
    """Peak and scratch memory of a call, after a first one that may compile; both results are checked."""
    poison(_whole(run(x)))
    if device.type != "cuda":
        return None, None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    result = run(x)
    torch.cuda.synchronize(device)
    peak, held = torch.cuda.max_memory_allocated(device), torch.cuda.memory_allocated(device)
    poison(_whole(result))
    return (peak - before) / 2**20, (peak - held) / 2**20


def _whole(result: Any) -> Any:
    if any(x.is_floating_point() and bool(x.float().isnan().any()) for x in tensors(result)):
        raise ValueError("the result holds NaN: it was not written whole")
    return result


def _captured(run: Callable[[Any], Any], x: Any) -> Callable[[], Any]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run(x)

    def replay() -> Any:
        graph.replay()
        return result

    return replay


def _cuda_seconds(call: Callable[[], Any]) -> tuple[float, Any]:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(AHEAD)
    start.record()
    result = call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3, result


def _cpu_seconds(call: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    result = call()
    return time.perf_counter() - began, result
