"""Training: the warm-up of indexers."""

from skim.training.warmup import Warmup, warmup

__all__ = ["Warmup", "warmup"]
