"""Intervals for means, shares and paired differences. Pure numbers."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence

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
    """A mean with its 95 % confidence interval.

    Attributes:
        mean: The mean of the values.
        half_width: Half of the interval's width, at least 0; infinite for one
            value, which says nothing about chance.

    Example:
        >>> Interval(mean=2.0, half_width=0.5).low
        1.5
    """

    mean: float
    half_width: float

    @property
    def low(self) -> float:
        """The interval's lower end."""
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        """The interval's upper end."""
        return self.mean + self.half_width


def t_quantile(degrees_of_freedom: int) -> float:
    """Returns the 97.5 % quantile of Student's t distribution.

    Args:
        degrees_of_freedom: At least 1. Above 30 the quantile of 30 is returned,
            which makes an interval at most 4.2 % wider than it need be, and
            never narrower.

    Example:
        >>> t_quantile(4)  # Five seeds.
        2.7764
    """
    return _T_QUANTILES[min(degrees_of_freedom, len(_T_QUANTILES)) - 1]


def mean_interval(values: Sequence[float]) -> Interval:
    """Returns the mean of one or more values with its Student t interval.

    Example:
        >>> interval = mean_interval([0.90, 0.92, 0.94])
        >>> print(f"{interval.low:.3f} to {interval.high:.3f}")
        0.870 to 0.970
    """
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Interval(mean, math.inf)
    error = statistics.stdev(values) / math.sqrt(len(values))
    return Interval(mean, t_quantile(len(values) - 1) * error)


def paired_interval(ones: Sequence[float], others: Sequence[float]) -> Interval:
    """Returns the interval of `ones - others`, pair by pair.

    Two methods with the same seed share noise, order and initial weights; their
    differences vary less than their accuracies.

    Args:
        ones: Values of one method, one a seed.
        others: Values of the other method for the same seeds.

    Raises:
        ValueError: If there are not as many of one as of the other.

    Example:
        >>> difference = paired_interval([0.90, 0.92, 0.94], [0.85, 0.88, 0.88])
        >>> print(f"{difference.mean:.3f} ± {difference.half_width:.3f}")
        0.050 ± 0.025
    """
    return mean_interval([a - b for a, b in zip(ones, others, strict=True)])


def proportion_interval(successes: int, count: int) -> tuple[float, float]:
    """Returns the 95 % interval of a share (Wilson, 1927).

    Args:
        successes: In [0, count].
        count: At least 1.

    Returns:
        Lower and upper end, in [0, 1].

    Example:
        >>> low, high = proportion_interval(90, 100)
        >>> print(f"{low:.3f} to {high:.3f}")
        0.826 to 0.945
    """
    share = successes / count
    squared = NORMAL_QUANTILE**2
    centre = (share + squared / (2 * count)) / (1 + squared / count)
    spread = math.sqrt(share * (1 - share) / count + squared / (4 * count**2))
    half = NORMAL_QUANTILE * spread / (1 + squared / count)
    return max(0.0, centre - half), min(1.0, centre + half)


def paired_share_interval(
    only_one: int, only_other: int, count: int
) -> tuple[float, float]:
    """Returns the 95 % interval of a difference of two shares of the same items.

    Agresti and Min (2005), "Simple improved confidence intervals for comparing
    matched proportions": the interval of the normal distribution after half an item
    was added to each of the four cells.

    Args:
        only_one: Items that only the first method gets right.
        only_other: Items that only the other method gets right.
        count: All items, at least 1.

    Returns:
        Lower and upper end of first less other, in [-1, 1].

    Example:
        >>> low, high = paired_share_interval(30, 2, 269)
        >>> print(f"{low:.3f} to {high:.3f}")
        0.064 to 0.143
    """
    difference, half = _matched_difference(
        only_one - only_other, only_one + only_other, count
    )
    return max(-1.0, difference - half), min(1.0, difference + half)


def paired_right_interval(ones: np.ndarray, others: np.ndarray) -> tuple[float, float]:
    """Returns the 95 % interval of a difference of accuracies over seeds and items.

    All seeds share the items, so what differs between seeds says nothing of what other
    items would change. A difference is a mean, an effect of the seed, one of the item,
    and a rest: the variance over seeds of the mean over items and that over items of
    the mean over seeds add up to that of the whole mean, with the rest in both (Owen,
    2007, "The pigeonhole bootstrap"). Each has its own quantile, and the half widths
    are added by their squares (Zou and Donner, 2008, "Construction of confidence limits
    about effect measures"). Where seeds change nothing, this is
    `paired_share_interval`.

    It covers other seeds and other test items, not another training set.

    Args:
        ones: Which items one method gets right, booleans of shape `(seeds, items)`.
        others: The same of the other method, with the same seeds and items.

    Returns:
        Lower and upper end of first less other, in [-1, 1]; -1 and 1 for one seed,
        which says nothing about other seeds.

    Example:
        >>> one = np.array([[True] * 95 + [False] * 5] * 3)
        >>> other = np.array([[True] * 80 + [False] * 20] * 3)
        >>> low, high = paired_right_interval(one, other)
        >>> print(f"{low:.3f} to {high:.3f}")
        0.076 to 0.218
    """
    differences = np.subtract(ones, others, dtype=np.float64)
    of_items = differences.mean(axis=0)
    difference, over_items = _matched_difference(
        float(of_items.sum()), float(np.square(of_items).sum()), len(of_items)
    )
    over_seeds = mean_interval(differences.mean(axis=1).tolist()).half_width
    half = math.hypot(over_seeds, over_items)
    return max(-1.0, difference - half), min(1.0, difference + half)


def _matched_difference(
    total: float, squares: float, count: int
) -> tuple[float, float]:
    """Returns Agresti and Min's difference and half of its interval.

    Args:
        total: Sum over all items of a difference in [-1, 1].
        squares: Sum of its squares.
        count: All items.
    """
    count += 2
    difference = total / count
    variance = max((squares + 1) / count - difference**2, 0.0)
    return difference, NORMAL_QUANTILE * math.sqrt(variance / count)
