"""Draws each trial as a line through its hyperparameters to what it reached.

Matplotlib is optional: without it there is no picture, and nothing else is missing.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from keras_rsft.searching.choice import COMPLETED, TrialOutcome
from keras_rsft.searching.names import TRAINABLE_NAMES, SearchOptions
from keras_rsft.searching.pictures import INK, PAPER, dark_and_light, save_picture

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PARALLEL_COORDINATES_FILE = "parallel_coordinates.svg"
# Where a line passes an axis whose hyperparameter the trial does not have.
UNUSED = -0.15
LOGARITHMIC = ("learning_rate", "weight_decay", "base_learning_rate")
# In this order; what else a space has follows.
_FIRST = ("trainable", "policy", "optimizer", "learning_rate")
_TICKS = 5


@dataclasses.dataclass(frozen=True, eq=False)
class Axis:
    """One vertical axis.

    Attributes:
        name: Of the hyperparameter or the metric.
        positions: Float array `(trials,)` in [0, 1], or `UNUSED`.
        ticks: Labels by position.
    """

    name: str
    positions: np.ndarray
    ticks: dict[float, str]


def axes_of(outcomes: Sequence[TrialOutcome], objective: str) -> list[Axis]:
    """Returns the axes: hyperparameters that differ, acceptance rate, objective.

    Args:
        outcomes: Completed trials, at least one.
        objective: Name of the last axis.
    """
    names = {name: None for one in outcomes for name in one.values}
    ordered = [name for name in _FIRST if name in names]
    ordered += [name for name in names if name not in _FIRST]
    axes = []
    for name in ordered:
        values = [one.values.get(name) for one in outcomes]
        if len(set(values)) > 1:
            axes.append(_axis(name, values))
    for name in dict.fromkeys(("acceptance_rate", objective)):
        axes.append(_axis(name, [one.metrics[name] for one in outcomes]))
    return axes


def draw_parallel_coordinates(
    outcomes: Sequence[TrialOutcome], options: SearchOptions, folder: Path
) -> Path | None:
    """Writes `parallel_coordinates.svg`, better trials in lighter lines on top.

    Args:
        outcomes: All trials.
        options: How they were searched.
        folder: An existing folder.

    Returns:
        The file, or None without a completed trial or without matplotlib.
    """
    shown = [one for one in outcomes if one.status == COMPLETED]
    if not shown or importlib.util.find_spec("matplotlib") is None:
        return None
    path = folder / PARALLEL_COORDINATES_FILE
    with dark_and_light():
        axes = axes_of(shown, options.objective)
        save_picture(_drawn(axes, options.direction), path)
    return path


def _drawn(axes: list[Axis], direction: str) -> Figure:
    from matplotlib import colormaps
    from matplotlib.figure import Figure  # Without pyplot: no window, no state.

    figure = Figure(figsize=(1.7 * len(axes), 4.5), layout="constrained")
    place = figure.subplots()
    lines = np.stack([axis.positions for axis in axes], axis=1)
    goodness = lines[:, -1] if direction == "max" else 1 - lines[:, -1]
    # Neither end of the scale, which is lost on dark or on light.
    colours = colormaps["plasma"](0.25 + 0.6 * goodness)
    for row in np.argsort(goodness, kind="stable"):
        place.plot(lines[row], color=colours[row], alpha=0.8, linewidth=1.2)
    for column, axis in enumerate(axes):
        _draw_axis(place, column, axis)
    place.set_xticks(range(len(axes)), [axis.name.replace("_", " ") for axis in axes])
    place.set_xlim(-0.1, len(axes) - 0.4)
    place.set_ylim(UNUSED - 0.05, 1.05)
    place.set_yticks([])
    place.tick_params(axis="x", length=0)
    for side in place.spines.values():
        side.set_visible(False)
    return figure


def _draw_axis(place: Any, column: int, axis: Axis) -> None:
    place.axvline(column, color="0.5", linewidth=0.8, zorder=0)
    for position, label in axis.ticks.items():
        place.text(
            column + 0.04,
            position,
            label,
            fontsize=8,
            verticalalignment="center",
            color=INK,
            bbox={"facecolor": PAPER, "alpha": 0.75, "linewidth": 0, "pad": 0.8},
        )


def _axis(name: str, values: list[Any]) -> Axis:
    used = [value for value in values if value is not None]
    if all(isinstance(value, (int, float)) for value in used):
        positions, ticks = _of_numbers(used, logarithmic=name in LOGARITHMIC)
    else:
        positions, ticks = _of_names([str(value) for value in used])
    placed = iter(positions)
    if len(used) < len(values):
        ticks = {UNUSED: "not used"} | ticks
    all_positions = [UNUSED if value is None else next(placed) for value in values]
    return Axis(name, np.array(all_positions), ticks)


def _of_names(names: list[str]) -> tuple[np.ndarray, dict[float, str]]:
    distinct = sorted(set(names), key=lambda one: (_place(one), one))
    spread = np.linspace(0, 1, len(distinct)) if len(distinct) > 1 else np.array([0.5])
    where = dict(zip(distinct, spread.tolist(), strict=True))
    ticks = {position: name for name, position in where.items()}
    return np.array([where[name] for name in names]), ticks


def _place(name: str) -> int:
    """Returns the place of what learns of the base, from the cheapest on; else 0."""
    return TRAINABLE_NAMES.index(name) if name in TRAINABLE_NAMES else 0


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
