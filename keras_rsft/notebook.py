"""How results show themselves in a notebook: a table and a figure.

All text is escaped: class names and paths come from the data. Figures need matplotlib
(extra `search`); without it there is the table alone.
"""

from __future__ import annotations

import html
import importlib.util
import io
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from keras_rsft.result_words import (
    RESULT_NAMES,
    STRATEGY_HEADER,
    comparison_note,
    interval_text,
    setting_text,
    share_text,
    strategy_texts,
)

if TYPE_CHECKING:
    from keras_rsft.comparing import Comparison
    from keras_rsft.finetuning import Run
    from keras_rsft.searching import Search

MOST_CLASSES = 20
MOST_TRIALS = 10


def run_html(run: Run) -> str:
    """Returns a run's results and its learning curves."""
    rows = [
        [name, share_text(run.results[key])]
        for key, name in RESULT_NAMES.items()
        if key in run.results
    ]
    rows.append(["Time", f"{run.results['seconds']:.1f} s"])
    shown = ", ".join(run.class_names[:MOST_CLASSES])
    more = len(run.class_names) - MOST_CLASSES
    rows.append(["Classes", f"{shown} and {more} more" if more > 0 else shown])
    if run.finding is not None:
        rows.append(["Labels", run.finding])
    if run.overfitting is not None:
        rows.append(["Overfitting", run.overfitting.sentence])
    if run.folder is not None:
        rows.append(["Run folder", str(run.folder)])
    return table_html(["Run", ""], rows) + figure_html(
        lambda figure: _draw_curves(figure, run.history)
    )


def comparison_html(comparison: Comparison) -> str:
    """Returns a comparison's table, its verdict, and the accuracies as intervals."""
    rows = []
    for name, summary in comparison.summaries.items():
        accuracy = interval_text(summary.test_accuracy)
        difference = interval_text(summary.difference_to_plain, sign="+")
        shares = (summary.acceptance_rate, summary.recovered)
        rows.append([name, accuracy, difference, *map(share_text, shares)])
    header = ["Method", "Test accuracy", "To plain", "Accepted", "Recovered"]
    seeds = len({outcome.seed for outcome in comparison.outcomes})
    note = comparison_note(seeds)
    said = [comparison.verdict.sentence, note, *comparison.notes]
    paragraphs = "".join(f"<p>{html.escape(sentence)}</p>" for sentence in said)
    return (
        table_html(header, rows)
        + paragraphs
        + figure_html(lambda figure: _draw_intervals(figure, comparison))
    )


def search_html(found: Search) -> str:
    """Returns the chosen setting beside plain, the best trials, and all as points."""
    names = ("validation_accuracy", "test_accuracy", "acceptance_rate")
    header = ["", "Validation", "Test", "Accepted"]
    titles = {"chosen": "chosen", "plain": "plain fine-tuning"}
    rows = [
        [title, *(share_text(found.results[key].get(name)) for name in names)]
        for key, title in titles.items()
    ]
    completed = [one for one in found.outcomes if one.metrics]
    best = sorted(completed, key=lambda one: -one.metrics["val_accuracy"])
    trials = [
        [
            one.trial_id,
            setting_text(one.values),
            share_text(one.metrics["val_accuracy"]),
            share_text(one.metrics["acceptance_rate"]),
        ]
        for one in best[:MOST_TRIALS]
    ]
    strategies = [strategy_texts(row) for row in found.results.get("strategies", ())]
    return (
        table_html(header, rows)
        + f"<p>{html.escape(found.choice.reason)}</p>"
        + (table_html(STRATEGY_HEADER, strategies) if strategies else "")
        + table_html(["Trial", "Setting", "Validation", "Accepted"], trials)
        + figure_html(lambda figure: _draw_trials(figure, found, completed))
    )


def table_html(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a table of text; every cell is escaped."""

    def line(tag: str, cells: Sequence[str]) -> str:
        escaped = (f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells)
        return f"<tr>{''.join(escaped)}</tr>"

    body = "".join(line("td", row) for row in rows)
    head = line("th", header) if any(header) else ""
    return f"<table><thead>{head}</thead><tbody>{body}</tbody></table>"


def figure_html(draw: Callable[[Any], bool]) -> str:
    """Returns what a function draws as inline SVG, or nothing without matplotlib.

    Args:
        draw: Draws into an empty `matplotlib.figure.Figure`; False: nothing to show.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return ""
    from matplotlib.figure import Figure  # Without pyplot: no window, no state.

    figure = Figure(figsize=(8, 2.8), layout="constrained")
    if not draw(figure):
        return ""
    file = io.StringIO()
    # Text becomes paths, so that no name can be markup.
    figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    return text[text.index("<svg") :]


def _draw_curves(figure: Any, history: dict[str, list[float]]) -> bool:
    groups = {
        "loss": ("loss", "accepted_loss", "val_loss"),
        "share": ("accuracy", "val_accuracy", "acceptance_rate"),
    }
    axes = figure.subplots(1, len(groups))
    for place, (title, names) in zip(axes, groups.items(), strict=True):
        for name in names:
            values = history.get(name, [])
            place.plot(range(1, len(values) + 1), values, label=name.replace("_", " "))
        place.set(xlabel="epoch", ylabel=title)
        place.legend(frameon=False, fontsize="small")
        place.xaxis.get_major_locator().set_params(integer=True)
    return True


def _draw_intervals(figure: Any, comparison: Comparison) -> bool:
    known = {
        name: summary.test_accuracy
        for name, summary in comparison.summaries.items()
        if summary.test_accuracy is not None
    }
    if not known:
        return False
    figure.set_figheight(0.8 + 0.32 * len(known))
    place = figure.subplots()
    means = [100 * interval.mean for interval in known.values()]
    widths = [interval.half_width for interval in known.values()]
    widths = [100 * width if math.isfinite(width) else 0.0 for width in widths]
    rows = range(len(known))
    place.errorbar(means, rows, xerr=widths, fmt="o", capsize=3)
    place.set_yticks(rows, known)
    place.invert_yaxis()
    place.set(xlabel="test accuracy in percent")
    return True


def _draw_trials(figure: Any, found: Search, completed: Sequence[Any]) -> bool:
    if not completed:
        return False
    place = figure.subplots()

    def draw(trials: Sequence[Any], **style: Any) -> None:
        place.scatter(
            [100 * one.metrics["acceptance_rate"] for one in trials],
            [100 * one.metrics["val_accuracy"] for one in trials],
            **style,
        )

    draw(completed, alpha=0.6, label="trials")
    draw([found.choice.chosen], marker="*", s=160, label="chosen")
    place.set(xlabel="accepted, percent", ylabel="validation accuracy, percent")
    place.legend(frameon=False)
    return True
