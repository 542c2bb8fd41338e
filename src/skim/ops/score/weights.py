"""The factors of a score; hopper.py multiplies the same in its kernel."""

from typing import Optional

from torch import Tensor

from skim.ops.workspace import accumulator


def head_weights(weights: Tensor, q_scale: Optional[Tensor], E: int) -> Tensor:
    """weights `[..., J]` with `J^-1/2`, `E^-1/2` and, for FP8 queries, their scale folded in."""
    dtype = accumulator(weights.dtype)
    wide = weights.to(dtype) if q_scale is None else weights * q_scale.to(dtype)  # one launch less than to widen weights first
    return wide * (weights.shape[-1] ** -0.5 * E**-0.5)
