"""Compiles what an operator would launch, for a GPU that is not here, and reads what the assembler says of it."""

from __future__ import annotations

import contextlib
import io
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction


@dataclass(frozen=True)
class Compiled:
    """A kernel as it would be launched: its compile-time constants, registers a thread, spilled bytes, bytes of shared memory."""

    name: str
    constants: dict[str, Any]
    registers: int
    spilled: int
    shared: int
    warps: int
    ptx: str
    llir: str

    @property
    def matrix_unit(self) -> str | None:
        """Which instructions of the matrix units it has: a warp group's, which read shared memory, or a warp's."""
        return next((name for name in ("wgmma", "mma.sync") if name in self.ptx), None)

    @property
    def products(self) -> dict[str, int]:
        """How many instructions it has of each shape of a warp group's matrix product."""
        return dict(Counter(re.findall(r"wgmma\.mma_async\S*\.(m64n\d+k\d+)", self.ptx)))

    @property
    def handed_over(self) -> dict[str, int]:
        """What comes right before each arrival of one thread at a barrier in shared memory, among all that reads or writes it or waits there."""
        steps = re.findall(r"@%p\d+ mbarrier\.arrive|bar\.sync|mbarrier\.\w+|[a-z]+\.shared|stmatrix|ldmatrix|cp\.async|wgmma", self.ptx)
        return dict(Counter(before for before, step in pairwise(steps) if step.endswith("arrive") and step.startswith("@")))

    @property
    def overwritten(self) -> list[str]:
        """Where copies are overwritten with what is made of them: the last 16 bytes that a thread loads in a row, and what comes right behind."""
        made = re.search(r"cp\.async\.mbarrier\.arrive(.*?)fence\.proxy\.async", self.ptx, re.DOTALL)
        steps = " ".join(re.findall(r"[ls][dt]\.shared\.v4|bar\.sync", made[1])) if made else ""
        return (re.findall(r"(?:ld\.shared\.v4 )+\S+", steps) or [""])[-1].split()

    @property
    def fused_sums(self) -> int:
        """How many sums over threads round a thread's own product last: each thread then has other bits of the same sum."""
        shared = set(re.findall(r"shfl\.sync\.bfly\.b32\s+(%r\d+)", self.ptx))
        shared |= {to for to, of in re.findall(r"mov\.b32\s+(%f\d+), (%r\d+);", self.ptx) if of in shared}
        return sum(last in shared for last in re.findall(r"fma\.rn\.f32\s.*, (%\w+);", self.ptx))

    @property
    def sums_of_products(self) -> int:
        """How many sums of two rounded products are written out: one of them is fused with the sum, whichever the assembler likes."""
        products = set(re.findall(r"(%[\w.]+) = fmul ", self.llir))
        return sum({first, second} <= products for first, second in re.findall(r" = fadd .*?(%[\w.]+), (%[\w.]+)", self.llir))


class _Driver:
    """As much of a driver as compiling asks for."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch  # compiled kernels are kept by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def _usage(report: str) -> tuple[int, int]:
    """Registers a thread and bytes spilled, stores and loads, from the assembler's report."""
    return int(re.findall(r"Used (\d+) registers", report)[0]), sum(int(size) for size in re.findall(r"(\d+) bytes spill", report))


@contextlib.contextmanager
def compiling(capability: int) -> Iterator[list[Compiled]]:
    """Within it every launch of a kernel only compiles it, for that compute capability (90: sm_90); yields what was compiled for the first time."""
    found: list[Compiled] = []
    launch, before = JITFunction.run, driver._active

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        with contextlib.redirect_stdout(io.StringIO()) as report:
            kernel = launch(self, *args, grid=(1,), warmup=True, **options)
        if report.getvalue():  # else it was compiled before
            constants = {self.arg_names[place[0]]: value for place, value in kernel.src.constants.items()}
            metadata = kernel.metadata
            usage = _usage(report.getvalue())
            own = sum(map(int, re.findall(r"\.shared \.align \d+ \.b8 \w+\[(\d+)\]", kernel.asm["ptx"])))  # what Triton doesn't know of
            shared = metadata.shared + own
            found.append(Compiled(metadata.name, constants, *usage, shared, metadata.num_warps, kernel.asm["ptx"], kernel.asm["llir"]))
        return kernel

    JITFunction.run = run
    driver.set_active(_Driver(capability))
    try:
        with knobs.nvidia.scope(), knobs.compilation.scope():
            knobs.nvidia.dump_ptxas_log = knobs.compilation.always_compile = True
            yield found
    finally:
        JITFunction.run = launch
        driver._active = before
