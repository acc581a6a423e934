"""How the losses of an epoch are distributed, and what was accepted of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

# Ten bins a decade: right and wrong labels stand apart by their loss's logarithm.
# What lies outside is counted in the first and the last bin.
HISTOGRAM_EDGES = np.geomspace(1e-3, 1e2, 51)
HISTOGRAM_COLUMNS = ("epoch", "threshold", "low", "high", "accepted", "rejected")


@dataclasses.dataclass(frozen=True, eq=False)
class LossHistogram:
    """How the losses of one epoch were distributed, and what was made of them.

    Attributes:
        threshold: The policy's threshold at the end of the epoch, or None; see
            `Policy.threshold_in_use`.
        accepted: int64 array `(50,)`: accepted samples in each bin of
            `HISTOGRAM_EDGES`. Losses that are not finite are not counted.
        rejected: The same of rejected samples.
    """

    threshold: float | None
    accepted: np.ndarray
    rejected: np.ndarray

    def rows(self, epoch: int) -> Iterator[list[Any]]:
        """Yields a row for each bin that is not empty, as in `HISTOGRAM_COLUMNS`."""
        shown = "" if self.threshold is None else f"{self.threshold:.6g}"
        for place in np.flatnonzero(self.accepted + self.rejected):
            low, high = (f"{HISTOGRAM_EDGES[place + step]:.6g}" for step in (0, 1))
            counts = (int(self.accepted[place]), int(self.rejected[place]))
            yield [epoch, shown, low, high, *counts]


def loss_histogram(
    losses: np.ndarray, accepted: np.ndarray, threshold: float | None = None
) -> LossHistogram:
    """Counts losses in bins that are the same for every epoch.

    Args:
        losses: Float array `(n,)`.
        accepted: Float array `(n,)`: 1 accepted, 0 rejected, negative not seen.
        threshold: The policy's threshold, or None.
    """
    counted = [
        np.histogram(
            np.clip(losses[chosen], HISTOGRAM_EDGES[0], HISTOGRAM_EDGES[-1]),
            HISTOGRAM_EDGES,
        )[0]
        for chosen in (
            np.isfinite(losses) & (accepted > 0),
            np.isfinite(losses) & (accepted == 0),
        )
    ]
    return LossHistogram(threshold, *counted)
