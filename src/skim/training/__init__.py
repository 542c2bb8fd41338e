"""Training: data, the warm-up of indexers, and the sparse stage after it."""

from skim.training.data import Rows, prepare
from skim.training.loop import train
from skim.training.recipe import Recipe

__all__ = ["Recipe", "Rows", "prepare", "train"]
