"""What sparse reading costs: perplexity, kept attention mass, retrieval, and the patterns to compare with."""

from skim.evaluation.baselines import BASELINES, blocks, oracle, random, sinks, window
from skim.evaluation.intervals import Interval, paired_shares, paired_t
from skim.evaluation.plot import plot
from skim.evaluation.quality import Quality, summarise
from skim.evaluation.retrieval import TASKS, Retrieval, prompts, retrieve
from skim.evaluation.table import PATTERNS, Reading, Row, evaluate, perplexity, readings
from skim.evaluation.texts import Window, windows

__all__ = [
    "BASELINES",
    "PATTERNS",
    "TASKS",
    "Interval",
    "Quality",
    "Reading",
    "Retrieval",
    "Row",
    "Window",
    "blocks",
    "evaluate",
    "oracle",
    "paired_shares",
    "paired_t",
    "perplexity",
    "plot",
    "prompts",
    "random",
    "readings",
    "retrieve",
    "sinks",
    "summarise",
    "window",
    "windows",
]
