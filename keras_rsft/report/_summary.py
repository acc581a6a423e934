"""One tabular summary per result, which every renderer reads."""

from __future__ import annotations

import dataclasses
import html
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from keras_rsft._stats import Interval, apportioned, proportion_interval
from keras_rsft.config import takes_texts

# Words --------------------------------------------------------------------------------

# What steers a terminal, turns the text around it, or is no character at all.
_STEERING = re.compile(
    "[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


def shown(text: str) -> str:
    """Spells out what a name of somebody else's must not do to its surroundings."""
    return _STEERING.sub(lambda one: one[0].encode("unicode_escape").decode(), text)


def escaped(text: str) -> str:
    return html.escape(shown(text))


# The fractions among the results of a run, in the order in which they are shown.
RESULT_NAMES = {
    "test_accuracy": "Accuracy on the test split",
    "validation_accuracy": "Accuracy on the validation split",
    "head_test_accuracy": "Head alone, test split",
    "head_validation_accuracy": "Head alone, validation split",
    "stage2_test_accuracy": "Last block fine-tuned, test split",
    "stage2_validation_accuracy": "Last block fine-tuned, validation split",
    "unfrozen_test_accuracy": "Backbone trained too, test split",
    "unfrozen_validation_accuracy": "Backbone trained too, validation split",
    "acceptance_rate": "Accepted, last epoch",
    "estimated_wrong_labels": "Training labels expected wrong",
    "wrong_labels": "Wrong training labels",
    "wrong_labels_rejected": "Wrong labels rejected",
    "right_labels_rejected": "Right labels rejected",
}
NOT_JUDGED = "There is no test or validation split to judge the model by."
BY_GIVEN = "  by the given labels"
# The labels by which a comparison is judged.
JUDGED_BY = {
    "known": "Judged by labels that are known to be right.",
    "estimated": (
        "Judged by right labels, which nobody knows: estimated from the given ones, "
        "with the error of the estimate in each ±."
    ),
    "given": "Judged by the given labels, as right and wrong ones look the same.",
}
# How the backbone was trained after the head: the name in the results, and in words.
TUNINGS = {"stage2": "Last block fine-tuned", "unfrozen": "Backbone trained too"}


def share_text(share: float | None, digits: int = 1) -> str:
    """Returns a fraction in percent, a dash for None and NaN."""
    if share is None or math.isnan(share):
        return "-"
    return f"{100 * share:.{digits}f} %"


def shortened(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def range_text(low: float, high: float, sign: str = "") -> str:
    return f"{100 * low:{sign}.1f} to {100 * high:{sign}.1f}"


def proportion_text(share: float, count: int) -> str:
    """Returns the 95 % interval of a fraction of `count` samples, in percent."""
    return range_text(*proportion_interval(round(share * count), count))


def seconds_text(seconds: float) -> str:
    if seconds < 600:
        return f"{seconds:.{int(seconds < 10)}f} s"
    return f"{seconds / 60:.0f} min"


def about(seconds: float) -> str:
    """Returns a duration that does not look more exact than it is."""
    if seconds < 1:
        return "less than a second"
    if seconds < 90:
        return f"about {seconds:.0f} s"
    if seconds < 90 * 60:
        return f"about {seconds / 60:.0f} min"
    return f"about {seconds / 3600:.1f} h"


# Summaries ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of text; the first `text_columns` to the left, the others to the right."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    title: str = ""
    note: str = ""
    text_columns: int = 1


@dataclasses.dataclass(frozen=True)
class Summary:
    tables: tuple[Table, ...]
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def right_text(results: Mapping[str, Any], key: str) -> str | None:
    """Returns an accuracy by the right labels, known or estimated, or None."""
    if (known := results.get(f"{key}_clean")) is not None:
        return share_text(known)
    if (value := results.get(f"{key}_estimated")) is None:
        return None
    interval = range_text(results[f"{key}_low"], results[f"{key}_high"])
    return f"{share_text(value)} ({interval} %), estimated"


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """An accuracy by right labels, `"known"` or `"estimated"`, or by `"given"` ones."""

    split: str
    share: float
    interval: str
    by: str
    given: float
    count: int


def accuracies_of(
    results: Mapping[str, Any], sizes: Mapping[str, int]
) -> list[Accuracy]:
    """Returns the accuracy on each split that has one, with its 95 % interval."""
    found = []
    for split in ("validation", "test"):
        key, count = f"{split}_accuracy", sizes.get(split)
        if (given := results.get(key)) is None or not count:
            continue
        share, by = given, "given"
        if (known := results.get(f"{key}_clean")) is not None:
            share, by = known, "known"
        interval = proportion_text(share, count)
        if by == "given" and (value := results.get(f"{key}_estimated")) is not None:
            share, by = value, "estimated"
            interval = range_text(results[f"{key}_low"], results[f"{key}_high"])
        found.append(Accuracy(split, share, f"{interval} %", by, given, count))
    return found


def run_summary(run: Any) -> Summary:
    results = run.results
    rows = []
    for key, name in RESULT_NAMES.items():
        right = right_text(results, key)
        if right is not None and right != share_text(results.get(key)):
            rows.append((name, right))
            name = BY_GIVEN
        if key in results:
            rows.append((name, share_text(results[key])))
    for tuning, name in TUNINGS.items():
        if (kept := results.get(f"{tuning}_kept")) is not None:
            rows.append((name, "kept" if kept else "not kept: worse on validation"))
    if "best_epoch" in results:
        epochs = f"{results['best_epoch']} of {results['epochs_trained']}"
        rows.append(("Epoch that was kept", epochs))
    rows.append(("Time", f"{results['seconds']:.1f} s"))
    warnings = _unreadable(run)
    if run.overfitting is not None:
        warnings += (run.overfitting.sentence,)
    if not {"test_accuracy", "validation_accuracy"} & results.keys():
        warnings += (NOT_JUDGED,)
    compared = run.against_before
    notes = (run.finding, None if compared is None else compared.sentence)
    return Summary(
        (Table(("", ""), tuple(rows)),),
        warnings,
        (
            *(note for note in notes if note is not None),
            *copies_notes(run.features),
        ),
    )


def _unreadable(run: Any) -> tuple[str, ...]:
    if not (count := len(run.features.unreadable)):
        return ()
    kind = "texts" if takes_texts(run.config["backbone"]) else "images"
    return (
        f"{count} {kind} cannot be read and were left out; see unreadable.csv in the "
        "run folder.",
    )


MOST_CLASSES = 20


def label_tables(found: Mapping[str, Any]) -> tuple[Table, Table]:
    """Returns what an audit found by split and by class; the numbers add up."""

    def rows_of(parts: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str]]:
        whole = apportioned([one["expected_wrong"] or 0.0 for one in parts])
        rows = []
        for one, wrong in zip(parts, whole, strict=True):
            is_judged = one["expected_wrong"] is not None
            numbers = (f"{wrong:,}", f"{one['look_wrong']:,}")
            shown = numbers if is_judged else ("-", "-")
            rows.append((f"{one['samples']:,}", *shown))
        return rows

    total = ("all", *rows_of([found])[0])
    names = ("Samples", "Expected wrong", "Look wrong")
    parts = found["splits"]
    splits = [
        (name, *row)
        for name, row in zip(parts, rows_of(list(parts.values())), strict=True)
    ]
    for at, (name, one) in enumerate(parts.items()):
        if one["known"]:
            known = "all" if one["known"] == one["samples"] else f"{one['known']:,}"
            splits[at] = (f"{name}, {known} known to be right", *splits[at][1:])
    judged = [one for one in found["classes"] if one["expected_wrong"] is not None]
    judged.sort(key=lambda one: -one["expected_wrong"])
    small = [one for one in found["classes"] if one["expected_wrong"] is None]
    shown = judged[:MOST_CLASSES]
    for others, what in (
        (judged[MOST_CLASSES:], "others"),
        (small, "not judged"),
    ):
        if others:
            keys = ("samples", "look_wrong", "expected_wrong")
            sums: dict[str, Any] = {k: sum(one[k] or 0 for one in others) for k in keys}
            if others is small:
                sums["expected_wrong"] = None
            name = f"{len(others):,} {what}"
            shown.append({"class": name, "confused_with": None, **sums})
    classes = [
        (one["class"], one["confused_with"] or "-" if row[1] not in "-0" else "-", *row)
        for one, row in zip(shown, rows_of(shown), strict=True)
    ]
    classes.append((total[0], "", *total[1:]))
    return (
        Table(("Split", *names), (*splits, total)),
        Table(
            ("Given label", "Most often confused with", *names),
            tuple(classes),
            text_columns=2,
        ),
    )


def audit_summary(audit: Any) -> Summary:
    warnings = _unreadable(audit)
    tables = label_tables(audit.results["label_quality"])
    notes = (audit.finding, *copies_notes(audit.features))
    return Summary(tables[::-1], warnings, notes)


def quality_summary(numbers: Mapping[str, Any]) -> Summary:
    """Returns what was found out about labels: the numbers by class, and by split."""
    splits, classes = label_tables(numbers)
    tables = (classes, splits) if len(numbers["splits"]) > 1 else (classes,)
    is_judged = numbers["expected_wrong"] is not None
    return Summary(tables if is_judged else (), notes=(numbers["finding"],))


def summary_text(summary: Summary) -> str:
    """Returns a summary as lines of text, what it says first."""

    def lines(table: Table) -> str:
        rows = (table.columns, *table.rows)
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        sides = ["<"] * table.text_columns + [">"] * len(widths)
        return "\n".join(
            "  ".join(
                f"{cell:{side}{width}}"
                for cell, side, width in zip(row, sides, widths, strict=False)
            ).rstrip()
            for row in rows
        )

    texts = (*summary.warnings, *summary.notes)
    return "\n\n".join((*texts, *map(lines, summary.tables)))


def copies_notes(features: Any) -> tuple[str, ...]:
    """Returns what there is to say of samples that were found more than once."""
    return () if features.copies is None else (features.copies.sentence,)


def comparison_summary(comparison: Any) -> Summary:
    def points(interval: Interval | None, sign: str = "") -> str:
        if interval is None:
            return "-"
        mean = f"{100 * interval.mean:{sign}.1f}"
        if math.isinf(interval.half_width):  # One seed has no interval.
            return mean
        return f"{mean} ± {100 * interval.half_width:.1f}"

    methods = comparison.summaries.values()
    columns = ["Method", "Test", "vs. plain", "Given", "Accepted"]
    columns += ["Recovered", "Seconds"]
    if all(
        one.test_accuracy is None or one.test_accuracy.mean == one.test_accuracy_given
        for one in methods
    ):
        columns.remove("Given")
    elif all(one.recovered is None for one in methods):
        columns.remove("Recovered")
    else:  # The table fits 80 columns.
        columns.remove("Seconds")
    rows = []
    for name, method in comparison.summaries.items():
        accuracy = points(method.test_accuracy)
        if method.stalled:
            accuracy = f"{accuracy}, {method.stalled} stalled".removeprefix("-, ")
        cells = {
            "Method": name,
            "Test": accuracy,
            "vs. plain": points(method.difference_to_plain, sign="+"),
            "Given": share_text(method.test_accuracy_given).removesuffix(" %"),
            "Accepted": share_text(method.acceptance_rate, 0),
            "Recovered": share_text(method.recovered, 0),
            "Seconds": f"{method.seconds:.1f}",
        }
        rows.append(tuple(cells[column] for column in columns))
    seeds = len({outcome.seed for outcome in comparison.outcomes})
    spread = covered = ""
    by_given = " Given: by the given labels." if "Given" in columns else ""
    if seeds > 1:
        spread = f", mean of {seeds} seeds ± half-width of the 95 % interval over seeds"
        covered = " The verdict allows for other test samples too."
    notes = [
        f"Test accuracy in percent{spread}; differences to plain are paired by seed."
        f"{covered} {JUDGED_BY[comparison.judged_by]}{by_given}",
        comparison.verdict.sentence,
    ]
    if noise := comparison.config.get("noise"):
        made_wrong = (
            f"Training and validation labels were made wrong on purpose ({noise}), "
            "other ones for each seed."
        )
        notes.insert(0, made_wrong)
    table = Table(tuple(columns), tuple(rows))
    return Summary((table,), comparison.notes, tuple(notes))


def search_summary(found: Any, most_trials: int = 5) -> Summary:
    better = sorted(
        (one for one in found.outcomes if one.metrics),
        key=lambda one: -one.metrics["val_accuracy_estimated"],
    )
    rows = []
    for one in better[:most_trials]:
        setting = ", ".join(
            f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
            for name, value in one.values.items()
        )
        names = ("val_accuracy_estimated", "val_accuracy", "acceptance_rate")
        shares = (share_text(one.metrics[name]) for name in names)
        rows.append((one.trial_id, setting, *shares))
    trials = Table(
        ("Trial", "Setting", "Right labels", "Given labels", "Accepted"),
        tuple(rows),
        title=f"The best of {len(found.outcomes)} trials, on the validation split",
        text_columns=2,
    )
    warnings: tuple[str, ...] = ()
    if failed := found.results["failed"]:
        noun = "trial" if failed == 1 else "trials"
        warnings = (f"{failed} {noun} failed; see trials.csv.",)
    strategies = strategies_table(found.results.get("strategies", ()))
    tables = (trials, strategies, choice_table(found.results))
    return Summary(
        tuple(one for one in tables if one.rows), warnings, (found.choice.reason,)
    )


def choice_table(results: Mapping[str, Any]) -> Table:
    both = [results.get(key) or {} for key in ("chosen", "plain")]
    rows = []
    for split in ("test", "validation"):
        name, title = f"{split}_accuracy", split.title()
        given = [share_text(numbers.get(name)) for numbers in both]
        right = [right_text(numbers, name) for numbers in both]
        if any(right):
            shown = [(one or "-").removesuffix(", estimated") for one in right]
            rows.append((f"{title}, right labels", *shown))
            title = f"{title}, given labels"
        if given != ["-", "-"]:
            rows.append((title, *given))
    accepted = [share_text(numbers.get("acceptance_rate")) for numbers in both]
    rows.append(("Accepted", *accepted))
    note = ""
    if any("right labels" in row[0] for row in rows):
        note = (
            "Accuracies by right labels are estimated from the given ones; in brackets "
            "their 95 % intervals."
        )
    return Table(("", "chosen", "plain fine-tuning"), tuple(rows), note=note)


def strategies_table(strategies: Sequence[Mapping[str, Any]]) -> Table:
    """Returns the trials that train more or less of the backbone, from a search."""
    rows = []
    for row in strategies:
        shown = "failed" if row["message"] else "-"
        if (accuracy := row["validation_accuracy_estimated"]) is not None:
            shown = f"{100 * accuracy:.1f} ± {100 * row['standard_error']:.1f}"
        seconds, weights = row["seconds"], row["trainable_weights"]
        rows.append(
            (
                row["unfreeze"],
                row["policy"],
                shown,
                share_text(row["validation_accuracy"]),
                share_text(row["acceptance_rate"]),
                "-" if seconds is None else seconds_text(seconds),
                "-" if weights is None else f"{weights:,}",
                "chosen" if row["chosen"] else "",
            )
        )
    return Table(
        (
            "Trained",
            "Policy",
            "Right labels",
            "Given labels",
            "Accepted",
            "Time",
            "Weights",
            "",
        ),
        tuple(rows),
        title="How much of the backbone to train",
        note=(
            "Validation accuracy in percent ± the standard error of its difference to "
            "the best trial, on the same samples; a head's time is its fraction of the "
            "time of all heads; weights are those that learn."
        ),
        text_columns=2,
    )


def ranking_summary(ranking: Any) -> Summary:
    first, *others = ranking.ranked
    rows = tuple(
        (
            one.name,
            f"{100 * one.accuracy:.1f} ± {100 * one.accuracy_error:.1f}",
            "" if one is first else f"{100 * one.behind:.1f}",
            f"{1000 * one.seconds_per_image:.1f}",
            f"{one.weights_bytes / 1e6:.1f}",
            str(one.dim),
        )
        for one in ranking.ranked
    )
    notes = [
        f"Accuracy in percent of a quick head on {ranking.num_images} training "
        "samples, each predicted from the others, ± half-width of the 95 % interval; "
        "ms of feature extraction for a sample."
    ]
    if ranking.counts_right_labels:
        notes.append(
            f"About {100 * ranking.noise_rate:.0f} % of the labels are wrong: each "
            "label is weighted by its probability of being right, averaged over the "
            "backbones."
        )
    equal = [one.name for one in others if one.behind <= one.behind_error]
    if equal:
        notes.append(
            f"Not significantly worse than the first: {', '.join(equal)}; use a larger "
            "--sample."
        )
    warnings = [f"{name}: {why.partition(chr(10))[0]}" for name, why in ranking.failed]
    columns = ("Backbone", "Accuracy", "Behind", "ms", "MB", "Features")
    return Summary((Table(columns, rows),), tuple(warnings), tuple(notes))
