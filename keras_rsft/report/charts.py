"""Turns numbers into the geometry of drawings; the templates make SVG of it.

A drawing of ours rather than a plotting library's: it takes the page's colours in
light and dark, prints, weighs kilobytes, and needs no script to be seen.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from keras_rsft.report.run_record import EpochLosses

WIDTH, HEIGHT = 360, 220
LEFT, RIGHT, TOP, BOTTOM = 42, 10, 12, 28
SMALL_WIDTH, SMALL_HEIGHT = 320, 150
_SHOWN_EPOCHS = 6


@dataclasses.dataclass(frozen=True)
class Tick:
    """A mark of an axis: where it is, in pixels, and what it says."""

    place: float
    text: str


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of a chart.

    Attributes:
        name: What it shows.
        style: Its class in the style sheet, which gives colour and dash.
        pieces: Unbroken pieces, as the `points` of a polyline.
        places: Height in pixels at each epoch, None where there is no value.
        texts: The values as text, "-" where there is none.
    """

    name: str
    style: str
    pieces: tuple[str, ...]
    places: tuple[float | None, ...]
    texts: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class LineChart:
    """Lines over epochs, with axes; `summary` says in words what is to be seen."""

    key: str
    title: str
    summary: str
    lines: tuple[Line, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    epochs: tuple[int, ...]
    x_places: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Bar:
    """A bar of a histogram: accepted samples, and rejected ones on top of them."""

    x: float
    width: float
    accepted_top: float
    accepted_height: float
    rejected_top: float
    rejected_height: float
    text: str


@dataclasses.dataclass(frozen=True)
class Histogram:
    """The losses of one epoch; all of a page have the same axes."""

    epoch: int
    bars: tuple[Bar, ...]
    x_ticks: tuple[Tick, ...]
    base: float
    threshold: Tick | None
    counts: str
    summary: str


def line_chart(
    key: str,
    title: str,
    series: Sequence[tuple[str, str, Sequence[float]]],
    *,
    as_percent: bool,
) -> LineChart | None:
    """Returns a chart of values by epoch, or None where there is no finite value.

    Args:
        key: Names the chart within the page.
        title: What it shows.
        series: Name, style and values of each line; NaN leaves a gap.
        as_percent: The values are shares in [0, 1].
    """
    series = [one for one in series if any(map(math.isfinite, one[2]))]
    if not series:
        return None
    values = [value for one in series for value in one[2] if math.isfinite(value)]
    ticks = _value_ticks(min(values), max(values), as_percent=as_percent)
    bottom, top = min(ticks[0], *values), max(ticks[-1], *values)
    count = max(len(one[2]) for one in series)
    x_places = [
        _scaled(i, 0, max(count - 1, 1), LEFT, WIDTH - RIGHT) for i in range(count)
    ]

    def height(value: float) -> float | None:
        if not math.isfinite(value):
            return None
        return _scaled(value, bottom, top, HEIGHT - BOTTOM, TOP)

    lines = tuple(
        _line(one, x_places, [height(v) for v in one[2]], as_percent=as_percent)
        for one in series
    )
    return LineChart(
        key=key,
        title=title,
        summary=_summary(title, count, lines),
        lines=lines,
        x_ticks=tuple(
            Tick(x_places[i], str(i + 1)) for i in _even_places(count, at_most=7)
        ),
        y_ticks=tuple(
            Tick(height(v), f"{100 * v:.0f} %" if as_percent else f"{v:.3g}")
            for v in ticks
        ),
        epochs=tuple(range(1, count + 1)),
        x_places=tuple(x_places),
    )


def _value_ticks(low: float, high: float, *, as_percent: bool) -> list[float]:
    ticks = nice_ticks(low if as_percent else min(0.0, low), high)
    return [v for v in ticks if not as_percent or -1e-9 <= v <= 1 + 1e-9]


def _line(
    series: tuple[str, str, Sequence[float]],
    x_places: Sequence[float],
    heights: Sequence[float | None],
    *,
    as_percent: bool,
) -> Line:
    name, style, values = series
    shown = "{:.1%}" if as_percent else "{:.3g}"
    texts = (shown.format(v) if math.isfinite(v) else "-" for v in values)
    return Line(
        name,
        style,
        _pieces(x_places, heights),
        tuple(heights),
        tuple(text.replace("%", " %") for text in texts),
    )


def _summary(title: str, count: int, lines: Sequence[Line]) -> str:
    ends = "; ".join(
        f"{one.name} from {_first(one.texts)} to {_first(one.texts[::-1])}"
        for one in lines
    )
    return f"{title} over {count} epochs: {ends}."


def histograms(losses: Sequence[EpochLosses]) -> tuple[Histogram, ...]:
    """Returns the losses of up to six epochs, from the first to the last.

    Args:
        losses: All epochs.
    """
    if not losses:
        return ()
    chosen = [losses[i] for i in _spread_places(len(losses), _SHOWN_EPOCHS)]
    low = min(one[0] for epoch in losses for one in epoch.bins)
    high = max(one[1] for epoch in losses for one in epoch.bins)
    most = max(sum(one[2:]) for epoch in chosen for one in epoch.bins)
    return tuple(_histogram(epoch, low, high, most) for epoch in chosen)


def _histogram(epoch: EpochLosses, low: float, high: float, most: int) -> Histogram:
    base = SMALL_HEIGHT - 22

    def place(loss: float) -> float:
        return _scaled(math.log(loss), math.log(low), math.log(high), 16,
                       SMALL_WIDTH - 16)  # fmt: skip

    bars = []
    for start, end, accepted, rejected in epoch.bins:
        heights = [(base - 14) * count / most for count in (accepted, rejected)]
        left, right = place(start), place(end)
        bars.append(
            Bar(
                x=round(left, 1),
                width=round(max(right - left - 1, 0.5), 1),
                accepted_top=round(base - heights[0], 1),
                accepted_height=round(heights[0], 1),
                rejected_top=round(base - sum(heights), 1),
                rejected_height=round(heights[1], 1),
                text=f"loss {start:.2g} to {end:.2g}: {accepted:,} accepted, "
                f"{rejected:,} rejected",
            )
        )
    decades = range(math.ceil(math.log10(low) - 1e-6), int(math.log10(high) + 1e-6) + 1)
    threshold = None
    if epoch.threshold is not None and low <= epoch.threshold <= high:
        text = f"{epoch.threshold:.2f}"
        threshold = Tick(round(place(epoch.threshold), 1), text)
    accepted, rejected = (sum(one[i] for one in epoch.bins) for i in (2, 3))
    counts = f"{accepted:,} accepted, {rejected:,} rejected"
    summary = f"Losses of epoch {epoch.epoch}: {counts}"
    if epoch.threshold is not None:
        summary += f"; threshold {epoch.threshold:.3g}"
    return Histogram(
        epoch=epoch.epoch,
        bars=tuple(bars),
        x_ticks=tuple(Tick(round(place(10.0**d), 1), f"{10.0**d:g}") for d in decades),
        base=base,
        threshold=threshold,
        counts=counts,
        summary=f"{summary}.",
    )


def nice_ticks(low: float, high: float, *, about: int = 5) -> list[float]:
    """Returns even, round numbers that cover a range.

    Args:
        low: Lower end.
        high: Upper end, at least `low`.
        about: How many, roughly. Default 5.
    """
    if high <= low:
        high = low + (abs(low) or 1.0) * 0.1
    rough = (high - low) / about
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(s * unit for s in (1, 2, 2.5, 5, 10) if s * unit >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _scaled(value: float, low: float, high: float, start: float, end: float) -> float:
    share = (value - low) / (high - low) if high > low else 0.5
    return round(start + share * (end - start), 2)


def _pieces(xs: Sequence[float], ys: Sequence[float | None]) -> tuple[str, ...]:
    """Returns the unbroken pieces of a line."""
    pieces: list[list[str]] = [[]]
    for x, y in zip(xs, ys, strict=False):
        if y is None:
            pieces.append([])
        else:
            pieces[-1].append(f"{x:g},{y:g}")
    return tuple(" ".join(piece) for piece in pieces if piece)


def _even_places(count: int, *, at_most: int) -> list[int]:
    """Returns places of epochs 1, 1 + step, ... with a round step."""
    step = next(
        s * 10**e for e in range(9) for s in (1, 2, 5)
        if count / (s * 10**e) <= at_most
    )  # fmt: skip
    return [0, *(i - 1 for i in range(step, count + 1, step) if i > 1)]


def _spread_places(count: int, shown: int) -> list[int]:
    """Returns up to `shown` places with the first and the last among them."""
    if count <= shown:
        return list(range(count))
    return sorted({round(i * (count - 1) / (shown - 1)) for i in range(shown)})


def _first(texts: Sequence[str]) -> str:
    return next(text for text in texts if text != "-")
