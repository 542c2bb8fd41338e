"""What this machine can do at best, measured beside everything else: a share of these is worth more than a figure alone."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import util

import torch

from skim.bench.measure import measure


@dataclass(frozen=True)
class Roofs:
    """Measured rates: matrix products in operations a second, memory in bytes a second; None where there is no such thing.

    Attributes:
        matmul: bf16 on a GPU, float32 on a CPU.
        fp8: e4m3.
        copy: a large copy, read and written.
        gather: rows of 1 KiB by random numbers, of 16 thousand, which a GPU's cache holds.
        gather_far: the same, of 128 thousand.
    """

    matmul: float
    fp8: float | None
    copy: float
    gather: float | None
    gather_far: float | None


@dataclass(frozen=True)
class Stage:
    """What one step of an operation has to do at least.

    Attributes:
        name: of the step.
        formula: of its operations, in the letters of the manual.
        flops, fp8_flops: operations of its matrix products.
        moved: bytes of memory read and written once.
        gathered: bytes read row by row.
    """

    name: str
    formula: str
    flops: float = 0.0
    fp8_flops: float = 0.0
    moved: float = 0.0
    gathered: float = 0.0

    def seconds(self, roofs: Roofs) -> float:
        """The least time that the roofs allow."""
        compute = self.flops / roofs.matmul + self.fp8_flops / (roofs.fp8 or roofs.matmul)
        return max(compute, self.moved / roofs.copy, self.gathered / roofs.gather if roofs.gather else 0.0)


def measured_roofs(device: torch.device, quick: bool) -> Roofs:
    """Measures the roofs of `device`; with `quick` on inputs too small to mean anything."""
    side = 256 if quick else 8192 if device.type == "cuda" else 2048
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    squares = [(torch.randn(side, side, device=device, dtype=dtype), torch.randn(side, side, device=device, dtype=dtype)) for _ in range(3)]
    product = measure(lambda x: x[0] @ x[1], squares, device)
    large = [torch.zeros((1 << 20 if quick else 512 << 20), dtype=torch.uint8, device=device) for _ in range(3)]
    copied = measure(torch.clone, large, device)
    fp8 = None
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9):
        one = torch.ones((), device=device)
        eights = [(a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t()) for a, b in squares]
        took = measure(lambda x: torch._scaled_mm(x[0], x[1], scale_a=one, scale_b=one, out_dtype=torch.bfloat16), eights, device)
        fp8 = 2 * side**3 / took.ms * 1e3
    near, far = (_gather(device, keys) if device.type == "cuda" and util.find_spec("triton") else None for keys in (16384, 131072))
    return Roofs(2 * side**3 / product.ms * 1e3, fp8, 2 * large[0].numel() / copied.ms * 1e3, near, far)


def _gather(device: torch.device, keys: int) -> float:
    from skim.bench.gather import ROWS, WIDTH, gather

    x = torch.randn(keys, WIDTH, dtype=torch.bfloat16, device=device)
    inputs = [torch.randint(0, keys, (8192, ROWS), dtype=torch.int32, device=device) for _ in range(3)]
    took = measure(lambda indices: gather(x, indices), inputs, device)
    return inputs[0].numel() * WIDTH * x.itemsize / took.ms * 1e3
