"""What sparse reading costs: perplexity, kept attention mass, retrieval, and the patterns to compare with."""

from skim.evaluation.agreement import Agreement, agreement
from skim.evaluation.baselines import BASELINES, blocks, oracle, random, sinks, window
from skim.evaluation.intervals import Interval, paired_shares, paired_t
from skim.evaluation.plot import plot
from skim.evaluation.quality import Pair, Quality, equal_budget, pair, summarise
from skim.evaluation.retrieval import TASKS, Retrieval, prompts, retrieve
from skim.evaluation.table import PATTERNS, Adaptive, Reading, Row, evaluate, perplexity, readings
from skim.evaluation.texts import Window, windows

__all__ = [
    "BASELINES",
    "PATTERNS",
    "TASKS",
    "Adaptive",
    "Agreement",
    "Interval",
    "Pair",
    "Quality",
    "Reading",
    "Retrieval",
    "Row",
    "Window",
    "agreement",
    "blocks",
    "equal_budget",
    "evaluate",
    "oracle",
    "pair",
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
