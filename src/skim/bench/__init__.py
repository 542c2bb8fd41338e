"""`skim bench`: one registry of cases, measured the same way and beside what a user has today."""

from skim.bench.plot import plot
from skim.bench.runner import describe, line, run

__all__ = ["describe", "line", "plot", "run"]
