"""Log-sum-exp of scores that come a block at a time, where each place of a block keeps its own maximum and sum."""

import triton
import triton.language as tl


@triton.jit
def add_exponentials(largest, sums, scores):
    """The maxima of places, and their sums of exponentials less those, after `scores` were added. Infinite maxima aren't taken off."""
    larger = tl.maximum(largest, scores)
    base = finite(larger)
    return larger, sums * tl.exp(largest - base) + tl.exp(scores - base)


@triton.jit
def maximum_and_sum(maxima, sums):
    """One maximum and sum for all of `[n]`."""
    maximum = tl.max(maxima)
    base = finite(maximum)
    return maximum, tl.sum(sums * tl.exp(tl.where(maxima == float("-inf"), base, finite(maxima)) - base))


@triton.jit
def finite(maximum):
    """What is taken off before exponentials: the maximum, or 0 where it is infinite."""
    return tl.where(tl.abs(maximum) == float("inf"), 0.0, maximum)
