"""Inputs that several tests of the operators share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from reference_math import interval_mask
from torch import Tensor

from skim.selection import Selection

KERNELS = "cuda" if torch.cuda.is_available() else "cpu"  # where Triton's kernels run; in its interpreter on a CPU


def triton(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """What the Triton implementation of `function` makes of tensors on the CPU, as tensors on the CPU."""
    moved = {name: moved_to(KERNELS, x) for name, x in options.items()}
    return moved_to("cpu", function(*moved_to(KERNELS, args), impl="triton", **moved))


def moved_to(device: str, value: Any) -> Any:
    """A tensor, a Selection, or a tuple of them and other things, on another device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Selection):
        return Selection(*(moved_to(device, x) for x in (value.indices, value.counts, value.scores)))
    return tuple(moved_to(device, x) for x in value) if isinstance(value, tuple) else value


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def index_inputs(
    B: int = 1, T: int = 33, S: int = 70, J: int = 4, E: int = 16, seed: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """q_index, k_index, weights."""
    return normal(B, T, J, E, seed=seed, dtype=dtype), normal(B, S, E, seed=seed + 1, dtype=dtype), normal(B, T, J, seed=seed + 2, dtype=dtype)


def exact_index_inputs(scores: Tensor, T: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Index inputs whose scores are bitwise `scores` [S] in each of T rows: relu(x) - relu(-x), in factors of 1."""
    q = torch.tensor([1.0, -1.0, 0.0, 0.0]).view(1, 1, 4, 1).expand(1, T, 4, 1)
    weights = torch.tensor([2.0, -2.0, 0.0, 0.0]).view(1, 1, 4).expand(1, T, 4)  # 2 undoes J^-1/2
    return q, scores.view(1, -1, 1), weights


def attention_inputs(
    B: int = 2, T: int = 33, S: int = 50, H: int = 6, G: int = 2, D: int = 8, V: int = 5, seed: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v."""
    return normal(B, T, H, D, seed=seed, dtype=dtype), normal(B, S, G, D, seed=seed + 1, dtype=dtype), normal(B, S, G, V, seed=seed + 2, dtype=dtype)


def random_indices(B: int, T: int, R: int, K: int, S: int, seed: int = 0, holes: bool = True) -> Tensor:
    """int32 [B, T, R, K] distinct keys in a random order; with holes: -1 anywhere, and every fifth row all -1."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(B, T, R, max(S, K), generator=generator).argsort(-1)[..., :K].to(torch.int32)
    order = order.masked_fill(order >= S, -1)
    if holes:
        order = order.masked_fill(torch.rand(order.shape, generator=generator) < 0.2, -1)
        order[:, ::5] = -1
    return order


def random_interval(B: int, T: int, S: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """start, end int32 [B, T]: any intervals, empty ones among them."""
    generator = torch.Generator().manual_seed(seed)
    bounds = torch.randint(0, S + 1, (2, B, T), generator=generator, dtype=torch.int32).sort(0).values
    return bounds[0], bounds[1]


def selection_of(interval: tuple[Tensor, Tensor], S: int) -> Selection:
    """Everything that is visible, as a selection."""
    return Selection.from_mask(interval_mask(*interval, S)[:, :, None], S)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
