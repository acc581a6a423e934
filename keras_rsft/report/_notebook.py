"""Shows results in a notebook."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from keras_rsft.report import _charts as charts
from keras_rsft.report import _summary as summaries
from keras_rsft.report._summary import Summary, Table, escaped

MOST_CLASSES = 20
MOST_TRIALS = 10
MOST_SUSPECTS = 10


def run_html(run: Any) -> str:
    shown = ", ".join(run.class_names[:MOST_CLASSES])
    more = len(run.class_names) - MOST_CLASSES
    about = [("Classes", f"{shown} and {more} more" if more > 0 else shown)]
    if run.folder is not None:
        about.append(("Run folder", str(run.folder)))

    def curves(title: str, *names: str) -> charts.LineChart | None:
        styles = ("quiet", "second", "first", "first dashed")
        lines = [
            (name.replace("_", " "), style, run.history.get(name, []))
            for name, style in zip(names, styles, strict=False)
        ]
        return charts.line_chart(title, lines, as_percent=title == "Shares")

    right = "val_accuracy_estimated"
    drawn = (
        curves("Loss", "loss", "accepted_loss", "val_loss"),
        curves("Shares", "accuracy", "val_accuracy", "acceptance_rate", right),
    )
    summary = _summary_html(summaries.run_summary(run))
    table = table_html(Table(("", ""), tuple(about)))
    return summary + table + charts.line_charts_svg(drawn)


def audit_html(audit: Any) -> str:
    """Returns the numbers of an audit by class and by split."""
    return _summary_html(summaries.audit_summary(audit))


def quality_html(quality: Any, numbers: Mapping[str, Any], suspects: np.ndarray) -> str:
    """Returns the numbers by class, the most suspicious labels, and a picture."""
    names = [one["class"] for one in numbers["classes"]]
    rows = suspects[:MOST_SUSPECTS]
    ids = rows if quality.ids is None else quality.ids[rows]
    table = Table(
        ("Id", "Given label", "Proposed label", "Right with probability"),
        tuple(
            (str(one), names[given], names[proposed], f"{right:.2f}")
            for one, given, proposed, right in zip(
                ids,
                quality.labels[rows],
                quality.proposed[rows],
                quality.right_probability[rows],
                strict=True,
            )
        ),
        title=f"The most suspicious of {len(suspects):,} labels that look wrong",
        text_columns=3,
    )
    wrong = quality.confusion
    np.fill_diagonal(wrong, 0.0)
    shown = _summary_html(summaries.quality_summary(numbers))
    more = table_html(table) if len(rows) else ""
    return shown + more + charts.confusion_svg(names, wrong)


def comparison_html(comparison: Any) -> str:
    """Returns a comparison's table, its verdict, and the accuracies as intervals."""
    known = {
        name: summary.test_accuracy
        for name, summary in comparison.summaries.items()
        if summary.test_accuracy is not None
    }
    summary = _summary_html(summaries.comparison_summary(comparison))
    return summary + charts.intervals_svg(known)


def search_html(found: Any) -> str:
    """Returns the best trials, the chosen setting beside plain, and all as points."""
    chosen, *points = (
        (metrics["acceptance_rate"], metrics["val_accuracy_estimated"])
        for metrics in (
            found.choice.chosen.metrics,
            *(one.metrics for one in found.outcomes if one.metrics),
        )
    )
    summary = _summary_html(summaries.search_summary(found, MOST_TRIALS))
    return summary + charts.trials_svg(points, chosen)


def _summary_html(summary: Summary) -> str:
    sentences = "".join(
        f"<p>{escaped(one)}</p>" for one in (*summary.warnings, *summary.notes)
    )
    return "".join(map(table_html, summary.tables)) + sentences


def table_html(table: Table) -> str:
    def line(tag: str, cells: tuple[str, ...]) -> str:
        written = (f"<{tag}>{escaped(cell)}</{tag}>" for cell in cells)
        return f"<tr>{''.join(written)}</tr>"

    head = line("th", table.columns) if any(table.columns) else ""
    body = "".join(line("td", row) for row in table.rows)
    title = f"<caption>{escaped(table.title)}</caption>" if table.title else ""
    note = f"<p>{escaped(table.note)}</p>" if table.note else ""
    return f"<table>{title}<thead>{head}</thead><tbody>{body}</tbody></table>{note}"
