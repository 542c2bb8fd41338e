"""How much scratch memory a reference operator may hold: rows are worked off in chunks that fit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Optional

import torch


def workspace(workspace_mb: Optional[int], device: torch.device) -> int:
    """`workspace_mb`, or the default of a device: on a CPU what its caches hold, elsewhere what fills the chip."""
    if workspace_mb is None:
        return 32 if device.type == "cpu" else 512
    if workspace_mb < 1:
        raise ValueError(f"workspace_mb: expected MiB >= 1, got {workspace_mb}")
    return workspace_mb


def chunks(rows: int, bytes_per_row: int, workspace_mb: int, multiple: int = 1) -> Iterator[slice]:
    """Slices over `rows` whose scratch, `bytes_per_row` each, fits `workspace_mb`; never fewer than `multiple` rows."""
    fitting = max(1, (workspace_mb << 20) // max(1, bytes_per_row))
    step = max(multiple, fitting // multiple * multiple)
    for first in range(0, rows, step):
        yield slice(first, min(first + step, rows))


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums are made in: float64 for float64 inputs (gradcheck), float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def unscaled(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a gradient that a loss scale has yet to reach: float16 would flush most of it to zero."""
    return torch.float32 if dtype == torch.float16 else dtype
