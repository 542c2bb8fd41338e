"""95 % confidence intervals of paired differences: two ways of reading, measured on the same windows, rows or prompts."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass

DOCUMENTS = 3  # fewer say next to nothing about how they differ
Z = 1.959964  # 97.5 % quantile of the normal distribution


@dataclass(frozen=True)
class Interval:
    """A mean difference and its 95 % confidence interval; None where a single pair says nothing about the spread."""

    mean: float
    low: float | None
    high: float | None

    def to_dict(self) -> dict[str, float | None]:
        return asdict(self)


def paired_t(values: Sequence[float], reference: Sequence[float], documents: Sequence[Hashable] | None = None) -> Interval:
    """Mean of `values - reference`, Student's t over the pairs, or over the documents that they are from.

    Windows of one document are alike, so as many independent ones would say more. The error is the cluster-robust one of
    a mean (Liang and Zeger, Biometrika 73, 1986), which with one pair in each document is the usual one.

    Args:
        values, reference: a figure for each pair.
        documents: the document of each pair. None, or fewer than `DOCUMENTS` of them, takes every pair as independent.

    Raises:
        ValueError: no pairs, or not as many of one as of the other.
    """
    differences = _differences(values, reference)
    n = len(differences)
    mean = math.fsum(differences) / n
    deviations: dict[Hashable, list[float]] = {}
    for key, difference in zip(clusters(range(n) if documents is None else documents), differences, strict=True):
        deviations.setdefault(key, []).append(difference - mean)
    groups = len(deviations)
    if groups == 1:
        return Interval(mean, None, None)
    error = math.sqrt(math.fsum(math.fsum(group) ** 2 for group in deviations.values()) * groups / (groups - 1)) / n
    half = t_quantile(groups - 1) * error
    return Interval(mean, mean - half, mean + half)


def clusters(documents: Sequence[Hashable]) -> Sequence[Hashable]:
    """What an interval takes as independent: the documents if there are enough of them, otherwise each pair for itself."""
    return documents if len(set(documents)) >= DOCUMENTS else range(len(documents))


def paired_shares(hits: Sequence[bool], reference: Sequence[bool]) -> Interval:
    """Difference of two shares over the same prompts: Wald's interval with half a prompt added to each cell of the 2 x 2 table.

    Agresti and Min (Statistics in Medicine 24, 2005): unlike the plain one it doesn't shrink to nothing where few
    prompts differ. The mean is the plain difference, which the interval is made to hold.

    Raises:
        ValueError: no pairs, or not as many of one as of the other.
    """
    differences = _differences([float(hit) for hit in hits], [float(hit) for hit in reference])
    n = len(differences)
    gained, lost = differences.count(1.0) + 0.5, differences.count(-1.0) + 0.5
    centre = (gained - lost) / (n + 2)
    half = Z * math.sqrt(gained + lost - (gained - lost) ** 2 / (n + 2)) / (n + 2)
    mean = sum(differences) / n
    return Interval(mean, max(-1.0, min(mean, centre - half)), min(1.0, max(mean, centre + half)))


def t_quantile(freedom: int) -> float:
    """97.5 % quantile of Student's t: exact for 1 and 2, from 3 on by its series about the normal one, within 0.2 %.

    The series is 26.7.5 of Abramowitz and Stegun.
    """
    if freedom == 1:
        return math.tan(math.pi * 0.475)
    if freedom == 2:
        return 0.95 * math.sqrt(2 / (1 - 0.95**2))
    z, v = Z, freedom
    terms = (
        (z**3 + z) / (4 * v),
        (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2),
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3),
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / (92160 * v**4),
    )
    return z + sum(terms)


def _differences(values: Sequence[float], reference: Sequence[float]) -> list[float]:
    if len(values) != len(reference) or not values:
        raise ValueError(f"values: expected as many as the reference has, at least one, got {len(values)} and {len(reference)}")
    return [a - b for a, b in zip(values, reference)]
