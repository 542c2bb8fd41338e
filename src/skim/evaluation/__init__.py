"""What sparse reading costs: perplexity, kept attention mass, and the patterns to compare with."""

from skim.evaluation.baselines import BASELINES, blocks, oracle, random, sinks, window
from skim.evaluation.table import PATTERNS, Row, evaluate, perplexity

__all__ = ["BASELINES", "PATTERNS", "Row", "blocks", "evaluate", "oracle", "perplexity", "random", "sinks", "window"]
