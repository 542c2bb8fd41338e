"""The factors of a score, the same for every implementation."""

from typing import Optional

from torch import Tensor

from skim.ops.workspace import accumulator


def head_weights(weights: Tensor, q_scale: Optional[Tensor], E: int) -> Tensor:
    """weights `[..., J]` with `J^-1/2`, `E^-1/2` and, for FP8 queries, their scale folded in."""
    scaled = weights.to(accumulator(weights.dtype)) * (weights.shape[-1] ** -0.5 * E**-0.5)
    return scaled if q_scale is None else scaled * q_scale
