"""Draws what a search found: selectivity against learning rate, on light and dark.

Matplotlib is optional: without it there are no pictures, and nothing else is missing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import io
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from keras_rsft._storage import replaced
from keras_rsft.searching.choice import COMPLETED, TrialOutcome

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HEAT_MAP_FILE = "heatmap.svg"
# How selective a trial is, by the names of the hyperparameters that say so.
SELECTIVITY = {
    "relative_threshold": "threshold / ln(classes)",
    "threshold": "threshold of the batch",
    "keep_fraction": "kept fraction",
}
SHOWN = {"val_accuracy": "validation accuracy", "acceptance_rate": "acceptance rate"}
_CELLS = 8
_MOST_TICKS = 5
# Of a picture's words and lines, and of what is behind them.
INK, PAPER = "#1c1d20", "#ffffff"
# What they are where the page around the picture, or the reader's desktop, is dark. A
# program that does not know of it shows the picture as it was drawn.
_IN_THE_DARK = "@media (prefers-color-scheme: dark) {{{rules}}}".format(
    rules=" ".join(
        f'[style*="{part}: {light}"] {{{part}: {dark} !important}}'
        for light, dark in {INK: "#e9eaec", PAPER: "#15171b"}.items()
        for part in ("fill", "stroke")
    )
)


@dataclasses.dataclass(frozen=True, eq=False)
class HeatMap:
    """Means over trials, in cells of learning rate and selectivity.

    Attributes:
        rates: Float array `(trials,)`, learning rates.
        numbers: Float array `(trials,)`, how selective.
        rate_edges: Float array `(columns + 1,)`, even in the logarithm.
        edges: Float array `(rows + 1,)` of the number that says how selective.
        means: For each of `SHOWN` a float array `(rows, columns)`, NaN where there
            is no trial.
    """

    rates: np.ndarray
    numbers: np.ndarray
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
    return HeatMap(rates, numbers, rate_edges, edges, means)


def draw_heat_maps(outcomes: Sequence[TrialOutcome], folder: Path) -> Path | None:
    """Writes `heatmap.svg`: a row for each number that says how selective a trial is.

    Each cell has the mean of its trials, which are dots.

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
    path = folder / HEAT_MAP_FILE
    with dark_and_light():
        save_picture(_drawn(maps), path)
    return path


def rate_ticks(low: float, high: float) -> list[float]:
    """Returns up to five round learning rates in a range, as few as one.

    Args:
        low: Lowest rate, above 0.
        high: Highest, above `low`.
    """
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1, 2, 3, 4, 5, 6, 7, 8, 9), (1, 2, 5), (1, 3), (1,)):
        ticks = [float(f"{step}e{d}") for d in decades for step in steps]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) <= _MOST_TICKS:
            break
    if not ticks:
        return [float(f"{math.sqrt(low * high):.2g}")]
    return ticks[:: math.ceil(len(ticks) / _MOST_TICKS)]


@contextlib.contextmanager
def dark_and_light() -> Iterator[None]:
    """Has matplotlib draw in the colours that `save_picture` knows."""
    import matplotlib

    inked = ("text.color", "axes.edgecolor", "axes.labelcolor")
    inked += ("axes.titlecolor", "xtick.color", "ytick.color")
    papered = ("axes.facecolor", "figure.facecolor", "savefig.facecolor")
    with matplotlib.rc_context(
        dict.fromkeys(inked, INK) | dict.fromkeys(papered, PAPER)
    ):
        yield


def save_picture(figure: Figure, path: Path) -> None:
    """Writes an SVG file whose ink and paper follow light and dark.

    Args:
        figure: What was drawn within `dark_and_light`.
        path: The file. It is replaced.
    """
    written = io.StringIO()
    figure.savefig(written, format="svg")
    text = written.getvalue().replace("</style>", f"{_IN_THE_DARK}</style>", 1)
    replaced(path, lambda beside: beside.write_text(text, encoding="utf-8"))


def _drawn(maps: dict[str, HeatMap]) -> Figure:
    from matplotlib.figure import Figure  # Without pyplot: no window, no state.

    figure = Figure(figsize=(9, 3.4 * len(maps)), layout="constrained")
    axes = figure.subplots(len(maps), len(SHOWN), squeeze=False)
    for row, (name, found) in zip(axes, maps.items(), strict=True):
        ticks = rate_ticks(*found.rate_edges[[0, -1]])
        for place, (metric, title) in zip(row, SHOWN.items(), strict=True):
            mesh = place.pcolormesh(
                found.rate_edges, found.edges, found.means[metric], cmap="viridis"
            )
            place.scatter(found.rates, found.numbers, 16, PAPER, edgecolors=INK)
            place.set_xscale("log")
            place.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            place.set_xticks([], minor=True)
            place.set(xlabel="learning rate", ylabel=SELECTIVITY[name], title=title)
            figure.colorbar(mesh, ax=place)
    return figure


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
