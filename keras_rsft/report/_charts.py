"""Draws charts as SVG."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import resources
from typing import Any

import numpy as np

from keras_rsft._stats import Interval
from keras_rsft.report._record import EpochLosses
from keras_rsft.report._summary import escaped, share_text, shortened

WIDTH, HEIGHT = 360, 220
LEFT, RIGHT, TOP, BOTTOM = 42, 10, 12, 28
SMALL_WIDTH, SMALL_HEIGHT = 320, 150
_SHOWN_EPOCHS = 6
_MOST_CELLS, _MOST_LETTERS = 12, 10
_MOST_RATE_TICKS = 5
# Where a trial crosses the axis of a hyperparameter that it does not have.
UNUSED = -0.15
_VIRIDIS = ("#440154", "#3b528b", "#21918c", "#5ec962", "#fde725")
# Plasma without its ends, which are lost on dark or on light.
_PLASMA = ("#7e03a8", "#cc4778", "#fca636")


# -- Pieces of every chart -----------------------------------------------------


def asset(name: str) -> str:
    path = resources.files("keras_rsft.report") / "assets" / name
    return path.read_text(encoding="utf-8")


def _tag(name: str, content: str = "", /, **attributes: Any) -> str:
    """Returns an element around markup; `class_` is class, `_` a hyphen."""
    written = ""
    for key, value in attributes.items():
        if value is not None:
            text = f"{round(value, 2):g}" if isinstance(value, float) else str(value)
            key = key.rstrip("_").replace("_", "-")
            written += f' {key}="{escaped(text)}"'
    return f"<{name}{written}>{content}</{name}>"


def _line(class_: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return _tag("line", class_=class_, x1=x1, y1=y1, x2=x2, y2=y2)


def _dot(class_: str, x: float, y: float, radius: float) -> str:
    return _tag("circle", class_=class_, cx=x, cy=y, r=radius)


def _rect(x: float, y: float, width: float, height: float, **colour: str) -> str:
    return _tag("rect", x=x, y=y, width=width, height=height, **colour)


def _words(
    text: str, x: float, y: float, anchor: str | None = None, class_: str = "tick"
) -> str:
    if not text:
        return ""
    return _tag("text", escaped(text), class_=class_, x=x, y=y, text_anchor=anchor)


def _svg(
    content: str, width: float, height: float, summary: str, /, **attributes: Any
) -> str:
    view = f"0 0 {width:g} {height:g}"
    attributes |= {"viewBox": view, "role": "img", "aria_label": summary}
    return _tag("svg", content, **attributes)


def _alone(content: str, width: float, height: float, summary: str) -> str:
    """Returns a drawing that brings its own colours and paper."""
    paper = _rect(0, 0, width, height, class_="paper")
    own: dict[str, Any] = {"class": "keras-rsft", "width": width, "height": height}
    own["xmlns"] = "http://www.w3.org/2000/svg"
    own["style"] = "max-width:100%;height:auto"
    content = _tag("style", asset("svg.css")) + paper + content
    return _svg(content, width, height, summary, **own)


def _scale(
    low: float, high: float, start: float, end: float, *, log: bool = False
) -> Callable[[float], float]:
    """Returns the function from a value to its pixel, logarithmic with `log`."""
    if log:
        low, high = math.log(low), math.log(high)

    def pixel(value: float) -> float:
        value = math.log(value) if log else value
        share = (value - low) / (high - low) if high > low else 0.5
        return round(start + share * (end - start), 2)

    return pixel


@dataclasses.dataclass(frozen=True)
class _Box:
    """The rectangle that the values of a chart lie in, in pixels."""

    left: float
    top: float
    right: float
    bottom: float

    def axes(
        self,
        x_ticks: Iterable[tuple[float, str]],
        y_ticks: Iterable[tuple[float, str]],
        *,
        x_label: str = "",
        y_label: str = "",
        title: str = "",
    ) -> str:
        drawn = "".join(
            _line("grid", self.left, y, self.right, y)
            + _words(text, self.left - 8, y + 4, "end")
            for y, text in y_ticks
        )
        for x, text in x_ticks:
            drawn += _words(text, x, self.bottom + 18, "middle")
        middle = (self.left + self.right) / 2
        drawn += _words(x_label, middle, self.bottom + 36, "middle")
        drawn += _words(y_label, self.left - 34, self.top - 10)
        return drawn + _words(title, self.right, self.top - 10, "end", "title")


def nice_ticks(low: float, high: float, *, about: int = 5) -> list[float]:
    """Returns about this many even, round numbers that cover a range."""
    if high <= low:
        high = low + (abs(low) or 1.0) * 0.1
    rough = (high - low) / about
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(s * unit for s in (1, 2, 2.5, 5, 10) if s * unit >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def rate_ticks(low: float, high: float) -> list[float]:
    """Returns up to five round learning rates in a range, at least one."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in (range(1, 10), (1, 2, 5), (1, 3), (1,)):
        ticks = [float(f"{step}e{d}") for d in decades for step in steps]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) <= _MOST_RATE_TICKS:
            break
    if not ticks:
        return [float(f"{math.sqrt(low * high):.2g}")]
    return ticks[:: math.ceil(len(ticks) / _MOST_RATE_TICKS)]


def _colour(share: float, anchors: Sequence[str]) -> str:
    """Returns a colour between anchors, at a share in [0, 1] of the way."""
    steps = np.linspace(0, 1, len(anchors))
    channels = ([int(one[i : i + 2], 16) for one in anchors] for i in (1, 3, 5))
    mixed = (round(float(np.interp(share, steps, channel))) for channel in channels)
    return "#" + "".join(f"{one:02x}" for one in mixed)


# -- Learning curves -----------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class LineChart:
    """Lines over epochs: a drawing, and the data that the page's script reads."""

    title: str
    summary: str
    content: str
    data: dict[str, Any]

    @property
    def svg(self) -> str:
        """The drawing, in which the page's script marks an epoch."""
        drawn = self.content + _tag("g", data_marks="")
        return _svg(drawn, WIDTH, HEIGHT, self.summary, tabindex=0)


def line_chart(
    title: str,
    series: Sequence[tuple[str, str, Sequence[float]]],
    *,
    as_percent: bool = True,
) -> LineChart | None:
    """Draws `(name, style, values by epoch)`; None where no value is finite."""
    series = [one for one in series if any(map(math.isfinite, one[2]))]
    if not series:
        return None
    values = [value for one in series for value in one[2] if math.isfinite(value)]
    low, high = min(values), max(values)
    ticks = nice_ticks(low if as_percent else min(0.0, low), high)
    if as_percent:
        ticks = [tick for tick in ticks if -1e-9 <= tick <= 1 + 1e-9]
    count = max(len(one[2]) for one in series)
    x = _scale(0, max(count - 1, 1), LEFT, WIDTH - RIGHT)
    y = _scale(min(ticks[0], low), max(ticks[-1], high), HEIGHT - BOTTOM, TOP)
    xs = [x(epoch) for epoch in range(count)]
    step = next(
        s * 10**e for e in range(9) for s in (1, 2, 5) if count / (s * 10**e) <= 7
    )
    marked = [0, *(i - 1 for i in range(step, count + 1, step) if i > 1)]
    drawn = _Box(LEFT, TOP, WIDTH - RIGHT, HEIGHT - BOTTOM).axes(
        [(xs[i], str(i + 1)) for i in marked],
        [(y(v), f"{100 * v:.0f} %" if as_percent else f"{v:.3g}") for v in ticks],
    )
    heights, texts, ends = [], [], []
    written = share_text if as_percent else "{:.3g}".format
    for name, style, line in series:
        row = [y(value) if math.isfinite(value) else None for value in line]
        points = zip(xs, row, strict=False)
        pieces = itertools.groupby(points, lambda point: point[1] is not None)
        for is_known, piece in pieces:  # A gap breaks the line.
            if is_known:
                joined = " ".join(f"{left:g},{top:g}" for left, top in piece)
                drawn += _tag("polyline", class_=f"line {style}", points=joined)
        shown = [written(one) if math.isfinite(one) else "-" for one in line]
        known = [text for text in shown if text != "-"]
        ends.append(f"{name} from {known[0]} to {known[-1]}")
        heights.append(row)
        texts.append(shown)
    return LineChart(
        title=title,
        summary=f"{title} over {count} epochs: {'; '.join(ends)}.",
        content=drawn,
        data={
            "x": xs,
            "epochs": list(range(1, count + 1)),
            "top": TOP,
            "bottom": HEIGHT - BOTTOM,
            "styles": [style for _, style, _ in series],
            "names": [name for name, _, _ in series],
            "y": heights,
            "texts": texts,
        },
    )


def line_charts_svg(charts: Sequence[LineChart | None]) -> str:
    """Returns learning curves side by side, to stand alone; "" without any."""
    drawable = [one for one in charts if one is not None]
    if not drawable:
        return ""
    rows = 34 + 18 * max(len(one.data["names"]) for one in drawable)
    drawn = ""
    for number, one in enumerate(drawable):
        left = number * (WIDTH + 20) + LEFT
        drawn += _words(one.title, left, 16, class_="title")
        legend = zip(one.data["names"], one.data["styles"], strict=True)
        for row, (name, style) in enumerate(legend):
            at = 34 + 18 * row
            drawn += _line(f"line {style}", left, at - 4, left + 18, at - 4)
            drawn += _words(name, left + 26, at)
        moved = f"translate({left - LEFT} {rows - 14})"
        drawn += _tag("g", one.content, transform=moved)
    width = len(drawable) * (WIDTH + 20)
    summary = " ".join(one.summary for one in drawable)
    return _alone(drawn, width, rows + HEIGHT - 14, summary)


# -- Histograms of the losses --------------------------------------------------


def histograms(losses: Sequence[EpochLosses]) -> list[dict[str, Any]]:
    """Draws up to six epochs, from the first to the last, with the same axes."""
    if not losses:
        return []
    spread = np.linspace(0, len(losses) - 1, min(len(losses), _SHOWN_EPOCHS))
    chosen = [losses[i] for i in sorted({round(one) for one in spread.tolist()})]
    low = min(one[0] for epoch in losses for one in epoch.bins)
    high = max(one[1] for epoch in losses for one in epoch.bins)
    most = max(sum(one[2:]) for epoch in chosen for one in epoch.bins)
    return [_histogram(epoch, low, high, most) for epoch in chosen]


def _histogram(epoch: EpochLosses, low: float, high: float, most: int) -> dict:
    base = SMALL_HEIGHT - 22
    counted = "{:,} accepted, {:,} rejected".format
    x = _scale(low, high, 16, SMALL_WIDTH - 16, log=True)
    drawn = _line("axis", 0, base, SMALL_WIDTH, base)
    for start, end, *counts in epoch.bins:
        left, width = x(start), max(x(end) - x(start) - 1, 0.5)
        accepted, rejected = ((base - 14) * count / most for count in counts)
        words = f"loss {start:.2g} to {end:.2g}: {counted(*counts)}"
        bars = (
            ("catch", 0, base),
            ("accepted", base - accepted, accepted),
            ("rejected", base - accepted - rejected, rejected),
        )
        content = _tag("title", words) + "".join(
            _rect(left, top, width, height, class_=name) for name, top, height in bars
        )
        drawn += _tag("g", content, class_="bin")
    threshold = epoch.threshold
    if threshold is not None and low <= threshold <= high:
        at = x(threshold)
        side, anchor = (-1, "end") if at >= SMALL_WIDTH - 50 else (1, "start")
        drawn += _line("line threshold", at, 4, at, base)
        drawn += _words(f"{threshold:.2f}", at + 4 * side, 12, anchor)
    decades = range(math.ceil(math.log10(low) - 1e-6), int(math.log10(high) + 1e-6) + 1)
    for decade in decades:
        text = f"{10.0**decade:g}"
        drawn += _words(text, x(10.0**decade), SMALL_HEIGHT - 6, "middle")
    shown = counted(*(sum(one[i] for one in epoch.bins) for i in (2, 3)))
    summary = f"Losses of epoch {epoch.epoch}: {shown}"
    if threshold is not None:
        summary += f"; threshold {threshold:.3g}"
    svg = _svg(drawn, SMALL_WIDTH, SMALL_HEIGHT, f"{summary}.")
    return {"of": epoch, "counts": shown, "svg": svg}


# -- A comparison and a search, in a notebook ----------------------------------


def intervals_svg(intervals: Mapping[str, Interval]) -> str:
    """Returns the accuracy of each method with its interval; "" without any."""
    if not intervals:
        return ""
    drawable = [
        one if math.isfinite(one.half_width) else Interval(one.mean, 0.0)
        for one in intervals.values()
    ]
    lowest, highest = min(o.low for o in drawable), max(o.high for o in drawable)
    ticks = nice_ticks(100 * lowest, 100 * highest)
    box = _Box(150, 10, 640, 10 + 24 * len(drawable))
    x = _scale(ticks[0], ticks[-1], box.left, box.right)
    rows = [box.top + 24 * row + 12 for row in range(len(drawable))]
    drawn = box.axes(
        [(x(tick), f"{tick:g}") for tick in ticks],
        zip(rows, intervals, strict=True),
        x_label="test accuracy in percent",
    )
    for y, one in zip(rows, drawable, strict=True):
        drawn += _line("line first", x(100 * one.low), y, x(100 * one.high), y)
        drawn += _dot("dot chosen", x(100 * one.mean), y, 4)
    return _alone(drawn, 660, box.bottom + 48, "Test accuracy of each method.")


def trials_svg(
    points: Sequence[tuple[float, float]], chosen: tuple[float, float]
) -> str:
    box = _Box(60, 30, 620, 250)
    ticks, scales = [], []
    for axis, ends in enumerate(((box.left, box.right), (box.bottom, box.top))):
        values = [100 * point[axis] for point in (*points, chosen)]
        ticks.append(nice_ticks(min(values), max(values)))
        scales.append(_scale(ticks[axis][0], ticks[axis][-1], *ends))
    x, y = scales
    drawn = box.axes(
        [(x(tick), f"{tick:g}") for tick in ticks[0]],
        [(y(tick), f"{tick:g}") for tick in ticks[1]],
        x_label="accepted, percent",
        y_label="validation accuracy, percent",
    )
    marks = [(point, "dot", 4) for point in points] + [(chosen, "dot chosen", 7)]
    for (accepted, accuracy), style, radius in marks:
        drawn += _dot(style, x(100 * accepted), y(100 * accuracy), radius)
    drawn += _dot("dot chosen", box.right - 52, box.top - 14, 7)
    drawn += _words("chosen", box.right, box.top - 10, "end")
    return _alone(drawn, 640, 296, "Validation accuracy by acceptance rate.")


def confusion_svg(names: Sequence[str], wrong: np.ndarray) -> str:
    """Returns wrong labels, `(k, k)` at `[given, likely]`; "" where there are none.

    The classes with the most of them.
    """
    worst = np.sort(
        np.argsort(-wrong.sum(0) - wrong.sum(1), kind="stable")[:_MOST_CELLS]
    )
    counts = wrong[np.ix_(worst, worst)]
    if counts.max(initial=0.0) < 0.5:
        return ""
    shown = [shortened(names[number], _MOST_LETTERS) for number in worst.tolist()]
    width, height = 64, 24
    box = _Box(96, 40, 96 + width * len(shown), 40 + height * len(shown))
    xs = [box.left + width * (at + 0.5) for at in range(len(shown))]
    ys = [box.top + height * (at + 0.5) for at in range(len(shown))]
    drawn = box.axes(
        zip(xs, shown, strict=True),
        zip(ys, shown, strict=True),
        x_label="likely class",
        y_label="given label",
        title="expected wrong labels",
    )
    for row, column in np.argwhere(counts >= 0.5).tolist():
        count = float(counts[row, column])
        colour = _colour(1 - count / float(counts.max()), _PLASMA)
        left, top = xs[column] - width / 2 + 1, ys[row] - height / 2 + 1
        drawn += _rect(left, top, width - 2, height - 2, fill=colour)
        text = f"{count:,.0f}"
        drawn += _words(text, xs[column], ys[row] + 4, "middle", "halo")
    summary = "Expected wrong labels by given label and likely class."
    return _alone(drawn, box.right + 20, box.bottom + 48, summary)


# -- The pictures of a search --------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class HeatMap:
    label: str
    rates: np.ndarray
    numbers: np.ndarray
    rate_edges: np.ndarray
    edges: np.ndarray
    means: dict[str, np.ndarray]


def heat_maps_svg(maps: Sequence[HeatMap]) -> str:
    """Returns a row of heat maps for each number that says how selective a trial is."""
    drawn = ""
    for row, one in enumerate(maps):
        top = 40 + 300 * row
        for column, title in enumerate(one.means):
            left = 60 + 450 * column
            drawn += _heat_map(one, title, _Box(left, top, left + 320, top + 210))
    summary = (
        "Means of the trials by learning rate and selectivity; each dot is a trial."
    )
    return _alone(drawn, 910, 300 * len(maps), summary)


def _heat_map(one: HeatMap, title: str, box: _Box) -> str:
    means = one.means[title]
    rates, numbers = one.rate_edges.tolist(), one.edges.tolist()
    x = _scale(rates[0], rates[-1], box.left, box.right, log=True)
    y = _scale(numbers[0], numbers[-1], box.bottom, box.top)
    lowest, highest = float(np.nanmin(means)), float(np.nanmax(means))
    height = _scale(lowest, highest, 0, 1)
    y_ticks = nice_ticks(numbers[0], numbers[-1])
    drawn = box.axes(
        [(x(tick), f"{tick:g}") for tick in rate_ticks(rates[0], rates[-1])],
        [(y(t), f"{t:g}") for t in y_ticks if numbers[0] <= t <= numbers[-1]],
        x_label="learning rate",
        y_label=one.label,
        title=title,
    )
    for row, column in np.argwhere(np.isfinite(means)).tolist():
        left, right = (x(edge) for edge in rates[column : column + 2])
        bottom, top = (y(edge) for edge in numbers[row : row + 2])
        colour = _colour(height(float(means[row, column])), _VIRIDIS)
        drawn += _rect(left, top, right - left, bottom - top, fill=colour)
    for rate, number in zip(one.rates, one.numbers, strict=True):
        drawn += _dot("dot hollow", x(rate), y(number), 2.5)
    tall = (box.bottom - box.top) / 30
    for step in range(30):
        top, colour = box.bottom - tall * (step + 1), _colour(step / 29, _VIRIDIS)
        drawn += _rect(box.right + 14, top, 12, tall + 0.5, fill=colour)
    for at, value in ((box.bottom, lowest), (box.top, highest)):
        drawn += _words(f"{100 * value:.1f} %", box.right + 30, at + 4)
    return drawn


@dataclasses.dataclass(frozen=True, eq=False)
class Axis:
    """A hyperparameter or metric: each trial's position in [0, 1], or `UNUSED`."""

    name: str
    positions: np.ndarray
    ticks: dict[float, str]


def parallel_coordinates_svg(axes: Sequence[Axis], *, higher_is_better: bool) -> str:
    """Returns trials as lines through the axes, the better ones lighter and on top."""
    box = _Box(30, 20, 30 + 130 * (len(axes) - 1), 330)
    y = _scale(UNUSED - 0.05, 1.05, box.bottom, box.top)
    lines = np.stack([axis.positions for axis in axes], axis=1)
    goodness = lines[:, -1] if higher_is_better else 1 - lines[:, -1]
    drawn = ""
    for row in np.argsort(goodness, kind="stable"):
        points = " ".join(
            f"{box.left + 130 * column:g},{y(at):g}"
            for column, at in enumerate(lines[row].tolist())
        )
        colour = _colour(float(goodness[row]), _PLASMA)
        style = {"fill": "none", "stroke_width": 1.4, "opacity": 0.8}
        drawn += _tag("polyline", points=points, stroke=colour, **style)
    for column, axis in enumerate(axes):
        x = box.left + 130 * column
        drawn += _line("axis", x, box.top, x, box.bottom)
        for at, text in axis.ticks.items():
            drawn += _words(text, x + 5, y(at) + 4, class_="halo")
        name = axis.name.replace("_", " ")
        drawn += _words(name, x, box.bottom + 22, "middle" if column else None, "title")
    summary = (
        "Each line is a trial and runs through its hyperparameters to its objective."
    )
    return _alone(drawn, box.right + 100, 370, summary)
