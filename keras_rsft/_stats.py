"""Intervals for means, fractions and paired differences. Pure numbers."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


# 97.5 % quantiles of Student's t for 1 to 30 degrees of freedom. A table, because
# the only other way is to depend on SciPy.
_T_QUANTILES = (
    *(12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281),
    *(2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860),
    *(2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423),
)

NORMAL_QUANTILE = 1.959964  # 97.5 %.


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean with its 95 % confidence interval."""

    mean: float
    half_width: float

    @property
    def low(self) -> float:
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        return self.mean + self.half_width


def t_quantile(degrees_of_freedom: int) -> float:
    """Returns the 97.5 % quantile of Student's t distribution."""
    return _T_QUANTILES[min(degrees_of_freedom, len(_T_QUANTILES)) - 1]


def mean_interval(values: Sequence[float]) -> Interval:
    """Returns the mean of one or more values with its Student t interval."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Interval(mean, math.inf)
    error = statistics.stdev(values) / math.sqrt(len(values))
    return Interval(mean, t_quantile(len(values) - 1) * error)


def paired_interval(ones: Sequence[float], others: Sequence[float]) -> Interval:
    return mean_interval([a - b for a, b in zip(ones, others, strict=True)])


def proportion_interval(successes: float, count: float) -> tuple[float, float]:
    """Returns the 95 % interval of a fraction (Wilson, 1927)."""
    share = successes / count
    squared = NORMAL_QUANTILE**2
    centre = (share + squared / (2 * count)) / (1 + squared / count)
    spread = math.sqrt(share * (1 - share) / count + squared / (4 * count**2))
    half = NORMAL_QUANTILE * spread / (1 + squared / count)
    return max(0.0, centre - half), min(1.0, centre + half)


def paired_share_interval(
    only_one: int, only_other: int, count: int
) -> tuple[float, float]:
    """Returns the 95 % interval of a difference of two fractions of the same items."""
    difference, half = _matched_difference(
        only_one - only_other, only_one + only_other, count
    )
    return max(-1.0, difference - half), min(1.0, difference + half)


def paired_right_interval(ones: np.ndarray, others: np.ndarray) -> tuple[float, float]:
    """Returns the 95 % interval of a difference of accuracies over seeds and items."""
    differences = ones.astype(float) - others
    of_items = differences.mean(axis=0)
    difference, over_items = _matched_difference(
        float(of_items.sum()), float((of_items**2).sum()), len(of_items)
    )
    over_seeds = mean_interval(differences.mean(axis=1).tolist()).half_width
    half = math.hypot(over_seeds, over_items)
    return max(-1.0, difference - half), min(1.0, difference + half)


def paired_error(ones: np.ndarray, others: np.ndarray) -> float:
    """Returns the standard error of a difference of means over the same items."""
    differences = ones.astype(float) - others
    total, squares = float(differences.sum()), float((differences**2).sum())
    return _matched_difference(total, squares, len(differences))[1] / NORMAL_QUANTILE


def _matched_difference(
    total: float, squares: float, count: int
) -> tuple[float, float]:
    """Returns Agresti and Min's difference and half of its interval."""
    count += 2
    difference = total / count
    variance = max((squares + 1) / count - difference**2, 0.0)
    return difference, NORMAL_QUANTILE * math.sqrt(variance / count)


def apportioned(values: Sequence[float]) -> list[int]:
    """Returns whole numbers near the values that add up to their rounded sum."""
    whole = [math.floor(value) for value in values]
    missing = round(sum(values)) - sum(whole)
    order = sorted(range(len(values)), key=lambda at: whole[at] - values[at])
    for at in order[:missing]:
        whole[at] += 1
    return whole
