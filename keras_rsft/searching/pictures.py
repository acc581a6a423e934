"""Draws what a search found: selectivity against learning rate.

Matplotlib is optional: without it there are no pictures, and nothing else is missing.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from keras_rsft.searching.choice import COMPLETED, TrialOutcome
from keras_rsft.searching.search_folder import replaced

HEAT_MAP_FILE = "heatmap.svg"
# How selective a trial is, by the names of the hyperparameters that say so.
SELECTIVITY = {
    "relative_threshold": "threshold / ln(classes)",
    "threshold": "threshold of the batch",
    "keep_fraction": "kept fraction",
}
SHOWN = {"val_accuracy": "validation accuracy", "acceptance_rate": "acceptance rate"}
_CELLS = 8


@dataclasses.dataclass(frozen=True, eq=False)
class HeatMap:
    """Means over trials, in cells of learning rate and selectivity.

    Attributes:
        rate_edges: Float array `(columns + 1,)`, even in the logarithm.
        edges: Float array `(rows + 1,)` of the number that says how selective.
        means: For each of `SHOWN` a float array `(rows, columns)`, NaN where there
            is no trial.
    """

    rate_edges: np.ndarray
    edges: np.ndarray
    means: dict[str, np.ndarray]


def heat_map(outcomes: Sequence[TrialOutcome], name: str) -> HeatMap | None:
    """Returns the means over completed trials that have a number, or None without any.

    Args:
        outcomes: All trials.
        name: One of `SELECTIVITY`.
    """
    shown = [
        one
        for one in outcomes
        if one.status == COMPLETED and {name, "learning_rate"} <= one.values.keys()
    ]
    if not shown:
        return None
    rates = np.array([one.values["learning_rate"] for one in shown], float)
    numbers = np.array([one.values[name] for one in shown], float)
    rate_edges = np.exp(_edges(np.log(rates)))
    # Rounding must not leave the lowest and the highest outside of their cells.
    rate_edges[[0, -1]] = (
        min(rate_edges[0], rates.min()),
        max(rate_edges[-1], rates.max()),
    )
    edges = _edges(numbers)
    counts = np.histogram2d(numbers, rates, (edges, rate_edges))[0]
    means = {}
    for metric in SHOWN:
        values = np.array([one.metrics[metric] for one in shown])
        sums = np.histogram2d(numbers, rates, (edges, rate_edges), weights=values)[0]
        means[metric] = np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
    return HeatMap(rate_edges, edges, means)


def draw_heat_maps(outcomes: Sequence[TrialOutcome], folder: Path) -> Path | None:
    """Writes `heatmap.svg`: a row for each number that says how selective a trial is.

    Args:
        outcomes: All trials.
        folder: An existing folder.

    Returns:
        The file, or None where there is nothing to draw or no matplotlib.
    """
    maps = {name: heat_map(outcomes, name) for name in SELECTIVITY}
    maps = {name: found for name, found in maps.items() if found is not None}
    if not maps or importlib.util.find_spec("matplotlib") is None:
        return None
    from matplotlib.figure import Figure  # Without pyplot: no window, no state.

    figure = Figure(figsize=(9, 3.4 * len(maps)), layout="constrained")
    axes = figure.subplots(len(maps), len(SHOWN), squeeze=False)
    for row, (name, found) in zip(axes, maps.items(), strict=True):
        for place, (metric, title) in zip(row, SHOWN.items(), strict=True):
            mesh = place.pcolormesh(
                found.rate_edges, found.edges, found.means[metric], cmap="viridis"
            )
            place.set_xscale("log")
            place.set(xlabel="learning rate", ylabel=SELECTIVITY[name], title=title)
            figure.colorbar(mesh, ax=place)
    path = folder / HEAT_MAP_FILE
    replaced(path, figure.savefig)
    return path


def _edges(values: np.ndarray) -> np.ndarray:
    """Returns the edges of even cells; of few distinct values each has its own."""
    distinct = np.unique(values)
    if len(distinct) == 1:
        half = max(abs(distinct[0]), 1.0) / 10
        return np.array([distinct[0] - half, distinct[0] + half])
    if len(distinct) <= _CELLS:
        middles = (distinct[1:] + distinct[:-1]) / 2
        first, last = 2 * distinct[0] - middles[0], 2 * distinct[-1] - middles[-1]
        return np.array([first, *middles, last])
    return np.linspace(distinct[0], distinct[-1], _CELLS + 1)
