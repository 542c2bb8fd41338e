"""What a curve of alignment losses says of its run."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

PART = 5  # the curve is judged by fifths
FALLING, RISING = 0.05, 0.10
STUCK = 0.3  # a warm-up that ends above this share of where it began has hardly left its start


def fifths(curve: Sequence[float]) -> list[float]:
    """Means of the curve's fifths."""
    bounds = [len(curve) * i // PART for i in range(PART + 1)]
    return [fmean(curve[begin : max(end, begin + 1)]) for begin, end in zip(bounds, bounds[1:])]


def verdict(curve: Sequence[float], warmup: bool) -> str:
    """ "converged", "train longer", "raise lr" or "lower lr"; "too short to tell" below ten steps.

    A curve that rose, or that is no number, asks for a lower rate; a warm-up that stays near its start for a higher one
    (at SmolLM2-135M 3e-4 instead of 1e-2 looked like that); one that still falls for more steps.
    """
    if any(value != value for value in curve):
        return "lower lr"
    if len(curve) < 2 * PART:
        return "too short to tell"
    parts = fifths(curve)
    before, last = parts[-2], parts[-1]
    if last > before * (1 + RISING) or last > parts[0] * (1 + RISING):
        return "lower lr"
    if warmup and last > STUCK * fmean(curve[:2]):
        return "raise lr"
    return "train longer" if last < before * (1 - FALLING) else "converged"
