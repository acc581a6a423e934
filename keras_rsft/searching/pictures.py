"""The pictures of a search: what its heat map and its parallel coordinates show."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from keras_rsft._storage import replaced
from keras_rsft.config import UNFREEZE_NAMES, SearchConfig
from keras_rsft.report.charts import (
    UNUSED,
    Axis,
    HeatMap,
    heat_maps_svg,
    parallel_coordinates_svg,
)
from keras_rsft.report.run_record import HEAT_MAP_FILE, PARALLEL_COORDINATES_FILE
from keras_rsft.searching.choice import COMPLETED, TrialOutcome

# How selective a trial is, by the names of the hyperparameters that say so.
SELECTIVITY = {
    "relative_threshold": "threshold / ln(classes)",
    "threshold": "threshold of the batch",
    "keep_fraction": "kept fraction",
}
_SHOWN = {"val_accuracy": "validation accuracy", "acceptance_rate": "acceptance rate"}
_CELLS = 8
_LOGARITHMIC = ("learning_rate", "weight_decay", "base_learning_rate")
# In this order; what else a space has follows.
_FIRST = ("trainable", "policy", "optimizer", "learning_rate")
_TICKS = 5


def write_pictures(
    heads: Sequence[TrialOutcome],
    outcomes: Sequence[TrialOutcome],
    options: SearchConfig,
    folder: Path,
) -> None:
    """Writes the heat maps of the heads and the parallel coordinates of all trials.

    Without a completed trial there is nothing to draw, and no file.
    """
    maps = [one for name in SELECTIVITY if (one := heat_map(heads, name)) is not None]
    if maps:
        _write(folder / HEAT_MAP_FILE, heat_maps_svg(maps))
    completed = [one for one in outcomes if one.status == COMPLETED]
    if completed:
        axes = axes_of(completed, options.objective)
        drawn = parallel_coordinates_svg(
            axes, higher_is_better=options.direction == "max"
        )
        _write(folder / PARALLEL_COORDINATES_FILE, drawn)


def _write(path: Path, svg: str) -> None:
    def fill(beside: Path) -> None:
        beside.write_text(svg, encoding="utf-8")

    replaced(path, fill)


def heat_map(outcomes: Sequence[TrialOutcome], name: str) -> HeatMap | None:
    """Returns the means over completed trials that have a number, None without any."""
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
    rate_edges[0] = min(rate_edges[0], rates.min())
    rate_edges[-1] = max(rate_edges[-1], rates.max())
    edges = _edges(numbers)
    counts = np.histogram2d(numbers, rates, (edges, rate_edges))[0]
    means = {}
    for metric, title in _SHOWN.items():
        values = np.array([one.metrics[metric] for one in shown])
        sums = np.histogram2d(numbers, rates, (edges, rate_edges), weights=values)[0]
        means[title] = np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
    return HeatMap(SELECTIVITY[name], rates, numbers, rate_edges, edges, means)


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


def axes_of(outcomes: Sequence[TrialOutcome], objective: str) -> list[Axis]:
    """Returns the axes: hyperparameters that differ, acceptance rate, objective."""
    names = {name: None for one in outcomes for name in one.values}
    ordered = [name for name in _FIRST if name in names]
    ordered += [name for name in names if name not in _FIRST]
    columns = {name: [one.values.get(name) for one in outcomes] for name in ordered}
    axes = [
        _axis(name, values) for name, values in columns.items() if len(set(values)) > 1
    ]
    for name in dict.fromkeys(("acceptance_rate", objective)):
        axes.append(_axis(name, [one.metrics[name] for one in outcomes]))
    return axes


def _axis(name: str, values: list[Any]) -> Axis:
    used = [value for value in values if value is not None]
    placed: Sequence[float] | np.ndarray
    if all(isinstance(value, (int, float)) for value in used):
        placed, ticks = _of_numbers(used, logarithmic=name in _LOGARITHMIC)
    else:
        placed, ticks = _of_names([str(value) for value in used])
    if len(used) < len(values):
        ticks = {UNUSED: "not used"} | ticks
    positions = np.full(len(values), UNUSED)
    positions[[value is not None for value in values]] = placed
    return Axis(name, positions, ticks)


def _of_names(names: list[str]) -> tuple[list[float], dict[float, str]]:
    def order(name: str) -> tuple[int, str]:  # From the cheapest to train on.
        known = name in UNFREEZE_NAMES
        return (UNFREEZE_NAMES.index(name) if known else 0, name)

    distinct = sorted(set(names), key=order)
    spread = np.linspace(0, 1, len(distinct)).tolist() if len(distinct) > 1 else [0.5]
    ticks = dict(zip(spread, distinct, strict=True))
    return [spread[distinct.index(name)] for name in names], ticks


def _of_numbers(
    numbers: list[float], *, logarithmic: bool
) -> tuple[np.ndarray, dict[float, str]]:
    scaled = np.array(numbers, float)
    if logarithmic:
        scaled = np.log10(scaled)
    low, high = scaled.min(), scaled.max()
    if low == high:
        return np.full(len(numbers), 0.5), {0.5: f"{numbers[0]:.3g}"}
    shown = np.unique(scaled)
    if len(shown) > _TICKS or not all(isinstance(one, int) for one in numbers):
        shown = np.linspace(low, high, _TICKS)
    labels = 10.0**shown if logarithmic else shown
    places = (shown - low) / (high - low)
    ticks = {float(at): f"{v:.3g}" for at, v in zip(places, labels, strict=True)}
    return (scaled - low) / (high - low), ticks
